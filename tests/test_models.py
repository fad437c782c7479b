"""The networks, their costs, and what model.pt guarantees."""

from pathlib import Path

import numpy as np
import pytest
import torch

import models
from runs.files import Damaged
from runs.machine import Machine, memory_format

CLASSES = ["a", "b", "c"]
SETTINGS = {"epochs": 1, "temperature": 4.0, "teacher": None, "role": "kd"}


def save(path, network, architecture="student", **other):
    content = {
        "classes": CLASSES, "image_size": 16, "mean": [0.5] * 3, "std": [0.2] * 3, "settings": SETTINGS,
        "accuracy": 0.5,
    }  # fmt: skip
    models.save(path, network, architecture, **(content | other))
    return path


@pytest.mark.parametrize("architecture", ["teacher", "student"])
@pytest.mark.parametrize(("classes", "size"), [(2, 16), (10, 32), (37, 47), (100, 97)])
def test_any_number_of_classes_and_any_image_size(architecture, classes, size):
    network = models.create(architecture, classes, 0).train()
    logits = network(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, classes)
    logits.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())


def test_a_residual_branch_is_added_to_its_input():
    """GELU(x + batch norm(convolution of x)), where the convolutions are the identity and batch norm divides by
    sqrt(1 + 1e-5)."""
    stage = models.Stage(4, 4, 1).eval()
    for block in (stage.down, stage.branch[0]):
        torch.nn.init.dirac_(block[0].weight)
    images = torch.rand(2, 4, 6, 6)
    down = torch.nn.functional.gelu(images.reshape(2, 4, 3, 2, 3, 2).amax((3, 5)) / (1 + 1e-5) ** 0.5)
    expected = torch.nn.functional.gelu(down + down / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(stage(images), expected)


@pytest.mark.parametrize(("images", "size", "rows"), [(32, 3, 2), (12, 7, 3), (8, 8, 2), (5, 4, 5), (8, 9, 8)])
def test_images_side_by_side_are_convolved_as_if_alone(monkeypatch, images, size, rows):
    """What AMX is given, against a plain convolution and its gradients in float64."""
    monkeypatch.setattr(models, "HAS_AMX", True)
    convolution, seen, conv2d = models.Convolution(16, 24), [], torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda x, *others: seen.append(x) or conv2d(x, *others))
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(images, 16, size, size, generator=draws).to(torch.bfloat16, memory_format=torch.channels_last)
    slope = torch.randn(images, 24, size, size, generator=draws).bfloat16()
    given = [x.requires_grad_(), convolution.bfloat16().weight]
    outputs = convolution(given[0])
    assert outputs.shape == slope.shape and outputs.is_contiguous(memory_format=torch.channels_last)
    assert seen[0].shape[0] == rows and seen[0].is_contiguous(memory_format=torch.channels_last)
    exact = [each.detach().double().requires_grad_() for each in given]
    expected = conv2d(*exact, padding=1)
    for found, wanted in zip(
        (outputs, *torch.autograd.grad(outputs, given, slope)),
        (expected, *torch.autograd.grad(expected, exact, slope.double())),
        strict=True,
    ):
        error = (found.double() - wanted).abs().max() / wanted.abs().max()
        assert error < 2**-8, "more than rounding to bfloat16"


@pytest.mark.parametrize("is_there", [False, True])
def test_images_are_laid_side_by_side_for_amx_alone(monkeypatch, is_there):
    monkeypatch.setattr(models, "HAS_AMX", is_there)
    sizes, conv2d = [], torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda x, *others: sizes.append(x.shape[-2:]) or conv2d(x, *others)
    )
    network = models.create("student", 3, 0).to(memory_format=torch.channels_last)
    images = torch.zeros(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    network(images)  # in float32
    alone = [(32, 32), (31, 31), (15, 15), (15, 15), (7, 7), (7, 7), (3, 3)]
    assert sizes == alone
    with torch.autocast("cpu", torch.bfloat16):
        network(images)
    assert sizes[7:] == ([*alone[:4], (7, 64), (7, 64), (3, 64)] if is_there else alone)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.autocast("cpu", torch.bfloat16):
        network(images)
    assert sizes[14:] == alone  # a compiled network fails where a second size of batches comes


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells what its CPU has")
def test_amx_is_found_where_linux_finds_it():
    assert ("amx_bf16" in Path("/proc/cpuinfo").read_text().split()) == models.HAS_AMX


def test_whitened_patches_are_uncorrelated_and_of_one_variance():
    """Against NumPy's covariance of all 2x2 patches of the images that it was fitted to."""
    smooth = torch.nn.functional.avg_pool2d(
        torch.randn(300, 3, 18, 18, generator=torch.Generator().manual_seed(0)), 3, 1
    )
    network = models.create("student", 3, 0, smooth)
    first = network.features[0]
    outputs = first(smooth).detach().numpy().transpose(0, 2, 3, 1).reshape(-1, 24)
    np.testing.assert_allclose(outputs[:, :12], -outputs[:, 12:], atol=1e-5)
    second_moments = outputs[:, :12].T @ outputs[:, :12] / len(outputs)
    np.testing.assert_allclose(second_moments, np.eye(12), atol=0.15)  # less 5e-4 over an eigenvalue
    assert not first.weight.requires_grad and first.bias.requires_grad


def test_whitening_divides_by_what_the_paper_adds_to_each_variance():
    """arXiv 2404.00498, section 3.2: eigenvectors over the root of (eigenvalue + 0.0005), each with both signs."""
    gray = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)  # of 4 dimensions
    layer = models.Whitening()
    layer.fit(gray)
    patches = np.stack([gray[:, :, y : y + 2, x : x + 2].numpy() for y in range(7) for x in range(7)]).reshape(-1, 12)
    values = np.linalg.eigvalsh(patches.T.astype(float) @ patches / len(patches)).clip(0)
    norms = layer.weight.reshape(24, 12).norm(dim=1).numpy()
    assert norms[:12] == pytest.approx(1 / np.sqrt(values + 0.0005), rel=1e-3)
    assert (layer.weight[12:] == -layer.weight[:12]).all()


