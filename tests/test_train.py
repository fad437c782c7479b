"""Runs and their folders: reused, resumed, refused; the same bits whatever happens in between."""

import csv
import dataclasses
import io
import json
import platform
import shutil
import signal
import sys
import sysconfig
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import data
import models
import runs.machine
import runs.progress
import train
from data import Views
from distill import SoftTargets, compress
from runs.checkpoints import load_checkpoint, save_checkpoint
from runs.code import CODE, deciding, fingerprint
from runs.files import Damaged, Failure, read_json
from runs.machine import Machine, keep_memory, make_deterministic
from runs.progress import Options
from runs.run import Run
from runs.settings import VERSION, Settings, default_augmentation, default_learning_rate, run_name
from runs.signals import Interrupted, Stop
from runs.state import HistoryRow

CPU = Machine(torch.device("cpu"))
TIMING = {"seconds", "teacher_seconds", "images_per_second"}


@pytest.fixture(scope="module")
def loaded(images):
    return data.load("folder", data_dir=images, image_size=16)


def settings(loaded, role="baseline", **other):
    defaults = {"epochs": 2, "batch_size": 16, "learning_rate": 0.05, "weight_decay": 5e-4, "seed": 0, "image_size": 16}
    return Settings(role=role, data=loaded.digest, **(defaults | other))


def train_run(loaded, folder, wanted=None, machine=CPU, options=None, **rest):
    """Trains the run `wanted` [a baseline] in `folder`; returns its accuracy."""
    return train.train(Run(folder, wanted or settings(loaded)), loaded, machine, options or Options(), **rest)


def test_validation_judges_each_of_its_images_once(loaded, monkeypatch):
    monkeypatch.setitem(models.INFERENCE_BATCH, "cpu", 4)
    network, indices = models.create("student", 3, seed=0), torch.randperm(47, generator=models.generator("test"))
    images = models.normalize(loaded.train_images[indices], loaded.mean, loaded.std)
    with torch.inference_mode():
        answers = network.eval()(images).argmax(1)
    right = sum(int(a) == int(loaded.train_labels[k]) for a, k in zip(answers, indices, strict=True))
    assert 0 < right < 47 and train.validate(network, loaded, indices) == pytest.approx(right / 47)


class Teacher:
    """Answers with random logits, always the same for an epoch: what train() asks of a distill.Ensemble."""

    def epoch(self, epoch, description):
        return torch.randn(48, 3, generator=torch.Generator().manual_seed(epoch)) * 3


def weights(folder):
    return models.digest(models.load(folder / "model.pt").state_dict())


def history(folder):
    with open(folder / "history.csv") as file:
        return list(csv.DictReader(file))


def without_timing(rows):
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(n) is a Stop at which a SIGTERM arrives while the n-th step from now is being taken."""
    original = Views.batch

    def prepare(step):
        stop, steps = Stop(), []

        def batch(self, epoch, indices):
            steps.append(indices)
            if len(steps) == step:
                stop.handle(signal.SIGTERM)
            return original(self, epoch, indices)

        monkeypatch.setattr(Views, "batch", batch)
        return stop

    return prepare


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory):
    """The folder of a baseline that nothing interrupted; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    train_run(loaded, folder)
    return folder


@pytest.fixture(scope="module")
def stopped(loaded, tmp_path_factory):
    """The folder of the same baseline, stopped in the fourth of its six steps; not to be changed."""
    folder, original, steps, stop = tmp_path_factory.mktemp("stopped"), Views.batch, [], Stop()

    def batch(self, epoch, indices):
        steps.append(indices)
        if len(steps) == 4:
            stop.handle(signal.SIGTERM)
        return original(self, epoch, indices)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Views, "batch", batch)
        train_run(loaded, folder, options=Options(stop=stop))
    return folder


@pytest.fixture
def unfinished(stopped, tmp_path):
    """A copy of the stopped run's folder that a test may change."""
    return Path(shutil.copytree(stopped, tmp_path / "unfinished"))


# Settings and schedule -----------------------------------------------------------------------------------------------


