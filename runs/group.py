"""The processes that share a command's runs, as `torchrun` starts them; a plain command is a group of one.

Runs are independent trainings, so they are handed out whole, by an atomic counter in torchrun's store; nothing but such
counters and short texts is sent. The output folder is the memory: whoever is killed or restarted resumes there.
"""

import _thread
import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import timedelta

from tqdm import tqdm

import runs.lock
from runs.files import Failure, first_line

POLL = 0.2  # seconds between two looks at the store
BEAT = 2.0  # seconds between two signs of life
LOST = 120.0  # seconds without one after which a process counts as lost
GRACE = 10.0  # seconds that torchrun has to stop the processes of its machine, before they stop by themselves
SEEN = 120.0  # seconds after which a shared file system shows what another machine has written; NFS may take 60


class Told(Exception):
    """This process failed, too, but another one of the group failed first and has said why."""


def available_cores():
    """How many cores this process may use: a container or a scheduler may give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Group:
    """`rank` of `size` processes, `local_rank` of `local_size` on this machine. `launch` is the store
    (torch.distributed.Store) that outlives torchrun's restarts, `store` the part of it that this start has for itself;
    both None for a plain command."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launch: object = None
    store: object = None
    steps: itertools.count = field(default_factory=itertools.count)

    @property
    def leads(self):
        """Whether this process is the one that speaks, locks, loads first and writes the comparison."""
        return self.rank == 0

    @property
    def prefix(self):
        """What this process's lines begin with."""
        return f"[{self.rank}] " if self.size > 1 else ""

    def say(self, text):
        """Prints what the whole command has to say: once."""
        if self.leads:
            print(text, flush=True)

    def threads(self):
        """This process's share of the machine's cores."""
        return max(1, available_cores() // self.local_size)

    # Steps: all processes take them in the same order, so a step's number names its key in the store. -----------------

    @contextlib.contextmanager
    def first(self):
        """The leading process runs this context while the others wait; then the first one of each other machine runs
        it, whose disks may be its own, and then the rest."""
        key = self._key("first")
        machine = f"{key} {self.rank - self.local_rank}"
        if not self.leads:
            self.wait(lambda: self.ask("check", [machine if self.local_rank else f"{key} 0"]))
        yield
        if not self.local_rank and self.store:
            self.ask("set", machine, "done")

    @contextlib.contextmanager
    def once(self, name):
        """Gives whether the context of this `name` was never completed before: where torchrun restarts a group, it
        was."""
        key = f"once {name}"
        yield self.launch is None or not self.ask("check", [key], store=self.launch)
        if self.launch:
            self.ask("set", key, "done", store=self.launch)

    def agree(self, find):
        """What `find()` returns in the leading process (anything that JSON can hold), for all."""
        key = self._key("agree")
        if self.leads:
            value = find()
            if self.store:
                self.ask("set", key, json.dumps(value))
            return value
        self.wait(lambda: self.ask("check", [key]))
        return json.loads(self.ask("get", key))

    def share(self, items):
        """The items that fall to this process: each goes to the next process that is free. All must name the same."""
        key = self._key("share")
        if self.store is None:
            yield from items
            return
        while (position := self.ask("add", key, 1) - 1) < len(items):
            yield items[position]

    def barrier(self):
        """Waits until every process of the group has come here."""
        key = self._key("barrier")
        if self.store:
            self.ask("add", key, 1)
            self.wait(lambda: self.ask("add", key, 0) == self.size)

    @contextlib.contextmanager
    def lock(self, folder):
        """Holds `folder` for the group; raises Failure where another process has it, or where a machine has a folder of
        its own instead of a shared one."""
        if self.leads:
            with runs.lock.lock(folder) as holder:
                self.agree(lambda: holder)
                yield
            return
        holder = self.agree(None)
        self.wait_for_files(lambda: runs.lock.holder(folder) == holder, f"the lock of {folder}, which {holder} holds,")
        yield

    def wait_for_files(self, are_there, what):
        """Waits until this machine sees the files that another process wrote; raises Failure where it does not."""
        if self.size == 1:
            return
        deadline = time.monotonic() + SEEN
        while not are_there():
            if time.monotonic() > deadline:
                raise Failure(
                    f"{what} is not seen on {socket.gethostname()} after {SEEN:.0f} seconds.\n"
                    "All machines need the same --output-dir, on a file system that they share."
                )
            time.sleep(POLL)

    def wait(self, is_done):
        """Waits without a time-out: a training may take days, and `_watch` ends all where a process is lost."""
        while not is_done():
            time.sleep(POLL)

    def ask(self, method, *words, store=None):
        """Calls the store; raises Failure where the process or machine that keeps it has gone."""
        try:
            return getattr(store or self.store, method)(*words)
        except RuntimeError as error:
            raise Failure(f"the store of the group does not answer: {first_line(error)}.") from None

    def _key(self, kind):
        return f"{kind} {next(self.steps)}"

    # One for all ----------------------------------------------------------------------------------------------------

    def _watch(self, ended):
        """Gives signs of life until `ended` is set, and stops this process where another one has failed or is lost. On
        one machine torchrun does so before; but it does not know of a failure on another."""
        beats = dict.fromkeys(range(1, self.size) if self.leads else [0], (-1, 0))
        why = None
        while not why and not ended.wait(BEAT):
            try:
                self.ask("add", f"beat {self.rank}", 1)
                for rank, (beat, silent) in beats.items():
                    now = self.ask("add", f"beat {rank}", 0)
                    beats[rank] = now, silent + 1 if now == beat else 0
                # Counted by this process's own beats: a batch system, or Ctrl-Z, may suspend all of them for hours.
                lost = [rank for rank, (_, silent) in beats.items() if silent * BEAT > LOST]
                if lost:
                    why = f"process {lost[0]} has not been heard of for {LOST:.0f} seconds"
                elif self.ask("add", "failures", 0):
                    why = "another process has failed or was stopped"
            except Failure as failure:
                why = str(failure)
        if why and not ended.wait(GRACE):
            print(f"{self.prefix}This process stops: {why}", file=sys.stderr, flush=True)
            _thread.interrupt_main(signal.SIGTERM)

    def _count_failure(self):
        """Lets all others end; returns how many had failed before."""
        try:
            return self.ask("add", "failures", 1) - 1
        except Failure:
            return 0

    def _leave(self):
        """The process that leads leaves last, since it may keep the store."""
        with contextlib.suppress(Failure):
            self.ask("add", "left", 1)
            deadline = time.monotonic() + GRACE
            while self.leads and self.ask("add", "left", 0) < self.size and time.monotonic() < deadline:
                time.sleep(POLL)


class Tally:
    """How far a group is with the runs that it shares."""

    def __init__(self, group, runs, epochs, later):
        """`runs` is how many there are to train, `epochs` how many these have left in all, those that take twice the
        images counted twice; `later` is how many the command trains afterwards."""
        self.group, self.runs, self.epochs, self.later, self.began = group, runs, epochs, later, time.monotonic()
        self.key = group._key("tally")

    def add(self, what, count=1):
        """Counts a run "started" or "done", or `count` of the "epochs"."""
        self.group.ask("add", f"{self.key} {what}", count)

    def words(self):
        """Runs done, running and waiting, and the time left for all of them."""
        started, done, epochs = (
            self.group.ask("add", f"{self.key} {what}", 0) for what in ("started", "done", "epochs")
        )
        left = (self.epochs - epochs + self.later) * (time.monotonic() - self.began) / max(1, epochs)
        running, waiting = started - done, self.runs - started
        return (
            f"{done} of {self.runs} runs done, {running} running, {waiting} waiting, "
            f"{tqdm.format_interval(max(0, left))} left for all runs"
        )


@contextlib.contextmanager
def join(timeout=300):
    """The Group that this process belongs to, until all of it are through: of one, unless torchrun (or another launcher
    that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and for several machines LOCAL_RANK and LOCAL_WORLD_SIZE)
    started it. Raises Failure where the others do not come within `timeout` seconds, and Told where another one failed
    before this one did."""
    size, _ = launched()
    if size == 1 and not _torchrun_keeps_the_store():
        yield Group()
        return
    group, ended = _meet(size, timeout), threading.Event()
    watch = threading.Thread(target=group._watch, args=[ended], daemon=True)
    watch.start()
    try:
        yield group
        group.barrier()
    except BaseException as error:
        if group._count_failure() and isinstance(error, Exception):
            raise Told from error
        raise
    finally:
        ended.set()
        watch.join(GRACE)  # a thread that is inside the store when Python ends would crash it
    group._leave()


def launched():
    """How many processes torchrun started, and which of them this is, from 0; (1, 0) for a plain command."""
    size, rank = (os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK"))
    size = max(1, int(size)) if size.isdigit() else 1
    return size, int(rank) if size > 1 and rank.isdigit() else 0


def _torchrun_keeps_the_store():
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _meet(size, timeout):
    """The Group of all processes, once each has heard of the leading one's start.

    torchrun keeps its store when it restarts a group, with all that the processes before had written, and on different
    machines it counts restarts differently. So each process greets under a name of its own, and the leading one answers
    everybody with the name of this start, below which all further keys are.
    """
    from torch.distributed import PrefixStore, TCPStore  # torch is needed early here, but not by a plain command

    deadline = time.monotonic() + timeout
    rank, host, port = (os.environ.get(name, "") for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    if not (rank.isdigit() and port.isdigit() and host):
        raise Failure("WORLD_SIZE is set, but not RANK, MASTER_ADDR and MASTER_PORT: torchrun sets them.")
    rank, port, me, came = int(rank), int(port), uuid.uuid4().hex, 0
    keeps = rank == 0 and not _torchrun_keeps_the_store()

    def wait(is_done):
        while not is_done():
            if time.monotonic() > deadline:
                missing = f"{size - 1 - came} of the {size} processes are" if rank == 0 else "the first process is"
                raise Failure(
                    f"{missing} missing at {host}:{port} after {timeout} seconds.\n"
                    "Start the same number of processes on every machine, with the same address."
                )
            time.sleep(POLL)

    def answer_all():
        nonlocal came
        for key in (f"hello {other}" for other in range(1, size)):
            if store.check([key]):
                store.set(f"welcome {store.get(key).decode()}", me)
        came = store.add(f"{me} came", 0)
        return came == size - 1

    try:
        if not keeps:
            wait(lambda: _answers(host, port))  # TCPStore itself would not listen to Ctrl-C
        store = TCPStore(
            host, port, is_master=keeps, timeout=timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=True
        )
        start = me
        if rank == 0:
            wait(answer_all)
        else:
            store.set(f"hello {rank}", me)
            wait(lambda: store.check([f"welcome {me}"]))
            start = store.get(f"welcome {me}").decode()
            store.add(f"{start} came", 1)
    except (RuntimeError, ValueError) as error:
        raise Failure(f"the processes cannot meet at {host}:{port}: {first_line(error)}.") from None
    local = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", size)))
    return Group(rank, size, *local, store, PrefixStore(start, store))


def _answers(host, port):
    try:
        socket.create_connection((host, port), timeout=1).close()
        return True
    except OSError:
        return False
