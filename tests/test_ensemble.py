"""Several teachers that answer together, through the command line and against NumPy."""

import csv
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, leave_out

import distill
import models
from distill import Ensemble, compress
from reports.comparison import Comparison
from runs import teaching
from runs.command import exit_status
from runs.speed import speeds


@pytest.fixture(scope="module")
def trained(tmp_path_factory, flags):
    """An output folder with two teachers and the students of both together; not to be changed."""
    import main

    output = tmp_path_factory.mktemp("trained") / "out"
    both = ("--teacher", output / "teacher-s0", output / "teacher-s1")
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch)
        for more in (("--train-teacher", "--seeds", 2), (*both, "--alpha", 0.9, "--seeds", 2)):
            assert exit_status(main.main, [str(word) for word in (*flags, "--output-dir", output, *more)]) == 0
    return output


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.fixture
def asked(monkeypatch):
    """The digests of the networks that were asked for an epoch of soft targets, in the order of the questions."""
    digests, predict = [], distill.predict

    def watched(network, *rest):
        digests.append(digest(network))
        return predict(network, *rest)

    monkeypatch.setattr(distill, "predict", watched)
    return digests


def digest(network):
    return models.digest(network.state_dict())


def load_run(output, name):
    return models.load(output / name / "model.pt")


# Training ------------------------------------------------------------------------------------------------------------


def test_two_seeds_are_the_teachers_that_two_commands_train(cli, flags, trained, finished, tmp_path):
    """The session's `finished` folder has the teacher of seed 0 alone."""
    assert cli(*flags, "--train-teacher", "--seed", 1, "--output-dir", tmp_path).status == 0
    for folder, name in ((finished, "teacher-s0"), (tmp_path, "teacher-s1")):
        assert digest(load_run(folder, name)) == digest(load_run(trained, name))


def test_in_any_order_they_are_the_same_ensemble_and_copies_save_work(cli, flags, copy, tmp_path, asked):
    other = ("--teacher", copy / "teacher-s1", copy / "teacher-s0", "--alpha", 0.9)
    got = cli(*flags, *other, "--output-dir", copy, "--seeds", 2)
    assert got.status == 0 and got.out.count("(finished before)") == 4, got
    new = tmp_path / "new"
    for name in ("baseline-s0", "targets"):
        shutil.copytree(copy / name, new / name)
    got = cli(*flags, *other, "--output-dir", new)
    assert got.status == 0 and "kd-T4-a0.9-s0: test accuracy" in got.out, got
    (line,) = (line for line in got.out.splitlines() if "finished before" in line)
    assert line.startswith(f"{new / 'baseline-s0'}:")
    assert digest(load_run(copy, "kd-T4-a0.9-s0")) == digest(load_run(new, "kd-T4-a0.9-s0"))
    assert asked == []  # every view had been answered before


def test_a_teacher_is_asked_once_alone_or_in_an_ensemble(cli, flags, copy, tmp_path, asked):
    words = (*flags, "--output-dir", tmp_path / "new", "--alpha", 0.9, "--teacher")
    assert cli(*words, copy / "teacher-s0").status == 0
    one, two = (digest(load_run(copy, f"teacher-s{seed}")) for seed in (0, 1))
    assert asked == [one] * 2  # two epochs
    shutil.rmtree(tmp_path / "new" / "kd-T4-a0.9-s0")
    assert cli(*words, copy / "teacher-s0", copy / "teacher-s1").status == 0
    assert asked == [one] * 2 + [two] * 2


def test_a_sweep_is_of_the_ensemble(cli, flags, trained, tmp_path):
    both = ("--teacher", trained / "teacher-s0", trained / "teacher-s1")
    got = cli(*flags, *both, "--output-dir", tmp_path, "--alpha", 0.5, 0.9, "--epochs", 1, "--val-fraction", 0.25)
    assert got.status == 0, got
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("selection/kd-*/run.json")]
    wanted = json.loads((trained / "kd-T4-a0.9-s0" / "run.json").read_text())["settings"]["teacher"]
    assert [run["settings"]["teacher"] for run in runs] == [wanted] * 2 and wanted.count("+") == 1


def test_a_member_alone_or_twice_is_not_the_ensemble(cli, flags, copy):
    words = (*flags, "--output-dir", copy, "--alpha", 0.9, "--teacher", copy / "teacher-s0")
    got = cli(*words)
    assert got.status == 1 and "another teacher" in got.err and "kd-T4-a0.9-s0" in got.err
    got = cli(*words, copy / "teacher-s0" / "model.pt")
    assert got.status == 1 and "are the same teacher" in got.err and got.err.count("teacher-s0") == 2
    got = cli(*words, copy / "teacher-s7")
    assert got.status == 1 and f"--teacher {copy / 'teacher-s7'} does not exist" in got.err


