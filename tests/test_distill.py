"""The loss against an independent calculation in NumPy, and what soft targets guarantee."""

import math
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import distill
from data import Views
from distill import Ensemble, SoftTargets, compress, distillation_loss
from models import create
from runs.code import CODE
from runs.machine import Machine

CPU = torch.device("cpu")


def softmax_by_hand(logits, temperature):
    powers = [math.exp((value - max(logits)) / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def loss_by_hand(student, labels, teacher, temperature, alpha, smoothing=0.0):
    """The formula of the README, image by image and class by class, in float64; labels are smoothed by the definition:
    the right class has the probability 1 - smoothing + smoothing / classes, each other smoothing / classes."""
    total = 0.0
    for s, label, t in zip(student, labels, teacher, strict=True):
        p, q = softmax_by_hand(t, temperature), softmax_by_hand(s, temperature)
        soft = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        right = [(1 - smoothing) * (number == label) + smoothing / len(s) for number in range(len(s))]
        hard = -sum(a * math.log(b) for a, b in zip(right, softmax_by_hand(s, 1), strict=True))
        total += alpha * temperature**2 * soft + (1 - alpha) * hard
    return total / len(student)


@pytest.fixture
def batch():
    random = np.random.default_rng(0)
    return random.normal(0, 3, (6, 5)), random.integers(0, 5, 6), random.normal(0, 3, (6, 5))


def as_tensors(student, labels, teacher, dtype=torch.float32):
    return torch.tensor(student, dtype=dtype), torch.tensor(labels), torch.tensor(teacher, dtype=dtype)


def gradient(batch, temperature, alpha):
    """The gradient of the loss with respect to the student's logits."""
    student, labels, teacher = as_tensors(*batch)
    student.requires_grad_()
    distillation_loss(student, labels, teacher, temperature, alpha).backward()
    return student.grad.numpy()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9, 1.0])
def test_the_loss_is_the_papers_formula(batch, temperature, alpha):
    got = distillation_loss(*as_tensors(*batch), temperature, alpha).item()
    assert got == pytest.approx(loss_by_hand(*batch, temperature, alpha), rel=1e-5)
    got = distillation_loss(*as_tensors(*batch), temperature, alpha, label_smoothing=0.2).item()
    assert got == pytest.approx(loss_by_hand(*batch, temperature, alpha, 0.2), rel=1e-5)


def test_an_example_worked_by_hand():
    """Two classes, T = 2: teacher (2 ln 3, 0) softens to (3/4, 1/4), student (0, 0) to (1/2, 1/2)."""
    soft = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    loss = distillation_loss(
        torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[2 * math.log(3), 0.0]]), temperature=2.0, alpha=0.25
    )
    assert loss.item() == pytest.approx(0.25 * soft + 0.75 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.1, 0.9, 1.0])
def test_the_gradient_is_that_of_the_formula(batch, temperature, alpha):
    """alpha T (q - p) + (1 - alpha) (softmax - one-hot label), over the batch size (arXiv 1503.02531, equation 2)."""
    student, labels, teacher = batch
    q, p, hard = (
        np.array([softmax_by_hand(row, t) for row in logits])
        for logits, t in ((student, temperature), (teacher, temperature), (student, 1))
    )
    wanted = alpha * temperature * (q - p) + (1 - alpha) * (hard - np.eye(5)[labels])
    np.testing.assert_allclose(gradient(batch, temperature, alpha), wanted / len(labels), rtol=1e-4, atol=1e-6)


def test_at_high_temperatures_the_gradient_is_the_difference_of_centred_logits(batch):
    """(z_i - mean z - v_i + mean v) / classes (arXiv 1503.02531, equation 4), whatever the temperature."""
    z, v = (each - each.mean(1, keepdims=True) for each in (batch[0], batch[2]))
    for temperature in (500.0, 1000.0):
        np.testing.assert_allclose(gradient(batch, temperature, 1.0), (z - v) / 5 / 6, atol=5e-3)


