"""Checkpoints of this program, told from files of others: what those are is said without running anything in them."""

import codecs
import json
import re
import zipfile

import torch

from runs.checkpoints import has_format, load_plain
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
DEEPEST = 4  # dicts in dicts that are searched for weights; one may hold itself
ADVICE = (
    "Name the folder of a run of this program instead, or train a teacher: python main.py --train-teacher\n"
    "A network that was trained elsewhere becomes one with --epochs 0 and --teacher-network FILE.py:FUNCTION."
)


def load_own(path, version):
    """The dict in a checkpoint that this program wrote as its format `version`.

    Raises Failure where the file cannot be read, and Damaged where it is damaged, of another version or of another
    program; the text says what it is and what to do.
    """
    try:
        content = load_plain(path)
    except Damaged:
        if kind := _kind_of_file(path):
            raise Damaged(f"{path} is not a model of this program: it is {kind}.\n{ADVICE}") from None
        if kind := _kind_of_text(path):
            raise Damaged(f"{path} is damaged: it is {kind} instead of a model.\n{ADVICE}") from None
        raise
    if isinstance(content, dict):
        if has_format(content, version):
            return content
        if {"architecture", "state_dict"} <= content.keys() and isinstance(content.get("format"), int):
            raise Damaged(
                f"{path} is a model of another version of this program: its format is {content['format']}, and this "
                f"version reads {version}."
            )
    raise Damaged(f"{path} is not a model of this program: it is {_kind_of_content(content)}.\n{ADVICE}")


def _kind_of_file(path):
    """What a file is that is no checkpoint of plain values and tensors, in words; None where that is not known."""
    with open(path, "rb") as file:
        start = file.read(256)
        if start.startswith(b"PK"):
            return _kind_of_archive(path)
        if tensors := _safetensors(file, start):
            return f"a safetensors file of {tensors:,} tensors, weights without their network"
    return next((kind for pattern, kind in BEGINNINGS if re.match(pattern, start, re.DOTALL)), None)


def _kind_of_text(path):
    """What a file is that holds text or nothing, in words; None for any other."""
    with open(path, "rb") as file:
        start = file.read(256)
    if not start:
        return "an empty file"
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)  # whose last character may be cut
    except UnicodeDecodeError:
        return None
    words = " ".join(text.split())
    if not words.isprintable():
        return None
    return f"a text file that begins {words[:40]!r}" if words else "a text file of blanks"


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


def _kind_of_content(content):
    """What plain values and tensors are that no model of this program is, in words."""
    if isinstance(content, torch.Tensor):
        return f"a single tensor ({_shape(content)})"
    if isinstance(content, list | tuple):
        return f"a {type(content).__name__} of {_count(len(content), 'value')}"
    if not isinstance(content, dict):
        return f"a value of the type {type(content).__name__}"
    if content.keys() >= {"optimizer", "network", "sums"}:
        return "the state of an unfinished run; the command that began that run finishes it"
    found = [*_state_dicts(content)]
    if found:
        names, state_dict = max(found, key=lambda each: (each[0] == (), len(_tensors(each[1]))))
        weights = _weights(state_dict)
        if not names:
            return f"a state_dict, {weights}"
        entry = ".".join(map(str, names))
        return f"a checkpoint of another program; its entry {entry!r} is a state_dict, {weights}"
    names = ", ".join(repr(str(name)) for name in list(content)[:5])
    more = f" and {len(content) - 5} more" if len(content) > 5 else ""
    return f"a dict with the entries {names}{more}" if content else "an empty dict"


def _tensors(value):
    """The tensors among a dict's values, by name."""
    return {name: each for name, each in value.items() if isinstance(each, torch.Tensor)}


def _state_dicts(value, names=()):
    """Pairs (names of the entries that lead there, dict) of all dicts in a dict that hold more tensors than other
    values."""
    if 2 * len(_tensors(value)) > len(value):
        yield names, value
    for name, each in value.items():
        if isinstance(each, dict) and len(names) < DEEPEST:
            yield from _state_dicts(each, (*names, name))


def _weights(state_dict):
    """A state_dict in words."""
    tensors = _tensors(state_dict)
    name, first = next(iter(tensors.items()))
    rest = len(state_dict) - len(tensors)
    beside = f", beside {_count(rest, 'other value')}" if rest else ""
    what = f"{_count(len(tensors), 'tensor')}; the first is {str(name)!r}, {_shape(first)}{beside}"
    return f"weights without their network ({what})"


def _shape(tensor):
    return "x".join(map(str, tensor.shape)) or "a single number"


def _count(number, name):
    return f"{number:,} {name}{'s' * (number != 1)}"
