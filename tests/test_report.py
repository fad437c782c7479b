"""The report of output folders written by hand, against results worked by hand."""

import base64
import csv
import io
import itertools
import json
import math
import re
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import CLASSES, process

from reports import accuracy, calibration, fidelity, figures, records, report
from reports.accuracy import points
from reports.comparison import Comparison
from reports.html import page
from reports.statistics import interval_with_images, paired_test, seeds_needed
from reports.text import block, claim, details, table
from runs.code import CODE
from runs.files import Damaged, Failure, load_arrays, save_array, save_arrays, write, write_json
from runs.settings import Costs, RunRecord, Settings

DATA, TEACHER = "d" * 64, "e" * 64  # digests
LABELS = np.arange(24) % 3
POINT = 100 / 24  # an image of 24, in percentage points
HISTORY = "epoch,train_loss,train_accuracy\n1,1.5,0.5\n2,0.9,0.6\n"


def logits_of(right, sure, wrong=1):
    """Logits (24, 3): `sure` for the class that is answered, 0 for others; `right` tells (or counts) the right ones."""
    right = np.arange(24) < right if isinstance(right, int) else right
    return (sure * np.eye(3)[np.where(right, LABELS, (LABELS + wrong) % 3)]).astype(np.float32)


class Folder:
    """An output folder written by hand: 24 test images of three classes and a teacher that is right on 22."""

    def __init__(self, path):
        self.path = path
        images = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
        records.save_test_set(path, DATA, images, LABELS, CLASSES)
        records.save_teacher_logits(path, TEACHER, DATA, lambda: torch.from_numpy(logits_of(22, 5.0)))

    def add(self, role, right, temperature=None, alpha=None, seed=0, *, sure=3.0, wrong=1, environment=None, **rest):
        """Adds a finished run that is `right` on so many images, or on those; of a sweep if it has a val_fraction.
        Returns the path of its run.json."""
        settings = {
            "role": role, "data": DATA, "epochs": 2, "batch_size": 16, "learning_rate": 0.1, "weight_decay": 0.0,
            "seed": seed, "image_size": 16, "temperature": temperature, "alpha": alpha,
            "teacher": TEACHER if role == "kd" else None,
        }  # fmt: skip
        settings = Settings(**(settings | rest))
        run = self.path / ("selection" if settings.val_fraction else "") / settings.name
        run.mkdir(parents=True)
        share = int(np.sum(right)) / 24
        if settings.val_fraction:
            results = {"val_accuracy": share}
        else:
            digest = save_array(run / "test_logits.npy", logits_of(right, sure, wrong))
            results = {"accuracy": share, "test_logits_sha256": digest}
        costs = {"teacher": Costs(9, 90), "student": Costs(1, 10)}
        made = {"device": "CPU", "precision": "fp32"} | (environment or {})
        record = RunRecord(True, 2, settings, made, {}, seconds=1.5, costs=costs, **results)
        write_json(run / "run.json", {name: value for name, value in asdict(record).items() if value is not None})
        write(run / "history.csv", HISTORY)
        (run / "model.pt").touch()
        return run / "run.json"


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "out")


