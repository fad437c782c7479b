"""What the tests share: small images in folders, a finished output folder, and the command line in this process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is expected here is what a CPU computes
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # PyTorch's threads share the cores with them
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // workers)))

LONGEST = ("test_group.py", "test_crash.py", "test_sweep.py")
CLASSES = ("blue", "green", "red")


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin with the files of the most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The longest files first, so that no core is idle at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def make_images(directory, train=16, test=8, size=16):
    """`directory`/{train,test}/CLASS/NN.png: noise whose class is its colour, faintly."""
    random = np.random.default_rng(5)
    for split, count in (("train", train), ("test", test)):
        for channel, name in zip((2, 1, 0), CLASSES, strict=True):
            folder = Path(directory) / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 200, (size, size, 3))
                pixels[..., channel] += 35
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.png")
    return Path(directory)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A image folder of three classes; not to be changed."""
    return make_images(tmp_path_factory.mktemp("images"))


class Result:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err

    def __repr__(self):
        return f"status {self.status}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


@pytest.fixture
def cli(capfd):
    """Runs main.py's command line in this process, as a person types it; returns status, stdout and stderr."""
    import main
    from runs.command import exit_status

    def run(*words):
        capfd.readouterr()
        try:
            status = exit_status(main.main, [str(word) for word in words])
        except SystemExit as end:
            status = end.code
        return Result(status, *capfd.readouterr())

    return run


def leave_out(patch):
    """Leaves out what takes longer than all the rest of a small command: figures, and how fast the networks are."""
    import runs.speed
    from reports import figures

    patch.setattr(figures, "draw", lambda comparison: [])
    patch.setattr(runs.speed, "SPEED_SECONDS", 0)


@pytest.fixture(autouse=True)
def nothing_slow(request, monkeypatch):
    if not request.node.get_closest_marker("draws"):
        leave_out(monkeypatch)


@pytest.fixture(scope="session")
def flags(images):
    """What makes a command small: 48 images of 16x16, 2 epochs of 3 steps in float32 on the CPU."""
    return ("--dataset", "folder", "--data-dir", images, "--image-size", 16, "--epochs", 2, "--batch-size", 16,
            "--device", "cpu", "--precision", "fp32")  # fmt: skip


@pytest.fixture(scope="session")
def finished(tmp_path_factory, flags):
    """An output folder with teacher, distilled student and baseline; not to be changed (see `copy`)."""
    import main
    from runs.command import exit_status

    output = tmp_path_factory.mktemp("finished") / "out"
    for more in (["--train-teacher"], []):
        assert exit_status(main.main, [str(word) for word in (*flags, "--output-dir", output, *more)]) == 0
    return output


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished output folder that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def process(*words, **rest):
    """main.py as a process of its own: a Popen with text pipes."""
    command = [sys.executable, str(ROOT / "main.py"), *map(str, words)]
    rest = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT} | rest
    return subprocess.Popen(command, **rest)


CIFAR10_DIR = os.environ.get("CIFAR10_DIR")  # the folder that holds cifar-10-batches-py

needs_cifar10 = pytest.mark.skipif(CIFAR10_DIR is None, reason="CIFAR10_DIR does not name a folder with CIFAR-10")
