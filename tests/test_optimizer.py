"""The optimizer against NumPy's singular value decomposition and PyTorch's own SGD."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import models
from runs.graphs import Recorded
from runs.settings import RECIPE
from train import BIASES, CLIPPED, COEFFICIENTS, CONVOLUTIONS, HEAD, ITERATIONS, WARM_UP, Muon, orthogonalize


@pytest.mark.parametrize("shape", [(32, 27), (64, 288), (128, 96), (64, 64)])
def test_orthogonalize_keeps_directions_and_brings_singular_values_near_one(shape):
    """Against NumPy: in the matrix's own singular directions the result is diagonal, with entries near 1."""
    random = np.random.default_rng(0)
    matrix = random.normal(size=shape).astype(np.float32)
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    inside = left.T @ orthogonalize(torch.from_numpy(matrix)).numpy() @ right.T
    large = values > 0.2 * values.max()  # a tiny singular value needs more iterations
    assert large.sum() > 0.7 * len(values)
    assert np.abs(inside - np.diag(np.diag(inside))).max() < 1e-4
    assert np.diag(inside)[large].min() > 0.5 and np.diag(inside).max() < 1.3


def test_orthogonalize_in_bfloat16_is_the_same_up_to_rounding():
    matrix = torch.randn(64, 288, generator=torch.Generator().manual_seed(2))
    low = orthogonalize(matrix.bfloat16())
    assert low.dtype == torch.bfloat16
    error = np.linalg.norm(low.float().numpy() - polynomial(matrix.double().numpy()), 2)
    assert error < 0.05  # of singular values near 1


def test_only_the_orthogonal_step_is_in_bfloat16():
    """Weights and momenta stay float32, and what SGD changes has the same bits."""
    networks = [models.create("student", 3, 0) for _ in range(2)]
    optimizers = [Muon(network, 0.1, 0.01, dtype) for network, dtype in zip(
        networks, (torch.float32, torch.bfloat16), strict=True)]  # fmt: skip
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for network, optimizer in zip(networks, optimizers, strict=True):
        F.cross_entropy(network(images), torch.arange(8) % 3).backward()
        optimizer.step()
        assert {state["momentum_buffer"].dtype for state in optimizer.state.values()} == {torch.float32}
    for full, low in zip(*(network.parameters() for network in networks), strict=True):
        assert low.dtype == torch.float32
        if full.ndim == 4 and full.requires_grad:
            assert not low.equal(full)
            torch.testing.assert_close(low, full, atol=2e-3, rtol=0)
        else:
            assert low.equal(full)


def test_orthogonalize_does_not_depend_on_the_norm_and_accepts_zeros():
    matrix = torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalize(1000 * matrix), orthogonalize(matrix), atol=1e-4, rtol=1e-4)
    assert orthogonalize(torch.zeros(8, 8)).eq(0).all()


def polynomial(matrix):
    """The quintic iteration by hand, on the singular values (float64): it changes nothing else."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(matrix)
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ np.diag(values) @ right


@pytest.mark.parametrize("scale", [0.01, 10])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_step_by_hand(memory_format, scale):
    """Three steps of a student: convolutions against NumPy in float64, all else against torch.optim.SGD, of which the
    biases' gradients, long at scale 10, are clipped by hand."""
    rate, decay = 0.1, 0.01
    network, other = (models.create("student", 3, 0).to(memory_format=memory_format) for _ in range(2))
    muon = Muon(network, rate, decay)
    sgd = torch.optim.SGD(
        [
            {"params": [p for p in other.parameters() if p.ndim == 2], "weight_decay": decay, "lr": HEAD[0] * rate},
            {"params": [p for p in other.parameters() if p.ndim == 1 and p.requires_grad], "lr": BIASES[0] * rate},
        ],
        momentum=0.85, nesterov=True,
    )  # fmt: skip
    expected = {
        n: p.detach().double().numpy() for n, p in network.named_parameters() if p.ndim == 4 and p.requires_grad
    }
    momenta = {name: np.zeros_like(weights) for name, weights in expected.items()}
    draws = torch.Generator().manual_seed(0)
    for _ in range(3):
        images, labels = torch.randn(8, 3, 16, 16, generator=draws), torch.randint(0, 3, (8,), generator=draws)
        for each in (network, other):
            each.zero_grad()
            (scale * F.cross_entropy(each(images), labels)).backward()
        clip_by_hand(other, expected_to_clip=scale == 10)
        for name, parameter in network.named_parameters():
            if name in expected:
                gradient = parameter.grad.double().numpy()
                momenta[name] = 0.6 * momenta[name] + gradient
                step = polynomial((gradient + 0.6 * momenta[name]).reshape(len(gradient), -1))
                weights = expected[name] * np.sqrt(len(gradient)) / np.linalg.norm(expected[name])
                expected[name] = weights - rate * CONVOLUTIONS[0] * step.reshape(weights.shape)
        muon.step()
        sgd.step()
        for (name, parameter), twin in zip(network.named_parameters(), other.parameters(), strict=True):
            if name in expected:
                np.testing.assert_allclose(parameter.detach().numpy(), expected[name], atol=2e-5)
                twin.data.copy_(parameter.data)
            else:
                torch.testing.assert_close(parameter, twin)


