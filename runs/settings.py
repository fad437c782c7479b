"""What identifies a run, and what run.json says of it. Needs no PyTorch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from msgspec import Meta

VERSION = "2.0.0"  # of the program
RECIPE = 4  # of networks, initial weights, optimizer and schedule: raise it with any change of them
VIEWS_VERSION = 1  # of the augmentation in data.Views: raise it with any change of it

Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]


@dataclass(frozen=True)
class Settings:
    """What identifies a run: two runs with equal settings end with equal weights (on one machine). `data` and `teacher`
    are SHA-256 digests, those of several teachers sorted and joined by "+"."""

    role: Literal["teacher", "kd", "baseline"]
    data: str
    epochs: Positive
    batch_size: Positive
    learning_rate: float
    weight_decay: float
    seed: NotNegative
    image_size: Positive
    val_fraction: Share = 0.0
    temperature: float | None = None
    alpha: Share | None = None
    teacher: str | None = None
    recipe: int = RECIPE
    views: int = VIEWS_VERSION

    @property
    def architecture(self):
        return "teacher" if self.role == "teacher" else "student"

    @property
    def name(self):
        """The name of the run's folder: teacher-s0, kd-T4-a0.1-s0, baseline-s0."""
        return run_name(self.role, self.temperature, self.alpha, self.seed)

    def as_dict(self):
        return asdict(self) | {"architecture": self.architecture}


@dataclass(frozen=True)
class Costs:
    parameters: Positive
    macs: Positive  # multiply-adds for one image


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


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json. What is None in an unfinished run comes after `recorded`."""

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
    test_logits_sha256: str | None = None
    weights_sha256: str | None = None


def default_learning_rate(batch_size):
    """The learning rate at the start: 0.2 for batches of 128, and with the square root of the size for others, which
    went better than in proportion to it, for batches of 32 and of 512 (results/README.md)."""
    return 0.2 * (batch_size / 128) ** 0.5


def run_name(role, temperature, alpha, seed):
    """The name of a run's folder; numbers without a trailing .0."""
    short = (repr(float(number or 0)).removesuffix(".0") for number in (temperature, alpha))
    pair = "-T{}-a{}".format(*short) if role == "kd" else ""
    return f"{role}{pair}-s{seed}"


def pair_name(temperature, alpha):
    """Temperature and alpha as tables and figures write them: T=4, alpha=0.1."""
    return f"T={temperature:g}, alpha={alpha:g}"


def differences(found: Mapping, wanted: Mapping):
    """What differs between a run's settings and those wanted, as a list of phrases; a missing setting differs."""
    phrases = []
    for name, value in wanted.items():
        if name not in found or found[name] != value:
            if name in ("data", "teacher"):
                phrases.append("another teacher" if name == "teacher" else "another data set")
            else:
                phrases.append(f"{name.replace('_', ' ')} {found.get(name, 'unknown')} instead of {value}")
    return phrases
