"""Images larger than 64x64: what their networks cost, and that everything takes them."""

import sys

import pytest
import torch
from torch import nn

import models
import runs.costs
from models import inference_batch
from runs.costs import any_macs, describe_memory, free_memory, layers_macs, training_memory
from runs.machine import Machine


class Attention(nn.Module):
    """A network of somebody else: patches of 4x4, a grouped convolution, self-attention."""

    def __init__(self):
        super().__init__()
        self.patches, self.grouped = nn.Conv2d(3, 32, 4, 4), nn.Conv2d(32, 64, 3, padding=1, groups=4)
        self.attention, self.head = nn.MultiheadAttention(64, 4, batch_first=True), nn.Linear(64, 10)

    def forward(self, x):
        tokens = self.grouped(self.patches(x)).flatten(2).mT
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def test_multiply_adds_of_any_network_by_hand():
    tokens = 8 * 8
    expected = tokens * (3 * 4 * 4 * 32 + 8 * 9 * 64)  # a group of the second convolution has 8 inputs
    expected += tokens * 64 * (3 * 64 + 64) + 2 * tokens**2 * 64  # four projections; scores, and their values
    expected += 64 * 10
    network = Attention()
    assert models.costs_of(network, 32).macs == expected
    assert network.training


@pytest.mark.parametrize("architecture", ["teacher", "student"])
def test_both_ways_of_counting_agree(architecture):
    network = models.create(architecture, 7, 0)
    assert layers_macs(network, 47) == any_macs(network, 47) == models.costs(architecture, 7, 47).macs


def test_costs_move_no_global_random_state():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    models.costs("student", 11, 33)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_memory_of_training_by_hand():
    """Convolution, GELU and the matrix keep their inputs, of which the last two are the largest; then weights,
    gradients and momenta."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(8 * 20 * 20, 2))
    features = 4 * 20 * 20
    parameters = 8 * 3 * 9 + 8 + 2 * 8 * 20 * 20 + 2
    assert training_memory(network, 20, 16) == 16 * features * (3 + 8 + 8 + 8) + 3 * 4 * parameters
    half = training_memory(models.create("student", 10, 0), 80, 64, "bf16")
    assert 0.5 < half / training_memory(models.create("student", 10, 0), 80, 64) < 0.65  # pooling keeps places, int64


def test_memory_of_a_network_without_convolutions():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 70 * 70, 5), nn.Tanh(), nn.Linear(5, 2))
    parameters = 3 * 70 * 70 * 5 + 5 + 5 * 2 + 2  # kept are the images, which are the largest, and what tanh gives
    assert training_memory(network, 70, 16) == 4 * (16 * (2 * 3 * 70 * 70 + 5) + 3 * parameters)
    rounded = training_memory(network, 70, 16, "bf16")  # the second matrix is kept once, rounded
    assert rounded == 2 * (16 * (2 * 3 * 70 * 70 + 5) + 5 * 2) + 4 * 3 * parameters


def test_an_inference_batch_is_fixed_and_of_large_images_smaller():
    """Up to 64x64 it is what it always was: soft targets that are kept on the disk stay valid."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [inference_batch(cpu, size) for size in (16, 32, 64, 128, 256)] == [128, 128, 128, 32, 8]
    assert [inference_batch(cuda, size) for size in (32, 64, 256)] == [500, 500, 31]


@pytest.mark.slow
def test_large_images_are_trained_on_and_predicted(cli, flags, images, tmp_path, monkeypatch):
    """What training takes is said before."""
    monkeypatch.setattr(runs.costs, "free_memory", lambda device: 2.04e9)
    got = cli(*flags, "--train-teacher", "--image-size", 72, "--epochs", 1, "--output-dir", tmp_path)
    assert got.status == 0, got
    assert "Teacher: 4,064,568 parameters, 798.5 million multiply-adds per image\n" in got.out
    assert "Memory: about 0.2 GB to train the teacher with batches of 16, of 2.0 GB that are free\n" in got.out
    got = cli("--predict", images / "test" / "red", "--model", tmp_path / "teacher-s0", "--device", "cpu")
    assert got.status == 0 and len(got.out.splitlines()) == 1 + 8


@pytest.mark.parametrize(
    ("free", "more"),
    [
        (2.04e9, ", of 2.0 GB that are free"),
        (0.1e9, ", but only 0.1 GB are free: choose a smaller --batch-size"),
        (None, ""),
    ],
)
def test_memory_in_words(monkeypatch, free, more):
    monkeypatch.setattr(runs.costs, "free_memory", lambda device: free)
    text = describe_memory("student", models.create("student", 10, 0), 80, 64, Machine(torch.device("cpu")))
    assert text == f"Memory: about 0.4 GB to train the student with batches of 64{more}"


def test_free_memory_is_known_on_linux():
    free = free_memory(torch.device("cpu"))
    assert free > 1e7 if sys.platform == "linux" else free is None


def test_small_images_are_not_worth_the_words(cli, flags, copy):
    assert "Memory:" not in cli(*flags, "--output-dir", copy).out
