"""One process per folder."""

import contextlib
import os
import socket
from pathlib import Path

import filelock

from runs.files import Failure, make_folder, reason, write


@contextlib.contextmanager
def lock(folder, name=".lock"):
    """Holds `folder` for this process; raises Failure, naming the holder, where another process has it. Locks of other
    `name`s are independent.

    The operating system releases the lock when its process ends, however it ends, so a lock is never stale.
    """
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
    except RuntimeError:  # filelock raises a subclass of it on a file system without locks
        raise Failure(f"{folder} is on a file system without locks. Choose another folder.") from None
    try:
        write(holder, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        held.release()
