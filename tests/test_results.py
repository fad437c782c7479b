"""What results/ claims is so."""

import csv
import hashlib
import importlib
import json
import math
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import CIFAR10_DIR, ROOT, needs_cifar10

import data
import models
import train
from reports.statistics import holm
from runs.files import Damaged, Failure

RESULTS = ROOT / "results"
RECORD, SHORTER, NEW = RESULTS / "cifar10", RESULTS / "cifar10-10-epochs", RESULTS / "seeds-6-to-10"
LONGER, LONGEST, COMMANDS = (RESULTS / name for name in ("cifar10-60-epochs", "cifar10-200-epochs", "two-commands"))
SEEDS = {NEW: [6, 7, 8, 9, 10], LONGER: [6, 7, 8, 9, 10], LONGEST: [6, 7, 8]}  # of the other records 0 to 4
BETTER = {"teacher-77-epochs": "the teacher of 77 epochs", "three-teachers": "three teachers together"}
T_QUANTILES = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445, 9: 2.262157}  # of Student's t, 97.5%


def told_in(*paths):
    """The words of pages, each space and line break as one space."""
    return " ".join(" ".join((ROOT / path).read_text() for path in paths).split())


def told_to_users():
    return told_in("README.md", "results/findings.md")


def record(folder=RECORD):
    return json.loads((folder / "comparison.json").read_text())


def entry(folder, temperature, alpha):
    """What a record tells of the students of a temperature and alpha."""
    return next(kd for kd in record(folder)["kd"] if (kd["temperature"], kd["alpha"]) == (temperature, alpha))


def half(values, more=0.0):
    """Half of the 95% interval of the mean of `values`, or, with `more` 1, of the prediction of one value more."""
    return T_QUANTILES[len(values) - 1] * np.std(values, ddof=1) * (1 / len(values) + more) ** 0.5


def ahead(ones, others):
    """In points: by how much `ones` are ahead of `others` in the mean, and the ends of the 95% interval."""
    gains = 100 * (np.array(ones) - others)
    return gains.mean(), gains.mean() - half(gains), gains.mean() + half(gains)


ALL = [(RECORD, 24, [(4, 0.9)]), (NEW, 24, [(4, 0.9), (1, 0.9), (4, 0.1), (32, 0.9)]),
       (SHORTER, 10, [(32, 0.9), (4, 0.9)]), (LONGER, 60, [(4, 0.9), (4, 0.1)]),
       (LONGEST, 200, [(4, 0.9)])]  # fmt: skip


@pytest.mark.parametrize(("folder", "epochs", "pairs"), ALL)
def test_the_records_hold_what_their_plans_name(folder, epochs, pairs):
    comparison, seeds = record(folder), SEEDS.get(folder, [0, 1, 2, 3, 4])
    assert [(kd["temperature"], kd["alpha"]) for kd in comparison["kd"]] == pairs
    assert all(kd["seeds"] == seeds for kd in comparison["kd"])
    assert comparison["baseline"]["seeds"] == seeds and comparison["settings"]["epochs"] == epochs
    assert comparison["settings"]["teacher"] == record()["settings"]["teacher"]
    assert comparison["settings"]["recipe"] == 5
    lengths = {path.parent.name: len(path.read_text().splitlines()) - 1 for path in folder.glob("*/history.csv")}
    assert lengths.pop("teacher-s0", 0) == (24 if folder == RECORD else 0) and set(lengths.values()) <= {epochs}
    assert len(lengths) == {RECORD: 10, NEW: 25, LONGER: 15, LONGEST: 6}.get(folder, 0)


@pytest.mark.parametrize("folder", [folder for folder, *_ in ALL])
def test_the_gains_are_those_of_a_paired_t_test_by_hand(folder):
    comparison = record(folder)
    for kd in comparison["kd"]:
        mean, *interval = ahead(kd["accuracies"], comparison["baseline"]["accuracies"])
        assert kd["improvement"]["mean"] == pytest.approx(mean)
        assert kd["improvement"]["ci95"] == pytest.approx(interval, abs=1e-6)
        assert (interval[0] > 0) != (folder == LONGEST)


def test_every_distilled_student_is_better_than_the_one_without_of_the_same_seed():
    others = [COMMANDS, *(RESULTS / name for name in (*BETTER, "teacher-200-epochs"))]
    for found in map(record, [folder for folder, *_ in ALL] + others):
        for kd in found["kd"]:
            assert all(np.greater(kd["accuracies"], found["baseline"]["accuracies"]))
    assert "table](../README.md#results) is better than the one without of the same" in told_in("results/findings.md")


def test_other_test_images_would_not_change_the_intervals():
    few = RESULTS / "few-labels"
    for folder in (NEW, LONGER, LONGEST, RESULTS / "teacher-200-epochs", few):
        for kd in record(folder)["kd"]:
            wide, ends = (kd["improvement"][name] for name in ("ci95_with_images", "ci95"))
            assert wide == pytest.approx(ends, abs=0.005), folder
    assert "with images counted in, they are the same (seeds 6 to 10, the" in told_in("results/findings.md")


def test_a_seed_outside_of_the_record_is_one_more_of_the_kind():
    more, intervals = json.loads((RECORD / "seed_5.json").read_text()), []
    assert more["settings"] | {"seed": 0} == record()["settings"]
    pairs = (more["kd"][0], entry(RECORD, 4, 0.9)), (more["baseline"], record()["baseline"])
    for found, group in pairs:
        assert found["seeds"] == [5]
        around = half(group["accuracies"], more=1)
        assert abs(found["mean"] - group["mean"]) < around
        intervals.append(f"{group['mean'] - around:.4f} to {group['mean'] + around:.4f}")
    told = told_in("results/README.md")
    words = "{:.4f}, and without {:.4f}, both inside the 95% prediction intervals of the five ({}, {})."
    assert words.format(*(found["mean"] for found, _ in pairs), *intervals) in told


def test_each_seed_is_one_more_of_the_kind():
    """As often as it should, one of five seeds lies in the 95% prediction interval of the other four."""
    groups = set()
    for path in RESULTS.rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and {"kd", "baseline"} <= content.keys():  # a comparison
            groups |= {tuple(each["accuracies"]) for each in (*content["kd"], content["baseline"])}
    groups = sorted(group for group in groups if len(group) == 5)

    def inside(group, out):
        rest = [accuracy for seed, accuracy in enumerate(group) if seed != out]
        return abs(group[out] - np.mean(rest)) <= half(rest, more=1)

    found, count = sum(inside(group, out) for group in groups for out in range(5)), 5 * len(groups)
    # so few or fewer, if they were independent
    assert sum(math.comb(count, n) * 0.95**n * 0.05 ** (count - n) for n in range(found + 1)) > 0.05
    words = f"Of all seeds of groups of five in this folder, each left out in turn, {found} of {count} lie in the 95% "
    assert f"{words}prediction interval of the other four." in told_in("results/README.md")


