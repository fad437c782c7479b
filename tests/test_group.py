"""Several processes share a command's runs (runs/group.py), as torchrun starts them: on loopback, 2 or 3 of them."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT

from runs import group as group_module
from runs.group import Group, Tally, launched
from runs.lock import lock
from runs.settings import UNFAIR_SWEEP

pytestmark = pytest.mark.skipif(os.name == "nt", reason="torchrun stops processes by POSIX signals")

LIMIT = 400  # seconds after which a launch counts as hanging
THREADS = Group(local_size=2).threads()  # of each of two processes

PROGRAM = """
import os, shutil, signal, sys, time
sys.path.insert(0, {root!r})
import main
from reports import figures
from runs import group, speed
from runs.command import exit_status
figures.draw, speed.SPEED_SECONDS = (lambda comparison: []), 0  # see leave_out in conftest.py
rank = int(os.environ["RANK"])
{code}
sys.exit(exit_status(main.main))
"""


class Launch:
    """torchrun with a program (main.py, or a `code` that changes something before), stopped if it hangs."""

    def __init__(self, *words, processes=2, agent=("--standalone",), code=None, before=(), cores=None):
        program = [str(ROOT / "main.py")]
        if code is not None:
            program = ["--no-python", sys.executable, "-c", PROGRAM.format(root=str(ROOT), code=code)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *agent, "--nproc-per-node", str(processes)]
        self.process = subprocess.Popen(
            [*before, *torchrun, *program, *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(THREADS)},
            preexec_fn=cores and (lambda: os.sched_setaffinity(0, cores)),
        )  # fmt: skip

    def wait(self):
        try:
            self.out, self.err = self.process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # torchrun stops its processes
            self.out, self.err = self.process.communicate(timeout=60)
            pytest.fail(f"hangs\n{self}")
        self.status = self.process.returncode
        return self

    def __repr__(self):
        return f"status {self.process.returncode}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


def launch(*words, **rest):
    return Launch(*words, **rest).wait()


def digests(output):
    """{run: SHA-256 of its weights} of all finished runs."""
    records = {path.parent: json.loads(path.read_text()) for path in output.rglob("run.json")}
    assert not list(output.rglob("state.pt")) and all(record["finished"] for record in records.values())
    return {str(folder.relative_to(output)): record["weights_sha256"] for folder, record in records.items()}


def runs_of(output):
    return {name: digest for name, digest in digests(output).items() if not name.startswith("teacher")}


STUDENTS = ("--seeds", 2)


@pytest.fixture(scope="session")
def plain(tmp_path_factory, flags):
    """What the plain command gives with as many threads as each of two processes: `one` with two teachers, and students
    of the first; `sweep` with a sweep, its students those of both teachers, and with the sweep's own two teachers."""
    import main
    from runs.command import exit_status

    top, threads = tmp_path_factory.mktemp("plain"), torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        for words in (
            ("--train-teacher", "--seeds", 2, "--output-dir", top / "one"),
            ("--teacher", top / "one" / "teacher-s0", *STUDENTS, "--output-dir", top / "one"),
            ("--train-teacher", "--seeds", 2, "--val-fraction", 0.1, "--output-dir", top / "sweep"),
            sweep(top / "one", top / "sweep"),
        ):
            assert exit_status(main.main, [str(word) for word in (*flags, *words)]) == 0
    finally:
        torch.set_num_threads(threads)
    return top


def sweep(teachers, output):
    named = (teachers / "teacher-s0", teachers / "teacher-s1")
    return ("--teacher", *named, "--temperature", 1, 4, *STUDENTS, "--output-dir", output)


@pytest.fixture
def output(plain, tmp_path):
    """An output folder with a finished teacher."""
    shutil.copytree(plain / "one" / "teacher-s0", tmp_path / "out" / "teacher-s0")
    return tmp_path / "out"


@pytest.fixture
def students(flags, output):
    """The command that trains the four students of `plain`'s folder `one`."""
    return (*flags, *STUDENTS, "--output-dir", output)


# Several commands in one launch --------------------------------------------------------------------------------------

