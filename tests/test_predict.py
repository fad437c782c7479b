"""--predict and --list, as a person types them."""

import csv
import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT
from PIL import Image

import models
from reports import listing
from reports.statistics import softmax
from runs.checkpoints import load_checkpoint, save_checkpoint

STUDENT = "kd-T4-a0.1-s0"


def rows(out):
    return list(csv.DictReader(io.StringIO(out)))


@pytest.mark.parametrize(("words", "temperature"), [([], 1.0), (["--temperature", 4], 4.0)])
def test_predictions_are_the_runs_own_test_logits(cli, finished, images, words, temperature):
    result = cli("--predict", images / "test", "--output-dir", finished, "--device", "cpu", *words)
    assert result.status == 0
    found = rows(result.out)
    assert [each["path"] for each in found] == sorted(map(str, (images / "test").rglob("*.png")))
    logits = np.load(finished / STUDENT / "test_logits.npy")
    ranked, probabilities = logits.argsort(1)[:, ::-1], softmax(logits, temperature)
    for column, name in enumerate(("", "second_")):
        assert [each[f"{name}class"] for each in found] == [CLASSES[k] for k in ranked[:, column]]
        values = [float(each[f"{name}probability"]) for each in found]
        np.testing.assert_allclose(values, np.take_along_axis(probabilities, ranked, 1)[:, column], rtol=1e-4)
    right = sum(each["path"].split(os.sep)[-2] == each["class"] for each in found)
    assert right / len(found) == pytest.approx(models.load(finished / STUDENT / "model.pt").accuracy, abs=1e-12)
    share = f"{right / len(found):.4f} ({right} of {len(found)} images)"
    assert result.err == f"Accuracy where a folder is named like the class: {share}\n"


def test_an_image_is_answered_with_its_mirror_image(cli, finished, copy, images):
    """--mirror averages the logits of both; a model that never saw a mirror image is not asked about one."""
    words = "--predict", images / "test", "--device", "cpu", "--temperature", 3
    found = rows(cli(*words, "--output-dir", finished, "--mirror").out)
    network = models.load(finished / STUDENT / "model.pt")
    pixels = np.stack([np.array(Image.open(each["path"])) for each in found])
    with torch.inference_mode():
        logits = [network(network.normalize(torch.from_numpy(view))) for view in (pixels, pixels[:, :, ::-1].copy())]
    probabilities = softmax((logits[0] + logits[1]).numpy() / 2, 3.0)
    np.testing.assert_allclose([float(each["probability"]) for each in found], probabilities.max(1), rtol=1e-4)
    assert [each["class"] for each in found] == [CLASSES[best] for best in probabilities.argmax(1)]
    assert found != rows(cli(*words, "--output-dir", finished).out)
    assert cli(*words, "--output-dir", finished, "--no-mirror").out == cli(*words, "--output-dir", finished).out

    model = copy / STUDENT / "model.pt"
    content = load_checkpoint(model)
    save_checkpoint(model, content | {"settings": content["settings"] | {"mirror": False}})
    result = cli(*words, "--output-dir", copy, "--mirror")
    assert (result.status, result.out) == (1, "")
    told = f"{model} was trained with --no-mirror, so it knows no mirror images. Leave out --mirror."
    assert told in result.err and told in cli("--export", "--mirror", "--output-dir", copy).err
    save_checkpoint(model, content | {"settings": content["settings"] | {"mirror": False, "epochs": 0}})
    assert cli(*words, "--output-dir", copy, "--mirror").status == 0  # trained elsewhere, who knows on what


def test_a_batch_more_changes_nothing(cli, finished, images, monkeypatch):
    whole = cli("--predict", images / "test", "--output-dir", finished, "--device", "cpu")
    monkeypatch.setitem(models.INFERENCE_BATCH, "cpu", 7)
    parts = cli("--predict", images / "test", "--output-dir", finished, "--device", "cpu")
    assert [each["class"] for each in rows(parts.out)] == [each["class"] for each in rows(whole.out)]
    assert parts.err == whole.err


def test_several_processes_predict_once(cli, finished, images, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        result = cli("--predict", images / "test" / "red" / "00.png", "--output-dir", finished, "--device", "cpu")
        assert result.status == 0 and len(result.out.splitlines()) == (0 if rank else 2)
    monkeypatch.delenv("RANK")  # left behind by something else
    assert cli("--list", "--output-dir", finished).out.count("teacher-s0") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="a name that is not UTF-8")