def test_the_prose_has_the_figures_of_the_records():
    """What the READMEs say between their tables is computed again here from the files in results/."""
    readme, chosen = told_to_users(), told_in("results/recipes.md")
    pair = record()["kd"][0], record()["baseline"]

    def against(name):
        return " against ".join(f"{np.mean(entry[name]):.3f}" for entry in pair)

    assert f"ECE is {against('calibration_error')}, NLL {against('negative_log_likelihood')}." in readme
    for name, words in (
        ("scaled_negative_log_likelihood", "NLL is better"), ("scaled_calibration_error", "ECE about the same"),
    ):  # fmt: skip
        assert f"its {words} ({against(name)})" in readme
    assert f"a fitted temperature (about {np.mean(pair[0]['fitted_temperature']):.1f} for" in readme
    for folder, _, _ in ALL:
        for kd in record(folder)["kd"]:
            assert (np.mean(kd["fitted_temperature"]) > 1.2) == (kd["temperature"] >= 4), "overconfident"

    saved = ahead(entry(SHORTER, 4, 0.9)["accuracies"], record()["baseline"]["accuracies"])
    assert "0.9173 ({:+.2f} points, {:+.2f} to {:+.2f}; not planned)".format(*saved) in readme
    leak = json.loads((RESULTS / "leak.json").read_text())
    given_away = leak["given_away"]
    told = "by {points:.1f} points here (standard error {standard_error:.1f}, over images only"
    assert told.format(**given_away) in readme
    numbers = [leak[part][name] for part in ("validation", "test") for name in ("points", "standard_error")]
    assert "{:+.2f} points (standard error {:.2f}) became {:+.2f} ({:.2f})".format(*numbers) in chosen
    with open(RESULTS / "recipes.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["epochs"] == "6"]
    assert len(rows) == 87 and all(f"{float(row['val_accuracy']):.4f}" in chosen for row in rows)


def test_what_new_seeds_on_another_machine_gain_is_told_as_measured():
    readme, told = told_to_users(), told_in("results/README.md")
    small, large = entry(NEW, 4, 0.1), entry(NEW, 4, 0.9)
    rows = [
        (f"distilled, T = {t}, alpha = {alpha}", entry(NEW, t, alpha))
        for t, alpha in ((32, 0.9), (4, 0.9), (1, 0.9), (4, 0.1))
    ]
    for name, group in (*rows, ("without", record(NEW)["baseline"])):
        listed = ", ".join(f"{accuracy:.4f}" for accuracy in group["accuracies"])
        row = f"| {name} | {listed} | {group['mean']:.4f} ± {group['std']:.4f} |"
        if gain := group.get("improvement"):
            row += f" {gain['mean']:+.2f} ({gain['ci95'][0]:+.2f} to {gain['ci95'][1]:+.2f}), p = {gain['p_value']:.2g}"
        assert f"{row} |" in told
    ten = [entry(RECORD, 4, 0.9)["accuracies"] + large["accuracies"]]
    ten.append(record()["baseline"]["accuracies"] + record(NEW)["baseline"]["accuracies"])
    for file, groups in (("ten.json", ten), ("alpha.json", [large["accuracies"], small["accuracies"]])):
        (test,) = json.loads((NEW / file).read_text())
        assert test["accuracies"] == groups
        mean, low, high = ahead(*groups)
        assert test["points"]["ci95"] == pytest.approx([low, high])
        ends = f"{mean:.2f} points ({low:+.2f} to {high:+.2f}), p = {test['points']['p_value']:.2g}"
        assert ends in told and (file == "alpha.json" or ends.split("), p")[0] in readme)
    (over_none,), (over_softer,) = (json.loads((NEW / f"temperature_{t}.json").read_text()) for t in (32, 4))
    softer = entry(NEW, 32, 0.9)["accuracies"]
    assert over_none["accuracies"] == [softer, record(NEW)["baseline"]["accuracies"]]
    assert over_softer["accuracies"] == [large["accuracies"], softer]
    (gain, *ends), (lead, *its) = (ahead(*each["accuracies"]) for each in (over_none, over_softer))
    ends, its = ("({:+.2f} to {:+.2f})".format(*each) for each in (ends, its))
    assert f"T = 4 is ahead of T = 32 by {lead:+.2f} points {its}, p = {over_softer['points']['p_value']:.2g}" in told
    assert f"{lead:+.2f} points {its}; T = 32 gains {gain:.2f} points there {ends}" in readme
    (over_one,), one = json.loads((NEW / "temperature_1.json").read_text()), entry(NEW, 1, 0.9)["accuracies"]
    assert over_one["accuracies"] == [large["accuracies"], one] and over_one["differ_in"] == ["temperature"]
    (gain, *ends), (lead, *its) = ahead(one, record(NEW)["baseline"]["accuracies"]), ahead(large["accuracies"], one)
    ends, its = ("{:+.2f} to {:+.2f}".format(*each) for each in (ends, its))
    p = f"p = {over_one['points']['p_value']:.2g}"
    assert f"and of T = 1 by {lead:+.2f} points ({its}), {p}" in told
    words = f"T = 1 gains {gain:.2f} points ({ends}), and T = 4 is ahead of it by {lead:.2f} ({its}; planned in "
    assert (
        f"{words}d785e1b; {p} for" in readme
        and f"T = 1 gains only {gain:.2f} points, T = 4 {lead:.2f} more ({its}, {p}" in readme
    )
    fixed = json.loads((NEW / "fixed.json").read_text())
    assert fixed["seeds"] == [6, 7, 8] and fixed["shared"]["accuracies"] == large["accuracies"][:3]
    mean, *interval = ahead(large["accuracies"][:3], fixed["fixed"]["accuracies"])
    assert fixed["shared_over_fixed"]["ci95"] == pytest.approx(interval, abs=1e-6)
    listed, p = ", ".join(f"{each:.4f}" for each in fixed["fixed"]["accuracies"]), fixed["shared_over_fixed"]["p_value"]
    words = "{}; shared views are ahead by {:+.2f} points ({:+.2f} to {:+.2f}), p = {:.2g}."
    assert words.format(listed, mean, *interval, p) in told
    assert "images alone students are worse by {:.2f} points ({:+.2f} to {:+.2f};".format(mean, *interval) in readme
    for words, found in (
        ("Distillation with alpha = 0.1, the default, gains {:.2f} points after 24 epochs ({:+.2f} to {:+.2f})", small),
        ("alpha = 0.9 gains {:.2f} ({:+.2f} to {:+.2f}) and", {"improvement": test["points"]}),
        ("Five new seeds on another machine gain {:.2f} points ({:+.2f} to {:+.2f})", large),
    ):
        assert words.format(found["improvement"]["mean"], *found["improvement"]["ci95"]) in readme


def test_readme_shows_in_bold_the_gains_that_hold_for_all_tests_together():
    lines = (ROOT / "README.md").read_text().splitlines()
    gains = [line.split(" | ")[-1] for line in lines if line.startswith("| ") and ", p = " in line]
    found = [float(gain.strip(" |").rpartition(" ")[2]) for gain in gains]
    p_values = sorted(found)
    holds = 0  # Holm: the k-th smallest of n times n + 1 - k, until one is 0.05 or more
    while holds < len(p_values) and p_values[holds] * (len(p_values) - holds) < 0.05:
        holds += 1
    assert [p in p_values[:holds] for p in found] == [gain.startswith("**+") for gain in gains]
    others = (RESULTS / name for name in (*BETTER, "teacher-200-epochs"))
    folders = RECORD, SHORTER, NEW, LONGER, LONGEST, *others
    exact = sorted(kd["improvement"]["p_value"] for folder in folders for kd in record(folder)["kd"])
    assert exact == pytest.approx(p_values, rel=0.05)
    corrected = np.maximum.accumulate(np.multiply(exact, range(len(exact), 0, -1)))
    rest = corrected[holds:-1]  # the last is that of three pairs
    assert entry(LONGEST, 4, 0.9)["improvement"]["p_value"] == exact[-1] and (rest == rest[0]).all()
    words = f"eight of its twelve gains of five pairs have p < 0.05, the other four p = {rest[0]:.2g}."
    assert (holds, len(rest)) == (8, 4) and words in told_in("README.md")
    words = (
        f"13 t-tests of that table, four of its twelve gains of five pairs are not shown (p = {rest[0]:.2g} for each): "
    )
    assert words in told_in("results/findings.md") and len(gains) == 13
    unshown = entry(SHORTER, 4, 0.9), *(entry(NEW, *pair) for pair in ((4, 0.9), (1, 0.9), (4, 0.1)))
    assert sorted(each["improvement"]["p_value"] for each in unshown) == exact[holds:-1]
    assert 0 < holds < len(gains) and f"that hold for all {len(gains)} t-tests together" in told_in("README.md")


def test_what_readme_says_in_short_is_what_was_measured():
    short = told_in("README.md").partition("**In short**")[2].partition("<!-- results -->")[0]
    gains = {folder: entry(folder, 4, 0.9)["improvement"]["mean"] for folder in (SHORTER, LONGER, NEW)}
    (ten,) = json.loads((NEW / "ten.json").read_text())
    words = "{:.2f} points ({:+.2f} to {:+.2f}) after 24 epochs, ten pairs on two machines; {:.2f} after 10 epochs and "
    words += "{:.2f} after 60."
    assert words.format(*ahead(*ten["accuracies"]), gains[SHORTER], gains[LONGER]) in short
    three, best = json.loads((RESULTS / "three-teachers" / "difference.json").read_text())
    _, other = json.loads((RESULTS / "teacher-200-epochs" / "difference.json").read_text())
    for words, test in (
        ("lead the one of 24 epochs by {:.2f} points ({:+.2f} to {:+.2f});", three),
        ("is not shown ({:.2f}, {:+.2f} to {:+.2f}).", best), ("than that of 24 ({:.2f}, {:+.2f} to {:+.2f}).", other),
    ):  # fmt: skip
        assert words.format(*ahead(*test["accuracies"])) in short
    small = [entry(folder, 4, 0.1)["improvement"]["mean"] for folder in (NEW, LONGER)]
    words = "the gain is {:.2f} points after 24 epochs and {:.2f} after 60, where 0.9 gains {:.2f} and {:.2f} with the "
    assert words.format(*small, gains[NEW], gains[LONGER]) in short
    over = [json.loads((folder / "alpha.json").read_text())[0]["points"]["p_value"] for folder in (NEW, LONGER)]
    assert "The differences are not shown (p = {:.1g} and {:.1g})".format(*over) in short and min(over) > 0.05
    (test,) = json.loads((LONGER / "shorter.json").read_text())
    words = "trained for 60 without a teacher ({:+.2f}, {:+.2f} to {:+.2f}; not planned)."
    assert words.format(*ahead(*test["accuracies"])) in short
    teacher, student = (record()[name]["macs"] for name in ("teacher", "student"))  # forward and backward pass: 3
    share = (24 * 3 * teacher + 24 * teacher + 24 * 3 * student) / (60 * 3 * student)
    assert f"it takes {share:.1f} times the compute." in short
    sizes = [f"{number / 1e6:.{digits}f} million" for name in ("teacher", "student")
             for number, digits in ((record()[name]["parameters"], 2), (record()[name]["macs"], 0))]  # fmt: skip
    words = (
        "The teacher, a ResNet, has {} parameters and takes {} multiply-adds for an image; the student, a plain CNN, "
    )
    assert (words + "{} and {}.").format(*sizes) in told_in("README.md")


def test_what_longer_training_gains_is_told_as_measured():
    readme, told = told_to_users(), told_in("results/README.md")
    long, alone = entry(LONGER, 4, 0.9), record(LONGER)["baseline"]
    gain = ahead(long["accuracies"], alone["accuracies"])
    assert "and {:.2f} after 60 ({:+.2f} to {:+.2f}".format(*gain) in readme
    small = entry(LONGER, 4, 0.1)
    for alpha, group in ((0.9, long), (0.1, small), (None, alone)):
        listed = ", ".join(f"{accuracy:.4f}" for accuracy in group["accuracies"])
        name = f"distilled, T = 4, alpha = {alpha}" if alpha else "without"
        row = f"| 60 | {name} | {listed} | {group['mean']:.4f} ± {group['std']:.4f} |"
        if alpha:
            lead = ahead(group["accuracies"], alone["accuracies"])
            row += " {:+.2f} ({:+.2f} to {:+.2f}), p = {:.2g}".format(*lead, group["improvement"]["p_value"])
        assert f"{row} |" in told
    (test,) = json.loads((LONGER / "alpha.json").read_text())
    assert test["accuracies"] == [long["accuracies"], small["accuracies"]] and test["differ_in"] == ["alpha"]
    words = "{:.2f} points ({:+.2f} to {:+.2f})".format(*ahead(*test["accuracies"]))
    assert f"by {words}, p = {test['points']['p_value']:.1g}, after 60" in told
    gained = "{:.2f} after 60 ({:+.2f} to {:+.2f}).".format(*ahead(small["accuracies"], alone["accuracies"]))
    assert f"and {gained} With the same seeds (6 to 10)" in readme and f"and {words} more, which" in readme
    (test,) = json.loads((LONGER / "shorter.json").read_text())
    count = len(alone["seeds"])
    assert test["accuracies"] == [entry(NEW, 4, 0.9)["accuracies"][:count], alone["accuracies"]]
    (short, alone), (lead, *interval) = map(np.mean, test["accuracies"]), ahead(*test["accuracies"])
    words = f"{short:.4f}, from the one trained without for 60, {alone:.4f} ({lead:+.2f} points, "
    assert words + "{:+.2f} to {:+.2f}; not planned)".format(*interval) in readme
    assert interval[0] < 0 < interval[1], "no difference is shown"


def test_what_carries_the_gain_is_told_as_measured():
    folder, measured = RESULTS / "ranking", told_in("results/ranking/README.md")
    (over_flat, over_smooth), (flat, flat_over_smooth), (smooth,) = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("difference", "without_ranking", "smoothed")
    )
    plain, alone = entry(NEW, 4, 0.9)["accuracies"], record(NEW)["baseline"]["accuracies"]
    assert over_flat["accuracies"][0] == over_smooth["accuracies"][0] == plain
    assert over_flat["accuracies"][1] == flat["accuracies"][0] and flat["accuracies"][1] == alone
    assert over_smooth["accuracies"][1] == smooth["accuracies"][0] == flat_over_smooth["accuracies"][1]
    assert set(over_flat["differ_in"]) == {"loss", "loss_sha256"} and smooth["differ_in"] == ["label_smoothing"]
    file = (ROOT / "examples" / "without_ranking.py").read_bytes()
    assert over_flat["settings"][1]["loss_sha256"] == hashlib.sha256(file).hexdigest(), "as it was trained"
    for test in (over_flat, over_smooth, flat, flat_over_smooth, smooth):
        assert test["seeds"] == SEEDS[NEW]
        mean, low, high = ahead(*test["accuracies"])
        assert test["points"]["ci95"] == pytest.approx([low, high])
        assert f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" in measured
    for group in (plain, flat["accuracies"][0], smooth["accuracies"][0], alone):
        listed = ", ".join(f"{accuracy:.4f}" for accuracy in group)
        assert f"| {listed} | {np.mean(group):.4f} ± {np.std(group, ddof=1):.4f} |" in measured
    readme, told = told_in("README.md"), told_in("results/findings.md")

    def words(test):
        return "{:.2f} points ({:+.2f} to {:+.2f}".format(*ahead(*test["accuracies"]))

    corrected = [test["points"]["p_holm"] for test in (over_flat, over_smooth)]
    assert min(corrected) > 0.05, "none is shown"
    mean, low, high = ahead(*smooth["accuracies"])
    assert f"gains {mean:.2f} points over the plain one ({low:+.2f} to {high:+.2f}; T = 4" in told
    assert f"is {words(over_smooth).replace(' points (', ' points ahead of it (')}), which is not shown once" in told
    assert f"(p = {corrected[1]:.2g})" in told and f"0.57, corrected p = {corrected[1]:.2g};" in readme
    mean, low, high = ahead(*flat["accuracies"])
    assert f"still gain {mean:.2f} points over the plain baseline ({low:+.2f} to {high:+.2f});" in told
    assert (
        f"gain {words(flat)}; seeds 6 to 10); with the ranking {100 * np.subtract(plain, alone).mean():.2f}." in readme
    )
    mean, low, high = ahead(*over_flat["accuracies"])
    ends = f"{mean:.2f} points larger, which is not shown ({low:+.2f} to {high:+.2f}, p = {corrected[0]:.2g})"
    assert ends in told
    (ten,), (new,) = (json.loads((folder / f"{name}.json").read_text()) for name in ("ten", "new"))
    assert (ten["seeds"], new["seeds"]) == ([*range(6, 16)], [*range(11, 16)])
    assert ten["differ_in"] == new["differ_in"] == over_flat["differ_in"]
    for number in (0, 1):
        assert ten["accuracies"][number] == over_flat["accuracies"][number] + new["accuracies"][number]
        listed, group = ", ".join(f"{each:.4f}" for each in new["accuracies"][number]), new["accuracies"][number]
        assert f"| {listed} | {np.mean(group):.4f} ± {np.std(group, ddof=1):.4f} |" in measured
    for test in (ten, new):
        mean, low, high = ahead(*test["accuracies"])
        assert test["points"]["ci95"] == pytest.approx([low, high], abs=1e-6)
        assert f"by {mean:+.2f} ({low:+.2f} to {high:+.2f})" in measured
        assert f"p = {test['points']['p_value']:.2g}" in measured
    mean, low, high = ahead(*ten["accuracies"])
    doubled = 2 * ten["points"]["p_value"]  # the second look
    assert 0.05 < doubled < 0.1 and f"doubled {doubled:.2g} (" in measured
    assert f"{mean:.2f} points ({low:+.2f} to {high:+.2f}), p = {doubled:.2g}. So it helps" in told
    assert f"(ten pairs: {mean:.2f}, {low:+.2f} to {high:+.2f}; p = {doubled:.2g}, doubled" in readme


