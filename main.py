#!/usr/bin/env python3
"""Knowledge distillation on CIFAR-10 (Hinton, Vinyals and Dean, arXiv 1503.02531), with an honest baseline.

    python main.py --train-teacher --epochs 200
    python main.py --epochs 200 --temperature 4.0 --alpha 0.1

The first command trains the teacher; the second trains the same student with and without it, and compares. Every
command can simply be repeated: what is finished is reused, what was interrupted is continued.
"""

import argparse
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from files import (
    Failure,
    Interrupted,
    Stop,
    lock,
    read_json,
    reason,
)  # PyTorch is imported once the arguments are known good

DEMO = {
    "dataset": "shapes",
    "image_size": 16,
    "epochs": 6,
    "batch_size": 64,
    "temperature": [4.0],
    "alpha": [0.9],
    "output_dir": "outputs/demo",
}

EXAMPLES = """\
examples:
  python main.py --demo                                     teacher and comparison on drawn shapes, offline, in a minute
  python main.py --train-teacher --epochs 200               train the teacher
  python main.py --epochs 200 --temperature 4 --alpha 0.1   train the student with and without it, and compare
  python main.py --seeds 5                                  five pairs of students: is the gain real?
  python main.py --train-teacher --seeds 2                  two teachers: teacher-s0 and teacher-s1
  python main.py --output-dir outputs/two --teacher outputs/teacher-s0 outputs/teacher-s1      students of both together
  python main.py --temperature 1 2 4 8 --alpha 0.1 0.5 0.9  choose both on a validation part, then compare
  python main.py --dataset folder --data-dir pets --train-teacher    pictures in pets/train/CLASS and pets/test/CLASS
"""


SWITCH = {"action": "store_true"}


class Usage(Exception):
    """Wrong arguments: exit status 2."""


class NoKernels(Failure):
    """A GPU for which this build of PyTorch has no code: PyTorch calls it available all the same."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Usage(message)


def whole(low, high=None):
    """An argparse type: a whole number from `low` to `high`."""

    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            limits = f"from {low} up" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number {limits}")
        return value

    return convert


def number(low, high, above=False):
    """An argparse type: a number from `low` (or above it) to `high`."""

    def convert(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high if above else low <= value <= high):
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a number {'above' if above else 'from'} {low:g} to {high:g}"
            )
        return value

    return convert


def path(text):
    """An argparse type: a path, which an unset shell variable is not."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty, but a path is needed")
    return text


def device_name(text):
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not one of auto, cpu, cuda, cuda:N, mps")
    return text


def parser():
    top = Parser(
        prog="main.py",
        description="Knowledge distillation (Hinton, Vinyals and Dean, arXiv 1503.02531) on CIFAR-10:\n"
        "trains a teacher, then the same small student with and without it, and compares them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python main.py [options]",
        allow_abbrev=False,
    )

    def group(title):
        options = top.add_argument_group(title)

        def option(name, text, default=None, **rest):
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            text = text if shown is None else f"{text} [{shown}]"
            options.add_argument(name, default=default, help=text, **rest)

        return option

    option = group("what to do")
    # fmt: off
    option("--train-teacher", "train the teacher (or --seeds N of them); without it, the student with and without "
           "distillation", **SWITCH)
    option("--report", "print and draw the comparison again from a folder's finished runs", **SWITCH)
    option("--demo", "both steps on small drawn shapes, offline; other options overrule its settings", **SWITCH)

    option = group("distillation")
    option("--temperature", "softens teacher and student; several values are a sweep", [4.0],
           type=number(0, 1000, above=True), nargs="+", metavar="T")
    option("--alpha", "weight of the soft targets, 0 to 1; several values are a sweep", [0.1],
           type=number(0, 1), nargs="+", metavar="A")
    option("--teacher", "a finished teacher's folder or model.pt; several answer together, by their mean logits "
           "[output folder's teacher-s<seed>, or its only one]",
           type=path, nargs="+", action="extend", metavar="PATH")
    option("--seeds", "pairs of students, or teachers, to train, from --seed up; more pairs give a narrower interval",
           1, type=whole(1, 1000), metavar="N")
    option("--val-fraction", "part of the training set on which a sweep is judged [0.1]",
           type=number(0, 0.5, above=True), metavar="F")

    option = group("training")
    option("--epochs", "passes over the training set", 200, type=whole(1, 100_000), metavar="N")
    option("--batch-size", "pictures a step", 128, type=whole(1, 1_000_000), metavar="N")
    option("--lr", "peak learning rate [0.2 * sqrt(batch size / 128)]",
           type=number(0, 1e6, above=True), metavar="RATE")
    option("--weight-decay", "on the head's matrix; convolutions keep their norm instead", 5e-4,
           type=number(0, 1), metavar="RATE")
    option("--seed", "of initial weights and order of pictures", 0, type=whole(0, 2**31 - 1), metavar="N")

    option = group("pictures")
    option("--dataset", "CIFAR-10, pictures in folders, or drawn shapes", "cifar10",
           choices=("cifar10", "folder", "shapes"), metavar="{cifar10,folder,shapes}")
    option("--data-dir", "where CIFAR-10 is or goes, or the folder with train/CLASS/ and test/CLASS/", "data",
           type=path, metavar="DIR")
    option("--data-url", "a mirror to download the CIFAR-10 archive from", metavar="URL")
    option("--image-size", "height and width that pictures are brought to, 16 to 64", 32,
           type=whole(16, 64), metavar="N")
    option("--num-workers", "threads that decode pictures in folders", 2, type=whole(0, 256), metavar="N")

    option = group("machine and files")
    option("--device", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps", "auto",
           type=device_name, metavar="NAME")
    option("--precision", "fp32, bf16, or auto (bf16 where a GPU, or a CPU with AMX, has it built in)", "auto",
           choices=("auto", "fp32", "bf16"), metavar="{auto,fp32,bf16}")
    option("--compile", "torch.compile the networks for training (needs a C++ compiler, on CUDA Triton) [off]",
           action=argparse.BooleanOptionalAction)
    option("--output-dir", "everything the program writes goes here", "outputs", type=path, metavar="DIR")
    option("--save-every", "seconds between saved states within an epoch", 120.0,
           type=number(0, 1e6), metavar="SECONDS")
    option("--overwrite", "train anew what this command trains, in place of what is there", **SWITCH)
    option("--debug", "show the traceback of an error", **SWITCH)
    # fmt: on
    return top


