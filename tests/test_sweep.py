"""A real sweep from the command line: what it chooses, what it leaves behind, and the figures."""

import csv
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from PIL import Image

import models
from arguments import parse
from reports import dark_knowledge, figures, styles
from reports.comparison import Comparison
from reports.statistics import paired_test
from reports.styles import legend
from runs.files import Failure
from runs.settings import RECIPE, pair_name
from runs.teachers import check_sweep_teacher, find_sweep_teachers

WORDS = ("--seeds", 2, "--temperature", 2, 4, "--alpha", 0.5, 0.9, "--val-fraction", 0.25)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, finished, flags):
    """The finished output folder after a sweep of 2 x 2 pairs of temperature and alpha with 2 seeds."""
    import main
    from runs.command import exit_status

    output = shutil.copytree(finished, tmp_path_factory.mktemp("swept") / "out")
    assert exit_status(main.main, [str(word) for word in (*flags, "--output-dir", output, *WORDS)]) == 0
    return output


@pytest.fixture(scope="module")
def comparison_json(swept):
    text = (swept / "comparison.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    return json.loads(text)


def name_of(entry):
    return f"kd-T{entry['temperature']:g}-a{entry['alpha']:g}"


@pytest.mark.slow
def test_comparison_json_holds_what_the_runs_reached(swept, comparison_json):
    got = comparison_json
    baseline, kd = got["baseline"], got["kd"][0]
    assert baseline["seeds"] == kd["seeds"] == [0, 1]
    teacher = np.load(swept / "teacher-s0" / "test_logits.npy").argmax(1)
    for entry, name in ((baseline, "baseline"), (kd, name_of(kd))):
        kept = [json.loads((swept / f"{name}-s{seed}" / "run.json").read_text())["accuracy"] for seed in range(2)]
        assert entry["accuracies"] == kept
        assert entry["mean"] == pytest.approx(np.mean(kept)) and entry["std"] == pytest.approx(np.std(kept, ddof=1))
        answers = [np.load(swept / f"{name}-s{seed}" / "test_logits.npy").argmax(1) for seed in range(2)]
        assert entry["agreement_with_teacher"] == [(each == teacher).mean() for each in answers]
    gains = 100 * (np.array(kd["accuracies"]) - np.array(baseline["accuracies"]))
    assert kd["improvement"]["mean"] == pytest.approx(gains.mean())
    for name in ("teacher", "student"):
        costs = models.costs(name, 3, 16)
        assert (got[name]["parameters"], got[name]["macs"]) == (costs.parameters, costs.macs)
    assert got["environment"]["torch"] and got["environment"]["program"] and got["seconds"] > 0
    # The pair of the first command is there too, after the pair just asked for.
    assert (name_of(got["kd"][-1]), got["kd"][-1]["seeds"]) == ("kd-T4-a0.1", [0])
    assert got["kd"][-1]["improvement"]["method"] == "exact McNemar test"


@pytest.mark.slow
def test_a_sweep_never_reads_the_test_set_and_takes_the_best_on_validation(swept, comparison_json):
    assert not list((swept / "selection").glob("*/test_logits.npy"))
    selection = comparison_json["selection"]
    for entry in selection:
        name = "baseline" if entry["role"] == "baseline" else name_of(entry)
        kept = [json.loads((swept / f"selection/{name}-s{seed}/run.json").read_text()) for seed in range(2)]
        assert entry["val_accuracies"] == [each["val_accuracy"] for each in kept] and "accuracy" not in kept[0]
        assert entry["mean"] == pytest.approx(np.mean(entry["val_accuracies"]))
    distilled = {name_of(entry): entry["mean"] for entry in selection if entry["role"] == "kd"}
    assert len(distilled) == 4 and len(selection) == 5
    assert distilled[name_of(comparison_json["kd"][0])] == max(distilled.values())


@pytest.mark.slow
def test_the_pair_that_validation_chose_is_trained_even_against_the_test_set(cli, flags, copy, monkeypatch):
    """T = 1 is made the best on validation and T = 4 the best on the test set: T = 1 is trained and reported."""
    import train

    running, train_run = [], train.train
    validation, test = {1.0: 0.9, 4.0: 0.1, None: 0.5}, {1.0: 0.25, 4.0: 0.75, None: 0.5}

    def noted(run, *rest, **more):
        running.append(run.settings)
        return train_run(run, *rest, **more)

    def validate(network, data, indices):
        return validation[running[-1].temperature] if len(indices) else None

    monkeypatch.setattr(train, "train", noted)
    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(train, "accuracy", lambda logits, labels: test[running[-1].temperature])
    got = cli(*flags, "--output-dir", copy, "--temperature", 1, 4, "--alpha", 0.9, "--overwrite")
    assert got.status == 0, got
    assert "Best on the validation part: temperature 1.0" in got.out and "- Temperature: 1.0" in got.out
    assert "- Student Network (with KD): 0.2500" in got.out and "- Student Network (Baseline): 0.5000" in got.out
    assert (copy / "kd-T1-a0.9-s0").exists() and not (copy / "kd-T4-a0.9-s0").exists()


@pytest.mark.slow
def test_a_loss_of_ones_own_gets_its_own_pair_and_plain_distillation_another(cli, flags, copy, tmp_path, monkeypatch):
    """On validation T = 1 is made the best with the loss and T = 4 without it: these two are trained on everything."""
    import train

    (tmp_path / "own.py").write_text("def f(s, l, t, T, a):\n    return (s - t).square().mean() / T\n")
    running, train_run = [], train.train

    def noted(run, *rest, **more):
        running.append(run.settings)
        return train_run(run, *rest, **more)

    def validate(network, data, indices):
        best = {"f": 1.0, None: 4.0}[running[-1].loss]
        return (0.9 if running[-1].temperature == best else 0.5) if len(indices) else None

    monkeypatch.setattr(train, "train", noted)
    monkeypatch.setattr(train, "validate", validate)
    loss = ("--loss", f"{tmp_path / 'own.py'}:f")
    words = (*flags, "--output-dir", copy, "--temperature", 1, 4, "--alpha", 0.9, "--seeds", 2, *loss)
    got = cli(*words)
    assert got.status == 0, got
    best = "temperature 1.0, alpha 0.9 with f; temperature 4.0, alpha 0.9 without"
    assert f"Best on the validation part: {best}\n" in got.out
    trained = {path.name for path in copy.glob("kd-*") if "a0.9" in path.name}
    assert trained == {f"kd-{name}-a0.9-s{seed}" for name in ("f-T1", "T4") for seed in (0, 1)}
    comparison = json.loads((copy / "comparison.json").read_text())
    own, plain = (each for each in comparison["kd"] if each["alpha"] == 0.9)
    assert (own["loss"], own["temperature"], plain["temperature"]) == ("f", 1.0, 4.0)
    gains = 100 * (np.array(own["accuracies"]) - plain["accuracies"])
    assert plain["first_over_this"]["by_seed"] == pytest.approx(gains.tolist())
    found = {(e.get("loss"), e["temperature"]): e["val_accuracies"] for e in comparison["selection"]}
    assert found == {("f", 1.0): [0.9] * 2, ("f", 4.0): [0.5] * 2, (None, 1.0): [0.5] * 2, (None, 4.0): [0.9] * 2,
                     (None, None): [0.5] * 2}  # fmt: skip
    assert "KD, f, T=1, alpha=0.9" in got.out.split("Sweep, on validation")[1]
    page = (copy / "report.html").read_text().split("Sweep, on the validation part")[1]
    assert [row.count(">f<") for row in page.split("</table>")[:1]] == [2]
    figure = figures.sweep(Comparison(copy))
    assert figure.get_suptitle().startswith("Validation accuracy, f\n(baseline 0.5")
    assert [text.get_text()[:6] for text in figure.axes[0].texts] == ["0.9000", "0.5000"]  # of T = 1 and 4


@pytest.mark.slow
def test_comparison_csv_has_a_row_for_each_run(swept):
    with open(swept / "comparison.csv", encoding="utf-8") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    # The teacher, two baselines, two students of the chosen pair and one of the first command's, and the sweep.
    folders = {path.parent.relative_to(swept).as_posix() for path in swept.rglob("model.pt")}
    assert rows.keys() == folders and len(rows) == 1 + 2 + 2 + 1 + 5 * 2
    # What a run.json does not say.
    usual = {"train_fraction": 1.0, "label_smoothing": 0.0, "cutout": 0, "mirror": True, "width": 1.0}
    for name, row in rows.items():
        kept = json.loads((swept / name / "run.json").read_text())
        balanced = row.pop("balanced_accuracy")  # of classes with equally many test images
        assert balanced == row["accuracy"] == "" or float(balanced) == pytest.approx(kept["accuracy"])
        for column, text in row.items():
            value = kept.get(column, (usual | kept["settings"]).get(column))
            assert column == "run" or text == ("" if value is None else str(value)), (name, column)


@pytest.mark.slow
@pytest.mark.draws
def test_the_report_prints_and_draws_again_without_data(cli, swept, tmp_path, monkeypatch):
    import data

    again = shutil.copytree(swept, tmp_path / "out")
    before = {name: (again / name).read_bytes() for name in ("comparison.json", "comparison.csv")}
    shutil.rmtree(again / "figures")
    (again / "comparison.csv").unlink()
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("data was loaded"))
    got = cli("--report", "--output-dir", again)
    assert got.status == 0, got
    assert "Improvement with KD:" in got.out and "Sweep, on validation" in got.out
    assert {name: (again / name).read_bytes() for name in before} == before
    assert len(list((again / "figures").iterdir())) == 6