def clip_by_hand(network, expected_to_clip):
    gradients = [p.grad for p in network.parameters() if p.ndim == 1 and p.requires_grad]
    norm = np.sqrt(sum((gradient.double().numpy() ** 2).sum() for gradient in gradients))
    assert (norm > CLIPPED) == expected_to_clip
    for gradient in gradients:
        gradient.mul_(min(1.0, CLIPPED / norm))


def test_a_loss_a_hundred_times_as_large_moves_convolutions_and_biases_as_far():
    """But for the head, all that is trained is then the same up to rounding, whatever a loss is multiplied by."""
    networks = [models.create("student", 3, 0) for _ in range(2)]
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for network, scale in zip(networks, (1, 100), strict=True):
        (scale * F.cross_entropy(network(images), torch.arange(8) % 3)).backward()
        Muon(network, 0.1, 0.01).step()
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        if one.ndim != 2:
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_only_the_head_has_weight_decay():
    """Muon sets the norm of convolutions itself; biases and batch norm have no decay."""
    groups = Muon(models.create("teacher", 3, 0), 0.1, 0.01).param_groups
    assert [{p.ndim for p in group["params"]} for group in groups] == [{4}, {2}, {1}]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.01, 0.0]
    trained = [p for p in models.create("teacher", 3, 0).parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)


def test_what_has_no_gradient_keeps_its_bits_and_the_others_move():
    network = models.create("student", 3, 0)
    first, images = network.features[0].bias, torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    optimizer, before = Muon(network, 0.1, 0.01), []
    for is_trained in (True, False):
        before = [p.detach().clone() for p in network.parameters()]
        first.requires_grad_(is_trained)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(images), torch.arange(8) % 3).backward()
        optimizer.step()
        moved = [not p.equal(old) for p, old in zip(network.parameters(), before, strict=True) if p.requires_grad]
        assert all(moved) and first.equal(before[1]) != is_trained
    optimizer.param_groups[2]["params"] = [first]  # a group may have none at all
    optimizer.step()


def test_what_is_recorded_answers_to_the_tensors_of_each_call(monkeypatch):
    """On a stand-in for CUDA's graphs, which computes again, on the same memory, what was recorded. After another
    number of tensors all is recorded anew."""
    calls, recorded = [], Recorded()

    def double(tensors):
        calls.append(len(tensors))
        return [2 * tensor for tensor in tensors]

    class Graph:
        def replay(self):
            for result, tensor in zip(recorded.results, recorded.given, strict=True):
                result.copy_(2 * tensor)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    draws = torch.Generator().manual_seed(0)
    for count in (2, 2, 2, 2, 1, 1, 1, 2, 2):
        tensors = [torch.randn(3, 4, generator=draws) for _ in range(count)]
        for result, tensor in zip(recorded(double, tensors), tensors, strict=True):
            assert result.equal(tensor + tensor)
    assert calls == [2, 2, 1, 1, 2, 2]  # each time once as it is, and once to be recorded


def test_other_constants_are_another_recipe():
    """What was trained by other ones is told apart by RECIPE alone: raise it with any of them."""
    now = RECIPE, CONVOLUTIONS, HEAD, BIASES, CLIPPED, COEFFICIENTS, ITERATIONS, WARM_UP
    assert now == (5, (0.3, 0.6), (1.0, 0.85), (30.0, 0.85), 0.1, (3.4445, -4.7750, 2.0315), 3, 0.05)
