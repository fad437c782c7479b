"""The command line as a person types it, and the layout of the program behind it."""

import ast
import contextlib
import csv
import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CIFAR10_DIR, ROOT, needs_cifar10
from PIL import Image

import models
import runs.settings
import train
from arguments import Usage, parse, parser
from data import Views
from reports import figures
from runs.code import CODE
from runs.files import Failure
from runs.progress import Progress
from runs.signals import Interrupted
from runs.teachers import teacher_command
from sources import folders, shapes

BLOCK = re.compile(
    r"""^Training Parameters:
- Temperature: (\d+\.\d+)
- Alpha: (\d+\.\d+)
- Epochs: (\d+)
- Batch Size: (\d+)

Final Test Accuracies:
- Teacher Network: (\d\.\d{4})
- Student Network \(with KD\): (\d\.\d{4})
- Student Network \(Baseline\): (\d\.\d{4})

Improvement with KD: (-?\d+\.\d\d)%
$""",
    re.MULTILINE,
)

EPOCH = re.compile(
    r"(?P<title>.+): epoch (?P<epoch>\d+) of (?P<epochs>\d+), loss \d+\.\d{4}"
    r"(?P<parts> \(soft \d+\.\d{4}, hard \d+\.\d{4}\))?, training accuracy [01]\.\d{4}"
    r"(?P<validation>, validation accuracy [01]\.\d{4})?, \d+\.\d s, [\d:]+ left(?P<later> for all runs)?"
)


def accuracy(folder):
    return json.loads((folder / "run.json").read_text())["accuracy"]


