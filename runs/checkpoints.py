"""Checkpoints: dicts of builtin values and tensors as PyTorch archives, whole or not at all, verified when read."""

import io
import pickle

import torch

from runs.files import Damaged, verified_archive, write


def save_checkpoint(path, content):
    """Writes a dict of builtin values and tensors to `path`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def load_checkpoint(path):
    """The dict in a PyTorch archive, with its tensors on the CPU.

    Raises Failure where the file cannot be read, and Damaged where it is cut short, has a flipped bit, holds anything
    but a dict, or carries a pickled call, which is not executed.
    """
    content = verified_archive(path)
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise Damaged(
            f"{path} is refused: it holds more than plain values and tensors, and loading it could run code."
        ) from None
    except Exception as error:  # the checksums matched, so this archive is not one of PyTorch's
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Damaged(f"{path} is damaged: {first}.") from None
    if not isinstance(checkpoint, dict):
        raise Damaged(f"{path} is damaged: it does not hold a checkpoint's dict.")
    return checkpoint