SEVERAL = """
import torch._dynamo  # before: an import that is interrupted cannot be repeated in the same process
from sources import kept
main.import_modules()
group.BEAT = group.GRACE = 0.1
write, said = kept._write, [os.dup(1), os.dup(2)]
kept._write = lambda *words: print("images are decoded", flush=True) or write(*words)
for name, words in {commands!r}.items():
    for number, stream in ((1, "out"), (2, "err")):
        with open(f"{top}/{{name}}-{{rank}}.{{stream}}", "w") as file:
            os.dup2(file.fileno(), number)
    print("ends with", exit_status(main.main, words), flush=True)
os.dup2(said[0], 1), os.dup2(said[1], 2)

def lose(arguments, stop):
    group.LOST = 1
    if rank == 1:
        group.Group._watch = lambda self, ended: ended.wait()
    with group.join() as joined:
        joined.barrier()
        time.sleep(3600 * rank)
main.main, sys.argv = lose, sys.argv[:1]
"""


@pytest.fixture(scope="session")
def several(tmp_path_factory, flags, plain):
    """What two processes say in one launch, command by command: {name: (statuses, standard output, standard error)}.
    torchrun does not know of the commands' ends: as on two machines, the group itself ends the process that did not
    fail. `launch` is what torchrun says in the end, when one process falls silent."""
    top = tmp_path_factory.mktemp("several")
    folder, trained = shutil.copytree(plain / "one", top / "out"), plain / "one"
    state = top / "state" / "baseline-s0"
    shutil.copytree(trained / "teacher-s0", state)
    (state / "model.pt").rename(state / "state.pt")  # a state that is none, found only when its turn comes
    (state / "run.json").unlink()
    for seed in (0, 1):
        name = f"selection/teacher-s{seed}"
        shutil.copytree(plain / "sweep" / name, top / "sweep" / name)
    students = (*flags, *STUDENTS, "--teacher", folder / "teacher-s0", "--output-dir")
    commands = {
        "teacher": (*flags, "--train-teacher", "--output-dir", top / "teacher"),
        "teachers": (*flags, "--train-teacher", "--seeds", 2, "--output-dir", top / "teacher"),
        "sweep": (*flags, *sweep(trained, top / "sweep")),
        "usage": (*flags, "--alpha", 3),
        "locked": (*students, top / "locked"),
        "no teacher": (*flags, "--output-dir", top / "new"),
        "other settings": (*students, folder, "--epochs", 3),
        "other state": (*students, state.parent),
        "finished": (*students, folder),
    }
    words = {name: [*map(str, words)] for name, words in commands.items()}
    with lock(top / "locked"):
        launched = launch(code=SEVERAL.format(commands=words, top=top))
    found = {"launch": launched, "top": top}
    for name in commands:
        out, err = ([(top / f"{name}-{rank}.{stream}").read_text() for rank in (0, 1)] for stream in ("out", "err"))
        statuses = tuple(int(text.rsplit("ends with ", 1)[1]) for text in out)
        found[name] = SimpleNamespace(statuses=statuses, out="".join(out), err="".join(err))
    return found


STOPPED = 128 + signal.SIGTERM


@pytest.mark.slow
def test_more_processes_than_runs_and_images_decoded_once(several, plain):
    got = several["teacher"]
    assert got.statuses == (0, 0), got
    assert got.out.count("images are decoded") == 1 and got.out.count("folder: 48 training and") == 1, got
    assert got.err.count("epoch 2 of 2") == 1 and "teacher-s0: epoch 2 of 2" in got.err, got
    more = several["teachers"]
    assert more.statuses == (0, 0) and "images are decoded" not in more.out, more
    assert more.err.count("epoch 2 of 2") == 1 and "] [2/2] teacher-s1: " in more.err, more
    assert " of 1 runs done, " in more.err, more  # the other is finished
    teachers = {name: digest for name, digest in digests(plain / "one").items() if name.startswith("teacher")}
    assert digests(several["top"] / "teacher") == teachers and len(teachers) == 2