def parse(argv):
    """The arguments as a namespace, --demo's settings applied; raises Usage."""
    top = parser()
    if "--demo" in argv:
        top.set_defaults(**DEMO)
    arguments = top.parse_args(argv)
    arguments.temperature, arguments.alpha = (list(dict.fromkeys(v)) for v in (arguments.temperature, arguments.alpha))
    arguments.sweep = len(arguments.temperature) * len(arguments.alpha) > 1
    arguments.begun_anew = False  # until --overwrite has taken the first run's files away
    if arguments.train_teacher:
        for name, given in (
            ("--report", arguments.report),
            ("--teacher", arguments.teacher),
        ):
            if given:
                raise Usage(f"{name} is for students and does not go with --train-teacher")
    if arguments.train_teacher and arguments.sweep:
        raise Usage("several temperatures or alphas are for students and do not go with --train-teacher")
    if arguments.report:
        own = {"report", "output_dir", "debug", "sweep", "demo", "begun_anew"}
        for name, value in vars(arguments).items():
            if name not in own and value != top.get_default(name):
                raise Usage(f"--{name.replace('_', '-')} does not go with --report, which reads what is there")
    if arguments.val_fraction is not None and not arguments.sweep:
        raise Usage("--val-fraction goes with a sweep: several values of --temperature or --alpha")
    if arguments.data_url is not None:
        if arguments.dataset != "cifar10":
            raise Usage("--data-url goes with --dataset cifar10")
        if not re.match(r"https?://[^/]|file:///", arguments.data_url):
            raise Usage(f"--data-url: '{arguments.data_url}' does not begin with http://, https:// or file:///")
    if arguments.seed + arguments.seeds > 2**31:
        raise Usage("--seed and --seeds together pass the largest seed, 2147483647")
    return arguments


# Which runs are needed -----------------------------------------------------------------------------------------------


def teacher_command(arguments, **begun):
    """The command that trains the teacher which these arguments miss, or that continues one `begun` with others."""
    words = ["python", "main.py", "--train-teacher"]
    given = {name: getattr(arguments, name) for name in ("dataset", "data_dir", "epochs", "image_size", "output_dir")}
    for name, value in (given | begun).items():
        if name == "epochs" or value not in (parser().get_default(name), False):
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def find_teachers(arguments):
    """The paths of the finished teachers' model.pt; raises Failure where one is missing. Needs no PyTorch."""
    return [_find_teacher(arguments, named) for named in arguments.teacher or [None]]