def rewrite(path, change):
    """Changes the content of a JSON file by a function."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# Words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.254, "0.25"), (-0.254, "-0.25"), (-0.001, "0.00"), (0.0, "0.00"), (12.345, "12.35"), (-3.0, "-3.00")],
)
def test_gains_in_points(value, text):
    assert points(value) == text


def claim_of(gains, images=10_000, wide=None):
    return claim(paired_test(gains) | {"by_seed": gains, "ci95_with_images": wide}, len(gains), images)


def test_one_pair_of_students_claims_nothing_about_distillation():
    text = claim({"mean": 0.3, "ci95": None, "p_value": 0.41, "fixed": 60, "broken": 50, "by_seed": [0.3]}, 1, 10_000)
    assert "These two networks: of 10,000 test images, distillation corrects 60 and breaks 50" in text
    assert "exact McNemar test, p = 0.41" in text and "says nothing about distillation itself" in text


def test_a_gain_that_is_shown():
    text = claim_of([1.0, 1.1, 0.9])
    assert "Distillation improves this student's accuracy" in text and "+1.00 points" in text and "n = 3 seeds" in text
    assert "Distillation worsens this student's accuracy" in claim_of([-1.0, -1.1, -0.9])


def test_a_gain_that_is_shown_on_these_test_images_alone():
    text = claim_of([1.0, 1.1, 0.9], 100, [-0.4, 2.4])
    assert "For other test images as well: -0.40 to +2.40 points." in text and "not shown: more test images" in text
    assert "Distillation improves this student's accuracy, with this teacher and recipe, on these test images;" in text
    text = claim_of([1.0, 1.1, 0.9], 10_000, [0.6, 1.4])
    assert "and recipe.\n(Both intervals cover" in text and "not shown" not in text
    gains = [1.0, 1.1, 0.9]
    text = claim_of(gains, 10_000, paired_test(gains)["ci95"])  # of so many images that they add nothing
    assert "For other" not in text and "covers other initial weights, orders of images and test images, for" in text


def test_a_gain_that_is_not_shown_says_how_many_seeds_would_show_one():
    gains = [0.5, -0.5, 0.1]
    text, needed = claim_of(gains), seeds_needed(np.std(gains, ddof=1))
    assert f"No difference can be shown with 3 seeds; about {needed} would show a gain of 0.25 points" in text
    assert "other initial weights and orders of images" in text and "improves" not in text
    assert "more than half a million would show a gain" in claim_of([500.0, -500.0])
    assert "; a gain of 0.25 points lies above the interval." in claim_of([0.1, -0.1] * 20)
    assert "; a gain of 0.25 points lies within the interval." in claim_of([0.0, 0.3, 0.02, 0.28, 0.14])


def test_equal_gains_have_no_interval():
    assert claim_of([0.5, 0.5]) == "All 2 seeds gain exactly +0.50 points, so no interval can be computed."


def test_no_seeds_are_asked_for_to_show_a_gain_that_lies_above_the_interval():
    assert "with 3 seeds; a gain of 0.25 points lies above the interval." in claim_of([-0.4, -0.1, -0.2])


def test_the_printed_block(folder):
    folder.add("kd", 20, 4.0, 0.1), folder.add("baseline", 15)
    assert block(Comparison(folder.path)) == (
        "Training Parameters:\n- Temperature: 4.0\n- Alpha: 0.1\n- Epochs: 2\n- Batch Size: 16\n\n"
        "Final Test Accuracies:\n- Teacher Network: 0.9167\n- Student Network (with KD): 0.8333\n"
        "- Student Network (Baseline): 0.6250\n\nImprovement with KD: 20.83%\n"
    )


# Comparisons worked by hand ------------------------------------------------------------------------------------------


def test_the_interval_pairs_each_student_with_the_baseline_of_its_seed(folder):
    """Gains of 2, 1 and 7 images; with two degrees of freedom t(0.975) = 4.302653 and p = 1 - t / sqrt(t^2 + 2)."""
    for seed, (kd, baseline) in enumerate([(12, 10), (15, 14), (20, 13)]):
        folder.add("kd", kd, 4.0, 0.5, seed), folder.add("baseline", baseline, seed=seed)
    comparison = Comparison(folder.path)
    entry, error = comparison.kd[0], math.sqrt((54 - 10**2 / 3) / 2 / 3)
    got, t = entry["improvement"], 10 / 3 / error
    assert entry["seeds"] == comparison.baseline["seeds"] == [0, 1, 2]
    assert got["mean"] == pytest.approx(POINT * 10 / 3) and got["by_seed"] == pytest.approx(
        [2 * POINT, POINT, 7 * POINT]
    )
    assert got["ci95"] == pytest.approx([POINT * (10 / 3 + sign * 4.302653 * error) for sign in (-1, 1)], rel=1e-6)
    assert got["p_value"] == pytest.approx(1 - t / math.sqrt(t**2 + 2))
    assert (entry["mean"], entry["std"]) == pytest.approx((47 / 72, np.std([12 / 24, 15 / 24, 20 / 24], ddof=1)))
    right = [[np.load(comparison.output / f"{name}-s{seed}" / "test_logits.npy").argmax(1) == comparison.labels
              for seed in range(3)] for name in ("kd-T4-a0.5", "baseline")]  # fmt: skip
    assert np.sum(right, 2).tolist() == [[12, 15, 20], [10, 14, 13]]
    wide = interval_with_images(100.0 * (np.array(right[0], float) - right[1]))
    assert got["ci95_with_images"] == pytest.approx(wide) and wide[0] < got["ci95"][0] < got["ci95"][1] < wide[1]
    assert f"For other test images as well: {wide[0]:+.2f} to {wide[1]:+.2f} points." in details(comparison)


def test_without_comparison_json_seeds_of_another_teacher_are_left_out(folder):
    for seed, teacher in ((0, {}), (1, {"teacher": "f" * 64})):
        folder.add("kd", 12 + seed, 4.0, 0.5, seed, **teacher), folder.add("baseline", 10, seed=seed)
    assert Comparison(folder.path).kd[0]["seeds"] == [0]


def test_speeds_of_two_networks_with_one_beginning_are_kept_apart(tmp_path):
    one, other = ((f"my_student_network_{name}", "a" * 64) for name in ("small", "large"))
    speed = {"milliseconds": 1.0, "images_per_second": 2.0}
    measured = {who: {"fp32": speed, "bf16": speed} for who in ("teacher", "student")}
    place = {"device": "CPU", "threads": 1, "teacher_bytes": 9}
    records.save_speed(tmp_path, [TEACHER], DATA, place, "bf16", lambda: {"batch": 1} | measured, one)
    assert records.load_speed(tmp_path, [TEACHER], DATA, one) and not records.load_speed(
        tmp_path, [TEACHER], DATA, other
    )


def test_a_page_may_name_paths_that_are_not_utf_8(folder, monkeypatch, capsys):
    folder.add("kd", 20, 4.0, 0.1), folder.add("baseline", 15)
    monkeypatch.setattr(report, "page", lambda *_: "in m\udcff")
    report.report(folder.path)
    assert (folder.path / "report.html").read_bytes() == b"in m\\udcff" and "report.html" in capsys.readouterr().out


@pytest.mark.parametrize(("loss", "below"), [("dkd", 0), ("a_loss_of_a_very_long_name", 1)])
def test_a_legend_of_long_names_lies_below_the_curves(folder, loss, below):
    folder.add("kd", 20, 4.0, 0.1, loss=loss, loss_file="own.py", loss_sha256="a" * 64), folder.add("baseline", 15)
    assert len(figures.curves(Comparison(folder.path)).legends) == below


def test_losses_in_one_file_are_told_apart(folder):
    for loss in "fg":
        folder.add("kd", 20, 4.0, 0.1, loss=loss, loss_file="own.py", loss_sha256="a" * 64)
    folder.add("baseline", 15)
    comparison = Comparison(folder.path)
    students = [run for run in comparison.runs if run.settings.role == "kd"]
    assert sorted(comparison.entry_of(run)["loss"] for run in students) == ["f", "g"]
    assert all(comparison.entry_of(run)["loss"] == run.settings.loss for run in students)


def test_the_differences_of_other_ways_are_told_where_the_first_has_one_seed(folder):
    folder.add("kd", 20, 8.0, 0.1)
    for seed, (kd, baseline) in enumerate([(12, 10), (15, 14), (20, 13)]):
        folder.add("kd", kd, 4.0, 0.5, seed), folder.add("baseline", baseline, seed=seed)
    comparison = Comparison(folder.path, {"temperature": 8.0, "alpha": 0.1, "seeds": [0]})
    text = details(comparison)
    assert figures.cost(comparison).get_suptitle() == "Accuracy against cost (1 to 3 seeds, 95% intervals)"
    assert f"T=4, alpha=0.5 over baseline{'':12}{POINT * 10 / 3:+10.2f}" in text and "exact McNemar test" in text


def test_pairs_of_temperature_and_alpha_are_compared_over_the_seeds_of_both(folder):
    """The second pair has seeds 1 to 3 and shares 1 and 2 with the first: differences of 4 and -1 images. With one
    degree of freedom t(0.975) = 12.706205 and p = 1 - 2 / pi atan |t|."""
    right = {(4.0, 0.5): [12, 15, 20], (8.0, 0.1): [None, 11, 21, 24], (9.0, 0.1): [7], (None, None): [1, 2, 3, 4]}
    for pair, counts in right.items():
        for seed, count in enumerate(counts):
            if count is not None:
                folder.add("kd" if pair[0] else "baseline", count, *pair, seed)
    comparison = Comparison(folder.path)
    first, second, third = comparison.kd
    over, half = second["first_over_this"], 12.706205 * 2.5  # the standard error of 4 and -1 is 2.5
    assert "first_over_this" not in first and second["seeds"] == [1, 2, 3] and over["seeds"] == [1, 2]
    assert over["by_seed"] == pytest.approx([4 * POINT, -POINT])
    assert over["ci95"] == pytest.approx([POINT * (1.5 - half), POINT * (1.5 + half)], rel=1e-6)
    assert over["p_value"] == pytest.approx(1 - 2 / math.pi * math.atan(1.5 / 2.5))
    assert third["first_over_this"] is None  # one seed in common
    low, high = (f"{POINT * value:+.2f}" for value in (1.5 - half, 1.5 + half))
    (title, *_), *rows = accuracy.differences(comparison)
    assert [row[0] for row in rows] == [  # that of a single pair is none of them
        "T=4, alpha=0.5 over baseline", "T=8, alpha=0.1 over baseline", "T=4, alpha=0.5 over T=8, alpha=0.1"
    ]  # fmt: skip
    assert rows[2][1:] == ("+6.25", low, high, "0.66", "0.66", 2)
    sums = (41, 11**2 + 13**2 + 17**2), (47, 9**2 + 18**2 + 20**2)  # of the gains in images, and of their squares
    p = [1 - t / math.sqrt(t**2 + 2) for t in (s / math.sqrt((ss - s**2 / 3) * 3 / 2) for s, ss in sums)]
    assert [float(row[5]) for row in rows[:2]] == pytest.approx([3 * p[0], 2 * p[1]], abs=5e-5)
    text = details(comparison)
    assert title in text and "T=4, alpha=0.5 over T=8, \n" not in text and len(figures.gain(comparison).axes) == 3


def test_a_report_of_logits_made_by_hand(cli, folder):
    """The student is right on 20 images and the baseline on 15, of which 12 are the same: 8 are fixed, 3 broken, and
    McNemar's p is 2 (1 + 11 + 55 + 165) / 2^11 = 0.2266."""
    right = {"Teacher": np.arange(24) < 22, "KD, T=4, alpha=0.1": np.arange(24) < 20}
    right["Baseline"] = (np.arange(24) >= 8) & (np.arange(24) < 23)
    sure, agreement = {"Teacher": 5.0, "KD, T=4, alpha=0.1": 3.0, "Baseline": 1.0}, {}
    folder.add("kd", right["KD, T=4, alpha=0.1"], 4.0, 0.1, sure=3.0)
    folder.add("baseline", right["Baseline"], sure=1.0, wrong=2)
    agreement = {"KD, T=4, alpha=0.1": 22 / 24, "Baseline": 14 / 24}  # wrong alike on 2; right alike on 8 to 21
    got = cli("--report", "--output-dir", folder.path)
    assert got.status == 0 and "p = 0.23" in got.out, got
    improvement = json.loads((folder.path / "comparison.json").read_text())["kd"][0]["improvement"]
    assert (improvement["fixed"], improvement["broken"]) == (8, 3) and improvement["p_value"] == pytest.approx(
        464 / 2048
    )
    assert improvement["mean"] == pytest.approx(5 * POINT) and improvement["method"] == "exact McNemar test"
    lines = got.out.splitlines()
    for title, answers in right.items():
        confidence, accuracy = math.exp(sure[title]) / (math.exp(sure[title]) + 2), answers.mean()
        likelihood = -accuracy * math.log(confidence) - (1 - accuracy) * math.log((1 - confidence) / 2)
        wanted = [f"{each:.4f}" for each in (accuracy, abs(accuracy - confidence), likelihood)]
        wanted[1:1] = ["1", f"{agreement[title]:.4f}"] if title in agreement else ["1"]
        row = next(line[26:].split() for line in lines if line.startswith(f"{title:<26}"))  # the costs come later
        assert row == wanted
    fitted = lines.index(next(line for line in lines if line.startswith("Temperature scaling")))
    for offset, title in enumerate(right):
        # The wrong answers are wrong by the same logit, so the best temperature makes the confidence the accuracy.
        odd, even = right[title][1::2].mean(), right[title][::2].mean()
        t = [sure[title] / math.log(2 * share / (1 - share)) if share < 1 else 0.05 for share in (odd, even)]
        name, got = lines[fitted + 1 + offset][:26].strip(), lines[fitted + 1 + offset][26:].split()
        assert (name, float(got[0])) == (title, pytest.approx(math.sqrt(t[0] * t[1]), abs=0.006))
    for number, name in enumerate(CLASSES):
        (row,) = (line[26:].split() for line in lines if line.startswith(f"{name:<26}"))
        assert row == [f"{answers[number == LABELS].mean():.4f}" for answers in right.values()]


