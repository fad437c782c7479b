"""Files that appear whole or not at all, and that are verified before they are believed.

Every write goes to a temporary file beside its target, is flushed to the disk and renamed, so a killed process or a
full disk leaves what was there before. Everything that is read back is data: a checkpoint's archive is verified
(PyTorch does not check its CRCs, pytorch issue 126952) and unpickled with `weights_only=True`, arrays are read without
pickle.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import socket
import zipfile
from pathlib import Path


class Failure(Exception):
    """Something that ends the program with exit status 1; its text says what, where and what to do."""


class Damaged(Failure):
    """A file that is there but is not what it should be."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; `signal_number` says which, the text how far the program got. Like KeyboardInterrupt
    it is no Exception, so that nothing takes it for a damaged file."""

    def __init__(self, signal_number, text="Stopped."):
        super().__init__(text)
        self.signal_number = signal_number


class Stop:
    """SIGINT and SIGTERM: at once as `Interrupted`, or, within `deferred()`, noted in `signal_number` for the loop
    there to act on at its next step; a second signal does not wait for that."""

    signal_number = None
    _deferring = False

    def handle(self, signal_number, frame=None):
        """A handler for signal.signal."""
        if not self._deferring or self.signal_number is not None:
            raise Interrupted(signal_number)
        self.signal_number = signal_number

    def raise_pending(self):
        """Raises Interrupted where a signal was noted."""
        if self.signal_number is not None:
            raise Interrupted(self.signal_number)

    @contextlib.contextmanager
    def deferred(self):
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False


def reason(error):
    """What an OSError says, without its number and path."""
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return error.strerror or str(error)


def make_folder(path):
    """Creates a folder and its parents; raises Failure where that cannot be."""
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
        if error.errno not in (errno.EINVAL, errno.EBADF):  # of file systems that sync no folders
            raise
    finally:
        os.close(descriptor)


def write(path, content, keep=None):
    """Writes bytes (or text, as UTF-8) to `path`, whole or not at all; what was there before becomes the file `keep`,
    where that is given. Raises Failure where that cannot be."""
    path = Path(path)
    if isinstance(content, str):
        content = content.encode()
    temporary = path.with_name(f".{path.name}.part")  # one name a target: a part left by a killed process is reused
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                if keep is not None and not path.exists():
                    os.replace(keep, path)
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise Failure(f"cannot write {path}: {reason(error)}. What was there before is untouched.") from error


def read(path):
    """The bytes of a file; raises Failure with the path where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Failure(f"cannot read {path}: {reason(error)}.") from error


def remove(*paths):
    """Removes files that may or may not be there."""
    for path in paths:
        try:
            Path(path).unlink(missing_ok=True)
        except OSError as error:
            raise Failure(f"cannot remove {path}: {reason(error)}.") from error


def write_json(path, content):
    """Writes strict JSON: a NaN or an infinity is a ValueError here, never a token that other readers refuse."""
    write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path):
    """A JSON object; raises Damaged where the file holds anything else."""

    def refuse(token):
        raise ValueError(f"{token} is no JSON number")

    try:
        content = json.loads(read(path), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: it is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise Damaged(f"{path} is damaged: it does not hold a JSON object.")
    return content


def _verified_archive(path):
    """The bytes of a zip archive whose every entry has the CRC it should have, and is stored uncompressed as both
    PyTorch and NumPy write it, so that a small file cannot grow into a large one in memory."""
    content = read(path)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise Damaged(f"{path} is damaged: its archive is compressed, which this program never writes.")
            if any(
                entry.external_attr & 0x10 for entry in archive.infolist()
            ):  # PyTorch gives such an entry any memory
                raise Damaged(f"{path} is damaged: its archive calls a file a folder.")
            bad = archive.testzip()
    except Damaged:
        raise
    except (
        Exception
    ) as error:  # zipfile raises many kinds on a damaged archive: BadZipFile, struct.error, EOFError, ...
        raise Damaged(f"{path} is damaged: {error or 'it is not a whole archive'}.") from None
    if bad is not None:
        raise Damaged(f"{path} is damaged: the checksum of '{bad}' in it does not match.")
    return content


def save_checkpoint(path, content, keep=None):
    """Writes a dict of builtin values and tensors as a PyTorch archive, whole or not at all (`keep` as for `write`)."""
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue(), keep)


def load_checkpoint(path):
    """The dict in a PyTorch archive, tensors on the CPU.

    Raises Failure where the file cannot be read, and Damaged where it is cut short, has a flipped bit, holds anything
    but a dict, or carries a pickled call (which does not happen).
    """
    import pickle

    import torch

    content = _verified_archive(path)
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise Damaged(
            f"{path} is refused: it holds more than plain values and tensors, and loading it could run code."
        ) from None
    except Exception as error:  # what is left after the CRCs matched: an archive that is not PyTorch's
        raise Damaged(
            f"{path} is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}."
        ) from None
    if not isinstance(checkpoint, dict):
        raise Damaged(f"{path} is damaged: it does not hold a checkpoint's dict.")
    return checkpoint


def save_arrays(path, **arrays):
    """Writes NumPy arrays as an .npz archive (whose entries carry CRCs), whole or not at all."""
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write(path, buffer.getvalue())


def load_arrays(path):
    """The arrays of an .npz archive as a dict; raises Damaged unless every CRC matches and no entry is a pickle."""
    import numpy as np

    content = _verified_archive(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:
        raise Damaged(f"{path} is damaged: {error}.") from None


def save_array(path, array):
    """Writes one NumPy array as .npy, whole or not at all; returns the file's SHA-256 for whoever reads it back."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def load_array(path, sha256):
    """The array of an .npy file whose SHA-256 is known; raises Damaged where it is another."""
    import numpy as np

    content = read(path)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Damaged(f"{path} is damaged: its checksum is not the one its run.json gives.")
    try:
        return np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:
        raise Damaged(f"{path} is damaged: {error}.") from None


def run_name(settings):
    """The name of a run's folder (teacher-s0, kd-T4-a0.1-s0, baseline-s0) from its role, temperature, alpha and seed;
    numbers without a trailing .0."""
    short = (repr(float(settings[name] or 0)).removesuffix(".0") for name in ("temperature", "alpha"))
    pair = "-T{}-a{}".format(*short) if settings["role"] == "kd" else ""
    return f"{settings['role']}{pair}-s{settings['seed']}"


def pair_name(settings):
    """Temperature and alpha as a person reads them: T=4, alpha=0.1."""
    return f"T={settings['temperature']:g}, alpha={settings['alpha']:g}"


@contextlib.contextmanager
def lock(folder, name=".lock"):
    """Holds `folder`, for the purpose `name`, for this process; raises Failure, naming the holder, where another
    process has it.

    The operating system releases the lock with its process, however that ends, so a lock is never stale.
    """
    import filelock

    make_folder(folder)
    folder = Path(folder)
    holder = folder / f"{name}-holder"
    held = filelock.FileLock(folder / name, blocking=False)
    try:
        held.acquire()
    except filelock.Timeout:
        try:
            who = holder.read_text().strip() or "another process"
        except OSError:
            who = "another process"
        raise Failure(f"{folder} is in use by {who}.\nWait for it to end, or use another folder.") from None
    except OSError as error:
        raise Failure(f"cannot lock {folder}: {reason(error)}.") from None
    except RuntimeError:  # filelock's word for a file system without locks is a subclass of it
        raise Failure(f"{folder} is on a file system without locks. Choose another folder.") from None
    try:
        write(holder, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        held.release()
