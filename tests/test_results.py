"""What results/ claims is so."""

import json
import sys

import pytest
import torch
from conftest import CIFAR10_DIR, ROOT, needs_cifar10

import data
import models
import train

RECORD = ROOT / "results" / "cifar10"


def test_the_record_holds_what_its_plan_names():
    comparison = json.loads((RECORD / "comparison.json").read_text())
    (kd,) = comparison["kd"]
    assert (kd["temperature"], kd["alpha"], kd["seeds"]) == (4.0, 0.9, [0, 1, 2])
    assert comparison["baseline"]["seeds"] == [0, 1, 2] and comparison["settings"]["epochs"] == 8
    lengths = {path.parent.name: len(path.read_text().splitlines()) - 1 for path in RECORD.glob("*/history.csv")}
    assert lengths.pop("teacher-s0") == 7 and len(lengths) == 6 and set(lengths.values()) == {8}


def test_compute_is_counted_as_the_record_says():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import compute

    points = {point.role: point for point in compute.record(RECORD)}
    assert points["teacher"].pflop == pytest.approx(134_838_816 * 6 * 50_000 * 7 / 1e15)
    assert points["kd"].pflop == points["baseline"].pflop == pytest.approx(26_025_248 * 6 * 50_000 * 8 / 1e15)
    assert points["kd"].half == pytest.approx(4.3027 * 0.00162 / 3**0.5, rel=0.01)  # Student's t of 2 degrees


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
