"""How long do many runs take on many devices? A small model from three measured times, checked against real launches.

    python benchmarks/scaling.py                a few minutes on 2 cores
    python benchmarks/scaling.py --device cuda --files /shared/folder

Measured: an epoch of the teacher, of soft targets and of a student, in one process with all cores and in as many
processes of one thread as there are cores, side by side; and how many ends of an epoch (state.pt, history.csv and
run.json, whole or not at all) the folder `--files` takes a second. Runs are handed out whole, so with D devices

    time = teacher + ceil(epochs / D) * targets of an epoch + ceil(students / D) * student

Timings that were taken while the machine was busy with anything else are not to be trusted: the load is printed.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import models
from distill import Ensemble, SoftTargets
from runs.files import write, write_json
from runs.machine import start_machine
from runs.progress import Options
from runs.run import Run
from runs.settings import Settings
from train import train

FULL, EPOCHS, SIZE, CLASSES = (50_000, 10_000), 200, 32, 10  # CIFAR-10, for which the table is
SHAPES = (2400, 1200)  # drawn shapes, training and test, of the check
PLANS = {  # name: [(students that are trained together, their part of the images)]
    "5 seeds (10 students)": [(10, 1.0)],
    "a sweep of 36 runs, then 3 seeds": [(36 + 3, 0.9), (6, 1.0)],
    "1,000 runs": [(1000, 1.0)],
}


def measure(device, threads, images):
    """Seconds for one image in an epoch of the teacher, of the targets and of a student: a dict."""
    torch.set_num_threads(threads)
    machine = start_machine(device, "auto")
    device = machine.device
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, SIZE, SIZE, 3), dtype=torch.uint8, generator=draws)
    labels = torch.arange(images) % CLASSES
    names, gray = tuple(f"class {k}" for k in range(CLASSES)), (0.5, 0.5, 0.5)
    loaded = data.Data(names, pixels, labels, pixels[:128], labels[:128], gray, gray, "noise").to(device)
    network = models.create("teacher", CLASSES, 0).to(**machine.place).eval()
    views = data.Views(loaded.train_images, loaded.mean, loaded.std)

    with tempfile.TemporaryDirectory() as folder:
        targets = Ensemble([SoftTargets(network, "", "", views, Path(folder) / "targets", machine)])

        def epoch(role, seed, **rest):
            settings = Settings(role, "noise", 1, 128, 0.2, 5e-4, seed, SIZE, **rest)
            run = Run(Path(folder) / settings.name, settings)
            train(run, loaded, machine, Options(), teacher=targets if role == "kd" else None)

        steps = {
            "teacher": lambda turn: epoch("teacher", turn),
            "targets": lambda turn: targets.epoch(turn),
            "student": lambda turn: epoch("kd", turn, temperature=4.0, alpha=0.5, teacher=""),  # has its targets
        }
        for step in steps.values():
            step(0)  # what is loaded, compiled or chosen once, on a GPU above all, is not timed
        print("ready", flush=True)
        sys.stdin.readline()
        found = {}
        for name, step in steps.items():
            started = time.perf_counter()
            step(1)
            found[name] = (time.perf_counter() - started) / images
    return found


def side_by_side(processes, threads, arguments):
    """The mean of what so many processes measure at the same time."""
    words = [sys.executable, __file__, "--measure", str(threads), "--images", str(arguments.images)]
    words += ["--device", arguments.device]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    started = [subprocess.Popen(words, **pipes) for _ in range(processes)]
    for each in started:
        each.stdout.readline()
    for each in started:
        each.stdin.write("go\n")
        each.stdin.flush()
    found = [json.loads(each.communicate()[0]) for each in started]
    return {name: sum(each[name] for each in found) / processes for name in found[0]}


def epochs_written(folder, size):
    """How many ends of a student's epoch `folder` takes a second, its state of `size` bytes."""
    content, started = os.urandom(size), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for _ in range(20):
            for name, part in (("state.pt", content), ("history.csv", content[:20_000]), ("run.json", content[:2000])):
                write(Path(place) / name, part)
        return 20 / (time.perf_counter() - started)


