"""A loss of the user's own: its bits, its name, its place in the comparison, and what is refused before training."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, leave_out
from scipy.special import log_softmax, softmax

import models
from arguments import parse
from distill import distillation_loss
from reports import accuracy
from reports.text import claim, method
from runs.command import exit_status
from runs.files import Failure
from runs.hooks import Hook, find_hooks
from runs.machine import Machine
from runs.trial import try_loss

SAME = """
import torch
import torch.nn.functional as F


def same(student_logits, labels, teacher_logits, temperature, alpha):
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    student = F.log_softmax(student_logits / temperature, dim=1)
    soft = temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return alpha * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)


def noisy(student_logits, labels, teacher_logits, temperature, alpha):
    return F.mse_loss(student_logits, teacher_logits + torch.randn_like(teacher_logits))
"""


@pytest.fixture(scope="module")
def hooked(tmp_path_factory, finished, flags):
    """An output folder with students of a loss that equals the built-in one, and its file; not to be changed."""
    import main

    output = tmp_path_factory.mktemp("hooked") / "out"
    shutil.copytree(finished, output)
    file = output.parent / "own.py"
    file.write_text(SAME)
    words = (*flags, "--output-dir", output, "--loss", f"{file}:same", "--seeds", 2)
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch)
        assert exit_status(main.main, [str(word) for word in words]) == 0
    return output, file


def digest(path):
    return models.digest(models.load(path / "model.pt").state_dict())


# Training and comparing ----------------------------------------------------------------------------------------------


def test_a_loss_that_equals_the_built_in_one_gives_its_bits(hooked):
    output, _ = hooked
    for seed in (0, 1):
        assert digest(output / f"kd-same-T4-a0.1-s{seed}") == digest(output / f"kd-T4-a0.1-s{seed}")


def test_the_comparison_has_it_beside_plain_distillation_and_the_baseline(cli, hooked):
    output, _ = hooked
    found = json.loads((output / "comparison.json").read_text())
    own, plain = found["kd"]
    assert own["loss"] == "same" and "loss" not in plain and own["accuracies"] == plain["accuracies"]
    assert found["settings"]["loss_file"] == "own.py" and len(found["settings"]["loss_sha256"]) == 64
    assert plain["first_over_this"]["by_seed"] == [0, 0] and own["improvement"] == plain["improvement"]
    text = cli("--report", "--output-dir", output).out  # which needs no file
    assert "- Loss: same in own.py" in text
    over, page = "same, T=4, alpha=0.1 over plain T=4, alpha=0.1", (output / "report.html").read_text()
    assert re.search(f"{over}\n +\\+0.00 +2\n", text) and over in page and accuracy.DIFFERENCES in page
    assert "KD, same, T=4, alpha=0.1" in text and (output / "report.html").read_text().count("same, T=4, alpha=0.1")
    rows = (output / "kd-same-T4-a0.1-s0" / "history.csv").read_text().splitlines()
    assert (
        rows[1].split(",")[2] == "" and float(rows[1].split(",")[3]) > 0
    )  # no soft loss is known of it; a hard one is


def test_without_the_option_the_comparison_is_the_plain_one(cli, flags, hooked, tmp_path):
    output = Path(shutil.copytree(hooked[0], tmp_path / "out"))
    got = cli(*flags, "--output-dir", output)
    assert got.status == 0 and "- Loss" not in got.out
    assert [each.get("loss") for each in json.loads((output / "comparison.json").read_text())["kd"]] == [None, "same"]
    gain = {"mean": 1.0, "ci95": [0.5, 1.5], "p_value": 0.01, "by_seed": [1, 1], "ci95_with_images": None}
    text = claim(gain, 2, 100, method({"loss": "dkd"}))
    assert text.startswith("Gain with KD by dkd: +1.00 points") and method({}) == "KD"


def test_losses_of_one_name_have_rows_of_their_own(cli, flags, hooked, tmp_path):
    output, edited = Path(shutil.copytree(hooked[0], tmp_path / "out")), tmp_path / "own.py"
    edited.write_text(SAME + "\n")
    got = cli(*flags, "--output-dir", output, "--loss", f"{edited}:same", "--seed", 2)
    assert got.status == 0
    for file in (hooked[1], edited):
        digest = Hook("--loss", file, "same", file.read_bytes()).sha256
        assert got.out.count(f"KD, same {digest[:8]}, T=4, alpha=0.1") == 3, got.out  # a row in each of three tables


def test_one_byte_more_is_another_run_and_is_refused_by_name(cli, flags, hooked, tmp_path):
    output, file = Path(shutil.copytree(hooked[0], tmp_path / "out")), hooked[1]
    edited = tmp_path / "own.py"
    edited.write_text(SAME + "\n")
    got = cli(*flags, "--output-dir", output, "--loss", f"{edited}:same")
    digests = [Hook("--loss", each, "same", each.read_bytes()).sha256[:12] for each in (file, edited)]
    assert got.status == 1 and "the loss in own.py was edited since" in got.err and "--overwrite" in got.err
    assert all(each in got.err for each in digests) and digests[0] != digests[1]

    other = tmp_path / "other.py"  # a function of that name, not the same one edited
    other.write_text(SAME + "\n")
    got = cli(*flags, "--output-dir", output, "--loss", f"{other}:same")
    assert got.status == 1 and "a loss of that name in own.py, not other.py (rename a function to keep" in got.err
    moved = tmp_path / "moved.py"  # the same content elsewhere is the same run
    moved.write_text(SAME)
    assert "(finished before)" in cli(*flags, "--output-dir", output, "--loss", f"{moved}:same").out


def test_what_runs_is_what_was_hashed(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("def f(classes):\n    return 1\n")
    found = find_hooks(parse(["--loss", f"{file}:f"])).loss
    file.write_text("def f(classes):\n    return 2\n")
    assert found.loaded(3) == 1 and found.sha256 == hashlib.sha256(b"def f(classes):\n    return 1\n").hexdigest()


def test_at_alpha_0_the_teacher_is_asked_all_the_same(cli, flags, finished, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    file = tmp_path / "own.py"
    file.write_text(SAME)
    assert cli(*flags, "--output-dir", output, "--loss", f"{file}:noisy", "--alpha", 0, "--epochs", 2).status == 0
    first = digest(output / "kd-noisy-T4-a0-s0")
    assert first != digest(output / "baseline-s0") == digest(output / "kd-T4-a0-s0")
    torch.manual_seed(5)  # what a loss draws is a function of seed and step
    shutil.rmtree(output / "kd-noisy-T4-a0-s0")
    assert cli(*flags, "--output-dir", output, "--loss", f"{file}:noisy", "--alpha", 0, "--epochs", 2).status == 0
    assert digest(output / "kd-noisy-T4-a0-s0") == first


# What is refused -----------------------------------------------------------------------------------------------------

ODD = {
    "def f(s, l, t, T, a): return (s - t).pow(2)": "a tensor of shape (8, 3), but a loss is a scalar",
    "def f(s, l, t, T, a): return 1.0": "returns float, but a loss is a scalar tensor",
    "def f(s, l, t, T, a): return s.detach().sum()": "without a gradient",
    "def f(s, l, t, T, a): return 0 * s.sum()": "without a gradient",
    "def f(s, l, t, T, a): return t.requires_grad_().sum()": "without a gradient",
    "def f(s, l, t, T, a): return (s / 0).sum()": "is not finite",
    "n = []\ndef f(s, l, t, T, a):\n    n.append(0)\n    return len(n) * s.pow(2).mean()": "not remember earlier calls",
    "def f(s, l, t, T, a):\n    return s.mul_(2).pow(2).mean()": "changes student_logits, which are used after it",
    "import torch\nf = torch.nn.Linear(3, 1)": "has parameters of its own, which would not be trained",
    "def f(s, l): return s.sum()": "takes 2 positional arguments but 5 were given",
    "def f(s, l, t, T, a):\n    return s @ t": "line 2, in f\n    return s @ t\n",
    "import nothing_of_this_name": "ModuleNotFoundError: No module named 'nothing_of_this_name'",
    "def f(": "SyntaxError",
    "raise SystemExit(3)": "SystemExit: 3",
    "def g(): pass": "has no function 'f'. It has: g.",
    "f = 3": "has no function 'f'. It has none.",
}


@pytest.mark.parametrize(("text", "told"), ODD.items())
def test_a_loss_that_cannot_be_trained_is_refused(tmp_path, text, told):
    file = tmp_path / "odd.py"
    file.write_text(text)
    with pytest.raises(Failure) as failure:
        try_loss(Hook("--loss", file, "f", file.read_bytes()), 3, 4.0, 0.1, Machine(torch.device("cpu")))
    words = str(failure.value)
    assert told in words and str(file) in words and "site-packages" not in words and len(words.splitlines()) < 12


def test_it_is_refused_before_images_are_read_or_runs_removed(cli, flags, finished, tmp_path):
    file = tmp_path / "odd.py"
    file.write_text("def f(s, l, t, T, a): return 1.0")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*-s0/*")}
    words = ("--output-dir", finished, "--data-dir", "nowhere", "--overwrite", "--loss", f"{file}:f")
    got = cli(*flags, *words)
    assert got.status == 1 and f"{file}:f returns float" in got.err and "nowhere" not in got.err and not got.out, got
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*-s0/*")} == before


def test_a_loss_that_has_no_gradient_left_is_trained_on(cli, flags, copy, tmp_path):
    """As a margin loss may have none once all margins are kept; a network without a gradient is no dead one then."""
    file = tmp_path / "margin.py"
    file.write_text("def kept(student, *rest):\n    return (student.abs() - 3).relu().sum()\n")
    got = cli(*flags, "--output-dir", copy, "--loss", f"{file}:kept")
    assert got.status == 0 and "kd-kept-T4-a0.1-s0: test accuracy" in got.out, got


def test_a_loss_is_tried_with_all_pairs_of_a_sweep(cli, flags, finished, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def f(s, l, t, T, a):\n    return s.pow(2).mean() if T == 2 else 1\n")
    words = ("--output-dir", finished, "--data-dir", "nowhere", "--loss", f"{path}:f", "--temperature", 2, 4)
    got = cli(*flags, *words)
    assert got.status == 1 and "returns int, but a loss is a scalar tensor" in got.err and not got.out


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("--loss", "absent.py:f"), 1, "--loss absent.py does not exist."),
        (("--loss", "examples/dkd.py"), 2, "is not FILE.py:FUNCTION"),
        (("--loss", "examples/dkd:dkd"), 2, "is not FILE.py:FUNCTION"),
        (("--loss", "examples/dkd.py:dkd", "--train-teacher"), 2, "--loss is for students"),
        (("--temperature", "1e-300"), 2, "'1e-300' is not a number from 0.01 to 1000"),
        (("--loss", "examples/dkd.py:dkd", "--report"), 2, "--loss cannot be combined with --report"),
    ],
)
def test_words_that_name_no_loss(cli, words, status, told):
    got = cli(*words)
    assert got.status == status and told in got.err and len(got.err.splitlines()) == 1


# Those of examples/, against NumPy --------------------------------------------------------------------------------


def example(name, function):
    path = ROOT / "examples" / name
    assert len(path.read_text().splitlines()) < 30
    return Hook("--loss", path, function, path.read_bytes()).loaded


@pytest.fixture
def batch():
    random = np.random.default_rng(3)
    return random.normal(0, 4, (7, 5)), random.integers(0, 5, 7), random.normal(0, 4, (7, 5))


def called(function, batch, *rest):
    student, labels, teacher = batch
    tensors = torch.tensor(student, dtype=torch.float32), torch.tensor(labels), torch.tensor(teacher).float()
    return function(*tensors, *rest).item()


def cross_entropy(student, labels):
    return -log_softmax(student, 1)[np.arange(len(labels)), labels].mean()


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (4.0, 0.9), (2.0, 1.0)])
def test_dkd_is_the_papers(batch, temperature, alpha):
    """Image by image: TCKD of (target, all others), NCKD of the others renormalized. Ten times the loss at alpha 0.9 is
    what the paper minimizes, cross-entropy + T^2 (1 TCKD + 8 NCKD)."""
    student, labels, teacher = batch
    total = 0.0
    for s, label, t in zip(student, labels, teacher, strict=True):
        q, p = softmax(s / temperature), softmax(t / temperature)
        tckd = p[label] * np.log(p[label] / q[label]) + (1 - p[label]) * np.log((1 - p[label]) / (1 - q[label]))
        others = [k for k in range(5) if k != label]
        p_hat, q_hat = p[others] / (1 - p[label]), q[others] / (1 - q[label])
        total += tckd + 8 * (p_hat * np.log(p_hat / q_hat)).sum()
    soft, hard = temperature**2 * total / 7, cross_entropy(student, labels)
    function = example("dkd.py", "dkd")
    assert 10 * called(function, batch, temperature, 0.9) == pytest.approx(hard + soft, rel=1e-5)
    wanted = alpha * soft / 9 + (1 - alpha) * hard
    assert called(function, batch, temperature, alpha) == pytest.approx(wanted, rel=1e-5)


def test_dkd_with_the_weights_of_plain_distillation_is_plain_distillation(batch, monkeypatch):
    """KL = TCKD + (1 - p_target) NCKD, p being the teacher's; so with these weights, image by image."""
    function = example("dkd.py", "dkd")
    for number in range(7):
        one = tuple(each[number : number + 1] for each in batch)
        sure = softmax(one[2][0] / 4)[one[1][0]]
        monkeypatch.setitem(function.__globals__, "TARGET", 1.0)
        monkeypatch.setitem(function.__globals__, "OTHERS", float(1 - sure))
        assert called(function, one, 4.0, 1.0) == pytest.approx(called(distillation_loss, one, 4.0, 1.0), rel=1e-4)


