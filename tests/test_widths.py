"""--width: students and teachers of other sizes, and how they live beside those of the usual size."""

import csv
import json
import shlex
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT

import data
import models
import runs.session
import runs.teaching
import train
from arguments import parse
from runs.machine import Machine
from runs.progress import Options
from runs.run import Run
from runs.settings import Settings
from runs.signals import Interrupted
from runs.teachers import find_sweep_teachers

HALF = models.costs("student", len(CLASSES), 16, 0.5)


def record(folder):
    return json.loads((folder / "run.json").read_text())


def written(folder):
    """When each file of runs and soft targets in `folder` was written."""
    paths = [*folder.glob("*-s*/*"), *folder.glob("targets/**/*.npz")]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in paths}


def test_a_narrower_student_lives_beside_the_usual_one_and_is_taught_by_the_same_soft_targets(cli, flags, copy):
    before = written(copy)
    got = cli(*flags, "--output-dir", copy, "--width", 0.5)
    assert got.status == 0, got
    assert f"Student: {HALF.parameters:,} parameters, {HALF.macs / 1e6:.1f} million multiply-adds" in got.out
    assert "- Batch Size: 16\n- Width: 0.5\n\nFinal" in got.out
    after = written(copy)
    assert after.items() >= before.items() and not any("targets" in path for path in after.keys() - before.keys())
    comparison = json.loads((copy / "comparison.json").read_text())
    assert comparison["settings"]["width"] == 0.5 and len(comparison["kd"]) == 1
    assert (comparison["student"]["parameters"], comparison["student"]["macs"]) == (HALF.parameters, HALF.macs)
    names = {"kd-w0.5-T4-a0.1-s0", "baseline-w0.5-s0"}
    with open(copy / "comparison.csv", newline="") as file:
        assert {row["run"]: row["width"] for row in csv.DictReader(file)} == {"teacher-s0": "1.0"} | dict.fromkeys(
            names, "0.5"
        )
    for name in names:
        assert record(copy / name)["settings"]["width"] == 0.5
        assert record(copy / name)["costs"]["student"] == vars(HALF)
    assert not {"width"} & record(copy / "baseline-s0")["settings"].keys()  # as in all runs before there was one
    content = torch.load(copy / "baseline-s0" / "model.pt", weights_only=True)
    assert content["arguments"] == {"classes": 3}

    again = cli(*flags, "--output-dir", copy, "--width", 0.5)
    assert again.status == 0 and again.out.count("(finished before)") == 2 and written(copy) == after
    assert "- Width: 0.5" in cli("--report", "--output-dir", copy).out  # the pair that was compared last
    usual = cli(*flags, "--output-dir", copy)
    assert usual.status == 0 and "- Width" not in usual.out and usual.out.count("(finished before)") == 2


def test_a_narrower_student_is_loaded_and_answers_as_it_was_trained(cli, flags, copy, images):
    assert cli(*flags, "--output-dir", copy, "--width", 0.5).status == 0
    folder = copy / "kd-w0.5-T4-a0.1-s0"
    network = models.load(folder / "model.pt")
    shapes = [tuple(layer.weight.shape[:2]) for layer in network.modules() if isinstance(layer, models.Convolution)]
    assert shapes == [(16, 24), (16, 16), (48, 16), (48, 48), (64, 48), (64, 64)]
    kept = np.load(next((copy / "data").glob("test-*.npz")))
    logits = train.evaluate(network, torch.from_numpy(kept["images"]), network.mean, network.std)
    np.testing.assert_allclose(logits.numpy(), np.load(folder / "test_logits.npy"), rtol=1e-4, atol=1e-4)
    got = cli("--output-dir", copy, "--model", folder, "--predict", images / "test" / "red")
    assert got.status == 0 and len(got.out.splitlines()) == 9, got


def test_speed_and_memory_are_those_of_the_width(cli, flags, copy, monkeypatch):
    measured, estimated, speeds = [], [], runs.teaching.speeds
    count = lambda network: sum(each.numel() for each in network.parameters())  # noqa: E731
    monkeypatch.setattr(
        runs.teaching,
        "speeds",
        lambda teachers, student, *more: measured.append(student) or speeds(teachers, student, *more),
    )
    monkeypatch.setattr(runs.session, "describe_memory", lambda role, network, *_: estimated.append(network) or role)
    monkeypatch.setattr(models, "LARGE", 8)  # so that images of 16x16 are large ones, whose memory is estimated
    before = {path.name for path in (copy / "data").glob("speed-*")}
    assert cli(*flags, "--output-dir", copy, "--width", 0.5).status == 0
    assert [count(each) for each in (*measured, *estimated)] == [HALF.parameters] * 2
    after = {path.name for path in (copy / "data").glob("speed-*")}
    assert after > before and all(name.endswith("-w0.5.json") for name in after - before)
    assert json.loads((copy / "comparison.json").read_text())["student"]["cost"]["bytes"] < 600_000


