"""The figures of a comparison. Colours are Okabe and Ito's, which the colour-blind tell apart; line styles and hatches
tell roles apart in grey."""

import csv
import io
import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from reports.statistics import BINS, by_confidence, paired_test, softmax
from runs.files import Damaged, make_folder, read, remove, write
from runs.settings import pair_name, variant_of

STYLES = {
    "teacher": {"color": "#000000", "linestyle": ":", "hatch": None, "label": "teacher"},
    "kd": {"color": "#D55E00", "linestyle": "-", "hatch": None, "label": "student with KD"},
    "baseline": {"color": "#0072B2", "linestyle": "--", "hatch": "//", "label": "student, baseline"},
}
PAIRS = (
    ("#D55E00", "-"), ("#E69F00", "-."), ("#CC79A7", (0, (1, 1))), ("#009E73", (0, (5, 1, 1, 1))),
    ("#56B4E9", (0, (6, 2))),
)  # fmt: skip
MARKERS = "Dvp*"  # of the pairs of each round through PAIRS
FEW = 20  # images in a bin of a reliability diagram, below which it is drawn pale
EXAMPLES = 3
TICKS = 12  # below a panel of gains


def draw(comparison):
    """Draws every figure that the comparison has the runs for, and removes the others; returns the paths of the drawn.

    `comparison` is a reports.comparison.Comparison.
    """
    plain = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
    matplotlib.rcParams.update(plain)  # a class may be called $5_$10
    folder = comparison.output / "figures"
    make_folder(folder)
    drawn = []
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
        figure.savefig(content, format="png", dpi=150)
        write(path, content.getvalue())
        drawn.append(path)
    return drawn


def _line(role):
    return {name: STYLES[role][name] for name in ("color", "linestyle", "label")}