def test_the_command_named_for_a_missing_member_trains_that_one(cli, flags, copy, tmp_path):
    shutil.rmtree(copy / "teacher-s1")
    (copy / "teacher-s1").mkdir()
    words = ("--output-dir", tmp_path / "new", "--teacher", copy / "teacher-s0", copy / "teacher-s1")
    got = cli(*flags, *words)
    assert got.status == 1
    assert {f"--output-dir {copy}", "--seed 1"} <= set(re.findall(r"--(?:output-dir|seed) \S+", got.err))
    command = shlex.split(got.err.splitlines()[-1])[2:]
    assert cli(*command, *("--batch-size", 16, "--device", "cpu", "--precision", "fp32")).status == 0
    assert cli(*flags, *words).status == 0


# The report ----------------------------------------------------------------------------------------------------------


def test_the_comparison_is_with_the_mean_of_the_teachers_logits(trained):
    logits = np.stack([np.load(trained / f"teacher-s{seed}" / "test_logits.npy") for seed in (0, 1)]).astype(float)
    (test,) = (trained / "data").glob("test-*.npz")
    labels = np.load(test)["labels"]
    comparison = json.loads((trained / "comparison.json").read_text())
    teacher, kd = comparison["teacher"], comparison["kd"][0]
    assert teacher["accuracy"] == (logits.mean(0).argmax(1) == labels).mean()
    assert sorted(teacher["members"]) == sorted((logits.argmax(2) == labels).mean(1))
    one = json.loads((trained / "teacher-s0" / "run.json").read_text())["costs"]["teacher"]
    assert (teacher["parameters"], teacher["macs"]) == (2 * one["parameters"], 2 * one["macs"])
    assert teacher["cost"]["bytes"] == sum(
        (trained / f"teacher-s{seed}" / "model.pt").stat().st_size for seed in (0, 1)
    )
    with open(trained / "comparison.csv", newline="") as file:
        for row in csv.DictReader(file):
            assert float(row["balanced_accuracy"]) == pytest.approx(float(row["accuracy"])), row["run"]
    students = np.stack([np.load(trained / f"kd-T4-a0.9-s{seed}" / "test_logits.npy") for seed in (0, 1)])
    agreement = (students.argmax(2) == logits.mean(0).argmax(1)).mean(1)
    assert kd["agreement_with_teacher"] == agreement.tolist()


def test_the_printed_table_tells_the_ensemble_from_its_members(cli, copy):
    got = cli("--report", "--output-dir", copy)
    comparison = Comparison(copy)
    teacher = comparison.teacher
    rows = [line.split() for line in got.out.splitlines() if "networks" in line or "each alone" in line]
    assert rows[0][:4] == ["Teacher,", "2", "networks", f"{teacher['accuracy']:.4f}"]
    mean, std = np.mean(teacher["members"]), np.std(teacher["members"], ddof=1)
    assert rows[1] == ["each", "alone", f"{mean:.4f}", f"{std:.4f}", "2"]
    assert f"- Teacher Network: {teacher['accuracy']:.4f}" in got.out
    assert {run.folder.name for run in comparison.runs} >= {"teacher-s0", "teacher-s1"}


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_the_report_names_missing_or_damaged_logits_of_a_member(cli, flags, copy, harm):
    """And the command that trained the students writes them again."""
    path = max((copy / "data").glob("teacher-*.npz"))
    path.unlink()
    if harm == "damaged":
        path.write_bytes(b"hello")
    got = cli("--report", "--output-dir", copy)
    assert got.status == 1 and path.name in got.err and harm in got.err and "Traceback" not in got.err
    both = ("--teacher", copy / "teacher-s0", "--teacher", copy / "teacher-s1")
    got = cli(*flags, *both, "--output-dir", copy, "--alpha", 0.9, "--seeds", 2)
    assert got.status == 0 and got.out.count("(finished before)") == 4, got


def test_the_ablation_takes_the_views_from_the_same_ensemble(copy, images, monkeypatch, capsys):
    script = str(ROOT / "benchmarks" / "ablation.py")

    def ablation(*teachers):
        words = [script, copy, "--dataset", "folder", "--data-dir", images, "--device", "cpu"]
        words += ["--temperature", 4, "--alpha", 0.9, "--teacher", *teachers]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        runpy.run_path(script, run_name="__main__")

    monkeypatch.setattr(sys, "path", [*sys.path])  # which the script adds to
    with pytest.raises(SystemExit, match="error: .* were not distilled from this teacher"):
        ablation(copy / "teacher-s0")
    ablation(copy / "teacher-s0", copy / "teacher-s1")
    assert "seed 1: " in capsys.readouterr().out
    result = json.loads((copy / "fixed.json").read_text())
    assert result["seeds"] == [0, 1]
    for name, folder in (("fixed", copy / "fixed"), ("shared", copy)):
        accuracies = [load_run(folder, f"kd-T4-a0.9-s{seed}").accuracy for seed in (0, 1)]
        assert result[name]["accuracies"] == accuracies
    gains = np.subtract(result["shared"]["accuracies"], result["fixed"]["accuracies"])
    assert result["shared_over_fixed"]["mean"] == pytest.approx(100 * gains.mean())
    for name in ("kd-T4-a0.9-s1", "baseline-s1"):  # of other settings than those of seed 0
        path = copy / name / "run.json"
        path.write_text(path.read_text().replace('"epochs": 2', '"epochs": 3'))
    with pytest.raises(SystemExit, match="error: .* were not all trained alike"):
        ablation(copy / "teacher-s0", copy / "teacher-s1")


