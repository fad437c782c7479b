"""The content of state.pt, from which an unfinished run is resumed, and of history.csv."""

import csv
import io
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated

import torch
from msgspec import Meta

from runs.checkpoints import has_format, load_checkpoint, save_checkpoint
from runs.files import Damaged, decode
from runs.settings import NotNegative

FORMAT = 3  # of state.pt; a file with another number is refused


@dataclass
class HistoryRow:
    """A row of history.csv: means over an epoch's batches, in the order of its columns. `soft_loss` is T^2 * KL and
    None without a teacher or with a loss of the user's own, `hard_loss` the cross-entropy with the labels,
    smoothed where the run's are."""

    epoch: int
    train_loss: float
    soft_loss: float | None
    hard_loss: float
    train_accuracy: float
    val_accuracy: float | None
    learning_rate: float
    seconds: float
    teacher_seconds: float
    images_per_second: float


def as_csv(history):
    """The text of history.csv, of HistoryRows."""
    text = io.StringIO()
    table = csv.DictWriter(text, [each.name for each in fields(HistoryRow)], lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(row) for row in history)
    return text.getvalue()


@dataclass
class State:
    """The content of state.pt."""

    settings: dict
    device: str
    precision: str
    compiled: bool
    machines: Annotated[list[str], Meta(min_length=1)]  # described, in the order in which they trained the run
    threads: Annotated[int, Meta(ge=1, le=4096)]
    torch: str
    epoch: NotNegative
    step: NotNegative
    history: list[HistoryRow]
    sums: dict[str, torch.Tensor]
    seconds: float
    teacher_seconds: float
    network: dict[str, torch.Tensor]
    optimizer: dict
    program: Annotated[list[str], Meta(min_length=1)]  # versions of this program, in that order, too
    code: dict[str, str] = field(default_factory=dict)  # runs.code.CODE; some runs of version 2.2.0 have none


def save_state(path, state):
    """Writes a State to `path`, whole or not at all."""
    save_checkpoint(path, {"format": FORMAT, **vars(state)})


def load_state(path):
    """The State in a file; raises Damaged where it is damaged or of another version of this program."""
    content = load_checkpoint(path)
    if not has_format(content, FORMAT):
        raise Damaged(
            f"{path} is a state of another version of this program: its format is {content.get('format')!r}, and this "
            f"version reads {FORMAT}."
        )
    return decode(content, State, path)
