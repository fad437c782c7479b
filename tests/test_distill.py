"""The loss against an independent calculation in NumPy, and the soft targets' promises."""

import math

import numpy as np
import pytest
import torch

import distill
from data import Views
from distill import SoftTargets, distillation_loss, rounded
from models import create


def numpy_loss(student, labels, teacher, temperature, alpha):
    """The formula of the README, picture by picture and class by class, in float64."""
    total = 0.0
    for s, label, t in zip(student, labels, teacher, strict=True):
        p = [math.exp(v / temperature - max(t) / temperature) for v in t]
        q = [math.exp(v / temperature - max(s) / temperature) for v in s]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        soft = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        hard = -math.log(math.exp(s[label] - max(s)) / sum(math.exp(v - max(s)) for v in s))
        total += alpha * temperature**2 * soft + (1 - alpha) * hard
    return total / len(student)


@pytest.fixture
def batch():
    random = np.random.default_rng(0)
    return random.normal(0, 3, (6, 5)), random.integers(0, 5, 6), random.normal(0, 3, (6, 5))


def as_tensors(student, labels, teacher, dtype=torch.float32):
    return torch.tensor(student, dtype=dtype), torch.tensor(labels), torch.tensor(teacher, dtype=dtype)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9, 1.0])
def test_is_the_papers_formula(batch, temperature, alpha):
    got = distillation_loss(*as_tensors(*batch), temperature, alpha).item()
    assert got == pytest.approx(numpy_loss(*batch, temperature, alpha), rel=1e-5)


def test_worked_by_hand():
    """Two classes, T = 2: teacher (2 ln 3, 0) softens to (3/4, 1/4), student (0, 0) to (1/2, 1/2)."""
    soft = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    loss = distillation_loss(
        torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[2 * math.log(3), 0.0]]), temperature=2.0, alpha=0.25
    )
    assert loss.item() == pytest.approx(0.25 * soft + 0.75 * math.log(2), rel=1e-6)


def test_equal_logits_have_no_soft_loss(batch):
    student, labels, _ = as_tensors(*batch)
    assert distillation_loss(student, labels, student + 7, 4.0, 1.0).item() == pytest.approx(0, abs=1e-6)


def test_alpha_0_is_the_cross_entropy_and_asks_no_teacher(batch):
    student, labels, _ = as_tensors(*batch)
    assert torch.equal(
        distillation_loss(student, labels, None, 4.0, 0), torch.nn.functional.cross_entropy(student, labels)
    )


def test_alpha_1_does_not_look_at_the_labels(batch):
    student, labels, teacher = as_tensors(*batch)
    one, other = (distillation_loss(student, each, teacher, 4.0, 1.0) for each in (labels, (labels + 1) % 5))
    assert torch.equal(one, other)


def test_T_squared_keeps_gradients_at_one_size(batch):
    def gradient(temperature):
        student, labels, teacher = as_tensors(*batch)
        student.requires_grad_()
        distillation_loss(student, labels, teacher, temperature, 1.0).backward()
        return student.grad.norm().item()

    assert gradient(200.0) == pytest.approx(gradient(20.0), rel=0.1)
    # At high temperatures the gradient is (z_i - mean z - v_i + mean v) / classes (arXiv 1503.02531, equation 4).
    student, labels, teacher = as_tensors(*batch, dtype=torch.float64)
    student.requires_grad_()
    distillation_loss(student, labels, teacher, 1000.0, 1.0).backward()
    z, v = (each - each.mean(1, keepdims=True) for each in (batch[0], batch[2]))
    np.testing.assert_allclose(student.grad.numpy(), (z - v) / 5 / 6, atol=5e-3)


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
    inexact = student.double().numpy(), batch[1], teacher.double().numpy()
    assert got.item() == pytest.approx(numpy_loss(*inexact, 4.0, 0.5), rel=1e-5)


def test_no_gradient_flows_to_the_teacher(batch):
    student, labels, teacher = as_tensors(*batch)
    student.requires_grad_(), teacher.requires_grad_()
    distillation_loss(student, labels, teacher, 4.0, 0.5).backward()
    assert teacher.grad is None and student.grad is not None


# Soft targets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def views():
    pictures = torch.randint(0, 256, (30, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Views(pictures, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def soft_targets(views, folder, digest="a"):
    return SoftTargets(create("teacher", 4, 0).eval(), digest, "d", views, folder, "fp32")


def test_targets_are_the_teachers_logits_of_the_very_views(views, tmp_path):
    targets = soft_targets(views, tmp_path)
    kept = targets.epoch(3)
    views.start(3)
    with torch.inference_mode():
        logits = targets.teacher(views.batch(torch.arange(30)))
    torch.testing.assert_close(kept.float().softmax(1), logits.softmax(1), atol=2e-3, rtol=0)
    assert kept.dtype == torch.float16 and kept.amax(1).eq(0).all()


def test_fresh_kept_and_recomputed_targets_are_the_same_bits(views, tmp_path, monkeypatch):
    fresh = soft_targets(views, tmp_path).epoch(0)
    kept = soft_targets(views, tmp_path)
    monkeypatch.setattr(kept, "_ask", lambda *_: pytest.fail("the teacher was asked twice about a view"))
    assert torch.equal(kept.epoch(0), fresh)
    monkeypatch.setattr(distill, "SPARE_DISK", 1 << 60)  # a disk that is too full
    full = soft_targets(views, tmp_path / "elsewhere")
    assert torch.equal(full.epoch(0), fresh)
    assert not (tmp_path / "elsewhere").exists()


def test_targets_beyond_float16_stay_finite():
    kept = rounded(torch.tensor([[1e6, 1e6 - 3.0, -1e6]]))
    assert kept.tolist() == [[0.0, -3.0, -65504.0]]


def test_another_teacher_never_meets_kept_targets(views, tmp_path):
    assert soft_targets(views, tmp_path, "a").folder != soft_targets(views, tmp_path, "b").folder


def test_other_views_never_meet_kept_targets(views, tmp_path):
    pictures = torch.zeros(30, 16, 16, 3, dtype=torch.uint8)
    other = [
        Views(pictures, views.mean, views.std, purpose="teacher views"),
        Views(pictures, views.mean, views.std, padding=views.padding + 1),
        Views(pictures, views.mean, (0.2, 0.25, 0.25)),
        Views(torch.zeros(30, 24, 24, 3, dtype=torch.uint8), views.mean, views.std),
    ]
    folders = {soft_targets(each, tmp_path).folder for each in (views, *other)}
    assert len(folders) == 5


def test_targets_of_another_device_precision_or_version_are_never_met(views, tmp_path, monkeypatch):
    folders = [soft_targets(views, tmp_path).folder]
    with monkeypatch.context() as patch:
        patch.setattr(distill, "describe", lambda device: "an abacus")
        folders.append(soft_targets(views, tmp_path).folder)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0")
        folders.append(soft_targets(views, tmp_path).folder)
    folders.append(SoftTargets(create("teacher", 4, 0).eval(), "a", "d", views, tmp_path, "bf16").folder)
    assert len(set(folders)) == 4 and soft_targets(views, tmp_path).folder == folders[0]


def test_damaged_targets_are_noticed_and_computed_again(views, tmp_path, capsys):
    targets = soft_targets(views, tmp_path)
    fresh = targets.epoch(0)
    path = targets.folder / "epoch-0001.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torch.equal(targets.epoch(0), fresh)
    assert "damaged" in capsys.readouterr().err
    assert torch.equal(soft_targets(views, tmp_path).epoch(0), fresh)