@pytest.mark.slow
def test_a_repeated_sweep_trains_nothing(cli, flags, swept, tmp_path):
    again = shutil.copytree(swept, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in again.rglob("model.pt")}
    got = cli(*flags, "--output-dir", again, *WORDS)
    assert got.status == 0 and got.out.count("(finished before)") == 5 * 2 + 2 * 2, got
    assert {path: path.stat().st_mtime_ns for path in again.rglob("model.pt")} == times


# The teacher of a sweep ----------------------------------------------------------------------------------------------

SEEN = "teacher was trained on these images, too"
PAIRS = ("--temperature", 2, 4, "--alpha", 1, "--val-fraction", 0.25)


def command_in(text):
    """The words of the first command that trains a teacher in a `text`."""
    (line,) = [line for line in text.splitlines() if line.startswith("python main.py --train-teacher")][:1]
    return line.split()[2:]


@pytest.mark.slow
def test_a_sweep_is_fair_with_a_teacher_that_has_not_seen_the_validation_images(cli, flags, copy, monkeypatch):
    """The command that the first sweep names trains that teacher; its soft targets are those that decide, and the final
    students are taught by the usual one, as if there had been no sweep."""
    import data
    import train

    machine = flags[-4:]  # of the device, which the named command leaves to the machine
    before = models.digest(models.load(copy / "kd-T4-a0.1-s0" / "model.pt").state_dict())
    got = cli(*flags, "--output-dir", copy, *PAIRS)
    assert f"The {SEEN}" in got.out and f"(The {SEEN}" in got.out, got
    assert f"The {SEEN}" in (copy / "report.html").read_text()
    biased = models.load(copy / "selection" / "kd-T2-a1-s0" / "model.pt")

    seen, judged = [], []
    batch, validate = data.Views.batch, train.validate
    monkeypatch.setattr(data.Views, "batch", lambda self, epoch, rows: seen.append(rows) or batch(self, epoch, rows))
    monkeypatch.setattr(train, "validate", lambda *about: judged.append(about[2]) or validate(*about))
    got = cli(*command_in(got.out), *machine)
    assert got.status == 0 and "selection/teacher-s0: validation accuracy" in got.out.replace("\\", "/"), got
    folder = copy / "selection" / "teacher-s0"
    rows, apart = (set(np.concatenate([each.numpy() for each in found]).tolist()) for found in (seen, judged))
    assert len(apart) == 12 and len(rows) >= 32 and not apart & rows
    assert not (folder / "test_logits.npy").exists() and json.loads((folder / "run.json").read_text())["val_accuracy"]

    got = cli("--report", "--output-dir", copy)
    assert f"(The {SEEN}" in got.out and "\nTeacher" not in got.out.partition("Sweep, on validation")[2][:300], got
    got = cli(*flags, "--output-dir", copy, *PAIRS)
    assert got.status == 1 and "another teacher for the sweep" in got.err, got
    judged.clear()
    got = cli(*flags, "--output-dir", copy, *PAIRS, "--overwrite")
    assert got.status == 0 and "(teacher of the sweep)" in got.out and SEEN not in got.out, got
    assert set(np.concatenate([each.numpy() for each in judged]).tolist()) <= apart
    fair = models.load(copy / "selection" / "kd-T2-a1-s0" / "model.pt")
    teacher = models.load(folder / "model.pt")
    assert fair.settings["sweep_teacher"] == models.digest(teacher.state_dict())
    assert models.digest(fair.state_dict()) != models.digest(biased.state_dict())
    comparison = json.loads((copy / "comparison.json").read_text())
    selection, temperature = comparison["selection"], comparison["kd"][0]["temperature"]
    assert [each["role"] for each in selection] == ["teacher", "baseline", "kd", "kd"]
    assert selection[0]["val_accuracies"] == [teacher.accuracy]
    assert SEEN not in (copy / "report.html").read_text()
    with open(copy / "comparison.csv", encoding="utf-8") as file:
        assert "selection/teacher-s0" in [row["run"] for row in csv.DictReader(file)]

    got = cli(*flags, "--output-dir", copy, "--temperature", 4, 5, "--alpha", 0.1, "--val-fraction", 0.25)
    assert got.status == 0, got
    assert models.digest(models.load(copy / "kd-T4-a0.1-s0" / "model.pt").state_dict()) == before
    chosen = copy / f"kd-T{temperature:g}-a1-s0"
    (copy / "plain").mkdir()
    shutil.copytree(copy / "teacher-s0", copy / "plain" / "teacher-s0")
    words = (*flags, "--output-dir", copy / "plain", "--alpha", 1, "--temperature", chosen.name[4])
    assert cli(*words).status == 0
    assert "sweep_teacher" not in json.loads((chosen / "run.json").read_text())["settings"]
    plain = models.load(copy / "plain" / chosen.name / "model.pt").state_dict()
    assert models.digest(plain) == models.digest(models.load(chosen / "model.pt").state_dict())