@pytest.mark.parametrize(("temperature", "alpha"), [(2.0, 0.9), (4.0, 0.5)])
def test_logit_standardisation_is_the_papers(batch, temperature, alpha):
    """The KL of softened Z-scores, each image's logits by their own mean and standard deviation."""
    student, labels, teacher = batch
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        q, p = (softmax((each - each.mean()) / each.std(ddof=1) / temperature) for each in (s, t))
        total += (p * np.log(p / q)).sum()
    wanted = alpha * temperature**2 * total / 7 + (1 - alpha) * cross_entropy(student, labels)
    function = example("logit_standardisation.py", "standardised")
    assert called(function, batch, temperature, alpha) == pytest.approx(wanted, rel=1e-5)
    stretched = (3 * student + 5, labels, teacher)  # its softened logits do not know the student's scale
    assert called(function, stretched, temperature, 1.0) == pytest.approx(
        called(function, batch, temperature, 1.0), rel=1e-4
    )


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.9), (4.0, 0.5)])
def test_without_ranking_all_classes_but_the_teachers_first_are_equally_likely(batch, temperature, alpha):
    student, labels, teacher = batch
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        q, p = softmax(s / temperature), softmax(t / temperature)
        even = [p.max() if k == t.argmax() else (1 - p.max()) / 4 for k in range(5)]
        total += (even * np.log(even / q)).sum()
    wanted = alpha * temperature**2 * total / 7 + (1 - alpha) * cross_entropy(student, labels)
    function = example("without_ranking.py", "without_ranking")
    assert called(function, batch, temperature, alpha) == pytest.approx(wanted, rel=1e-5)
    assert called(function, batch, temperature, 1.0) != pytest.approx(
        called(distillation_loss, batch, temperature, 1.0), rel=0.01
    )
    reordered = teacher.copy()  # the ranking of the others does not count
    for row in reordered:
        others = [k for k in range(5) if k != row.argmax()]
        row[others] = row[others[::-1]]
    assert called(function, (student, labels, reordered), temperature, alpha) == pytest.approx(wanted, rel=1e-5)


EXAMPLES = [("dkd.py", "dkd"), ("logit_standardisation.py", "standardised"), ("without_ranking.py", "without_ranking")]


@pytest.mark.parametrize(("name", "function"), EXAMPLES)
def test_the_examples_bear_teachers_that_are_sure(name, function):
    student = torch.tensor([[40.0, -40, 0, 0], [0, 0, 0, 0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -60000, -500, -500], [0, -80, -80, -80]])
    loss = example(name, function)(student, torch.tensor([0, 1]), teacher, 4.0, 0.9)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