def test_the_schedule_by_hand():
    """In a line from one to zero, which the step after the last would take."""
    shares = [train.schedule(step, 10) for step in range(10)]
    np.testing.assert_allclose(shares, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert train.schedule(0, 1) == 1
    assert all(0 < train.schedule(step, steps) <= 1 for steps in range(1, 40) for step in range(steps))


def test_the_default_learning_rate_follows_the_batch_size():
    rates = [default_learning_rate(size) for size in (32, 128, 512, 2048)]
    np.testing.assert_allclose(rates, [0.1, 0.2, 0.4, 0.8])


def test_views_of_short_trainings_move_by_half_as_much_and_a_teachers_of_long_ones_are_cut_out():
    pairs = [(epochs, size) for epochs in (1, 8, 9, 60, 61, 200) for size in (16, 32, 100)]
    for role in ("teacher", "kd", "baseline"):
        found = [default_augmentation(role, *pair) for pair in pairs]
        assert [each["padding"] for each in found] == [1, 2, 6, 1, 2, 6, *[2, 4, 12] * 4]
        assert all(each["mirror"] is True for each in found)
        assert [each["cutout"] for each in found] == [*[0] * 12, *([6, 12, 37] if role == "teacher" else [0] * 3) * 2]


def test_a_training_takes_the_views_of_its_padding_and_cutout(loaded, tmp_path):
    digests = []
    # padding None: an eighth, 2 of these images, as runs have that record nothing of it
    for views in ({"padding": 0}, {"padding": 2}, {"padding": None}, {"padding": 2, "cutout": 6}):
        folder = tmp_path / str(len(digests))
        train_run(loaded, folder, settings(loaded, epochs=1, **views))
        digests.append(weights(folder))
    assert digests[1] == digests[2] and len(set(digests)) == 3


def test_runs_of_another_padding_are_refused(loaded, tmp_path):
    run = Run(tmp_path / "run", settings(loaded, padding=1, epochs=1))
    train_run(loaded, run.folder, run.settings)
    Run(run.folder, run.settings).check(CPU)
    older = {name: value for name, value in run.settings.as_dict().items() if name != "padding"}
    for refused in (run.settings.as_dict() | {"padding": 2}, older):
        with pytest.raises(Failure, match=r"settings: padding 2 instead of 1\.\nAdd --padding 2 to use or resume"):
            run.refuse_other_settings(refused)
    with pytest.raises(Failure, match=r"padding 2 instead of 1, epochs 2 instead of 1\.\nAdd --overwrite to train"):
        run.refuse_other_settings(older | {"epochs": 2})
    blanked = older | {"cutout": 6}
    with pytest.raises(
        Failure, match=r"cutout 6 instead of 0, padding 2 instead of 1\.\nAdd --padding 2 --cutout 6 to"
    ):
        run.refuse_other_settings(blanked)
    with pytest.raises(Failure, match=r"settings: cutout 6 instead of 0\.\nAdd --cutout 6 to use or resume"):
        run.refuse_other_settings(blanked | {"padding": 1})
    with pytest.raises(Failure, match=r"recipe 1 instead of \d+ \(networks or training of another version"):
        run.refuse_other_settings(run.settings.as_dict() | {"recipe": 1})
    with pytest.raises(Failure, match="image size None instead of 16"):
        run.refuse_other_settings(older | {"image_size": None})
    usual = Run(tmp_path, settings(loaded, epochs=1, padding=2))
    usual.refuse_other_settings(older)  # of before there was the option, when it was 2
    assert "padding" not in older


def test_run_names_are_those_of_the_readme():
    for role, temperature, alpha, seed, name in (
        ("teacher", None, None, 0, "teacher-s0"),
        ("kd", 4.0, 0.1, 2, "kd-T4-a0.1-s2"),
        ("kd", 2.5, 1.0, 0, "kd-T2.5-a1-s0"),
        ("baseline", None, None, 1, "baseline-s1"),
    ):
        assert run_name(role, temperature, alpha, seed) == name


# A finished run ------------------------------------------------------------------------------------------------------


def test_what_a_finished_run_holds(loaded, tmp_path):
    accuracy = train_run(loaded, tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["history.csv", "model.pt", "run.json", "test_logits.npy"]
    logits = np.load(tmp_path / "test_logits.npy", allow_pickle=False)
    assert logits.shape == (24, 3) and logits.dtype == np.float32
    assert accuracy == (logits.argmax(1) == loaded.test_labels.numpy()).mean()
    network = models.load(tmp_path / "model.pt")
    assert network.accuracy == accuracy and network.settings["epochs"] == 2
    with torch.inference_mode():
        again = network(network.normalize(loaded.test_images))
    np.testing.assert_allclose(again.numpy(), logits, atol=1e-4)
    rows = history(tmp_path)
    assert list(rows[0]) == [each.name for each in dataclasses.fields(HistoryRow)]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is True


def test_the_test_set_is_read_once_after_the_last_epoch(loaded, tmp_path, monkeypatch):
    read, evaluate = [], train.evaluate

    def watched(network, images, *rest):
        if images is loaded.test_images:
            read.append(len(history(tmp_path)))
        return evaluate(network, images, *rest)

    monkeypatch.setattr(train, "evaluate", watched)
    train_run(loaded, tmp_path, settings(loaded, epochs=3))
    assert read == [3]


def test_a_finished_run_without_its_record_says_what_to_do(loaded, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "run.json").unlink()
    with pytest.raises(Failure, match="run.json is missing, or .*\n.*") as failure:
        train_run(loaded, folder)
    assert str(failure.value).endswith(f"remove {folder} to train it again.")


def test_a_finished_run_is_reused_and_other_settings_are_refused(loaded, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = (folder / "model.pt").stat().st_mtime_ns
    (folder / "state.pt").write_bytes(b"left behind by a process that was killed right after it wrote model.pt")
    assert train_run(loaded, folder) == models.load(whole / "model.pt").accuracy
    assert (folder / "model.pt").stat().st_mtime_ns == before and not (folder / "state.pt").exists()
    other = settings(loaded, epochs=3, learning_rate=0.1)
    for refuses in (lambda: Run(folder, other).check(CPU), lambda: train_run(loaded, folder, other)):
        with pytest.raises(Failure, match=r"epochs 2 instead of 3, learning rate 0.05 instead of 0.1.*\n.*--overwrite"):
            refuses()
    Run(folder, other).remove()
    assert list(folder.iterdir()) == []
    train_run(loaded, folder, other)
    assert len(history(folder)) == 3


def test_a_student_learns(loaded, tmp_path):
    """Colours in noise, where guessing gives a third."""
    assert train_run(loaded, tmp_path, settings(loaded, epochs=10, learning_rate=0.1)) > 0.8


# Interrupted and resumed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, 7))
def test_interrupted_anywhere_the_bits_are_the_same(loaded, whole, tmp_path, stop_at, step):
    """The state is saved after any step, within an epoch too; the resumed run has the bits of an uninterrupted one."""
    with pytest.raises(Interrupted, match="its state after epoch .* is saved") as interrupted:
        train_run(loaded, tmp_path, options=Options(stop=stop_at(step)))
    assert interrupted.value.signal_number == signal.SIGTERM
    state = load_checkpoint(tmp_path / "state.pt")
    assert (state["epoch"], state["step"]) == divmod(step, 3)
    assert not (tmp_path / "model.pt").exists()
    train_run(loaded, tmp_path)
    assert weights(tmp_path) == weights(whole)
    for name in ("test_logits.npy", "model.pt"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert without_timing(history(tmp_path)) == without_timing(history(whole))


def test_an_interrupted_distilled_student_has_the_same_bits_and_losses(loaded, tmp_path, stop_at):
    wanted = settings(loaded, "kd", temperature=3.0, alpha=0.7, teacher="a", val_fraction=0.25)
    train_run(loaded, tmp_path / "whole", wanted, teacher=Teacher())
    for _ in range(2):
        with pytest.raises(Interrupted):
            train_run(loaded, tmp_path / "parts", wanted, options=Options(stop=stop_at(1)), teacher=Teacher())
    train_run(loaded, tmp_path / "parts", wanted, teacher=Teacher())
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert without_timing(history(tmp_path / "parts")) == without_timing(history(tmp_path / "whole"))


@pytest.fixture
def threads_used(monkeypatch):
    """The numbers of threads at each batch of a training; afterwards the number is what it was."""
    before, used, batch = torch.get_num_threads(), [], Views.batch
    monkeypatch.setattr(Views, "batch", lambda *rest: used.append(torch.get_num_threads()) or batch(*rest))
    yield used
    torch.set_num_threads(before)


def test_a_resumed_run_has_as_many_threads_as_before(loaded, unfinished, threads_used, stop_at, capsys):
    """The order of additions, and with it the last bits, depends on it. Afterwards the number is what it was."""
    state = load_checkpoint(unfinished / "state.pt")
    torch.set_num_threads(state["threads"] + 1)
    with pytest.raises(Interrupted):
        train_run(loaded, unfinished, options=Options(stop=stop_at(1)))
    assert torch.get_num_threads() == state["threads"] + 1
    assert load_checkpoint(unfinished / "state.pt")["threads"] == state["threads"]
    train_run(loaded, unfinished)
    assert {*threads_used} == {state["threads"]} and torch.get_num_threads() == state["threads"] + 1
    assert "last bits" not in capsys.readouterr().err


def test_a_resumed_run_has_no_more_threads_than_this_process(loaded, unfinished, threads_used, capsys):
    """However many cores there are: a process of a group has its share, and OMP_NUM_THREADS may ask for fewer."""
    change_state(unfinished, {"threads": 16})
    torch.set_num_threads(1)
    train_run(loaded, unfinished)
    assert {*threads_used} == {1} and torch.get_num_threads() == 1
    told = f"{unfinished} was begun with 16 threads; with 1, as many as this process has, the last bits may differ."
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 1 + 2 * 3), (1e6, 1 + 2)])
def test_the_state_is_saved_within_epochs_as_often_as_asked(loaded, tmp_path, monkeypatch, seconds, expected):
    """Before the first step, after every epoch, and within epochs where `save_every` seconds have passed."""
    saved, save = [], runs.progress.save_state
    monkeypatch.setattr(runs.progress, "save_state", lambda path, state: saved.append(path) or save(path, state))
    train_run(loaded, tmp_path, options=Options(save_every=seconds))
    assert saved == [tmp_path / "state.pt"] * expected


def test_a_run_begun_on_another_device_or_precision_is_not_resumed(loaded, unfinished):
    run, other = Run(unfinished, settings(loaded)), Machine(torch.device("cpu"), "bf16")
    for refuses in (lambda: run.check(other), lambda: train_run(loaded, unfinished, machine=other)):
        with pytest.raises(Failure, match=r"precision fp32 instead of bf16\. Resume it as .* \(--device cpu --pre"):
            refuses()  # before any other run is trained, and when it is trained
    run.check(CPU)


def test_an_unfinished_run_with_other_settings_is_refused(loaded, unfinished):
    run = Run(unfinished, settings(loaded, epochs=3))
    before = (unfinished / "state.pt").read_bytes()
    for refuses in (lambda: run.check(CPU), lambda: train_run(loaded, unfinished, run.settings)):
        with pytest.raises(Failure, match="epochs 2 instead of 3"):
            refuses()
    assert (unfinished / "state.pt").read_bytes() == before


def test_a_state_of_another_run_is_refused(loaded, whole, unfinished):
    """Even where run.json does not tell."""
    shutil.copy(whole / "run.json", unfinished)
    change_state(unfinished, {"settings": settings(loaded, seed=1).as_dict()})
    with pytest.raises(Failure, match="seed 1 instead of 0"):
        train_run(loaded, unfinished)


def test_a_run_resumed_on_another_machine_says_so(loaded, tmp_path, stop_at, monkeypatch, capsys):
    here = runs.progress.describe(CPU.device)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(runs.progress, "describe", lambda device: "Abacus")
        train_run(loaded, tmp_path, options=Options(stop=stop_at(1)))
    change_state(tmp_path, {"torch": "1.0", "program": ["2.0.0"]})
    train_run(loaded, tmp_path)
    said = capsys.readouterr().err
    assert f"{tmp_path} ran on Abacus; on {here} the last bits may differ" in said
    assert f"ran with torch 1.0; with torch {torch.__version__} the last bits may differ" in said
    assert f"ran by version 2.0.0; by version {VERSION} the last bits may differ" in said
    environment = read_json(tmp_path / "run.json")["environment"]
    assert environment["device"] == f"Abacus, then {here}" and environment["program"] == f"2.0.0, then {VERSION}"


def test_a_run_begun_on_another_kind_of_device_is_resumed_where_the_command_names_this_one(
    cli, flags, copy, monkeypatch
):
    """A GPU that was lent for an hour, say. Without a name it is refused: the GPU may just not be seen."""
    auto = [*flags, "--output-dir", copy]
    del auto[auto.index("--device") : auto.index("--device") + 2]
    folder, steps, step = copy / "baseline-s0", [], train.Muon.step

    def interrupted(optimizer):
        steps.append(step(optimizer))
        if len(steps) == 10:  # of the baseline the fourth
            raise Interrupted(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.Muon, "step", interrupted)
        assert cli(*flags, "--output-dir", copy, "--overwrite").status == 130
    change_state(folder, {"device": "cuda", "machines": ["Some GPU"], "threads": 1})
    record = read_json(folder / "run.json")
    record["environment"] |= {"device_type": "cuda", "device": "Some GPU"}
    (folder / "run.json").write_text(json.dumps(record))
    refused = cli(*auto)
    assert refused.status == 1 and "cannot be resumed here: device cuda instead of cpu." in refused.err
    words = "or on this device, with other last bits (--device cpu --precision fp32 --no-compile), or remove"
    assert words in refused.err
    with monkeypatch.context() as patch:
        patch.setattr(train.Muon, "step", interrupted)
        steps[:] = [None] * 9  # the next step is the last before the interruption, within the epoch
        got = cli(*auto, "--device", "cpu", "--precision", "fp32", "--no-compile")
    assert got.status == 130 and f"{folder} ran on Some GPU; on" in got.err
    got = cli(*auto, "--precision", "fp32")  # by now this device is the one
    assert got.status == 0 and " ran on " not in got.err
    assert read_json(folder / "run.json")["environment"]["device"].startswith("Some GPU, then ")


def test_views_made_together_are_those_made_alone(loaded):
    """As on a GPU, where views of several batches are made at a time."""
    views = Views(loaded.train_images, loaded.mean, loaded.std)
    batches = torch.randperm(48, generator=models.generator("test")).split(16)
    for together in (1, 2, 3, 4):
        for (batch, images), given in zip(train.with_views(batches, views, 3, together), batches, strict=True):
            assert batch.equal(given) and images.equal(views.batch(3, given))
            assert images.is_contiguous(memory_format=torch.channels_last)
            images += torch.ones(1, requires_grad=True)  # as a network that changes its input in place
            images.sum().backward()


def test_only_a_gpu_makes_views_of_several_batches_together_and_records_steps(loaded):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for device, size, batch, unlabeled, together in (
        (gpu, 32, 128, None, 15), (gpu, 32, 5000, None, 1), (gpu, 256, 31, None, 4), (gpu, 32, 128, "0" * 64, 1),
        (cpu, 32, 128, None, 1),
    ):  # fmt: skip  # of 4 times the 500 images that a GPU is given at a time, or as many pixels of larger ones
        progress = Mock(machine=Mock(device=device), settings=Mock(unlabeled=unlabeled), batch_size=batch)
        assert train.batches_at_a_time(progress, Mock(device=device, size=size)) == together
    assert (Machine(gpu).records, Machine(cpu).records) == (torch.version.hip is None, False)


def test_a_run_resumed_by_other_code_says_so(loaded, unfinished, capsys):
    for before in ("0" * 12, f"{'0' * 12}, then {CODE['models.py']}"):
        change_state(unfinished, {"code": CODE | {"models.py": before}})
        folder = Path(shutil.copytree(unfinished, f"{unfinished}-{len(before)}"))
        train_run(loaded, folder)
        assert f"{folder} was begun before models.py changed; this code goes on." in capsys.readouterr().err
        environment = read_json(folder / "run.json")["environment"]
        assert {name: environment[name] for name in CODE} == CODE | {
            "models.py": f"{'0' * 12}, then {CODE['models.py']}"
        }
    change_state(unfinished, {"code": ...})  # begun before states had it
    train_run(loaded, unfinished)
    assert "was begun" not in capsys.readouterr().err


def test_the_loss_decides_only_what_is_trained_with_it():
    """With --omit-class distill.py corrects the bias of that class, too."""
    baseline = Settings("baseline", "d", 1, 8, 0.1, 0.0, 0, 16)
    distilled = dataclasses.replace(baseline, role="kd", temperature=4.0, alpha=0.1, teacher="t")
    uses = [distilled, dataclasses.replace(baseline, omit_class=("red",)), baseline]
    uses += [dataclasses.replace(distilled, alpha=0.0), dataclasses.replace(baseline, role="teacher")]
    assert ["distill.py" in deciding(settings) for settings in uses] == [True, True, False, False, False]


def test_comments_docstrings_and_blank_lines_are_no_other_code():
    one = fingerprint('a = "#"\n\ndef f():\n    return 1  # why\n')
    about = '"""About\n# all."""\n# this\na = "#"  \ndef f():\n    """More\n\n    of it."""\n\n    return 1\n# end'
    assert fingerprint(about) == one
    others = 'a = "#"\ndef f():\n    return 2\n', 'a = ""\ndef f():\n    return 1\n', 'a = "#"\ndef f():\n  return (1\n'
    assert len({one, *map(fingerprint, others)}) == 4


def test_a_signal_while_a_state_is_read_is_no_damage(loaded, unfinished, monkeypatch, capsys):
    before = (unfinished / "state.pt").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(torch, "load", lambda *_, **__: Stop().handle(signal.SIGTERM))
        train_run(loaded, unfinished)
    assert "damaged" not in capsys.readouterr().err and (unfinished / "state.pt").read_bytes() == before


# A damaged state -----------------------------------------------------------------------------------------------------


def change_state(folder, entries):
    """Changes some entries of a state, and leaves out those that are Ellipsis."""
    state = load_checkpoint(folder / "state.pt") | entries
    save_checkpoint(folder / "state.pt", {name: value for name, value in state.items() if value is not ...})


def refused(loaded, folder):
    """The sentence with which a run in `folder` is refused; no file there is changed."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(Damaged) as failure:
        train_run(loaded, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    sentence, advice = str(failure.value).rsplit("\n", 1)
    assert advice == f"Remove {folder} to train it again."
    return sentence


def test_a_damaged_state_is_refused_and_left_as_it_is(loaded, whole, unfinished):
    """A flipped bit, a file cut short, nonsense: the run never begins again in silence."""
    path = unfinished / "state.pt"
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 16
    for damaged in (flipped, content[:-1], content[: len(content) // 2], b"nonsense", b""):
        path.write_bytes(damaged)
        assert refused(loaded, unfinished).startswith(f"{path} is damaged: ")
    path.write_bytes(content)
    train_run(loaded, unfinished)  # an intact copy put back is resumed
    assert weights(unfinished) == weights(whole)


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ({"format": 99}, "is a state of another version of this program: its format is 99, and this version reads 3"),
        ({"format": ...}, "its format is None"),
        ({"settings": None}, "expected object, got null - at $.settings"),
        ({"optimizer": None}, "expected object, got null - at $.optimizer"),
        ({"optimizer": {}}, "its optimizer or sums do not fit this run"),
        ({"epoch": "3"}, "expected int, got str - at $.epoch"),
        ({"epoch": ...}, "missing required field epoch"),
        ({"epoch": 7}, "its epoch, step, history and sums do not match"),
        ({"epoch": -1}, "expected int >= 0 - at $.epoch"),
        ({"step": 10**9}, "its epoch, step, history and sums do not match"),
        ({"history": [1, 2]}, "expected object, got int - at $.history[0]"),
        ({"history": [{}]}, "missing required field epoch - at $.history[0]"),
        ({"history": []}, "its epoch, step, history and sums do not match"),
        ({"threads": 0}, "expected int >= 1 - at $.threads"),
        ({"threads": 10**9}, "expected int <= 4096 - at $.threads"),
        ({"torch": None}, "expected str, got null - at $.torch"),
        ({"device": None}, "expected str, got null - at $.device"),
        ({"compiled": 0}, "expected bool, got int - at $.compiled"),
        ({"sums": {"loss": 0.5}}, "expected Tensor, got float - at $.sums[...]"),
        ({"sums": {}}, "its epoch, step, history and sums do not match"),
        ({"network": {}}, "its weights do not fit this architecture"),
        ({"seconds": "long"}, "expected float, got str - at $.seconds"),
        ({"machines": []}, "expected array of length >= 1 - at $.machines"),
    ],
    ids=str,
)
def test_a_malformed_state_is_refused_by_name(loaded, unfinished, entries, what):
    change_state(unfinished, entries)
    assert what in refused(loaded, unfinished)


@pytest.mark.parametrize("name", ["loss", "hard_loss", "correct", "first_bad"])
def test_sums_of_another_shape_are_refused(loaded, unfinished, name):
    sums = load_checkpoint(unfinished / "state.pt")["sums"]
    change_state(unfinished, {"sums": sums | {name: torch.zeros(3)}})
    assert "its optimizer or sums do not fit this run" in refused(loaded, unfinished)


def test_weights_that_are_not_finite_are_refused(loaded, unfinished):
    network = load_checkpoint(unfinished / "state.pt")["network"]
    change_state(unfinished, {"network": network | {"head.weight": torch.full((3, 128), float("nan"))}})
    assert "it holds weights that are not finite" in refused(loaded, unfinished)


# Divergence ----------------------------------------------------------------------------------------------------------


def test_divergence_stops_at_the_step_and_keeps_the_last_good_state(loaded, tmp_path):
    with pytest.raises(Failure, match=r"step 2 of 3 of epoch 1 of 2.*\n.*--lr"):
        train_run(loaded, tmp_path, settings(loaded, learning_rate=1e30))
    assert not (tmp_path / "model.pt").exists()
    state = load_checkpoint(tmp_path / "state.pt")
    assert models.is_finite(state["network"]) and (state["epoch"], state["step"]) == (0, 0)


def test_weights_that_are_not_finite_are_never_saved(loaded, tmp_path, monkeypatch):
    """Not even where every loss was finite: the only step of the epoch spoils the weights."""
    step = train.Muon.step

    def spoil(optimizer):
        step(optimizer)
        optimizer.param_groups[1]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(train.Muon, "step", spoil)
    with pytest.raises(Failure, match="weights were not finite at step 1 of 1 of epoch 1"):
        train_run(loaded, tmp_path, settings(loaded, batch_size=48))
    assert models.is_finite(load_checkpoint(tmp_path / "state.pt")["network"])


@pytest.mark.parametrize("save_every", [120, 0])
def test_a_network_that_no_image_reaches_the_end_of_is_not_trained_on(loaded, tmp_path, monkeypatch, save_every):
    """Its last channels are never positive again, so that no gradient brings it back."""
    step, steps = train.Muon.step, []

    def bury(optimizer):
        step(optimizer)
        steps.append(optimizer)
        if len(steps) == 4:  # the first of the second epoch
            optimizer.param_groups[2]["params"][-1].data.fill_(-1000.0)

    monkeypatch.setattr(train.Muon, "step", bury)
    place = "step 2 of 3" if save_every == 0 else "step 3 of 3"
    with pytest.raises(
        Failure, match=rf"diverged: it gave all images the same answer at {place} of epoch 2 of 2\.\n.*--lr"
    ):
        train_run(loaded, tmp_path, options=Options(save_every=save_every))
    assert not (tmp_path / "model.pt").exists() and load_checkpoint(tmp_path / "state.pt")["epoch"] == 1


# What a step sees ----------------------------------------------------------------------------------------------------


def numpy_losses(logits, labels, teacher_logits, temperature, smoothing):
    """(soft, hard): T^2 * KL(teacher || student) and the cross-entropy, by hand in float64."""

    def log_softmax(values):
        values = values - values.max(1, keepdims=True)
        return values - np.log(np.exp(values).sum(1, keepdims=True))

    logits, teacher_logits = (each.detach().double().numpy() for each in (logits, teacher_logits))
    teacher, student = log_softmax(teacher_logits / temperature), log_softmax(logits / temperature)
    soft = temperature**2 * (np.exp(teacher) * (teacher - student)).sum(1).mean()
    student = log_softmax(logits)
    right = student[np.arange(len(labels)), labels.numpy()]
    return soft, -((1 - smoothing) * right + smoothing * student.mean(1)).mean()


@pytest.mark.parametrize(
    ("alpha", "fraction", "smoothing"), [(0.7, 0.0, 0.0), (0.1, 0.25, 0.0), (1.0, 0.25, 0.0), (0.4, 0.0, 0.3)]
)
def test_every_image_meets_its_own_label_and_soft_targets(loaded, tmp_path, monkeypatch, alpha, fraction, smoothing):
    """In every step of every epoch the loss sees the labels of the very images that the student saw, the teacher's
    logits of these views, and the run's temperature and alpha. history.csv has the means of both losses and of what
    was minimized, alpha * soft + (1 - alpha) * hard, as NumPy calculates them."""
    teacher = models.create("teacher", len(loaded.classes), 7).eval()
    seen, met, losses, right = [], [], [], []
    batch, loss = Views.batch, train.distillation_loss

    def watched(views, epoch, indices):
        seen.append((indices, batch(views, epoch, indices)))
        return seen[-1][1]

    def compared(logits, labels, teacher_logits, temperature, given, label_smoothing):
        indices, images = seen[-1]
        assert (temperature, given) == (3.0, alpha) and labels.tolist() == loaded.train_labels[indices].tolist()
        met.append((images, teacher_logits))
        losses.append(numpy_losses(logits, labels, teacher_logits, temperature, smoothing))
        right.append((logits.argmax(1) == labels).float().mean().item())
        return loss(logits, labels, teacher_logits, temperature, given, label_smoothing)

    monkeypatch.setattr(Views, "batch", watched)
    monkeypatch.setattr(train, "distillation_loss", compared)
    views = Views(loaded.train_images, loaded.mean, loaded.std)
    targets = SoftTargets(teacher, "a", loaded.digest, views, tmp_path / "targets", CPU)
    rest = {"val_fraction": fraction, "label_smoothing": smoothing}
    wanted = settings(loaded, "kd", temperature=3.0, alpha=alpha, teacher="a", **rest)
    train_run(loaded, tmp_path, wanted, teacher=targets)
    monkeypatch.undo()
    steps = len(met) // wanted.epochs
    assert steps > 1 and wanted.epochs > 1
    for epoch, row in enumerate(history(tmp_path)):
        of_epoch = slice(epoch * steps, (epoch + 1) * steps)
        soft, hard = np.mean(losses[of_epoch], axis=0)
        assert float(row["soft_loss"]) == pytest.approx(soft, rel=1e-4, abs=1e-5)
        assert float(row["hard_loss"]) == pytest.approx(hard, rel=1e-5)
        assert float(row["train_loss"]) == pytest.approx(alpha * soft + (1 - alpha) * hard, rel=1e-5, abs=1e-6)
        assert float(row["train_accuracy"]) == pytest.approx(np.mean(right[of_epoch]), rel=1e-5)
    for images, teacher_logits in met:
        with torch.no_grad():
            torch.testing.assert_close(teacher_logits, compress(teacher(images)).float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("role", ["baseline", "kd"])
def test_without_a_teacher_the_loss_is_the_hard_loss(loaded, whole, tmp_path, role):
    """A distilled student with alpha 0 is the baseline."""
    rest = {"temperature": 3.0, "alpha": 0.0, "teacher": "a"} if role == "kd" else {}
    train_run(loaded, tmp_path, settings(loaded, role, **rest))
    assert without_timing(history(tmp_path)) == without_timing(history(whole))
    for row in history(tmp_path):
        assert row["soft_loss"] == "" and row["train_loss"] == row["hard_loss"]


def test_every_seed_and_epoch_has_an_order_of_its_own(loaded, tmp_path, monkeypatch):
    """And students share their views, which a teacher does not; every step follows the schedule."""
    orders, streams, rates = {}, set(), []
    batch, step = Views.batch, train.Muon.step

    def watched(views, epoch, indices):
        orders.setdefault((seed, epoch), []).extend(indices.tolist())
        streams.add(views.stream)
        return batch(views, epoch, indices)

    def timed(optimizer):
        rates.append([group["lr"] for group in optimizer.param_groups])
        step(optimizer)

    monkeypatch.setattr(Views, "batch", watched)
    monkeypatch.setattr(train.Muon, "step", timed)
    for seed in (0, 1):
        train_run(loaded, tmp_path / str(seed), settings(loaded, seed=seed))
    assert len(orders) == len({tuple(order) for order in orders.values()}) == 4
    assert all(sorted(order) == list(range(48)) for order in orders.values())
    assert list(range(48)) not in orders.values()
    by_hand = 0.05 * np.array([6, 5, 4, 3, 2, 1]) / 6
    np.testing.assert_allclose(rates, np.repeat(np.tile(by_hand, 2)[:, None], 3, 1))
    told = [float(row["learning_rate"]) for row in history(tmp_path / "0")]
    np.testing.assert_allclose(told, by_hand[[2, 5]])  # of each epoch's last step
    assert streams == {"views"}
    seed = "teacher"
    train_run(loaded, tmp_path / "teacher", settings(loaded, "teacher", epochs=1))
    assert streams == {"views", "teacher views"} and orders["teacher", 0] != orders[0, 0]


@pytest.mark.parametrize(("batch_size", "steps"), [(2, 24), (20, 2), (48, 1), (128, 1)])
def test_any_batch_size(loaded, tmp_path, monkeypatch, batch_size, steps):
    """An incomplete last batch is dropped where a full one exists; a batch beyond the data is all of it."""
    sizes, batch = [], Views.batch
    monkeypatch.setattr(
        Views, "batch", lambda views, epoch, indices: sizes.append(len(indices)) or batch(views, epoch, indices)
    )
    train_run(loaded, tmp_path, settings(loaded, batch_size=batch_size, epochs=1))
    assert sizes == [min(batch_size, 48)] * steps


def test_the_validation_part_is_never_trained_on_and_the_test_set_never_read(loaded, tmp_path, monkeypatch):
    seen, batch = set(), Views.batch
    monkeypatch.setattr(
        Views, "batch", lambda views, epoch, indices: seen.update(indices.tolist()) or batch(views, epoch, indices)
    )
    _, validation = data.split(loaded.train_labels, 0.25)
    blind = dataclasses.replace(loaded, test_images=None, test_labels=None)
    accuracy = train_run(blind, tmp_path, settings(loaded, val_fraction=0.25, epochs=4))
    assert not seen & set(validation.tolist()) and len(seen) > 30
    assert not (tmp_path / "test_logits.npy").exists()
    assert float(history(tmp_path)[-1]["val_accuracy"]) == accuracy
    network = models.load(tmp_path / "model.pt")
    with torch.inference_mode():
        logits = network(network.normalize(loaded.train_images[validation]))
    assert (logits.argmax(1) == loaded.train_labels[validation]).float().mean().item() == pytest.approx(accuracy)


def test_validation_does_not_change_the_training(loaded, tmp_path, monkeypatch):
    train_run(loaded, tmp_path / "judged", settings(loaded, val_fraction=0.25))
    monkeypatch.setattr(train, "validate", lambda network, loaded, indices: 0.5)
    assert train_run(loaded, tmp_path / "not", settings(loaded, val_fraction=0.25)) == 0.5
    assert weights(tmp_path / "judged") == weights(tmp_path / "not")


def test_float32_on_cuda_is_full_float32():
    """Whatever the environment asks of matrix products (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE)."""
    flags = [(torch.backends.cuda.matmul, "allow_tf32", False), (torch.backends.cudnn, "allow_tf32", False),
             (torch.backends.cudnn, "deterministic", True)]  # fmt: skip
    before = [getattr(backend, name) for backend, name, _ in flags]
    try:
        for backend, name, wanted in flags:
            setattr(backend, name, not wanted)
        make_deterministic()
        assert [getattr(backend, name) for backend, name, _ in flags] == [wanted for *_, wanted in flags]
    finally:
        for (backend, name, _), value in zip(flags, before, strict=True):
            setattr(backend, name, value)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory as they see fit")
def test_memory_that_a_step_frees_is_kept_for_the_next():
    """As the processor sees it: hardly a new page for blocks of 64 MB that are freed and asked for again."""
    import resource

    def new_pages(blocks):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(blocks):
            torch.ones(1 << 24)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()

    keep_memory()
    new_pages(20)  # the first ones are new
    assert new_pages(5) < 1 << 26


@pytest.mark.parametrize(
    ("taken", "calls"),
    [
        (2**31 - 1, [(-3, 2**31 - 1), (-1, 2**31 - 1)]),
        (1 << 25, [(-3, 2**31 - 1), (-3, 1 << 25), (-1, 2**31 - 1)]),  # an older glibc
        (0, [(-3, 2**31 - 1), (-3, 1 << 25)]),
    ],
)
def test_a_c_library_that_takes_a_smaller_threshold_or_none(monkeypatch, taken, calls):
    made = []
    library = Mock(mallopt=lambda name, value: made.append((name, value)) or int(name == -1 or value <= taken))
    monkeypatch.setattr(runs.machine.sys, "platform", "linux")
    monkeypatch.setattr(runs.machine.ctypes, "CDLL", lambda name: library)
    keep_memory()
    assert made == calls


# What is shown -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by a second with every step, and by two with every epoch of a teacher; nothing else takes
    time."""
    now, batch, epoch = [0.0], Views.batch, Teacher.epoch

    def after(seconds, function):
        def call(*rest):
            now[0] += seconds
            return function(*rest)

        return call

    monkeypatch.setattr(Views, "batch", after(1, batch))
    monkeypatch.setattr(Teacher, "epoch", after(2, epoch))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


def number(row, name):
    return f"{float(row[name]):.4f}"


def test_a_log_has_a_line_for_every_epoch(loaded, tmp_path, clock, capsys):
    """Where standard error is no terminal: how far the run is, both losses, and the time left."""
    wanted = settings(loaded, "kd", epochs=3, temperature=3.0, alpha=0.7, teacher="a", val_fraction=0.25)
    train_run(loaded, tmp_path, wanted, teacher=Teacher(), title="[1/2] kd")
    first, second, third = history(tmp_path)
    assert [(row["seconds"], row["teacher_seconds"]) for row in (first, second, third)] == [("2.0", "2.0")] * 3
    assert first["images_per_second"] == "16.0"
    assert capsys.readouterr().err.splitlines() == [
        f"[1/2] kd: epoch {row['epoch']} of 3, loss {number(row, 'train_loss')} (soft {number(row, 'soft_loss')}, "
        f"hard {number(row, 'hard_loss')}), training accuracy {number(row, 'train_accuracy')}, "
        f"validation accuracy {number(row, 'val_accuracy')}, 4.0 s, {left} left"
        for row, left in ((first, "00:08"), (second, "00:04"), (third, "00:00"))
    ]


def test_the_log_of_a_baseline_has_one_loss_and_the_time_of_all_runs(loaded, tmp_path, clock, capsys):
    train_run(loaded, tmp_path / "baseline-s0", later=10 * 48)
    first, second = history(tmp_path / "baseline-s0")
    assert capsys.readouterr().err.splitlines() == [
        f"baseline-s0: epoch {row['epoch']} of 2, loss {number(row, 'train_loss')}, "
        f"training accuracy {number(row, 'train_accuracy')}, 3.0 s, {left} left for all runs"
        for row, left in ((first, "00:33"), (second, "00:30"))
    ]


def test_the_log_of_a_resumed_run_goes_on_where_it_was(loaded, unfinished, clock, capsys):
    """Its time left comes from the speed since it was resumed: here after two of six steps."""
    train_run(loaded, unfinished)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("unfinished: epoch 2 of 2, ") and line.endswith("00:00 left")


def test_the_log_counts_finished_runs(cli, flags, copy):
    shutil.rmtree(copy / "baseline-s0")
    got = cli(*flags, "--output-dir", copy)
    assert [line.split(",")[0] for line in got.err.splitlines()] == [
        f"[2/2] baseline-s0: epoch {epoch} of 2" for epoch in (1, 2)
    ]


def test_a_terminal_gets_a_bar_and_no_log(loaded, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    train_run(loaded, tmp_path / "baseline-s0")
    shown = terminal.getvalue()
    assert "\rbaseline-s0: 100%" in shown and "epoch=2/2" in shown and "training accuracy" not in shown


# torch.compile -------------------------------------------------------------------------------------------------------

HEADERS = Path(sysconfig.get_paths()["include"], "Python.h")


def test_a_network_is_compiled_for_its_own_size_of_batches(monkeypatch):
    """And not, from the second size in a process on, for any size, which would give other last bits."""
    compiler, given = torch.compile, []

    def backend(graph, inputs):
        given.append(inputs)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda network, **rest: compiler(network, backend=backend, **rest))
    for size in (4, 6):
        train.compile_network(models.create("student", 3, seed=0).eval())(torch.zeros(size, 3, 16, 16))
    assert all(isinstance(each, torch.Tensor) for inputs in given for each in inputs)
    images = [len(each) for inputs in given for each in inputs if each.shape[1:] == (3, 16, 16)]
    assert set(images[: len(images) // 2]) == {4} and set(images[len(images) // 2 :]) == {6}


def needs_a_compiler(test):
    missing = shutil.which("g++") is None or not HEADERS.exists()
    return pytest.mark.slow(
        pytest.mark.skipif(missing, reason="torch.compile needs a C++ compiler and Python's headers")(test)
    )


@needs_a_compiler
def test_compiled_gradients_in_bfloat16_are_those_of_the_network():
    """Compiled, the gradient of a maximum is NaN in bfloat16 (pytorch issue 186799): see models.largest."""
    images = torch.randn(16, 3, 16, 16, generator=models.generator("test"))
    networks = [models.create("student", 3, seed=0, width=0.25).train() for _ in range(2)]
    for network, model in zip(networks, (networks[0], train.compile_network(networks[1])), strict=True):
        with Machine(CPU.device, "bf16").autocast():
            logits = model(images)
        torch.nn.functional.cross_entropy(logits.float(), torch.arange(16) % 3).backward()
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)
    for plain, compiled in zip(*(network.parameters() for network in networks), strict=True):
        if plain.requires_grad:
            assert (plain.grad - compiled.grad).norm() < 0.3 * plain.grad.norm()


@needs_a_compiler
def test_a_compiled_step_trains_the_same_student(loaded, whole, tmp_path, stop_at, monkeypatch):
    """Other kernels, other last bits, but the same training; a resumed run has the same bits, and is refused where it
    would not be compiled."""
    compiler, calls = torch.compile, []

    def counting(network, **rest):
        compiled = compiler(network, **rest)
        return lambda images: calls.append(len(images)) or compiled(images)

    monkeypatch.setattr(torch, "compile", counting)
    machine = Machine(CPU.device, "fp32", compiled=True)
    train_run(loaded, tmp_path / "plain")
    assert not calls
    train_run(loaded, tmp_path / "compiled", machine=machine)
    assert calls == [16] * 6
    with pytest.raises(Interrupted):
        train_run(loaded, tmp_path / "resumed", machine=machine, options=Options(stop=stop_at(4)))
    with pytest.raises(Failure, match="compiled True instead of False"):
        train_run(loaded, tmp_path / "resumed")
    train_run(loaded, tmp_path / "resumed", machine=machine)
    assert weights(tmp_path / "resumed") == weights(tmp_path / "compiled")
    plain, compiled = (models.load(tmp_path / name / "model.pt").state_dict() for name in ("plain", "compiled"))
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, atol=0.02, rtol=0.02)