@pytest.mark.slow
def test_a_sweep_of_an_ensemble_gives_the_same_bits_and_the_same_comparison(several, plain):
    got, output = several["sweep"], several["top"] / "sweep"
    assert got.statuses == (0, 0) and got.out.count("Final Test Accuracies") == 1, got
    assert UNFAIR_SWEEP not in got.out and digests(output) == digests(plain / "sweep")
    assert got.err.count("epoch 2 of 2") == len(digests(output)) - 2, got  # each run was trained once
    assert "[0] [" in got.err and "[1] [" in got.err and " runs done, " in got.err, got
    assert compared(output) == compared(plain / "sweep")
    kept = [
        {path.name + path.parent.name: path.read_bytes() for path in (each / "targets").rglob("*.npz")}
        for each in (output, plain / "sweep")
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 4 * 2  # teachers and epochs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "status", "text"),
    [
        ("usage", 2, "argument --alpha: "),
        ("locked", 1, "is in use by process"),
        ("no teacher", 1, "There is no teacher in"),
        ("other settings", 1, "other settings: "),
        ("other state", 1, "baseline-s0/state.pt is a state of another version of this program"),
    ],
)
def test_what_went_wrong_is_said_once(several, name, status, text):
    got = several[name]
    if name == "usage":
        assert got.statuses == (2, 2), got
    else:  # the process that failed, and the one that the group stopped
        assert sorted(got.statuses) == [status, STOPPED], got
        stopped = got.statuses.index(STOPPED)
        assert f"[{stopped}] This process stops: another process has failed or was stopped" in got.err, got
        assert stopped == 1 or name == "other state", got  # a state is found by the process whose turn the run is
    assert got.err.count("error: ") == got.err.count(text) == 1, got


@pytest.mark.slow
def test_a_finished_command_and_a_process_that_falls_silent(several):
    got, launched = several["finished"], several["launch"]
    assert got.statuses == (0, 0) and got.out.count("(finished before)") == 4, got
    assert got.out.count("Improvement with KD") == 1, got
    assert launched.status != 0, launched
    assert "[0] This process stops: process 1 has not been heard of for 1 seconds" in launched.err, launched


def compared(output):
    """What comparison.json says, the times apart."""
    found = json.loads((output / "comparison.json").read_text())
    for entry in (found["baseline"], *found["kd"]):
        del entry["seconds"]
    del found["teacher"]["cost"]  # which holds times
    return {part: found[part] for part in ("settings", "teacher", "baseline", "kd", "selection")}


def test_a_group_asks_the_teacher_only_about_epochs_that_a_student_needs(monkeypatch):
    """Of 200 epochs the distilled student has 50 left and its baseline all: 150 targets would be for nobody."""
    import main

    main.import_modules()
    settings = [
        SimpleNamespace(role=role, asks_teacher=role == "kd", images_per_label=1) for role in ("kd", "baseline")
    ]
    runs = [Mock(settings=each) for each in settings]
    group = Mock(size=2, leads=True, agree=lambda find: find(), share=lambda order: ())
    session = SimpleNamespace(group=group, transfer_set=range(48), arguments=SimpleNamespace(epochs=200))
    monkeypatch.setattr(main.plan, "epochs_left", lambda asked: [50, 200] if asked else [])
    monkeypatch.setattr(main, "Tally", Mock())
    targets = Mock()
    main.train_all(session, runs, targets)
    targets.share.assert_called_once_with(group, range(150, 200))


# Killed, stopped, lost -----------------------------------------------------------------------------------------------

KILLED = """
from runs.progress import Progress
end_epoch = Progress.end_epoch
def end_and_die(self, *words):
    end_epoch(self, *words)
    if os.path.exists({marker!r}):
        return
    if rank == 1:
        open({marker!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    while not os.path.exists({marker!r}):
        time.sleep(0.05)
    time.sleep(1)
Progress.end_epoch = end_and_die
"""  # the last process, after the first epoch that it trains; the others wait for it, so that work is left


def epochs_trained(*launches):
    """How often each run's epochs were trained, from the logs."""
    lines = [line for got in launches for line in got.err.splitlines() if ": epoch " in line]
    return sorted(line.split("] ")[-1].split(",")[0] for line in lines)


