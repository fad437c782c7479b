"""The statistics against hand-worked examples and published figures; the printed text; the files."""

import csv
import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from conftest import process
from PIL import Image

import figures
import files
import report
from measures import (
    calibration_error,
    class_accuracies,
    mcnemar_test,
    negative_log_likelihood,
    paired_test,
    reliability,
    seeds_needed,
    softmax,
    spread,
)
from report import claim, points

# Statistics ----------------------------------------------------------------------------------------------------------


def test_paired_test_against_students_sleep_data():
    """Student (1908), the two drugs' hours of sleep gained by ten patients: t = 4.0621, p = 0.002833, 0.70 to 2.46."""
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    two = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    got = paired_test([b - a for a, b in zip(one, two, strict=True)])
    assert got["mean"] == pytest.approx(1.58)
    assert got["p_value"] == pytest.approx(0.002833, abs=5e-7)
    assert got["ci95"] == pytest.approx([0.7001142, 2.4598858], abs=5e-7)


def test_paired_test_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt 3, t(0.975, 2) = 4.302653."""
    got = paired_test([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert got["ci95"] == pytest.approx([2 - half, 2 + half], abs=1e-5)
    assert got["p_value"] == pytest.approx(0.0741799, abs=1e-6)


@pytest.mark.parametrize("differences", [[0.3], [0.3, 0.3, 0.3], [0.0, 0.0], [0.1, 0.1, 0.1]])
def test_undefined_statistics_are_null_never_nan(differences):
    got = paired_test(differences)
    assert got["ci95"] is None and got["p_value"] is None and got["mean"] == pytest.approx(differences[0])
    assert "NaN" not in json.dumps(got)


def test_mcnemar_against_the_binomial_by_hand():
    """1 of 10 discordant pictures one way: p = 2 (C(10, 0) + C(10, 1)) / 2^10 = 22 / 1024."""
    assert mcnemar_test(9, 1) == mcnemar_test(1, 9) == pytest.approx(22 / 1024)
    assert mcnemar_test(0, 0) == 1.0 and mcnemar_test(4, 4) == pytest.approx(1.0)


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_needed_against_cohens_tables(effect, pairs):
    """The sample sizes of a paired t-test at 80% power and 5%, two-sided, for Cohen's (1988) small, medium and large
    effects, as G*Power gives them."""
    assert seeds_needed(deviation=1 / effect, gain=1.0) == pairs


@pytest.mark.parametrize(("deviation", "pairs"), [(0.005, 2), (0.0328, 3), (0.0505, 3), (0.11, 4), (0.5, 34)])
def test_seeds_needed_by_drawing_them(deviation, pairs):
    """For a gain of 0.25: of many drawn comparisons of so many pairs four in five are significant, of one pair fewer
    they are not."""
    assert seeds_needed(deviation) == pairs
    draw = np.random.default_rng(0).normal(0.25, deviation, (40_000, pairs))
    for drawn in (draw, draw[:, 1:]):
        if drawn.shape[1] > 1:
            shown = (scipy.stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean()
            assert (shown > 0.8) == (drawn is draw), shown


def test_spread_is_the_sample_standard_deviation():
    assert spread([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3))
    assert spread([1.0]) is None


def test_calibration_error_by_hand():
    """Three pictures at 0.6 of which one is right and one at 0.9, right: 3/4 |1/3 - 0.6| + 1/4 |1 - 0.9| = 0.225."""
    probabilities = np.array([[0.6, 0.4], [0.6, 0.4], [0.6, 0.4], [0.1, 0.9]])
    labels = np.array([0, 1, 1, 1])
    assert calibration_error(probabilities, labels) == pytest.approx(0.225)
    share, confidence, accuracy = reliability(probabilities, labels)
    assert share.sum() == pytest.approx(1) and share[8] == 0.75 and share[13] == 0.25  # (8/15, 9/15], (13/15, 14/15]
    assert accuracy[8] == pytest.approx(1 / 3) and confidence[13] == pytest.approx(0.9)


def test_negative_log_likelihood_by_hand():
    logits = np.array([[math.log(3), 0.0], [0.0, 0.0], [5e4, 0.0]])
    expected = (-math.log(0.75) - math.log(0.5) + 5e4) / 3
    assert negative_log_likelihood(logits, np.array([0, 1, 1])) == pytest.approx(expected)


def test_softmax_at_a_temperature():
    np.testing.assert_allclose(softmax([[2 * math.log(3), 0]], 2), [[0.75, 0.25]])
    assert np.isfinite(softmax([[1e6, -1e6]])).all()


def test_class_accuracies():
    logits = np.eye(3)[[0, 0, 1, 1]]
    assert class_accuracies(logits, np.array([0, 1, 1, 1]), 3) == [1.0, pytest.approx(2 / 3), None]


# Words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.254, "0.25"), (-0.254, "-0.25"), (-0.001, "0.00"), (0.0, "0.00"), (12.345, "12.35"), (-3.0, "-3.00")],
)
def test_gains_in_points(value, text):
    assert points(value) == text


def test_one_pair_claims_nothing_about_distillation():
    text = claim({"mean": 0.3, "ci95": None, "p_value": 0.41, "mended": 60, "broken": 50, "by_seed": [0.3]}, 1, 10_000)
    assert (
        "These two networks" in text and "mends 60 and breaks 50" in text and "says nothing about distillation" in text
    )


def test_a_gain_that_is_shown_and_one_that_is_not():
    shown = [1.0, 1.1, 0.9]
    text = claim(paired_test(shown) | {"by_seed": shown}, 3, 10_000)
    assert "improves this student" in text and "+1.00 points" in text and "n = 3 seeds" in text
    worse = [-1.0, -1.1, -0.9]
    assert "worsens" in claim(paired_test(worse) | {"by_seed": worse}, 3, 10_000)
    vague = [0.5, -0.5, 0.1]
    text = claim(paired_test(vague) | {"by_seed": vague}, 3, 10_000)
    needed = seeds_needed(np.std(vague, ddof=1))
    assert f"No difference can be shown with 3 seeds; about {needed} would show a gain of 0.25 points" in text
    assert "initial weights and orders of pictures" in text
    # Gains of 25 pictures of 10,000 are equal however their accuracies are rounded.
    equal = [100 * (a - b) / 10_000 for a, b in ((9022, 8997), (9010, 8985), (8950, 8925))]
    assert paired_test(equal)["p_value"] is None
    many = [0.1, -0.1] * 20
    assert "would have been shown with 80% power" in claim(paired_test(many) | {"by_seed": many}, 40, 10_000)
    same = [0.5, 0.5]
    assert "no interval" in claim(paired_test(same) | {"by_seed": same}, 2, 10_000)


def record(temperature, **entries):
    """A run.json of a distilled student."""
    settings = {
        "role": "kd", "temperature": temperature, "alpha": 0.5, "seed": 0, "data": "d", "epochs": 1, "batch_size": 1,
        "val_fraction": 0.1 if "val_accuracy" in entries else 0.0, "teacher": "t",
    }  # fmt: skip
    costs = {name: {"parameters": 1, "macs": 1} for name in ("teacher", "student")}
    more = {"environment": {}, "seconds": 1.0, "costs": costs, "test_logits_sha256": ""}
    return {"finished": True, "settings": settings, **more, **entries}


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory, finished, flags):
    """An output folder with a sweep of 2 x 2 pairs and 3 seeds."""
    import main

    output = shutil.copytree(finished, tmp_path_factory.mktemp("swept") / "out")
    words = (
        *flags,
        "--output-dir",
        output,
        "--seeds",
        3,
        "--temperature",
        2,
        4,
        "--alpha",
        0.5,
        0.9,
        "--val-fraction",
        0.25,
    )
    assert main.main([str(word) for word in words]) == 0
    return output


def test_comparison_json(swept):
    text = (swept / "comparison.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    got = json.loads(text)
    baseline, kd = got["baseline"], got["kd"][0]
    assert baseline["seeds"] == kd["seeds"] == [0, 1, 2]
    for entry, name in ((baseline, "baseline"), (kd, f"kd-T{kd['temperature']:g}-a{kd['alpha']:g}")):
        kept = [json.loads((swept / f"{name}-s{seed}" / "run.json").read_text())["accuracy"] for seed in range(3)]
        assert entry["accuracies"] == kept
        assert entry["mean"] == pytest.approx(np.mean(kept)) and entry["std"] == pytest.approx(np.std(kept, ddof=1))
    gains = 100 * (np.array(kd["accuracies"]) - np.array(baseline["accuracies"]))
    assert kd["improvement"]["mean"] == pytest.approx(gains.mean())
    assert len(kd["agreement_with_teacher"]) == 3
    assert got["teacher"]["parameters"] > 10 * got["student"]["parameters"]
    assert got["teacher"]["macs"] > 5 * got["student"]["macs"]
    assert got["environment"]["torch"] and got["environment"]["program"] and got["seconds"] > 0
    # The pair of the first command is there too, after the pair just asked for.
    assert (got["kd"][-1]["temperature"], got["kd"][-1]["alpha"], got["kd"][-1]["seeds"]) == (4.0, 0.1, [0])
    assert got["kd"][-1]["improvement"]["method"] == "exact McNemar test"


def test_the_interval_pairs_each_student_with_the_baseline_of_its_seed(cli, swept, tmp_path):
    """Against SciPy's paired t-test, of accuracies written by hand, in 24ths."""
    folder = shutil.copytree(swept, tmp_path / "out")
    pair = json.loads((folder / "comparison.json").read_text())["kd"][0]
    name = f"kd-T{pair['temperature']:g}-a{pair['alpha']:g}"
    right = {name: [12, 15, 20], "baseline": [10, 14, 13]}
    for role, counts in right.items():
        for seed, count in enumerate(counts):
            path = folder / f"{role}-s{seed}" / "run.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": count / 24}))
    assert cli("--report", "--output-dir", folder).status == 0
    got = json.loads((folder / "comparison.json").read_text())["kd"][0]["improvement"]
    points = [100 / 24 * np.array(counts) for counts in right.values()]
    wanted = scipy.stats.ttest_rel(*points)
    assert got["by_seed"] == pytest.approx(points[0] - points[1]) and got["p_value"] == pytest.approx(wanted.pvalue)
    assert got["ci95"] == pytest.approx(list(wanted.confidence_interval(0.95)))


