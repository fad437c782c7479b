"""Runs and their folders: reused, continued, refused; the same bits whatever happens in between."""

import csv
import json
import shutil
import sysconfig
from pathlib import Path

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


def test_a_finished_run_without_its_record_says_what_to_do(loaded, tmp_path):
    trainer(loaded).train(tmp_path, settings(loaded))
    (tmp_path / "run.json").unlink()
    with pytest.raises(Failure, match=f"run.json is not there or .*\n.*remove {tmp_path} to train it anew"):
        trainer(loaded).train(tmp_path, settings(loaded))


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


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory):
    """The folder of a run that nothing interrupted; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    trainer(loaded).train(folder, settings(loaded))
    return folder


@pytest.mark.parametrize("step", range(1, 7))
def test_interrupted_anywhere_the_bits_are_the_same(loaded, whole, tmp_path, stop_at, step):
    """The state is kept after any step, within an epoch too, and continuing ends with the bits of a run in one go."""
    parts = tmp_path / "parts"
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
def test_every_picture_meets_its_own_label_and_soft_targets(loaded, tmp_path, monkeypatch, fraction):
    """In every step of every epoch the loss sees the labels of the very pictures that the student saw, the teacher's
    logits of these views, and the run's temperature and alpha; history.csv has the means of what it was."""
    teacher = models.create("teacher", len(loaded.classes), 7).eval()
    seen, met, losses, right = [], [], [], []
    batch, loss = Views.batch, train.distillation_loss

    def watched(views, indices):
        seen.append((indices, batch(views, indices)))
        return seen[-1][1]

    def compared(logits, labels, teacher_logits, temperature, alpha):
        indices, pictures = seen[-1]
        assert (temperature, alpha) == (3.0, 0.7) and labels.tolist() == loaded.train_labels[indices].tolist()
        met.append((pictures, teacher_logits))
        value = loss(logits, labels, teacher_logits, temperature, alpha)
        losses.append(value.item())
        right.append((logits.argmax(1) == labels).float().mean().item())
        return value

    monkeypatch.setattr(Views, "batch", watched)
    monkeypatch.setattr(train, "distillation_loss", compared)
    trained = trainer(loaded)
    targets = SoftTargets(teacher, "a", loaded.digest, trained.views(), None, "fp32")
    wanted = settings(loaded, "kd", temperature=3.0, alpha=0.7, teacher="a", val_fraction=fraction)
    trained.train(tmp_path / "run", wanted, targets)
    monkeypatch.undo()
    steps = len(met) // wanted.epochs
    assert steps > 1 and wanted.epochs > 1
    for epoch, row in enumerate(history(tmp_path / "run")):
        of_epoch = slice(epoch * steps, (epoch + 1) * steps)
        assert float(row["train_loss"]) == pytest.approx(np.mean(losses[of_epoch]), rel=1e-5)
        assert float(row["train_accuracy"]) == pytest.approx(np.mean(right[of_epoch]), rel=1e-5)
    for pictures, teacher_logits in met:
        with torch.no_grad():
            torch.testing.assert_close(teacher_logits, rounded(teacher(pictures)), rtol=2e-3, atol=2e-3)


def test_every_seed_and_epoch_has_an_order_of_its_own(loaded, tmp_path, monkeypatch):
    """And students share their views, which a teacher does not; every step follows the schedule."""
    orders, purposes, rates = [], set(), []
    batch, start, step = Views.batch, Views.start, train.Muon.step
    monkeypatch.setattr(Views, "start", lambda views, epoch: orders.append([]) or start(views, epoch))
    monkeypatch.setattr(Views, "batch", lambda views, rows: orders[-1].extend(rows.tolist()) or batch(views, rows))
    monkeypatch.setattr(
        train.Muon, "step", lambda self: rates.append([g["lr"] for g in self.param_groups]) or step(self)
    )
    for seed in (0, 1):
        trainer(loaded).train(tmp_path / str(seed), settings(loaded, seed=seed))
    assert len(orders) == len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(48)) for order in orders) and list(range(48)) not in orders
    by_hand = 0.05 * np.array([1 / 1.2, 1, 4 / 4.8, 3 / 4.8, 2 / 4.8, 1 / 4.8])  # six steps, 1.2 of them warm-up
    np.testing.assert_allclose(rates, np.repeat(np.tile(by_hand, 2)[:, None], 3, 1))

    monkeypatch.setattr(Views, "batch", lambda views, rows: purposes.add(views.purpose) or batch(views, rows))
    trainer(loaded).train(tmp_path / "student", settings(loaded, epochs=1))
    assert purposes == {"views"}
    trainer(loaded).train(tmp_path / "teacher", settings(loaded, "teacher", epochs=1))
    assert purposes == {"views", "teacher views"}


def test_a_student_learns(tmp_path):
    """Two epochs of drawn shapes: 0.376 measured, and guessing gives an eighth."""
    shapes = data.shapes(16)
    assert trainer(shapes).train(tmp_path, settings(shapes, batch_size=32, learning_rate=0.1)) > 0.25


def test_judging_on_validation_does_not_change_the_training(loaded, tmp_path, monkeypatch):
    trainer(loaded).train(tmp_path / "judged", settings(loaded, val_fraction=0.25))
    monkeypatch.setattr(train._Run, "_validation_accuracy", lambda run: 0.5)
    trainer(loaded).train(tmp_path / "not", settings(loaded, val_fraction=0.25))
    assert weights(tmp_path / "judged") == weights(tmp_path / "not")