@pytest.mark.slow
def test_students_of_few_images_are_judged_on_what_the_teacher_of_the_sweep_has_not_seen(cli, flags, copy, monkeypatch):
    import train

    few = ("--train-fraction", 0.5, "--omit-class", "red")
    judged, validate = [], train.validate
    monkeypatch.setattr(train, "validate", lambda *about: judged.append(about[2]) or validate(*about))
    assert cli(*flags, "--output-dir", copy, "--train-teacher", "--val-fraction", 0.25).status == 0
    got = cli(*flags, "--output-dir", copy, *PAIRS, *few)
    assert got.status == 0 and "(teacher of the sweep)" in got.out and SEEN not in got.out, got
    teachers, *students = (set(each.tolist()) for each in (judged[0], *judged[2:]) if len(each))
    assert len(students) == 6 and all(each and each < teachers for each in students)
    # Another version of the split judges on other images: its runs are refused, not mixed with these.
    monkeypatch.setattr("runs.plan.SPLIT_VERSION", 3)
    got = cli(*flags, "--output-dir", copy, *PAIRS, *few)
    assert got.status == 1 and "another validation part" in got.err, got


@pytest.mark.slow
def test_a_teacher_of_the_sweep_that_does_not_fit_is_refused_with_the_command_that_trains_it(cli, flags, copy):
    one = ("--train-teacher", "--val-fraction", 0.25)
    assert cli(*flags, "--output-dir", copy, *one, "--epochs", 1, "--lr", 0.1).status == 0
    got = cli(*flags, "--output-dir", copy / "new", "--teacher", copy / "teacher-s0", *PAIRS)
    assert got.status == 1 and command_in(got.err)[command_in(got.err).index("--output-dir") + 1] == str(copy), got
    got = cli(*flags, "--output-dir", copy, *PAIRS)
    assert got.status == 1 and "epochs 1 instead of 2" in got.err and "learning rate 0.1 instead" in got.err, got
    students = cli(*flags, "--output-dir", copy, *PAIRS, "--no-mirror", "--overwrite")
    assert command_in(students.err) == command_in(got.err)  # the teacher has seen mirrored images, as the usual one has
    got = cli(*command_in(got.err), *flags[-4:])
    assert got.status == 0, got
    got = cli(*flags, "--output-dir", copy, *PAIRS)
    assert got.status == 0 and "(teacher of the sweep)" in got.out, got


