"""Images without labels: the loss, whose turn it is, the very batches of plain distillation, and what is refused."""

import csv
import dataclasses
import json
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from conftest import ROOT, leave_out
from PIL import Image
from scipy.special import log_softmax, softmax

import data
import models
import train
from arguments import parse
from data import JoinedViews, UnlabeledViews, Views
from distill import UNLABELED, Ensemble, SoftTargets, distillation_loss
from runs.command import exit_status
from runs.files import Damaged
from runs.machine import Machine
from runs.progress import Options, Progress
from runs.run import Run
from runs.settings import Settings
from sources import survey, unlabeled

pytestmark = pytest.mark.usefixtures("nothing_slow")

NAME = "kd-unlabeled-T4-a0.9-s0"


def write_noise(folder, count, size=16, seed=9):
    """`count` images of noise in two folders below `folder`."""
    random = np.random.default_rng(seed)
    for number in range(count):
        place = folder / ("a" if number % 3 else "b/c")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(place / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 100 images without labels; not to be changed."""
    return write_noise(tmp_path_factory.mktemp("photos"), 100)


@pytest.fixture(scope="module")
def words(flags, photos):
    return (*flags, "--alpha", 0.9, "--unlabeled", photos)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, finished, words):
    """An output folder with two pairs of students and those with images without labels; not to be changed."""
    import main

    output = Path(shutil.copytree(finished, tmp_path_factory.mktemp("taught") / "out"))
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch)
        command = [str(word) for word in (*words, "--output-dir", output, "--seeds", 2)]
        assert exit_status(main.main, command) == 0
    return output


def digest(path):
    return models.digest(models.load(path / "model.pt").state_dict())


# The loss and the views -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_soft_targets_count_for_all_images_and_labels_for_those_that_have_one(alpha, smoothing):
    random = np.random.default_rng(0)
    student, teacher = random.normal(0, 3, (2, 5, 4))
    labels = np.array([2, UNLABELED, 0, UNLABELED, UNLABELED])
    p, log_p, log_q = softmax(teacher / 3, 1), log_softmax(teacher / 3, 1), log_softmax(student / 3, 1)
    soft = 9 * (p * (log_p - log_q)).sum() / 5
    log_q = log_softmax(student, 1)
    target = np.eye(4)[[2, 0]] * (1 - smoothing) + smoothing / 4
    hard = -(target * log_q[[0, 2]]).sum() / 2
    got = distillation_loss(
        torch.tensor(student), torch.tensor(labels), torch.tensor(teacher), 3, alpha, label_smoothing=smoothing
    )
    assert got.item() == pytest.approx(alpha * soft + (1 - alpha) * hard, rel=1e-5)


@pytest.mark.parametrize(("images", "count"), [(10, 4), (10, 10), (3, 8), (1, 2)])
def test_all_images_have_their_turn_before_one_comes_again(images, count):
    pixels = torch.arange(images, dtype=torch.uint8)[:, None, None, None].expand(-1, 16, 16, 3).contiguous()
    views = UnlabeledViews(pixels, (0, 0, 0), (1, 1, 1), padding=2, count=count)
    seen = [views.batch(epoch, torch.arange(count)) for epoch in range(10)]
    shown = torch.cat(seen)[:, 0, 0, 0].mul(255).round().int().tolist()  # each image is of one colour
    whole = len(shown) // images * images
    turns = np.reshape(shown[:whole], (-1, images))
    assert (np.sort(turns, 1) == np.arange(images)).all()
    assert images < 10 or len({*map(tuple, turns)}) == len(turns)  # each time in another order
    again = UnlabeledViews(pixels, (0, 0, 0), (1, 1, 1), padding=2, count=count)
    assert torch.equal(again.batch(7, torch.tensor([count - 1, 0])), seen[7][[count - 1, 0]])  # of the epoch alone


def test_a_batch_holds_the_labeled_views_and_then_the_others():
    random = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, 256, (n, 16, 16, 3), generator=random, dtype=torch.uint8) for n in (6, 9))
    views = Views(first, (0.5,) * 3, (0.2,) * 3, padding=2)
    others = UnlabeledViews(second, (0.5,) * 3, (0.2,) * 3, padding=2, count=4, cutout=6)
    batch = JoinedViews(views, others, 2).batch(3, torch.tensor([5, 1, 6 + 2, 6 + 0]))
    assert torch.equal(batch[:2], views.batch(3, torch.tensor([5, 1])))
    assert torch.equal(batch[2:], others.batch(3, torch.tensor([2, 0])))
    assert (batch == 0).all(1).sum((1, 2)).tolist() == [0, 0, 36, 36]
    assert batch.is_contiguous(memory_format=torch.channels_last)


# Training and comparing ----------------------------------------------------------------------------------------------


def test_images_without_labels_are_moved_and_cut_out_as_the_others_are(cli, words, finished, tmp_path, monkeypatch):
    """For the teacher and for the student."""
    asked, batch = [], Views.batch

    def recorded(views, *rest):
        asked.append((type(views), views.padding, views.cutout))
        return batch(views, *rest)

    monkeypatch.setattr(Views, "batch", recorded)
    more = ("--teacher", finished / "teacher-s0", "--padding", 0, "--cutout", 6, "--epochs", 1)
    assert cli(*words, *more, "--output-dir", tmp_path).status == 0
    assert set(asked) == {(Views, 0, 6), (UnlabeledViews, 0, 6)}


def test_plain_distillation_and_baseline_are_those_without_the_option(cli, flags, taught, copy):
    assert cli(*flags, "--output-dir", copy, "--alpha", 0.9).status == 0
    for name in ("kd-T4-a0.9-s0", "baseline-s0"):
        assert digest(taught / name) == digest(copy / name) != digest(taught / NAME)


def test_the_comparison_has_all_three(cli, taught):
    text, found = cli("--report", "--output-dir", taught).out, json.loads((taught / "comparison.json").read_text())
    assert "- Images without labels: 100\n" in text and "Gain with KD with images without labels: " in text
    ours, plain, *_ = found["kd"]
    assert ours["unlabeled"] == found["settings"]["unlabeled"] and len(ours["unlabeled"]) == 64
    assert "unlabeled" not in plain and ours["seeds"] == plain["seeds"] == [0, 1]
    gains = [100 * (a - b) for a, b in zip(ours["accuracies"], plain["accuracies"], strict=True)]
    assert plain["first_over_this"]["by_seed"] == pytest.approx(gains)
    assert "unlabeled, T=4, alpha=0.9 over plain T=4, alpha=0.9" in text
    assert "unlabeled, T=4, alpha=0.9" in (taught / "report.html").read_text()


def test_a_step_takes_the_batch_of_plain_distillation_and_as_many_others(cli, words, finished, tmp_path, monkeypatch):
    seen, train_one_epoch, labels_seen = {}, train.train_one_epoch, []

    class Recorded:
        def __init__(self, views, batches):
            self.views, self.batches = views, batches

        def batch(self, epoch, indices):
            images = self.views.batch(epoch, indices)
            self.batches.append((epoch, images))
            return images

    def record(model, optimizer, views, labels, order, *rest):
        recorded = Recorded(views, seen.setdefault(rest[-1].run.name, []))
        if rest[-1].run.name == NAME:
            labels_seen.append(labels[order])
        train_one_epoch(model, optimizer, recorded, labels, order, *rest)

    monkeypatch.setattr(train, "train_one_epoch", record)
    assert cli(*words, "--output-dir", tmp_path, "--teacher", finished / "teacher-s0").status == 0
    ours, plain = seen[NAME], seen["kd-T4-a0.9-s0"]
    assert len(ours) == len(plain) == 6
    for (epoch, both), (plain_epoch, images) in zip(ours, plain, strict=True):
        assert epoch == plain_epoch and len(both) == 32 and torch.equal(both[:16], images)
    unlabeled_views = [view for _, both in ours for view in both[16:]]
    assert len({view.numpy().tobytes() for view in unlabeled_views}) == 96  # of 100 images: none twice
    for labels in labels_seen:
        assert (labels.view(3, 32)[:, 16:] == UNLABELED).all() and (labels.view(3, 32)[:, :16] >= 0).all()


def test_the_training_accuracy_is_over_images_with_labels(cli, words, finished, tmp_path, monkeypatch):
    right, add = [], Progress.add

    def watched(progress, loss, logits, labels):
        if progress.run.name == NAME:
            right.append((logits.argmax(1) == labels)[labels != UNLABELED].float().mean().item())
        add(progress, loss, logits, labels)

    monkeypatch.setattr(Progress, "add", watched)
    assert cli(*words, "--output-dir", tmp_path, "--teacher", finished / "teacher-s0").status == 0
    with open(tmp_path / NAME / "history.csv", newline="") as file:
        found = [float(row["train_accuracy"]) for row in csv.DictReader(file)]
    assert found == pytest.approx(np.reshape(right, (2, 3)).mean(1)) and min(found) > 0


def test_an_interrupted_run_resumes_to_the_same_bits(cli, words, finished, taught, tmp_path, monkeypatch):
    command, steps = (*words, "--output-dir", tmp_path, "--teacher", finished / "teacher-s0"), []
    batch = JoinedViews.batch

    def interrupted(self, epoch, indices):
        steps.append(epoch)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, epoch, indices)

    monkeypatch.setattr(JoinedViews, "batch", interrupted)
    got = cli(*command)
    assert got.status == 143 and f"{NAME}; its state after epoch 1 of 2 and step 2 of 3 of the next is saved" in got.err
    assert cli(*command).status == 0 and steps == [0, 0, 0, 1, 1, 1]
    assert digest(tmp_path / NAME) == digest(taught / NAME)
    assert (tmp_path / NAME / "test_logits.npy").read_bytes() == (taught / NAME / "test_logits.npy").read_bytes()


def test_the_teacher_is_asked_about_each_of_these_views_once(cli, words, taught, tmp_path):
    """A repeated command reads what is kept; targets of other images or of another batch size are others."""
    before = sorted(path.relative_to(taught) for path in taught.glob("targets/*/*"))
    output = Path(shutil.copytree(taught, tmp_path / "out"))
    shutil.rmtree(output / NAME)
    assert cli(*words, "--output-dir", output).status == 0 and digest(output / NAME) == digest(taught / NAME)
    assert sorted(path.relative_to(output) for path in output.glob("targets/*/*")) == before
    shutil.copytree(output / "targets", tmp_path / "other" / "targets")
    got = cli(*words, "--output-dir", tmp_path / "other", "--batch-size", 10, "--teacher", taught / "teacher-s0")
    assert got.status == 0 and "damaged" not in got.err  # 40 images an epoch, not 48


def test_other_images_are_another_run(cli, flags, taught, tmp_path):
    others = write_noise(tmp_path / "photos", 20, seed=1)
    got = cli(*flags, "--alpha", 0.9, "--unlabeled", others, "--output-dir", taught)
    assert got.status == 1 and "other images without labels" in got.err and "--overwrite" in got.err
    output = Path(shutil.copytree(taught, tmp_path / "out"))
    shutil.rmtree(output / NAME.replace("s0", "s1"))
    got = cli(*flags, "--alpha", 0.9, "--unlabeled", others, "--output-dir", output, "--seed", 1)
    assert got.status == 0 and got.out.count("KD, unlabeled, T=4, alpha=0.9") == 3  # a row in each of three tables
    assert "is seen 4.8 times" in got.out  # 2 epochs of 48


def test_the_table_of_runs_tells_them_apart(taught):
    with open(taught / "comparison.csv") as file:
        rows = {row["run"]: row["unlabeled"] for row in csv.DictReader(file)}
    found = json.loads((taught / "comparison.json").read_text())["settings"]["unlabeled"]
    assert rows[NAME] == found[:16] and rows["kd-T4-a0.9-s0"] == rows["baseline-s0"] == ""


def test_the_teacher_that_is_missing_is_trained_without_options_of_these_images(cli, photos, tmp_path):
    words = ("--dataset", "shapes", "--alpha", 0.9, "--unlabeled", photos, "--skip-damaged", "--output-dir", tmp_path)
    got = cli(*words)
    assert got.status == 1 and "main.py --train-teacher" in got.err and "--skip-damaged" not in got.err, got


def test_an_epoch_of_twice_the_images_counts_twice_for_the_time_left(images, photos, tmp_path):
    loaded = data.with_unlabeled(data.load("folder", data_dir=images, image_size=16), photos)
    settings = Settings(role="kd", data=loaded.digest, epochs=2, batch_size=16, learning_rate=0.05, weight_decay=0.0,
                        seed=0, image_size=16, temperature=4.0, alpha=0.9, teacher="t",
                        unlabeled=loaded.unlabeled.digest)  # fmt: skip
    teacher, tally = Mock(epoch=lambda *_: torch.zeros(48, 3)), Mock()
    teacher.unlabeled.epoch = lambda *_: torch.zeros(48, 3)
    machine = Machine(torch.device("cpu"))
    train.train(Run(tmp_path / "run", settings), loaded, machine, Options(), teacher=teacher, tally=tally)
    assert tally.add.call_args_list == [call("started"), call("epochs", 2), call("epochs", 2), call("done")]


def test_a_group_computes_the_targets_of_both_kinds_of_images_before_they_are_needed(tmp_path):
    """In turn, so that no two processes write the same file."""
    network, machine, images = models.create("student", 3, seed=0).eval(), Machine(torch.device("cpu")), torch.zeros
    views = Views(images(6, 16, 16, 3, dtype=torch.uint8), (0,) * 3, (1,) * 3, padding=2)
    others = UnlabeledViews(images(9, 16, 16, 3, dtype=torch.uint8), (0,) * 3, (1,) * 3, padding=2, count=4)
    kinds = [SoftTargets(network, "teacher", "data", each, tmp_path, machine, shared=True) for each in (views, others)]
    for kind, name in zip(kinds, ("labeled", "unlabeled"), strict=True):
        kind.folder = tmp_path / name
    asked = []
    group = Mock(agree=lambda find: find(), share=lambda targets: [targets[k] for k in asked.append(targets) or (0, 3)])
    targets = Ensemble(kinds[:1], Ensemble(kinds[1:]))
    targets.share(group, range(2))
    assert asked == [[(kinds[0], 0), (kinds[1], 0), (kinds[0], 1), (kinds[1], 1)]]
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*"))
    assert found == ["labeled/epoch-0001.npz", "unlabeled/epoch-0002.npz"]
    assert targets.bytes_per_epoch == 2 * 3 * (6 + 4)


# The images -----------------------------------------------------------------------------------------------------------


def load_unlabeled(folder, cache=None, **rest):
    said = []
    return unlabeled.load(folder, 16, 2, cache, say=said.append, **rest), said


def test_images_in_any_folders_are_found_and_kept(photos, tmp_path, monkeypatch):
    found, said = load_unlabeled(photos, tmp_path / "data")
    assert found.images.shape == (100, 16, 16, 3) and said == [f"{photos}: 100 images without labels"]
    for name, image in zip(found.names, found.images, strict=True):
        assert np.array_equal(image, np.array(Image.open(photos / name)))
    monkeypatch.setattr(unlabeled.kept, "decode", None)  # nothing is decoded again
    again, _ = load_unlabeled(photos, tmp_path / "data")
    assert again.digest == found.digest and again.names == found.names


def test_data_that_are_no_folder_can_have_them(photos):
    plain = data.load("shapes", image_size=16)
    loaded = data.with_unlabeled(plain, photos)
    assert len(loaded.unlabeled.images) == 100 and loaded.digest == plain.digest


def test_samples_of_16_bits_are_scaled_as_those_of_the_data_set_are(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.fromarray(np.full((16, 16), 100 * number, np.uint16)).save(tmp_path / "photos" / f"{number}.png")
    alone, said = load_unlabeled(tmp_path / "photos", tmp_path / "data")
    assert alone.images[:, 0, 0, 0].tolist() == [0, 100, 200] and "255 white" in said[1]
    ranges = {"16-bit": (0, 1023)}
    for _ in range(2):  # decoded by other ranges before; then read as kept
        scaled, said = load_unlabeled(tmp_path / "photos", tmp_path / "data", ranges=ranges)
        assert scaled.images[:, 0, 0, 0].tolist() == [0, 25, 50] and "1,023 white" in said[1]
    again, _ = load_unlabeled(tmp_path / "photos", tmp_path / "data")
    assert again.digest == alone.digest  # whatever was kept before
    bright = np.full((16, 16), 5000, np.uint16)  # of 12 bits and more, which the data set's range does not hold
    Image.fromarray(bright).save(tmp_path / "photos" / "0.png")
    for _ in range(2):
        with pytest.raises(
            Damaged, match=r"(?s)1 of 3 images .*0\.png cannot be scaled as the data set's images are: "
        ):
            load_unlabeled(tmp_path / "photos", tmp_path / "data", ranges=ranges)
        left, _ = load_unlabeled(tmp_path / "photos", tmp_path / "data", ranges=ranges, skip_damaged=True)
        assert left.images[:, 0, 0, 0].tolist() == [25, 50] and left.skipped == 1


def test_an_image_in_both_parts_is_told_as_a_test_image(images, tmp_path):
    top, photos = shutil.copytree(images, tmp_path / "top"), write_noise(tmp_path / "photos", 3)
    image = Image.new("RGB", (16, 16), "red")
    for path in (top / "train" / "red" / "more.png", top / "test" / "red" / "more.png", photos / "more.png"):
        image.save(path)
    loaded = data.with_unlabeled(data.load("folder", data_dir=top, image_size=16), photos)
    found = survey.look_at_unlabeled(loaded, tmp_path / "out", lambda line: None)
    assert (found["test_images"], found["training_images"]) == (1, 0)


def test_data_pass_their_ranges_on(images, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((16, 16), 100, np.uint16)).save(tmp_path / "photos" / "deep.png")
    Image.fromarray(np.full((16, 16), 1023, np.uint16)).save(tmp_path / "photos" / "white.png")
    loaded = data.load("folder", data_dir=images, image_size=16)
    loaded = dataclasses.replace(loaded, facts=dataclasses.replace(loaded.facts, ranges={"16-bit": (0, 2046)}))
    found = data.with_unlabeled(loaded, tmp_path / "photos").unlabeled
    assert found.images[:, 0, 0, 0].tolist() == [round(100 * 255 / 2046), round(1023 * 255 / 2046)]


def test_test_and_training_images_among_them_are_a_warning_with_a_list(
    cli, flags, words, images, photos, finished, tmp_path
):
    mixed = Path(shutil.copytree(photos, tmp_path / "photos"))
    shutil.copy(images / "test" / "red" / "01.png", mixed / "copy.png")
    for name in ("00", "02"):
        shutil.copy(images / "train" / "blue" / f"{name}.png", mixed)
    output = tmp_path / "out"
    plain = (*flags, "--alpha", 0.9, "--output-dir", output, "--teacher", finished / "teacher-s0")
    command = (*plain, "--unlabeled", mixed)
    got = cli(*command)
    warned = re.search(r"Warning: 1 of 103 images without labels are test images, too \(listed in (.*)\): ", got.out)
    listed = {line.split(" = ")[1] for line in Path(warned[1]).read_text().splitlines()}
    assert listed == {"test/red/01.png", "train/blue/00.png", "train/blue/02.png"}
    assert "Warning: 2 of 103 images without labels are training images, too (listed in" in got.out
    more = write_noise(tmp_path / "more", 20, seed=1)
    shutil.copy(images / "test" / "blue" / "03.png", more / "copy.png")
    cli(*plain, "--unlabeled", more, "--seed", 1)
    cli(*plain)
    both = cli("--report", "--output-dir", output).out
    for count in (21, 103):
        assert f"Note that 1 of {count} images without labels are test images, too" in both
    rows = set(re.findall(r"^KD, (unlabeled.*), T=4, alpha=0.9$", both, re.MULTILINE))
    found = {json.loads(path.read_text())["settings"]["unlabeled"] for path in output.glob("kd-unlabeled-*/run.json")}
    assert rows == {f"unlabeled {digest[:8]}" for digest in found} and len(found) == 2, both
    cli(*command)
    again = cli("--report", "--output-dir", output).out
    assert "Note that 1 of 103 images without labels are test images, too" in again
    assert "Note that 2 of 103 images without labels are training images, too" in again
    clean = cli(*words, "--output-dir", tmp_path / "clean", "--teacher", finished / "teacher-s0")
    assert "Warning" not in clean.out


# What is refused ------------------------------------------------------------------------------------------------------


def test_damaged_images_are_refused_by_name_or_left_out(cli, flags, photos, finished, tmp_path):
    mixed = Path(shutil.copytree(photos, tmp_path / "photos"))
    (mixed / "a" / "broken.jpg").write_bytes(b"no image")
    command = (*flags, "--alpha", 0.9, "--unlabeled", mixed, "--output-dir", tmp_path / "out")
    command = (*command, "--teacher", finished / "teacher-s0")
    got = cli(*command)
    assert got.status == 1 and "1 of 101 images cannot be decoded" in got.err and "broken.jpg" in got.err
    assert "broken.jpg" in (tmp_path / "out/data/damaged-unlabeled.txt").read_text()
    got = cli(*command, "--skip-damaged")
    assert (
        got.status == 0 and "Left out, since they cannot be decoded: 1 of the images without labels, listed" in got.out
    )
    assert "Note that images that cannot be decoded were left out: 1 without labels." in got.out
    record = json.loads((tmp_path / "out" / NAME / "run.json").read_text())
    assert record["images"]["unlabeled"] == {
        "count": 100, "skipped": 1, "test_images": 0, "training_images": 0, "listed": None,
    }  # fmt: skip
    assert record["recorded"]["unlabeled"] == str(mixed)


def test_folders_that_hold_no_images_to_learn_from(cli, flags, images, photos, copy, tmp_path):
    empty, broken, inside = tmp_path / "empty", tmp_path / "broken", tmp_path / "inside"
    empty.mkdir()
    (empty / "clip.mp4").touch()
    broken.mkdir()
    (broken / "one.png").write_bytes(b"")
    shutil.copytree(photos, inside)
    for words, message in (
        ((tmp_path / "none", "--output-dir", copy), "none does not exist. --unlabeled needs a folder of images"),
        ((broken / "one.png", "--output-dir", copy), "one.png is no folder. --unlabeled needs a folder of images"),
        ((images / "train" / "red", "--output-dir", copy), f"red is a class of {images}. Move it elsewhere"),
        ((empty, "--output-dir", copy), "empty holds no images; passed over: 1 .mp4 (videos: export single frames)."),
        ((broken, "--output-dir", copy, "--skip-damaged"), "none of the images in"),
        ((inside, "--output-dir", inside, "--teacher", copy / "teacher-s0"), "Name another --output-dir."),
    ):
        got = cli(*flags, "--alpha", 0.9, "--unlabeled", *words)
        assert got.status == 1 and message in got.err, got


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--train-teacher",), "--unlabeled is for students and cannot be combined with --train-teacher"),
        (("--alpha", "0"), "--unlabeled needs an --alpha above 0"),
        (("--alpha", "0.1", "0.9"), "--unlabeled is compared at one temperature and alpha"),
        (("--loss", "own.py:loss"), "--unlabeled is for the loss of distill.py"),
        (("--omit-class", "red"), "--unlabeled may show students the classes of --omit-class"),
        (("--report",), "--unlabeled cannot be combined with --report"),
    ],
)
def test_what_does_not_go_together(cli, words, message):
    got = cli("--unlabeled", "photos", *words)
    assert got.status == 2 and message in got.err


def test_output_folders_among_them_are_passed_over(photos, finished, tmp_path):
    """So the same command can be repeated once there are figures; also where a link leads there."""
    mixed = Path(shutil.copytree(photos, tmp_path / "photos"))
    shutil.copytree(finished, mixed / "earlier")
    (mixed / "link").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "figures").mkdir(parents=True)
    shutil.copy(next(mixed.glob("a/*.png")), tmp_path / "out" / "figures" / "gain.png")
    found, said = load_unlabeled(mixed, tmp_path / "out" / "data")
    assert len(found.names) == 100 and said[0].endswith("passed over: 2 folder(s) where this program writes")


def test_the_data_are_the_same_with_and_without(images, photos):
    """So a teacher that was trained before serves, and a baseline is reused."""
    plain = data.load("folder", data_dir=images, image_size=16)
    more = data.with_unlabeled(plain, photos)
    assert plain.digest == more.digest and plain.unlabeled is None and len(more.unlabeled.images) == 100
    assert torch.equal(plain.train_images, more.train_images) and plain.mean == more.mean


# The benchmark --------------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(images, tmp_path, monkeypatch):
    """benchmarks/unlabeled.py with few images: what it wrote and the commands it would run, for more of its words."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import unlabeled as benchmark

    small = data.load("folder", data_dir=images, image_size=16)
    monkeypatch.setattr(data, "load", lambda *_, **__: small)
    typed, output = [], tmp_path / "out"

    def run(words, **_):
        typed.append([str(word) for word in words[1:]])
        if "--output-dir" in typed[-1]:
            place = Path(parse(typed[-1][1:]).output_dir)
            place.mkdir(exist_ok=True)
            (place / "comparison.json").write_text(place.name)
            for name in ("kd-T32-a0.9-s0", "baseline-s1", "teacher-s0"):
                (place / name).mkdir(exist_ok=True)
        return Mock(returncode=0)

    def typed_with(*more):
        words = ["unlabeled.py", "--output-dir", output, "--results", tmp_path / "results", "--fraction", "0.25"]
        words += [*more, "--epochs", "3", "--seeds", "2", "--", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        benchmark.main()
        return typed

    monkeypatch.setattr("commands.subprocess.run", run)
    return SimpleNamespace(typed_with=typed_with, output=output, images=small)


def written(folder):
    """{"train": {path: image}, …} of what the benchmark wrote to `folder`."""
    found = {}
    for split in ("train", "test", "unlabeled/same", "unlabeled/other"):
        paths = folder.glob(f"{split}/**/*.png")
        found[split] = {path.relative_to(folder).as_posix(): np.array(Image.open(path)) for path in paths}
    return found


def compared(command):
    """The groups of runs after --over."""
    return [command[place + 1] for place, word in enumerate(command) if word == "--over"]


def test_the_benchmark_takes_labels_away_and_trains_all_that_it_compares(benchmark, tmp_path):
    teacher, students, longer, difference = benchmark.typed_with()
    output, folder, small = benchmark.output, benchmark.output / "images-0.25", benchmark.images
    pixels = written(folder)
    assert [len(found) for found in pixels.values()] == [12, 24, 36, 0]
    assert all(len([*(folder / "train" / name).iterdir()]) == 4 for name in small.classes)
    for name, image in (pixels["train"] | pixels["unlabeled/same"]).items():
        number, label = int(Path(name).stem), Path(name).parent.name
        assert np.array_equal(image, small.train_images[number].numpy())
        assert label in ("same", small.classes[small.train_labels[number]])

    for command, epochs in ((teacher, 6), (students, 3), (longer, 6)):
        parsed = parse(command[1:])
        assert (parsed.epochs, parsed.data_dir, parsed.device) == (epochs, str(folder), "cpu")
        assert parsed.unlabeled == (str(folder / "unlabeled" / "same") if command == students else None)
        pair = ([32.0], [0.9], 2) if command != teacher else ([4.0], [0.1], 1)
        assert (parsed.temperature, parsed.alpha, parsed.seeds) == pair
    assert parse(students[1:]).teacher == parse(longer[1:]).teacher == [str(output / "teacher-s0")]
    assert difference[1] == str(output / "kd-unlabeled-T32-a0.9-s*")
    names = ("kd-T32-a0.9-s*", "baseline-s*")
    assert compared(difference) == [str(place / name) for place in (output, output / "longer") for name in names]
    assert (tmp_path / "results" / "longer.json").read_text() == "longer"


def test_the_benchmark_tries_images_of_other_classes(benchmark, tmp_path):
    _, same, other, longer, difference, of_other = benchmark.typed_with("--classes", "red", "blue")
    output, folder, small = benchmark.output, benchmark.output / "images-0.25-red-blue", benchmark.images
    pixels = written(folder)
    assert [len(found) for found in pixels.values()] == [8, 16, 16, 16]  # of the 24 without labels of red and blue 16
    for name in pixels["unlabeled/same"] | pixels["unlabeled/other"]:
        label = small.classes[small.train_labels[int(Path(name).stem)]]
        assert (label in ("red", "blue")) == ("same" in name)
    assert {path.name for path in [*folder.glob("train/*"), *folder.glob("test/*")]} == {"red", "blue"}

    for command, place in ((same, output), (other, output / "other")):
        parsed = parse(command[1:])
        assert (parsed.output_dir, parsed.epochs) == (str(place), 3)
        assert parsed.unlabeled == str(folder / "unlabeled" / ("other" if command == other else "same"))
    assert parse(longer[1:]).unlabeled is None
    assert (output / "other" / "baseline-s1").is_dir() and not (output / "other" / "longer").exists()
    name = "kd-unlabeled-T32-a0.9-s*"
    assert of_other[1] == str(output / "other" / name)
    assert compared(of_other) == [str(output / name), *compared(difference)]
    results = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert results == ["comparison.json", "longer.json", "other.json"]  # the fourth and fifth are difference.py's