def predict(cost, images, tested, epochs, students, processes, teacher=True):
    """Seconds of a command on `images` training and `tested` test images; `cost` is as `measure` gives it, `students`
    as in PLANS. Soft targets are shared out by whole epochs; a test is a forward pass, a third of a training step."""
    waves = sum(math.ceil(count / processes) * part for count, part in students)
    targets = cost["targets"] * math.ceil(epochs / processes)
    trained = images * (targets + epochs * (cost["teacher"] * teacher + cost["student"] * waves))
    return trained + tested * (cost["targets"] + cost["student"] / 3 * waves)


def check(arguments, costs):
    """Prints predicted and measured seconds of four students, in one process and in two, all of one thread. What does
    not depend on the number of epochs (imports, data, the comparison) is measured: by the same command once more."""
    with tempfile.TemporaryDirectory() as place:
        words = ["main.py", "--dataset", "shapes", "--image-size", "32", "--epochs", "2", "--device", arguments.device]

        def seconds(*rest, processes=1):
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            command = [sys.executable, *(torchrun if processes > 1 else []), *words, *rest]
            started = time.perf_counter()
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
            return time.perf_counter() - started

        teacher = ["--output-dir", f"{place}/teacher"]
        seconds(*teacher, "--train-teacher")
        for processes in (1, 2):
            students = [
                "--teacher",
                f"{place}/teacher/teacher-s0",
                "--seeds",
                "2",
                "--output-dir",
                f"{place}/{processes}",
            ]
            measured = seconds(*students, processes=processes)
            fixed = seconds(*students, processes=processes)
            predicted = fixed + predict(costs[processes], *SHAPES, 2, [(4, 1.0)], processes, teacher=False)
            print(
                f"{processes} process{'es' * (processes > 1)}: predicted {predicted:.1f} s, measured {measured:.1f} s "
                f"(of these {fixed:.1f} s do not depend on the epochs)", flush=True,
            )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=1024, help="in an epoch that is measured")
    parser.add_argument("--files", default=".", help="a folder on the file system that the machines share")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write images a second to this JSON file, too")
    parser.add_argument("--measure", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.device, arguments.measure, arguments.images)))
        return
    cores = torch.get_num_threads()
    load = f"load before {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    print(f"{cores} cores, {load}; timings of a busy machine are not to be trusted\n")
    names = {(1, cores): f"1 process, {cores} threads", (1, 1): "1 process, 1 thread"}
    names |= {(cores, 1): f"{cores} processes, 1 thread each"}
    costs = {}
    print(f"{'images a second':<30}{'teacher':>10}{'targets':>10}{'student':>10}")
    for (processes, threads), name in names.items():
        costs[processes, threads] = cost = side_by_side(processes, threads, arguments)
        print(f"{name:<30}" + "".join(f"{processes / cost[part]:>10.0f}" for part in cost), flush=True)
    one, several = costs[1, cores], costs[cores, 1]
    ratio = one["student"] * cores / several["student"]
    print(f"Students: {cores} processes of one thread do {ratio:.2f} times what one of {cores} threads does.\n")
    if arguments.output:
        machine = start_machine(arguments.device, "auto")
        rates = {names[key]: {part: key[0] / seconds for part, seconds in cost.items()} for key, cost in costs.items()}
        command = f"python {shlex.join(sys.argv)}"
        found = {"environment": machine.environment(), "images_per_second": rates, "students_ratio": ratio}
        write_json(arguments.output, {"command": command, **found})

    student = models.create("student", CLASSES, 0).state_dict()
    rate = epochs_written(arguments.files, 2 * sum(4 * each.numel() for each in student.values()))
    devices = (1, 8, 64)
    print(f"Hours for {EPOCHS} epochs of {FULL[0]:,} images, a process of one thread (or a GPU) being a device:")
    print(f"{'':<34}" + "".join(f"{f'on {count}':>10}" for count in devices))
    for name, students in PLANS.items():
        hours = (predict(several, *FULL, EPOCHS, students, count) / 3600 for count in devices)
        print(f"{name:<34}" + "".join(f"{each:>10.2f}" for each in hours))
    print(
        f"{'of these the single teacher':<34}" + f"{several['teacher'] * FULL[0] * EPOCHS / 3600:>10.2f}" * len(devices)
    )
    print(
        f"{arguments.files} takes the files of {rate:.1f} ends of an epoch a second: enough for "
        f"{rate * several['student'] * FULL[0]:,.0f} such devices.\n"
    )
    if cores > 1:
        check(arguments, {1: costs[1, 1], 2: side_by_side(2, 1, arguments) if cores > 2 else several})


if __name__ == "__main__":
    main()
