"""The comparison in words: the printed block and table, what can be claimed, and comparison.csv."""

import csv
import io
from dataclasses import asdict

from reports import accuracy, calibration, costs, fidelity, omitted
from reports.accuracy import decimals, plain_p, points
from reports.statistics import POWER, SIGNIFICANCE, SMALL_GAIN, seeds_needed, spread
from runs.code import FILES, deciding
from runs.settings import UNFAIR_SWEEP, pair_name

BETTER = 0.1  # a network is hardly better than a guess that corrects less than this share of the guess's errors
MANY, ENDS = 20, 5  # of more classes, only so many of the lowest and highest accuracy are printed


def block(comparison):
    """The comparison in a form that has been the same since the first version."""
    entry, settings = comparison.kd[0], comparison.settings
    return (
        "Training Parameters:\n"
        f"- Temperature: {entry['temperature']}\n"
        f"- Alpha: {entry['alpha']}\n"
        f"- Epochs: {settings.epochs}\n"
        f"- Batch Size: {settings.batch_size}\n"
        f"{_special(comparison)}"
        "\n"
        "Final Test Accuracies:\n"
        f"- Teacher Network: {comparison.teacher['accuracy']:.4f}\n"
        f"- Student Network (with KD): {entry['mean']:.4f}\n"
        f"- Student Network (Baseline): {comparison.baseline['mean']:.4f}\n"
        "\n"
        f"Improvement with KD: {points(entry['improvement']['mean'])}%\n"
    )


def _special(comparison):
    """What the students of this comparison have that others have not, a line each."""
    settings = comparison.settings
    lines = [f"- Student: {settings.network} in {settings.network_file}\n"] if settings.network else []
    if settings.width != 1:
        lines.append(f"- Width: {settings.width:g}\n")
    if settings.loss:
        lines.append(f"- Loss: {settings.loss} in {settings.loss_file}\n")
    if settings.unlabeled:
        lines.append(f"- Images without labels: {comparison.first.images['unlabeled']['count']:,}\n")
    if settings.label_smoothing:
        lines.append(f"- Label Smoothing: {settings.label_smoothing:g}\n")
    if settings.train_fraction != 1:
        lines.append(f"- Training Images: {settings.train_fraction:.4g} of each class\n")
    if settings.omit_class:
        lines.append(f"- Omitted: {', '.join(settings.omit_class)}\n")
    return "".join(lines)


def _row(name, *cells, width=26, cell=12):
    if len(name) > width - 1:
        name = f"{name}\n{'':{width}}"
    return f"{name:<{width}}" + "".join(f"{'' if each is None else each:>{cell}}" for each in cells) + "\n"


def details(comparison):
    """The table below the block, the gain with its interval, and what can be claimed."""
    baseline, entry = comparison.baseline, comparison.kd[0]
    text = "".join(_row(*row) for row in accuracy.rows(comparison)) + f"({accuracy.where(comparison)})\n"
    if note := largest_class(comparison):
        text += f"{note}\n"
    text += "\n" + "".join(_row(*row) for row in fidelity.rows(comparison)) + f"({fidelity.where(comparison)})\n\n"
    if scaled := calibration.rows(comparison):
        text += "".join(_row(*row) for row in scaled) + f"({calibration.where(comparison)})\n\n"
    text += _by_class(comparison)
    if "omitted" in baseline:
        text += "\n" + "".join(_row(*row) for row in omitted.rows(comparison)) + f"({omitted.where(comparison)})\n"
    if comparison.selection:
        text += "\n" + _row("Sweep, on validation", "accuracy", "std", "n")
        for each in sorted(comparison.selection, key=lambda each: -each["mean"]):
            name = f"KD, {pair_name(each)}" if each["role"] == "kd" else each["role"].capitalize()
            name = "Teachers, each alone" if name == "Teacher" and len(each["seeds"]) > 1 else name
            text += _row(name, decimals(each["mean"]), decimals(each["std"]), len(each["seeds"]))
        text += f"({UNFAIR_SWEEP})\n" * comparison.sweep_teacher_has_seen
    text += "\n" + _row("Costs", "parameters", "MACs, M", "MB", "ms / image", "images / s")
    for name, parameters, macs, *measured in costs.rows(comparison):
        cells = ("-" if value is None else f"{value:,.1f}" for value in measured)
        text += _row(name, f"{parameters:,}", f"{macs:,.1f}", *cells)
    text += f"({costs.where(comparison)})\n{costs.trade(comparison)}\n"
    text += "\n" + claim(entry["improvement"], len(entry["seeds"]), len(comparison.labels), method(entry)) + "\n"
    tested = accuracy.differences(comparison)
    if len(tested) > 2 or (tested and len(entry["seeds"]) == 1):  # the only one of the first way is told above
        text += "\n" + "".join(_row(*row, width=40, cell=10) for row in tested) + f"({accuracy.DIFFERENCES})\n"
    notes = [*differently_trained(comparison), *comparison.notes()]
    return text + "".join(f"Note that {note}.\n" for note in notes)


def largest_class(comparison):
    """The line that says how good the answer is that is always the largest class, where a network shown is hardly
    better; else ""."""
    share = float(comparison.counts.max() / comparison.counts.sum())
    name = comparison.classes[int(comparison.counts.argmax())]
    shown = (comparison.teacher["accuracy"], comparison.kd[0]["mean"], comparison.baseline["mean"])
    if comparison.is_balanced or min(shown) - share >= BETTER * (1 - share):
        return ""
    return f"Note that always answering '{name}', the largest class, is right on {share:.4f} of the test images."


