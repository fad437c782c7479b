"""Images larger than 64x64: what their networks cost, and that everything takes them."""

import sys
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

import models
import runs.costs
from models import inference_batch
from reports import records
from runs.costs import any_macs, describe_memory, free_memory, layers_macs, training_memory
from runs.files import Damaged
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


class Recurrent(nn.Module):
    """Reads an image row by row."""

    def __init__(self, kind):
        super().__init__()
        self.rows, self.head = kind(48, 32, batch_first=True), nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.rows(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_multiply_adds_of_recurrent_layers(kind, gates, recwarn):
    assert models.costs_of(Recurrent(kind), 16).macs == 16 * gates * 32 * (48 + 32) + 32 * 8
    assert not recwarn.list


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


def test_a_test_set_is_held_in_memory_once_at_most(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (64, 256, 256, 3), np.uint8)
    labels, classes = np.arange(64) % 2, ("a", "b")

    def peak(function, *arguments):
        tracemalloc.start()
        try:
            function(*arguments)
            return tracemalloc.get_traced_memory()[1] / images.nbytes
        finally:
            tracemalloc.stop()

    for most in (1.3, 0.3):  # written, in parts of 16 MB, and found to be intact
        assert peak(records.save_test_set, tmp_path, "digest", images, labels, classes) < most
    assert peak(records.load_test_set, tmp_path, "digest", []) < 1.3
    (path,) = (tmp_path / "data").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    with pytest.raises(Damaged, match="the checksum of 'images.npy' in it does not match"):
        records.load_test_set(tmp_path, "digest", [])
    records.save_test_set(tmp_path, "digest", images, labels, classes)
    assert np.array_equal(records.load_test_set(tmp_path, "digest", [])[0], images)


@pytest.mark.slow
def test_large_images_are_trained_on_and_predicted(cli, flags, images, tmp_path, monkeypatch):
    """What training takes is said before."""
    monkeypatch.setattr(runs.costs, "free_memory", lambda device: 2.04e9)
    got = cli(*flags, "--train-teacher", "--image-size", 72, "--epochs", 1, "--output-dir", tmp_path)
    assert got.status == 0, got
    assert "Teacher: 4,064,568 parameters, 798.5 million multiply-adds per image\n" in got.out
    assert "Memory: about 0.2 GB to train the teacher with batches of 16, of 2.0 GB that are free\n" in got.out
    few = cli(*flags, "--image-size", 72, "--epochs", 1, "--train-fraction", 0.25, "--output-dir", tmp_path)
    assert few.status == 0 and "to train the student with batches of 12, of" in few.out  # of 48 images
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


def test_processes_share_the_memory_of_a_cpu(monkeypatch):
    monkeypatch.setattr(runs.costs, "free_memory", lambda device: 0.6e9)
    text = describe_memory("student", models.create("student", 10, 0), 80, 64, Machine(torch.device("cpu")), 2)
    assert text.endswith(", but only 0.3 GB are free for each of 2 processes: choose a smaller --batch-size")


@pytest.mark.parametrize(("gpus", "each"), [(1, "3 GB are free for each of 2"), (2, "6 GB are free:")])
def test_processes_share_a_gpu_where_there_are_fewer(monkeypatch, gpus, each):
    monkeypatch.setattr(runs.costs, "free_memory", lambda device: 0.6e9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    text = describe_memory("student", models.create("student", 10, 0), 80, 128, Machine(torch.device("cuda")), 2)
    assert f"but only 0.{each}" in text


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        (  # version 2: the container's limit is on a group around this one; files in the page cache are given back
            "0::/job/step\n",
            {"job/memory.max": 1000, "job/memory.current": 700, "job/memory.stat": "anon 500\nactive_file 60\n"
             "inactive_file 100", "job/step/memory.max": "max", "job/step/memory.current": 1},
            [460],
        ),
        (  # version 1, whose group is not seen from inside the container
            "4:cpu,memory:/docker/01ab\n2:cpuset:/\n0::/\n",
            {"memory/memory.limit_in_bytes": 900, "memory/memory.usage_in_bytes": 300,
             "memory/memory.stat": "total_active_file 10\ntotal_inactive_file 20"},
            [630],
        ),
        ("0::/\n", {}, []),
    ],
)  # fmt: skip
def test_what_a_container_has_left(tmp_path, groups, files, left):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    here = {key: (tmp_path / key, *names) for key, (_, *names) in runs.costs.CGROUP_FILES.items()}
    assert [*runs.costs._left_in_groups(groups, here)] == left


def test_free_memory_is_what_the_container_has_left(monkeypatch):
    monkeypatch.setattr(runs.costs, "_left_in_groups", lambda groups: [3e6, 2e6])
    if sys.platform == "linux":
        assert free_memory(torch.device("cpu")) == 2e6


def test_free_memory_is_known_on_linux():
    free = free_memory(torch.device("cpu"))
    assert free > 1e7 if sys.platform == "linux" else free is None
