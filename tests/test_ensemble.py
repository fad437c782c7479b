"""Several teachers that answer together, through the command line and against NumPy."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import models
from distill import Ensemble, SoftTargets, rounded
from report import Comparison


@pytest.fixture(scope="module")
def taught(tmp_path_factory, flags):
    """An output folder with two teachers and the students of both together; not to be changed."""
    import main

    output = tmp_path_factory.mktemp("taught") / "out"
    both = ("--teacher", output / "teacher-s0", output / "teacher-s1")
    for more in (("--train-teacher", "--seeds", 2), (*both, "--alpha", 0.9, "--seeds", 2)):
        assert main.main([str(word) for word in (*flags, "--output-dir", output, *more)]) == 0
    return output


@pytest.fixture
def copy(taught, tmp_path):
    return shutil.copytree(taught, tmp_path / "copy")


def test_two_seeds_are_the_teachers_that_two_commands_train(cli, flags, taught, tmp_path):
    for seed in (0, 1):
        assert cli(*flags, "--train-teacher", "--seed", seed, "--output-dir", tmp_path).status == 0
        alone, together = (models.read(each / f"teacher-s{seed}" / "model.pt") for each in (tmp_path, taught))
        assert models.digest(alone["state_dict"]) == models.digest(together["state_dict"])


def test_the_comparison_is_with_the_mean_of_the_teachers_logits(taught):
    logits = np.stack([np.load(taught / f"teacher-s{seed}" / "test_logits.npy") for seed in (0, 1)]).astype(float)
    (test,) = (taught / "data").glob("test-*.npz")
    labels = np.load(test)["labels"]
    teacher = json.loads((taught / "comparison.json").read_text())["teacher"]
    assert teacher["accuracy"] == (logits.mean(0).argmax(1) == labels).mean()
    assert sorted(teacher["members"]) == sorted((logits.argmax(2) == labels).mean(1))
    one = json.loads((taught / "teacher-s0" / "run.json").read_text())["costs"]["teacher"]
    assert (teacher["parameters"], teacher["macs"]) == (2 * one["parameters"], 2 * one["macs"])
    students = np.stack([np.load(taught / f"kd-T4-a0.9-s{seed}" / "test_logits.npy") for seed in (0, 1)])
    agreement = (students.argmax(2) == logits.mean(0).argmax(1)).mean(1)
    kd = json.loads((taught / "comparison.json").read_text())["kd"][0]
    assert kd["agreement_with_teacher"] == agreement.tolist()


def test_the_printed_table_tells_the_ensemble_from_its_members(cli, copy):
    got = cli("--report", "--output-dir", copy)
    teacher = Comparison(copy).teacher
    rows = [line.split() for line in got.out.splitlines() if "networks" in line or "each alone" in line]
    assert rows[0][:4] == ["Teacher,", "2", "networks", f"{teacher['accuracy']:.4f}"]
    mean, std = np.mean(teacher["members"]), np.std(teacher["members"], ddof=1)
    assert rows[1] == ["each", "alone", f"{mean:.4f}", f"{std:.4f}", "2"]
    assert f"- Teacher Network: {teacher['accuracy']:.4f}" in got.out
    assert {run["folder"].name for run in Comparison(copy).runs} >= {"teacher-s0", "teacher-s1"}


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b"hello")])
def test_the_report_names_a_member_whose_answers_are_gone_and_the_command_mends_it(cli, flags, copy, harm):
    path = max((copy / "data").glob("teacher-*.npz"))
    harm(path)
    got = cli("--report", "--output-dir", copy)
    assert got.status == 1 and path.name in got.err and "Traceback" not in got.err
    both = ("--teacher", copy / "teacher-s0", "--teacher", copy / "teacher-s1")
    got = cli(*flags, *both, "--output-dir", copy, "--alpha", 0.9, "--seeds", 2)
    assert got.status == 0 and got.out.count("(finished before)") == 4, got


def test_in_any_order_they_are_the_same_ensemble_and_copies_save_work(cli, flags, copy, tmp_path, monkeypatch):
    other = ("--teacher", copy / "teacher-s1", copy / "teacher-s0", "--alpha", 0.9)
    got = cli(*flags, *other, "--output-dir", copy, "--seeds", 2)
    assert got.status == 0 and got.out.count("(finished before)") == 4, got
    anew = tmp_path / "anew"
    for each in ("baseline-s0", "targets"):
        shutil.copytree(copy / each, anew / each)
    monkeypatch.setattr(SoftTargets, "_ask", lambda *_: pytest.fail("a teacher was asked twice about a view"))
    got = cli(*flags, *other, "--output-dir", anew)
    assert got.status == 0 and "kd-T4-a0.9-s0: test accuracy" in got.out, got
    (line,) = (line for line in got.out.splitlines() if "finished before" in line)
    assert line.startswith(f"{anew / 'baseline-s0'}:")
    weights = [models.read(each / "kd-T4-a0.9-s0" / "model.pt")["state_dict"] for each in (copy, anew)]
    assert models.digest(weights[0]) == models.digest(weights[1])


def test_a_member_alone_or_twice_is_not_the_ensemble(cli, flags, copy):
    words = (*flags, "--output-dir", copy, "--alpha", 0.9, "--teacher", copy / "teacher-s0")
    got = cli(*words)
    assert got.status == 1 and "another teacher" in got.err and "kd-T4-a0.9-s0" in got.err
    got = cli(*words, copy / "teacher-s0" / "model.pt")
    assert got.status == 1 and "are the same teacher" in got.err and got.err.count("teacher-s0") == 2
    got = cli(*words, copy / "teacher-s7")
    assert got.status == 1 and "teacher-s7 is not there" in got.err


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


def test_a_sweep_is_of_the_ensemble(cli, flags, taught, tmp_path):
    both = ("--teacher", taught / "teacher-s0", taught / "teacher-s1")
    got = cli(*flags, *both, "--output-dir", tmp_path, "--alpha", 0.5, 0.9, "--epochs", 1, "--val-fraction", 0.25)
    assert got.status == 0, got
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("selection/kd-*/run.json")]
    wanted = json.loads((taught / "kd-T4-a0.9-s0" / "run.json").read_text())["settings"]["teacher"]
    assert [run["settings"]["teacher"] for run in runs] == [wanted] * 2 and wanted.count("+") == 1


def test_a_teacher_is_asked_once_alone_or_in_an_ensemble(cli, flags, copy, tmp_path, monkeypatch):
    asked, ask = [], SoftTargets._ask
    monkeypatch.setattr(SoftTargets, "_ask", lambda self, *rest: asked.append(self.folder.name) or ask(self, *rest))
    words = (*flags, "--output-dir", tmp_path / "new", "--alpha", 0.9, "--teacher")
    assert cli(*words, copy / "teacher-s0").status == 0
    assert len(asked) == 2  # epochs
    shutil.rmtree(tmp_path / "new" / "kd-T4-a0.9-s0")
    assert cli(*words, copy / "teacher-s0", copy / "teacher-s1").status == 0
    assert len(asked) == 4 and len(set(asked)) == 2


class Fixed:
    def __init__(self, logits):
        self.logits, self.bytes_per_epoch = logits, 10

    def epoch(self, epoch, description):
        return rounded(self.logits + epoch)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_softened_mean_is_the_geometric_mean_of_the_softened(temperature):
    random = np.random.default_rng(0)
    members = random.normal(0, 3, (3, 20, 5))
    ensemble = Ensemble([Fixed(torch.tensor(each, dtype=torch.float32)) for each in members])
    softened = np.exp(members / temperature)
    softened /= softened.sum(2, keepdims=True)
    expected = softened.prod(0) ** (1 / 3)
    expected /= expected.sum(1, keepdims=True)
    got = (ensemble.epoch(2, "").double().numpy() / temperature).astype(float)
    got = np.exp(got) / np.exp(got).sum(1, keepdims=True)
    np.testing.assert_allclose(got, expected, atol=2e-3)
    assert ensemble.bytes_per_epoch == 30


def test_one_teacher_alone_answers_as_kept():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 20
    assert torch.equal(Ensemble([Fixed(logits)]).epoch(0, ""), rounded(logits))


def test_the_ablation_takes_the_views_from_the_same_ensemble(copy, flags):
    pictures = flags[flags.index("--data-dir") + 1]
    script = [sys.executable, ROOT / "benchmarks" / "ablation.py", copy, pictures, "--device", "cpu"]
    script += ["--temperature", 4, "--alpha", 0.9, "--teacher", copy / "teacher-s0"]
    alone, both = (
        subprocess.run([*map(str, script), *more], capture_output=True, text=True)
        for more in ([], [str(copy / "teacher-s1")])
    )
    assert alone.returncode == 1 and "not distilled from this teacher" in alone.stderr
    assert both.returncode == 0, both.stderr
    assert json.loads((copy / "fixed.json").read_text())["seeds"] == [0, 1]