def test_pairs_of_temperature_and_alpha_are_compared_over_the_seeds_of_both(cli, swept, tmp_path):
    """Against SciPy's paired t-test: a second pair with seeds 1, 2 and 3 shares two of the first one's 0, 1 and 2."""
    folder = shutil.copytree(swept, tmp_path / "out")
    shutil.rmtree(folder / "kd-T4-a0.1-s0")
    first = json.loads((folder / "comparison.json").read_text())["kd"][0]
    name = f"kd-T{first['temperature']:g}-a{first['alpha']:g}"
    counts = {name: [12, 15, 20], "kd-T8-a0.1": [None, 11, 21, 24], "baseline": [1, 2, 3, 4]}
    for role, right in counts.items():
        for seed, count in enumerate(right):
            if count is None:
                continue
            source = folder / (name if role != "baseline" else role)
            run = folder / f"{role}-s{seed}"
            if not run.exists():
                shutil.copytree(f"{source}-s0", run)
            record = json.loads((run / "run.json").read_text()) | {"accuracy": count / 24}
            record["settings"]["seed"] = seed
            if role == "kd-T8-a0.1":
                record["settings"] |= {"temperature": 8.0, "alpha": 0.1}
            (run / "run.json").write_text(json.dumps(record))
    got = cli("--report", "--output-dir", folder)
    assert got.status == 0, got
    one, other = json.loads((folder / "comparison.json").read_text())["kd"]
    over, wanted = other["first_over_this"], scipy.stats.ttest_rel([15, 20], [11, 21])
    assert "first_over_this" not in one and other["seeds"] == [1, 2, 3] and over["seeds"] == [1, 2]
    assert over["by_seed"] == pytest.approx([100 * 4 / 24, -100 / 24])
    assert over["p_value"] == pytest.approx(wanted.pvalue)
    pair = f"T={first['temperature']:g}, alpha={first['alpha']:g}"
    assert f"{pair} over T=8, alpha=0.1: +6.25 points, 95% confidence interval " in got.out
    assert f"p = {wanted.pvalue:.2f} (n = 2 seeds)." in got.out