EPOCHS = sorted(
    f"{role}-s{seed}: epoch {epoch} of 2" for role in ("kd-T4-a0.1", "baseline") for seed in (0, 1) for epoch in (1, 2)
)


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_same_command_goes_on(students, output, plain, tmp_path):
    first = launch(*students, code=KILLED.format(marker=str(tmp_path / "killed")))
    assert first.status != 0 and (tmp_path / "killed").exists() and "error:" not in first.err, first
    assert not (output / "comparison.json").exists()
    second = launch(*students)  # main.py itself, as a person types it
    assert second.status == 0 and "Improvement with KD" in second.out, second
    assert digests(output).items() <= digests(plain / "one").items() and len(runs_of(output)) == 4
    assert epochs_trained(first, second) == EPOCHS, (first, second)  # each once: all were continued


def two_nodes(words, address, before, code):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    cores = sorted(os.sched_getaffinity(0))  # each machine has half of them
    nodes = [
        Launch(
            *words, processes=1, code=code, before=prefix, cores=part,
            agent=(
                "--nnodes", "2", "--max-restarts", "1", "--rdzv-backend", "c10d", "--local-addr", local,
                "--rdzv-conf", f"is_host={hosts}", "--rdzv-endpoint", f"{address[0]}:{port}",
            ),
        )
        for prefix, local, part, hosts in zip(
            before, address, (cores[:THREADS], cores[-THREADS:]), ("true", "false"), strict=True
        )
    ]  # fmt: skip
    return [node.wait() for node in nodes]


@contextlib.contextmanager
def machines():
    """The addresses of two machines and what to write before a command there: two network namespaces where they are
    allowed and can be made, else the loopback address twice."""
    ip, names = shutil.which("ip"), [f"kd{os.getpid()}{letter}" for letter in "ab"]
    first, second = names

    def call(*words):
        return subprocess.run([ip, *words], capture_output=True).returncode == 0

    addresses = dict(zip(names, ("10.77.0.1", "10.77.0.2"), strict=True))
    links = ("link", "add", first, "netns", first, "type", "veth", "peer", second, "netns", second)
    try:
        if (
            ip
            and os.environ.get("ALLOW_MOUNTS")
            and all([*(call("netns", "add", name) for name in names), call(*links)])
        ):
            for name, address in addresses.items():
                assert call("-n", name, "address", "add", f"{address}/24", "dev", name)
                assert all(call("-n", name, "link", "set", device, "up") for device in (name, "lo"))
            yield [*addresses.values()], [(ip, "netns", "exec", name) for name in names]
        else:
            yield ("127.0.0.1", "127.0.0.1"), ((), ())
    finally:
        for name in names if ip else ():
            call("netns", "delete", name)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the cores cannot be shared out here")
def test_two_machines(students, output, plain, tmp_path):
    """Two machines retrain what is there already; one process of them is killed meanwhile, and torchrun restarts all:
    what the others have trained is not removed again."""
    for name in runs_of(plain / "one"):
        shutil.copytree(plain / "one" / name, output / name)
    code = KILLED.format(marker=str(tmp_path / "killed"))
    with machines() as (addresses, before):
        nodes = two_nodes((*students, "--overwrite"), addresses, before, code)
    assert [node.status for node in nodes] == [0, 0] and (tmp_path / "killed").exists(), nodes
    assert digests(output).items() <= digests(plain / "one").items() and len(runs_of(output)) == 4
    assert epochs_trained(*nodes) == EPOCHS and sum("Improvement with KD" in node.out for node in nodes) == 1, nodes


@pytest.mark.slow
def test_a_rendezvous_that_nobody_joins_ends_with_a_sentence(tmp_path):
    code = """
def wait(arguments, stop):
    with group.join(timeout=2):
        pass
main.main = wait
"""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    silent = socket.socket()  # a port that is taken, where nobody listens
    silent.bind(("127.0.0.1", 0))
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    waiting = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(root=str(ROOT), code=code)],
            env=os.environ | place | {"RANK": rank, "MASTER_PORT": number}, stderr=subprocess.PIPE, text=True,
        )
        for rank, number in (("0", port), ("1", str(silent.getsockname()[1])), ("0", "nothing"))
    ]  # fmt: skip
    with silent:
        first, second, third = (each.communicate(timeout=LIMIT)[1] for each in waiting)
    assert [each.returncode for each in waiting] == [1, 1, 1]
    assert first.startswith("[0] error: 1 of the 2 processes are missing at 127.0.0.1:"), first
    assert second.startswith("[1] error: the first process is missing at 127.0.0.1:"), second
    assert "Start the same number of processes on every machine" in first and "Start the same" in second
    assert third.startswith("[0] error: WORLD_SIZE is set, but not"), third