def _find_teacher(arguments, named):
    output = Path(arguments.output_dir)
    if named:
        place = Path(named)
        if place.is_file():
            return place
        if not place.is_dir():
            raise Failure(f"--teacher {place} is not there.")
    else:
        place = output / f"teacher-s{arguments.seed}"
        if not place.is_dir():
            others = sorted(each for each in output.glob("teacher-s*") if each.is_dir())
            if len(others) > 1:
                raise Failure(
                    f"{output} holds several teachers. Name one with --teacher, or several as an ensemble: "
                    f"{' '.join(map(str, others))}"
                )
            place = others[0] if others else place
    if (place / "model.pt").is_file():
        return place / "model.pt"
    if (place / "run.json").is_file():
        run = read_json(place / "run.json")
        begun = {"output_dir": str(place.parent)}
        try:
            settings = run["settings"]
            progress = f"epoch {int(run['epochs_done'])} of {int(settings['epochs'])}"
            begun |= {name: settings[name] for name in ("epochs", "image_size", "batch_size", "weight_decay", "seed")}
            begun["lr"] = settings["learning_rate"]
            typed = ("dataset", "data_dir", "device", "precision", "compile")
            begun |= {name: run["recorded"][name] for name in typed if name in run["recorded"]}
        except (KeyError, TypeError, ValueError, OverflowError):
            progress = "its run.json is damaged"
        raise Failure(
            f"The teacher in {place} is unfinished ({progress}). Finish it with its own command:\n"
            f"{teacher_command(arguments, **begun)}"
        )
    if named and (inside := sorted(place.glob("teacher-s*/model.pt"))):
        raise Failure(f"--teacher {named} is not a teacher, but holds: {' '.join(str(each.parent) for each in inside)}")
    own = re.fullmatch(r"teacher-s(\d+)", place.name)  # the program's own name for it
    begun = {"output_dir": str(place.parent), "seed": int(own[1])} if named and own else {}
    raise Failure(
        f"There is no teacher in {named or output} yet. Train one first:\n{teacher_command(arguments, **begun)}"
    )


def choose_device(name):
    """The torch.device that `name` means; raises Failure where this machine has none such."""
    import torch

    kinds = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    there = [kind for kind, is_there in kinds.items() if is_there()]
    if name == "auto":
        for kind in there:
            try:
                return _usable(torch.device(kind))
            except NoKernels as error:
                print(f"{error} The next best device is taken.", file=sys.stderr)
    kind, _, index = name.partition(":")
    if kind not in there or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        raise Failure(f"The device {name} is not on this machine. It has: {', '.join(there)}.")
    return _usable(torch.device(name))


def _usable(device):
    """`device`, once it has computed something. Raises NoKernels, or Failure where it is busy, say."""
    import torch

    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        why = f"{error}\n".splitlines()[0] or type(error).__name__
        kind = NoKernels if "no kernel image" in why else Failure
        raise kind(f"The device {device} is there, but cannot be used: {why}.") from None
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # for what asks about the current one, such as its precisions
    return device


def choose_precision(name, device):
    """The precision that `name` means on `device`; auto is bf16 where matrix units for it are built in: elsewhere it
    gains nothing, or is emulated and many times slower."""
    import torch

    if name != "auto":
        return name
    if device.type == "cpu":
        built_in = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
    else:
        built_in = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if built_in else "fp32"