def _style(number):
    """(color, line style, marker) of the pair of temperature and alpha with this number."""
    return *PAIRS[number % len(PAIRS)], MARKERS[number // len(PAIRS) % len(MARKERS)]


def _legend(figure, panels, columns):
    """One legend below all panels, each entry once."""
    entries = {}
    for axes in panels:
        handles, names = axes.get_legend_handles_labels()
        entries = dict(zip(names, handles, strict=True)) | entries  # as in the first panel that has it
    figure.legend(entries.values(), entries.keys(), frameon=False, loc="outside lower center", ncols=columns)


def curves(comparison):
    """Training loss and accuracy of all runs by epoch, with the final test accuracies to the right of them."""
    figure = Figure((9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    runs = [run for run in comparison.runs if run.settings.epochs and not run.settings.val_fraction]
    pairs = [pair_name(entry) for entry in comparison.kd]
    groups = []
    for run in runs:
        settings, history = run.settings, _history(run.folder / "history.csv")
        style = _line(settings.role) | {"linewidth": 1.3, "marker": "" if len(history) > 1 else "o"}
        if settings.role == "kd":
            pair = pair_name(vars(settings))
            style["label"] = f"KD, {pair}"
            style["color"], style["linestyle"], marker = _style(pairs.index(pair))
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
    if len(groups) > 5:
        _legend(figure, [left], 4)
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
    figure = Figure((6.4, 4), layout="constrained")
    axes = figure.subplots()
    teacher, student = comparison.teacher, comparison.student
    axes.axhline(teacher["accuracy"], color="black", linewidth=0.8, linestyle=":")
    axes.plot(teacher["macs"], teacher["accuracy"], "s", color="black", label="teacher")
    _number(axes, teacher["macs"], teacher["accuracy"])
    groups = [("baseline", STYLES["baseline"]["color"], "D", comparison.baseline)]
    for number, entry in reversed([*enumerate(comparison.kd)]):
        color, _, marker = _style(number)
        groups.append((f"KD, {pair_name(entry)}", color, marker, entry))
    for position, (label, color, marker, entry) in enumerate(groups):
        place = student["macs"] * 1.12 ** (position - (len(groups) - 1) / 2)  # side by side, though they cost the same
        interval = paired_test(entry["accuracies"])["ci95"]  # of the mean; the pairing is with 0
        error = interval and [[entry["mean"] - interval[0]], [interval[1] - entry["mean"]]]
        axes.plot([place] * len(entry["seeds"]), entry["accuracies"], ".", color=color, alpha=0.4)
        axes.errorbar(place, entry["mean"], error, fmt=marker, color=color, capsize=5, label=label)
        if position in (0, len(groups) - 1):
            _number(axes, place, entry["mean"], left=position == 0)
    ticks = [
        f"{name}\n{entry['macs'] / 1e6:,.1f} million multiply-adds\n{entry['parameters'] / 1e6:.2f} million parameters"
        for name, entry in (("student", student), ("teacher", teacher))
    ]
    axes.set(xscale="log", xlim=(student["macs"] / 2.2, teacher["macs"] * 2.2), ylabel="test accuracy")
    axes.minorticks_off()
    axes.set_xticks([student["macs"], teacher["macs"]], ticks)
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.25)
    seeds = len(comparison.kd[0]["seeds"])
    figure.suptitle(f"Accuracy against cost ({'one pair' if seeds == 1 else f'{seeds} seeds, 95% intervals'})")
    _legend(figure, [axes], 3)
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
    figure = Figure((1.8 + 3.2 * len(comparison.kd), 3.6), layout="constrained")
    panels = figure.subplots(1, len(comparison.kd), sharey=True, squeeze=False)[0]
    for axes, entry in zip(panels, comparison.kd, strict=True):
        _gain_of_a_pair(axes, entry)
        axes.set_title(pair_name(entry), fontsize=9)
    panels[0].set_ylabel("test accuracy with KD minus baseline\n(percentage points)")
    _legend(figure, panels, 2)
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
    loss = f", {own[0]['loss']}" if own and "loss" in own[0] else ""
    figure.suptitle(f"Validation accuracy{loss} (baseline {reference[0]:.4f}; framed: best){seen}", fontsize=9)
    return figure


def reliability_diagrams(comparison):
    """Accuracy against confidence for teacher, distilled student and baseline; students' seeds pooled. Bins with fewer
    than FEW images are pale."""
    figure = Figure((9, 3.7), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    models = {
        "teacher": [comparison.teacher_logits],
        "kd": comparison.kd_logits[0],
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
            (many, 0.55, "accuracy in the bin" + ", students of all seeds" * (len(comparison.kd_logits[0]) > 1)),
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
        axes.set_title(f"{name}\nECE {error:.4f}, {share[-1]:.0%} of images in the last bin", fontsize=9)
    panels[0].set_ylabel("accuracy")
    _legend(figure, panels, 3)
    return figure


def examples(comparison, count=EXAMPLES):
    """Indices of the `count` test images that show best what soft targets carry, of different classes where possible.

    First come those that teacher and distilled student get right and the baseline takes for the class that the teacher
    finds second most likely; then those for which less of this holds. Among equals, the image whose second class has
    the highest probability comes first.
    """
    labels = comparison.labels
    teacher = softmax(comparison.teacher_logits)
    ranked = teacher.argsort(1)
    second = ranked[:, -2]
    kd, baseline = comparison.kd_logits[0][0].argmax(1), comparison.baseline_logits[0].argmax(1)
    right = (ranked[:, -1] == labels).astype(int)
    score = 4 * right + 2 * (right & (kd == labels) & (baseline != labels)) + (right & (baseline == second))
    order = np.lexsort((-teacher[np.arange(len(labels)), second], -score))
    first = [order[labels[order] == k][:1] for k in range(len(comparison.classes))]
    leaders = {int(each[0]) for each in first if len(each)}
    chosen = [int(i) for i in order if int(i) in leaders] + [int(i) for i in order if int(i) not in leaders]
    return chosen[:count]


def dark_knowledge(comparison):
    """Test images with the probabilities of teacher, at T = 1 and softened, and of both students at T = 1."""
    entry, indices, shown = comparison.kd[0], examples(comparison), min(6, len(comparison.classes))
    temperature, seed = entry["temperature"], entry["seeds"][0]
    softened = f"teacher, T = {temperature:g}" + " (dotted: uniform)" * (temperature > 1)
    columns = [
        ("teacher, T = 1", "teacher", comparison.teacher_logits, 1.0),
        (softened, "teacher", comparison.teacher_logits, temperature),
        (f"with KD, {pair_name(entry)}", "kd", comparison.kd_logits[0][0], 1.0),
        ("baseline", "baseline", comparison.baseline_logits[0], 1.0),
    ]
    figure = Figure((11, 0.6 + 1.35 * len(indices)), layout="constrained")
    grid = figure.subplots(len(indices), 5, squeeze=False, width_ratios=(1, 1.5, 1.5, 1.5, 1.5))
    for number, (row, index) in enumerate(zip(grid, indices, strict=True)):
        row[0].imshow(comparison.images[index], interpolation="nearest")
        row[0].set(xticks=[], yticks=[])
        row[0].set_title(comparison.classes[comparison.labels[index]], fontsize=9)
        row[0].spines[:].set_visible(False)
        classes = comparison.teacher_logits[index].argsort()[::-1][:shown]
        for axes, (title, role, logits, softness) in zip(row[1:], columns, strict=True):
            found, style = softmax(logits[indices], softness), STYLES[role]
            values, end = found[number][classes], 1.0 if found.max() > 0.5 else round(float(found.max()), 2)
            look = {"color": style["color"], "hatch": style["hatch"], "alpha": 0.65, "edgecolor": "black"}
            axes.barh(range(shown), values, linewidth=0.4, **look)
            for place, value in enumerate(values):
                words = f"{value:.{2 if end > 0.5 and value >= 0.0095 else 3}f}" if value >= 0.0005 else "<0.001"
                axes.text(value + 0.02 * end, place, words, va="center", fontsize=7)
            names = [comparison.classes[k][:14] for k in classes] if axes is row[1] else []
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.set(xlim=(0, 1.2 * end), xticks=[0, end / 2, end])  # room for the number beside a full bar
            axes.spines.bottom.set_bounds(0, end)
            axes.invert_yaxis()
            axes.tick_params(axis="x", labelsize=7)
            if softness > 1:
                axes.axvline(1 / len(comparison.classes), color="0.6", linestyle=":", linewidth=1, zorder=0)
            axes.set_title(title if number == 0 else "", fontsize=9)
            axes.set_xlabel("probability" if number == len(indices) - 1 else "", fontsize=8)
    about = (
        "students at T = 1; picked: first those that the baseline gets wrong, teacher and KD right; not a fair sample"
    )
    title = f"What the soft targets carry: test images, the teacher's {shown} likeliest classes, seed {seed}\n({about})"
    figure.suptitle(title, fontsize=10)
    return figure