def test_what_wider_teachers_reached_is_told_as_measured():
    told = told_in("results/findings.md")
    with open(RESULTS / "recipes.csv", newline="") as file:
        rows = {row["what"]: row for row in csv.DictReader(file) if (row["role"], row["epochs"]) in (
            ("teacher", "35"), ("teacher", "18"))}  # fmt: skip
    usual, wide = rows["cutout=12"], rows["widths=88,312,536 cutout=12"]
    more = float(usual["pflop"]) / float(wide["pflop"]) - 1
    words = f"18 such epochs reached {wide['val_accuracy']}, 35 of the usual width, with {more:.0%} more compute, "
    assert f"{words}{usual['val_accuracy']} (planned in ff28f67;" in told
    macs = models.costs_of(models.Teacher(10, (88, 312, 536)), 32).macs / 1e6
    assert f"({macs:.0f} million multiply-adds)" in told and wide["network"].startswith(f"{macs:.1f}M MACs")


def test_what_the_two_commands_reached_is_told_as_measured():
    readme, told = told_to_users(), told_in("results/README.md")
    found, (long,), alone = record(COMMANDS), record(LONGEST)["kd"], record(LONGEST)["baseline"]
    (kd,), baseline, teacher = found["kd"], found["baseline"], found["teacher"]["accuracy"]
    assert (kd["temperature"], kd["alpha"], kd["seeds"], found["settings"]["epochs"]) == (4, 0.1, [0], 200)
    lengths = {path.parent.name: len(path.read_text().splitlines()) - 1 for path in COMMANDS.glob("*/history.csv")}
    assert lengths == {"teacher-s0": 200, "kd-T4-a0.1-s0": 200, "baseline-s0": 200}
    gain, test = 100 * (kd["mean"] - baseline["mean"]), kd["improvement"]
    assert teacher > 0.9313 and kd["mean"] > 0.9022 and baseline["mean"] > 0.8997 and gain > 0.25  # reported by others
    with open(COMMANDS / "teacher-s0" / "history.csv") as file:
        minutes = sum(float(row["seconds"]) for row in csv.DictReader(file)) / 60
    assert round(minutes) == 4 and "On an NVIDIA H200 the first command took four minutes" in readme
    assert readme.count("(earlier program: ") == 4
    corrected, broken = test["fixed"], test["broken"]
    assert corrected - broken == round(100 * gain)
    tail = sum(math.comb(corrected + broken, k) for k in range(broken + 1)) / 2 ** (corrected + broken)
    assert test["p_value"] == pytest.approx(2 * tail)  # the exact McNemar test: is it a fair coin?
    words = f"{gain:+.2f} points (McNemar: of 10,000 test images {corrected} corrected and {broken} broken, p = "
    assert f"{words}{2 * tail:.2g})" in told
    assert f"distilled {kd['mean']:.4f}, by their teacher ({teacher:.4f};" in told
    words = f"The same commands reach {teacher:.4f}, {kd['mean']:.4f} and {baseline['mean']:.4f} here, a gain of "
    assert f"{words}{gain:.2f} (exact McNemar test for these two networks: p = {2 * tail:.2g})" in readme
    words = ", without ".join(
        f"{', '.join(f'{each:.4f}' for each in group['accuracies'])} ({group['mean']:.4f} ± {group['std']:.4f})"
        for group in (long, alone)
    )
    lead, *interval = ahead(long["accuracies"], alone["accuracies"])
    ends = "({:+.2f} to {:+.2f})".format(*interval)
    assert f"{words}, {lead:+.2f} points {ends}, p = {long['improvement']['p_value']:.2g}" in told
    gains = "{:.2f}, {:.2f} and {:.2f}".format(*long["improvement"]["by_seed"])
    assert f"After 200 epochs three pairs gain {gains} points, which are too few to show it {ends}" in readme


def test_what_better_teachers_teach_is_told_as_measured():
    readme, told = told_to_users(), told_in("results/three-teachers/README.md")
    baseline, students = record()["baseline"], {"": entry(RECORD, 4, 0.9)["accuracies"]}
    for name, who in BETTER.items():
        found = record(RESULTS / name)
        (kd,) = found["kd"]
        students[name] = kd["accuracies"]
        assert found["baseline"]["accuracies"] == baseline["accuracies"] and kd["seeds"] == [0, 1, 2, 3, 4]
        assert found["settings"] | {"teacher": ""} == record()["settings"] | {"teacher": ""}
        listed = ", ".join(f"{accuracy:.4f}" for accuracy in kd["accuracies"])
        row = f"| distilled by {who} | {listed} | {kd['mean']:.4f} ± {kd['std']:.4f} |"
        gain = kd["improvement"]
        assert f"{row} {gain['mean']:+.2f} ({gain['ci95'][0]:+.2f} to {gain['ci95'][1]:+.2f}), p = " in told
        assert f"{found['teacher']['accuracy']:.4f}" in readme and f"{found['teacher']['accuracy']:.4f}" in told
    p_values = []
    for name, others in (("teacher-77-epochs", [""]), ("three-teachers", ["", "teacher-77-epochs"])):
        for other, test in zip(others, json.loads((RESULTS / name / "difference.json").read_text()), strict=True):
            assert test["accuracies"] == [students[name], students[other]]
            mean, low, high = ahead(students[name], students[other])
            assert test["points"]["ci95"] == pytest.approx([low, high])
            ends = f"{mean:.2f} points ({low:+.2f} to {high:+.2f}"
            assert f"{ends}), p = {test['points']['p_value']:.2g}" in told and ends in readme
            p_values.append(test["points"]["p_value"])
    (least, middle, most), each = sorted(p_values), "of the teacher of 24 epochs (p = {:.3f}, corrected for the three"
    assert p_values.index(least) == 1 and most < 2 * middle  # Holm's correction gives both twice the middle one
    assert each.format(3 * least) in readme and f"(p = {2 * middle:.3f} for both, corrected)" in readme