class Session:
    """What one command works with: data, device, trainer; and the runs it asks for."""

    def __init__(self, arguments, stop):
        import data
        import distill
        import models
        import train

        self.arguments, self.output = arguments, Path(arguments.output_dir)
        self.device = choose_device(arguments.device)
        self.precision = choose_precision(arguments.precision, self.device)
        loaded = data.load(
            arguments.dataset,
            data_dir=arguments.data_dir,
            data_url=arguments.data_url,
            image_size=arguments.image_size,
            workers=arguments.num_workers,
            cache=self.output / "data",
        )
        self.data = loaded.to(self.device)
        typed = ("dataset", "data_dir", "num_workers", "teacher", "device", "precision", "compile")
        recorded = {name: getattr(arguments, name) for name in typed}
        self.trainer = train.Trainer(
            self.data, self.device, self.precision, arguments.save_every, stop, recorded, bool(arguments.compile)
        )
        self.costs = {
            name: models.costs(name, len(loaded.classes), loaded.image_size) for name in ("teacher", "student")
        }
        print(
            f"{arguments.dataset}: {len(loaded.train_labels):,} training and {len(loaded.test_labels):,} test pictures "
            f"of {loaded.image_size}x{loaded.image_size}, {len(loaded.classes)} classes"
        )
        for name, (parameters, macs) in self.costs.items():
            print(f"{name.capitalize()}: {parameters:,} parameters, {macs / 1e6:.1f} million multiply-adds a picture")
        print(f"Device: {distill.describe(self.device)}, {self.precision}", flush=True)

    def settings(self, role, seed, **rest):
        """A run's Settings, from the arguments and the data."""
        import train

        given = self.arguments
        pictures = len(self.data.train_labels)
        return train.Settings(
            role=role,
            data=self.data.digest,
            epochs=given.epochs,
            batch_size=given.batch_size,
            learning_rate=given.lr or train.default_learning_rate(min(given.batch_size, pictures)),
            weight_decay=given.weight_decay,
            seed=seed,
            image_size=given.image_size,
            **rest,
        )

    def students(self, teacher, pairs=None, folder=None, val_fraction=0.0):
        """The runs, as (folder, Settings), of students with a teacher's digest and without: for every seed those of
        all `pairs` of temperature and alpha [all asked for], then the baseline."""
        given, folder, listed = self.arguments, folder or self.output, []
        for seed in range(given.seed, given.seed + given.seeds):
            for t, a in pairs or itertools.product(given.temperature, given.alpha):
                kd = self.settings("kd", seed, temperature=t, alpha=a, teacher=teacher, val_fraction=val_fraction)
                listed.append((folder / kd.name, kd))
            baseline = self.settings("baseline", seed, val_fraction=val_fraction)
            listed.append((folder / baseline.name, baseline))
        return listed

    def selection(self, teacher):
        """The runs of the sweep, which are judged on a part of the training pictures; none where there is no sweep."""
        if not self.arguments.sweep:
            return []
        return self.students(teacher, None, self.output / "selection", self.arguments.val_fraction or 0.1)

    def prepare(self, runs):
        """Looks at all of `runs`, pairs of (folder, Settings), before any is trained: takes their files away with
        --overwrite, else raises Failure for one that is there with other settings."""
        import train

        for folder, settings in runs:
            if self.arguments.overwrite:
                self.arguments.begun_anew = True
                train.reset(folder)
            else:
                self.trainer.look(folder, settings)

    def train(self, runs, targets=None, afterwards=0):
        """Trains what is not yet finished of `runs`, pairs of (folder, Settings), and prints each one's accuracy.

        `afterwards` is how many more runs the command trains after these, for the time left."""
        import train

        waiting = [not train.is_finished(folder) for folder, _ in runs]
        for position, (folder, settings) in enumerate(runs):
            later = sum(waiting[position + 1 :]) + afterwards
            self.trainer.later = later * settings.epochs * len(self.data.train_labels)
            before = "" if waiting[position] else " (finished before)"
            title = folder.name if len(runs) == 1 else f"[{position + 1}/{len(runs)}] {folder.name}"
            result = self.trainer.train(folder, settings, targets if settings.alpha else None, title)
            kind = "validation" if settings.val_fraction else "test"
            print(f"{folder}: {kind} accuracy {result:.4f}{before}", flush=True)


def train_teachers(session):
    given = session.arguments
    students = 0 if given.train_teacher else 2 * given.seeds
    runs = [session.settings("teacher", given.seed + number) for number in range(1 if students else given.seeds)]
    runs = [(session.output / settings.name, settings) for settings in runs]
    session.prepare(runs)
    if students and given.overwrite:  # --demo: now, so that they never stop whoever continues without it
        session.prepare(session.selection(None) + session.students(None))
    session.train(runs, afterwards=students)


def verify_teacher(session, path, content):
    """Raises Failure where a teacher, the `content` of the model.pt at `path`, does not fit the session's data."""
    data = session.data
    for what, found, wanted in (
        ("holds a network of architecture", content["architecture"], "teacher"),
        ("was trained for the classes", ", ".join(content["classes"]), ", ".join(data.classes)),
        ("was trained for the image size", content["image_size"], data.image_size),
    ):
        if found != wanted:
            raise Failure(f"The teacher {path} {what} {found}, but {wanted} is needed.")
    if content["settings"].get("data") != data.digest:
        raise Failure(
            f"The teacher {path} was trained on other pictures than these. Train one on these, and students beside "
            "it, in another output folder, such as:\n"
            f"{teacher_command(session.arguments, output_dir=f'{session.output}-2')}"
        )


