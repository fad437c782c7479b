"""One process per folder."""

import contextlib
import errno
import os
import socket
from pathlib import Path

import filelock

from runs.files import Failure, make_folder, reason, write


@contextlib.contextmanager
def lock(folder, name=".lock"):
    """Holds `folder` for this process and gives a text that names it; raises Failure, naming the holder, where another
    process has it. Locks of other `name`s are independent.

    The operating system releases the lock when its process ends, however it ends, so a lock is never stale.
    """
    make_folder(folder)
    folder, mine = Path(folder), f"process {os.getpid()} on {socket.gethostname()}"
    held = filelock.FileLock(folder / name, blocking=False, fallback_to_soft=False)  # one that may become stale
    try:
        held.acquire()
    except filelock.Timeout:
        who = holder(folder, name) or "another process"
        raise Failure(f"{folder} is in use by {who}.\nWait for it to end, or use another folder.") from None
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise Failure(f"{folder} is on a file system without locks. Choose another folder.") from None
        raise Failure(f"cannot lock {folder}: {reason(error)}.") from None
    try:
        write(folder / f"{name}-holder", f"{mine}\n")
        yield mine
    finally:
        with contextlib.suppress(OSError):
            (folder / f"{name}-holder").unlink()
        held.release()


def holder(folder, name=".lock"):
    """The text that names the process which holds `folder`; empty where none is known."""
    try:
        return (Path(folder) / f"{name}-holder").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