@pytest.mark.parametrize(("seconds", "kept"), [(0.0, 1 + 2 * 3), (1e6, 1 + 2)])
def test_state_is_kept_within_epochs_as_often_as_asked(loaded, tmp_path, monkeypatch, seconds, kept):
    """Before the first step, after every epoch, and within epochs where `save_every` seconds have passed."""
    saved, save = [], train.save_checkpoint
    monkeypatch.setattr(
        train, "save_checkpoint", lambda path, *rest, **more: saved.append(path) or save(path, *rest, **more)
    )
    trainer(loaded, save_every=seconds).train(tmp_path, settings(loaded))
    assert len([path for path in saved if path.name == "state.pt"]) == kept


def test_a_run_begun_on_another_device_or_precision_is_not_continued(loaded, tmp_path, stop_at):
    with pytest.raises(Interrupted):
        trainer(loaded, stop=stop_at(1)).train(tmp_path, settings(loaded))
    other = trainer(loaded, precision="bf16")
    for refuses in (other.look, other.train):  # before any other run is trained, and then
        with pytest.raises(Failure, match=r"precision fp32 instead of bf16\. Continue it there \(--device cpu --pre"):
            refuses(tmp_path, settings(loaded))
    assert not other.fits(tmp_path, settings(loaded)) and trainer(loaded).fits(tmp_path, settings(loaded))
    (tmp_path / "state.pt").rename(tmp_path / "state-before.pt")  # killed between the two renames
    assert not other.fits(tmp_path, settings(loaded))


def test_an_unfinished_run_with_other_settings_is_refused_before_any_other_is_trained(loaded, tmp_path, stop_at):
    with pytest.raises(Interrupted):
        trainer(loaded, stop=stop_at(1)).train(tmp_path, settings(loaded))
    with pytest.raises(Failure, match="epochs 2 instead of 3"):
        trainer(loaded).look(tmp_path, settings(loaded, epochs=3))


def test_a_run_continued_on_another_machine_says_so(loaded, tmp_path, stop_at, monkeypatch, capsys):
    describe, here = train.describe, train.describe(torch.device("cpu"))
    monkeypatch.setattr(train, "describe", lambda device: "Abacus")
    with pytest.raises(Interrupted):
        trainer(loaded, stop=stop_at(1)).train(tmp_path, settings(loaded))
    monkeypatch.setattr(train, "describe", describe)
    trainer(loaded).train(tmp_path, settings(loaded))
    assert f"was begun on Abacus; on {here} last bits may differ" in capsys.readouterr().err
    assert files.read_json(tmp_path / "run.json")["environment"]["device"] == f"Abacus, then {here}"


def test_float32_on_cuda_is_full_float32(loaded):
    """Whatever the environment asks of matrix products (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE)."""
    flags = [(torch.backends.cuda.matmul, "allow_tf32", False), (torch.backends.cudnn, "allow_tf32", False),
             (torch.backends.cudnn, "deterministic", True)]  # fmt: skip
    before = [getattr(backend, name) for backend, name, _ in flags]
    try:
        for backend, name, wanted in flags:
            setattr(backend, name, not wanted)
        train.Trainer(loaded, torch.device("cuda"))
        assert [getattr(backend, name) for backend, name, _ in flags] == [wanted for *_, wanted in flags]
    finally:
        for (backend, name, _), value in zip(flags, before, strict=True):
            setattr(backend, name, value)


def test_divergence_stops_with_the_step_and_keeps_the_last_good_state(loaded, tmp_path):
    with pytest.raises(Failure, match=r"step 2 of 3 of epoch 1 of 2.*\n.*--lr"):
        trainer(loaded).train(tmp_path, settings(loaded, learning_rate=1e30))
    assert not (tmp_path / "model.pt").exists()
    state = load_checkpoint(tmp_path / "state.pt")
    assert models.is_finite(state["network"])


def test_weights_that_are_not_finite_are_never_kept(loaded, tmp_path, monkeypatch):
    """Not even where every loss was: the only step of the epoch spoils them."""
    step = train.Muon.step
    spoil = lambda self: step(self) or self.param_groups[1]["params"][0].data.fill_(float("inf"))  # noqa: E731
    monkeypatch.setattr(train.Muon, "step", spoil)
    with pytest.raises(Failure, match="weights were not finite at step 1 of 1 of epoch 1"):
        trainer(loaded).train(tmp_path, settings(loaded, batch_size=48))
    assert models.is_finite(load_checkpoint(tmp_path / "state.pt")["network"])


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
        {"device": None}, {"loss_sum": 0.5}, {"network": {}}, {"seconds": "long"}, {"machines": []},
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


HEADERS = Path(sysconfig.get_paths()["include"], "Python.h")


@pytest.mark.skipif(
    shutil.which("g++") is None or not HEADERS.exists(),
    reason="torch.compile needs a C++ compiler and Python's headers",
)
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
    assert weights(tmp_path / "continued") == weights(tmp_path / "compiled")
    plain, compiled = (models.read(tmp_path / name / "model.pt")["state_dict"] for name in ("plain", "compiled"))
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, atol=0.02, rtol=0.02)