def test_no_command_is_told_for_a_teacher_that_this_version_cannot_train(tmp_path):
    """That of results/cifar10 is of recipe 4."""
    path = ROOT / "results" / "cifar10" / "teacher-s0" / "model.pt"
    old, arguments = models.load(path), parse(["--output-dir", str(tmp_path)])
    found, why = find_sweep_teachers(arguments, [(path, old)], 0.1)
    assert found == [] and SEEN in why and "An older version trained it" in why and "main.py" not in why
    new = SimpleNamespace(settings=old.settings | {"recipe": RECIPE, "val_fraction": 0.1})
    with pytest.raises(Failure, match=r"recipe 5 instead of 4.*\n?.*Move its folder away"):
        check_sweep_teacher(arguments, tmp_path / "selection" / "teacher-s0" / "model.pt", new, path, old, 0.1)


def test_a_sweep_that_overwrites_begins_with_none_of_its_pairs(cli, flags, copy, monkeypatch):
    """Whichever pair wins, whoever resumes it finds no student that was there before."""
    import train

    assert (copy / "kd-T4-a0.1-s0" / "model.pt").exists()
    monkeypatch.setattr(train, "train", lambda *_, **__: 1 / 0)
    assert cli(*flags, "--output-dir", copy, "--temperature", 1, 4, "--overwrite").status == 1
    assert [path.parent.name for path in copy.glob("*/model.pt")] == ["teacher-s0"]


