"""On an NVIDIA GPU: what it saves to launch a training step as recorded CUDA graphs (runs/graphs.py), and whether the
weights stay the same bits. Ends with status 1 where they do not.

    python benchmarks/graphs.py               about a minute
    python benchmarks/graphs.py --compiled    and with --compile, about two minutes

Whole runs of some epochs of noise, of each kind, in turn: launched one by one, recorded, recorded once more, and
interrupted and resumed; a step's milliseconds are those of the fastest epoch. Writes a JSON file.
"""

import argparse
import csv
import signal
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from throughput import ALPHA, BATCH, CLASSES, SIZE, TEMPERATURE, noise

import data
import models
import train
from distill import Ensemble, SoftTargets
from runs.files import Failure, write_json
from runs.machine import Machine, start_machine
from runs.progress import Options
from runs.run import Run
from runs.settings import Settings
from runs.signals import Interrupted, Stop


@contextmanager
def launched_one_by_one():
    """A context in which nothing is recorded, no kernels run side by side, and each batch's views are made alone."""
    with (
        patch.object(train, "side_by_side", lambda function, *lists: [*map(function, *lists)]),
        patch.object(train, "recorded_network", lambda network, *rest: network),
        patch.object(train.Recorded, "__call__", lambda self, function, tensors: function(tensors)),
        patch.object(train, "TOGETHER", 0),
    ):
        yield


def interrupted_in(step, stop):
    """A context in which a signal comes during that step of a training, so that its state is saved after it."""
    take, taken = train.Muon.step, []

    def counted(optimizer):
        take(optimizer)
        taken.append(step)
        if len(taken) == step:
            stop.handle(signal.SIGINT)

    return patch.object(train.Muon, "step", counted)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="measure --compile, too")
    parser.add_argument("--images", type=int, default=20_000, help="an epoch's images [20,000]")
    parser.add_argument("--epochs", type=int, default=3, help="[3]")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "graphs-cuda.json", metavar="FILE")
    arguments = parser.parse_args()
    machine = start_machine("cuda", arguments.precision)
    loaded, steps = noise(arguments.images, machine.device), arguments.images // BATCH
    teacher = models.create("teacher", CLASSES, 0).eval().to(**machine.place)
    views = data.Views(loaded.train_images, loaded.mean, loaded.std)

    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        about = "the teacher", loaded.digest, views, place / "targets", machine
        targets = Ensemble([SoftTargets(teacher, *about)])

        def run(role, name, machine=machine, stop=None):
            kd = {"temperature": TEMPERATURE, "alpha": ALPHA, "teacher": "the teacher"} if role == "kd" else {}
            settings = Settings(role, loaded.digest, arguments.epochs, BATCH, 0.2, 5e-4, 0, SIZE, **kd)
            folder = place / f"{role} {name}"
            options = Options(stop=stop or Stop())
            train.train(Run(folder, settings), loaded, machine, options, targets if kd else None)
            with open(folder / "history.csv") as file:
                times = [1000 * float(row["seconds"]) / steps for row in csv.DictReader(file)]
            return min(times), models.digest(models.load(folder / "model.pt").state_dict())

        result, same = {}, True
        for role in ("teacher", "kd", "baseline"):
            with launched_one_by_one():
                slow, expected = run(role, "one by one")
            fast, digest = run(role, "recorded")
            again, other = run(role, "again")
            stop = Stop()
            with interrupted_in(steps + steps // 2, stop), suppress(Interrupted):
                run(role, "resumed", stop=stop)
            _, resumed = run(role, "resumed")
            found = {"recorded": digest, "recorded again": other, "resumed": resumed}
            different = [name for name, each in found.items() if each != expected]
            same &= not different
            result[role] = {"one_by_one_ms": slow, "recorded_ms": min(fast, again), "different": different}
            words = f"other bits: {', '.join(different)}" if different else "the same bits, resumed as well"
            print(f"{role:9}{slow:8.2f} ms a step one by one,{min(fast, again):6.2f} recorded; {words}", flush=True)
        for role in ("teacher", "baseline") if arguments.compiled else ():
            compiled, _ = run(role, "compiled", Machine(machine.device, machine.precision, compiled=True))
            result[role]["compiled_ms"] = compiled
            print(f"{role:9}{compiled:8.2f} ms a step with --compile", flush=True)
    write_json(arguments.output, {"environment": machine.environment(), "batch_size": BATCH, "steps": result})
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    try:
        main()
    except Failure as error:
        sys.exit(f"error: {error}")
