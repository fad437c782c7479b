"""Files that appear whole or not at all, and that are verified before they are used.

Every write goes to a temporary file beside its target, is flushed to the disk and renamed, so a killed process or a
full disk leaves what was there before. Everything that is read back is data only: an archive's checksums are verified
(PyTorch does not check them, pytorch issue 126952), checkpoints are unpickled with `weights_only=True`, arrays without
pickle, and what was read is converted to a declared type (`decode`) before anything relies on it.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import time
import zipfile
from pathlib import Path

import msgspec
import numpy as np

PATIENCE = 2.0  # seconds for which a refused rename is tried again


class Failure(Exception):
    """An error that ends the program with exit status 1; its text says what happened, where, and what to do."""


class Damaged(Failure):
    """A file that exists but does not hold what it should."""


# How it is said that there is not enough memory: by types of Python and PyTorch, by CUDA and its libraries, on MPS, on
# a CPU, by the system.
OUT_OF_MEMORY = (
    "OutOfMemoryError", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
    "Invalid buffer size", "DefaultCPUAllocator", "bad_alloc", "Cannot allocate memory",
)  # fmt: skip


def is_out_of_memory(error):
    """Whether an exception says that there is not enough memory."""
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY)


def reason(error):
    """An OSError in words, without its number and path."""
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return error.strerror or str(error)


def first_line(error):
    """What an exception says first, or its type where it says nothing."""
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def last_line(error):
    """What an exception says last, without the full stop."""
    return str(error).strip().splitlines()[-1].strip().rstrip(".")


def make_folder(path):
    """Creates a folder and its parents; raises Failure where that is impossible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise Failure(f"{path} is a file, but a folder is needed there.") from None
    except OSError as error:
        raise Failure(f"cannot create the folder {path}: {reason(error)}.") from None


def _sync_folder(folder):
    if os.name == "nt":  # Windows cannot open a folder, and its rename is durable without
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def replace(source, target):
    """Renames a file over another, or over nothing. What is refused is tried again for PATIENCE seconds: on Windows a
    virus scanner or an indexer that looks at a new file holds it for a moment."""
    finish = time.monotonic() + PATIENCE
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() > finish:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path` for the caller to write; it replaces `path` when the block ends without an error.
    Raises Failure, leaving what was there before, where the file cannot be written, and where its folder cannot be
    flushed, after which the new file may be lost with the power."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")  # one name per target, so that a killed process leaves one at most
    try:
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise Failure(f"cannot write {path}: {reason(error)}. What was there before is unchanged.") from error
    try:
        _sync_folder(path.parent)
    except OSError as error:
        raise Failure(f"{path} was written, but its folder cannot be flushed to the disk: {reason(error)}.") from error


def write(path, content):
    """Writes bytes (or text, as UTF-8) to `path`, whole or not at all. Raises Failure where that is impossible."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def read(path):
    """The bytes of a file; raises Failure with the path where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Failure(f"cannot read {path}: {reason(error)}.") from error


def remove(*paths):
    """Removes files that may or may not exist."""
    for path in paths:
        try:
            Path(path).unlink(missing_ok=True)
        except OSError as error:
            raise Failure(f"cannot remove {path}: {reason(error)}.") from error


def decode(content, kind, path):
    """`content`, builtin values read from `path`, as the dataclass or type `kind`; raises Damaged where it does not
    have that type, naming the value that is wrong. Values that `kind` does not name are ignored."""
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise Damaged(f"{path} is damaged: {str(error)[0].lower()}{str(error)[1:].replace('`', '')}.") from None


def write_json(path, content):
    """Writes strict JSON: NaN and infinity are a ValueError here, never a token that other readers refuse."""
    write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path, kind=dict):
    """The JSON in a file as the type `kind` (see `decode`); raises Damaged where it holds anything else."""

    def refuse(token):
        raise ValueError(f"{token} is not a JSON number")

    try:
        content = json.loads(read(path), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: it is not JSON ({error}).") from None
    return decode(content, kind, path)


def verified_archive(path):
    """The bytes of a zip archive in which every checksum matches; see `verify_archive`."""
    content = read(path)
    _verify(path, io.BytesIO(content))
    return content


def verify_archive(path):
    """Reads a zip archive, a part at a time; raises Damaged unless every checksum matches.

    Only what PyTorch and NumPy write is accepted: stored, since a small compressed entry could fill the memory, and no
    entry with a folder's attribute, for which PyTorch returns uninitialised memory.
    """
    with _opened(path) as file:
        _verify(path, file)


@contextlib.contextmanager
def _opened(path):
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise Failure(f"cannot read {path}: {reason(error)}.") from error


def _verify(path, file):
    try:
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise Damaged(f"{path} is damaged: it is a compressed archive, which this program never writes.")
            if any(entry.external_attr & 0x10 for entry in archive.infolist()):
                raise Damaged(f"{path} is damaged: its archive lists a folder, which this program never writes.")
            bad = archive.testzip()
    except (Damaged, MemoryError):
        raise
    except Exception as error:  # zipfile raises many kinds for a broken archive, struct.error among them
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a wrong offset is; others are the disk's
            raise
        raise Damaged(f"{path} is damaged: it is not a complete archive ({error or type(error).__name__}).") from None
    if bad is not None:
        raise Damaged(f"{path} is damaged: the checksum of '{bad}' in it does not match.")


def save_arrays(path, **arrays):
    """Writes NumPy arrays as an .npz archive, which has checksums, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:  # no copy: a test set may be large
        np.savez(file, **arrays)


def load_arrays(path):
    """The arrays of an .npz archive as a dict; raises Damaged unless all checksums match and no entry is a pickle."""
    with _opened(path) as file:  # no copy of the file beside the arrays
        _verify(path, file)
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except (MemoryError, OSError):
            raise
        except Exception as error:
            raise Damaged(f"{path} is damaged: {error}.") from None


def save_array(path, array):
    """Writes one NumPy array as .npy, whole or not at all; returns the file's SHA-256 for whoever reads it back."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def load_array(path, sha256):
    """The array of an .npy file with a known SHA-256; raises Damaged where the file has another."""
    content = read(path)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Damaged(f"{path} is damaged: its SHA-256 is not the one in run.json.")
    try:
        return np.load(io.BytesIO(content), allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:
        raise Damaged(f"{path} is damaged: {error}.") from None
