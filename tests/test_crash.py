"""Nothing is lost: kills, signals, full disks, flipped bits. `benchmarks/soak.py` is the long form."""

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import soak
import torch
from conftest import ROOT, process

import data
import models
import runs.files
import train
from data import Views
from runs.checkpoints import load_checkpoint, save_checkpoint
from runs.files import Damaged, Failure, write
from runs.lock import lock
from runs.signals import Interrupted, Stop

posix = pytest.mark.skipif(os.name != "posix", reason="for POSIX systems only")

# Whole or not at all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, name):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    write(path, b"before")
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(Failure, match="the disk is full. What was there before is unchanged"):
            write(path, b"after")
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]
    write(path, b"after")
    assert path.read_bytes() == b"after" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("refusals", [3, 10**6])
def test_a_rename_that_is_refused_for_a_moment_is_tried_again(tmp_path, monkeypatch, refusals):
    """As Windows does while a virus scanner looks at the new file; what is refused for good says so."""
    asked, rename, path = [], os.replace, tmp_path / "file"
    write(path, b"before")

    def refuse(source, target):
        asked.append(target)
        if len(asked) <= refusals:
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(runs.files, "PATIENCE", 0.3)
    if refusals == 3:
        write(path, b"after")
        assert path.read_bytes() == b"after" and len(asked) == 4
    else:
        with pytest.raises(Failure, match="Permission denied. What was there before is unchanged"):
            write(path, b"after")
        assert path.read_bytes() == b"before" and len(asked) > 3
    assert os.listdir(tmp_path) == ["file"]


@posix
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_flushed(number, tmp_path, monkeypatch):
    """Some file systems cannot (EINVAL), which is no error; after any other the new file is there, and told of."""
    write(tmp_path / "file", b"before")
    sync = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    told = "file was written, but its folder cannot be flushed to the disk: Input/output"
    with contextlib.nullcontext() if number == errno.EINVAL else pytest.raises(Failure, match=told):
        write(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"after" and os.listdir(tmp_path) == ["file"]


def test_a_write_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: calls.append(name) or original(*a))
    write(tmp_path / "file", b"content")
    expected = ["fsync", "replace", "fsync"]  # the file, its name, the folder
    assert calls == (expected[:2] if os.name == "nt" else expected)


def test_a_file_size_limit_is_a_sentence(tmp_path):
    resource = pytest.importorskip("resource", reason="for POSIX systems only")
    path = tmp_path / "file"
    write(path, b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(Failure, match="cannot write"):
            write(path, b"x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]


# Full and vanished disks ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, megabytes):
    """A tmpfs of so many megabytes at `folder`; skips the test where none may be mounted."""
    if not os.environ.get("ALLOW_MOUNTS") or os.geteuid():
        pytest.skip("it mounts a small tmpfs, which needs ALLOW_MOUNTS=1 and root")
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_in_a_sentence_and_the_teacher_still_loads(cli, flags, finished, tmp_path):
    with small_disk(tmp_path / "disk", 32) as disk:
        shutil.copytree(finished / "teacher-s0", disk / "out" / "teacher-s0")
        before = (disk / "out" / "teacher-s0" / "model.pt").read_bytes()
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 1_000_000))
        got = cli(*flags, "--output-dir", disk / "out")
        assert got.status == 1 and "the disk is full" in got.err and "Traceback" not in got.err
        assert (disk / "out" / "teacher-s0" / "model.pt").read_bytes() == before
        (disk / "filler").unlink()
        again = cli(*flags, "--output-dir", disk / "out")  # with room again, the same command goes on
        assert again.status == 0, again


def test_a_small_disk_that_fills_up_while_training(cli, flags, tmp_path):
    with small_disk(tmp_path / "disk", 40) as disk:  # room for one state of a teacher, not for two
        got = cli(*flags, "--train-teacher", "--output-dir", disk / "out")
        assert got.status == 1 and "the disk is full" in got.err
        assert load_checkpoint(disk / "out" / "teacher-s0" / "state.pt")["epoch"] == 0