def test_whitening_of_images_that_are_hardly_more_than_one_colour_is_finite():
    """Their other eigenvalues are 0 up to rounding, which is more than 0.0005 below it where pixels are large."""
    images = 300 + 1e-3 * torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    layer = models.Whitening()
    layer.fit(images)
    assert layer.weight.isfinite().all()


def test_the_student_is_ten_times_smaller_and_five_times_cheaper():
    teacher, student = (models.costs(name, 10, 32) for name in ("teacher", "student"))
    assert teacher.parameters >= 10 * student.parameters
    assert teacher.macs >= 5 * student.macs


# (inputs, outputs, side of its input) of every 3x3 convolution, in order, for images of 32x32.
CONVOLUTIONS = {
    "student": [(24, 32, 31), (32, 32, 15), (32, 96, 15), (96, 96, 7), (96, 128, 7), (128, 128, 3)],
    "teacher": [
        (24, 64, 31), (64, 64, 15),
        (64, 224, 15), (224, 224, 7),
        (224, 384, 7), (384, 384, 3), (384, 384, 3),
    ],
}  # fmt: skip


# With other widths: channels are the nearest multiples of 8, and at least 8.
WIDTHS = {0.1: {32: 8, 96: 8, 128: 16}, 0.5: {32: 16, 96: 48, 128: 64}, 1.5: {64: 96, 224: 336, 384: 576}}


@pytest.mark.parametrize(
    ("architecture", "width"),
    [("student", 1.0), ("teacher", 1.0), ("student", 0.1), ("student", 0.5), ("teacher", 1.5)],
)
def test_costs_against_a_count_by_hand(architecture, width):
    """A 3x3 convolution costs inputs x outputs x 9 for each pixel, the whitening 3 x 24 x 4, the head inputs x classes;
    batch norm has two parameters for each output, the whitening a bias."""
    wide = {24: 24} | WIDTHS.get(width, {each: each for _, each, _ in CONVOLUTIONS[architecture]})
    convolutions = [(wide[inputs], wide[outputs], side) for inputs, outputs, side in CONVOLUTIONS[architecture]]
    last = convolutions[-1][1]
    parameters = sum(9 * inputs * outputs + 2 * outputs for inputs, outputs, _ in convolutions) + last * 10
    macs = sum(9 * inputs * outputs * side**2 for inputs, outputs, side in convolutions) + last * 10
    costs = models.costs(architecture, 10, 32, width)
    assert (costs.parameters, costs.macs) == (parameters + 12 * 24 + 24, macs + 12 * 24 * 31**2)


def test_initial_weights_are_a_function_of_architecture_and_seed():
    one = models.digest(models.create("student", 10, 3).state_dict())
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    assert models.digest(models.create("student", 10, 3).state_dict()) == one
    assert torch.equal(torch.random.get_rng_state(), before)
    assert models.digest(models.create("student", 10, 4).state_dict()) != one
    widening = models.create("student", 10, 3).features[4][0].weight  # (96, 32, 3, 3)
    identity = torch.zeros(32, 32, 3, 3)
    identity[torch.arange(32), torch.arange(32), 1, 1] = 1
    assert torch.equal(widening[:32], identity)
    assert widening[32:].std().item() == pytest.approx((1 / (3 * 9 * 32)) ** 0.5, rel=0.05)
    heads = [models.create(name, 10, 3).head.weight.flatten()[0] for name in ("student", "teacher")]
    assert heads[0] != heads[1]


