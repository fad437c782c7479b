"""The figures of a comparison."""

import csv
import io
import math
import re
import sys
import warnings

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from reports.dark_knowledge import dark_knowledge
from reports.statistics import BINS, by_confidence, paired_test, softmax
from reports.styles import MARKERS, STYLES, broken, family, legend, pair_style, role_line
from runs.files import Damaged, make_folder, read, remove, write
from runs.settings import pair_name, variant_of
from sources import one_line

FEW = 20  # images in a bin of a reliability diagram, below which it is drawn pale
TICKS = 12  # below a panel of gains
PANELS = 4  # of gains in a row
LONG_NAME = 30  # letters of a name in a legend that would cover the curves
LETTERS = 20  # that are named of those that no font has


def draw(comparison):
    """Draws every figure that the comparison has the runs for, and removes the others; returns the paths of the drawn.

    `comparison` is a reports.comparison.Comparison.
    """
    plain = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
    matplotlib.rcParams.update(plain | {"font.family": family()})  # a class may be called $5_$10
    folder = comparison.output / "figures"
    make_folder(folder)
    drawn, boxes = [], set()
    for name, function in {
        "cost": cost, "gain": gain, "curves": curves, "sweep": sweep, "reliability": reliability_diagrams,
        "dark_knowledge": dark_knowledge,
    }.items():  # fmt: skip
        path = folder / f"{name}.png"
        figure = function(comparison)
        if figure is None:
            remove(path)
            continue
        content = io.BytesIO()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            figure.savefig(content, format="png", dpi=150)
        for each in caught:
            if glyph := re.match(r"Glyph (\d+) ", str(each.message)):
                boxes.add(chr(int(glyph[1])))
            else:
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        write(path, content.getvalue())
        drawn.append(path)
    if boxes:
        letters = one_line("".join(sorted(boxes)[:LETTERS])) + "…" * (len(boxes) > LETTERS)
        print(
            f"The figures show boxes for letters that no font here has: {letters}\nreport.html shows them. For East "
            f"Asian ones install Noto Sans CJK, and remove {matplotlib.get_cachedir()}, where fonts are listed.",
            file=sys.stderr,
        )
    return drawn


