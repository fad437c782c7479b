"""Files of other programs given as a teacher: each is named for what it is, and nothing in it is run."""

import json
import pickle
import zipfile
from unittest.mock import Mock

import pytest
import torch

import models
from runs.files import Damaged

WEIGHTS = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 10))


class Net(torch.nn.Sequential):
    """Somebody's network."""


def safetensors(path):
    header = json.dumps({
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    }).encode()  # fmt: skip
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def archive(path, *names):
    with zipfile.ZipFile(path, "w") as content:
        for name in names:
            content.writestr(name, b"{}")


NAMED = WEIGHTS.state_dict()
LOOP = {"a": 1}
LOOP["loop"] = LOOP

# How each is made, and what is said of it.
FILES = {
    "state_dict": (
        lambda path: torch.save(WEIGHTS.state_dict(), path),
        "a state_dict, weights without their network (9 tensors; the first is '0.weight', 8x3x3x3)",
    ),
    "in state_dict": (
        lambda path: torch.save({"epoch": 3, "state_dict": WEIGHTS.state_dict()}, path),
        "a checkpoint of another program; its entry 'state_dict' is a state_dict, weights without their network",
    ),
    "in model": (
        lambda path: torch.save({"model": WEIGHTS.state_dict(), "optimizer": {}}, path),
        "a checkpoint of another program; its entry 'model' is a state_dict",
    ),
    "beside a number": (
        lambda path: torch.save({"classes": 10, **WEIGHTS.state_dict()}, path),
        "a state_dict, weights without their network (9 tensors; the first is '0.weight', 8x3x3x3, beside 1 other",
    ),
    "nested": (
        lambda path: torch.save({"a": {0: {"b": WEIGHTS[0].bias}}, "net": {"ema": {"weights": NAMED}}}, path),
        "a checkpoint of another program; its entry 'net.ema.weights' is a state_dict, weights without their",
    ),
    "format": (lambda path: torch.save({"format": torch.ones(3), "epoch": 1, "a": 1}, path), "a dict with the entries"),
    "tensor": (lambda path: torch.save(torch.ones(3, 4), path), "a single tensor (3x4)"),
    "list": (lambda path: torch.save([torch.ones(3, 4)], path), "a list of 1 value."),
    "loop": (lambda path: torch.save(LOOP, path), "a dict with the entries 'a', 'loop'"),
    "other dict": (
        lambda path: torch.save({"loss": 0.5, "epoch": 3}, path), "a dict with the entries 'loss', 'epoch'.",
    ),
    "whole network": (
        lambda path: torch.save(Net(torch.nn.Linear(2, 2)), path),
        "a pickle of Python objects (of the type test_foreign.Net and 1 more), and loading it could run code",
    ),
    "before 1.6": (
        lambda path: torch.save(WEIGHTS.state_dict(), path, _use_new_zipfile_serialization=False),
        "a file in PyTorch's format from before version 1.6",
    ),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "a pickle, and loading it could run code"),
    "safetensors": (safetensors, "a safetensors file of 2 tensors, weights without their network"),
    "ONNX": (lambda path: path.write_bytes(b"\x08\x0a\x12\x07pytorch:" + bytes(50)), "an ONNX file"),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50)), "an HDF5 file"),
    "Keras": (lambda path: archive(path, "config.json", "model.weights.h5"), "a Keras model"),
    "TorchScript": (lambda path: archive(path, "net/data.pkl", "net/constants.pkl"), "a TorchScript program"),
    "npz": (lambda path: archive(path, "weight.npy", "bias.npy"), "an archive of NumPy arrays"),
    "Git LFS": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html><html>404"), "a web page: the download"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("make", "told"), FILES.values(), ids=FILES)
def test_a_file_of_another_program_is_named_for_what_it_is(tmp_path, make, told):
    path = tmp_path / "teacher.pth"
    make(path)
    with pytest.raises(Damaged) as failure:
        models.load(path)
    first, second, third = str(failure.value).splitlines()
    assert first.startswith(f"{path} is not a model of this program: it is ") and told in first
    assert second.endswith("or train a teacher: python main.py --train-teacher") and "--epochs 0" in third


def test_a_state_given_as_a_teacher(cli, flags, copy):
    """From the command line: state.pt lies beside where model.pt will be."""
    state = copy / "state.pt"
    torch.save({"format": 3, "optimizer": {}, "network": {}, "sums": {}}, state)
    got = cli(*flags, "--output-dir", copy, "--teacher", state)
    assert (
        got.status == 1 and f"{state} is not a model of this program: it is the state of an unfinished run" in got.err
    )


def test_a_file_that_is_cut_short_is_damaged_and_not_foreign(copy):
    path = copy / "teacher-s0" / "model.pt"
    for content in (path.read_bytes()[:-1000], bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(Damaged, match="is damaged: it is not a complete archive"):
            models.load(path)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_shortage_of_memory_is_no_damage(tmp_path, monkeypatch, error):
    torch.save({"a": 1}, tmp_path / "model.pt")
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
    with pytest.raises(type(error)):
        models.load(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "an empty file"),
        ("é\r\n".encode() + "→".encode() * 99, "a text file that begins 'é →→→"),
        (b" \n", "a text file of blanks"),
    ],
)
def test_a_file_of_text_or_nothing_is_said_to_be_that(tmp_path, content, told):
    """A disk that was full may leave the one, a failed download the other."""
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(Damaged) as failure:
        models.load(path)
    first, second, third = str(failure.value).splitlines()
    assert first.startswith(f"{path} is damaged: it is {told}") and first.endswith(" instead of a model.")
    assert second.endswith("or train a teacher: python main.py --train-teacher") and "--epochs 0" in third