def test_a_report_of_logits_made_by_hand(cli, copy):
    """24 pictures, three classes; the student is right on 20 and the baseline on 15, of which 12 are the same."""
    labels = np.arange(24) % 3
    answers = {"teacher": np.where(np.arange(24) < 22, labels, (labels + 1) % 3)}
    answers["kd-T4-a0.1"] = np.where(np.arange(24) < 20, labels, (labels + 1) % 3)
    answers["baseline"] = np.where((np.arange(24) >= 8) & (np.arange(24) < 23), labels, (labels + 2) % 3)
    sure = {"teacher": 5.0, "kd-T4-a0.1": 3.0, "baseline": 1.0}
    logits = {name: (sure[name] * np.eye(3)[given]).astype(np.float32) for name, given in answers.items()}
    for name in ("kd-T4-a0.1", "baseline"):
        path = copy / f"{name}-s0" / "run.json"
        digest = files.save_array(path.parent / "test_logits.npy", logits[name])
        entries = {"accuracy": float((answers[name] == labels).mean()), "test_logits_sha256": digest}
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    for kept, name, array in (("test-*.npz", "labels", labels), ("teacher-*.npz", "logits", logits["teacher"])):
        (path,) = (copy / "data").glob(kept)
        files.save_arrays(path, **files.load_arrays(path) | {name: array})
    got = cli("--report", "--output-dir", copy)
    assert got.status == 0, got

    improvement = json.loads((copy / "comparison.json").read_text())["kd"][0]["improvement"]
    assert (improvement["mended"], improvement["broken"]) == (8, 3)
    assert improvement["mean"] == pytest.approx(100 * 5 / 24)
    for title, name in (("Teacher", "teacher"), ("KD, T=4, alpha=0.1", "kd-T4-a0.1"), ("Baseline", "baseline")):
        confidence = math.exp(sure[name]) / (math.exp(sure[name]) + 2)
        accuracy = (answers[name] == labels).mean()
        likelihood = -accuracy * math.log(confidence) - (1 - accuracy) * math.log((1 - confidence) / 2)
        wanted = [accuracy, abs(accuracy - confidence), likelihood]
        if name != "teacher":
            wanted.insert(1, (answers[name] == answers["teacher"]).mean())
        (row,) = (line[26:].split() for line in got.out.splitlines() if line.startswith(f"{title:<26}"))
        assert row == [f"{wanted[0]:.4f}", "1", *(f"{value:.4f}" for value in wanted[1:])]