UNEQUAL = np.array([2] * 20 + [0] * 3 + [1])  # of the 24 test images 20 are of class 2, "red"
ALWAYS_RED = np.full(24, 2)


def answer(path, logits, labels):
    """Gives a run of `Folder.add` other test logits."""
    accuracy = float((logits.argmax(1) == labels).mean())
    digest = save_array(path.parent / "test_logits.npy", logits.astype(np.float32))
    rewrite(path, lambda run: run.update(test_logits_sha256=digest, accuracy=accuracy))


def unequal(folder, kd, baseline):
    """The Comparison of networks that give these answers, arrays (24,), on the labels UNEQUAL; the teacher is right."""
    shutil.rmtree(folder.path / "data")
    records.save_test_set(folder.path, DATA, np.zeros((24, 16, 16, 3), np.uint8), UNEQUAL, CLASSES)
    logits = torch.eye(3)[torch.from_numpy(UNEQUAL)]
    records.save_teacher_logits(folder.path, TEACHER, DATA, lambda: logits)
    answer(folder.add("kd", 0, 4.0, 0.1), np.eye(3)[kd], UNEQUAL)
    answer(folder.add("baseline", 0), np.eye(3)[baseline], UNEQUAL)
    return Comparison(folder.path)


def test_balanced_accuracy_counts_every_class_alike(folder):
    """The student is right on all of red, a third of blue and on green; the baseline answers red always."""
    kd = UNEQUAL.copy()
    kd[20:22] = 2
    comparison = unequal(folder, kd, ALWAYS_RED)
    rows = [line[26:].split() for line in details(comparison).splitlines()[:4]]
    assert [row[:2] for row in rows[1:]] == [["1.0000", "1.0000"], ["0.9167", "0.7778"], ["0.8333", "0.3333"]]
    assert rows[0][:4] == ["accuracy", "std", "balanced", "n"]
    content = comparison.as_dict()
    assert content["teacher"]["balanced_accuracy"] == 1
    assert content["kd"][0]["balanced_accuracy"] == [pytest.approx((1 + 1 / 3 + 1) / 3)]
    assert content["baseline"]["balanced_accuracy"] == [pytest.approx(1 / 3)]
    assert content["test_images_by_class"] == [3, 1, 20]
    runs = {row["run"]: float(row["balanced_accuracy"]) for row in csv.DictReader(io.StringIO(table(comparison)))}
    assert runs == pytest.approx({"kd-T4-a0.1-s0": 7 / 9, "baseline-s0": 1 / 3})
    assert "<th><button>balanced</button></th>" in page(comparison, [])


