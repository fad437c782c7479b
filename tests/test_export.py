"""--export: the ONNX file answers as PyTorch does, and is there whole or not at all."""

import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import models
from reports.records import find_test_images
from reports.statistics import softmax
from sources.decode import read_image
from train import evaluate
from use import export

STUDENT, to_onnx = "kd-T4-a0.1-s0", export.to_onnx
onnxruntime = pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")


def network(architecture, classes, size):
    """A network of that many classes whose batch norm has seen something, with what models.load adds."""
    new = models.create(architecture, classes, 0)
    new.image_size, new.mean, new.std = size, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    new.classes = [f"class {k}, ü" for k in range(classes)]
    new.architecture, new.accuracy, new.settings = architecture, 0.5, {}
    new.train()(torch.randn(8, 3, size, size, generator=models.generator("test")))
    return new.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "classes", "size"), [("student", 2, 64), ("teacher", 100, 16)])
def test_parity(architecture, classes, size):
    exported = network(architecture, classes, size)
    session = onnxruntime.InferenceSession(export.to_onnx(exported))
    assert session.get_modelmeta().custom_metadata_map["temperature"] == "1.0"
    images = np.random.default_rng(1).integers(0, 256, (300, size, size, 3), np.uint8)
    expected = evaluate(exported, torch.from_numpy(images), exported.mean, exported.std).softmax(1).numpy()
    for count in (1, 300):
        (found,) = session.run(None, {"images": images[:count]})
        assert found.shape == (count, classes)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[:count], atol=1e-5)
    assert [(each.name, each.type, each.shape) for each in session.get_inputs()] == [
        ("images", "tensor(uint8)", ["N", size, size, 3])
    ]
    assert [(each.name, each.type, each.shape) for each in session.get_outputs()] == [
        ("probabilities", "tensor(float)", ["N", classes])
    ]


@pytest.mark.slow
def test_a_file_that_answers_with_the_mirror_image(cli, copy, images):
    result = cli("--export", "--mirror", "--output-dir", copy)
    assert result.status == 0 and "the class is the same for 24 of 24" in result.out
    session = onnxruntime.InferenceSession(copy / STUDENT / "model.onnx")
    assert session.get_modelmeta().custom_metadata_map["mirror"] == "true"
    (row,) = cli("--predict", images / "test/red/00.png", "--output-dir", copy, "--mirror").out.splitlines()[1:]
    pixels = read_image(images / "test/red/00.png", 16)[None]
    found, other = (session.run(None, {"images": each})[0] for each in (pixels, pixels[:, :, ::-1].copy()))
    np.testing.assert_allclose(found, other, atol=1e-5)
    assert found.max() == pytest.approx(float(row.split(",")[2]), abs=1e-5)
    plain = softmax(np.load(copy / STUDENT / "test_logits.npy"), 1.0)
    assert abs(found - plain).sum(1).min() > 1e-4


@pytest.mark.slow
def test_the_mirror_image_of_what_a_network_changes_in_place():
    class Changing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network("student", 3, 16)

        def forward(self, x):
            return self.inner(x.mul_(2).sub_(0.5).relu_())

    own = models.build(lambda classes: Changing(), "student", 3, 0)
    for name, value in vars(network("student", 3, 16)).items():
        if name in ("image_size", "mean", "std", "classes", "architecture", "accuracy", "settings"):
            setattr(own, name, value)
    images = np.random.default_rng(2).integers(0, 256, (8, 16, 16, 3), np.uint8)
    difference, same = export.compare(own.eval(), export.to_onnx(own, mirror=True), images, mirror=True)
    assert difference < 1e-5 and same == 8


