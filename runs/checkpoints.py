"""Checkpoints: dicts of builtin values and tensors as PyTorch archives, whole or not at all, verified when read."""

import hashlib
import io
import pickle
from dataclasses import dataclass, field
from typing import Annotated

import torch
from msgspec import Meta

from runs.files import Damaged, first_line, is_out_of_memory, verified_archive, write
from runs.settings import Share

SMALLEST_IMAGE, LARGEST_IMAGE = 16, 256
Scale = Annotated[float, Meta(gt=0, le=1)]


@dataclass
class ModelFile:
    """The content of model.pt: all it takes to use a network without knowing how it was trained."""

    format: int
    architecture: str
    arguments: dict[str, int | float]
    classes: Annotated[list[str], Meta(min_length=2)]
    image_size: Annotated[int, Meta(ge=SMALLEST_IMAGE, le=LARGEST_IMAGE)]
    mean: tuple[Share, Share, Share]
    std: tuple[Scale, Scale, Scale]
    settings: dict[str, bool | str | int | float | list[str] | None]
    accuracy: Share
    state_dict: dict[str, torch.Tensor]
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)  # as sources.decode.read_image takes them


def save_checkpoint(path, content):
    """Writes a dict of builtin values and tensors to `path`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def load_checkpoint(path):
    """The dict in a PyTorch archive, with its tensors on the CPU; raises what `load_plain` raises, and Damaged where it
    holds anything but a dict."""
    checkpoint = load_plain(path)
    if not isinstance(checkpoint, dict):
        raise Damaged(f"{path} is damaged: it does not hold a checkpoint's dict.")
    return checkpoint


def load_plain(path):
    """What a PyTorch archive holds, with its tensors on the CPU.

    Raises Failure where the file cannot be read, and Damaged where it is cut short, has a flipped bit, or carries a
    pickled call, which is not executed.
    """
    content = verified_archive(path)
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise Damaged(
            f"{path} is refused: it holds more than plain values and tensors, and loading it could run code."
        ) from None
    except Exception as error:  # the checksums matched, so this archive is not one of PyTorch's
        if is_out_of_memory(error):
            raise
        raise Damaged(f"{path} is damaged: {first_line(error)}.") from None


def digest(state_dict, more=""):
    """The SHA-256 of a network's weights and buffers (names, types, shapes and bits), and of the text `more`."""
    total = hashlib.sha256(more.encode())
    for name, tensor in state_dict.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def is_finite(state_dict):
    """Whether no weight or buffer is infinite or NaN."""
    finite = [tensor.isfinite().all() for tensor in state_dict.values()]
    return not finite or bool(torch.stack(finite).all())  # a frozen program has none


def has_format(checkpoint, version):
    """Whether a dict from `load_checkpoint`, in which anything may stand under "format", says that it is `version`."""
    return isinstance(found := checkpoint.get("format"), int) and found == version
