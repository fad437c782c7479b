"""What teacher and student cost, in comparison.json, on paper and in words."""

import json
from types import SimpleNamespace

import pytest
import torch

import runs.speed
from reports import costs
from reports.records import load_speed, save_speed
from runs.code import CODE
from runs.files import read_json, write_json
from runs.machine import Machine
from runs.settings import Speed


@pytest.mark.slow
def test_every_comparison_says_what_it_costs(cli, copy, flags):
    """Figures exist and are positive; repeated, the command and --report say the same."""
    before = (copy / "comparison.json").read_text()
    content = json.loads(before)
    for name, factor in (("teacher", 1), ("student", 10)):
        cost = content[name]["cost"]
        model = copy / {"teacher": "teacher-s0", "student": "kd-T4-a0.1-s0"}[name] / "model.pt"
        assert cost["bytes"] == model.stat().st_size
        assert (cost["batch"], cost["threads"] > 0) == (128, True)
        assert cost["fp32"]["milliseconds"] > 0 and "bf16" not in cost  # which a network may not bear
        assert cost["fp32"]["images_per_second"] > 0
        assert content[name]["parameters"] < 6e6 / factor
    for words in ((*flags, "--output-dir", copy), ("--report", "--output-dir", copy)):
        result = cli(*words)
        assert result.status == 0
        student, fast = content["student"], content["student"]["cost"]["fp32"]
        numbers = student["cost"]["bytes"] / 1e6, fast["milliseconds"], fast["images_per_second"]
        cells = f"{student['parameters']:,}", *(f"{each:,.1f}" for each in (student["macs"] / 1e6, *numbers))
        assert f"Student, float32 {' '.join(cells)}" in " ".join(result.out.split())
        assert "Compared with the teacher the student is 10.5 times smaller" in result.out
        assert (copy / "comparison.json").read_text() == before


@pytest.mark.slow
def test_measured_again_where_it_is_missing_or_damaged(cli, copy, flags):
    (path,) = (copy / "data").glob("speed-*.json")
    speed = read_json(path)
    for content in ({}, speed | {"student": {}}, speed | {"teacher": {}, "student": {}}):
        write_json(path, content)
        damaged = cli("--report", "--output-dir", copy)
        assert (damaged.status, str(path) in damaged.err) == (1, True)
    path.unlink()
    missing = cli("--report", "--output-dir", copy)
    assert missing.status == 0
    assert "The speed was not measured yet" in missing.out
    assert read_json(copy / "comparison.json")["student"]["cost"] is None
    assert cli(*flags, "--output-dir", copy).status == 0
    assert path.is_file()


def test_speeds_are_those_of_the_networks_on_a_clock(monkeypatch):
    """An image takes each of two teachers 3 milliseconds and the student 2, in float32 alone."""
    clock = [0.0]

    class Slow(torch.nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, images):
            clock[0] += self.seconds * len(images)

    monkeypatch.setattr(runs.speed.time, "perf_counter", lambda: clock[0])
    found = runs.speed.speeds([Slow(0.003), Slow(0.003)], Slow(0.002), 16, Machine(torch.device("cpu")))
    for name, milliseconds in (("teacher", 6), ("student", 2)):
        (speed,) = found[name].values()
        assert [speed.milliseconds, speed.images_per_second] == pytest.approx([milliseconds, 1000 / milliseconds])
    assert [*found["teacher"]] == [*found["student"]] == ["fp32"]