def test_a_file_gets_paths_as_they_are_whatever_the_locale(finished, images, tmp_path):
    odd = os.fsencode(tmp_path / "日本") + b"\xff.png"
    shutil.copy(images / "test" / "red" / "00.png", odd)
    words = ["--predict", odd, "--output-dir", finished, "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, ROOT / "main.py", *words], env=environment, stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout.splitlines()[1].startswith(odd + b",")


def test_files_folders_and_a_named_model(cli, finished, images, tmp_path):
    """Any mixture is taken, in the order given; only folders that are named, and those inside, are read as labels."""
    odd = tmp_path / "red" / 'a "b", c\n.png'
    odd.parent.mkdir()
    shutil.copy(images / "test" / "red" / "00.png", odd)
    inner = tmp_path / "red" / "mixed"
    shutil.copytree(images / "test" / "blue", inner / "deep")
    (inner / "deep" / "notes.txt").write_text("not an image")
    (inner / "deep" / ".hidden.png").write_bytes(b"")
    result = cli("--predict", inner, "--predict", odd, "--model", finished / "teacher-s0", "--device", "cpu")
    assert result.status == 0
    assert [each["path"] for each in rows(result.out)] == [*map(str, sorted(inner.rglob("[0-9]*.png"))), str(odd)]
    assert "of 1 images" in result.err
    assert rows(cli("--predict", odd, "--model", finished / "teacher-s0" / "model.pt").out)[0]["path"] == str(odd)


def test_the_nearest_folder_named_like_a_class_counts(cli, finished, images, tmp_path):
    place = tmp_path / "red" / "blue" / "of today"
    shutil.copytree(images / "train" / "blue", place)
    got = cli("--model", finished / STUDENT, "--predict", place.parent.parent)
    rows = list(csv.reader(io.StringIO(got.out)))[1:]
    blue = sum(row[1] == "blue" for row in rows)
    assert blue > 0 and f"named like the class: {blue / 16:.4f} ({blue} of 16 images)" in got.err


def test_what_cannot_be_decoded_is_named_and_the_others_go_on(cli, finished, images, tmp_path):
    folder = tmp_path / "some"
    shutil.copytree(images / "test" / "red", folder)
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:60])
    (folder / "04.png").write_bytes(b"")
    result = cli("--predict", folder, "--output-dir", finished)
    assert result.status == 1
    assert len(rows(result.out)) == 6
    first, second, last = result.err.splitlines()
    assert str(folder / "03.png") in first
    assert str(folder / "04.png") in second
    assert last == "error: 2 of 8 images could not be decoded; they are named above."


def test_large_images_of_any_mode(cli, finished, tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        Image.new(mode, (300, 200)).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    result = cli("--predict", tmp_path, "--output-dir", finished)
    assert result.status == 0
    assert len(rows(result.out)) == 5


def test_refused(cli, finished, copy, images, tmp_path):
    def says(*words):
        result = cli(*words)
        assert result.status == 1
        assert not result.out
        return result.err

    photo = images / "test" / "red" / "00.png"
    (tmp_path / "empty").mkdir()
    assert "holds no image" in says("--predict", tmp_path / "empty", "--output-dir", finished)
    assert "does not exist" in says("--predict", tmp_path / "none.png", "--output-dir", finished)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "is a named pipe" in says("--predict", tmp_path / "pipe", "--output-dir", finished)
    assert "no finished distilled student" in says("--predict", photo, "--output-dir", tmp_path / "empty")
    assert "does not exist" in says("--predict", photo, "--model", tmp_path / "none")
    assert "holds no model.pt" in says("--predict", photo, "--model", tmp_path / "empty")
    assert str(finished / STUDENT) in says("--predict", photo, "--model", finished)
    shutil.copytree(copy / STUDENT, copy / "kd-T2-a0.1-s0")
    several = says("--predict", photo, "--output-dir", copy)
    assert str(copy / STUDENT) in several
    assert str(copy / "kd-T2-a0.1-s0") in several
    (copy / STUDENT / "model.pt").unlink()
    assert "unfinished (epoch 2 of 2)" in says("--predict", photo, "--model", copy / STUDENT)
    model = copy / "baseline-s0" / "model.pt"
    save_checkpoint(model, load_checkpoint(model) | {"format": 1})
    assert "a model of another version of this program" in says("--predict", photo, "--model", model)
    model.write_bytes(model.read_bytes()[:-100])
    assert "is damaged" in says("--predict", photo, "--model", model)
    shutil.rmtree(copy / "kd-T2-a0.1-s0")
    assert str(copy / "teacher-s0") in says("--predict", photo, "--output-dir", copy)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--predict"], "expected at least one argument"),
        (["--predict", ""], "the path is empty"),
        (["--predict", "a.png", "--epochs", "3"], "--epochs cannot be combined with --predict"),
        (["--predict", "a.png", "--precision", "bf16"], "--precision cannot be combined with --predict"),
        (["--predict", "a.png", "--temperature", "1", "2"], "several temperatures cannot be combined with --predict"),
        (["--predict", "a.png", "--train-teacher"], "--train-teacher cannot be combined with --predict"),
        (["--predict", "a.png", "--report"], "cannot be combined with --report"),
        (["--list", "--export"], "--export cannot be combined with --list"),
        (["--export", "--temperature", "2", "3"], "several temperatures cannot be combined with --export"),
        (["--model", "outputs"], "--model is for --predict and --export"),
    ],
)
def test_what_does_not_go_together(cli, words, named):
    result = cli(*words)
    assert (result.status, result.out) == (2, "")
    assert named in result.err