def train_students(session, contents):
    """The sweep where there is one, then the students with and without distillation. Returns what the report needs.

    `contents` are pairs of the teachers' model.pt and its verified content."""
    import torch

    import distill
    import models
    import report
    from data import split

    given, data = session.arguments, session.data
    teachers, named = {}, {}
    for path, content in contents:
        verify_teacher(session, path, content)
        digest = models.digest(content["state_dict"])
        if digest in named:
            raise Failure(f"{path} and {named[digest]} are the same teacher, which has one vote: name it once.")
        named[digest] = path
        teachers[digest] = models.restore(content).to(session.device, memory_format=torch.channels_last)
        print(f"{path}: test accuracy {content['accuracy']:.4f} (teacher)")
    teachers = dict(sorted(teachers.items()))  # whatever the order in which they are named, they answer the same
    teacher_digest, views, kept = "+".join(teachers), session.trainer.views(), session.output / "targets"
    targets = distill.Ensemble(
        [distill.SoftTargets(each, digest, data.digest, views, kept, session.precision)
         for digest, each in teachers.items()]
    )  # fmt: skip
    if any(given.alpha):
        print(f"Soft targets: {given.epochs * targets.bytes_per_epoch / 1e6:.1f} MB in {kept}", flush=True)
    report.keep_test_set(session.output, data, teachers)

    seeds = range(given.seed, given.seed + given.seeds)
    pairs = list(itertools.product(given.temperature, given.alpha))
    best, asked = pairs[0], session.students(teacher_digest)
    if selection := session.selection(teacher_digest):
        fraction = selection[0][1].val_fraction
        if not len(split(data.train_labels, fraction)[1]):
            raise Failure("A sweep needs at least two training pictures in some class, to judge on one of them.")
        print(f"Sweep: {len(pairs)} pairs of temperature and alpha, judged on {fraction:.0%} of the training pictures")
        # Which pair will be trained on everything is not known yet: with --overwrite its run is taken away once it is,
        # those of the others only where they would stop whoever continues without --overwrite.
        fits, anew = session.trainer.fits, given.overwrite
        session.prepare(selection + [run for run in asked if not anew or run[1].role == "baseline" or not fits(*run)])
        session.train(selection, targets, afterwards=2 * len(seeds))
        best = report.best_pair(session.output, pairs, seeds)
        print(f"Best on the validation part: temperature {best[0]}, alpha {best[1]}")
        asked = session.students(teacher_digest, [best])
        session.prepare([run for run in asked if run[1].role == "kd"])
    else:
        session.prepare(asked)
    session.train(asked, targets)
    return {"temperature": best[0], "alpha": best[1], "seeds": list(seeds)}


def run(arguments, stop):
    """Does what the arguments ask for."""
    if arguments.report:
        import report

        if not Path(arguments.output_dir).is_dir():
            raise Failure(f"{arguments.output_dir} is not there: --report needs a folder with finished runs.")
        with lock(arguments.output_dir):
            report.report(arguments.output_dir)
        return
    demo = arguments.demo and not arguments.train_teacher and not arguments.teacher
    paths = [] if arguments.train_teacher or demo else find_teachers(arguments)
    with lock(arguments.output_dir):
        import models
        import report

        contents = [(path, models.read(path)) for path in paths]
        session = Session(arguments, stop)
        if not paths:
            train_teachers(session)
        if not arguments.train_teacher:
            contents = contents or [(path, models.read(path)) for path in find_teachers(arguments)]
            asked = train_students(session, contents)
            report.report(arguments.output_dir, asked)


def main(argv=None):
    """The command line; returns the exit status: 0, 1 for a failure, 2 for wrong usage, 130 and 143 when stopped."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a class name that this terminal cannot show
    stop = Stop()
    handlers = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    arguments = None
    try:
        arguments = parse(argv)
        run(arguments, stop)
        return 0
    except Usage as error:
        print(f"error: {error} (see python main.py --help)", file=sys.stderr)
        return 2
    except Interrupted as error:
        for number in handlers:  # a further signal has nothing to add
            signal.signal(number, signal.SIG_IGN)
        again = "The same command without --overwrite" if arguments and arguments.begun_anew else "The same command"
        print(f"\n{error} {again} continues it.", file=sys.stderr)
        return 128 + error.signal_number
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments is None or arguments.debug:
            traceback.print_exc()
        elif isinstance(error, Failure):
            print(f"error: {error}", file=sys.stderr)
        elif isinstance(error, OSError):
            print(f"error: {error.filename or 'a file'}: {reason(error)}.", file=sys.stderr)
        elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            print("error: there is not enough memory. Try a smaller --batch-size or --image-size.", file=sys.stderr)
        else:
            first = str(error).splitlines()[0] if str(error) else ""
            print(f"error: {type(error).__name__}: {first}\n(--debug shows where)", file=sys.stderr)
            if arguments.compile:
                print("If it is torch.compile that fails here, leave --compile away.", file=sys.stderr)
        if arguments and arguments.begun_anew and "--overwrite" not in str(error):  # which says what else is needed
            print("The same command without --overwrite continues what was trained.", file=sys.stderr)
        return 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