def written(folder):
    """When each model.pt in `folder` was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/model.pt")}


def logged(err):
    """The epochs that standard error tells of, which must tell of nothing else."""
    lines = [EPOCH.fullmatch(line) for line in err.splitlines()]
    assert all(lines), err
    return [f"{each['title']}: {each['epoch']} of {each['epochs']}{each['later'] or ''}" for each in lines]


@contextlib.contextmanager
def failing_at_the_end(monkeypatch, error):
    """Within this context a run raises `error` when its last epoch is trained and saved, but the run not finished."""
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "finish", Mock(side_effect=error))
        yield


# Training and comparing ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.draws
def test_two_commands_train_and_compare(cli, flags, tmp_path):
    output = tmp_path / "out"
    taught = cli(*flags, "--train-teacher", "--output-dir", output)
    assert taught.status == 0, taught
    assert f"teacher-s0: test accuracy {accuracy(output / 'teacher-s0'):.4f}" in taught.out
    assert re.search(r"Teacher: [\d,]+ parameters, [\d.]+ million multiply-adds per image", taught.out)
    compared = cli(*flags, "--temperature", "4", "--alpha", "0.1", "--output-dir", output)
    assert compared.status == 0, compared
    found = BLOCK.search(compared.out)
    assert found, compared.out
    assert found.groups()[:4] == ("4.0", "0.1", "2", "16")
    accuracies = [accuracy(output / name) for name in ("teacher-s0", "kd-T4-a0.1-s0", "baseline-s0")]
    assert found.groups()[4:7] == tuple(f"{value:.4f}" for value in accuracies)
    assert float(found[8]) == pytest.approx(100 * (accuracies[1] - accuracies[2]), abs=0.005)
    names = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    assert names == {
        "teacher-s0", "kd-T4-a0.1-s0", "baseline-s0", "targets", "data", "comparison.json", "comparison.csv", "figures",
        "report.html",
    }  # fmt: skip
    # No progress bar where there is no terminal, but one line an epoch for the log.
    assert logged(taught.err) == ["teacher-s0: 1 of 2", "teacher-s0: 2 of 2"]
    kd, baseline = "[1/2] kd-T4-a0.1-s0", "[2/2] baseline-s0"
    assert logged(compared.err) == [
        f"{kd}: 1 of 2 for all runs", f"{kd}: 2 of 2 for all runs", f"{baseline}: 1 of 2", f"{baseline}: 2 of 2",
    ]  # fmt: skip
    parts = [EPOCH.fullmatch(line)["parts"] for line in compared.err.splitlines()]
    assert all(parts[:2]) and not any(parts[2:])


def test_a_command_can_be_repeated(cli, flags, copy):
    before = written(copy)
    assert len(before) == 3
    for more in ([], ["--train-teacher"]):
        repeated = cli(*flags, "--output-dir", copy, *more)
        assert repeated.status == 0 and "(finished before)" in repeated.out and not repeated.err, repeated
        assert "Memory:" not in repeated.out  # which is for large images
    assert written(copy) == before


def test_another_alpha_does_not_train_the_baseline_again(cli, flags, copy):
    before = written(copy)["baseline-s0"]
    got = cli(*flags, "--output-dir", copy, "--alpha", "0.9", "--temperature", "2")
    assert got.status == 0 and BLOCK.search(got.out)[1] == "2.0"
    assert written(copy)["baseline-s0"] == before
    comparison = json.loads((copy / "comparison.json").read_text())
    assert [(e["temperature"], e["alpha"]) for e in comparison["kd"]] == [(2.0, 0.9), (4.0, 0.1)]


def test_compile_reaches_the_training_and_is_recorded(cli, flags, finished, tmp_path, monkeypatch):
    networks = []
    monkeypatch.setattr(torch, "compile", lambda network, **_: networks.append(network) or network)
    assert cli(*flags, "--train-teacher", "--epochs", 1, "--output-dir", tmp_path, "--compile").status == 0
    assert len(networks) == 1 and not parse(["--no-compile"]).compile and not parse([]).compile
    for output, compiled in ((tmp_path, True), (finished, False)):
        assert json.loads((output / "teacher-s0/run.json").read_text())["environment"]["compiled"] is compiled


def test_alpha_0_is_the_baseline_bit_for_bit(cli, flags, copy):
    assert cli(*flags, "--output-dir", copy, "--alpha", "0").status == 0
    kd, baseline = (models.load(copy / name / "model.pt").state_dict() for name in ("kd-T4-a0-s0", "baseline-s0"))
    assert models.digest(kd) == models.digest(baseline)
    assert (copy / "kd-T4-a0-s0/test_logits.npy").read_bytes() == (copy / "baseline-s0/test_logits.npy").read_bytes()
    comparison = json.loads((copy / "comparison.json").read_text())
    assert comparison["kd"][0]["improvement"]["p_value"] == 1.0


@pytest.mark.slow
def test_labels_are_smoothed_for_the_teacher_and_for_both_students(cli, flags, copy, tmp_path):
    words = (*flags, "--output-dir", tmp_path / "new", "--label-smoothing", 0.5)
    assert cli(*words, "--train-teacher").status == 0
    got = cli(*words)
    assert "- Label Smoothing: 0.5" in got.out
    assert "(teacher; labels smoothed by 0.5, which makes a worse teacher, arXiv 1906.02629)" in got.out
    assert "- Label Smoothing" not in cli("--report", "--output-dir", copy).out
    assert "smoothed by" not in cli(*flags, "--output-dir", copy).out

    def digests(folder):
        return [models.digest(models.load(folder / name / "model.pt").state_dict()) for name in written(copy)]

    assert not set(digests(copy)) & set(digests(tmp_path / "new"))
    assert cli(*words, "--alpha", 0).status == 0
    alone, taught = (models.load(tmp_path / "new" / name / "model.pt") for name in ("baseline-s0", "kd-T4-a0-s0"))
    assert models.digest(alone.state_dict()) == models.digest(taught.state_dict())
    got = cli(*flags, "--output-dir", tmp_path / "new")
    assert got.status == 1 and "label smoothing 0.5 instead of 0" in got.err, got


@pytest.mark.slow
def test_bfloat16_trains_float32_weights_and_alpha_0_is_the_baseline_there_too(
    cli, flags, finished, tmp_path, monkeypatch
):
    plain, stepped_in = train.orthogonalize, set()
    monkeypatch.setattr(train, "orthogonalize", lambda matrix: stepped_in.add(matrix.dtype) or plain(matrix))
    for words in (["--train-teacher"], ["--alpha", "0.9"], ["--alpha", "0"]):
        assert cli(*flags, "--precision", "bf16", "--output-dir", tmp_path, *words).status == 0
    assert stepped_in == {torch.bfloat16}
    names = ("teacher-s0", "kd-T4-a0.9-s0", "kd-T4-a0-s0", "baseline-s0")
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in names]
    assert {record["environment"]["precision"] for record in records} == {"bf16"}
    weights = [models.load(tmp_path / name / "model.pt").state_dict() for name in names]
    assert all(tensor.dtype is not torch.bfloat16 for each in weights for tensor in each.values())
    assert models.digest(weights[1]) != models.digest(weights[2]) == models.digest(weights[3])
    in_float32 = models.load(finished / "baseline-s0" / "model.pt").state_dict()
    assert models.digest(weights[3]) != models.digest(in_float32)
    for name in names:  # the test set is evaluated in float32
        logits = torch.from_numpy(np.load(tmp_path / name / "test_logits.npy"))
        assert logits.dtype == torch.float32 and (logits != logits.bfloat16()).any()


def test_both_students_start_alike_and_see_the_same_batches(cli, flags, copy, monkeypatch):
    seen, starts, train_one_epoch = {}, {}, train.train_one_epoch

    class Recorded:
        def __init__(self, views, batches):
            self.views, self.batches = views, batches

        def batch(self, epoch, indices):
            images = self.views.batch(epoch, indices)
            self.batches.append((epoch, indices.tolist(), images.numpy().tobytes()))
            return images

    def record(model, optimizer, views, *rest):
        name = rest[-1].run.name  # of its Progress
        starts.setdefault(name, models.digest(model.state_dict()))
        recorded = Recorded(views, seen.setdefault(name, []))
        train_one_epoch(model, optimizer, recorded, *rest)

    monkeypatch.setattr(train, "train_one_epoch", record)
    assert cli(*flags, "--output-dir", copy, "--overwrite").status == 0
    kd, baseline = "kd-T4-a0.1-s0", "baseline-s0"
    assert seen.keys() == {kd, baseline} and starts[kd] == starts[baseline]
    assert len(seen[kd]) == 6 and seen[kd] == seen[baseline]


def test_a_teacher_from_elsewhere(cli, flags, finished, tmp_path):
    for named in (finished / "teacher-s0", finished / "teacher-s0" / "model.pt"):
        got = cli(*flags, "--output-dir", tmp_path, "--teacher", named, "--epochs", 1)
        assert got.status == 0, got
        assert f"Teacher Network: {accuracy(finished / 'teacher-s0'):.4f}" in got.out


def test_the_only_teacher_of_a_folder_serves_every_seed(cli, flags, copy):
    assert cli(*flags, "--output-dir", copy, "--seed", 3).status == 0
    assert (copy / "kd-T4-a0.1-s3" / "model.pt").exists()


def test_of_several_teachers_one_must_be_named(cli, flags, copy):
    assert cli(*flags, "--train-teacher", "--output-dir", copy, "--seed", 1, "--epochs", 1).status == 0
    got = cli(*flags, "--output-dir", copy, "--seed", 2)
    assert got.status == 1 and "holds several teachers. Name one with --teacher" in got.err
    assert "teacher-s0" in got.err and "teacher-s1" in got.err


def test_batch_sizes_and_a_single_step(cli, images, tmp_path):
    small = ("--dataset", "folder", "--data-dir", images, "--image-size", 16, "--device", "cpu", "--epochs", 1)
    small = (*small, "--batch-size", 5000, "--output-dir", tmp_path)
    assert cli(*small, "--train-teacher").status == 0
    got = cli(*small)
    assert got.status == 0 and "- Batch Size: 5000" in got.out


def test_options_reach_what_they_are_about(cli, flags, tmp_path, monkeypatch):
    workers, runs, load = [], [], folders.load

    def load_folder(directory, image_size, count, cache, **rest):
        workers.append(count)
        return load(directory, image_size, count, cache, **rest)

    monkeypatch.setattr(folders, "load", load_folder)
    monkeypatch.setattr(train, "train", lambda run, data, machine, options, **_: runs.append((run, options)) or 0.0)
    words = ("--weight-decay", 0.001, "--num-workers", 1, "--save-every", 7, "--output-dir", tmp_path)
    assert cli(*flags, *words, "--train-teacher").status == 0
    ((run, options),) = runs
    assert workers == [1] and options.save_every == 7 and run.settings.weight_decay == 0.001
    assert run.settings.learning_rate == pytest.approx(0.2 * (16 / 128) ** 0.5) and run.settings.padding == 1
    assert cli(*flags, *words, "--train-teacher", "--padding", 0).status == 0 and runs[-1][0].settings.padding == 0
    assert cli(*flags, *words, "--train-teacher", "--cutout", 16).status == 0
    assert runs[-1][0].settings.augmentation == {"padding": 1, "cutout": 16, "mirror": True}
    refused = cli(*flags, *words, "--train-teacher", "--cutout", 17)
    assert refused.status == 2 and "--cutout must be at most --image-size, 16" in refused.err
    got = cli(*flags, *words, "--train-teacher", "--epochs", 61)
    assert got.status == 0
    assert "Views: moved by up to 2 pixels, mirrored in every second epoch, a square of 6 by 6 blanked\n" in got.out
    assert runs[-1][0].settings.augmentation == {"padding": 2, "cutout": 6, "mirror": True}
    got = cli(*flags, *words, "--train-teacher", "--no-mirror")
    assert got.status == 0 and "Views: moved by up to 1 pixel, not mirrored\n" in got.out
    assert runs[-1][0].settings.augmentation == {"padding": 1, "cutout": 0, "mirror": False}
    refused = cli(*flags, *words, "--train-teacher", "--padding", 16)
    assert refused.status == 2 and "--padding must be less than --image-size, 16" in refused.err


@pytest.mark.parametrize(
    ("more", "views"),
    [
        ((), (1, 0, True)),
        (("--padding", 0), (0, 0, True)),
        (("--padding", 0, "--cutout", 6, "--no-mirror"), (0, 6, False)),
    ],
)
def test_the_teacher_is_asked_about_views_that_the_students_see(cli, flags, copy, monkeypatch, more, views):
    monkeypatch.setattr(runs.settings, "LONG", 1)  # so that a teacher's own views would have squares blanked
    asked, batch = [], Views.batch
    watched = lambda self, *rest: asked.append((self.padding, self.cutout, self.mirror)) or batch(self, *rest)  # noqa: E731
    monkeypatch.setattr(Views, "batch", watched)
    shutil.rmtree(copy / "targets")
    got = cli(*flags, "--output-dir", copy, "--overwrite", *more)
    assert got.status == 0 and ("blanked" in got.out) == (views[1] > 0)
    steps = 2 * 2 * (48 // 16)  # epochs of two students
    assert set(asked) == {views} and len(asked) > steps  # more: those of the teacher


def test_without_mirrored_images(cli, flags, finished, tmp_path):
    """Digits, letters, signs: students are told if their teacher never saw a mirrored image; the option is typed in
    every command that is named."""
    words = (*flags, "--epochs", 1, "--output-dir", tmp_path)
    missing = cli(*words, "--no-mirror")
    assert missing.status == 1 and " --no-mirror " in missing.err.splitlines()[-1], missing
    assert cli(*shlex.split(missing.err.splitlines()[-1])[2:], *flags).status == 0
    warning = "Warning: a teacher was trained with --no-mirror, but is asked about mirrored images"
    other = cli(*words, "--no-mirror", "--teacher", finished / "teacher-s0", "--output-dir", tmp_path / "other")
    assert other.status == 0 and "Warning: a teacher was trained without --no-mirror, so on mirrored" in other.out, (
        other
    )
    mirrored = cli(*words)
    assert mirrored.status == 0 and warning in mirrored.out, mirrored
    both = ("--teacher", tmp_path / "teacher-s0", finished / "teacher-s0", "--output-dir", tmp_path / "both")
    assert warning in cli(*words, *both).out  # one of them
    refused = cli(*words, "--no-mirror")
    assert (
        "kd-T4-a0.1-s0 holds a run with other settings: mirror True instead of False.\nAdd --mirror to use"
        in refused.err
    )
    got = cli(*words, "--no-mirror", "--overwrite")
    assert got.status == 0 and "Warning" not in got.out, got
    again = cli(*words)
    assert "mirror False instead of True.\nAdd --no-mirror to use or resume it as it is, --overwrite" in again.err
    with open(tmp_path / "comparison.csv", newline="") as file:
        assert {row["mirror"] for row in csv.DictReader(file)} == {"False"}


# Overwriting, and sweeps ---------------------------------------------------------------------------------------------


def test_overwrite_replaces_only_what_the_command_trains(cli, flags, copy):
    before = written(copy)
    refused = cli(*flags, "--output-dir", copy, "--epochs", "1")
    assert refused.status == 1 and "epochs 2 instead of 1" in refused.err and "Add --overwrite" in refused.err
    assert written(copy) == before
    assert cli(*flags, "--output-dir", copy, "--epochs", "1", "--overwrite").status == 0
    after = written(copy)
    assert after["teacher-s0"] == before["teacher-s0"] and after["baseline-s0"] != before["baseline-s0"]
    assert "Epochs: 1" in cli("--report", "--output-dir", copy).out


def test_a_sweep_checks_all_runs_before_it_trains_any(cli, flags, copy):
    """The baseline of 2 epochs would stop the comparison after the sweep, with 1 epoch."""
    words = (*flags, "--output-dir", copy, "--epochs", 1)
    got = cli(*words, "--alpha", 0.1, 0.9)
    assert got.status == 1 and "epochs 2 instead of 1" in got.err
    assert not list((copy / "selection").glob("*/model.pt"))
    before = written(copy)["kd-T4-a0.1-s0"]
    got = cli(*words, "--alpha", 0.5, 0.9, "--overwrite")
    assert got.status == 0, got
    assert written(copy)["kd-T4-a0.1-s0"] == before  # this command does not train it
    # A tenth of the training images, unless another part is asked for, is what a sweep is judged on.
    assert "judged on 6 of the 48 training images" in got.out
    record = json.loads((copy / "selection" / "kd-T4-a0.9-s0" / "run.json").read_text())
    assert record["settings"]["val_fraction"] == 0.1
    assert "[2/3] kd-T4-a0.9-s0: 1 of 1 for all runs" in logged(got.err)
    judged = [bool(EPOCH.fullmatch(line)["validation"]) for line in got.err.splitlines()]
    assert judged == [True, True, True, False, False]


@pytest.mark.parametrize("more", [("--alpha", 0.1, 0.9, "--val-fraction", 0.25), ("--demo", "--alpha", 0.1)])
def test_an_interrupted_overwrite_is_resumed_without_it(cli, flags, copy, monkeypatch, more):
    """`copy` holds kd-T4-a0.1-s0 and a baseline of 2 epochs, which must not stop the command that resumes."""
    command = (*flags, "--output-dir", copy, "--epochs", 1, *more)
    with failing_at_the_end(monkeypatch, Interrupted(2)):
        got = cli(*command, "--overwrite")
    assert got.status == 130 and got.err.endswith("is saved. The same command without --overwrite resumes it.\n")
    assert cli(*command).status == 0


def test_a_sweep_that_was_there_does_not_stop_who_resumes_the_demo(cli, flags, copy, monkeypatch):
    """Nor is a student of it overwritten that is named as a teacher."""
    words = (*flags, "--output-dir", copy, "--alpha", 0.1, 0.9, "--train-fraction", 0.5)
    assert cli(*words).status == 0
    got = cli(*words, "--overwrite", "--teacher", copy / "selection" / "kd-T4-a0.1-f0.5-s0")
    assert got.status == 1 and "--overwrite would remove" in got.err
    words = (*words, "--demo", "--epochs", 1)
    with failing_at_the_end(monkeypatch, Interrupted(2)):
        assert cli(*words, "--overwrite").status == 130
    assert cli(*words).status == 0


def test_an_interruption_after_the_training_is_resumed_without_overwrite(cli, flags, copy, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(figures, "draw", Mock(side_effect=Interrupted(15)))
        got = cli(*flags, "--epochs", 1, "--output-dir", copy, "--overwrite")
    assert got.status == 143 and got.err.endswith("\nStopped. The same command without --overwrite resumes it.\n")


def test_a_failure_after_overwrite_began_says_how_to_resume(cli, flags, copy, monkeypatch):
    advice = "repeat it without --overwrite to go on from there."
    words = (*flags, "--output-dir", copy, "--overwrite")
    with failing_at_the_end(monkeypatch, Failure("the disk is full")):
        got = cli(*words)
    assert got.status == 1 and got.err.endswith(f"What this command has trained is kept: {advice}\n"), got

    def spoil(optimizer):
        optimizer.param_groups[1]["params"][0].data.fill_(float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(train.Muon, "step", spoil)
        got = cli(*words)
    assert got.status == 1 and "diverged" in got.err and "without --overwrite" not in got.err


@pytest.mark.parametrize("error", [Failure("The disk is full."), Interrupted(2)], ids=["failure", "interruption"])
def test_what_ends_before_anything_is_removed_does_not_speak_of_overwrite(cli, flags, copy, monkeypatch, error):
    """Without --overwrite the command would reuse the runs that were to be replaced."""
    before = written(copy)
    monkeypatch.setattr(folders, "load", Mock(side_effect=error))
    got = cli(*flags, "--output-dir", copy, "--overwrite")
    assert got.status in (1, 130) and "--overwrite" not in got.err and written(copy) == before


# What is answered without PyTorch ------------------------------------------------------------------------------------

ANSWERS = {
    "help": (["--help"], 0, "usage: python main.py [options]"),
    "wrong": (["--epochs", "many"], 2, "'many' is not an integer"),
    "typo": (["--epoch", "3"], 2, "unrecognized arguments: --epoch 3 (is --epochs meant?)"),
    "no teacher": ([], 1, "There is no teacher in"),
    "absent teacher": (["--teacher", "nobody"], 1, "--teacher nobody does not exist."),
    "no report": (["--report"], 1, "does not exist: --report needs a folder with finished runs."),
}


@pytest.mark.parametrize(("words", "status", "told"), ANSWERS.values(), ids=ANSWERS)
def test_it_answers_before_pytorch_is_imported(tmp_path, words, status, told):
    script = """