def test_the_sweep_shown_is_over_the_seeds_reported(swept):
    """Where a later sweep had fewer seeds than those found, its pairs must not be left out."""
    pair = json.loads((swept / "comparison.json").read_text())["kd"][0]
    asked = {"temperature": pair["temperature"], "alpha": pair["alpha"], "seeds": [1]}
    assert [entry["seeds"] for entry in report.Comparison(swept, asked).selection] == [[1]] * 5


def test_the_sweep_frames_the_best_pair_and_of_equals_the_one_that_was_taken():
    """Temperatures 2 and 16 are rows 0 and 1, alphas 0.5 and 0.9 columns 0 and 1; a frame is placed by its corner."""
    corners = {(2.0, 0.5): (-0.5, -0.5), (16.0, 0.5): (-0.5, 0.5), (2.0, 0.9): (0.5, -0.5), (16.0, 0.9): (0.5, 0.5)}
    pairs = [dict(zip(("temperature", "alpha"), pair, strict=True)) for pair in corners]
    for best, taken in itertools.product([None, *pairs], pairs):
        entries = [{"role": "kd", "mean": 0.6 if pair == best else 0.5} | pair for pair in pairs]
        comparison = SimpleNamespace(selection=[{"role": "baseline", "mean": 0.4}, *entries], kd=[taken])
        (frame,) = figures.sweep(comparison).axes[0].patches
        assert frame.get_xy() == corners[tuple((best or taken).values())], (best, taken)


def test_agreement_is_the_share_of_equal_answers(swept):
    got = json.loads((swept / "comparison.json").read_text())
    teacher, student = (np.load(swept / name / "test_logits.npy") for name in ("teacher-s0", "baseline-s1"))
    assert got["baseline"]["agreement_with_teacher"][1] == (teacher.argmax(1) == student.argmax(1)).mean()


def test_the_sweep_never_read_the_test_set_and_the_best_on_validation_was_taken(swept):
    assert not list((swept / "selection").glob("*/test_logits.npy"))
    got = json.loads((swept / "comparison.json").read_text())
    entries = [e for e in got["selection"] if e["role"] == "kd"]
    assert len(entries) == 4 and all(len(e["val_accuracies"]) == 3 for e in got["selection"])
    best = max(entries, key=lambda e: e["mean"])
    assert best["mean"] == next(
        e["mean"]
        for e in entries
        if (e["temperature"], e["alpha"]) == (got["kd"][0]["temperature"], got["kd"][0]["alpha"])
    )
    assert any(e["role"] == "baseline" for e in got["selection"])