def test_every_run_in_the_table_has_its_balanced_accuracy(folder):
    """The baseline of seed 1 is compared with the second alpha only."""
    folder.add("kd", 20, 4.0, 0.1)
    for seed in (0, 1):
        folder.add("kd", 21, 4.0, 0.9, seed), folder.add("baseline", 19, seed=seed)
    comparison = Comparison(folder.path, {"temperature": 4.0, "alpha": 0.1, "seeds": [0]})
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(table(comparison)))}
    assert len(rows) == 5 and rows["baseline-s1"]["balanced_accuracy"], rows
    assert all(float(row["balanced_accuracy"]) == pytest.approx(float(row["accuracy"])) for row in rows.values())


def test_what_the_largest_class_alone_would_reach_is_said_where_a_network_is_hardly_better(folder):
    comparison = unequal(folder, UNEQUAL, ALWAYS_RED)
    told = "Note that always answering 'red', the largest class, is right on 0.8333 of the test images."
    assert f"\n{told}\n" in details(comparison)
    assert told.replace("'", "&#39;") in page(comparison, [])


def test_good_networks_get_no_such_note(folder):
    """The baseline corrects one of four errors of the answer that is always red."""
    better = ALWAYS_RED.copy()
    better[20] = 0
    text = details(unequal(folder, UNEQUAL, better))
    assert "balanced" in text and "Note that always" not in text


