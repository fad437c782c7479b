"""How fast a teacher and its student answer, side by side."""

import statistics
import time

import torch

import models
from runs.settings import Speed

SPEED_SECONDS = 0.15  # for single images and for batches, in each precision


@torch.inference_mode()
def speeds(teachers, student, image_size, machine):
    """How fast `teachers` (networks that answer together, on `machine`'s device) and a `student` are: `batch`, and for
    both {precision: Speed}, in float32 and in the precision of the `machine`.

    The median of a few repeats, about a second in all. Both take turns, so that whatever else the machine does slows
    them alike; the first turn is a warm-up. Speed depends on shapes, not on weights: the student may be a new one.
    """
    networks = {"teacher": teachers, "student": [student.eval().to(**machine.place)]}
    batch = models.inference_batch(machine.device, image_size)
    result = {"batch": batch, "teacher": {}, "student": {}}
    for precision in dict.fromkeys(("fp32", machine.precision)):
        one, many = (_seconds(networks, count, image_size, machine, precision) for count in (1, batch))
        for name in networks:
            result[name][precision] = Speed(1000 * one[name], batch / many[name])
    return result


def _seconds(networks, count, image_size, machine, precision):
    """{name: median seconds} that each of `networks` takes for `count` images."""
    images = torch.randn(count, 3, image_size, image_size, generator=models.generator("speed"))
    images = images.to(**machine.place)
    seconds = {name: [] for name in networks}
    calls = 5 if count == 1 else 1  # in a turn: of single images the first finds the other network in the caches
    finish, turns = time.perf_counter() + SPEED_SECONDS, 0
    while turns < 3 or (turns < 50 and time.perf_counter() < finish):
        for name, members in networks.items():
            for _ in range(calls):
                machine.synchronize()
                started = time.perf_counter()
                with machine.autocast(precision):
                    for network in members:
                        network(images)
                machine.synchronize()
                seconds[name].append(time.perf_counter() - started)
        turns += 1
    return {name: statistics.median(measured[calls:]) for name, measured in seconds.items()}
