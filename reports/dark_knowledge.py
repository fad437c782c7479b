"""The figure that shows what soft targets carry."""

import math

import numpy as np
from matplotlib.figure import Figure

from reports.statistics import softmax
from reports.styles import STYLES, broken, shortened
from runs.settings import pair_name

EXAMPLES = 3


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
    kd, baseline = comparison.kd_logits[0].argmax(1), comparison.baseline_logits[0].argmax(1)
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
        (broken(f"with KD, {pair_name(entry)}", 28), "kd", comparison.kd_logits[0], 1.0),
        ("baseline", "baseline", comparison.baseline_logits[0], 1.0),
    ]
    figure = Figure((11, 0.6 + 1.35 * len(indices)), layout="constrained")
    grid = figure.subplots(len(indices), 5, squeeze=False, width_ratios=(1, 1.5, 1.5, 1.5, 1.5))
    for number, (row, index) in enumerate(zip(grid, indices, strict=True)):
        row[0].imshow(comparison.images[index], interpolation="nearest")
        row[0].set(xticks=[], yticks=[])
        row[0].set_title(shortened(comparison.classes[comparison.labels[index]], 18), fontsize=9)
        row[0].spines[:].set_visible(False)
        classes = comparison.teacher_logits[index].argsort()[::-1][:shown]
        for axes, (title, role, logits, softness) in zip(row[1:], columns, strict=True):
            found, style = softmax(logits[indices], softness), STYLES[role]
            values, end = found[number][classes], 1.0 if found.max() > 0.5 else float(f"{found.max():.2g}")
            small = max(3, 2 - math.floor(math.log10(end)))  # digits of small values: three where the axis is short
            look = {"color": style["color"], "hatch": style["hatch"], "alpha": 0.65, "edgecolor": "black"}
            axes.barh(range(shown), values, linewidth=0.4, **look)
            for place, value in enumerate(values):
                digits = 2 if end > 0.5 and value >= 0.0095 else small
                words = f"{value:.{digits}f}" if value >= 0.5 * 10**-small else f"<{10**-small:g}"
                axes.text(value + 0.02 * end, place, words, va="center", fontsize=7)
            names = [shortened(comparison.classes[k], 14) for k in classes] if axes is row[1] else []
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
