"""The command line: every option with its default, and which of them go together. Needs no PyTorch."""

import argparse
import difflib
import math
import re

DEMO = {
    "dataset": "shapes",
    "image_size": 16,
    "epochs": 12,
    "batch_size": 64,
    "train_fraction": 0.5,  # the teacher has seen what its students have not: section 6 of the paper
    "temperature": [4.0],
    "alpha": [0.9],
    "output_dir": "outputs/demo",
}

EXAMPLES = """\
examples:
  python main.py --demo                                     teacher and comparison on drawn shapes, offline, in a minute
  python main.py --train-teacher --epochs 200               train the teacher
  python main.py --epochs 200 --temperature 4 --alpha 0.1   train the student with and without it, and compare
  python main.py --alpha 0.9 --seeds 5                      five pairs of students: is the gain real?
  python main.py --train-teacher --seeds 2                  two teachers: teacher-s0 and teacher-s1
  python main.py --output-dir outputs/two --teacher outputs/teacher-s0 outputs/teacher-s1    a student of their ensemble
  python main.py --temperature 1 2 4 8 --alpha 0.1 0.5 0.9  choose them on a validation part, then compare
  python main.py --width 0.5 --alpha 0.9 --seeds 5          a student with half of the channels
  python main.py --loss examples/dkd.py:dkd --alpha 0.9 --seeds 3    does that loss beat plain distillation?
  python main.py --dataset folder --data-dir pets --output-dir outputs/pets --train-teacher    your own images
  python main.py --unlabeled photos --alpha 0.9 --seeds 3   what do images without labels add to distillation?
  python main.py --predict photo.jpg holiday/ > classes.csv    what the distilled student sees, in images and folders
  python main.py --export --model outputs/kd-T4-a0.1-s0        that student for ONNX Runtime, in one file
"""

# What trains nothing: the options that go with it, besides --output-dir, --demo and --debug, and why no others do.
TASKS = {
    "list": ((), "which only lists runs"),
    "report": ((), "which only reads finished runs"),
    "predict": (
        ("model", "temperature", "mirror", "device", "num_workers", "student", "teacher_network"),
        "which only uses a finished model",
    ),
    "export": (
        ("model", "temperature", "mirror", "student", "teacher_network"),
        "which only converts a finished model",
    ),
}

FOLDER_OPTIONS = ("test_fraction", "skip_damaged")  # of images in folders

SWITCH = {"action": "store_true"}


class Usage(Exception):
    """Wrong arguments: exit status 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        meant = difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        raise Usage(message + f" (is {meant[0]} meant?)" if meant else message)


def integer(low, high):
    """An argparse type: an integer from `low` to `high`."""

    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is not an integer from {low} to {high}")
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
            limits = f"{'above' if above else 'from'} {low:g} {'and up ' if above else ''}to {high:g}"
            raise argparse.ArgumentTypeError(f"'{text}' is not a number {limits}")
        return value

    return convert


def path(text):
    """An argparse type: a path; not an empty one, which an unset shell variable gives."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def function(text):
    """An argparse type: FILE.py:FUNCTION."""
    file, _, name = text.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"'{text}' is not FILE.py:FUNCTION")
    return text


def device_name(text):
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not one of auto, cpu, cuda, cuda:N, mps")
    return text