import sys, main
from runs.command import exit_status
try:
    status = exit_status(main.main)
except SystemExit as end:
    status = end.code or 0
slow = {"torch", "torchvision", "scipy", "matplotlib", "PIL"} & set(sys.modules)
sys.exit(f"imported: {slow}" if slow else status)
"""
    words = [*words, "--output-dir", str(tmp_path / "absent")] if "--help" not in words else words
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and told in done.stdout + done.stderr, done
    assert "imported:" not in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_what_draws_figures_is_imported_for_the_report_alone():
    script = "import sys, main; main.import_modules(); print({'matplotlib', 'scipy', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done


def test_help_names_every_option_with_its_default(cli):
    text = cli("--help").out
    for name, default in {
        "--batch-size": "128", "--epochs": "200", "--num-workers": "2", "--temperature": "4.0", "--alpha": "0.1",
        "--output-dir": "outputs", "--data-dir": "data", "--image-size": "32", "--seed": "0", "--dataset": "cifar10",
    }.items():  # fmt: skip
        part = " ".join(text.split(f"  {name} ")[1].split("\n  --")[0].split())
        assert f"[{default}]" in part, name
    for action in parser()._actions:
        assert f"\n  {action.option_strings[0]}" in text and action.help, action
    examples = re.findall(r"^  python main\.py (.*?)(?:   +.*|  [a-z].*)?$", text.split("examples:")[1], re.MULTILINE)
    assert len(examples) > 10
    for words in examples:
        parse(shlex.split(words.partition(">")[0]))


def test_defaults_are_the_users():
    given = parse([])
    assert (given.batch_size, given.epochs, given.num_workers) == (128, 200, 2)
    assert (given.temperature, given.alpha) == ([4.0], [0.1])
    assert (given.dataset, given.output_dir, given.image_size, given.seed) == ("cifar10", "outputs", 32, 0)
    assert given.device == "auto"


def test_no_teacher_names_the_first_command(cli, tmp_path):
    got = cli("--output-dir", tmp_path, "--dataset", "shapes", "--epochs", 7)
    assert got.status == 1 and not got.out
    assert f"python main.py --train-teacher --dataset shapes --epochs 7 --output-dir {tmp_path}" in got.err


def test_the_command_named_for_an_unfinished_teacher_resumes_it(cli, flags, tmp_path, monkeypatch):
    own = ("--lr", 0.03, "--padding", 0, "--cutout", 6, "--no-mirror", "--seed", 3, "--precision", "fp32")
    own += ("--output-dir", tmp_path)
    with failing_at_the_end(monkeypatch, Interrupted(2)):
        assert cli(*flags, *own, "--train-teacher").status == 130
    got = cli("--epochs", 1, "--seed", 3, "--output-dir", tmp_path)
    assert "is unfinished (epoch 2 of 2). Finish it with its own command:" in got.err, got
    words = shlex.split(got.err.splitlines()[-1])
    assert words[:2] == ["python", "main.py"]
    assert {"--data-dir", "--device", "--precision"} <= set(words) and "--compile" not in words
    got = cli(*words[2:])
    assert got.status == 0 and "teacher-s3: test accuracy" in got.out and not got.err, got  # both epochs were trained
    assert "--data-dir" not in teacher_command(parse(["--data-dir", "pets"]), dataset="shapes")  # which refuses it
    with failing_at_the_end(monkeypatch, Interrupted(2)):
        assert cli(*flags, "--seed", 5, "--output-dir", tmp_path, "--train-teacher").status == 130
    got = cli("--no-mirror", "--seed", 5, "--output-dir", tmp_path)
    assert "is unfinished" in got.err and "mirror" not in got.err, got  # which is of the students
    zeros = teacher_command(parse([]), padding=0, weight_decay=0.0)
    assert zeros.endswith("--epochs 200 --padding 0 --weight-decay 0.0")
    assert teacher_command(parse([]), label_smoothing=0.2).endswith(" --label-smoothing 0.2")
    words = teacher_command(parse([]), compile=True, precision="bf16").split()
    assert parse(words[2:]).compile is True and parse(words[2:]).precision == "bf16"


# The demo, and real images -------------------------------------------------------------------------------------------


def test_the_demo_is_a_preset_that_options_override():
    given = parse(["--demo", "--epochs", "3", "--alpha", "0.2"])
    assert (given.dataset, given.output_dir, given.image_size) == ("shapes", "outputs/demo", 16)
    assert (given.epochs, given.alpha, given.temperature) == (3, [0.2], [4.0])


@pytest.mark.parametrize("words", ["--train-teacher", "--report", "--list", "--predict a.png", "--export", ""])
def test_what_the_demo_sets_stands_in_no_ones_way(words):
    given = parse(["--demo", *words.split()])
    assert given.dataset == "shapes" and given.train_fraction == 0.5
    with pytest.raises(Usage, match="--train-fraction"):
        parse(["--demo", "--train-fraction", "0.3", words.split()[0] if words else "--list", *words.split()[1:]])


def test_what_other_code_trained_is_said(cli, flags, copy, monkeypatch):
    """As after an edit of distill.py: the distilled student that is there is not this code's."""
    assert " changed" not in cli(*flags, "--output-dir", copy).out
    monkeypatch.setitem(CODE, "distill.py", "0" * 12)
    got = cli(*flags, "--output-dir", copy)
    told = "(finished before, begun with another distill.py; --overwrite trains all runs of this command again)"
    assert got.status == 0 and got.out.count(told) == 1 and "kd-T4-a0.1-s0: test accuracy " in got.out, got
    assert "(finished before)" in got.out and "was changed between" not in got.out, "the baseline has no such loss"
    record = copy / "kd-T4-a0.1-s0" / "run.json"
    content = json.loads(record.read_text())
    content["environment"]["distill.py"] += ", then " + "0" * 12  # as where this code resumed and finished it
    record.write_text(json.dumps(content))
    assert cli(*flags, "--output-dir", copy).out.count(told) == 1
    got = cli(*flags, "--output-dir", copy, "--alpha", 0.5)
    told = (
        "distill.py was changed between the trainings of these students: some are kd-T4-a0.5-s0, others kd-T4-a0.1-s0"
    )
    assert f"Note that {told}." in got.out, got
    got = cli(*flags, "--output-dir", copy, "--overwrite")
    assert got.status == 0 and "was changed between" not in got.out and "finished before" not in got.out, got


