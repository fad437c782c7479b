"""Runs and their folders: reused, continued, refused; the same bits whatever happens in between."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

import data
import files
import models
import train
from data import Views
from distill import SoftTargets, rounded
from files import Failure, Interrupted, Stop, load_checkpoint, run_name


@pytest.fixture(scope="module")
def loaded(pictures):
    return data.folder(pictures, 16)


def settings(loaded, role="baseline", **other):
    defaults = {"epochs": 2, "batch_size": 16, "learning_rate": 0.05, "weight_decay": 5e-4, "seed": 0, "image_size": 16}
    return train.Settings(role=role, data=loaded.digest, **(defaults | other))


def trainer(loaded, **other):
    return train.Trainer(loaded, torch.device("cpu"), **other)


def weights(folder):
    return models.digest(models.read(folder / "model.pt")["state_dict"])


def history(folder):
    with open(folder / "history.csv") as file:
        return list(csv.DictReader(file))


def test_the_schedule_by_hand():
    """Ten steps: two of warm-up, then a linear decay over the other eight."""
    shares = [train.schedule(step, 10) for step in range(10)]
    np.testing.assert_allclose(shares, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert train.schedule(0, 1) == 1
    assert all(0 < train.schedule(step, steps) <= 1 for steps in range(1, 40) for step in range(steps))


def test_the_default_learning_rate_follows_the_batch_size():
    rates = [train.default_learning_rate(size) for size in (32, 128, 512, 2048)]
    np.testing.assert_allclose(rates, [0.1, 0.2, 0.4, 0.8])


def test_run_names_are_those_of_the_readme():
    for role, temperature, alpha, seed, name in (
        ("teacher", None, None, 0, "teacher-s0"),
        ("kd", 4.0, 0.1, 2, "kd-T4-a0.1-s2"),
        ("kd", 2.5, 1.0, 0, "kd-T2.5-a1-s0"),
        ("baseline", None, None, 1, "baseline-s1"),
    ):
        assert run_name({"role": role, "temperature": temperature, "alpha": alpha, "seed": seed}) == name


def test_what_a_finished_run_holds(loaded, tmp_path):
    accuracy = trainer(loaded).train(tmp_path / "run", settings(loaded))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "history.csv",
        "model.pt",
        "run.json",
        "test_logits.npy",
    ]
    logits = np.load(tmp_path / "run" / "test_logits.npy", allow_pickle=False)
    assert logits.shape == (24, 3) and logits.dtype == np.float32
    assert accuracy == (logits.argmax(1) == loaded.test_labels.numpy()).mean()
    content = models.read(tmp_path / "run" / "model.pt")
    assert content["accuracy"] == accuracy and content["settings"]["epochs"] == 2
    network = models.load(tmp_path / "run" / "model.pt")
    with torch.inference_mode():
        again = network(network.normalise(loaded.test_pictures))
    np.testing.assert_allclose(again.numpy(), logits, atol=1e-4)
    rows = history(tmp_path / "run")
    assert list(rows[0]) == list(train.HISTORY) and [row["epoch"] for row in rows] == ["1", "2"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"] is True


def test_a_finished_run_is_reused_and_other_settings_are_refused(loaded, tmp_path):
    first = trainer(loaded).train(tmp_path, settings(loaded))
    before = (tmp_path / "model.pt").stat().st_mtime_ns
    assert trainer(loaded).train(tmp_path, settings(loaded)) == first
    assert (tmp_path / "model.pt").stat().st_mtime_ns == before
    with pytest.raises(Failure, match=r"epochs 2 instead of 3, learning rate 0.05 instead of 0.1.*\n.*--overwrite"):
        trainer(loaded).train(tmp_path, settings(loaded, epochs=3, learning_rate=0.1))
    train.reset(tmp_path)
    trainer(loaded).train(tmp_path, settings(loaded, epochs=3))
    assert len(history(tmp_path)) == 3


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(n) is a Stop at which a SIGTERM arrives while the n-th step is being taken."""
    original = data.Views.batch

    def prepare(step):
        stop, steps = Stop(), []

        def batch(self, rows):
            steps.append(rows)
            if len(steps) == step:
                stop.handle(15)
            return original(self, rows)

        monkeypatch.setattr(data.Views, "batch", batch)
        return stop

    return prepare