def _by_class(comparison):
    """The table of accuracies by class; of many classes those of the lowest and highest accuracy with KD."""
    each = (comparison.teacher, comparison.kd[0], comparison.baseline)
    rows = list(zip(comparison.classes, *(entry["class_accuracies"] for entry in each), strict=True))
    lines = [_row(name[:25], *("-" if v is None else f"{v:.4f}" for v in values)) for name, *values in rows]
    if len(rows) > MANY:
        order = sorted((k for k in range(len(rows)) if rows[k][2] is not None), key=lambda k: rows[k][2])
        rest = f"({len(order) - 2 * ENDS} classes lie between, by accuracy with KD; all are in report.html)\n"
        lines = [*(lines[k] for k in order[:ENDS]), rest, *(lines[k] for k in order[-ENDS:])]
    return _row("Accuracy by class", "teacher", "with KD", "baseline") + "".join(lines)


def differently_trained(comparison):
    """What to note where students were not all trained alike (device, precision, compiled, versions, code), phrases."""
    notes, students = [], [run for run in comparison.runs if run.settings.role != "teacher"]
    for who, sweep in (("these students", False), ("the students of the sweep", True)):
        found = {}
        for run in students:
            if bool(run.settings.val_fraction) == sweep:
                made = run.environment
                words = f"{made.get('device')} in {made.get('precision')}" + ", compiled" * bool(made.get("compiled"))
                words += f" (torch {made.get('torch')}, program {made.get('program')})"
                found.setdefault(words, []).append(run.folder.name)
        if len(found) > 1:
            ways = "; ".join(f"{', '.join(names)} on {words}" for words, names in found.items())
            notes.append(f"{who} were not all trained alike: {ways}")
    for file in FILES:
        found = {}
        for run in students:
            if file in run.environment and file in deciding(run.settings):
                name = f"{run.folder.name} of the sweep" if run.settings.val_fraction else run.folder.name
                found.setdefault(str(run.environment[file]), []).append(name)
        if len(found) > 1:
            versions = ", others ".join(", ".join(names) for names in found.values())
            notes.append(f"{file} was changed between the trainings of these students: some are {versions}")
    return notes


def method(entry):
    """What an entry of comparison.json was distilled with, as the sentence about its gain names it."""
    if entry.get("unlabeled"):
        return "KD with images without labels"
    return f"KD by {entry['loss']}" if entry.get("loss") else "KD"


def claim(improvement, seeds, images, name="KD"):
    """What can be claimed, in plain sentences."""
    mean, interval, p = improvement["mean"], improvement["ci95"], improvement["p_value"]
    if seeds == 1:
        return (
            f"These two networks: of {images:,} test images, distillation corrects {improvement['fixed']} and breaks "
            f"{improvement['broken']} (exact McNemar test, {_p(p)}).\n"
            "One pair of students says nothing about distillation itself: add --seeds 5 for an interval."
        )
    if interval is None:
        return f"All {seeds} seeds gain exactly {points(mean, '+')} points, so no interval can be computed."
    ends, wide = (
        each and f"{points(each[0], '+')} to {points(each[1], '+')}"
        for each in (interval, improvement["ci95_with_images"])
    )
    gain = (
        f"Gain with {name}: {points(mean, '+')} points, 95% confidence interval {ends}, {_p(p)} (paired t-test, n = "
        f"{seeds} seeds)."
    )
    covered, where = "The interval covers other initial weights and orders of images", ""
    if wide == ends:  # of many test images
        covered = "The interval covers other initial weights, orders of images and test images"
    elif wide:
        gain += f"\nFor other test images as well: {wide} points."
        covered = "Both intervals cover other initial weights and orders of images"
        low, high = improvement["ci95_with_images"]
        if low <= 0 <= high:
            where = ", on these test images;\nfor others of their kind that is not shown: more test images would help"
    covers = f"({covered}, for the same teacher, crops and flips.)"
    if p < SIGNIFICANCE:
        verb = "improves" if mean > 0 else "worsens"
        return f"{gain}\nDistillation {verb} this student's accuracy, with this teacher and recipe{where}.\n{covers}"
    needed = seeds_needed(spread(improvement["by_seed"]))
    if interval[1] < SMALL_GAIN:
        more = f"a gain of {SMALL_GAIN} points lies above the interval"
    elif needed and needed <= seeds:
        more = f"a gain of {SMALL_GAIN} points lies within the interval"
    else:
        about = f"about {needed:,}" if needed else "more than half a million"
        more = f"{about} would show a gain of {SMALL_GAIN} points ({POWER:.0%} power, if the spread is as seen)"
    return f"{gain}\nNo difference can be shown with {seeds} seeds; {more}.\n{covers}"


def _p(value):
    text = plain_p(value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


COLUMNS = (
    "run", "role", "temperature", "alpha", "loss", "loss_sha256", "unlabeled", "network", "width", "train_fraction",
    "omit_class", "seed", "accuracy", "balanced_accuracy", "val_accuracy", "epochs", "batch_size", "learning_rate",
    "weight_decay", "image_size", "padding", "cutout", "mirror", "label_smoothing", "val_fraction", "seconds",
)  # fmt: skip


def run_values(comparison, run):
    """{name: value} of a FinishedRun, all COLUMNS among them."""
    values = {**vars(run), **asdict(run.settings), "run": run.folder.relative_to(comparison.output).as_posix()}
    values["omit_class"] = ", ".join(run.settings.omit_class)
    for name in ("loss_sha256", "unlabeled"):
        values[name] = values[name] and values[name][:16]
    values["balanced_accuracy"] = comparison.balanced.get(run.folder)  # None for a sweep's, which reads no test set
    return values


def table(comparison):
    """comparison.csv: one row per run."""
    text = io.StringIO()
    rows = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    rows.writeheader()
    for run in comparison.runs:
        rows.writerow(run_values(comparison, run))
    return text.getvalue()