@pytest.mark.slow
def test_a_teacher_of_the_sweep_must_not_have_seen_any_image_that_is_judged(cli, flags, copy):
    assert cli(*flags, "--output-dir", copy, "--train-teacher", "--val-fraction", 0.125).status == 0
    got = cli(*flags, "--output-dir", copy, *PAIRS)
    assert got.status == 1 and "val fraction 0.125 instead of 0.25" in got.err, got
    assert command_in(got.err)[-3:] == ["--val-fraction", "0.25", "--overwrite"]
    words = (*PAIRS[:-1], 0.1)  # fewer images than that teacher has not seen
    got = cli(*flags, "--output-dir", copy, *words)
    assert got.status == 0 and "(teacher of the sweep)" in got.out and SEEN not in got.out, got
    # It is found beside the teacher that is named, and may be named itself.
    for name, more in (("teacher-s0", ()), ("selection/teacher-s0", ("--overwrite",))):
        got = cli(*flags, "--output-dir", copy / "new", *words, "--teacher", copy / name, "--epochs", 1, *more)
        assert got.status == 0 and "(teacher of the sweep)" in got.out and SEEN not in got.out, got


@pytest.mark.slow
def test_a_report_shows_no_sweep_where_there_was_only_a_teacher_for_one(cli, flags, copy):
    assert cli(*flags, "--output-dir", copy, "--train-teacher", "--val-fraction", 0.25).status == 0
    got = cli("--report", "--output-dir", copy)
    assert got.status == 0 and "Sweep" not in got.out
    assert json.loads((copy / "comparison.json").read_text())["selection"] == []


@pytest.mark.slow
def test_teachers_for_which_there_can_be_none_for_the_sweep_are_named(cli, flags, copy):
    new = (*flags, "--output-dir", copy / "new", *PAIRS, "--epochs", 1)
    got = cli(*new, "--teacher", copy / "kd-T4-a0.1-s0")
    assert got.status == 0 and f"{SEEN}: this can favour" in got.out and "Of a student that teaches" in got.out, got
    other = (*flags, "--output-dir", copy / "other", "--train-teacher", "--lr", 0.1)
    assert cli(*other).status == 0
    both = ("--teacher", copy / "teacher-s0", copy / "other" / "teacher-s0")
    got = cli(*new, *both, "--overwrite")
    assert got.status == 0 and "Of two teachers named teacher-s0" in got.out, got


@pytest.mark.slow
def test_a_teacher_for_a_sweep_of_one_image_a_class_is_refused(cli, flags, tmp_path):
    from conftest import make_images

    one = make_images(tmp_path / "images", train=1)
    words = ("--output-dir", tmp_path / "out", "--train-teacher", "--val-fraction", 0.5, "--data-dir", one)
    got = cli(*flags, *words)
    assert got.status == 1 and "at least two training images in some class" in got.err, got
    assert not (tmp_path / "out" / "selection").exists()


@pytest.mark.slow
def test_an_unfinished_teacher_of_the_sweep_is_refused_with_the_command_that_finishes_it(cli, flags, copy, monkeypatch):
    import train

    monkeypatch.setattr(train, "validate", lambda *_: 1 / 0)
    assert cli(*flags, "--output-dir", copy, "--train-teacher", "--val-fraction", 0.25).status == 1
    monkeypatch.undo()
    got = cli(*flags, "--output-dir", copy, *PAIRS)
    assert got.status == 1 and "is unfinished" in got.err, got
    assert "--val-fraction" in command_in(got.err) and str(copy) in command_in(got.err), got