def test_measured_again_in_another_precision_and_by_other_code(tmp_path, monkeypatch):
    place, measured = {"device": "CPU", "threads": 1, "teacher_bytes": 9}, []

    def measure(*precisions):
        measured.append(precisions)
        speeds = {precision: Speed(1.0, 2.0) for precision in precisions}
        return {"batch": 128, "teacher": speeds, "student": speeds}

    for precisions in (("fp32",), ("fp32", "bf16"), ("fp32", "bf16"), ("fp32",)):
        save_speed(tmp_path, ["t" * 64], "d" * 64, place, precisions[-1], lambda now=precisions: measure(*now))
    assert measured == [("fp32",), ("fp32", "bf16")]
    for other in (place | {"threads": 2}, place):  # and where it was measured elsewhere
        save_speed(tmp_path, ["t" * 64], "d" * 64, other, "fp32", lambda: measure("fp32", "bf16"))
    assert measured[2:] == [("fp32", "bf16")] * 2 and not measured.clear()
    assert load_speed(tmp_path, ["t" * 64], "d" * 64).student.keys() == {"fp32", "bf16"}
    monkeypatch.setitem(CODE, "models.py", "0" * 12)
    for _ in range(2):
        save_speed(tmp_path, ["t" * 64], "d" * 64, place, "fp32", lambda: measure("fp32"))
    assert measured == [("fp32",)]


def comparison(teacher, kd, baseline, p=None, seeds=5, speeds=(100.0, 710.0), members=1):
    """What reports.costs reads of a Comparison."""
    cost = [speed and {"fp32": {"milliseconds": 1.0, "images_per_second": speed}} for speed in speeds]
    return SimpleNamespace(
        teacher={"accuracy": teacher, "members": [teacher] * members, "parameters": 1160, "cost": cost[0]},
        student={"parameters": 100, "cost": cost[1]},
        baseline={"mean": baseline},
        kd=[
            {
                "mean": kd,
                "seeds": list(range(seeds)),
                "improvement": {"mean": 100 * (kd - baseline), "p_value": p},
            }
        ],
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            comparison(0.92, 0.897, 0.884, 0.01),
            "Compared with the teacher the student is 11.6 times smaller, 7.1 times faster (float32, in batches) "
            "and 2.3 points less accurate; "
            "distillation recovers 1.3 of 3.6 points (mean of 5 seeds).",
        ),
        (
            comparison(0.92, 0.89, 0.8895, 0.4, speeds=(100.0, 97.0), members=3),
            "Compared with the 3 teachers together the student is 11.6 times smaller, as fast (float32, in batches) "
            "and 3.0 points less accurate; "
            "distillation recovers 0.05 of 3.1 points (mean of 5 seeds, not significant).",
        ),
        (
            comparison(0.92, 0.88, 0.89, 0.02, speeds=(100.0, 50.0)),
            "Compared with the teacher the student is 11.6 times smaller, 2.0 times slower (float32, in batches) "
            "and 4.0 points less accurate; "
            "distillation costs 1.0 points (mean of 5 seeds).",
        ),
        (
            comparison(0.92, 0.89, 0.89, seeds=1, speeds=(None, None)),
            "Compared with the teacher the student is 11.6 times smaller and 3.0 points less accurate; "
            "distillation recovers none of the 3.0 points (one pair of students).",
        ),
        (
            comparison(0.92, 0.93, 0.91, 0.01),
            "Compared with the teacher the student is 11.6 times smaller, 7.1 times faster (float32, in batches) "
            "and 1.0 points more accurate; "
            "distillation recovers all of the 1.0 points between baseline and teacher (mean of 5 seeds).",
        ),
        (
            comparison(0.92, 0.93, 0.925, 0.2),
            "Compared with the teacher the student is 11.6 times smaller, 7.1 times faster (float32, in batches) "
            "and 1.0 points more accurate; "
            "distillation adds 0.5 points to a baseline that is no worse than the teacher "
            "(mean of 5 seeds, not significant).",
        ),
        (  # equal gains: no test, so none that fails
            comparison(0.92, 0.9, 0.897, None, seeds=2, speeds=(None, None)),
            "Compared with the teacher the student is 11.6 times smaller and 2.0 points less accurate; "
            "distillation recovers 0.3 of 2.3 points (mean of 2 seeds).",
        ),
        (
            comparison(0.92, 0.92, 0.92),
            "Compared with the teacher the student is 11.6 times smaller, 7.1 times faster (float32, in batches) "
            "and as accurate; "
            "distillation changes nothing (mean of 5 seeds).",
        ),
    ],
)
def test_the_trade_in_words(given, sentence):
    assert costs.trade(given) == sentence
