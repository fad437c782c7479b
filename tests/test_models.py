"""The networks, their costs, and what model.pt promises."""

import pytest
import torch

import models
from files import Damaged

CLASSES = ["a", "b", "c"]


def save(path, network, architecture="student", **other):
    content = {
        "classes": CLASSES, "image_size": 16, "mean": [0.5] * 3, "std": [0.2] * 3, "settings": {"epochs": 1},
        "accuracy": 0.5,
    }  # fmt: skip
    models.save(path, network, architecture, **(content | other))
    return path


@pytest.mark.parametrize("architecture", ["teacher", "student"])
@pytest.mark.parametrize(("classes", "size"), [(2, 16), (10, 32), (37, 47), (3, 64)])
def test_any_number_of_classes_and_any_size(architecture, classes, size):
    network = models.create(architecture, classes, 0).train()
    logits = network(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, classes)
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_a_residual_branch_is_added_to_what_it_is_given():
    """x + ReLU(batch norm(convolution of x)), with convolutions that are the identity: 2x for x above 0."""
    residual = models.Residual(4, 1).eval()
    torch.nn.init.dirac_(residual.blocks[0][0].weight)
    x = torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(residual(x), x + x / (1 + 1e-5) ** 0.5)


def test_the_student_is_ten_times_smaller_and_five_times_cheaper():
    teacher, student = (models.costs(name, 10, 32) for name in ("teacher", "student"))
    assert teacher[0] >= 10 * student[0]
    assert teacher[1] >= 5 * student[1]


def test_costs_against_a_count_by_hand():
    """Convolutions cost outputs x inputs x 9 a place, the head inputs x classes; batch norm has two parameters."""
    parameters = macs = 0
    side, inputs = 32, 3
    for stage in ((32, 64), (64, 128), (128, 128)):
        for position, outputs in enumerate(stage):
            parameters += outputs * inputs * 9 + 2 * outputs
            macs += outputs * inputs * 9 * side**2
            side, inputs = side // 2 if position == 0 else side, outputs
    parameters += inputs * 10 + 10
    macs += inputs * 10
    assert models.costs("student", 10, 32) == (parameters, macs)


def test_initial_weights_are_a_function_of_architecture_and_seed():
    one = models.digest(models.create("student", 10, 3).state_dict())
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    assert models.digest(models.create("student", 10, 3).state_dict()) == one
    assert torch.equal(torch.random.get_rng_state(), before)
    assert models.digest(models.create("student", 10, 4).state_dict()) != one
    weights = models.create("student", 10, 3).features[1][0].weight
    assert weights.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert weights.flatten()[0] != models.create("teacher", 10, 3).features[1][0].weight.flatten()[0]


def test_what_is_saved_is_loaded(tmp_path):
    network = models.create("student", 3, 1)
    loaded = models.load(save(tmp_path / "model.pt", network))
    assert models.digest(loaded.state_dict()) == models.digest(network.state_dict())
    assert (loaded.classes, loaded.image_size, loaded.training) == (CLASSES, 16, False)
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    expected = ((pixels / 255 - 0.5) / 0.2).permute(0, 3, 1, 2)
    torch.testing.assert_close(loaded.normalise(pixels), expected)
    assert loaded(loaded.normalise(pixels)).shape == (2, 3)


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
    ("entries", "says"),
    [
        ({"format": 99}, "format 99"),
        ({"format": None}, "format None"),
        ({"architecture": "transformer"}, "unknown architecture 'transformer'"),
        ({"architecture": "teacher"}, "not those of this architecture"),
        ({"classes": ["a", "b"]}, "class names"),
        ({"classes": ["a", "b"], "arguments": {"classes": 2}}, "head.weight"),
        ({"classes": [1, 2, 3]}, "class names"),
        ({"arguments": {"classes": 3, "widths": 10**9}}, "arguments"),
        ({"image_size": 100_000}, "image size"),
        ({"mean": ["x"] * 3}, "mean"),
        ({"std": None}, "std"),
        ({"state_dict": {}}, "weights"),
        ({"state_dict": None}, "state_dict"),
    ],
)
def test_other_checkpoints_are_named_never_half_loaded(tmp_path, entries, says):
    path = changed(save(tmp_path / "model.pt", models.create("student", 3, 1)), **entries)
    with pytest.raises(Damaged, match=says) as failure:
        models.load(path)
    assert str(path) in str(failure.value)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    network = models.create("student", 3, 1)
    network.head.bias.data[1] = float("nan")
    with pytest.raises(Damaged, match="not finite"):
        models.load(save(tmp_path / "model.pt", network))