def parser():
    """The argparse parser of main.py."""
    top = Parser(
        prog="main.py",
        description="Knowledge distillation (Hinton, Vinyals and Dean, arXiv 1503.02531) on CIFAR-10:\n"
        "trains a teacher, then the same small student with the teacher and without, and compares them.",
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
    option("--list", "list the output folder's runs: how far each is, and what it reached", **SWITCH)
    option("--predict", "classify images, and all images in folders, with a trained student; CSV on standard output",
           type=path, nargs="+", action="extend", metavar="PATH")
    option("--export", "write a trained student as model.onnx, which runs without this program and PyTorch", **SWITCH)
    option("--model", "what --predict and --export use: a run's folder or model.pt [the output folder's only "
           "distilled student]",
           type=path, metavar="PATH")
    option("--demo", "teacher and students on small drawn shapes, without a download; other options override its "
           "settings", **SWITCH)

    option = group("distillation")
    option("--temperature", "divides the logits of teacher and student in the loss; several values are a sweep (with "
           "--predict and --export: divides the logits, 1 unless given)", [4.0],
           type=number(0.01, 1000), nargs="+", metavar="T")
    option("--alpha", "weight of the soft targets, 0 to 1; several values are a sweep; most of README's "
           "results are with 0.9", [0.1],
           type=number(0, 1), nargs="+", metavar="A")
    option("--teacher", "a finished run's folder or model.pt, of a teacher or a student; of several, the mean of their "
           "logits is used [the output folder's teacher-s<seed>, or its only one]",
           type=path, nargs="+", action="extend", metavar="PATH")
    option("--seeds", "how many pairs of students, or teachers, to train: --seed, --seed + 1, and so on",
           1, type=integer(1, 1000), metavar="N")
    option("--loss", "a loss of your own, compared with plain distillation and the baseline: FUNCTION(student_logits, "
           "labels, teacher_logits, temperature, alpha) returns a scalar",
           type=function, metavar="FILE.py:FUNCTION")
    option("--unlabeled", "a folder of images without labels: one more student learns from the teacher's answers to "
           "them, too, and is compared with plain distillation and the baseline", type=path, metavar="DIR")
    option("--student", "a student network of your own: FUNCTION(classes) returns a module from normalized images "
           "(B, 3, S, S) to logits", type=function, metavar="FILE.py:FUNCTION")
    option("--teacher-network", "a teacher network of your own, as --student; needed to train it and again to use "
           "it (of several teachers, name all networks)", type=function, nargs="+", action="extend",
           metavar="FILE.py:FUNCTION")
    option("--width", "multiplies the channels of all layers of the student, or with --train-teacher of the teacher",
           1.0, type=number(0, 8, above=True), metavar="F")
    option("--train-fraction", "students are trained on this part of each class, always the same images", 1.0,
           type=number(0, 1, above=True), metavar="F")
    option("--omit-class", "students see no image of this class, which the teacher knows; may be repeated",
           nargs="+", action="extend", metavar="NAME")
    option("--val-fraction", "part of the training set on which a sweep is judged [0.1]; with --train-teacher: train "
           "a teacher for sweeps, without that part",
           type=number(0, 0.5, above=True), metavar="F")

    option = group("training")
    option("--epochs", "passes over the training set; 0 keeps a --teacher-network as it is, trained elsewhere", 200,
           type=integer(0, 100_000), metavar="N")
    option("--batch-size", "images per step", 128, type=integer(1, 1_000_000), metavar="N")
    option("--lr", "learning rate at the start; it falls linearly to zero [0.2 * sqrt(batch size / 128); of networks "
           "of your own, after a short rise, 0.1 * batch size / 128]",
           type=number(0, 1e6, above=True), metavar="RATE")
    option("--weight-decay", "weight decay of the last layer, as convolutions are normalized instead; of all weights "
           "in networks of your own", 5e-4,
           type=number(0, 1), metavar="RATE")
    option("--label-smoothing", "replace each label by (1 - E) * label + E / classes, for all networks that "
           "the command trains; of a teacher, it makes soft targets that teach worse", 0.0,
           type=number(0, 0.9), metavar="E")
    option("--padding", "random crops: each training image is moved by up to N pixels in both directions, its edges "
           "reflected [a sixteenth of the image size in trainings of up to 8 epochs, an eighth in longer ones]",
           type=integer(0, 255), metavar="N")
    option("--cutout", "blank a square of N pixels a side, anywhere in each training image; 0 for none [of a teacher "
           "trained for more than 60 epochs three eighths of the image size, else 0]",
           type=integer(0, 256), metavar="N")
    option("--mirror", "flip each training image left to right in every second epoch; give --no-mirror to teacher and "
           "students where a mirror image is another thing, as with digits, letters and signs [on]; with --predict and "
           "--export: average the answers to an image and its mirror image, in twice the time [off]",
           action=argparse.BooleanOptionalAction)
    option("--seed", "seed of the initial weights and of the order of images", 0,
           type=integer(0, 2**31 - 1), metavar="N")

    option = group("images")
    option("--dataset", "CIFAR-10, CIFAR-100, images in folders, or drawn shapes", "cifar10",
           choices=("cifar10", "cifar100", "folder", "shapes"), metavar="{cifar10,cifar100,folder,shapes}")
    option("--data-dir", "where CIFAR is or is downloaded to, or a folder with train/CLASS/ and test/CLASS/, or with "
           "CLASS/ alone for --test-fraction", "data", type=path, metavar="DIR")
    option("--test-fraction", "part of each class that is split off as the test set, of --dataset folder without test/",
           type=number(0, 0.9, above=True), metavar="F")
    option("--skip-damaged", "train without the images of --dataset folder and --unlabeled that cannot be decoded",
           **SWITCH)
    option("--data-url", "a mirror to download the CIFAR archive from", metavar="URL")
    option("--image-size", "height and width that images are resized to, and in folders cropped to, 16 to 256", 32,
           type=integer(16, 256), metavar="N")
    option("--num-workers", "threads that decode images in folders", 2, type=integer(0, 256), metavar="N")

    option = group("machine and files")
    option("--device", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps; a run that was trained on another "
           "kind of device is resumed only if this names one", "auto",
           type=device_name, metavar="NAME")
    option("--precision", "fp32, bf16, or auto (bf16 where a GPU, or a CPU with AMX or AVX512-BF16, has it built in)",
           "auto", choices=("auto", "fp32", "bf16"), metavar="{auto,fp32,bf16}")
    option("--compile", "torch.compile the networks for training (needs a C++ compiler, on CUDA Triton) [off]",
           action=argparse.BooleanOptionalAction)
    option("--output-dir", "where runs, reports, soft targets and decoded images are kept", "outputs",
           type=path, metavar="DIR")
    option("--save-every", "seconds between saved states within an epoch", 120.0,
           type=number(0, 1e6), metavar="SECONDS")
    option("--overwrite", "remove the runs of this command that exist (of a sweep, those of all its pairs), and train "
           "them again", **SWITCH)
    option("--debug", "show the traceback of an error", **SWITCH)
    # fmt: on
    return top


def parse(argv):
    """The arguments as a namespace, --demo's settings applied; its `task` is the one of TASKS that was asked for, or
    None, which is to train. Raises Usage."""
    top = parser()
    if "--demo" in argv:
        top.set_defaults(**DEMO)
    if any(word.partition("=")[0] in ("--predict", "--export") for word in argv):
        top.set_defaults(temperature=[1.0])  # as the model was trained to answer
    arguments = top.parse_args(argv)
    arguments.temperature, arguments.alpha = (list(dict.fromkeys(v)) for v in (arguments.temperature, arguments.alpha))
    arguments.sweep = len(arguments.temperature) * len(arguments.alpha) > 1
    arguments.teacher_network, *arguments.other_networks = arguments.teacher_network or [None]
    arguments.task = next((name for name in TASKS if getattr(arguments, name)), None)
    if arguments.other_networks and arguments.task in ("predict", "export"):
        raise Usage(f"--{arguments.task} uses one model: give the one --teacher-network that it needs")
    if arguments.other_networks and not arguments.teacher:
        raise Usage("several --teacher-network are for several teachers: name these with --teacher")
    if arguments.train_teacher:
        for name in ("teacher", "loss", "student", "omit_class", "unlabeled", "train_fraction"):
            if getattr(arguments, name) != top.get_default(name):
                raise Usage(f"--{name.replace('_', '-')} is for students and cannot be combined with --train-teacher")
    if arguments.train_teacher and arguments.sweep:
        raise Usage("several temperatures or alphas are for students and cannot be combined with --train-teacher")
    if not arguments.epochs:
        if not (arguments.train_teacher and arguments.teacher_network):
            raise Usage("--epochs 0 is for --train-teacher with a --teacher-network that was trained before")
        for name in ("val_fraction", "seeds", "label_smoothing"):
            if getattr(arguments, name) != top.get_default(name):
                raise Usage(f"--{name.replace('_', '-')} cannot be combined with --epochs 0, which trains nothing")
    if arguments.task:
        more, why = TASKS[arguments.task]
        allowed = {arguments.task, *more, "task", "output_dir", "debug", "sweep", "demo", "other_networks"}
        typed = {word.partition("=")[0] for word in argv}
        for name, value in vars(arguments).items():
            option = f"--{name.replace('_', '-')}"
            if name not in allowed and (value != top.get_default(name) or option in typed):
                raise Usage(f"{option} cannot be combined with --{arguments.task}, {why}")
        if arguments.sweep:
            raise Usage(f"several temperatures cannot be combined with --{arguments.task}, {why}")
    elif arguments.model is not None:
        raise Usage("--model is for --predict and --export; a teacher is named with --teacher")
    if arguments.val_fraction is not None and not (arguments.sweep or arguments.train_teacher):
        raise Usage("--val-fraction needs a sweep, several values of --temperature or --alpha, or --train-teacher")
    if 0 in arguments.alpha and (len(arguments.alpha) > 1 or (arguments.sweep and not arguments.loss)):
        raise Usage("--alpha 0 is the baseline, which every sweep trains: leave it out")
    if arguments.unlabeled and arguments.sweep:
        raise Usage("--unlabeled is compared at one temperature and alpha: choose these by a sweep without it first")
    if arguments.unlabeled:
        if arguments.loss:
            raise Usage("--unlabeled is for the loss of distill.py: one of your own may need all labels")
        if arguments.omit_class:
            raise Usage("--unlabeled may show students the classes of --omit-class")
        if not arguments.alpha[0]:
            raise Usage("--unlabeled needs an --alpha above 0: without soft targets those images teach nothing")
    if arguments.loss and arguments.label_smoothing:
        raise Usage("--label-smoothing does not reach a loss of your own: smooth the labels there")
    if arguments.omit_class and arguments.label_smoothing:
        raise Usage("--label-smoothing would show students the classes of --omit-class")
    if arguments.test_fraction and arguments.dataset != "folder":
        raise Usage("--test-fraction is for --dataset folder")
    if arguments.skip_damaged and not (arguments.dataset == "folder" or arguments.unlabeled):
        raise Usage("--skip-damaged is for --dataset folder and --unlabeled")
    if arguments.data_url is not None:
        if arguments.dataset not in ("cifar10", "cifar100"):
            raise Usage("--data-url is for --dataset cifar10 or cifar100")
        if not re.match(r"https?://[^/]|file:///", arguments.data_url):
            raise Usage(f"--data-url: '{arguments.data_url}' does not begin with http://, https:// or file:///")
    if arguments.dataset == "shapes" and arguments.data_dir != top.get_default("data_dir"):
        raise Usage("--data-dir is not for --demo and --dataset shapes, whose images are drawn")
    if arguments.padding is not None and arguments.padding >= arguments.image_size:
        raise Usage(f"--padding must be less than --image-size, {arguments.image_size}")
    if arguments.cutout is not None and arguments.cutout > arguments.image_size:
        raise Usage(f"--cutout must be at most --image-size, {arguments.image_size}")
    own = arguments.teacher_network if arguments.train_teacher else arguments.student
    if arguments.width != 1 and own:
        raise Usage("--width is for the program's own networks: write the width into your function")
    if arguments.batch_size == 1 and arguments.image_size == 16 and not own:
        raise Usage("--batch-size 1 needs --image-size 17 or more: batch norm cannot be trained on a single pixel")
    if arguments.seed + arguments.seeds > 2**31:
        raise Usage("--seed and --seeds together exceed the largest seed, 2147483647")
    return arguments


def command(values):
    """The words of the command that trains a teacher with these arguments, a dict; defaults are left out."""
    words, defaults = ["python", "main.py", "--train-teacher"], parser()
    for name, value in values.items():
        if name == "epochs" or value != defaults.get_default(name):
            words += typed(name, value)
    return words


def typed(name, value):
    """The words of one option."""
    name = name.replace("_", "-")
    return [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