@pytest.mark.slow
def test_export_and_the_lines_that_use_the_file(cli, copy, images):
    """The lines in use/export.py, which the README repeats, run without this program, on the file alone, here with
    logits that are divided by a temperature."""
    softened = ("--output-dir", copy, "--temperature", 2.5)
    result = cli("--export", *softened)
    assert result.status == 0
    assert result.out.startswith(f"{copy / STUDENT / 'model.onnx'}: ")
    assert "on 24 test images" in result.out
    assert float(re.search(r"differ by at most (\S+),", result.out)[1]) < 1e-5
    assert "the class is the same for 24 of 24" in result.out
    assert {each.name for each in (copy / STUDENT).iterdir()} >= {"model.pt", "model.onnx", "run.json"}

    elsewhere = copy / "elsewhere"
    elsewhere.mkdir()
    shutil.move(copy / STUDENT / "model.onnx", elsewhere)
    image = np.array(Image.open(images / "test" / "blue" / "00.png"))
    image = np.dstack([image, np.full((16, 16), 255, np.uint8)])
    image[:8, :, 3] = 0  # transparent above
    Image.fromarray(image).save(elsewhere / "image.png")
    lines = textwrap.dedent(re.search(r"(?:^    .*\n)+", export.__doc__, re.MULTILINE)[0])
    done = subprocess.run([sys.executable, "-c", lines], cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, probability = done.stdout.split()
    predicted = cli("--predict", elsewhere / "image.png", *softened, "--device", "cpu").out
    predicted = predicted.splitlines()[1].split(",")
    assert name == predicted[1] and float(probability) == pytest.approx(float(predicted[2]), abs=1e-5)

    session = onnxruntime.InferenceSession(elsewhere / "model.onnx")
    (found,) = session.run(None, {"images": read_image(images / "test" / "blue" / "00.png", 16)[None]})
    np.testing.assert_allclose(found, softmax(np.load(copy / STUDENT / "test_logits.npy")[:1], 2.5), atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    record = json.loads((copy / STUDENT / "run.json").read_text())
    assert json.loads(metadata["classes"]) == ["blue", "green", "red"]
    assert metadata["image_size"] == "16" and metadata["ranges"] == "{}"
    assert float(metadata["accuracy"]) == record["accuracy"]
    assert metadata["weights_sha256"] == record["weights_sha256"]
    assert metadata["program_version"] == record["environment"]["program"]
    assert metadata["temperature"] == "2.5"


def test_without_a_test_set_noise_is_compared_and_said(cli, copy, monkeypatch):
    shutil.rmtree(copy / "data")
    compared = []
    monkeypatch.setattr(export, "to_onnx", lambda *_: b"exported")
    monkeypatch.setattr(export, "compare", lambda network, content, *given: compared.append(given) or (0.0, 256))
    result = cli("--export", "--model", copy / "teacher-s0")
    assert result.status == 0 and (copy / "teacher-s0" / "model.onnx").read_bytes() == b"exported"
    ((images, *how),) = compared
    assert how == [1.0, False] and images.shape == (256, 16, 16, 3) and images.std() > 70
    assert "on 256 images of noise (no test set of this model is kept beside it)" in result.out


class TestNothingIsLeft:
    """Whatever goes wrong is a sentence, and no file is left."""

    @pytest.fixture
    def says(self, cli, copy, monkeypatch):
        monkeypatch.setattr(export, "to_onnx", lambda *_: self.content)

        def run():
            before = sorted(copy.rglob("*"))
            result = cli("--export", "--output-dir", copy)
            assert (result.status, result.out) == (1, "")
            assert "Traceback" not in result.err
            assert sorted(copy.rglob("*")) == before
            return result.err

        return run

    content = b"no ONNX"

    def test_packages_are_missing(self, says, monkeypatch):
        there = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else there(name))
        assert says() == "error: --export needs onnxscript: pip install -r requirements-export.txt\n"

    @pytest.mark.parametrize(
        ("error", "cause", "helps"),
        [
            (ModuleNotFoundError("No module named 'a'"), None, True),
            (ModuleNotFoundError("a"), KeyError("b"), True),
            (RuntimeError("a"), AttributeError("b"), True),
            (ValueError("a"), None, False),
        ],
    )
    def test_pytorch_cannot_export_it(self, says, monkeypatch, error, cause, helps):
        def failing(*_, **__):
            print("Applied 9 of general pattern rewrite rules.")  # as an old onnxscript says
            raise error from cause

        monkeypatch.setattr(export, "to_onnx", to_onnx)
        monkeypatch.setattr(torch.onnx, "export", failing)
        first, *more = says().splitlines()
        assert re.fullmatch(rf"error: PyTorch \S+ cannot export to ONNX, opset 18: {error}", first)
        advice = "onnx or onnxscript may be too old for this PyTorch: pip install -U -r requirements-export.txt"
        assert more == [advice] * helps

    def test_onnx_runtime_cannot_read_it(self, says):
        assert "cannot run the model, opset 18" in says()

    @pytest.mark.parametrize("difference", [float("nan"), 0.001])
    def test_the_answers_differ(self, says, monkeypatch, difference):
        monkeypatch.setattr(export, "compare", lambda *_: (difference, 24))
        assert "does not answer as PyTorch does: on 24 test images" in says()

    def test_the_disk_is_full(self, says, monkeypatch):
        monkeypatch.setattr(export, "compare", lambda *_: (0.0, 24))

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        assert "the disk is full. What was there before is unchanged." in says()

    def test_the_test_set_is_damaged(self, says, copy):
        (path,) = (copy / "data").glob("test-*.npz")
        path.write_bytes(path.read_bytes()[:-9])
        assert f"{path} is damaged" in says()


def test_a_model_of_a_sweep_is_compared_on_the_test_set_too(finished):
    (test,) = (finished / "data").glob("test-*.npz")
    digest = models.load(finished / "teacher-s0" / "model.pt").settings["data"]
    for place in ("kd-T4-a0.1-s0", "selection/kd-T4-a0.1-s0"):
        found = find_test_images(finished / place / "model.pt", digest)
        assert np.array_equal(found, np.load(test)["images"])


def test_the_file_says_how_samples_of_more_bits_were_scaled(finished):
    network = models.load(finished / "kd-T4-a0.1-s0" / "model.pt")
    network.ranges = {"16-bit": (0, 4095)}
    assert json.loads(export._metadata(network, "0" * 64, 1.0, False)["ranges"]) == {"16-bit": [0, 4095]}


def test_an_opset_that_pytorch_does_not_know(cli, copy, monkeypatch):
    """Its exporter then takes another one, and only warns of it."""
    proto = SimpleNamespace(opset_import=[SimpleNamespace(domain="", version=18)])
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: SimpleNamespace(model_proto=proto))
    monkeypatch.setattr(export, "OPSET", 99)
    result = cli("--export", "--output-dir", copy)
    assert result.status == 1
    assert "opset 99" in result.err and "the exporter gave opset 18" in result.err
    assert not (copy / STUDENT / "model.onnx").exists()


def test_overwrite_removes_the_file_of_the_model_before(copy):
    from runs.run import Run

    (copy / STUDENT / "model.onnx").write_bytes(b"")
    Run(copy / STUDENT, None).remove()
    assert not (copy / STUDENT / "model.onnx").exists()