@pytest.mark.parametrize("step", range(1, 7))
def test_interrupted_anywhere_the_bits_are_the_same(loaded, tmp_path, stop_at, step):
    """The state is kept after any step, within an epoch too, and continuing ends with the bits of a run in one go."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(loaded).train(whole, settings(loaded))
    with pytest.raises(Interrupted, match="its state after epoch .* is kept"):
        trainer(loaded, stop=stop_at(step)).train(parts, settings(loaded))
    state = load_checkpoint(parts / "state.pt")
    assert (state["epoch"], state["step"]) != (0, 0)
    assert not (parts / "model.pt").exists()
    trainer(loaded).train(parts, settings(loaded))
    assert weights(parts) == weights(whole)
    for name in ("test_logits.npy", "model.pt"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    timing = {"seconds", "teacher_seconds", "images_per_second"}
    for one, other in zip(history(parts), history(whole), strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}


def test_a_damaged_state_falls_back_to_the_one_before(loaded, tmp_path, capsys, stop_at):
    trainer(loaded).train(tmp_path / "whole", settings(loaded, epochs=3))
    with pytest.raises(Interrupted):
        trainer(loaded, stop=stop_at(7)).train(tmp_path / "run", settings(loaded, epochs=3))
    newest = tmp_path / "run" / "state.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 16
    newest.write_bytes(content)
    trainer(loaded).train(tmp_path / "run", settings(loaded, epochs=3))
    assert "state.pt is damaged" in (said := capsys.readouterr().err) and "state-before.pt" in said
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_no_whole_state_is_a_failure_that_loses_nothing(loaded, tmp_path, stop_at):
    with pytest.raises(Interrupted):
        trainer(loaded, stop=stop_at(1)).train(tmp_path, settings(loaded))
    for name in ("state.pt", "state-before.pt"):
        (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(Failure, match=f"Remove {tmp_path} to train it anew"):
        trainer(loaded).train(tmp_path, settings(loaded))
    assert (tmp_path / "state.pt").read_bytes() == b"nonsense"


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_every_picture_meets_the_soft_targets_of_its_own_view(loaded, tmp_path, monkeypatch, fraction):
    """In every step of every epoch the loss sees the teacher's logits of the very pictures that the student saw."""
    teacher = models.create("teacher", len(loaded.classes), 7).eval()
    seen, met = [], []
    batch, loss = Views.batch, train.distillation_loss

    def watched(views, indices):
        seen.append(batch(views, indices))
        return seen[-1]

    def compared(logits, labels, teacher_logits, temperature, alpha):
        met.append((seen[-1], teacher_logits))
        return loss(logits, labels, teacher_logits, temperature, alpha)

    monkeypatch.setattr(Views, "batch", watched)
    monkeypatch.setattr(train, "distillation_loss", compared)
    trained = trainer(loaded)
    targets = SoftTargets(teacher, "a", loaded.digest, trained.views(), None, "fp32")
    wanted = settings(loaded, "kd", temperature=4.0, alpha=0.9, teacher="a", val_fraction=fraction)
    trained.train(tmp_path / "run", wanted, targets)
    monkeypatch.undo()
    assert len(met) > wanted.epochs > 1
    for pictures, teacher_logits in met:
        with torch.no_grad():
            torch.testing.assert_close(teacher_logits, rounded(teacher(pictures)), rtol=2e-3, atol=2e-3)


def test_a_run_begun_on_another_device_or_precision_is_not_continued(loaded, tmp_path, stop_at):
    with pytest.raises(Interrupted):
        trainer(loaded, stop=stop_at(1)).train(tmp_path, settings(loaded))
    with pytest.raises(Failure, match="precision fp32 instead of bf16"):
        trainer(loaded, precision="bf16").train(tmp_path, settings(loaded))


def test_divergence_stops_with_the_step_and_keeps_the_last_good_state(loaded, tmp_path):
    with pytest.raises(Failure, match=r"step 2 of 3 of epoch 1 of 2.*\n.*--lr"):
        trainer(loaded).train(tmp_path, settings(loaded, learning_rate=1e30))
    assert not (tmp_path / "model.pt").exists()
    state = load_checkpoint(tmp_path / "state.pt")
    assert models.is_finite(state["network"])


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 48), (20, 2), (48, 1), (128, 1)])
def test_any_batch_size(loaded, tmp_path, monkeypatch, batch_size, steps):
    """An incomplete last batch is dropped where a full one exists; a batch beyond the data is all of it."""
    sizes = []
    original = data.Views.batch
    monkeypatch.setattr(data.Views, "batch", lambda self, rows: sizes.append(len(rows)) or original(self, rows))
    trainer(loaded).train(tmp_path, settings(loaded, batch_size=batch_size, epochs=1))
    assert sizes == [min(batch_size, 48)] * steps