def test_a_run_without_known_costs_counts_those_of_its_width(images, tmp_path):
    loaded = data.load("folder", data_dir=images, image_size=16)
    settings = Settings("baseline", loaded.digest, 1, 16, 0.1, 5e-4, 0, 16, width=0.5)
    train.train(Run(tmp_path / "run", settings), loaded, Machine(torch.device("cpu")), Options())
    found = record(tmp_path / "run")["costs"]
    assert found == {"student": vars(HALF), "teacher": vars(models.costs("teacher", 3, 16))}


def test_a_narrower_teacher_is_found_teaches_and_is_resumed_by_the_command_that_is_named(
    cli, flags, tmp_path, monkeypatch
):
    steps, step = [], train.Muon.step

    def interrupted(self):
        steps.append(step(self))
        if len(steps) == 4:
            raise Interrupted(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.Muon, "step", interrupted)
        assert cli(*flags, "--output-dir", tmp_path, "--train-teacher", "--width", 0.5).status == 130
    refused = cli(*flags, "--output-dir", tmp_path)
    assert refused.status == 1 and "teacher-w0.5-s0 is unfinished (epoch 1 of 2)" in refused.err
    words = shlex.split(refused.err.splitlines()[-1])
    assert words[words.index("--width") + 1] == "0.5"
    assert cli(*words[2:]).status == 0
    got = cli(*flags, "--output-dir", tmp_path)
    assert got.status == 0 and f"{tmp_path / 'teacher-w0.5-s0' / 'model.pt'}: test accuracy" in got.out
    path = tmp_path / "teacher-w0.5-s0" / "model.pt"
    missing = find_sweep_teachers(parse(["--output-dir", str(tmp_path)]), [(path, models.load(path))], 0.1)[1]
    assert "--width 0.5 --val-fraction 0.1" in missing.splitlines()[-1]
    teacher, student = models.costs("teacher", 3, 16, 0.5), models.costs("student", 3, 16)
    assert f"Teacher: {teacher.parameters:,} parameters" in got.out
    assert f"Student: {student.parameters:,} parameters" in got.out and "- Width" not in got.out
    assert record(tmp_path / "teacher-w0.5-s0")["costs"]["teacher"] == vars(teacher)
    assert record(tmp_path / "kd-T4-a0.1-s0")["costs"]["teacher"] == vars(teacher)


def test_a_sweep_chooses_for_the_width_that_it_was_asked_for(cli, flags, copy):
    words = ("--output-dir", copy, "--width", 0.25, "--alpha", 0.2, 0.8, "--epochs", 1)
    got = cli(*flags, *words)
    assert got.status == 0 and "- Width: 0.25" in got.out
    swept = {path.name for path in (copy / "selection").iterdir()}
    assert swept == {"baseline-w0.25-s0", "kd-w0.25-T4-a0.2-s0", "kd-w0.25-T4-a0.8-s0"}
    assert len(list(copy.glob("kd-w0.25-*"))) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--width", 0), "'0' is not a number above 0 and up to 8"),
        (("--width", 8.5), "'8.5' is not a number"),
        (("--width", 0.5, "--student", "a.py:f"), "--width is for the program's own networks"),
        (("--train-teacher", "--width", 2, "--teacher-network", "a.py:f"), "--width is for the program's own networks"),
        (("--report", "--width", 0.5), "--width cannot be combined with --report"),
    ],
)
def test_wrong_usage(cli, words, told):
    got = cli(*words)
    assert got.status == 2 and told in got.err, got