def test_what_the_teacher_of_200_epochs_teaches_is_told_as_measured():
    folder, kept = RESULTS / "teacher-200-epochs", entry(NEW, 4, 0.9)["accuracies"]
    found, (over_none, over_kept) = record(folder), json.loads((folder / "difference.json").read_text())
    (kd,), settings = found["kd"], found["settings"]
    assert kd["seeds"] == SEEDS[NEW][: len(kd["seeds"])] and settings["epochs"] == 24 and settings["recipe"] == 5
    assert found["teacher"]["accuracy"] == record(COMMANDS)["teacher"]["accuracy"]
    assert settings["teacher"] == record(COMMANDS)["settings"]["teacher"]
    alone = record(NEW)["baseline"]["accuracies"]
    told, measured = told_in("results/findings.md"), told_in("results/teacher-200-epochs/README.md")
    ends = []
    for test, others in ((over_none, alone), (over_kept, kept)):
        assert test["accuracies"] == [kd["accuracies"], others[: len(kd["seeds"])]]
        mean, low, high = ahead(*test["accuracies"])
        ends.append(f"points ({low:+.2f} to {high:+.2f})")
        assert f"{mean:+.2f} {ends[-1]}, p = {test['points']['p_value']:.2g}, over" in measured
    listed = ", ".join(f"{accuracy:.4f}" for accuracy in kd["accuracies"])
    assert f"{listed} ({kd['mean']:.4f} ± {kd['std']:.4f})" in measured
    gain, more = over_none["points"]["mean"], over_kept["points"]
    words = f"its students reach {kd['mean']:.4f} and gain {gain:.2f} {ends[0]}, {more['mean']:+.2f} {ends[1]}"
    assert words in told and f"(p = {more['p_holm']:.2g}, corrected for two;" in told
    assert "which is not shown to be a difference (p" in told and more["ci95"][0] < 0 < more["ci95"][1]
    assert len(kd["seeds"]) == 5
    four = ahead(*(each[:4] for each in over_kept["accuracies"]))
    assert "After four of these five pairs it was {:+.2f} ({:+.2f} to {:+.2f}), and".format(*four) in told
    gains = 100 * np.subtract(*(each[:4] for each in over_kept["accuracies"]))
    p = [scipy.stats.ttest_1samp(gains, 0).pvalue, more["p_value"]]
    assert "had p = {:.2f} after four pairs, {:.2f} after the planned five".format(*p) in told_in("README.md")


def test_what_images_without_labels_add_is_told_as_measured():
    folder, measured = RESULTS / "few-labels", told_in("results/few-labels/README.md")
    shorter, longer = (json.loads((folder / name).read_text()) for name in ("comparison.json", "longer.json"))
    first, plain = shorter["kd"]
    others = [plain, shorter["baseline"], longer["kd"][0], longer["baseline"]]
    tests = json.loads((folder / "difference.json").read_text())
    assert first["unlabeled"] and len(tests) == 4 and first["seeds"] == [0, 1, 2, 3, 4]
    assert [each["settings"]["epochs"] for each in (shorter, longer)] == [30, 60]
    for other, test in zip(others, tests, strict=True):
        assert test["points"]["ci95"] == pytest.approx(ahead(first["accuracies"], other["accuracies"])[1:])
    assert ", ".join(f"{accuracy:.4f}" for accuracy in first["accuracies"]) in measured
    teacher, student, baseline = shorter["teacher"]["accuracy"], first["mean"], shorter["baseline"]["mean"]
    readme = told_to_users()
    below = (
        "on average {:.1f} points below its teacher, which is ten times as large; without a teacher it is {:.1f} below,"
    )
    below += " and {:.1f} if trained for twice as many epochs"
    assert f"{teacher:.4f}" in measured
    assert below.format(*(100 * (teacher - each) for each in (student, baseline, longer["baseline"]["mean"]))) in readme
    gains = [value for each in (plain, first) for value in (each["improvement"]["mean"], *each["improvement"]["ci95"])]
    assert "gains {:+.2f} ({:+.2f} to {:+.2f}).".format(*gains[:3]) in measured
    told = "gains {:.2f} points ({:+.2f} to {:+.2f}; a comparison that was not planned). If the student also sees the "
    told += "other images, [without labels](../README.md#images-without-labels), it gains {:.2f} ({:+.2f} to {:+.2f})."
    assert told.format(*gains) in readme
    twice = tests[3]["points"]
    assert "it is {:.2f} ({:+.2f} to {:+.2f}).".format(twice["mean"], *twice["ci95"]) in readme
    gain, more = plain["improvement"]["mean"], first["improvement"]["mean"]
    short = told_in("README.md")
    for words, found in (
        ("With 5,000 training images, for the teacher too, the gain is {:.2f} points", (gain,)),
        ("leads its baseline by {:.2f} points, and one that is trained as long by {:.2f}.", (more, twice["mean"])),
        (
            "distillation gains {:.2f} points, and the student is on average {:.1f} points below its teacher; without",
            (more, 100 * (teacher - student)),
        ),
        ("these images it gains {:.2f}.", (gain,)),
    ):
        assert words.format(*found) in short


def test_what_the_papers_questions_showed_is_told_as_measured():
    told, readme = told_in("results/findings.md"), told_in("README.md")
    with open(RESULTS / "paper.csv", newline="") as file:
        rows = {(row["experiment"], row["what"]): row for row in csv.DictReader(file)}
    assert {(row["n"], row["teacher_sha256"]) for row in rows.values()} == {("3", record()["settings"]["teacher"][:12])}

    def numbers(experiment, what="test accuracy, over the baseline"):
        names = ("mean", "low", "high", "distilled", "other")
        return {name: float(rows[experiment, what][name]) for name in names}

    every, soft, few = (numbers(name) for name in ("all", "labels not looked at", "3% of the images"))
    birds = numbers("without bird", "accuracy on bird, bias corrected")
    words = "gain {:.2f} points over the baseline, with labels {:.2f}: three seeds"
    assert words.format(soft["mean"], every["mean"]) in told
    words = "the student reaches {distilled:.2f}, and {other:.2f} without a teacher; {mean:.2f} points "
    words += "({low:+.2f} to {high:+.2f})."
    assert words.format(**few) in told
    shares = [f"{100 * birds[name]:.0f}%" for name in ("distilled", "other")]
    assert "student finds {} of the birds. The baseline under the same correction finds {},".format(*shares) in told
    for name, experiment in (("DKD", "DKD"), ("Logit standardisation", "logit standardisation at T = 4")):
        found = numbers(experiment, "test accuracy, over plain distillation")
        side = "below" if found["mean"] < 0 else "above"
        words = f"{name} is {abs(found['mean']):.2f} points {side} plain distillation "
        assert words + "({low:+.2f} to {high:+.2f}).".format(**found) in told
    words = (
        "With 3% of the images (1,500) the gain is {:.1f} points, which is shown. Not shown by three seeds, corrected "
    )
    words += "for the whole table: soft targets alone gain {:.2f} points, with labels {:.2f};"
    assert words.format(few["mean"], soft["mean"], every["mean"]) in readme
    words = "that never saw a bird finds {} of them once its bias is corrected, without a teacher {}."
    assert words.format(*shares) in readme and told.count("| **+") == 1


def test_what_is_measured_on_some_classes_takes_no_place_of_what_is_measured_on_all(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables
    import unlabeled

    with pytest.raises(ValueError, match="is not of all classes"):
        tables.few_labels(RESULTS / "animals")
    for words in ([], ["--output-dir", "elsewhere"], ["--results", "elsewhere"]):
        monkeypatch.setattr(sys, "argv", ["unlabeled.py", "--classes", "bird", "cat", *words])
        with pytest.raises(SystemExit):
            unlabeled.main()
        assert "with --classes, name another --output-dir and --results" in capsys.readouterr().err


def test_what_images_of_other_classes_add_is_told_as_measured():
    folder, measured = RESULTS / "animals", told_in("results/animals/README.md")
    same, other, longer = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("comparison", "other", "longer")
    )
    animals, plain = same["kd"]
    vehicles, again = other["kd"]
    assert (
        plain["accuracies"] == again["accuracies"] and other["baseline"]["accuracies"] == same["baseline"]["accuracies"]
    )
    assert {each["settings"]["teacher"] for each in (same, other, longer)} == {same["settings"]["teacher"]}
    assert animals["unlabeled"] != vehicles["unlabeled"] and [len(each["classes"]) for each in (same, other)] == [6, 6]
    for entry in (animals, vehicles):
        assert entry["seeds"] == [0, 1, 2, 3, 4]
        assert ", ".join(f"{accuracy:.4f}" for accuracy in entry["accuracies"]) in measured
    tests = json.loads((folder / "other_difference.json").read_text())
    for one, found in ((animals, tests[0]), (plain, tests[1]), (longer["kd"][0], tests[3])):
        told = "{:+.2f} points ({:+.2f} to {:+.2f}), p = ".format(*ahead(vehicles["accuracies"], one["accuracies"]))
        assert told + f"{found['points']['p_value']:.2g}" in measured
    readme = told_to_users()
    means = [100 * each["mean"] for each in (animals, vehicles, plain, longer["kd"][0])]
    words = (
        "add {:.2f} points to plain distillation of as many epochs, images of vehicles {:.2f}; students that saw the "
    )
    words += "animals are {:.2f} points ahead of those that saw vehicles ({:+.2f} to {:+.2f})."
    lead = ahead(animals["accuracies"], vehicles["accuracies"])
    short = f"six classes, images of these added {means[0] - means[2]:.2f} points, images of other classes "
    assert f"{short}{means[1] - means[2]:.2f};" in told_in("README.md")
    assert words.format(means[0] - means[2], means[1] - means[2], *lead) in readme
    words = (
        "is {:.2f} points ahead of students that saw vehicles ({:+.2f} to {:+.2f}), and {:.2f} behind those that saw "
    )
    saved = ahead(longer["kd"][0]["accuracies"], vehicles["accuracies"])
    assert words.format(*saved, means[0] - means[3]) in readme
    tests += json.loads((folder / "difference.json").read_text())
    p_values = [test["points"]["p_value"] for test in tests]
    shown = [p < 0.05 for p in holm(p_values)]
    over_longer = p_values[7]  # of students that saw animals over plain distillation of 60 epochs
    assert shown == [True] * 3 + [False] + [True] * 3 + [False, True] and tests[7]["seeds"] == [0, 1, 2, 3, 4]
    words = f"(p = {over_longer:.3f}, corrected for all nine comparisons of this experiment {holm(p_values)[7]:.3f})"
    assert words in readme and tests[7]["accuracies"] == [animals["accuracies"], longer["kd"][0]["accuracies"]]