def test_the_validation_part_is_never_trained_on_and_the_test_set_never_read(loaded, tmp_path, monkeypatch):
    seen = set()
    original = data.Views.batch
    monkeypatch.setattr(data.Views, "batch", lambda self, rows: seen.update(rows.tolist()) or original(self, rows))
    _, validation = data.split(loaded.train_labels, 0.25)
    blind = data.replace(loaded, test_pictures=None, test_labels=None)
    accuracy = trainer(blind).train(tmp_path, settings(loaded, val_fraction=0.25, epochs=4))
    assert not seen & set(validation.tolist()) and len(seen) > 30
    assert not (tmp_path / "test_logits.npy").exists()
    assert float(history(tmp_path)[-1]["val_accuracy"]) == accuracy
    network = models.load(tmp_path / "model.pt")
    with torch.inference_mode():
        logits = network(network.normalise(loaded.train_pictures[validation]))
    assert (logits.argmax(1) == loaded.train_labels[validation]).float().mean().item() == pytest.approx(accuracy)


def test_a_state_of_another_run_is_not_taken(loaded, tmp_path, stop_at):
    with pytest.raises(Interrupted):
        trainer(loaded, stop=stop_at(4)).train(tmp_path / "a", settings(loaded, seed=1))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(Failure, match="seed 1 instead of 2"):
        trainer(loaded).train(tmp_path / "b", settings(loaded, seed=2))


def tampered(entries):
    """The state of an interrupted run with some entries changed."""

    def change(folder):
        for name in ("state.pt", "state-before.pt"):
            state = torch.load(folder / name, weights_only=True)
            files.save_checkpoint(folder / name, state | entries)

    return change


@pytest.mark.parametrize(
    "entries",
    [
        {"format": 99}, {"settings": None}, {"optimiser": None}, {"epoch": "3"}, {"epoch": 7}, {"epoch": -1},
        {"step": 10**9}, {"history": [1, 2]}, {"history": [{}]}, {"threads": 0}, {"threads": 10**9}, {"torch": None},
        {"device": None}, {"loss_sum": 0.5}, {"network": {}}, {"seconds": "long"},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_that_cannot_be_is_named(loaded, tmp_path, stop_at, entries):
    with pytest.raises(Interrupted):
        trainer(loaded, stop=stop_at(4)).train(tmp_path, settings(loaded))
    tampered(entries)(tmp_path)
    with pytest.raises(Failure, match="state") as failure:
        trainer(loaded).train(tmp_path, settings(loaded))
    assert "to train it anew" in str(failure.value)


def test_the_state_that_is_whole_is_never_replaced_by_the_damaged_one(loaded, tmp_path, stop_at):
    with pytest.raises(Interrupted):
        trainer(loaded, stop=stop_at(4)).train(tmp_path, settings(loaded))
    whole = (tmp_path / "state-before.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(b"cut short")
    with pytest.raises(Interrupted):
        trainer(loaded, stop=stop_at(1)).train(tmp_path, settings(loaded))
    assert (tmp_path / "state-before.pt").read_bytes() == whole


def test_a_signal_while_a_state_is_read_is_no_damage(loaded, tmp_path, stop_at, monkeypatch, capsys):
    with pytest.raises(Interrupted):
        trainer(loaded, stop=stop_at(4)).train(tmp_path, settings(loaded))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: Stop().handle(15))
        with pytest.raises(Interrupted):
            trainer(loaded).train(tmp_path, settings(loaded))
    assert "damaged" not in capsys.readouterr().err and (tmp_path / "state.pt").exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_trains_the_same_student(loaded, tmp_path, stop_at, monkeypatch):
    """Other kernels, other last bits, but the same training; continued to the same bits, and not the other way."""
    compiler, calls = torch.compile, []

    def counting(network, **rest):
        compiled = compiler(network, **rest)
        return lambda pictures: calls.append(len(pictures)) or compiled(pictures)

    monkeypatch.setattr(torch, "compile", counting)
    trainer(loaded).train(tmp_path / "plain", settings(loaded))
    assert not calls
    trainer(loaded, compiled=True).train(tmp_path / "compiled", settings(loaded))
    assert calls == [16] * 6
    with pytest.raises(Interrupted):
        trainer(loaded, compiled=True, stop=stop_at(4)).train(tmp_path / "continued", settings(loaded))
    with pytest.raises(Failure, match="compiled True instead of False"):
        trainer(loaded).train(tmp_path / "continued", settings(loaded))
    trainer(loaded, compiled=True).train(tmp_path / "continued", settings(loaded))
    assert weights(tmp_path / "continued") == weights(tmp_path / "compiled") != weights(tmp_path / "plain")
    plain, compiled = (models.read(tmp_path / name / "model.pt")["state_dict"] for name in ("plain", "compiled"))
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, atol=0.02, rtol=0.02)