def test_equal_logits_have_no_soft_loss(batch):
    student, labels, _ = as_tensors(*batch)
    assert distillation_loss(student, labels, student + 7, 4.0, 1.0).item() == pytest.approx(0, abs=1e-6)


def test_alpha_0_is_the_cross_entropy_and_needs_no_teacher(batch):
    student, labels, _ = as_tensors(*batch)
    assert torch.equal(
        distillation_loss(student, labels, None, 4.0, 0), torch.nn.functional.cross_entropy(student, labels)
    )


def test_alpha_1_does_not_use_the_labels(batch):
    student, labels, teacher = as_tensors(*batch)
    one, other = (distillation_loss(student, each, teacher, 4.0, 1.0) for each in (labels, (labels + 1) % 5))
    assert torch.equal(one, other)


def test_huge_logits_do_not_overflow():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = distillation_loss(student, torch.tensor([1]), torch.tensor([[-1e4, 1e4, 0.0]]), 1.0, 0.5)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    assert loss.item() == pytest.approx(0.5 * 2e4 + 0.5 * 2e4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(batch, dtype):
    student, labels, teacher = as_tensors(*batch, dtype=dtype)
    got = distillation_loss(student, labels, teacher, 4.0, 0.5)
    assert got.dtype == torch.float32
    rounded = student.double().numpy(), batch[1], teacher.double().numpy()
    assert got.item() == pytest.approx(loss_by_hand(*rounded, 4.0, 0.5), rel=1e-5)


def test_no_gradient_flows_to_the_teacher(batch):
    student, labels, teacher = as_tensors(*batch)
    student.requires_grad_(), teacher.requires_grad_()
    distillation_loss(student, labels, teacher, 4.0, 0.5).backward()
    assert teacher.grad is None and student.grad is not None


# Soft targets --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher():
    return create("teacher", 4, 0).eval()


@pytest.fixture
def views():
    images = torch.randint(0, 256, (30, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Views(images, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture
def make(teacher, views, tmp_path):
    """Makes SoftTargets of `teacher` and `views`, kept in tmp_path, some of their arguments changed."""

    def soft_targets(**changed):
        arguments = {
            "teacher": teacher, "teacher_digest": "a", "data_digest": "d", "views": views, "folder": tmp_path,
            "machine": Machine(CPU),
        }  # fmt: skip
        return SoftTargets(**(arguments | changed))

    return soft_targets


def test_targets_are_the_teachers_logits_of_the_same_views(make, teacher, views):
    kept = make().epoch(3)
    with torch.inference_mode():
        logits = teacher(views.batch(3, torch.arange(30)))
    torch.testing.assert_close(kept.float().softmax(1), logits.softmax(1), atol=2e-3, rtol=0)
    assert kept.dtype == torch.float16 and kept.amax(1).eq(0).all()


def test_every_epoch_has_targets_of_its_own(make):
    targets = make()
    assert not torch.equal(targets.epoch(0), targets.epoch(1))


def test_the_size_told_is_the_size_returned(make):
    targets = make()
    assert targets.bytes_per_epoch == targets.epoch(0).nbytes


def test_kept_targets_are_the_same_bits_and_ask_no_teacher(make, tmp_path):
    fresh, calls = make().epoch(0), []
    other = create("teacher", 4, 1).eval()  # would answer otherwise
    other.register_forward_hook(lambda *_: calls.append("asked"))
    again = make(teacher=other)
    assert torch.equal(again.epoch(0), fresh) and not calls
    assert not torch.equal(again.epoch(1), make(folder=tmp_path / "other").epoch(1)) and calls  # of which none was kept


def test_on_a_full_disk_targets_are_the_same_bits_and_not_kept(make, tmp_path, monkeypatch, capsys):
    fresh = make().epoch(0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000_000))
    full = make(folder=tmp_path / "elsewhere")
    assert torch.equal(full.epoch(0), fresh) and torch.equal(full.epoch(0), fresh)
    assert not (tmp_path / "elsewhere").exists()
    told = capsys.readouterr().err
    assert told.count("The soft targets are not kept: ") == 1 and "has 100 MB left" in told  # said once


def test_on_a_full_disk_each_process_of_a_group_computes_the_targets_that_it_needs(make, tmp_path, monkeypatch, capsys):
    fresh = make().epoch(0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000_000))
    group = Mock(agree=lambda find: find())
    alone = make(folder=tmp_path / "elsewhere", shared=True)
    Ensemble([alone]).share(group, range(2))
    assert torch.equal(alone.epoch(0), fresh) and not group.share.called and not (tmp_path / "elsewhere").exists()
    assert capsys.readouterr().err.count("The soft targets are not kept: ") == 1


def test_a_folder_that_cannot_be_made_is_said_once(make, tmp_path, capsys):
    fresh = make().epoch(0)
    (tmp_path / "file").touch()
    blocked = make(folder=tmp_path / "file")
    assert torch.equal(blocked.epoch(0), fresh) and torch.equal(blocked.epoch(0), fresh)
    assert capsys.readouterr().err.count("The soft targets are not kept: ") == 1


def test_targets_beyond_float16_stay_finite():
    kept = compress(torch.tensor([[1e6, 1e6 - 3.0, -1e6]]))
    assert kept.tolist() == [[0.0, -3.0, -65504.0]]


def test_another_teacher_or_data_set_has_another_folder(make):
    folders = {make(**changed).folder for changed in ({}, {"teacher_digest": "b"}, {"data_digest": "e"})}
    assert len(folders) == 3


def test_other_views_have_another_folder(make, views):
    images = torch.zeros(30, 16, 16, 3, dtype=torch.uint8)
    other = [
        Views(images, views.mean, views.std, stream="teacher views"),
        Views(images, views.mean, views.std, padding=views.padding + 1),
        Views(images, views.mean, views.std, cutout=4),
        Views(images, views.mean, (0.2, 0.25, 0.25)),
        Views(images, (0.4, 0.5, 0.5), views.std),
        Views(torch.zeros(30, 24, 24, 3, dtype=torch.uint8), views.mean, views.std),
    ]
    assert len({make(views=each).folder for each in (views, *other)}) == 7


def test_other_code_has_another_folder(make, monkeypatch):
    """Of views, networks and compression; not of the loss, which is changed most often."""
    before = make().folder
    for name, is_new in (("data.py", True), ("models.py", True), ("distill.py", False), ("train.py", False)):
        with monkeypatch.context() as patch:
            patch.setitem(CODE, name, "0" * 12)
            assert (make().folder != before) == is_new
    monkeypatch.setattr(distill, "compress", lambda logits: logits.half())
    assert make().folder != before


def test_another_device_precision_or_version_has_another_folder(make, monkeypatch):
    folders = [make().folder, make(machine=Machine(CPU, "bf16")).folder]
    with monkeypatch.context() as patch:
        patch.setattr(distill, "describe", lambda device: "another processor")
        folders.append(make().folder)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0")
        folders.append(make().folder)
    assert len(set(folders)) == 4 and make().folder == folders[0]


@pytest.mark.parametrize("harm", ["a flipped bit", "cut short", "targets of another folder"])
def test_damaged_targets_are_noticed_and_computed_again(make, capsys, harm):
    targets = make()
    fresh = targets.epoch(0)
    path = targets.folder / "epoch-0001.npz"
    content = bytearray(path.read_bytes())
    if harm == "a flipped bit":
        content[len(content) // 2] ^= 1
    elif harm == "cut short":
        del content[-100:]
    else:
        other = make(teacher=create("teacher", 4, 1).eval(), teacher_digest="b")
        other.epoch(0)
        content = (other.folder / path.name).read_bytes()
    path.write_bytes(content)
    assert torch.equal(targets.epoch(0), fresh)
    told = capsys.readouterr().err
    assert f"{path} is damaged" in told and "computed again" in told
    assert torch.equal(make().epoch(0), fresh) and not capsys.readouterr().err