def test_equal_classes_have_no_column_of_balanced_accuracy(folder):
    folder.add("kd", 8, 4.0, 0.1), folder.add("baseline", 8)  # as good as a guess
    comparison = Comparison(folder.path)
    assert "balanced" not in details(comparison) and "Note that always" not in details(comparison)
    assert "<th><button>balanced</button></th>" not in page(comparison, [])
    entry = comparison.as_dict()["kd"][0]
    assert entry["balanced_accuracy"] == [pytest.approx(entry["mean"])]


def test_of_many_classes_the_ends_are_printed(folder):
    """Thirty classes of one image each: the student is right on the first ten."""
    labels = np.arange(30)
    shutil.rmtree(folder.path / "data")
    names = [f"class {number:02d}" for number in labels]
    records.save_test_set(folder.path, DATA, np.zeros((30, 16, 16, 3), np.uint8), labels, names)
    records.save_teacher_logits(folder.path, TEACHER, DATA, lambda: torch.eye(30))
    answer(folder.add("kd", 0, 4.0, 0.1), np.eye(30)[np.where(labels < 10, labels, (labels + 1) % 30)], labels)
    answer(folder.add("baseline", 0), np.eye(30)[(labels + 1) % 30], labels)
    comparison = Comparison(folder.path)
    lines = details(comparison).split("Accuracy by class")[1].split("\n\n")[0].splitlines()
    assert [line.split()[1] for line in lines[1:6]] == ["10", "11", "12", "13", "14"]  # of equals the first
    assert lines[6] == "(20 classes lie between, by accuracy with KD; all are in report.html)"
    assert [line.split()[1] for line in lines[7:]] == ["05", "06", "07", "08", "09"]
    assert all(line.split()[3] == "0.0000" for line in lines[1:6])
    assert all(name in page(comparison, []) for name in names)


def test_runs_with_other_settings_are_not_compared(folder):
    folder.add("kd", 20, 4.0, 0.1), folder.add("baseline", 15)
    folder.add("kd", 21, 8.0, 0.1, teacher="f" * 64), folder.add("kd", 21, 9.0, 0.1, epochs=3)
    assert [entry["temperature"] for entry in Comparison(folder.path).kd] == [4.0]
    others = {"batch_size": 8, "learning_rate": 0.2, "recipe": 1, "views": 0, "weight_decay": 0.1, "padding": 5}
    others |= {"cutout": 3, "mirror": False, "label_smoothing": 0.1}
    for seed, other in enumerate([{name: value} for name, value in others.items()], 1):
        folder.add("kd", 20, 4.0, 0.1, seed), folder.add("baseline", 15, seed=seed, **other)
        with pytest.raises(Failure, match=f"no finished baseline-s{seed} that this comparison can use"):
            Comparison(folder.path, {"temperature": 4.0, "alpha": 0.1, "seeds": [0, seed]})


def test_without_an_earlier_comparison_the_report_takes_students_that_have_a_baseline(folder):
    folder.add("kd", 20, 4.0, 0.1), folder.add("kd", 20, 4.0, 0.9, epochs=1), folder.add("baseline", 15, epochs=1)
    assert Comparison(folder.path).kd[0]["alpha"] == 0.9
    shutil.rmtree(folder.path / "kd-T4-a0.9-s0")
    with pytest.raises(Failure, match="no finished baseline-s0 that this comparison can use"):
        Comparison(folder.path)
    shutil.rmtree(folder.path / "kd-T4-a0.1-s0")
    with pytest.raises(Failure, match="holds no finished students"):
        Comparison(folder.path)


def test_the_best_pair_is_that_of_the_best_validation_accuracy(folder):
    for temperature, validation, test in ((1.0, 22, 5), (4.0, 20, 24)):
        folder.add("kd", validation, temperature, 0.5, val_fraction=0.1), folder.add("kd", test, temperature, 0.5)
    assert records.best_pair(folder.path, [(4.0, 0.5), (1.0, 0.5)], [0]) == (1.0, 0.5)