def test_the_hours_that_the_readme_names_are_those_of_the_measured_speeds():
    found = json.loads((RESULTS / "throughput-cpu.json").read_text())
    median = {name: statistics.median(each["ours"]) for name, each in found["seconds"].items()}
    hours = {name: 200 * 50_000 / found["images"] * seconds / 3600 for name, seconds in median.items()}
    first, second = hours["teacher epoch"], hours["KD epoch, first"] + hours["baseline epoch"]
    readme = told_to_users()
    assert f"about {first:.0f} hours for the first command and {second:.0f} for the second" in readme
    assert max(first, second) * 24 / 200 < 1  # "with --epochs 24 less than one for each"
    look = 5 * (median["KD epoch, first"] + median["baseline epoch"]) * 50_000 / found["images"] / 60
    assert 4.5 < look < 5.5 and "For a first look, in about five minutes, with the teacher" in readme
    assert "```sh python main.py --epochs 5 --alpha 0.9 --teacher results/cifar10/teacher-s0 " in readme
    targets = 10 * (median["KD epoch, first"] - median["baseline epoch"]) / median["baseline epoch"]
    assert 8 < targets < 12 and "about as long as training it for the same number of epochs" in readme
    scaling = json.loads((RESULTS / "scaling-cpu.json").read_text())
    rates = scaling["images_per_second"]
    ratio = rates["2 processes, 1 thread each"]["student"] / rates["1 process, 2 threads"]["student"]
    assert scaling["students_ratio"] == pytest.approx(ratio)
    assert f"two processes of one thread train {ratio:.2f} times as many images a second as one of two" in readme


def test_the_names_of_the_points_of_compute_lie_beside_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compute

    figure = compute.draw(compute.all_points())
    figure.draw_without_rendering()
    (axes,) = figure.axes
    names = [text.get_window_extent().padded(-1.5) for text in axes.texts]
    assert len(names) == len(compute.all_points())
    for number, name in enumerate(names):
        assert axes.bbox.x0 < name.x0 and name.x1 < axes.bbox.x1, axes.texts[number]
        assert not [other for other in names[:number] if name.overlaps(other)], axes.texts[number]
        x, y = axes.transData.transform(axes.texts[number].xy)
        assert not [other for other in names if other.contains(x, y)], axes.texts[number]