@pytest.mark.slow
def test_several_teachers_need_as_many_for_the_sweep(cli, flags, copy):
    both = ("--teacher", copy / "teacher-s0", copy / "teacher-s1")
    assert cli(*flags, "--output-dir", copy, "--train-teacher", "--seed", 1).status == 0
    assert cli(*flags, "--output-dir", copy, "--train-teacher", "--val-fraction", 0.25).status == 0
    new = ("--epochs", 1, "--output-dir", copy)
    got = cli(*flags, *new, *PAIRS, *both, "--overwrite")
    assert got.status == 0 and SEEN in got.out, got
    assert command_in(got.out)[command_in(got.out).index("--seed") + 1] == "1"
    assert cli(*command_in(got.out), *flags[-4:]).status == 0
    got = cli(*flags, *new, *PAIRS, *both, "--overwrite")
    assert got.status == 0 and got.out.count("(teacher of the sweep)") == 2, got
    selection = json.loads((copy / "comparison.json").read_text())["selection"]
    assert selection[0]["role"] == "teacher" and selection[0]["seeds"] == [0, 1]


# Figures -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_figures_are_not_blank_and_carry_their_labels(swept):
    comparison = Comparison(swept)
    comparison.kd[0]["improvement"] = paired_test([1.0, 2.0]) | {"by_seed": [1.0, 2.0]}
    expected = {
        "curves": {"epoch", "training loss", "KD, T=4, alpha=0.1"},
        "gain": {"student seed", "percentage points", "mean, 95% interval"},
        "sweep": {"temperature", "alpha"}, "reliability_diagrams": {"confidence", "accuracy", "ECE"},
        "dark_knowledge": {"probability", "teacher, T = 1", "not a fair sample", "with KD, T=", "baseline"},
    }  # fmt: skip
    for name, words in expected.items():
        figure = getattr(figures, name)(comparison)
        figure.draw_without_rendering()
        texts = " | ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))
        assert not [word for word in words if word not in texts], (name, texts)
    assert len(figures.gain(comparison).axes) == len(comparison.kd) == 2
    drawn = {path.stem: np.asarray(Image.open(path).convert("L")) for path in (swept / "figures").iterdir()}
    assert set(drawn) == {"curves", "gain", "sweep", "reliability", "dark_knowledge", "cost"}
    for name, pixels in drawn.items():
        assert pixels.std() > 10 and min(pixels.shape) > 300, name


@pytest.mark.slow
def test_figures_show_what_was_measured(swept):
    comparison = Comparison(swept)
    gains = {"mean": 1.0, "ci95": [-2.0, 4.5], "by_seed": [0.75, 1.25], "p_value": 0.5}
    comparison.kd[0]["improvement"] = gains
    comparison.kd[0] |= {"seeds": [0, 1]}
    axes = figures.gain(comparison).axes[0]
    assert [*axes.lines[1].get_ydata()] == gains["by_seed"]
    (bars,) = axes.containers
    (segment,) = bars.lines[2][0].get_segments()
    assert [*bars.lines[0].get_ydata()] == [gains["mean"]] and [*segment[:, 1]] == gains["ci95"]

    comparison = Comparison(swept)
    (axes,) = figures.cost(comparison).axes
    points = {line.get_label(): [*line.get_ydata()] for line in axes.lines if len(line.get_ydata())}
    assert points["teacher"] == [comparison.teacher["accuracy"]]
    groups = {f"KD, {pair_name(entry)}": entry for entry in comparison.kd} | {"baseline": comparison.baseline}
    means = {bars.get_label(): bars.lines[0].get_ydata()[0] for bars in axes.containers}
    assert means == {name: entry["mean"] for name, entry in groups.items()}
    dots = sorted([*line.get_ydata()] for line in axes.lines if line.get_marker() == ".")
    assert dots == sorted(entry["accuracies"] for entry in groups.values())

    left, right = figures.curves(comparison).axes
    histories, reached = [], []
    for path in sorted(swept.glob("*/history.csv")):
        with open(path, newline="") as file:
            histories.append(
                [[float(row[n]) for n in ("train_loss", "train_accuracy")] for row in csv.DictReader(file)]
            )
        reached.append(json.loads((path.parent / "run.json").read_text())["accuracy"])
    for column, axes in enumerate((left, right)):
        drawn = sorted([*line.get_ydata()] for line in axes.lines if line.get_marker() != "D")
        assert drawn == sorted([row[column] for row in history] for history in histories)
    assert sorted(line.get_ydata()[0] for line in right.lines if line.get_marker() == "D") == sorted(reached)

    panels = figures.reliability_diagrams(comparison).axes
    answers = [comparison.teacher_logits], comparison.kd_logits, comparison.baseline_logits
    for axes, logits in zip(panels, answers, strict=True):
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        sure, right = probabilities.max(-1).ravel(), (np.argmax(logits, -1) == comparison.labels).ravel()
        bins = np.minimum((sure * 15).astype(int), 14)
        heights = {round(bar.get_x() * 15): bar.get_height() for bar in axes.patches}
        assert heights == pytest.approx({number: right[bins == number].mean() for number in {*bins.tolist()}})


