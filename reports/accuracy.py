"""The table of test accuracies, and the differences that are tested between them."""

import numpy as np

from reports.statistics import holm, spread
from runs.settings import pair_name, variant_of


def rows(comparison):
    """The rows of the printed table: means over the seeds. `balanced` would be the accuracy again where all classes
    have equally many test images."""
    teacher, members = comparison.teacher, comparison.teacher["members"]

    def row(name, accuracy, std, balanced, n, agreement, error, likelihood):
        balanced = () if comparison.is_balanced else (decimals(balanced),)
        return name, decimals(accuracy), decimals(std), *balanced, n, *map(decimals, (agreement, error, likelihood))

    columns = ["accuracy", "std", "balanced", "n", "agreement", "ECE", "NLL"]
    found = [("Test accuracy", *(name for name in columns if name != "balanced" or not comparison.is_balanced))]
    name = f"Teacher, {len(members)} networks" if len(members) > 1 else "Teacher"
    calibration = teacher["calibration_error"], teacher["negative_log_likelihood"]
    found.append(row(name, teacher["accuracy"], None, teacher["balanced_accuracy"], 1, None, *calibration))
    if len(members) > 1:
        alone = np.mean(members), spread(members), None, len(members), None, None, None
        found.append(row("  each alone", *alone))
    for name, entry in comparison.students:
        keys = ("balanced_accuracy", "agreement_with_teacher", "calibration_error", "negative_log_likelihood")
        balanced, *others = (np.mean(entry[key]) for key in keys)
        found.append(row(name, entry["mean"], entry["std"], balanced, len(entry["seeds"]), *others))
    return found


def where(comparison):
    """What the table means, in words."""
    words = "agreement: same class as the teacher; ECE: expected calibration error, 15 bins; NLL in nats"
    if not comparison.is_balanced:
        words += ";\nbalanced: the mean of the accuracies by class, in which every class counts alike"
    return words


def differences(comparison):
    """The rows of the table of paired differences over several seeds, in points: of each way to distil over the
    baseline, and of the first way over each other. Empty where there are none."""
    first, tests = comparison.kd[0], []
    for entry in comparison.kd:
        if len(entry["seeds"]) > 1:
            tests.append((f"{pair_name(entry)} over baseline", entry["improvement"], len(entry["seeds"])))
    for entry in comparison.kd[1:]:
        over = entry["first_over_this"]
        if over:
            plain = "plain " if variant_of(first) and not variant_of(entry) else ""
            tests.append((f"{pair_name(first)} over {plain}{pair_name(entry)}", over, len(over["seeds"])))
    if not tests:
        return []
    found = [("Differences in points", "mean", "95% from", "to", "p", "p (Holm)", "n")]
    corrected = holm([test["p_value"] for _, test, _ in tests])
    for (name, test, seeds), p_value in zip(tests, corrected, strict=True):
        interval = (points(end, "+") for end in test["ci95"]) if test["ci95"] else (None, None)
        p_values = (None if p is None else plain_p(p) for p in (test["p_value"], p_value))
        found.append((name, points(test["mean"], "+"), *interval, *p_values, seeds))
    return found


DIFFERENCES = (
    "paired t-test over the seeds that both have; interval and p are for one difference alone, p (Holm) is corrected\n"
    "for all of this table: all differences whose p (Holm) is below 0.05 hold together"
)


def points(value, sign=""):
    """A gain in percentage points with two decimals, never -0.00."""
    return f"{round(value, 2) + 0.0:{sign}.2f}"


def plain_p(value):
    """A p-value with as many digits as it needs: 0.0012, 0.35, < 0.0001."""
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def decimals(value):
    """A share with four decimals; None stays None."""
    return None if value is None else f"{value:.4f}"