def test_images_are_normalized_by_channel():
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    expected = ((pixels / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    got = models.normalize(pixels, mean, std)
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_on_mps_networks_and_images_are_contiguous():
    """PyTorch computed wrong results for channels last there (pytorch issues 175189 and 192212)."""
    wanted = {"cpu": torch.channels_last, "cuda": torch.channels_last, "mps": torch.contiguous_format}
    for name, layout in wanted.items():
        device = torch.device(name)
        assert memory_format(device) is layout
        assert Machine(device).place == {"device": device, "memory_format": layout}


def test_normalized_images_follow_the_memory_format(monkeypatch):
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    expected = models.normalize(pixels, (0.4,) * 3, (0.2,) * 3)
    monkeypatch.setattr(models, "memory_format", lambda device: torch.contiguous_format)
    got = models.normalize(pixels, (0.4,) * 3, (0.2,) * 3)
    assert got.is_contiguous() and torch.equal(got, expected)


@pytest.mark.parametrize("architecture", ["teacher", "student"])
def test_what_is_saved_is_loaded(tmp_path, architecture):
    network = models.create(architecture, 3, 1)
    loaded = models.load(save(tmp_path / "model.pt", network, architecture, mean=[0.25, 0.5, 0.75]))
    assert models.digest(loaded.state_dict()) == models.digest(network.state_dict())
    assert (loaded.architecture, loaded.classes, loaded.image_size) == (architecture, CLASSES, 16)
    assert (tuple(loaded.mean), tuple(loaded.std)) == ((0.25, 0.5, 0.75), (0.2, 0.2, 0.2))
    assert (loaded.settings, loaded.accuracy, loaded.training) == (SETTINGS, 0.5, False)


def test_a_loaded_network_takes_images(tmp_path):
    loaded = models.load(save(tmp_path / "model.pt", models.create("student", 3, 1)))
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    expected = ((pixels / 255 - 0.5) / 0.2).permute(0, 3, 1, 2)
    torch.testing.assert_close(loaded.normalize(pixels), expected)
    assert loaded(loaded.normalize(pixels)).shape == (2, 3)


def changed(path, **entries):
    content = torch.load(path, weights_only=True)
    for name, value in entries.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": 99}, "another version of this program: its format is 99"),
        ({"format": None}, "not a model of this program: it is a checkpoint of another program"),
        ({"architecture": "transformer"}, "unknown architecture 'transformer'"),
        ({"architecture": "teacher"}, "weights do not fit this architecture"),
        ({"classes": ["a", "b"]}, "class names do not match"),
        ({"classes": ["a", "b"], "arguments": {"classes": 2}}, "size mismatch for head"),
        ({"classes": ["a"], "arguments": {"classes": 1}}, r"length >= 2 - at \$.classes"),
        ({"classes": [1, 2, 3]}, r"expected str, got int - at \$.classes"),
        ({"arguments": {"classes": 3, "widths": 10**9}}, "arguments"),
        ({"arguments": {"classes": 3.5}}, "class names do not match"),
        ({"arguments": {"classes": 3, "width": "2"}}, r"got str - at \$.arguments"),
        ({"arguments": {"classes": 3, "width": 2.0}}, "weights do not fit this architecture"),
        ({"arguments": {"classes": 3, "width": 0.0}}, "a width of 0.0 is out of range"),
        ({"arguments": {"classes": 3, "width": float("nan")}}, "a width of nan is out of range"),
        ({"arguments": {"classes": 3, "width": 9}}, "a width of 9 is out of range"),
        ({"image_size": 100_000}, r"int <= 256 - at \$.image_size"),
        ({"image_size": 15}, r"int >= 16 - at \$.image_size"),
        ({"mean": ["x"] * 3}, r"expected float, got str - at \$.mean"),
        ({"mean": [0.5] * 2}, r"length 3, got 2 - at \$.mean"),
        ({"mean": [float("nan")] * 3}, r"at \$.mean"),
        ({"std": None}, "missing required field std"),
        ({"std": [0.0] * 3}, r"float > 0.0 - at \$.std"),
        ({"accuracy": 1.5}, r"float <= 1.0 - at \$.accuracy"),
        ({"settings": [1]}, r"expected object, got array - at \$.settings"),
        ({"state_dict": {}}, "weights do not fit"),
        ({"state_dict": None}, "missing required field state_dict"),
        ({"state_dict": {"head.weight": 1}}, r"expected Tensor, got int - at \$.state_dict"),
    ],
    ids=str,
)
def test_a_malformed_checkpoint_is_refused_with_its_path_and_what_is_wrong(tmp_path, entries, message):
    path = changed(save(tmp_path / "model.pt", models.create("student", 3, 1)), **entries)
    with pytest.raises(Damaged, match=message) as failure:
        models.load(path)
    assert str(path) in str(failure.value)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    network = models.create("student", 3, 1)
    network.head.weight.data[1, 0] = float("nan")
    with pytest.raises(Damaged, match="not finite"):
        models.load(save(tmp_path / "model.pt", network))


def test_weights_of_another_type_are_refused(tmp_path):
    with pytest.raises(Damaged, match="another type"):
        models.load(save(tmp_path / "model.pt", models.create("student", 3, 1).half()))