def of_students(count, **rest):
    """What the figures of costs and examples need to know of a comparison of `count` pairs."""
    kd = [{"temperature": 2.0**k, "alpha": 0.9, "seeds": [0, 1], "accuracies": [0.9, 0.91], "mean": 0.905}
          for k in range(count)]  # fmt: skip
    return SimpleNamespace(kd=kd, baseline=kd[0], **rest)


@pytest.mark.parametrize(("macs", "count"), [(135e6, 18), (26e6, 1), (30e6, 2), (5e6, 1), (0, 1)])
def test_the_figure_of_costs_holds_every_point_and_name(macs, count):
    """Teachers larger than the student of 26 million multiply-adds, as large, and smaller; one of none at all."""
    costs = [{"macs": each, "parameters": 1e6, "accuracy": 0.95} for each in (26e6, macs)]
    figure = figures.cost(of_students(count, student=costs[0], teacher=costs[1]))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert all(low < place < high for each in axes.lines[1:] for place in np.atleast_1d(each.get_xdata()))
    student, teacher = (
        next(text for text in axes.texts if text.get_text().startswith(name)).get_window_extent()
        for name in ("student", "teacher")
    )
    assert not student.overlaps(teacher) and min(student.x0, teacher.x0) > 0
    assert max(student.x1, teacher.x1) < figure.bbox.x1


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (4, 1, 4), (6, 2, 4)])
def test_the_gains_of_many_pairs_are_drawn_in_several_rows(count, rows, columns):
    comparison = of_students(count)
    for entry in comparison.kd:
        entry["improvement"] = paired_test([1.0, 2.0]) | {"by_seed": [1.0, 2.0]}
    figure = figures.gain(comparison)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title()[:6] for axes in shown] == [f"T={2**k}, a"[:6] for k in range(count)]
    assert figure.axes[0].get_gridspec().get_geometry() == (rows, columns)
    assert [bool(axes.get_ylabel()) for axes in shown] == [number % columns == 0 for number in range(count)]


def test_the_legend_has_as_many_columns_as_its_names_leave_room_for(copy):
    comparison = Comparison(copy)
    narrow = Figure((6.4, 4))
    axes = narrow.subplots()
    for name in ("a", "KD, a_loss_with_quite_a_long_name, T=32, alpha=0.9"):
        axes.plot([1], label=name)
    legend(narrow, [axes], 3)
    assert narrow.legends[0]._ncols == 1
    assert figures.cost(comparison).legends[0]._ncols == 3


def test_east_asian_letters_are_taken_from_a_font_that_is_installed(monkeypatch):
    assert styles.family()[0] == "DejaVu Sans"
    fonts = [SimpleNamespace(name=name) for name in ("Arial", "Yu Gothic", "Noto Sans CJK JP", "Yu Gothic")]
    monkeypatch.setattr(styles, "fontManager", SimpleNamespace(ttflist=fonts))
    assert styles.family() == ["DejaVu Sans", "Noto Sans CJK JP", "Yu Gothic"]


def test_long_titles_are_broken_before_the_temperature():
    assert styles.broken("standardised, T=4, alpha=0.9", 28) == "standardised, T=4, alpha=0.9"
    assert styles.broken("standardised, T=4, alpha=0.9", 27) == "standardised,\nT=4, alpha=0.9"