def test_the_program_trains_what_validation_chose_even_against_the_test_set(cli, flags, copy, monkeypatch):
    """T = 1 is made the best on validation and T = 4 the best on the test set: T = 1 is trained and reported."""
    import train

    def accuracy(logits, labels):
        return {1.0: 0.25, 4.0: 0.75}.get(running[-1].temperature, 0.5)

    running, begin = [], train._Run.__init__
    monkeypatch.setattr(train._Run, "__init__", lambda run, *a: running.append(a[2]) or begin(run, *a))
    monkeypatch.setattr(train, "accuracy", accuracy)
    validation = {1.0: 0.9, 4.0: 0.1, None: 0.5}
    monkeypatch.setattr(train._Run, "_validation_accuracy", lambda run: validation[run.settings.temperature])
    got = cli(*flags, "--output-dir", copy, "--temperature", 1, 4, "--alpha", 0.9, "--overwrite")
    assert got.status == 0, got
    assert "Best on the validation part: temperature 1.0" in got.out and "- Temperature: 1.0" in got.out
    assert (copy / "kd-T1-a0.9-s0").exists() and not (copy / "kd-T4-a0.9-s0").exists()


def test_the_best_pair_is_by_validation_accuracy(tmp_path):
    for temperature, validation, test in ((1.0, 0.9, 0.2), (4.0, 0.8, 0.99)):
        for folder, entries in (("selection", {"val_accuracy": validation}), (".", {"accuracy": test})):
            run = tmp_path / folder / f"kd-T{temperature:g}-a0.5-s0"
            run.mkdir(parents=True)
            (run / "model.pt").touch()
            (run / "run.json").write_text(json.dumps(record(temperature, **entries)))
    assert report.best_pair(tmp_path, [(4.0, 0.5), (1.0, 0.5)], [0]) == (1.0, 0.5)


def test_comparison_csv_has_a_row_a_run(swept):
    with open(swept / "comparison.csv") as file:
        rows = list(csv.DictReader(file))
    names = [row["run"] for row in rows]
    # teacher, baselines, KD, the sweep, and, where it is not the chosen one, the pair of the first command
    assert len(names) == len(set(names)) and len(names) in (1 + 3 + 3 + 15, 1 + 3 + 3 + 15 + 1)
    for row in rows:
        kept = json.loads((swept / row["run"] / "run.json").read_text())
        for name in ("accuracy", "val_accuracy"):
            assert row[name] == ("" if kept.get(name) is None else repr(kept[name]))


def test_report_prints_and_draws_again_without_data_and_training(cli, swept, tmp_path, monkeypatch):
    import data

    again = shutil.copytree(swept, tmp_path / "out")
    before = (again / "comparison.json").read_bytes()
    shutil.rmtree(again / "figures")
    (again / "comparison.csv").unlink()
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("data was loaded"))
    got = cli("--report", "--output-dir", again)
    assert got.status == 0, got
    assert "Improvement with KD:" in got.out and "Sweep, on validation" in got.out
    assert (again / "comparison.json").read_bytes() == before
    assert (again / "comparison.csv").exists() and len(list((again / "figures").iterdir())) == 5


def test_without_a_comparison_the_report_takes_students_that_have_a_baseline(cli, flags, copy):
    """kd-T4-a0.1-s0 is left of 2 epochs; the baseline and kd-T4-a0.9-s0 are of 1."""
    assert cli(*flags, "--output-dir", copy, "--epochs", 1, "--alpha", 0.9, "--overwrite").status == 0
    (copy / "comparison.json").unlink()
    got = cli("--output-dir", copy, "--report")
    assert got.status == 0 and "Alpha: 0.9" in got.out, got
    shutil.rmtree(copy / "baseline-s0")
    (copy / "kd-T4-a0.1-s0").rename(copy / "kd-T4-a0.1-s3")
    path = copy / "kd-T4-a0.1-s3" / "run.json"
    path.write_text(
        json.dumps((record := json.loads(path.read_text())) | {"settings": record["settings"] | {"seed": 3}})
    )
    shutil.rmtree(copy / "kd-T4-a0.9-s0")
    (copy / "comparison.json").unlink()
    assert "no finished baseline-s3" in cli("--output-dir", copy, "--report").err


