"""The command line as a person types it."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_real_pictures, process, real_pictures

import data
import files
import main
import models
import muon
import train

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


def accuracy(folder):
    return json.loads((folder / "run.json").read_text())["accuracy"]


def test_two_commands_train_and_compare(cli, flags, tmp_path):
    output = tmp_path / "out"
    taught = cli(*flags, "--train-teacher", "--output-dir", output)
    assert taught.status == 0, taught
    assert f"teacher-s0: test accuracy {accuracy(output / 'teacher-s0'):.4f}" in taught.out
    assert re.search(r"Teacher: [\d,]+ parameters, [\d.]+ million multiply-adds", taught.out)
    compared = cli(*flags, "--temperature", "4", "--alpha", "0.1", "--output-dir", output)
    assert compared.status == 0, compared
    assert not compared.err and not taught.err  # no progress bars where nobody watches
    found = BLOCK.search(compared.out)
    assert found, compared.out
    assert found.groups()[:4] == ("4.0", "0.1", "2", "16")
    accuracies = [accuracy(output / name) for name in ("teacher-s0", "kd-T4-a0.1-s0", "baseline-s0")]
    assert found.groups()[4:7] == tuple(f"{value:.4f}" for value in accuracies)
    assert float(found[8]) == pytest.approx(100 * (accuracies[1] - accuracies[2]), abs=0.005)
    names = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    assert names == {
        "teacher-s0", "kd-T4-a0.1-s0", "baseline-s0", "targets", "data", "comparison.json", "comparison.csv", "figures",
    }  # fmt: skip


def test_a_command_can_be_repeated(cli, flags, copy):
    times = {p: p.stat().st_mtime_ns for p in copy.glob("*/model.pt")}
    assert len(times) == 3
    for more in ([], ["--train-teacher"]):
        repeated = cli(*flags, "--output-dir", copy, *more)
        assert repeated.status == 0 and "(finished before)" in repeated.out
    assert {p: p.stat().st_mtime_ns for p in copy.glob("*/model.pt")} == times


def test_another_alpha_does_not_train_the_baseline_again(cli, flags, copy):
    before = (copy / "baseline-s0" / "model.pt").stat().st_mtime_ns
    got = cli(*flags, "--output-dir", copy, "--alpha", "0.9", "--temperature", "2")
    assert got.status == 0 and BLOCK.search(got.out)[1] == "2.0"
    assert (copy / "baseline-s0" / "model.pt").stat().st_mtime_ns == before
    comparison = json.loads((copy / "comparison.json").read_text())
    assert [(e["temperature"], e["alpha"]) for e in comparison["kd"]] == [(2.0, 0.9), (4.0, 0.1)]


@pytest.mark.parametrize(("words", "compiled"), [([], False), (["--compile"], True), (["--no-compile"], False)])
def test_compile_reaches_the_training_and_is_recorded(cli, flags, tmp_path, monkeypatch, words, compiled):
    networks = []
    monkeypatch.setattr(torch, "compile", lambda network, **_: networks.append(network) or network)
    assert cli(*flags, "--train-teacher", "--output-dir", tmp_path, *words).status == 0
    assert len(networks) == compiled
    assert json.loads((tmp_path / "teacher-s0/run.json").read_text())["environment"]["compiled"] is compiled


def test_alpha_0_is_the_baseline_bit_for_bit(cli, flags, copy):
    assert cli(*flags, "--output-dir", copy, "--alpha", "0").status == 0
    kd, baseline = (models.read(copy / name / "model.pt") for name in ("kd-T4-a0-s0", "baseline-s0"))
    assert models.digest(kd["state_dict"]) == models.digest(baseline["state_dict"])
    assert (copy / "kd-T4-a0-s0/test_logits.npy").read_bytes() == (copy / "baseline-s0/test_logits.npy").read_bytes()
    comparison = json.loads((copy / "comparison.json").read_text())
    assert comparison["kd"][0]["improvement"]["p_value"] == 1.0


def test_bfloat16_trains_float32_weights_and_alpha_0_is_the_baseline_there_too(
    cli, flags, finished, tmp_path, monkeypatch
):
    plain, stepped_in = muon.orthogonalise, set()
    monkeypatch.setattr(muon, "orthogonalise", lambda matrix: stepped_in.add(matrix.dtype) or plain(matrix))
    for words in (["--train-teacher"], ["--alpha", "0.9"], ["--alpha", "0"]):
        assert cli(*flags, "--precision", "bf16", "--output-dir", tmp_path, *words).status == 0
    assert stepped_in == {torch.bfloat16}
    names = ("teacher-s0", "kd-T4-a0.9-s0", "kd-T4-a0-s0", "baseline-s0")
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in names]
    assert {record["environment"]["precision"] for record in records} == {"bf16"}
    weights = [models.read(tmp_path / name / "model.pt")["state_dict"] for name in names]
    assert all(tensor.dtype is not torch.bfloat16 for each in weights for tensor in each.values())
    assert models.digest(weights[1]) != models.digest(weights[2]) == models.digest(weights[3])
    in_float32 = models.read(finished / "baseline-s0" / "model.pt")["state_dict"]
    assert models.digest(weights[3]) != models.digest(in_float32)
    for name in names:  # the test set is evaluated in float32
        logits = torch.from_numpy(np.load(tmp_path / name / "test_logits.npy"))
        assert logits.dtype == torch.float32 and (logits != logits.bfloat16()).any()


def test_both_students_start_alike_and_meet_the_same_batches(cli, flags, copy, monkeypatch):
    import train

    met, starts = [], []
    original = train._Run._step

    def step(run, batch, soft):
        if run.epoch == run.step == 0:
            met.append([])
            starts.append(models.digest(run.network.state_dict()))
        met[-1].append(run.views.batch(batch).numpy().tobytes())
        return original(run, batch, soft)

    monkeypatch.setattr(train._Run, "_step", step)
    assert cli(*flags, "--output-dir", copy, "--overwrite").status == 0
    assert len(met) == 2 and len(met[0]) == 6 and met[0] == met[1] and starts[0] == starts[1]


def test_overwrite_replaces_only_what_the_command_trains(cli, flags, copy):
    teacher = (copy / "teacher-s0" / "model.pt").stat().st_mtime_ns
    refused = cli(*flags, "--output-dir", copy, "--epochs", "1")
    assert refused.status == 1 and "epochs 2 instead of 1" in refused.err and "--overwrite" in refused.err
    assert cli(*flags, "--output-dir", copy, "--epochs", "1", "--overwrite").status == 0
    assert (copy / "teacher-s0" / "model.pt").stat().st_mtime_ns == teacher
    assert "Epochs: 1" in cli("--report", "--output-dir", copy).out


def test_a_sweep_looks_at_all_runs_before_it_trains_any(cli, flags, copy):
    """The baseline of 2 epochs would stop the comparison after the sweep, with 1 epoch."""
    got = cli(*flags, "--output-dir", copy, "--epochs", 1, "--alpha", 0.1, 0.9)
    assert got.status == 1 and "epochs 2 instead of 1" in got.err
    assert not list((copy / "selection").glob("*/model.pt"))
    before = (copy / "kd-T4-a0.1-s0" / "model.pt").stat().st_mtime_ns
    got = cli(*flags, "--output-dir", copy, "--epochs", 1, "--alpha", 0.5, 0.9, "--overwrite")
    assert got.status == 0, got
    assert (copy / "kd-T4-a0.1-s0" / "model.pt").stat().st_mtime_ns == before  # not of this command


@pytest.mark.parametrize("more", [("--alpha", 0.1, 0.9, "--val-fraction", 0.25), ("--demo", "--alpha", 0.1)])
def test_an_interrupted_overwrite_is_continued_without_it(cli, flags, copy, monkeypatch, more):
    """`copy` holds kd-T4-a0.1-s0 and a baseline of 2 epochs, which must not stop the command that continues."""
    command = (*flags, "--output-dir", copy, "--epochs", 1, *more)
    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "_finish", lambda run: (_ for _ in ()).throw(files.Interrupted(2)))
        got = cli(*command, "--overwrite")
    assert got.status == 130 and "without --overwrite continues it" in got.err
    assert cli(*command).status == 0


def test_a_failure_after_overwrite_began_says_how_to_continue(cli, flags, copy, monkeypatch):
    monkeypatch.setattr(train._Run, "_finish", lambda run: (_ for _ in ()).throw(files.Failure("the disk is full")))
    got = cli(*flags, "--output-dir", copy, "--overwrite")
    assert got.status == 1 and "The same command without --overwrite continues" in got.err
    monkeypatch.undo()
    spoil = lambda optimiser: optimiser.param_groups[1]["params"][0].data.fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr(train.Muon, "step", spoil)
    got = cli(*flags, "--output-dir", copy, "--overwrite")
    assert got.status == 1 and "diverged" in got.err and "without --overwrite" not in got.err


def test_options_reach_what_they_are_about(cli, flags, tmp_path, monkeypatch):
    workers, decode = [], data.folder
    monkeypatch.setattr(data, "folder", lambda *given: workers.append(given[2]) or decode(*given))
    monkeypatch.setattr(train._Run, "train", lambda run: runs.append(run) or 0.0)
    runs = []
    words = ("--weight-decay", 0.001, "--num-workers", 1, "--save-every", 7, "--output-dir", tmp_path)
    assert cli(*flags, *words, "--train-teacher").status == 0
    (run,) = runs
    assert workers == [1] and run.trainer.save_every == 7 and run.settings.weight_decay == 0.001
    assert run.settings.learning_rate == pytest.approx(0.2 * (16 / 128) ** 0.5)


def test_a_sweep_is_judged_on_a_tenth_unless_asked_otherwise(cli, flags, copy):
    got = cli(*flags, "--output-dir", copy, "--epochs", 1, "--alpha", 0.1, 0.9, "--overwrite")
    assert "judged on 10% of the training pictures" in got.out
    record = json.loads((copy / "selection" / "kd-T4-a0.9-s0" / "run.json").read_text())
    assert record["settings"]["val_fraction"] == 0.1


def test_a_teacher_from_elsewhere(cli, flags, finished, tmp_path):
    for number, place in enumerate((finished / "teacher-s0", finished / "teacher-s0" / "model.pt")):
        got = cli(*flags, "--output-dir", tmp_path / str(number), "--teacher", place, "--epochs", 1)
        assert got.status == 0, got
        assert f"Teacher Network: {accuracy(finished / 'teacher-s0'):.4f}" in got.out


@pytest.mark.parametrize("seed", [0, 3])
def test_the_folders_only_teacher_serves_every_seed(cli, flags, copy, seed):
    assert cli(*flags, "--output-dir", copy, "--seed", seed).status == 0
    assert (copy / f"kd-T4-a0.1-s{seed}" / "model.pt").exists()


def test_several_teachers_are_asked_about(cli, flags, copy):
    assert cli(*flags, "--train-teacher", "--output-dir", copy, "--seed", 1, "--epochs", 1).status == 0
    got = cli(*flags, "--output-dir", copy, "--seed", 2)
    assert got.status == 1 and "--teacher" in got.err and "teacher-s1" in got.err


# Speed and quietness of the command line itself ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status"), [(["--help"], 0), (["--epochs", "many"], 2), ([], 1)], ids=["help", "wrong", "no teacher"]
)
def test_answers_before_pytorch_is_imported(tmp_path, words, status):
    if not words:
        words = ["--output-dir", str(tmp_path)]
    script = f"""
