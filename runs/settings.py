"""What identifies a run, and what run.json says of it. Needs no PyTorch."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from msgspec import Meta

VERSION = "2.2.0"  # of the program: raise it with any change of the bits that a training gives
RECIPE = 5  # of networks, initial weights, optimizer and schedule: raise it with any change of more than last bits
SPLIT_VERSION = 2  # of data.split for students of a part of the images
VIEWS_VERSION = 1  # of the augmentation in data.Views: raise it with any change of it

WIDEST = 8.0  # how many times as many channels a network may have

Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]


@dataclass(frozen=True)
class Settings:
    """What identifies a run: two runs with equal settings end with equal weights (on one machine, by one version).
    `data` and `teacher` are SHA-256 digests, those of several teachers sorted and joined by "+"; `sweep_teacher` is
    that of the same teacher trained without the validation images, where a sweep's student was distilled from that one.
    `split` is the version of data.split for those of a part of the images, None of the first.

    A view is moved by at most `padding` pixels; by an eighth of the image size in runs that record nothing of it. A
    square of `cutout` pixels a side is blanked, and with `mirror` each image is mirrored in every second epoch.
    `width` multiplies the channels of the network. Students see `train_fraction` of the training images and none of
    the classes `omit_class`; `loss` and `network` are the names of functions of the user's own, in files of these names
    and digests; `unlabeled` is the SHA-256 of the images without labels that a distilled student sees, too. What is in
    OPTIONAL is recorded only where it differs from that default, as older runs have none of it."""

    role: Literal["teacher", "kd", "baseline"]
    data: str
    epochs: NotNegative
    batch_size: Positive
    learning_rate: float
    weight_decay: float
    seed: NotNegative
    image_size: Positive
    padding: NotNegative | None = None
    val_fraction: Share = 0.0
    temperature: float | None = None
    alpha: Share | None = None
    teacher: str | None = None
    recipe: int = RECIPE
    views: int = VIEWS_VERSION
    sweep_teacher: str | None = None
    split: int | None = None
    label_smoothing: Share = 0.0
    train_fraction: Annotated[float, Meta(gt=0, le=1)] = 1.0
    omit_class: tuple[str, ...] = ()
    loss: str | None = None
    loss_file: str | None = None
    loss_sha256: str | None = None
    network: str | None = None
    network_file: str | None = None
    network_sha256: str | None = None
    unlabeled: str | None = None
    cutout: NotNegative = 0
    mirror: bool = True
    width: Annotated[float, Meta(gt=0, le=WIDEST)] = 1.0

    def __post_init__(self):
        if self.padding is None:
            object.__setattr__(self, "padding", self.image_size // 8)

    @property
    def architecture(self):
        return "teacher" if self.role == "teacher" else "student"

    @property
    def name(self):
        """The name of the run's folder: teacher-s0, kd-T4-a0.1-s0, kd-unlabeled-T4-a0.9-s0, baseline-s0,
        baseline-w0.5-s0, baseline-f0.03-without-bird-s0."""
        return run_name(self.role, self.temperature, self.alpha, self.seed, self.variant, self.shared)

    @property
    def variant(self):
        """What a student has besides plain distillation: a loss of the user's own, by its name and digest, or images
        without labels, by "unlabeled" and their digest; else None."""
        return (self.loss, self.loss_sha256) if self.loss else self.unlabeled and ("unlabeled", self.unlabeled)

    @property
    def augmentation(self):
        """The `padding`, `cutout` and `mirror` of data.Views."""
        return {"padding": self.padding, "cutout": self.cutout, "mirror": self.mirror}

    @property
    def images_per_label(self):
        """How many images a step takes for each with a label."""
        return 2 if self.unlabeled else 1

    @property
    def asks_teacher(self):
        """Whether training needs soft targets."""
        return self.role == "kd" and (self.alpha > 0 or self.loss is not None)

    @property
    def shared(self):
        """What a distilled student and its baseline have in common beyond what every run has."""
        network = (self.network, self.network_sha256) if self.network else other_width(self.width)
        return self.train_fraction, self.omit_class, network

    def as_dict(self):
        values = asdict(self) | {"omit_class": list(self.omit_class), "architecture": self.architecture}
        return {name: value for name, value in values.items() if name not in OPTIONAL or value != OPTIONAL[name]}


# Of the settings: what a run has that records nothing of them.
OPTIONAL = {
    "label_smoothing": 0.0,
    "cutout": 0,
    "mirror": True,
    "width": 1.0,
    "train_fraction": 1.0,
    "omit_class": [],
} | dict.fromkeys(
    ["sweep_teacher", "split", "unlabeled"]
    + [f"{what}{more}" for what in ("loss", "network") for more in ("", "_file", "_sha256")]
)
OTHERS = {  # what to say where two runs differ in what is no number
    "data": "another data set", "teacher": "another teacher", "sweep_teacher": "another teacher for the sweep",
    "split": "another validation part", "unlabeled": "other images without labels",
}  # fmt: skip
# Said of a sweep that is not fair, while it runs and in its report.
UNFAIR_SWEEP = "The teacher was trained on these images, too: this can favour students that follow it closely."
SHORT, LONG = 8, 60  # epochs up to which a training is short, and beyond which it is long (default_augmentation)
LONGEST = 100  # bytes that the names of omitted classes take in a folder's name, of the 255 that file systems allow
PLAIN = (1.0, (), None)  # `Settings.shared` of this program's student of width 1 that sees all training images


@dataclass(frozen=True)
class Costs:
    parameters: NotNegative  # none, where a network's weights are constants or buffers
    macs: NotNegative  # multiply-adds for one image

    def __add__(self, other):
        return Costs(self.parameters + other.parameters, self.macs + other.macs)


@dataclass(frozen=True)
class Speed:
    milliseconds: Annotated[float, Meta(gt=0)]  # for one image
    images_per_second: Annotated[float, Meta(gt=0)]  # in batches


@dataclass(frozen=True)
class SpeedRecord:
    """How fast teacher (or ensemble) and student answer side by side on a device, each a Speed by precision; `batch` is
    the number of images in a batch, `teacher_bytes` the size of the teacher's model.pt."""

    device: str
    threads: Positive
    batch: Positive
    teacher_bytes: Positive
    teacher: dict[str, Speed]
    student: dict[str, Speed]
    code: str | None = None  # of models.py (runs.code)


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json. What follows `images` is None in an unfinished run."""

    finished: bool
    epochs_done: NotNegative
    settings: Settings
    environment: dict
    recorded: dict  # what was typed, which does not identify the run
    images: dict | None = None  # what was done to the images and found among them (sources.survey)
    seconds: Annotated[float, Meta(ge=0)] | None = None
    costs: dict[str, Costs] | None = None
    accuracy: Share | None = None
    val_accuracy: Share | None = None
    omitted_bias: float | None = None  # what puts the omitted classes right (distill.omitted_bias)
    test_logits_sha256: str | None = None
    weights_sha256: str | None = None


def default_learning_rate(batch_size, network=None):
    """The learning rate at the start: 0.2 for batches of 128, and with the square root of the size for others; so
    batches of 32 to 1,024 reach accuracies that are less than a point apart (results/recipes.md).

    For a `network` of the user's own, trained by plain SGD, the highest rate: 0.1 for batches of 128, as He et al.
    train ResNets for CIFAR (arXiv 1512.03385, section 4.2), and in proportion to the size (arXiv 1706.02677)."""
    if network:
        return 0.1 * batch_size / 128
    return 0.2 * (batch_size / 128) ** 0.5


def default_augmentation(role, epochs, image_size):
    """The `padding`, `cutout` and `mirror` of data.Views. The more often the same images come back, the more the views
    differ: they are moved by a sixteenth of the image size at most in trainings of up to SHORT epochs, by an eighth in
    longer ones. Of a teacher's views in trainings of more than LONG epochs a square of three eighths of it is blanked,
    too; of a student's, which is too small to learn its images by heart, none (results/recipes.md)."""
    blanked = role == "teacher" and epochs > LONG
    padding = image_size // (16 if epochs <= SHORT else 8)
    return {"padding": padding, "cutout": image_size * 3 // 8 * blanked, "mirror": True}


def run_name(role, temperature, alpha, seed, variant=None, shared=PLAIN):
    """The name of a run's folder; numbers without a trailing .0. `variant` and `shared` are those of Settings."""
    fraction, omitted, network = shared
    parts = [role, *(_safe(named[0]) for named in (network, variant) if named)]
    if role == "kd":
        parts += [f"T{_short(temperature)}", f"a{_short(alpha)}"]
    if fraction != 1:
        parts.append(f"f{_short(fraction)}")
    if omitted:
        names = "-".join(map(_safe, omitted))
        if len(names.encode()) > LONGEST:
            digest = hashlib.sha256("\0".join(omitted).encode()).hexdigest()[:8]
            names = f"{len(omitted)}-class{'es' * (len(omitted) > 1)}-{digest}"
        parts += ["without", names]
    return "-".join([*parts, f"s{seed}"])


def measured(settings):
    """On what the accuracy of a run with `settings`, a dict, was measured."""
    return "validation" if settings.get("val_fraction") else "test"


def other_width(width):
    """What `Settings.shared` says of the network of a run with another `width` than 1: a name and no digest; else
    None."""
    return None if width == 1 else (f"w{_short(width)}", "")


def _safe(name):
    return re.sub(r"[^\w.]+", "_", name)[:40]


def _short(number):
    return repr(float(number or 0)).removesuffix(".0")


def pair_name(entry):
    """How tables and figures name a way to distil, a dict of temperature, alpha and its variant:
    "T=4, alpha=0.1", "dkd, T=4, alpha=0.1" or "unlabeled, T=4, alpha=0.1"."""
    words = [variant] if (variant := variant_of(entry)) else []
    return ", ".join([*words, f"T={entry['temperature']:g}", f"alpha={entry['alpha']:g}"])


def variant_of(entry):
    """What a way to distil, as in `pair_name`, has besides plain distillation, or None; with the `version` of several
    of one name."""
    name = entry.get("loss") or ("unlabeled" if entry.get("unlabeled") else None)
    return f"{name} {entry['version']}" if entry.get("version") else name


def complete(settings):
    """A run's settings, a dict, with what they leave out: `padding` in older runs, and what is in OPTIONAL where it is
    the default."""
    size = settings.get("image_size")
    return OPTIONAL | {"padding": size // 8 if isinstance(size, int) else None} | settings


def differences(found: Mapping, wanted: Mapping):
    """What differs between what is `found` and what is `wanted`, as a list of phrases; what is missing differs."""
    phrases = []
    for name, value in wanted.items():
        if name.endswith("_file"):
            continue  # a file may be moved or renamed
        if name not in found or found[name] != value:
            if name.endswith("_sha256") and found[name] and value:
                what = name.removesuffix("_sha256")
                file, other = found.get(f"{what}_file"), wanted[f"{what}_file"]
                if file != other:
                    phrases.append(f"a {what} of that name in {file}, not {other} (rename a function to keep both)")
                    continue
                then, now = f"SHA-256 {found[name][:12]}… then", f"{value[:12]}… now"
                phrases.append(f"the {what} in {other} was edited since ({then}, {now})")
            elif name in OTHERS:
                phrases.append(OTHERS[name])
            else:
                why = " (networks or training of another version of this program)" if name == "recipe" else ""
                phrases.append(f"{name.replace('_', ' ')} {found.get(name, 'unknown')} instead of {value}{why}")
    return phrases