def curves(comparison):
    """Training loss and accuracy of all runs by epoch, with the final test accuracies to the right of them."""
    figure = Figure((9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    runs = [run for run in comparison.runs if run.settings.epochs and not run.settings.val_fraction]
    pairs = [pair_name(entry) for entry in comparison.kd]
    groups = []
    for run in runs:
        settings, history = run.settings, _history(run.folder / "history.csv")
        style = role_line(settings.role) | {"linewidth": 1.3, "marker": "" if len(history) > 1 else "o"}
        if settings.role == "kd":
            pair = pair_name(comparison.entry_of(run))
            style["label"] = f"KD, {pair}"
            style["color"], style["linestyle"], marker = pair_style(pairs.index(pair))
            style["marker"] = style["marker"] if marker == MARKERS[0] else marker
        group = style.pop("label")
        first = group not in groups
        groups += [group] if first else []
        epochs, losses, accuracies = zip(*history, strict=True)
        left.plot(epochs, losses, **style, label=group if first else None)
        right.plot(epochs, accuracies, **style)
        beside = epochs[-1] * (1.03 + 0.03 * groups.index(group))
        right.plot(beside, run.accuracy, "D", markersize=5, color=style["color"], markerfacecolor="white")
    positive = all(line.get_ydata().min() > 0 for line in left.lines)  # a loss of the user's own may be negative
    scale = "log" if positive else "linear"
    left.set(xlabel="epoch", ylabel="training loss (with KD: soft and hard)", yscale=scale)
    right.set(xlabel="epoch", ylabel="accuracy (lines: training, ◇: test)")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(0, 1.02 * axes.get_xlim()[1])  # from 0, so that a single epoch has a whole number beside it
        axes.grid(alpha=0.25)
    for formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    lowest, highest = left.get_ylim()
    if positive and highest > 10 * lowest:
        left.yaxis.set_minor_locator(LogLocator(subs=(1, 2, 5)))
    else:  # a logarithmic locator would find one or two ticks
        left.yaxis.set_major_locator(MaxNLocator(7))
        left.yaxis.set_minor_locator(NullLocator())
    if len(groups) > 5 or max(map(len, groups)) > LONG_NAME:
        legend(figure, [left], 4)
    else:
        left.legend(frameon=False)
    figure.suptitle(f"Training curves of {len(runs)} runs")
    return figure


def _history(path):
    """(epoch, training loss, training accuracy) of each epoch; raises Damaged where the file holds anything else."""
    try:
        rows = csv.DictReader(io.StringIO(read(path).decode()))
        history = [(int(row["epoch"]), float(row["train_loss"]), float(row["train_accuracy"])) for row in rows]
    except KeyError as error:
        raise Damaged(f"{path} is damaged: it has no column {error}.") from None
    except (ValueError, TypeError) as error:
        raise Damaged(f"{path} is damaged: {error}.") from None
    if not history:
        raise Damaged(f"{path} is damaged: it has no rows.")
    return history


def cost(comparison):
    """Test accuracy against multiply-adds: the teacher, the baseline and the distilled students, with their means and
    95% confidence intervals over the seeds."""
    figure = Figure((6.4, 3.7 + 0.1 * len(comparison.kd)), layout="constrained")  # taller, as the legend is
    axes = figure.subplots()
    teacher, student = (each | {"macs": max(1, each["macs"])} for each in (comparison.teacher, comparison.student))
    axes.axhline(teacher["accuracy"], color="black", linewidth=0.8, linestyle=":")
    axes.plot(teacher["macs"], teacher["accuracy"], "s", color="black", label="teacher")
    _number(axes, teacher["macs"], teacher["accuracy"])
    groups = [("baseline", STYLES["baseline"]["color"], "D", comparison.baseline)]
    for number, entry in reversed([*enumerate(comparison.kd)]):
        color, _, marker = pair_style(number)
        groups.append((f"KD, {pair_name(entry)}", color, marker, entry))
    for position, (label, color, marker, entry) in enumerate(groups):
        # Side by side, though they cost the same; however many, within a factor of 1.6 to either side.
        step = min(1.12, 1.6 ** (2 / (len(groups) - 1)))
        place = student["macs"] * step ** (position - (len(groups) - 1) / 2)
        interval = paired_test(entry["accuracies"])["ci95"]  # of the mean; the pairing is with 0
        error = interval and [[entry["mean"] - interval[0]], [interval[1] - entry["mean"]]]
        axes.plot([place] * len(entry["seeds"]), entry["accuracies"], ".", color=color, alpha=0.4)
        axes.errorbar(place, entry["mean"], error, fmt=marker, color=color, capsize=5, label=label)
        if position in (0, len(groups) - 1):
            _number(axes, place, entry["mean"], left=position == 0)
    cheaper, dearer = sorted((student["macs"], teacher["macs"]))
    axes.set(xscale="log", xlim=(cheaper / 2.2, dearer * 2.2), ylabel="test accuracy")
    axes.minorticks_off()
    axes.set_xticks([cheaper, dearer], ["", ""])
    sides = ("right", "left") if dearer < 3 * cheaper else ("center", "center")  # side by side where they are close
    for name, entry, side in (("student", student, sides[0]), ("teacher", teacher, sides[1])):
        axes.annotate(
            f"{name}\n{entry['macs'] / 1e6:,.1f} million multiply-adds\n{entry['parameters'] / 1e6:.2f} million "
            "parameters", (entry["macs"], 0), ({"right": -4, "left": 4, "center": 0}[side], -6), va="top", ha=side,
            xycoords=axes.get_xaxis_transform(), textcoords="offset points",
        )  # fmt: skip
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.25)
    counts = sorted({len(entry["seeds"]) for entry in comparison.kd})
    seeds = f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds, 95% intervals"
    figure.suptitle(f"Accuracy against cost ({'one pair' if counts == [1] else seeds})")
    legend(figure, [axes], 3)
    return figure


def _number(axes, place, accuracy, left=False):
    """Writes an accuracy beside its point."""
    axes.annotate(
        f"{accuracy:.4f}", (place, accuracy), (-10 if left else 10, 3), textcoords="offset points",
        ha="right" if left else "left",
    )  # fmt: skip


def gain(comparison):
    """Each seed's gain with distillation, their mean and its 95% confidence interval: one panel for each pair of
    temperature and alpha."""
    count = len(comparison.kd)
    rows, columns = math.ceil(count / PANELS), min(count, PANELS)
    figure = Figure((1.8 + 3.2 * columns, 0.6 + 3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels, unused = grid.flat[:count], grid.flat[count:]
    for axes, entry in zip(panels, comparison.kd, strict=True):
        _gain_of_a_pair(axes, entry)
        axes.set_title(broken(pair_name(entry), 40), fontsize=9)
    for axes in unused:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy with KD minus baseline\n(percentage points)")
    legend(figure, panels, 2)
    figure.suptitle("Gain with distillation")
    return figure


def _gain_of_a_pair(axes, entry):
    improvement = entry["improvement"]
    positions = range(len(entry["seeds"]))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.plot(positions, improvement["by_seed"], "o", color=STYLES["kd"]["color"], label="one seed")
    ticks = [str(seed) for seed in entry["seeds"]]
    if len(ticks) > 1:
        mean, interval = improvement["mean"], improvement["ci95"]
        error = interval and [[mean - interval[0]], [interval[1] - mean]]
        label = "mean, 95% interval" if interval else "mean (no interval: all equal)"
        axes.errorbar(len(ticks), mean, error, fmt="D", color="black", capsize=5, label=label)
        ticks.append("mean")
    labelled = [*range(0, len(positions), math.ceil(len(positions) / TICKS)), *range(len(positions), len(ticks))]
    axes.set_xticks(labelled, [ticks[place] for place in labelled])
    axes.set(xlabel="student seed", xlim=(-0.6, len(ticks) - 0.4))
    axes.margins(y=0.2)
    axes.grid(axis="y", alpha=0.25)


def sweep(comparison):
    """Validation accuracy by temperature and alpha, coloured by the gain over the baseline. None without a sweep."""
    students = [each for each in comparison.selection if each["role"] == "kd"]
    own = [each for each in students if variant_of(each) == variant_of(comparison.kd[0])]
    entries = {(each["temperature"], each["alpha"]): each["mean"] for each in own or students}
    reference = [e["mean"] for e in comparison.selection if e["role"] == "baseline"]
    if not entries or not reference:
        return None
    temperatures, alphas = (sorted({pair[k] for pair in entries}) for k in (0, 1))
    grid = np.array([[entries.get((t, a), np.nan) for a in alphas] for t in temperatures])
    gains = 100 * (grid - reference[0])
    figure = Figure((2.6 + 1.1 * len(alphas), 1.8 + 0.7 * len(temperatures)), layout="constrained")
    axes = figure.subplots()
    limit = max(float(np.nanmax(np.abs(gains))), 0.01)
    image = axes.imshow(gains, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(gains):
        if not np.isnan(value):
            ink = "white" if abs(value) > 0.6 * limit else "black"
            text = f"{grid[row, column]:.4f}\n({value:+.2f})"
            axes.text(column, row, text, ha="center", va="center", color=ink)
    reported = comparison.kd[0]["temperature"], comparison.kd[0]["alpha"]
    best = max(entries, key=lambda pair: (entries[pair], pair == reported))  # of equals, the one chosen
    spot = alphas.index(best[1]) - 0.5, temperatures.index(best[0]) - 0.5
    frame = {"fill": False, "linewidth": 3, "edgecolor": "black", "clip_on": False}
    axes.add_patch(matplotlib.patches.Rectangle(spot, 1, 1, **frame))
    axes.set_xticks(range(len(alphas)), [f"{a:g}" for a in alphas])
    axes.set_yticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
    axes.set(xlabel="alpha (weight of the soft targets)", ylabel="temperature")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="gain over baseline (points)")
    seen = "\nThe teacher was trained on these images, too." * comparison.sweep_teacher_has_seen
    loss = f", {variant_of(own[0])}" if own and variant_of(own[0]) else ""
    figure.suptitle(f"Validation accuracy{loss}\n(baseline {reference[0]:.4f}; framed: best){seen}", fontsize=9)
    return figure


def reliability_diagrams(comparison):
    """Accuracy against confidence for teacher, distilled student and baseline; students' seeds pooled. Bins with fewer
    than FEW images are pale."""
    figure = Figure((9, 3.7), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    models = {
        "teacher": [comparison.teacher_logits],
        "kd": comparison.kd_logits,
        "baseline": comparison.baseline_logits,
    }
    errors = {"teacher": comparison.teacher, "kd": comparison.kd[0], "baseline": comparison.baseline}
    errors = {role: entry["calibration_error"] for role, entry in errors.items()}
    for axes, (role, logits) in zip(panels, models.items(), strict=True):
        answers = [(each.max(1), each.argmax(1) == comparison.labels) for each in map(softmax, logits)]  # one at a time
        share, confidence, accuracy = by_confidence(*map(np.concatenate, zip(*answers, strict=True)))
        there = share > 0
        middle = (np.arange(BINS) + 0.5) / BINS
        many = share * len(logits) * len(comparison.labels) >= FEW
        for bins, alpha, label in (
            (many, 0.55, "accuracy in the bin" + ", students of all seeds" * (len(comparison.kd_logits) > 1)),
            (there & ~many, 0.15, f"accuracy, fewer than {FEW} images"),
        ):
            axes.bar(
                middle[bins], accuracy[bins], 1 / BINS, color=STYLES[role]["color"], alpha=alpha, edgecolor="black",
                linewidth=0.6, hatch=STYLES[role]["hatch"], label=label if bins.any() else None,
            )  # fmt: skip
        label = "mean confidence in the bin"
        axes.plot(confidence[there], confidence[there], "k--", linewidth=1, marker=".", label=label)
        error = np.mean(errors[role])  # of each seed by itself, as in the table
        axes.set(xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
        name = STYLES[role]["label"] + (f", {pair_name(comparison.kd[0])}" if role == "kd" else "")
        name = broken(name, 40)
        axes.set_title(f"{name}\nECE {error:.4f}, {share[-1]:.0%} of images in the last bin", fontsize=9)
    panels[0].set_ylabel("accuracy")
    legend(figure, panels, 3)
    return figure
