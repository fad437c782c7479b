"""What results/ claims is so."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from conftest import CIFAR10_DIR, ROOT, needs_cifar10

import data
import models
import train
from runs.files import Failure

RECORD = ROOT / "results" / "cifar10"


def test_the_record_holds_what_its_plan_names():
    comparison = json.loads((RECORD / "comparison.json").read_text())
    seeds = [0, 1, 2, 3, 4]
    pairs = {(kd["temperature"], kd["alpha"]): kd["seeds"] for kd in comparison["kd"]}
    assert pairs == {(4.0, 0.9): seeds, (4.0, 0.1): seeds} and comparison["baseline"]["seeds"] == seeds
    assert comparison["settings"]["epochs"] == 10
    lengths = {path.parent.name: len(path.read_text().splitlines()) - 1 for path in RECORD.glob("*/history.csv")}
    assert lengths.pop("teacher-s0") == 24 and len(lengths) == 15 and set(lengths.values()) == {10}


def test_the_gain_is_that_of_a_paired_t_test_by_hand():
    comparison = json.loads((RECORD / "comparison.json").read_text())
    gains = 100 * (np.array(comparison["kd"][0]["accuracies"]) - comparison["baseline"]["accuracies"])
    half = 2.776445 * gains.std(ddof=1) / 5**0.5  # Student's t of 4 degrees of freedom, 97.5%
    assert comparison["kd"][0]["improvement"]["ci95"] == pytest.approx([gains.mean() - half, gains.mean() + half])
    assert gains.mean() - half > 0


def test_compute_is_counted_as_the_record_says():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import compute

    points = {point.what: point for point in compute.record(RECORD)}
    teacher, kd = points["teacher, 24 epochs"], points["student with KD, T=4, alpha=0.9, 10 epochs"]
    assert teacher.pflop == pytest.approx(134_838_816 * 6 * 50_000 * 24 / 1e15)
    assert kd.pflop == points["student, baseline, 10 epochs"].pflop == pytest.approx(26_025_248 * 6 * 500_000 / 1e15)
    assert kd.half == pytest.approx(2.776445 * np.std([0.9117, 0.9137, 0.9129, 0.9098, 0.9109], ddof=1) / 5**0.5)


def test_the_kept_student_was_taught_by_the_kept_teacher():
    comparison = json.loads((RECORD / "comparison.json").read_text())
    teacher = models.load(RECORD / "teacher-s0" / "model.pt")
    student = models.load(RECORD / "kd-T4-a0.9-s0" / "model.pt")
    assert teacher.accuracy == comparison["teacher"]["accuracy"]
    assert student.settings["teacher"] == models.digest(teacher.state_dict())
    assert teacher.settings["data"] == student.settings["data"]


def test_each_change_of_the_recipe_is_trained_and_recorded(images, tmp_path, monkeypatch, capsys):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import recipes

    small, table, output = data.load("folder", data_dir=images, image_size=16), tmp_path / "rows.csv", tmp_path / "out"
    monkeypatch.setattr(data, "load", lambda *_, **__: small)
    words = ["--device", "cpu", "--output-dir", str(output), "--table", str(table)]

    def run(role, *changes):
        monkeypatch.setattr(sys, "argv", ["recipes.py", role, "1", *changes, *words])
        recipes.main()

    def weights(role, *changes):
        run(role, *changes)
        folder = output / f"{role} 1 {' '.join(changes) or 'as it is'}".replace("/", "_")
        return models.digest(models.load(folder / "model.pt").state_dict())

    given = ("seed=1", "batch=16", "rate=0.1", "conv=0.1", "bias=3", "padding=3", "smoothing=0.2",
             "decay=0.1", "batchnorm=0.4", "init=he")  # fmt: skip
    found = [weights("baseline", *changes) for changes in ((), *((change,) for change in given))]
    assert len(set(found)) == len(found)
    assert weights("baseline", "padding=1", "conv=0.3", "batch=128") == found[0]  # the recipe as it is
    teacher = output / "teacher 1 as it is"
    weights("teacher")
    pairs = ((), ("temperature=1",), ("alpha=0.1",), ("mirrored=yes",))
    distilled = [weights("kd", f"teacher={teacher}", *more) for more in pairs]
    assert len({*distilled, found[0]}) == 5
    run("teacher", "widths=32,48,64")
    run("teacher", "widths=32,48,64")  # again: no second row
    for wrong, said in (
        ("alpha=0.5", "cannot be changed"), ("padding=16", "less than"), ("seed=1 seed=2", "twice"), ("x", "cannot")
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            run("baseline", *wrong.split())
        assert said in capsys.readouterr().err
    with pytest.raises(Failure, match="init=x: it can be dirac or he"):
        run("baseline", "init=x")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["what"] for row in rows[:2]] == ["as it is", "seed=1"] and len(rows) == 18
    assert len({row["network"] for row in rows}) == 3
    assert rows[0]["pflop"] == f"{models.costs('student', 3, 16).macs * 6 * 42 / 1e15:.4f}"


@pytest.mark.slow
@needs_cifar10
def test_the_kept_student_scores_on_the_real_test_set_as_recorded():
    student = models.load(RECORD / "kd-T4-a0.9-s0" / "model.pt")
    loaded = data.load("cifar10", data_dir=CIFAR10_DIR)
    with torch.inference_mode():
        logits = train.evaluate(student, loaded.test_images, student.mean, student.std)
    recorded = json.loads((RECORD / "comparison.json").read_text())["kd"][0]["accuracies"][0]
    assert student.accuracy == recorded and student.settings["data"] == loaded.digest
    assert train.accuracy(logits, loaded.test_labels) == pytest.approx(recorded, abs=0.0003)  # of another processor