def test_the_best_pair_is_that_of_students_of_the_same_width(folder):
    for (width, best), temperature in itertools.product(((1.0, 2.0), (0.5, 4.0)), (2.0, 4.0)):
        folder.add("kd", 20 + (temperature == best), temperature, 0.5, val_fraction=0.1, width=width)
    pairs = [(2.0, 0.5), (4.0, 0.5)]
    shared = {run.settings.width: run.settings.shared for run in records.all_finished_runs(folder.path / "selection")}
    assert [records.best_pair(folder.path, pairs, [0], shared[width]) for width in (1.0, 0.5)] == pairs


def test_a_copy_of_a_run_under_another_name_is_left_out(folder):
    folder.add("kd", 20, 4.0, 0.1), folder.add("baseline", 15)
    copied = shutil.copytree(folder.path / "kd-T4-a0.1-s0", folder.path / "kd-T4-a0.1-s0-old")
    rewrite(copied / "run.json", lambda run: run.update(accuracy=0.25))
    assert Comparison(folder.path).kd[0]["accuracies"] == [20 / 24]


def test_the_tables_have_means_over_the_seeds(folder):
    for seed, (kd, baseline) in enumerate([(20, 15), (14, 11)]):
        folder.add("kd", kd, 4.0, 0.5, seed, sure=3.0 + seed)
        folder.add("baseline", baseline, seed=seed, sure=1.0 + seed)
    comparison = Comparison(folder.path)
    for table_of, columns in (
        (accuracy, {"agreement": "agreement_with_teacher", "ECE": "calibration_error",
                    "NLL": "negative_log_likelihood"}),
        (fidelity, {"agreement": "agreement_with_teacher", "KL, T = 1": "kl_from_teacher",
                    "KL at its T": "kl_from_teacher_softened"}),
        (calibration, {"fitted T": "fitted_temperature", "ECE": "scaled_calibration_error",
                       "NLL": "scaled_negative_log_likelihood"}),
    ):  # fmt: skip
        head, *rows = table_of.rows(comparison)
        assert head[-3:] == tuple(columns)
        for row, (name, entry) in zip(rows[-2:], comparison.students, strict=True):
            found = {key: float(cell) for key, cell in zip(columns.values(), row[-3:], strict=True)}
            assert row[0] == name and all(entry[key][0] != entry[key][1] for key in found)
            rounded = {key: 0.005 if key == "fitted_temperature" else 5e-5 for key in found}
            assert all(found[key] == pytest.approx(np.mean(entry[key]), abs=rounded[key]) for key in found), row
    for entry, counts in ((comparison.kd[0], (20, 14)), (comparison.baseline, (15, 11))):
        by_hand = [
            np.mean([(np.arange(24) < right)[number == LABELS].mean() for right in counts]) for number in range(3)
        ]
        assert entry["class_accuracies"] == pytest.approx(by_hand)
    advised = np.mean(comparison.kd[0]["fitted_temperature"])
    assert f"--temperature {advised:.2g}" in calibration.where(comparison)
    seconds = [float(row["seconds"]) for row in csv.DictReader(io.StringIO(table(comparison)))]
    assert comparison.as_dict()["seconds"] == sum(seconds) == 4 * 1.5


def test_the_page_tells_student_and_baseline_apart(folder):
    folder.add("kd", 20, 4.0, 0.1), folder.add("baseline", 15)
    comparison, paths = Comparison(folder.path), [folder.path / f"{name}.png" for name in ("gain", "curves")]
    for path in paths:
        write(path, path.stem.encode())
    content = page(comparison, paths)
    assert re.findall(r"<b>(.*?)</b>", content) == ["0.9167", "0.8333", "0.6250"]
    for number, name in enumerate(CLASSES):
        right = ((np.arange(24) < count)[number == LABELS].mean() for count in (22, 20, 15))
        assert f"<td>{name}</td>{''.join(f'<td>{each:.4f}</td>' for each in right)}" in content
    for path, caption in zip(paths, ("The gain with", "Training curves."), strict=True):
        image = base64.b64encode(path.read_bytes()).decode()
        assert re.search(rf'{image}"><figcaption>{caption}', content), path


def test_the_best_pair_is_by_the_mean_over_seeds_and_the_first_of_equals(folder):
    for temperature, counts in ((1.0, (23, 10)), (2.0, (18, 18)), (4.0, (17, 19))):
        for seed, count in enumerate(counts):
            folder.add("kd", count, temperature, 0.5, seed, val_fraction=0.1)
    pairs = [(temperature, 0.5) for temperature in (1.0, 2.0, 4.0)]
    assert records.best_pair(folder.path, pairs, [0, 1]) == (2.0, 0.5)
    assert records.best_pair(folder.path, pairs[::-1], [0, 1]) == (4.0, 0.5)