def test_logits_are_averaged_over_an_image_its_mirror_image_and_moved_ones(finished, images, tmp_path, monkeypatch):
    """By hand: six ways to look at an image, each built pixel by pixel."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import augmented

    path, output = finished / "teacher-s0" / "model.pt", tmp_path / "found.json"
    words = [
        finished / "teacher-s0",
        "--dataset",
        "folder",
        "--data-dir",
        images,
        "--device",
        "cpu",
        "--output",
        output,
    ]
    monkeypatch.setattr(sys, "argv", ["augmented.py", *map(str, words)])
    augmented.main()
    network = models.load(path)
    loaded = data.load("folder", data_dir=images, image_size=16)
    pixels, (size,) = loaded.test_images.numpy(), {*loaded.test_images.shape[1:3]}
    reflected = [1, *range(size), size - 2]  # of -1 to `size`

    def logits(down, right, mirror):
        rows, columns = ([reflected[at + 1 - by] for at in range(size)] for by in (down, right))
        view = pixels[:, rows][:, :, columns[::-1] if mirror else columns]
        with torch.inference_mode():
            return network(network.normalize(torch.from_numpy(view))).numpy()

    plain, both = logits(0, 0, False), (logits(0, 0, False) + logits(0, 0, True)) / 2
    corners = sum(logits(by, by, mirror) for by in (-1, 1) for mirror in (False, True)) / 4
    expected = {"plain": plain, "mirrored": both, "mirrored and moved": (both + corners) / 2}
    for name, found in augmented.ways(network, loaded.test_images).items():
        assert np.allclose(found.numpy(), expected[name], atol=1e-4)
    (kept,) = json.loads(output.read_text()).values()
    right = {name: np.mean(way.argmax(1) == loaded.test_labels.numpy()) for name, way in expected.items()}
    assert kept["accuracies"] == pytest.approx(right) and kept["settings"] == network.settings
    assert kept["accuracies"]["plain"] == network.accuracy


def test_what_averaging_over_views_adds_is_told_as_measured():
    told, found = told_in("results/findings.md"), json.loads((RESULTS / "augmented.json").read_text())
    accuracies = {role: {} for role in ("teacher", "kd", "baseline")}
    for each in found.values():
        settings = each["settings"]
        accuracies[settings["role"]][settings["epochs"], settings["seed"]] = each["accuracies"]
    ways = "plain", "mirrored", "mirrored and moved"

    def of(role):
        return ([accuracies[role][24, seed][way] for seed in SEEDS[NEW]] for way in ways)

    kd, alone = ([*of(role)] for role in ("kd", "baseline"))
    assert (kd[0], alone[0]) == (entry(NEW, 4, 0.9)["accuracies"], record(NEW)["baseline"]["accuracies"])
    plain = ahead(kd[0], alone[0])[0]
    lost = [np.subtract(kd[0], kd[1]), np.subtract(alone[0], alone[1])]
    for words, pair in (
        ("by {:.2f} points with distillation ({:+.2f} to {:+.2f})", (kd[1], kd[0])),
        ("by {:.2f} without ({:+.2f} to {:+.2f})", (alone[1], alone[0])),
        ("Distillation then gains {:.2f} points ({:+.2f} to {:+.2f}), " + f"not {plain:.2f}", (kd[1], alone[1])),
        ("and {:.2f} ({:+.2f} to {:+.2f}) where the images are moved by a pixel", (kd[2], alone[2])),
        ("(by {:.2f} points, {:+.2f} to {:+.2f})", lost),
        ("{:+.2f} points, {:+.2f} to {:+.2f})", (alone[1], kd[0])),
    ):
        assert words.format(*ahead(*pair)) in told
    assert f"({np.mean(alone[1]):.4f} and {np.mean(kd[0]):.4f};" in told
    words = "reaches {:.4f}, without distillation {:.4f}: a gain of {:.2f} points ({:+.2f} to {:+.2f};"
    assert words.format(np.mean(kd[1]), np.mean(alone[1]), *ahead(kd[1], alone[1])) in told_in("README.md")
    kept, long = accuracies["teacher"][24, 0], accuracies["teacher"][200, 0]
    assert f"the teacher of 24 epochs by {100 * (kept['mirrored'] - kept['plain']):.2f}." in told
    assert (kept["plain"], long["plain"]) == (record()["teacher"]["accuracy"], record(COMMANDS)["teacher"]["accuracy"])
    with open(RESULTS / "other_trainings.csv", newline="") as file:
        rows = {row["what"]: row for row in csv.DictReader(file) if row["augmented"] == "yes"}
    for name, each in (("24 epochs", kept), ("35 epochs, squares blanked", accuracies["teacher"][35, 0]),
                       ("200 epochs", long)):  # fmt: skip
        assert rows[f"teacher, {name}"]["accuracy"] == f"{each[ways[2]]:.4f}"
    for what, words in (
        ("teacher, 24 epochs", "the teacher of 24 epochs ({} PFLOP) has {}, one of 35"),
        ("teacher, 35 epochs, squares blanked", "of 35 epochs with squares blanked ({} PFLOP) {}, airbench95"),
        ("airbench95", "airbench95 ({} PFLOP) {};"),
        ("teacher, 200 epochs", "the teacher of 200 epochs ({} PFLOP) has {}, airbench96_faster"),
        ("airbench96_faster", "airbench96_faster ({} PFLOP) {}."),
    ):
        assert words.format(rows[what]["pflop"], rows[what]["accuracy"]) in told


def test_the_teachers_are_told_as_measured():
    with open(RESULTS / "other_trainings.csv", newline="") as file:
        plain = {row["what"]: row["accuracy"] for row in csv.DictReader(file) if row["augmented"] == "no"}
    averaged = json.loads((RESULTS / "augmented.json").read_text()).values()
    (squares,) = (each for each in averaged if each["settings"]["epochs"] == 35)
    assert (squares["settings"]["cutout"], squares["settings"]["recipe"]) == (12, 5)
    assert f"{squares['accuracies']['plain']:.4f}" == plain["teacher, 35 epochs, squares blanked"]
    words = "with squares reached {} after 35 epochs (planned in a581637), {} after 77 and {} after 200"
    names = "teacher, 35 epochs, squares blanked", "teacher, 77 epochs", "teacher, 200 epochs"
    assert words.format(*(plain[name] for name in names)) in told_in("results/findings.md")
    assert f"with `--cutout 12` on an AMD EPYC {plain[names[0]]})" in told_in("results/three-teachers/README.md")
    together = record(RESULTS / "three-teachers")["teacher"]
    others = [float(plain[name]) for name in ("teacher, 35 epochs", "teacher, 77 epochs")]
    assert together["members"] == [record()["teacher"]["accuracy"], *others]
    for folder, name in (("teacher-77-epochs", names[1]), ("teacher-200-epochs", names[2])):
        assert f"{record(RESULTS / folder)['teacher']['accuracy']:.4f}" == plain[name]
    total = sum(6e-15 * 50_000 * epochs * models.costs("teacher", 10, 32).macs for epochs in (24, 35, 77))
    assert f"| 24, 35 and 77, together | | | {total:.2f} | {together['accuracy']:.4f} |" in told_in("README.md")


def test_what_a_teacher_with_smoothed_labels_is_worth_is_told_as_measured():
    readme, measured = told_to_users(), told_in("results/smoothed-teacher/README.md")
    test, over_baseline = json.loads((RESULTS / "smoothed-teacher" / "difference.json").read_text())
    (smoothed, plain), (same, without) = test["accuracies"], over_baseline["accuracies"]
    assert same == smoothed and over_baseline["seeds"] == test["seeds"]
    assert test["differ_in"] == ["teacher"] and test["seeds"] == [0, 1, 2, 3, 4]
    mean, low, high = ahead(smoothed, plain)
    assert test["points"]["ci95"] == pytest.approx([low, high]) and high < 0
    for group in (smoothed, plain, without):
        assert f"| {', '.join(f'{each:.4f}' for each in group)} | {np.mean(group):.4f} |" in measured
    assert f"{mean:+.2f} points ({low:+.2f} to {high:+.2f}), p = {test['points']['p_value']:.2g}" in measured
    told = f"{-mean:.2f} points behind those of the other ({-high:.2f} to {-low:.2f}; 10 epochs, T = 32"
    ends = "{:+.2f} to {:+.2f}".format(*over_baseline["points"]["ci95"])
    told_too = (
        f"their mean, {np.mean(smoothed):.4f}, is that of students without a teacher, {np.mean(without):.4f} ({ends}"
    )
    assert told in readme and told_too in readme and abs(np.mean(smoothed) - np.mean(without)) < 0.0002
    with open(RESULTS / "other_trainings.csv", newline="") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    teachers = [rows[f"teacher, 35 epochs{labels}"]["accuracy"] for labels in (", labels smoothed", "")]
    assert "that with labels smoothed by 0.2 reached {}, the other {}, but".format(*teachers) in readme
    wide, more = rows["teacher, width 1.4, 12 epochs"], 0.971 / 0.911 - 1
    assert f"reached {wide['accuracy']}, the teacher of 24 epochs, with {more:.0%} more compute, 0.9410." in readme
    macs = models.costs_of(models.Teacher(10, width=1.4), 32).macs
    assert f"({macs / 1e6:.0f} million multiply-adds)" in readme
    assert wide["pflop"] == f"{macs * 6 * 50_000 * 12 / 1e15:.3f}"


def test_what_narrow_students_lost_by_recipe_4_is_told_as_it_was_found():
    found = json.loads((RESULTS / "widths" / "recipe_4.json").read_text())
    assert [found["settings"][name] for name in ("width", "epochs", "recipe")] == [0.25, 10, 4]
    assert found["settings"]["teacher"] == record()["settings"]["teacher"]
    (kd,) = found["kd"]
    assert (kd["temperature"], kd["alpha"], kd["seeds"]) == (32, 0.9, [0, 1, 2, 3, 4])
    mean, low, high = ahead(kd["accuracies"], found["baseline"]["accuracies"])
    ends, p = f"{low:+.2f} to {high:+.2f}", f"p = {kd['improvement']['p_value']:.2f}"
    assert f"lost {-mean:.2f} points with T = 32 ({ends}, {p}), and with T = 4" in told_in("results/findings.md")
    told = told_in("results/recipes.md")
    assert f"lost {-mean:.2f} points by distillation with T = 32 ({ends}, {p};" in told
    assert found["student"]["parameters"] // 1000 == 26


def test_what_students_of_half_the_width_gain_is_told_as_measured():
    half, quarter = (json.loads((RESULTS / "widths" / f"width-{width}.json").read_text()) for width in (0.5, 0.25))
    told, without = told_in("results/widths/README.md"), half["baseline"]
    assert half["settings"]["width"] == 0.5 and half["student"]["parameters"] // 1000 == 99
    assert half["environment"]["device"].startswith("AMD EPYC") and half["settings"]["recipe"] == 5
    assert half["settings"] | {"width": 0.25} == quarter["settings"] and half["kd"][0]["temperature"] == 4
    corrected = holm([kd["improvement"]["p_value"] for found in (half, quarter) for kd in found["kd"]])
    for each in (*half["kd"], without):
        assert each["seeds"] == [0, 1, 2, 3, 4]
        listed = f"{', '.join(f'{a:.4f}' for a in each['accuracies'])} | {each['mean']:.4f} ± {each['std']:.4f} |"
        if each is not without:
            lead = ahead(each["accuracies"], without["accuracies"])
            listed += " {:+.2f} ({:+.2f} to {:+.2f}), p = {:.2g} |".format(*lead, each["improvement"]["p_value"])
        assert listed in told
    words = "both gains of half of the channels have p = {:.2g}, those of a quarter {:.2g}."
    assert words.format(corrected[0], corrected[2]) in told
    assert corrected[0] == corrected[1] and f"{corrected[2]:.2f}" == f"{corrected[3]:.2f}"
    four, soft = (ahead(kd["accuracies"], without["accuracies"]) for kd in half["kd"])
    words = (
        "gains {:.2f} points with T = 4 ({:+.2f} to {:+.2f}) and {:.2f} with T = 32 ({:+.2f} to {:+.2f}; p = {:.2g} for"
    )
    assert words.format(*four, *soft, corrected[0]) in told_in("results/findings.md")
    words = "a student of half the width gains {:.2f} points (T = 4; {:+.2f} to {:+.2f})."
    assert words.format(*four) in told_in("README.md")


def test_what_clipping_the_biases_gradients_does_is_told_as_measured():
    chosen = (RESULTS / "recipes.md").read_text()
    trials = {}
    with open(RESULTS / "recipes.csv", newline="") as file:
        for row in csv.DictReader(file):
            what, *teacher = row["what"].split(", teacher")
            if row["epochs"] != "6" or (row["role"] == "kd" and not teacher[0].startswith(" of 48 epochs")):
                continue
            words = what.split()
            seeds = [int(word.removeprefix("seed=")) for word in words if word.startswith("seed=")]
            key = row["role"], *sorted(word for word in words if not word.startswith("seed="))
            if seeds or key != ("baseline", "as", "is", "it"):  # which is of the record's machine
                trials.setdefault(key, {})[seeds[0] if seeds else 0] = row["val_accuracy"]

    def cell(*key):
        found = trials.get((key[0], *sorted(key[1:])), {})
        return ", ".join(found.get(seed, "-") for seed in range(max(found, default=-1) + 1))

    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in chosen.splitlines() if line.startswith("| ")]
    four, softest, quarter = ("kd", "temperature=4"), ("kd", "temperature=32"), "widths=8,8,24,24,32,32"
    students = {
        "T = 4": four, "T = 32": softest, "T = 8": ("kd", "temperature=8"), "T = 2": ("kd", "temperature=2"),
        "without a teacher": ("baseline",), "half of the channels, T = 32": (*softest, "widths=16,16,48,48,64,64"),
        "a quarter, T = 32": (*softest, quarter), "a quarter, T = 4": (*four, quarter),
        "a quarter, without a teacher": ("baseline", quarter),
    }  # fmt: skip
    rates = {"T = 4": "bias=6", "T = 32": "bias=8", "half of the channels, T = 32": "bias=15"}
    for name, key in students.items():
        norms = [cell(*key, *norm) for norm in ((), *((f"clip={norm}",) for norm in (0.15, 0.1, 0.06, 0.03)))]
        rate = rates.get(name, "bias=7.5")
        other = f"rate {rate[5:]}: {rated}" if (rated := cell(*key, rate)) else ""
        if name == "T = 4":
            other += f"; 0.1 and the head's rate times 0.3: {cell(*key, 'clip=0.1', 'head=0.3')}"
        untried = "diverged" if name == "a quarter, T = 4" else ""
        assert [name, norms[0] or untried, *norms[1:], other] in lines
    readme, told, chosen = told_to_users(), told_in("results/README.md"), told_in("results/recipes.md")
    assert f"recipe 5, T = 4) are no better: {cell(*four, 'mirrored=yes')};" in chosen
    assert f"(Lookahead, `lookahead=yes`): {cell(*four, 'lookahead=yes')}." in chosen

    (baselines,) = json.loads((SHORTER / "baselines.json").read_text())
    same, before = baselines["accuracies"]
    assert baselines["differ_in"] == ["recipe"] and same == record(SHORTER)["baseline"]["accuracies"]
    by_4 = json.loads((SHORTER / "recipe_4.json").read_text())
    assert by_4["settings"] | {"recipe": 5} == record(SHORTER)["settings"]
    then, then_softer = (
        kd["accuracies"] for t in (4, 32) for kd in by_4["kd"] if (kd["temperature"], kd["alpha"]) == (t, 0.9)
    )
    now = entry(SHORTER, 4, 0.9)["accuracies"]
    softer = entry(SHORTER, 32, 0.9)["accuracies"]
    gained = ahead(entry(RECORD, 4, 0.9)["accuracies"], record()["baseline"]["accuracies"])
    for words, found in (
        ("That raised T = 4 by {:.2f} points ({:+.2f} to {:+.2f}; 10 epochs, not planned, and", ahead(now, then)),
        (
            "for T = 32 ({:+.2f} points, {:+.2f} to {:+.2f}, likewise)",
            ahead(softer, then_softer),
        ),
        ("and without a teacher ({:+.2f} points, {:+.2f} to {:+.2f}, on one machine)", ahead(same, before)),
        ("({:+.2f} to {:+.2f}), {:.2f} after 10 ({:+.2f} to {:+.2f}) and ", (*gained[1:], *ahead(now, same))),
        ("T = 4 is {:.2f} points ahead of T = 32 ({:+.2f} to {:+.2f}).", ahead(now, softer)),
    ):
        assert words.format(*found) in readme
    (test,) = json.loads((SHORTER / "temperature_4.json").read_text())
    assert test["accuracies"] == [now, softer] and test["differ_in"] == ["temperature"]
    assert "ahead of T = 32 by {:+.2f} points ({:+.2f} to {:+.2f}), p = ".format(*ahead(now, softer)) in told
    words = "ahead of recipe 4 by {:+.2f} points without a teacher ({:+.2f} to {:+.2f};"
    assert words.format(*ahead(same, before)) in told
    assert "by {:+.2f} with T = 4 ({:+.2f} to {:+.2f}; not planned,".format(*ahead(now, then)) in told
    for folder in (RECORD, SHORTER):
        found = record(folder)
        for each in (*found["kd"], found["baseline"]):
            student = f"distilled, T = {each['temperature']:g}, alpha = 0.9" if "alpha" in each else "without"
            listed = ", ".join(f"{accuracy:.4f}" for accuracy in each["accuracies"])
            row = f"| {found['settings']['epochs']} | {student} | {listed} | {each['mean']:.4f} ± {each['std']:.4f} |"
            if "alpha" in each:
                lead = ahead(each["accuracies"], found["baseline"]["accuracies"])
                row += " {:+.2f} ({:+.2f} to {:+.2f}), p = {:.2g} |".format(*lead, each["improvement"]["p_value"])
            assert row in told
    words = "With T = 4, the default, it gains {:.2f} points after 24 epochs ({:+.2f} to {:+.2f}), "
    assert words.format(*gained) in readme

    told += told_in("results/widths/README.md")
    narrow, wide = (
        json.loads((RESULTS / "widths" / f"{name}.json").read_text()) for name in ("width-0.25", "recipe_4")
    )
    (four, softer), without, before = narrow["kd"], narrow["baseline"], (wide["kd"][0], wide["baseline"])
    assert narrow["settings"]["width"] == 0.25 and (four["temperature"], softer["temperature"]) == (4, 32)
    assert narrow["environment"]["device"] == wide["environment"]["device"]
    for each in (four, softer, without):
        assert each["seeds"] == [0, 1, 2, 3, 4]
        listed = f"{', '.join(f'{a:.4f}' for a in each['accuracies'])} | {each['mean']:.4f} ± {each['std']:.4f} |"
        if each is not without:
            mean, *interval = ahead(each["accuracies"], without["accuracies"])
            ends, p = "{:+.2f} to {:+.2f}".format(*interval), each["improvement"]["p_value"]
            listed += f" {mean:+.2f} ({ends}), p = {p:.2g} |"
            leads = "is {:.2f} points ahead" if each is four else "and {:.2f}"
            assert f"{leads.format(mean)} with T = {each['temperature']:g} ({ends}, p = {p:.2f})" in readme
        assert listed in told
    words = "five seeds do not show a gain ({:.2f} points, {:+.2f} to {:+.2f};"
    assert words.format(*ahead(four["accuracies"], without["accuracies"])) in told_in("README.md")
    for now, then, words in (
        (softer, before[0], "{:.2f} points better with T = 32 ({:+.2f} to {:+.2f}; not planned)"),
        (without, before[1], "and {:.2f} without a teacher ({:+.2f} to {:+.2f})"),
    ):
        assert words.format(*ahead(now["accuracies"], then["accuracies"])) in readme


def test_what_recorded_steps_save_on_a_gpu_is_told_as_measured():
    readme = told_to_users()
    found = json.loads((RESULTS / "graphs-cuda.json").read_text())
    steps = [found["steps"][name] for name in ("teacher", "kd", "baseline")]
    words = "{:.1f} ms for the teacher, {:.1f} for the distilled student and {:.1f} for its baseline, "
    words = words.format(*(each["recorded_ms"] for each in steps))
    words += "{:.1f}, {:.1f} and {:.1f} times as fast".format(*(e["one_by_one_ms"] / e["recorded_ms"] for e in steps))
    assert words in readme and not any(each["different"] for each in steps)
    assert found["environment"]["device"] == "NVIDIA H200" and found["batch_size"] == 128


def test_compute_is_counted_as_the_record_says():
    import compute

    taught, points = compute.teacher(), compute.all_points()
    assert (taught.what, points.count(taught)) == ("teacher, 24 epochs", 1) and taught.accuracy == 0.941
    assert taught.pflop == pytest.approx(134_838_816 * 6 * 50_000 * 24 / 1e15)
    for folder in (LONGER, RECORD, SHORTER):  # of each length those with the lowest seeds
        epochs = record(folder)["settings"]["epochs"]
        kd, alone = (point for point in points if point.half and f", {epochs} epochs" in point.what)
        assert kd.what == f"student with KD, T=4, alpha=0.9, {epochs} epochs"
        assert kd.pflop == alone.pflop == pytest.approx(26_025_248 * 6 * 50_000 * epochs / 1e15)
        accuracies = entry(folder, 4, 0.9)["accuracies"]
        assert kd.n == alone.n == len(accuracies)
        assert kd.accuracy == np.mean(accuracies) and alone.accuracy == record(folder)["baseline"]["mean"]
        assert kd.half == pytest.approx(half(accuracies))


def test_the_kept_student_was_taught_by_the_kept_teacher():
    comparison = record()
    teacher = models.load(RECORD / "teacher-s0" / "model.pt")
    student = models.load(RECORD / "kd-T4-a0.9-s0" / "model.pt")
    assert teacher.accuracy == comparison["teacher"]["accuracy"]
    assert student.settings["teacher"] == models.digest(teacher.state_dict())
    assert teacher.settings["data"] == student.settings["data"]


def test_the_kept_networks_answer_as_they_always_did():
    """Two images of noise; on a scale of their own, logits would be other soft targets, whatever the accuracy."""
    noise = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for name, row in (
        ("teacher-s0", [-1.2443, 2.3314, -1.9798, -0.7523, -3.4456, 2.4074, -1.4248, 0.7298, 3.3196, 0.0144]),
        ("kd-T4-a0.9-s0", [-0.5620, -0.5971, 3.3755, -0.1642, 0.0728, -1.0252, 1.2848, -0.5696, -1.6800, -0.1596]),
    ):
        network = models.load(RECORD / name / "model.pt")
        with torch.inference_mode():
            np.testing.assert_allclose(network(network.normalize(noise))[0], row, atol=2e-3)


@pytest.mark.parametrize("name", ["throughput", "scaling", "graphs", "soak"])
def test_benchmarks_that_take_long_can_be_called(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main()
    assert end.value.code == 0 and f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_each_change_of_the_recipe_is_trained_and_recorded(images, tmp_path, monkeypatch, capsys):
    import recipes

    small, table, output = data.load("folder", data_dir=images, image_size=16), tmp_path / "rows.csv", tmp_path / "out"
    monkeypatch.setattr(data, "load", lambda *_, **__: small)
    words = ["--device", "cpu", "--output-dir", str(output), "--table", str(table)]

    def run(role, *changes):
        monkeypatch.setattr(sys, "argv", ["recipes.py", role, "1", *changes, *words])
        recipes.main()

    def weights(role, *changes):
        run(role, *changes)
        folder = output / f"{role} 1 {' '.join(changes) or 'as it is'}".replace("/", "_")
        return models.digest(models.load(folder / "model.pt").state_dict())

    given = ("seed=1", "batch=16", "rate=0.1", "conv=0.1", "bias=3", "head=3", "padding=3", "smoothing=0.2",
             "decay=0.1", "batchnorm=0.4", "init=he", "whitening=0", "cutout=6", "clip=0.01")  # fmt: skip
    mixed = [("mixed=0.5",), ("mixed=0.5", "cut=yes")]
    found = [weights("baseline", *changes) for changes in ((), *((change,) for change in given), *mixed)]
    assert len(set(found)) == len(found)
    assert weights("baseline", "padding=1", "conv=0.3", "batch=128") == found[0]  # the recipe as it is
    assert weights("baseline", "whitening=1") == weights("baseline", "clip=0.1") == found[0]  # of one epoch; as it is
    assert weights("baseline", "batch=14", "lookahead=yes") != weights("baseline", "batch=14")  # of three steps
    norms, step = [], train.Muon.step

    def noted(optimizer):
        gradients = [p.grad.double().numpy() for p in optimizer.param_groups[2]["params"]]
        norms.append(np.sqrt(sum((gradient**2).sum() for gradient in gradients)))
        step(optimizer)

    monkeypatch.setattr(train.Muon, "step", noted)
    for norm, share in (("0.001", 100), ("1e9", 0)):
        capsys.readouterr(), norms.clear()
        run("baseline", "batch=14", f"clip={norm}")  # of 42 images
        said = f"median {np.median(norms):.3f}, largest {max(norms):.3f}; clipped in {share}% of 3 steps\n"
        assert f"Norm of the biases' gradients: {said}" in capsys.readouterr().out
    monkeypatch.setattr(train.Muon, "step", step)
    teacher = output / "teacher 1 as it is"
    weights("teacher")
    pairs = ((), ("temperature=1",), ("alpha=0.1",), ("mirrored=yes",), ("alpha=1",), ("alpha=1", "mixed=0.5"),
             ("cutout=6",))  # fmt: skip
    distilled = [weights("kd", f"teacher={teacher}", *more) for more in pairs]
    assert len({*distilled, found[0]}) == 8
    run("teacher", "widths=32,48,64")
    run("teacher", "widths=32,48,64")  # again: no second row
    for wrong, said in (
        ("padding=1.5", "padding=1.5 needs a whole number"), ("bias=x", "bias=x needs a number"),
        ("seed", "seed= needs a whole number"), ("init", "init= needs a value"), ("widths=3,b", "needs a whole number"),
        ("alpha=0.5", "cannot be changed"), ("padding=16", "less than"), ("seed=1 seed=2", "twice"), ("x", "cannot"),
        ("cutout=17", "at most"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            run("baseline", *wrong.split())
        assert said in capsys.readouterr().err
    for wrong, said in (
        (("mixed=0.5",), "mixed needs alpha=1"), (("alpha=1", "smoothing=0.1"), "smoothing would change nothing"),
        (("cut=yes",), "it needs mixed"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            run("kd", f"teacher={teacher}", *wrong)
        assert said in capsys.readouterr().err
    with pytest.raises(Failure, match="init=x: it can be dirac or he"):
        run("baseline", "init=x")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["what"] for row in rows[:2]] == ["as it is", "seed=1"] and len(rows) == 33
    assert len({row["network"] for row in rows}) == 3
    assert rows[0]["pflop"] == f"{models.costs('student', 3, 16).macs * 6 * 42 / 1e15:.4f}"


def test_slow_weights_by_hand():
    """Over 12 steps: after the 5th and 10th the weights are the slow ones, moved; after the 12th, not moved."""
    import recipes

    layer, random = torch.nn.Linear(3, 2, bias=False), np.random.default_rng(0)
    optimizer = recipes.Lookahead(layer, 0.2, 0.0)
    share, momentum = train.HEAD
    weights = layer.weight.detach().double().numpy().copy()
    slow, velocity = weights.copy(), 0
    for step in range(12):
        optimizer.param_groups[1]["lr"] = optimizer.param_groups[0]["lr"] = rate = 0.2 * (12 - step) / 12
        gradient = random.normal(size=(2, 3))
        layer.weight.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        velocity = momentum * velocity + gradient
        weights = weights - share * rate * (gradient + momentum * velocity)
        if step in (4, 9, 11):
            kept = 0.95**5 * (step / 12) ** 3 if step < 11 else 1
            weights = slow = kept * slow + (1 - kept) * weights
        np.testing.assert_allclose(layer.weight.detach().numpy(), weights, atol=1e-5)


def test_what_a_teacher_gives_away_is_counted_by_image(images, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import leak

    loaded = data.load("folder", data_dir=images, image_size=16)
    rows, answers = data.split(loaded.train_labels, 0.1)[1].tolist(), {}
    monkeypatch.setattr(data, "load", lambda *_, **__: loaded)
    students = []
    for number in range(4):
        network = models.create("student", 3, seed=number)
        about = {"classes": loaded.classes, "image_size": 16, "mean": loaded.mean, "std": loaded.std}
        students.append(tmp_path / f"{number}.pt")
        settings = {"val_fraction": 0.1, "seed": number % 2, "teacher": f"teacher {number // 2}"}
        models.save(students[-1], network, "student", **about, settings=settings, accuracy=0.5)
        with torch.no_grad():
            answers[number] = [
                network.eval()(models.normalize(each, loaded.mean, loaded.std)).argmax(1).tolist()
                for each in (loaded.train_images[rows], loaded.test_images)
            ]
    words = ["--seen", *map(str, students[:2]), "--unseen", *map(str, students[2:]), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["leak.py", *words, "--output", str(tmp_path / "leak.json")])
    leak.main()
    found = json.loads((tmp_path / "leak.json").read_text())
    for number, (name, labels) in enumerate((("validation", loaded.train_labels[rows]), ("test", loaded.test_labels))):
        right = [[a == b for a, b in zip(answers[k][number], labels.tolist(), strict=True)] for k in range(4)]
        gains = [100 * (a + b - c - d) / 2 for a, b, c, d in zip(*right, strict=True)]
        assert found[name]["seen"] == pytest.approx([sum(each) / len(labels) for each in right[:2]])
        assert found[name]["points"] == pytest.approx(sum(gains) / len(gains))
        assert found[name]["standard_error"] == pytest.approx(statistics.stdev(gains) / len(gains) ** 0.5)
    assert "validation: " in capsys.readouterr().out
    given_away = found["validation"]["points"] - found["test"]["points"]
    assert found["given_away"]["points"] == pytest.approx(given_away)
    assert [[each["teacher"] for each in pair] for pair in found["settings"]] == [["teacher 0", "teacher 1"]] * 2
    with pytest.raises(Failure, match="differ in seed, teacher"):
        leak.load_pair(students[0], students[3])
    with pytest.raises(Failure, match="differ in nothing"):
        leak.load_pair(students[0], students[0])


def test_any_two_groups_of_runs_are_compared_by_seed(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import difference

    def group(name, accuracies, first_seed=0, **settings):
        folders = []
        for seed, accuracy in enumerate(accuracies, first_seed):
            record = json.loads((finished / name / "run.json").read_text()) | {"accuracy": accuracy}
            record["settings"] |= {"seed": seed} | settings
            record["environment"]["threads"] = 1 + seed
            folders.append(tmp_path / f"group{len(list(tmp_path.iterdir()))}")
            folders[-1].mkdir()
            (folders[-1] / "run.json").write_text(json.dumps(record))
        return [*map(str, folders)]

    def run(one, *others):
        words = [word for other in others for word in ("--over", *other)]
        monkeypatch.setattr(sys, "argv", ["difference.py", *one, *words, "--output", str(tmp_path / "found.json")])
        difference.main()
        return json.loads((tmp_path / "found.json").read_text())

    one = group("kd-T4-a0.1-s0", (0.93, 0.92, 0.94))
    smoothed, other = (
        group("baseline-s0", values, label_smoothing=smoothing)
        for values, smoothing in (((0.92, 0.9, 0.91), 0.1), ((0.929, 0.92, 0.9405), 0.0))
    )
    pattern = str(tmp_path / "group[0-2]")  # which not every shell expands
    assert run([pattern], other) == run(one, other)
    assert run(one, smoothed, other)[1] == run([*one, "--seeds", "2", "0", "1"], smoothed, other)[1]
    (found,) = run([*one, "--seeds", "2", "0"], other[::2])
    assert found["seeds"] == [0, 2] and found["accuracies"] == [[0.93, 0.94], [0.929, 0.9405]]
    edited = group("kd-T4-a0.1-s0", (0.5,), 7, loss="own", loss_sha256="a" * 64)  # not asked for, so it may differ
    assert run([*one, *edited, "--seeds", "2", "0"], other[::2]) == [found]
    with pytest.raises(Failure, match="differ in loss, loss_sha256"):
        run([*one, *edited], other)
    with pytest.raises(Failure, match="there is no run with seed 3 or 4 among"):
        run([*one, "--seeds", "0", "3", "4"], other)
    found = run(one[::-1], smoothed, other)  # paired by seed, in whichever order they are named
    assert found[0]["points"]["mean"] == pytest.approx(2) and found[0]["seeds"] == [0, 1, 2]
    by_hand = [1 - t / (t * t + 2) ** 0.5 for t in (2 * 3**0.5, 1 / 3**0.5)]  # 1, 2, 3 points; 0.1, 0 and -0.05
    assert [each["points"]["p_value"] for each in found] == [pytest.approx(by_hand[0]), pytest.approx(0.74, abs=0.01)]
    assert found[0]["points"]["p_holm"] == pytest.approx(2 * by_hand[0])
    assert found[0]["differ_in"] == ["alpha", "label_smoothing", "role", "teacher", "temperature"]
    out = capsys.readouterr().out
    assert "they differ in alpha, label_smoothing, role, teacher, temperature\n" in out
    assert "(not all were trained with the same threads)" in out and "+2.00 points (n = 3" in out
    bare, more = (SimpleNamespace(environment={"torch": "2.14"} | extra) for extra in ({}, {"compiled": True}))
    assert (
        difference.differing("environment", bare, more)
        == difference.differing("environment", more, bare)
        == {"compiled"}
    )
    codes = [SimpleNamespace(environment={"models.py": code} if code else {}) for code in ("1", "", "1", "2")]
    assert difference.differing("environment", *codes[:3]) == set()  # the second did not record it
    assert difference.differing("environment", *codes) == {"models.py"}
    for wrong, said in (
        ([*smoothed, *other], "seed 0 in this group already"), (smoothed[1:], "the other 1, 2[.] Name those of both"),
        ([smoothed[0], other[1]], "differ in label_smoothing"),
        (group("baseline-s0", (0.9, 0.9, 0.9), data="0" * 64), "on different images"),
        (group("baseline-s0", (None,)), "no accuracy on the test set"), ([str(tmp_path)], "run.json"),
    ):  # fmt: skip
        with pytest.raises(Failure, match=said):
            run(one, wrong)


def test_what_a_comparison_json_tells_is_compared_without_its_runs(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import difference

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["difference.py", *map(str, words), "--output", str(tmp_path / "found.json")])
        difference.main()
        return json.loads((tmp_path / "found.json").read_text())

    told = [f"{finished / 'comparison.json'}:{name}" for name in ("kd-T4-a0.1", "baseline")]
    folders = [finished / "kd-T4-a0.1-s0", finished / "baseline-s0"]
    expected = run(folders[0], "--over", folders[1])
    assert run(told[0], "--over", told[1]) == run(told[0], "--over", folders[1]) == expected
    unnamed = finished / "comparison.json"
    for wrong, what in ((f"{unnamed}:kd-T4-a0.9", "no students 'kd-T4-a0.9'"), (unnamed, "several groups of students")):
        with pytest.raises(Failure, match=rf"holds {what}: .*json:NAME, with NAME one of baseline, kd-T4-a0\.1\."):
            run(wrong, "--over", told[1])
    with pytest.raises(Failure, match="seed 0 in this group already"):
        run(told[0], folders[0], "--over", told[1])
    content = json.loads((finished / "comparison.json").read_text())
    content["settings"] |= {"loss": "own", "loss_file": "own.py", "loss_sha256": "0" * 64}
    content["kd"].insert(0, content["kd"][0] | {"temperature": 2.0, "loss": "own", "loss_sha256": "0" * 64})
    (tmp_path / "own.json").write_text(json.dumps(content))
    (found,) = run(f"{tmp_path / 'own.json'}:kd-own-T2-a0.1", "--over", f"{tmp_path / 'own.json'}:kd-T4-a0.1")
    assert [each.get("loss_file") for each in found["settings"]] == ["own.py", None]
    assert found["differ_in"] == ["loss", "loss_sha256", "temperature"]
    content["baseline"]["accuracies"] *= 2
    (tmp_path / "damaged.json").write_text(json.dumps(content))
    with pytest.raises(Damaged, match="it has 1 seeds and 2 accuracies"):
        run(f"{tmp_path / 'damaged.json'}:baseline", "--over", told[1])
    capsys.readouterr()
    unlabeled, plain = (f"{RESULTS / 'few-labels' / 'comparison.json'}:{name}" for name in (
        "kd-unlabeled-T32-a0.9", "kd-T32-a0.9"))  # fmt: skip
    (found,) = run(unlabeled, "--over", plain)
    assert found["differ_in"] == ["unlabeled"] and found["seeds"] == [0, 1, 2, 3, 4]
    written = json.loads((RESULTS / "few-labels" / "difference.json").read_text())[0]  # from the runs themselves
    assert found["accuracies"] == written["accuracies"]
    assert found["points"]["ci95"] == pytest.approx(written["points"]["ci95"])


@pytest.mark.parametrize("cut", [False, True])
def test_mixed_views_and_their_labels_are_parts_of_two_images(images, cut, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recipes

    loaded = data.load("folder", data_dir=images, image_size=16)
    about, everything = (
        (loaded.train_images, loaded.mean, loaded.std, "views", 2),
        torch.arange(loaded.train_images.shape[0]),
    )
    among = everything[::2]
    mixed = recipes.MixedViews(*about, among=among, share=0.5, cut=cut)
    plain, views = data.Views(*about).batch(3, everything).numpy(), mixed.batch(3, everything).numpy()
    labels = recipes.MixedLabels(mixed, loaded.train_labels, len(loaded.classes)).epoch(3).float().exp().numpy()
    others = mixed.mixing(3)[0].numpy()
    assert sorted(others[::2]) == sorted(among.tolist()), "images of `among` are mixed with each other"
    changed = [row for row in range(len(views)) if not np.array_equal(views[row], plain[row])]
    assert 0.25 * len(among) < len(changed) < 0.75 * len(among) and all(row % 2 == 0 for row in changed)
    for row in range(len(views)):
        own, other, between = plain[row], plain[others[row]], views[row]
        if row not in changed:
            part = 0.0
        elif cut:
            pasted = (between != own).any(0)  # those pixels of the other view that differ
            assert np.array_equal(np.where(pasted, other, own), between)
            rows, columns = pasted.any(1).nonzero()[0], pasted.any(0).nonzero()[0]
            assert abs(np.ptp(rows) - np.ptp(columns)) <= 1  # a square, or a pixel less at one side
            part = pasted.mean()
        else:
            part = ((between - own) * (other - own)).sum() / ((other - own) ** 2).sum()
            assert np.allclose(between, (1 - part) * own + part * other, atol=1e-4)
        expected = np.zeros(len(loaded.classes))
        expected[loaded.train_labels[row]] += 1 - part
        expected[loaded.train_labels[others[row]]] += part
        given = labels[row] / labels[row].sum()  # kept with the largest logit subtracted
        assert np.allclose(given, expected, atol=0.02 if cut else 1e-3)
    again = recipes.MixedViews(*about, among=among, share=0.5, cut=cut)
    some = everything[[6, 2]]
    assert np.array_equal(again.batch(3, some).numpy(), views[[6, 2]])


@pytest.mark.slow
@needs_cifar10
def test_the_kept_student_scores_on_the_real_test_set_as_recorded():
    student = models.load(RECORD / "kd-T4-a0.9-s0" / "model.pt")
    loaded = data.load("cifar10", data_dir=CIFAR10_DIR)
    with torch.inference_mode():
        logits = train.evaluate(student, loaded.test_images, student.mean, student.std)
    recorded = record()["kd"][0]["accuracies"][0]
    assert student.accuracy == recorded and student.settings["data"] == loaded.digest
    assert train.accuracy(logits, loaded.test_labels) == pytest.approx(recorded, abs=0.0003)  # of another processor
