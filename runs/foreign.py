"""Checkpoints of this program, told from files of others: what those are is said without running anything in them."""

import json
import re
import zipfile

import torch

from runs.checkpoints import load_checkpoint
from runs.files import Damaged

# What a file is by its first bytes; more common kinds of weights first.
BEGINNINGS = (
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, such as Keras writes"),
    (rb"\x08[\x03-\x14][\x12\x1a\x22\x28\x32\x3a\x42]", "an ONNX file"),
    (rb"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", "a file in PyTorch's format from before version 1.6"),
    (rb"\x80[\x02-\x05]", "a pickle, and loading it could run code"),
    (rb"GGUF", "a GGUF file"),
    (rb"....TFL3", "a TensorFlow Lite file"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"version https://git-lfs", "a pointer of Git LFS and not the file itself, which git lfs pull fetches"),
    (rb"(?i)\s*<(!doctype )?html", "a web page: the download of the file failed"),
)
# What an archive is by the names in it.
NAMES = (
    (r"(^|/)model\.weights\.h5$", "a Keras model"),
    (r"(^|/)constants\.pkl$", "a TorchScript program"),
    (r"(^|/)(archive_format|serialized_exported_program\.json)$", "a program of torch.export"),
    (r"^[^/]*\.npy$", "an archive of NumPy arrays"),
)
ADVICE = "Name the folder of a run of this program instead, or train a teacher: python main.py --train-teacher"


def load_own(path, version):
    """The dict in a checkpoint that this program wrote as its format `version`.

    Raises Failure where the file cannot be read, and Damaged where it is damaged, of another version or of another
    program; the text says what it is and what to do.
    """
    try:
        content = load_checkpoint(path)
    except Damaged:
        if kind := _kind_of_file(path):
            raise Damaged(f"{path} is not a model of this program: it is {kind}.\n{ADVICE}") from None
        raise
    if content.get("format") == version:
        return content
    if {"format", "architecture", "state_dict"} <= content.keys():
        raise Damaged(
            f"{path} is a model of another version of this program: its format is {content['format']!r}, and this "
            f"version reads {version}."
        )
    raise Damaged(f"{path} is not a model of this program: it is {_kind_of_dict(content)}.\n{ADVICE}")


def _kind_of_file(path):
    """What a file is that is no checkpoint of plain values and tensors, in words; None where that is not known."""
    with open(path, "rb") as file:
        start = file.read(256)
        if start.startswith(b"PK"):
            return _kind_of_archive(path)
        if tensors := _safetensors(file, start):
            return f"a safetensors file of {tensors:,} tensors, weights without their network"
    return next((kind for pattern, kind in BEGINNINGS if re.match(pattern, start, re.DOTALL)), None)


def _safetensors(file, start):
    """How many tensors a safetensors file has: JSON after its length in eight bytes; 0 for any other file."""
    length = int.from_bytes(start[:8], "little")
    if not start[8:].startswith(b"{") or length > 100_000_000:  # what the format allows
        return 0
    file.seek(8)
    try:
        return len(json.loads(file.read(length)).keys() - {"__metadata__"})
    except (ValueError, RecursionError):
        return 0


def _kind_of_archive(path):
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickled = b"".join(archive.read(name) for name in names if name.endswith("/data.pkl"))
    except (zipfile.BadZipFile, OSError):
        return None
    for pattern, kind in NAMES:
        if any(re.search(pattern, name) for name in names):
            return kind
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an archive, but none of torch.save
        return None
    if not objects:
        return None
    # As they come in the pickle (module, end of line, class): the whole network's class before those of its parts.
    objects.sort(key=lambda name: pickled.find(name[::-1].replace(".", "\n", 1)[::-1].encode() + b"\n"))
    more = f" and {len(objects) - 1} more" if len(objects) > 1 else ""
    return f"a pickle of Python objects (of the type {objects[0]}{more}), and loading it could run code"


def _kind_of_dict(content):
    if content.keys() >= {"optimizer", "network", "sums"}:
        return "the state of an unfinished run; the command that began that run finishes it"
    if weights := _tensors(content):
        return f"a state_dict, {weights}"
    for name, value in content.items():
        if weights := _tensors(value):
            return f"a checkpoint of another program; its entry '{name}' is a state_dict, {weights}"
    names = ", ".join(f"'{name}'" for name in list(content)[:5])
    more = f" and {len(content) - 5} more" if len(content) > 5 else ""
    return f"a dict with the entries {names}{more}" if content else "an empty dict"


def _tensors(value):
    """A state_dict in words, "" for anything else."""
    if not isinstance(value, dict) or not value or not all(isinstance(each, torch.Tensor) for each in value.values()):
        return ""
    name, first = next(iter(value.items()))
    shape = "x".join(map(str, first.shape)) or "a single number"
    return f"weights without their network ({len(value):,} tensors; the first is '{name}', {shape})"