def test_the_sweep_is_reported_over_the_seeds_of_the_students(folder):
    """A pair that a later sweep trained for fewer seeds is not left out; a sweep on another validation part is."""
    folder.add("kd", 20, 4.0, 0.5, 1), folder.add("baseline", 15, seed=1)
    for seed, (pair, right) in itertools.product(range(3), [((2.0, 0.5), 11), ((4.0, 0.5), 10), ((), 9)]):
        folder.add("kd" if pair else "baseline", right + seed, *pair, seed=seed, val_fraction=0.25)
    folder.add("kd", 22, 8.0, 0.5, 1, val_fraction=0.25), folder.add("kd", 22, 16.0, 0.5, 1, val_fraction=0.1)
    folder.add("kd", 23, 9.0, 0.5, 1, val_fraction=0.25, epochs=3)
    comparison = Comparison(folder.path)
    found = {entry["temperature"]: entry for entry in comparison.selection}
    assert found.keys() == {None, 2.0, 4.0, 8.0} and all(entry["seeds"] == [1] for entry in found.values())
    assert [found[key]["val_accuracies"] for key in (None, 2.0, 8.0)] == [[10 / 24], [12 / 24], [22 / 24]]
    rows = details(comparison).split("Sweep, on validation")[1].splitlines()[1:5]
    assert [row[:26].strip() for row in rows] == [*(f"KD, T={t}, alpha=0.5" for t in (8, 2, 4)), "Baseline"]
    assert [row[26:].split() for row in rows] == [[f"{right / 24:.4f}", "1"] for right in (22, 12, 11, 10)]


@pytest.mark.parametrize("place", ["students", "sweep"])
def test_runs_that_were_trained_on_different_machines_are_named(folder, place):
    other = {"device": "GPU", "precision": "bf16", "compiled": True}
    folder.add("kd", 20, 4.0, 0.5)
    folder.add("baseline", 15, environment=other if place == "students" else None)
    folder.add("kd", 20, 4.0, 0.5, val_fraction=0.25)
    assert ("not all trained alike" in details(Comparison(folder.path))) == (place == "students")
    folder.add("baseline", 15, val_fraction=0.25, environment=other if place == "sweep" else None)
    text, environment = details(Comparison(folder.path)), Comparison(folder.path).environment
    assert environment["device"] == ("CPU and GPU" if place == "students" else "CPU")
    who = "these students" if place == "students" else "the students of the sweep"
    assert f"Note that {who} were not all trained alike: " in text and text.count("not all trained alike") == 1
    assert "baseline-s0 on GPU in bf16, compiled" in text and "kd-T4-a0.5-s0 on CPU in fp32" in text


@pytest.mark.parametrize("name", ["torch", "program"])
def test_runs_of_different_versions_are_named(folder, name):
    folder.add("kd", 20, 4.0, 0.5, environment={"torch": "2.13.0", "program": "2.1.0"})
    folder.add("baseline", 15, environment={"torch": "2.13.0", "program": "2.1.0"} | {name: "1.0"})
    text = details(Comparison(folder.path))
    assert "baseline-s0 on CPU" in text and "; kd-T4-a0.5-s0 on CPU in fp32 (torch 2.13.0, program 2.1.0)." in text


def test_runs_of_other_code_are_named(folder):
    """A run that does not say which code trained it is left out; no baseline depends on distill.py."""
    code = dict.fromkeys(CODE, "1")
    folder.add("baseline", 15, environment=code | {"distill.py": "0"})
    folder.add("baseline", 15, seed=1)
    for seed in (0, 1):
        folder.add("kd", 20, 4.0, 0.5, seed, environment=code)
    assert "was changed between" not in details(Comparison(folder.path))
    folder.add("kd", 20, 4.0, 0.9, environment=code | {"distill.py": "2"})
    folder.add("kd", 20, 4.0, 0.5, val_fraction=0.25, environment=code | {"train.py": "3"})
    text, words = details(Comparison(folder.path)), "was changed between the trainings of these students: some are"
    first = "kd-T4-a0.5-s0, kd-T4-a0.5-s1"
    assert f"Note that distill.py {words} {first}, kd-T4-a0.5-s0 of the sweep, others kd-T4-a0.9-s0." in text
    assert f"Note that train.py {words} baseline-s0, {first}, kd-T4-a0.9-s0, others kd-T4-a0.5-s0 of the sweep." in text


def test_what_teachers_answer_is_kept_for_this_code_of_the_networks(folder, monkeypatch):
    asked = []

    def keep():
        asked.append("again")
        return torch.from_numpy(logits_of(22, 5.0))

    for code, count in ((CODE["models.py"], 0), ("0" * 12, 1), ("0" * 12, 1)):
        monkeypatch.setitem(CODE, "models.py", code)
        records.save_teacher_logits(folder.path, TEACHER, DATA, keep)
        assert len(asked) == count


# Damage --------------------------------------------------------------------------------------------------------------


def test_damaged_logits_are_named(cli, folder):
    folder.add("baseline", 15)
    path = folder.add("kd", 20, 4.0, 0.5).parent / "test_logits.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    got = cli("--report", "--output-dir", folder.path)
    assert got.status == 1 and f"{path} is damaged" in got.err