@pytest.mark.parametrize("count", [3, 100, 1000])
def test_dark_knowledge_of_many_classes_shows_whole_bars_and_their_numbers(count):
    names = [f"{'a class with a long name ' * (number % 2)}{number}" for number in range(count)]
    labels = np.arange(4) % 3
    logits = np.random.default_rng(0).normal(0, 2, (4, count))
    logits[range(4), labels] = 12
    answers = {"teacher_logits": logits, "kd_logits": [logits], "baseline_logits": [logits[:, ::-1]]}
    images = np.zeros((4, 16, 16, 3), np.uint8)
    comparison = of_students(1, classes=names, labels=labels, images=images, **answers)
    comparison.kd[0]["temperature"] = 32.0
    figure = dark_knowledge.dark_knowledge(comparison)
    figure.draw_without_rendering()
    for axes in figure.axes:
        widths = [patch.get_width() for patch in axes.patches]
        assert all(width < 0.9 * axes.get_xlim()[1] for width in widths)
        for width, text in zip(widths, axes.texts, strict=True):
            shown = text.get_text()
            if shown.startswith("<"):
                assert width < float(shown[1:])
            else:
                assert float(shown) == pytest.approx(width, rel=0.06, abs=0.006)
        assert all(len(text.get_text()) <= 14 for text in axes.get_yticklabels())
    softened = figure.axes[2]
    assert len({text.get_text() for text in softened.texts}) > 1, "a teacher that prefers no class"
    assert styles.shortened("0123456789", 9) == "0123…6789" and styles.shortened("012", 3) == "012"


def test_the_sweep_frames_the_best_pair_and_of_equals_the_chosen_one():
    """Temperatures 2 and 16 are rows 0 and 1, alphas 0.5 and 0.9 columns 0 and 1; a frame is placed by its corner."""
    corners = {(2.0, 0.5): (-0.5, -0.5), (16.0, 0.5): (-0.5, 0.5), (2.0, 0.9): (0.5, -0.5), (16.0, 0.9): (0.5, 0.5)}
    pairs = [dict(zip(("temperature", "alpha"), pair, strict=True)) for pair in corners]
    for best, chosen in itertools.product([None, *pairs], pairs):
        entries = [{"role": "kd", "mean": 0.6 if pair == best else 0.5} | pair for pair in pairs]
        comparison = SimpleNamespace(selection=[{"role": "baseline", "mean": 0.4}, *entries], kd=[chosen])
        comparison.sweep_teacher_has_seen = best is None
        assert (SEEN in figures.sweep(comparison).get_suptitle().lower()) == (best is None)
        (frame,) = figures.sweep(comparison).axes[0].patches
        assert frame.get_xy() == corners[tuple((best or chosen).values())], (best, chosen)


def test_without_a_sweep_there_is_no_figure_of_it():
    assert figures.sweep(SimpleNamespace(selection=[])) is None


def test_examples_begin_with_those_that_show_most():
    """Four images of class 0: the one that teacher and KD get right and the baseline takes for the teacher's second
    class comes first; the one that the teacher gets wrong comes last."""
    comparison = SimpleNamespace(
        classes=["a", "b", "c"],
        labels=np.array([0, 0, 0, 0]),
        teacher_logits=np.array([[1.0, 3, 0], [3, 1, 0], [3, 2, 0], [3, 2, 0]]),
        kd_logits=[np.array([[3.0, 0, 0], [3, 0, 0], [3, 0, 0], [3, 0, 0]])],
        baseline_logits=[np.array([[3.0, 0, 0], [3, 0, 0], [3, 0, 0], [0, 3, 0]])],
    )
    assert dark_knowledge.examples(comparison, 4) == [3, 2, 1, 0]
    assert dark_knowledge.examples(comparison, 2) == [3, 2]


def test_examples_are_of_different_classes_where_possible():
    comparison = SimpleNamespace(
        classes=["a", "b", "c"],
        labels=np.array([0, 0, 0, 1, 1]),
        teacher_logits=np.array([[3.0, 2.9, 0], [3, 2.8, 0], [3, 2.7, 0], [1, 3, 0], [0, 3, 0]]),
        kd_logits=[np.array([[3.0, 0, 0], [3, 0, 0], [3, 0, 0], [0, 3, 0], [0, 3, 0]])],
        baseline_logits=[np.array([[0.0, 3, 0], [0, 3, 0], [0, 3, 0], [0, 3, 0], [0, 3, 0]])],
    )
    assert dark_knowledge.examples(comparison, 4) == [0, 3, 1, 2]
