"""Nothing is lost: kills, signals, full disks, flipped bits. `benchmarks/soak.py` is the long form."""

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, process

import files
import models
import train

sys.path.insert(0, str(ROOT / "benchmarks"))
import soak

# Whole or not at all -------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write(path, b"before")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(files.Failure, match="the disk is full"):
                files.write(path, b"after")
        assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]
    files.write(path, b"after", keep=tmp_path / "kept")
    assert path.read_bytes() == b"after" and (tmp_path / "kept").read_bytes() == b"before"


def test_a_file_system_that_syncs_no_folders_is_written_to(tmp_path, monkeypatch):
    sync = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_write_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    happened = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: happened.append(name) or original(*a))
    files.write(tmp_path / "file", b"content")
    assert happened == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_a_file_size_limit_is_a_sentence(tmp_path):
    path = tmp_path / "file"
    files.write(path, b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(files.Failure, match="cannot write"):
            files.write(path, b"x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]


@contextlib.contextmanager
def small_disk(folder, megabytes):
    """A tmpfs of so many megabytes at `folder`; skips the test where it may not be mounted."""
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode != 0:
        pytest.skip("a small tmpfs may not be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


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


def test_a_disk_that_fills_up_while_training(cli, flags, tmp_path):
    with small_disk(tmp_path / "disk", 40) as disk:  # room for one state of a teacher, not for two
        got = cli(*flags, "--train-teacher", "--output-dir", disk / "out")
        assert got.status == 1 and "the disk is full" in got.err
        assert files.load_checkpoint(disk / "out" / "teacher-s0" / "state.pt")["epoch"] == 0


def test_a_read_only_folder_is_a_sentence(cli, flags, tmp_path):
    with small_disk(tmp_path / "disk", 1) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        got = cli(*flags, "--train-teacher", "--output-dir", disk)
        assert got.status == 1 and str(disk) in got.err and "Read-only" in got.err


def test_a_folder_that_vanishes_is_a_sentence(cli, flags, tmp_path, monkeypatch):
    import train

    original = train._Run._end_of_epoch

    def vanish(run):
        shutil.rmtree(tmp_path / "out")
        original(run)

    monkeypatch.setattr(train._Run, "_end_of_epoch", vanish)
    got = cli(*flags, "--train-teacher", "--output-dir", tmp_path / "out")
    assert got.status == 1 and "cannot write" in got.err and len(got.err.splitlines()) <= 3


# Locks and signals ---------------------------------------------------------------------------------------------------


def test_a_second_process_says_who_holds_the_folder(cli, flags, copy):
    with files.lock(copy):
        got = cli(*flags, "--output-dir", copy)
    assert got.status == 1 and f"process {os.getpid()}" in got.err
    assert cli("--report", "--output-dir", copy).status == 0


def test_a_lock_left_by_a_killed_process_is_no_obstacle(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import files\nwith files.lock({str(tmp_path)!r}): print('held', flush=True); input()"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(files.Failure, match=f"process {holder.pid}"), files.lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with files.lock(tmp_path):
        pass


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_keep_the_state_and_say_so(flags, tmp_path, number, status):
    words = (*flags, "--train-teacher", "--output-dir", tmp_path, "--epochs", 10_000, "--save-every", 0.5)
    running = process(*words)
    deadline = time.monotonic() + 120
    while not (tmp_path / "teacher-s0" / "history.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == status, errors
    assert "of 10000" in errors and "The same command continues it" in errors and "Traceback" not in errors
    assert files.load_checkpoint(tmp_path / "teacher-s0" / "state.pt")["epoch"] >= 1


def test_a_second_signal_does_not_wait_for_the_step():
    stop = files.Stop()
    with stop.deferred():
        stop.handle(2)
        with pytest.raises(files.Interrupted):
            stop.handle(2)
    with pytest.raises(files.Interrupted):
        stop.raise_pending()


def test_a_signal_before_training_ends_at_once(cli, flags, tmp_path, monkeypatch):
    import data

    monkeypatch.setattr(data, "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    got = cli(*flags, "--train-teacher", "--overwrite", "--output-dir", tmp_path)
    assert got.status == 143 and "Traceback" not in got.err
    assert "without --overwrite" not in got.err  # nothing has been taken away yet


def test_a_signal_after_overwrite_began_says_how_to_continue(cli, flags, copy, monkeypatch):
    monkeypatch.setattr(train._Run, "_epochs", lambda run: os.kill(os.getpid(), signal.SIGTERM))
    got = cli(*flags, "--overwrite", "--output-dir", copy)
    assert got.status == 143 and "The same command without --overwrite continues it." in got.err


# Kills and flips -----------------------------------------------------------------------------------------------------


def test_killed_at_random_moments_the_bits_are_the_same(pictures, tmp_path):
    printed = [soak.run(words) for words in soak.commands(pictures, tmp_path / "untouched")][-1]
    draws = random.Random(2)
    moments = [draws.uniform(0, 0.5), 3, 10, draws.uniform(0, 0.5), 13, 18]
    found, kills, inside = soak.survive(pictures, tmp_path / "killed", moments)
    assert kills == 6 and inside == 4
    assert soak.differences(found, soak.outcome(tmp_path / "untouched", printed)) == []


def test_flipped_bits_are_refused_or_harmless(copy, tmp_path):
    path = copy / "kd-T4-a0.1-s0" / "model.pt"
    refused, harmless, wrong = soak.flip_bits(path, 80)
    assert wrong == [] and refused + harmless == 80 and refused > 60
    student = models.create("student", 3, 0)
    files.save_checkpoint(
        tmp_path / "state.pt", {"network": student.state_dict(), "epoch": 3, "history": [{"loss": 0.5}]}
    )
    refused, harmless, wrong = soak.flip_bits(tmp_path / "state.pt", 40, seed=1)
    assert wrong == [] and refused > 30


def test_any_cut_is_refused(copy):
    path = copy / "baseline-s0" / "model.pt"
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(models.Damaged, match=str(path)):
            models.load(path)


def test_every_single_bit_of_a_checkpoint(tmp_path, monkeypatch):
    """All of them, of a small one: refused, or the same values. (A flip that makes the archive call a file a folder
    passes every CRC, and PyTorch then returns whatever was in memory.)"""
    path = tmp_path / "small.pt"
    files.save_checkpoint(path, {"weights": torch.arange(7.0), "more": torch.ones(3, 2), "epoch": 3, "rates": [1, 2.5]})
    whole, expected = path.read_bytes(), files.load_checkpoint(path)
    wrong = []
    for position in range(len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[position] ^= 1 << bit
            monkeypatch.setattr(files, "read", lambda _, content=bytes(content): content)
            with contextlib.suppress(files.Damaged):
                if not soak.same(files.load_checkpoint(path), expected):
                    wrong.append((position, bit))
    assert wrong == []