def test_the_demo_trains_teacher_and_students(cli, tmp_path, monkeypatch):
    """Teacher and comparison in one command, offline; with fewer shapes and epochs than a person gets."""
    load = shapes.load
    monkeypatch.setattr(shapes, "load", lambda image_size: load(image_size, train=64, test=32))
    got = cli("--demo", "--epochs", 1, "--device", "cpu", "--output-dir", tmp_path / "out")
    assert got.status == 0 and "shapes: 64 training and 32 test images of 16x16, 8 classes" in got.out, got
    half = "- Training Images: 0.5 of each class\n"
    assert half in got.out and BLOCK.search(got.out.replace(half, "")), got
    assert got.out.index("teacher-s0: test accuracy") < got.out.index("Training Parameters:")
    assert logged(got.err) == [
        "teacher-s0: 1 of 1 for all runs", "[1/2] kd-T4-a0.9-f0.5-s0: 1 of 1 for all runs",
        "[2/2] baseline-f0.5-s0: 1 of 1",
    ]  # fmt: skip


@needs_cifar10
@pytest.mark.slow
def test_students_learn_from_real_images(cli, tmp_path):
    """A part of CIFAR-10 as PNG and JPEG files, 150 + 60 images of three classes, in a few epochs: far above chance
    with both commands."""
    names = {0: "airplane", 6: "frog", 9: "truck"}
    for split, batch, count in (("train", "data_batch_1", 150), ("test", "test_batch", 60)):
        with open(f"{CIFAR10_DIR}/cifar-10-batches-py/{batch}", "rb") as file:
            content = pickle.load(file, encoding="bytes")
        labels = np.array(content[b"labels"])
        for number, name in names.items():
            folder = tmp_path / "part" / split / name
            folder.mkdir(parents=True)
            for index in np.flatnonzero(labels == number)[:count]:
                pixels = content[b"data"][index].reshape(3, 32, 32).transpose(1, 2, 0)
                suffix, quality = ("jpg", {"quality": 95}) if index % 2 else ("png", {"compress_level": 1})
                Image.fromarray(pixels).save(folder / f"{index:04d}.{suffix}", **quality)
    words = ("--dataset", "folder", "--data-dir", tmp_path / "part", "--output-dir", tmp_path / "out")
    words = (*words, "--image-size", 16, "--batch-size", 25)
    assert cli(*words, "--train-teacher", "--epochs", 2).status == 0
    got = cli(*words, "--epochs", 4, "--alpha", "0.5")
    assert "folder: 450 training and 180 test images of 16x16, 3 classes" in got.out
    values = [float(value) for value in BLOCK.search(got.out).groups()[4:7]]
    assert np.min(values) > 0.55, got.out


# The layout ----------------------------------------------------------------------------------------------------------

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in (".", "runs", "reports", "sources", "use")
    for path in sorted((ROOT / folder).glob("*.py"))
}


def imported(path):
    """The modules of the program that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & MODULES.keys()


def test_imports_have_no_cycles():
    graph = {name: imported(path) for name, path in MODULES.items()}
    assert {"main", "data", "runs.files", "reports.report", "sources.cifar"} <= graph.keys()
    assert {"data", "train", "runs.teachers", "reports.report"} <= graph["main"] and "sources.shapes" in graph["data"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_no_file_of_the_program_is_longer_than_350_lines():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: count for name, count in lines.items() if count > 350}