def test_a_disk_that_fills_up_while_training(cli, flags, finished, copy, monkeypatch):
    """The last state that was written whole is kept; with room again, the same command ends with the same bits."""
    run, replace, left = copy / "baseline-s0", os.replace, [2]  # states: before the first step, after the first epoch
    shutil.rmtree(run)

    def full(source, target):
        left[0] -= os.path.basename(target) == "state.pt"
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        got = cli(*flags, "--output-dir", copy)
    assert got.status == 1 and "the disk is full" in got.err and "Traceback" not in got.err
    assert load_checkpoint(run / "state.pt")["epoch"] == 1
    assert sorted(path.name for path in run.iterdir()) == ["history.csv", "run.json", "state.pt"]
    assert cli(*flags, "--output-dir", copy).status == 0
    for name in ("model.pt", "test_logits.npy"):
        assert (run / name).read_bytes() == (finished / "baseline-s0" / name).read_bytes()


def test_a_read_only_folder_is_a_sentence(cli, flags, tmp_path):
    with small_disk(tmp_path / "disk", 1) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        got = cli(*flags, "--train-teacher", "--output-dir", disk)
        assert got.status == 1 and str(disk) in got.err and "Read-only" in got.err


@posix
def test_a_folder_without_permission_is_a_sentence(cli, flags, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    got = cli(*flags, "--train-teacher", "--output-dir", tmp_path)
    tmp_path.chmod(0o700)
    assert got.status == 1 and str(tmp_path) in got.err and "Permission denied" in got.err


def test_a_folder_that_vanishes_is_a_sentence(cli, flags, copy, monkeypatch):
    """It is removed while a student trains, at the end of its first epoch."""
    validate = train.validate
    monkeypatch.setattr(train, "validate", lambda *rest: shutil.rmtree(copy / "baseline-s0") or validate(*rest))
    shutil.rmtree(copy / "baseline-s0")
    got = cli(*flags, "--output-dir", copy)
    assert got.status == 1 and f"cannot write {copy / 'baseline-s0'}" in got.err and "Traceback" not in got.err
    assert len(got.err.splitlines()) == 1


# Locks and signals ---------------------------------------------------------------------------------------------------


def test_a_second_process_says_who_holds_the_folder(cli, flags, copy):
    with lock(copy):
        for words in ((*flags, "--output-dir", copy), ("--report", "--output-dir", copy)):
            got = cli(*words)
            assert got.status == 1 and f"{copy} is in use by process {os.getpid()}" in got.err
    with lock(copy):
        pass


def test_a_lock_left_by_a_killed_process_is_no_obstacle(tmp_path):
    script = f"from runs.lock import lock\nwith lock({str(tmp_path)!r}): print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Failure, match=f"process {holder.pid}"), lock(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with lock(tmp_path):
        pass


@posix
def test_a_file_system_without_locks_is_refused_and_not_locked_by_a_file_that_may_be_left(tmp_path, monkeypatch):
    def flock(*words):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(Failure, match="is on a file system without locks. Choose another folder"), lock(tmp_path):
        pass


@posix  # Windows cannot send these signals to another process
@pytest.mark.slow
def test_signals_save_the_state_and_say_so(flags, tmp_path):
    """To main.py as a process of its own, one for each signal."""
    statuses = {signal.SIGINT: 130, signal.SIGTERM: 143}
    started = {}
    try:
        for number in statuses:
            words = ("--train-teacher", "--output-dir", tmp_path / str(int(number)), "--epochs", 10_000)
            started[number] = process(*flags, *words, "--save-every", 0.5)
        for number, status in statuses.items():
            running, folder = started[number], tmp_path / str(int(number)) / "teacher-s0"
            while not (folder / "history.csv").exists() and running.poll() is None:
                time.sleep(0.05)
            running.send_signal(number)
            _, errors = running.communicate()
            assert running.returncode == status, errors
            last = errors.splitlines()[-1]
            assert last.startswith("Stopped teacher-s0; its state after epoch ") and " of 10000" in last
            assert last.endswith(" is saved. The same command resumes it.") and "Traceback" not in errors
            assert load_checkpoint(folder / "state.pt")["epoch"] >= 1
    finally:
        for running in started.values():
            running.kill()
            running.wait()


def test_a_second_signal_does_not_wait_for_the_step_unless_it_is_the_same_one(monkeypatch):
    now, stop = [100.0], Stop()
    monkeypatch.setattr("runs.signals.time.monotonic", lambda: now[0])
    with stop.deferred():
        for now[0] in (100.0, 100.5, 101.9):  # torchrun sends again what its processes have got already
            stop.handle(2)
        now[0] = 102.1
        with pytest.raises(Interrupted):
            stop.handle(2)
    with pytest.raises(Interrupted):
        stop.raise_pending()


def test_a_signal_before_training_ends_at_once(cli, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    got = cli(*flags, "--train-teacher", "--overwrite", "--output-dir", tmp_path)
    assert got.status == 143 and "Traceback" not in got.err
    assert "without --overwrite" not in got.err  # nothing has been removed yet


def test_a_signal_after_overwrite_began_says_how_to_resume(cli, flags, copy, monkeypatch):
    batch = Views.batch
    monkeypatch.setattr(Views, "batch", lambda *rest: signal.raise_signal(signal.SIGTERM) or batch(*rest))
    got = cli(*flags, "--overwrite", "--output-dir", copy)
    assert got.status == 143 and "its state after epoch 0 of 2 and step 1 of 3 of the next is saved." in got.err
    assert got.err.endswith("The same command without --overwrite resumes it.\n")


# Kills and flips -----------------------------------------------------------------------------------------------------


@posix  # it forks
@pytest.mark.slow
def test_killed_at_random_moments_the_bits_are_the_same():
    """The soak test, a short one: one kill at a random time of training, one inside a file write."""
    words = ["--kills", "2", "--flips", "40", "--epochs", "2", "--longest", "0.1", "--seed", "2"]
    done = subprocess.run([sys.executable, soak.__file__, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "round 1: 2 kills, 1 inside a file write, differences: none"
    for line, name in zip(lines[1:3], ("model.pt", "state.pt"), strict=True):
        assert line.startswith(f"{name}: ") and line.endswith("other weights in silence: 0")
    assert lines[3] == "2 kills and 40 flips survived"


def test_the_soak_test_finds_differences(copy, finished):
    """What it compares: weights, test logits, history without times, files, and the printed block."""
    printed = "Training Parameters:\n...\nImprovement with KD: 1.00%\n"
    expected = soak.outcome(finished, printed)
    assert soak.differences(soak.outcome(copy, printed), expected) == []
    changes = {
        "model.pt": lambda path: soak_flip(path, 20_000),
        "test_logits.npy": lambda path: soak_flip(path, 200),
        "history.csv": lambda path: path.write_text(path.read_text().replace("\n1,", "\n3,")),
    }
    for name, change in changes.items():
        change(copy / "baseline-s0" / name)
    (copy / "baseline-s0" / "state.pt").write_bytes(b"left behind")
    found = soak.outcome(copy, printed.replace("1.00", "1.01"))
    names = {f"baseline-s0/{name}" for name in (*changes, "files")} | {"printed block"}
    assert set(soak.differences(found, expected)) == names


def soak_flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_flipped_bits_are_refused_or_harmless(finished, tmp_path):
    path = shutil.copy(finished / "kd-T4-a0.1-s0" / "model.pt", tmp_path)
    refused, harmless, wrong = soak.flip_bits(path, 80)
    assert wrong == [] and refused + harmless == 80 and refused > 60
    content = {"network": models.create("student", 3, 0).state_dict(), "epoch": 3, "history": [{"loss": 0.5}]}
    save_checkpoint(tmp_path / "state.pt", content)
    refused, harmless, wrong = soak.flip_bits(tmp_path / "state.pt", 40, seed=1)
    assert wrong == [] and refused > 30


def test_any_cut_is_refused(finished, tmp_path):
    path = tmp_path / "model.pt"
    whole = (finished / "baseline-s0" / "model.pt").read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged) as failure:
            models.load(path)
        assert str(failure.value).startswith(f"{path} is damaged: ")


@pytest.mark.slow
def test_every_single_bit_of_a_checkpoint(tmp_path, monkeypatch):
    """All of them, of a small one: refused, or the same values. (A flip that makes the archive call a file a folder
    passes every checksum, and PyTorch then returns whatever was in memory.)"""
    path = tmp_path / "small.pt"
    save_checkpoint(path, {"weights": torch.arange(7.0), "more": torch.ones(3, 2), "epoch": 3, "rates": [1, 2.5]})
    whole, expected = path.read_bytes(), load_checkpoint(path)
    wrong, refused = [], 0
    for position in range(len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[position] ^= 1 << bit
            monkeypatch.setattr(runs.files, "read", lambda _, content=bytes(content): content)
            try:
                if not soak.same(load_checkpoint(path), expected):
                    wrong.append((position, bit))
            except Damaged:
                refused += 1
    assert wrong == [] and refused > 8 * len(whole) / 4