def test_students_of_several_widths_are_compared(cli, monkeypatch, finished, flags, tmp_path):
    """benchmarks/widths.py, its commands run in this process: the gains of each width over those of the last."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import widths

    results = tmp_path / "results"
    words = ["--teacher", finished / "teacher-s0", "--widths", 0.25, 1, "--seeds", 2, "--epochs", 1]
    words += ["--output-dir", tmp_path / "out", "--results", results, "--", *flags[:6], *flags[8:]]
    monkeypatch.setattr(sys, "argv", ["widths.py", *map(str, words)])
    commands = []

    def run(command):
        assert command[:2] == [sys.executable, str(ROOT / "main.py")]
        commands.append(command[2:])
        return SimpleNamespace(returncode=cli(*command[2:]).status)

    monkeypatch.setattr("commands.subprocess.run", run)
    widths.main()
    expected = [[t, w] for t in ("32", "4") for w in ("0.25", "1")]
    assert [[command[1], command[3]] for command in commands] == expected
    assert all((parse(command).alpha, parse(command).seeds) == ([0.9], 2) for command in commands)
    narrow, usual = (json.loads((results / f"width-{width}.json").read_text()) for width in ("0.25", "1"))
    assert narrow["settings"]["width"] == 0.25 and "width" not in usual["settings"]
    accuracies = [[np.array(kd["accuracies"]) for kd in each["kd"]] for each in (narrow, usual)]
    assert [kd["temperature"] for kd in narrow["kd"]] == [32, 4]
    found = json.loads((results / "gains.json").read_text())
    (more,) = found["gains"]
    gains = [
        first - each["baseline"]["accuracies"] for (first, _), each in zip(accuracies, (narrow, usual), strict=True)
    ]
    assert more["points"]["mean"] == pytest.approx(100 * np.mean(gains[0] - gains[1]), abs=1e-6)
    assert (more["width"], more["over"], more["temperature"]) == (0.25, 1.0, 32.0)
    ahead = found["temperatures"]
    assert [(each["width"], each["temperature"], each["over"]) for each in ahead] == [(0.25, 4, 32), (1, 4, 32)]
    for (first, other), each in zip(accuracies, ahead, strict=True):
        assert each["points"]["mean"] == pytest.approx(100 * np.mean(other - first), abs=1e-6)
    assert (results / "gain.png").read_bytes()[:4] == b"\x89PNG"
    left, right = widths.draw([narrow, usual]).axes
    for axes, names in ((left, ("baseline", 0, 1)), (right, (0, 1))):
        for bars, name in zip(axes.containers, names, strict=True):
            entries = [each["baseline"] if name == "baseline" else each["kd"][name] for each in (narrow, usual)]
            drawn = [each["mean"] if axes is left else each["improvement"]["mean"] for each in entries]
            assert [*bars.lines[0].get_ydata()] == drawn


def test_widths_and_temperatures_are_tested_by_seed(monkeypatch):
    """By hand: three differences, mean m, standard deviation s: t = m sqrt(3) / s, and p = 1 - t / sqrt(t^2 + 2)."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import widths

    def found(*kds):
        keys = ("temperature", "accuracies", "by_seed")
        each = [dict(zip(keys, kd, strict=True)) for kd in kds]
        return {"kd": [kd | {"improvement": {"by_seed": kd["by_seed"]}} for kd in each]}

    wide = found((32, (0.8, 0.8, 0.8), (2.0, 2.0, 2.0)), (4, (0.79, 0.78, 0.77), (0, 0, 0)))
    narrow = found((32, (0.6, 0.6, 0.6), (1.0, 0.0, -1.0)), (4, (0.6, 0.61, 0.61), (0, 0, 0)))
    tests = widths.tests({0.5: narrow, 1.0: wide})
    (gain,) = tests["gains"]
    assert (gain["width"], gain["over"], gain["temperature"], gain["points"]["mean"]) == (0.5, 1.0, 32, -2)
    t = 2 * 3**0.5
    assert gain["points"]["p_value"] == gain["points"]["p_holm"] == pytest.approx(1 - t / (t * t + 2) ** 0.5)
    first, last = tests["temperatures"]
    assert [(each["width"], each["temperature"], each["over"]) for each in (first, last)] == [
        (0.5, 4, 32),
        (1.0, 4, 32),
    ]
    assert first["points"]["mean"] == pytest.approx(2 / 3) and last["points"]["mean"] == pytest.approx(-2)
    assert last["points"]["p_value"] == pytest.approx(1 - t / (t * t + 2) ** 0.5)  # -1, -2 and -3 points
    assert first["points"]["p_value"] == pytest.approx(1 - 2 / 6**0.5)  # 0, 1 and 1: s = 1 / sqrt(3), t = 2
    assert last["points"]["p_holm"] == pytest.approx(2 * last["points"]["p_value"])
    assert first["points"]["p_holm"] == first["points"]["p_value"]