def test_a_test_set_that_is_missing_or_damaged_is_named(folder):
    folder.add("kd", 20, 4.0, 0.5), folder.add("baseline", 15)
    (test,) = (folder.path / "data").glob("test-*.npz")
    (teacher,) = (folder.path / "data").glob("teacher-*.npz")
    arrays = load_arrays(test)
    save_arrays(test, **{name: array for name, array in arrays.items() if name != "labels"})
    with pytest.raises(Damaged, match="'labels' is missing"):
        Comparison(folder.path)
    save_arrays(test, **arrays)
    for logits in (logits_of(22, 5.0)[:-1], logits_of(22, 5.0).astype(np.float64), logits_of(22, np.nan)):
        save_arrays(teacher, logits=logits)
        with pytest.raises(Damaged, match="does not hold 24 x 3 logits") as failure:
            Comparison(folder.path)
        assert str(teacher) in str(failure.value)
    teacher.unlink()
    with pytest.raises(Failure, match="is missing. Run the command that trained the students again"):
        Comparison(folder.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("accuracy"), "it has no accuracy"),
        (lambda record: record.pop("test_logits_sha256"), "it has no test_logits_sha256"),
        (lambda record: record["costs"].pop("student"), "it has no costs of the student"),
        (lambda record: record["settings"].update(teacher=None), "it has no teacher"),
        (lambda record: record["settings"].update(temperature=None), "it has no temperature"),
        (lambda record: record.update(accuracy=1.5), "expected float <= 1.0 - at $.accuracy"),
        (lambda record: record["settings"].update(epochs="2"), "expected int, got str - at $.settings.epochs"),
        (lambda record: record["settings"].update(role="pupil"), "invalid enum value 'pupil' - at $.settings.role"),
    ],
)
def test_a_damaged_record_is_named_and_its_run_left_out(folder, capsys, change, message):
    for temperature in (2.0, 4.0):
        path = folder.add("kd", 20, temperature, 0.5)
    folder.add("baseline", 15)
    rewrite(path, change)
    assert [entry["temperature"] for entry in Comparison(folder.path).kd] == [2.0]
    assert f"left out: {path} is damaged: {message}" in capsys.readouterr().err


def test_the_report_needs_no_pytorch_and_escapes_what_the_terminal_cannot_show(folder, monkeypatch):
    folder.add("kd", 20, 4.0, 0.5), folder.add("baseline", 15)
    (test,) = (folder.path / "data").glob("test-*.npz")
    save_arrays(test, **load_arrays(test) | {"classes": np.array(["кошка", *CLASSES[1:]])})
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    done = process("--report", "--output-dir", folder.path)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0 and "\\u043a" in out and (folder.path / "comparison.csv").is_file(), err
    imported = {line.split("|")[-1].strip() for line in err.splitlines() if line.startswith("import time:")}
    assert "numpy" in imported and "torch" not in imported


def test_fidelity_is_told_beside_agreement(folder):
    """The KL from the mean logits of the teacher, at T = 1 and softened by the student's own temperature."""
    folder.add("kd", 20, 4.0, 0.1, sure=3.0), folder.add("kd", 20, 8.0, 0.1, sure=2.0)
    folder.add("baseline", 15, sure=1.0)
    comparison = Comparison(folder.path)
    teacher = logits_of(22, 5.0)

    def kl(right, sure, temperature):
        p, q = (np.exp(each.astype(float) / temperature) for each in (teacher, logits_of(right, sure)))
        p, q = (each / each.sum(1, keepdims=True) for each in (p, q))
        return (p * np.log(p / q)).sum(1).mean()

    first, second = comparison.kd
    for entry, right, sure, temperature in ((first, 20, 3, 4), (second, 20, 2, 8), (comparison.baseline, 15, 1, 4)):
        assert entry["kl_from_teacher"] == [pytest.approx(kl(right, sure, 1))]
        assert entry["kl_from_teacher_softened"] == [pytest.approx(kl(right, sure, temperature))]
    text = details(comparison)
    title, one, two, baseline = text[text.index("Fidelity") :].splitlines()[:4]
    assert one.split()[-2:] == [f"{kl(20, 3, 1):.4f}", f"{kl(20, 3, 4):.4f}"] and title.endswith("KL at its T")
    assert two.split()[-1] == f"{kl(20, 2, 8):.4f}" and baseline.split()[-1] == f"{kl(15, 1, 4):.4f}"


@pytest.mark.draws
def test_letters_that_no_font_has_are_named_once(folder, capfd, recwarn):
    images = np.zeros((24, 16, 16, 3), np.uint8)
    (folder.path / "data" / f"test-{DATA[:16]}.npz").unlink()
    records.save_test_set(folder.path, DATA, images, LABELS, ["red", "\U00013000", "\U00013000\U00013001"])
    folder.add("kd", 20, 4.0, 0.1)
    folder.add("baseline", 18)
    figures.draw(Comparison(folder.path))
    told = capfd.readouterr().err
    assert "letters that no font here has: \U00013000\U00013001\nreport.html shows them." in told
    assert told.count("no font here") == 1 and not [each for each in recwarn if "Glyph" in str(each.message)]