def test_no_command_is_told_that_would_train_a_teacher_of_another_name(cli, flags, tmp_path):
    for name, told in (
        ("teacher-s3", "--seed 3"),
        ("teacher-w2-s0", "holds no model.pt"),
        ("teacher-f-s1", "holds no mod"),
    ):
        (tmp_path / "made" / name).mkdir(parents=True)
        got = cli(*flags, "--output-dir", tmp_path / "out", "--teacher", tmp_path / "made" / name)
        assert got.status == 1 and told in got.err and ("Train one first" in got.err) == (name == "teacher-s3"), got
    got = cli(*flags, "--output-dir", tmp_path / "made")  # of which none is begun
    assert got.status == 1 and "There is no teacher in" in got.err, got


# A student as a teacher ----------------------------------------------------------------------------------------------


def test_a_chain_of_three(cli, flags, trained, tmp_path, asked):
    """An assistant teaches a student, and that one the next: each is asked in its turn, and named in the next one's
    settings; what it costs is what a student costs."""
    place, counts = trained / "kd-T4-a0.9-s0", models.costs("student", 3, 16)
    for number in range(2):
        output = tmp_path / f"generation-{number}"
        got = cli(*flags, "--alpha", 0.9, "--output-dir", output, "--teacher", place)
        assert got.status == 0 and f"{place / 'model.pt'}: test accuracy" in got.out and "Teacher: 386," in got.out
        teacher, settings = load_run(place.parent, place.name), load_run(output, "kd-T4-a0.9-s0").settings
        assert settings["teacher"] == digest(teacher)
        found = json.loads((output / "comparison.json").read_text())
        assert found["teacher"]["accuracy"] == pytest.approx(teacher.accuracy, abs=1e-6)
        assert (found["teacher"]["macs"], found["teacher"]["parameters"]) == (counts.macs, counts.parameters)
        assert set(asked) == {digest(teacher)}
        asked.clear()
        place = output / "kd-T4-a0.9-s0"
    report = cli("--report", "--output-dir", output)
    assert report.status == 0 and "the student is as large" in report.out


def test_soft_targets_take_the_bytes_of_all_epochs(tmp_path):
    said, arguments = [], SimpleNamespace(epochs=4, output_dir=tmp_path)
    session = SimpleNamespace(arguments=arguments, group=SimpleNamespace(say=said.append))
    teaching.say_size(session, SimpleNamespace(bytes_per_epoch=1_500_000))
    assert said == [f"Soft targets: 6.0 MB in {tmp_path / 'targets'}"]


def test_a_teacher_and_a_student_answer_together(cli, flags, trained, tmp_path, monkeypatch):
    both, asked = ("--teacher", trained / "teacher-s0", trained / "baseline-s0"), []
    monkeypatch.setattr(
        teaching, "speeds", lambda networks, *rest: asked.append(len(networks)) or speeds(networks, *rest)
    )
    assert cli(*flags, "--output-dir", tmp_path, *both).status == 0 and asked == [2]
    found = json.loads((tmp_path / "comparison.json").read_text())["teacher"]
    assert found["macs"] == sum(models.costs(name, 3, 16).macs for name in ("teacher", "student"))
    assert len(found["members"]) == 2


# Against NumPy -------------------------------------------------------------------------------------------------------


class Fixed:
    def __init__(self, logits):
        self.logits, self.bytes_per_epoch = logits, 10

    def epoch(self, epoch, description):
        return compress(self.logits + epoch)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_softened_mean_is_the_geometric_mean_of_the_softened(temperature, monkeypatch):
    monkeypatch.setattr("distill.ROWS", 8)  # 20 images in three parts
    random = np.random.default_rng(0)
    members = random.normal(0, 3, (3, 20, 5))
    ensemble = Ensemble([Fixed(torch.tensor(each, dtype=torch.float32)) for each in members])
    softened = np.exp(members / temperature)
    softened /= softened.sum(2, keepdims=True)
    expected = softened.prod(0) ** (1 / 3)
    expected /= expected.sum(1, keepdims=True)
    got = ensemble.epoch(2, "").double().numpy() / temperature
    got = np.exp(got) / np.exp(got).sum(1, keepdims=True)
    np.testing.assert_allclose(got, expected, atol=2e-3)
    assert ensemble.bytes_per_epoch == 30


def test_one_teacher_alone_answers_as_kept():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 20
    assert torch.equal(Ensemble([Fixed(logits)]).epoch(0, ""), compress(logits))