import sys, main
try:
    status = main.main({words!r})
except SystemExit as end:
    status = end.code or 0
assert status == {status}, status
assert not {{"torch", "numpy", "torchvision"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True)


def test_help_names_every_option_with_its_default(cli):
    text = cli("--help").out
    for name, default in {
        "--batch-size": "128", "--epochs": "200", "--num-workers": "2", "--temperature": "4.0", "--alpha": "0.1",
        "--output-dir": "outputs", "--data-dir": "data", "--image-size": "32", "--seed": "0", "--dataset": "cifar10",
    }.items():  # fmt: skip
        part = " ".join(text.split(f"  {name} ")[1].split("\n  --")[0].split())
        assert f"[{default}]" in part, name
    for name in (
        "--train-teacher",
        "--data-url",
        "--teacher",
        "--device",
        "--lr",
        "--weight-decay",
        "--overwrite",
        "--demo",
        "--debug",
    ):
        assert name in text
    assert "examples:" in text


def test_defaults_are_the_users():
    given = main.parse([])
    assert (given.batch_size, given.epochs, given.num_workers, given.temperature, given.alpha) == (
        128,
        200,
        2,
        [4.0],
        [0.1],
    )
    assert (given.dataset, given.output_dir, given.image_size, given.seed, given.device) == (
        "cifar10",
        "outputs",
        32,
        0,
        "auto",
    )


def test_no_teacher_names_the_first_command(cli, tmp_path):
    got = cli("--output-dir", tmp_path, "--dataset", "shapes", "--epochs", 7)
    assert got.status == 1 and not got.out
    assert f"python main.py --train-teacher --dataset shapes --epochs 7 --output-dir {tmp_path}" in got.err


def test_the_command_named_for_an_unfinished_teacher_continues_it(cli, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train._Run, "_finish", lambda run: (_ for _ in ()).throw(files.Interrupted(2, "Stopped.")))
    own = ("--lr", 0.03, "--seed", 3, "--precision", "fp32", "--output-dir", tmp_path)
    assert cli(*flags, *own, "--train-teacher").status == 130
    monkeypatch.undo()
    got = cli("--epochs", 1, "--seed", 3, "--output-dir", tmp_path)
    assert "epoch 2 of 2" in got.err, got
    words = shlex.split(got.err.splitlines()[-1])
    assert words[:2] == ["python", "main.py"]
    assert {"--data-dir", "--device", "--precision"} <= set(words) and "--compile" not in words
    got = cli(*words[2:])
    assert got.status == 0 and "teacher-s3: test accuracy" in got.out, got
    words = main.teacher_command(main.parse([]), compile=True, precision="bf16").split()
    assert main.parse(words[2:]).compile is True and main.parse(words[2:]).precision == "bf16"


def test_the_demo_is_a_preset_that_flags_overrule():
    given = main.parse(["--demo", "--epochs", "3", "--alpha", "0.2"])
    assert (given.dataset, given.output_dir, given.image_size) == ("shapes", "outputs/demo", 16)
    assert (given.epochs, given.alpha, given.temperature) == (3, [0.2], [4.0])


def test_the_demo_trains_teacher_and_students(tmp_path):
    """As a process, with the fewest epochs: teacher and comparison in one command, offline."""
    done = process("--demo", "--epochs", 1, "--device", "cpu", "--output-dir", tmp_path / "out")
    out, err = done.communicate(timeout=240)
    assert done.returncode == 0, err
    assert BLOCK.search(out) and out.index("teacher-s0: test accuracy") < out.index("Training Parameters:")


def test_batch_sizes_and_a_single_step(cli, pictures, tmp_path):
    small = (
        "--dataset",
        "folder",
        "--data-dir",
        pictures,
        "--image-size",
        16,
        "--device",
        "cpu",
        "--output-dir",
        tmp_path,
    )
    assert cli(*small, "--train-teacher", "--epochs", 1, "--batch-size", 5000).status == 0
    got = cli(*small, "--epochs", 1, "--batch-size", 5000)
    assert got.status == 0 and "- Batch Size: 5000" in got.out


@needs_real_pictures
def test_on_real_pictures_students_learn(cli, tmp_path):
    """A part of the real pictures, 300 + 100 a class and three classes, one epoch: far above chance, both commands."""
    for split, count in (("train", 300), ("test", 100)):
        for name in ("airplane", "frog", "truck"):
            (tmp_path / "part" / split / name).mkdir(parents=True)
            for path in sorted((real_pictures() / split / name).iterdir())[:count]:
                (tmp_path / "part" / split / name / path.name).symlink_to(path)
    small = (
        "--dataset",
        "folder",
        "--data-dir",
        tmp_path / "part",
        "--output-dir",
        tmp_path / "out",
        "--image-size",
        16,
    )
    assert cli(*small, "--train-teacher", "--epochs", 3, "--batch-size", 32).status == 0
    got = cli(*small, "--epochs", 4, "--batch-size", 32, "--alpha", "0.5")
    values = [float(value) for value in BLOCK.search(got.out).groups()[4:7]]
    assert np.min(values) > 0.55, got.out