def test_the_time_left_counts_what_comes_afterwards(monkeypatch):
    """Of 10 epochs 4 are done after 20 seconds; with 6 more afterwards 12 are left."""
    counts, now = {"started": 2, "done": 1, "epochs": 4}, [100.0]
    monkeypatch.setattr("runs.group.time.monotonic", lambda: now[0])
    asked = Mock(_key=lambda name: name, ask=lambda _, key, __: counts[key.split()[1]])
    tally = Tally(asked, 3, 10, 6)
    now[0] = 120.0
    assert tally.words() == "1 of 3 runs done, 1 running, 1 waiting, 01:00 left for all runs"


# A group by itself ----------------------------------------------------------------------------------------------------


def test_a_silent_process_is_lost_but_not_one_that_was_suspended_with_this_one(monkeypatch, capsys):
    """`looks` are what the other one's count of its signs of life is, each time that this one gives its own."""
    clock, stopped = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(group_module._thread, "interrupt_main", stopped.append)

    def watch(looks):
        looks = iter(looks)
        store = SimpleNamespace(add=lambda key, count: next(looks) if key == "beat 1" else 0)
        ended = SimpleNamespace(
            wait=lambda seconds: clock.append(clock.pop() + 3600) or bool(looks.__length_hint__() == 0)
        )
        Group(0, 2, 0, 2, store, store)._watch(ended)
        return bool(stopped)

    enough = int(group_module.LOST / group_module.BEAT)
    assert not watch([1, 2, 2, 3, 4, 4, 5])  # hours between two looks
    assert not watch([7] * enough + [8])
    assert watch([7] * (enough + 3)) and "process 1 has not been heard of for 120 seconds" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "rank", "found"), [("", "", (1, 0)), ("1", "3", (1, 0)), ("4", "3", (4, 3))])
def test_how_many_were_launched(monkeypatch, size, rank, found):
    monkeypatch.setenv("WORLD_SIZE", size), monkeypatch.setenv("RANK", rank)
    assert launched() == found


def test_a_launch_without_ranks_is_refused(cli, flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("RANK", "first")
    got = cli(*flags)
    assert got.status == 1 and got.err.startswith("[0] error: WORLD_SIZE is set, but not RANK, MASTER_ADDR"), got


def test_a_plain_command_is_a_group_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")  # as some shells leave it
    from runs.group import join

    with join() as group, group.first(), group.once("all") as is_new, group.lock(tmp_path):
        assert is_new and group.leads and group.prefix == "" and group.agree(lambda: (1, 2)) == (1, 2)
        assert [*group.share("abc")] == [*"abc"]
        group.barrier()


class Store(dict):
    """What a Group asks of torch.distributed.Store, within one process."""

    def __bool__(self):
        return True

    def check(self, keys):
        return set(keys) <= self.keys()

    def set(self, key, value):
        self[key] = value


def test_the_first_process_of_each_machine_loads_what_may_lie_on_its_own_disk(monkeypatch):
    """Ranks 0 and 1 are on one machine, 2 and 3 on another."""
    monkeypatch.setattr("runs.group.POLL", 0.01)
    store, order = Store(), []

    def run(rank):
        group = Group(rank, 4, rank % 2, 2, store, store)
        with group.first():
            order.append(rank)
            time.sleep(0.2)
            order.append(rank)

    ranks = [threading.Thread(target=run, args=[rank]) for rank in (3, 2, 1, 0)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert order[:2] == [0, 0]
    for first, second in ((0, 1), (2, 3)):
        assert order.index(second) > len(order) - 1 - order[::-1].index(first)


def test_what_was_removed_once_is_not_removed_after_a_restart_of_fewer_steps():
    launch = Store()
    for steps, expected in ((2, True), (0, False)):
        group = Group(0, 2, 0, 2, launch, Store())
        for _ in range(steps):  # a sweep that was finished before takes none
            group.agree(lambda: 1)
        with group.once("kd-T4-a0.1-s0") as is_new:
            assert is_new is expected