def test_neither_a_missing_image_nor_a_list_needs_pytorch(finished):
    code = "import sys, main; from runs.command import exit_status\n"
    code += "for words in (['--predict', 'none.png'], ['--list']):\n"
    code += "    print(exit_status(main.main, [*words, '--output-dir', sys.argv[1]]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, finished], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\n0 False\n" in done.stdout and done.stdout.startswith("1 False\n"), done


def test_models_load_is_the_way_into_pytorch(finished, images):
    """What its docstring says: answers, and training further."""
    network = models.load(finished / STUDENT / "model.pt")
    paths = sorted((images / "test").rglob("*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))
    with torch.inference_mode():
        logits = network(network.normalize(pixels))
    np.testing.assert_allclose(logits, np.load(finished / STUDENT / "test_logits.npy"), atol=1e-4)
    optimizer = torch.optim.SGD(network.train().parameters(), lr=1e-3)
    labels = torch.arange(3).repeat_interleave(8)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(network(network.normalize(pixels)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def finishes_once(folder, read_json):
    """`read_json`, which at its first look at the run in `folder` says what that was before it finished."""
    looks = []

    def read(path, kind):
        record = read_json(path, kind)
        if path == folder / "run.json":
            looks.append(path)
            if len(looks) == 1:
                return replace(record, finished=False, accuracy=None)
        return record

    return read


def test_list(cli, finished, copy, tmp_path, monkeypatch):
    lines = cli("--list", "--output-dir", finished).out.splitlines()
    assert lines[0].split() == ["run", "epochs", "accuracy", "last", "written", "on"]
    assert [line.split()[0] for line in lines[1:]] == ["baseline-s0", STUDENT, "teacher-s0"]
    accuracy = models.load(finished / STUDENT / "model.pt").accuracy
    assert lines[2].split()[1:5] == ["2", "of", "2", f"{accuracy:.4f}"]
    assert lines[2].endswith(", fp32")

    (copy / "baseline-s0" / "model.pt").unlink()
    model = copy / STUDENT / "model.pt"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    (copy / "teacher-s0" / "run.json").write_text("{")
    unfinished, flipped, broken = cli("--list", "--output-dir", copy).out.splitlines()[1:]
    assert "2 of 2  unfinished" in unfinished
    assert f"DAMAGED: {model} is damaged: the checksum" in flipped
    assert f"DAMAGED: {copy / 'teacher-s0' / 'run.json'} is damaged" in broken

    logits, wrong = copy / STUDENT / "test_logits.npy", np.zeros((24, 3), np.float32)
    model.write_bytes((finished / STUDENT / "model.pt").read_bytes()), np.save(logits, wrong)
    os.utime(model, (0, 86_400 * 20_000)), os.utime(copy / STUDENT / "run.json", (0, 86_400 * 10_000))
    flipped = cli("--list", "--output-dir", copy).out.splitlines()[2]
    assert "  2024-10-0" in flipped and f"DAMAGED: {logits}" in flipped

    monkeypatch.setattr(listing, "read_json", finishes_once(copy / "baseline-s0", listing.read_json))
    (copy / "baseline-s0" / "model.pt").write_bytes((finished / "baseline-s0" / "model.pt").read_bytes())
    now = cli("--list", "--output-dir", copy).out.splitlines()[1]
    assert now.startswith("baseline-s0") and "DAMAGED" not in now and "2 of 2  0." in now

    (tmp_path / "empty").mkdir()
    assert cli("--list", "--output-dir", tmp_path / "empty").out == f"{tmp_path / 'empty'} holds no runs.\n"
    nowhere = cli("--list", "--output-dir", tmp_path / "nowhere")
    assert (nowhere.status, nowhere.out) == (1, "")
    assert not (tmp_path / "nowhere").exists()