def test_a_class_name_that_the_terminal_cannot_show_is_escaped(copy, pictures, tmp_path, monkeypatch):
    """The report is printed and written all the same."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    path = next((copy / "data").glob("test-*.npz"))
    arrays = files.load_arrays(path)
    files.save_arrays(path, **arrays | {"classes": np.array(["кошка", *arrays["classes"][1:]])})
    (copy / "comparison.csv").unlink()
    done = process("--report", "--output-dir", copy)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0 and "\\u043a" in out and (copy / "comparison.csv").is_file(), err


def test_pairs_of_unlike_halves_are_said_so(cli, copy):
    assert "not all trained in the same way" not in cli("--output-dir", copy, "--report").out
    path = copy / "baseline-s0" / "run.json"
    record = json.loads(path.read_text())
    record["environment"] |= {"device": "Abacus", "precision": "bf16", "compiled": True}
    path.write_text(json.dumps(record))
    got = cli("--output-dir", copy, "--report")
    told = "not all trained in the same way: baseline-s0 on Abacus in bf16, compiled; kd-T4-a0.1-s0 on "
    assert got.status == 0 and told in got.out


def test_a_sweep_of_unlike_halves_is_said_so(cli, swept, tmp_path):
    copy = shutil.copytree(swept, tmp_path / "copy")
    path = next((copy / "selection").glob("kd-*/run.json"))
    record = json.loads(path.read_text())
    record["environment"]["device"] = "Abacus"
    path.write_text(json.dumps(record))
    got = cli("--output-dir", copy, "--report")
    assert (
        "the students of the sweep were not all trained in the same way" in got.out and "these students" not in got.out
    )
    assert f"{path.parent.name} on Abacus in" in got.out


def test_damaged_logits_are_named(cli, copy):
    path = copy / "kd-T4-a0.1-s0" / "test_logits.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    got = cli("--report", "--output-dir", copy)
    assert got.status == 1 and str(path) in got.err and "damaged" in got.err


def test_a_repeated_sweep_trains_nothing(cli, flags, swept, tmp_path):
    again = shutil.copytree(swept, tmp_path / "out")
    times = {p: p.stat().st_mtime_ns for p in again.rglob("model.pt")}
    words = ("--seeds", 3, "--temperature", 2, 4, "--alpha", 0.5, 0.9, "--val-fraction", 0.25)
    assert cli(*flags, "--output-dir", again, *words).status == 0
    assert {p: p.stat().st_mtime_ns for p in again.rglob("model.pt")} == times


def test_figures_are_not_blank_and_carry_their_labels(swept):
    comparison = report.Comparison(swept)
    comparison.kd[0]["improvement"] = paired_test([1.0, 2.0, 3.0]) | {"by_seed": [1.0, 2.0, 3.0]}
    expected = {
        "curves": {"epoch", "training loss", "KD, T=4, alpha=0.1"},
        "gain": {"student seed", "percentage points", "mean, 95% interval"},
        "sweep": {"temperature", "alpha"}, "reliability_diagrams": {"confidence", "accuracy", "ECE"},
        "dark_knowledge": {"probability", "teacher, T = 1", "not a fair sample", "with KD, T=", "baseline"},
    }  # fmt: skip
    for name, words in expected.items():
        figure = getattr(figures, name)(comparison)
        figure.canvas.draw()
        texts = " | ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))
        assert not [word for word in words if word not in texts], (name, texts)
    drawn = {path.stem: np.asarray(Image.open(path).convert("L")) for path in (swept / "figures").iterdir()}
    assert len(figures.gain(comparison).axes) == len(comparison.kd) > 0
    assert set(drawn) == {"curves", "gain", "sweep", "reliability", "dark_knowledge"}
    for name, pixels in drawn.items():
        assert pixels.std() > 10 and min(pixels.shape) > 300, name


def test_dark_knowledge_is_chosen_where_it_is_most_telling():
    """Four pictures of class 0: the one that teacher and KD get right and the baseline takes for the teacher's second
    class comes first; the one that the teacher gets wrong comes last."""

    class Comparison:
        classes = ["a", "b", "c"]
        labels = np.array([0, 0, 0, 0])
        teacher_logits = np.array([[1.0, 3, 0], [3, 1, 0], [3, 2, 0], [3, 2, 0]])
        kd_logits = [[np.array([[3.0, 0, 0], [3, 0, 0], [3, 0, 0], [3, 0, 0]])]]
        baseline_logits = [np.array([[3.0, 0, 0], [3, 0, 0], [3, 0, 0], [0, 3, 0]])]

    assert figures.telling_pictures(Comparison, 4) == [3, 2, 1, 0]
