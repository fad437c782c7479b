"""Test accuracy against the compute of training: this program's records beside the speed-run records for CIFAR-10.

    python benchmarks/compute.py    draws results/compute.png and prints its points as a table

It reads the records in results/ with three pairs or more, as far as they are of the teacher of results/cifar10, of each
length those with the lowest seeds; that teacher's history.csv; and results/other_trainings.csv.

Compute is counted alike for all: multiply-adds x 2 operations x 3 (forward, and backward twice) x images x epochs, in
PFLOP. A distilled student's is that of its own training, without its teacher's, and without the soft targets, which are
computed once for all students.
"""

import argparse
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from reports.statistics import paired_test
from reports.styles import STYLES

RESULTS = ROOT / "results"
IMAGES = 50_000  # of an epoch
CHOSEN = 4, 0.9  # temperature and alpha of the students that are drawn
PLACES = (8, 0), (-8, 0), (0, 9), (0, -9), (8, 6), (-8, 6), (8, -6), (-8, -6)  # of a name, in points from its mark
MARK = 5  # pixels from the middle of a mark to its edge


@dataclass(frozen=True)
class Point:
    """Test accuracy, the mean of `n` runs, and the half-width of its 95% interval where there are several."""

    what: str
    role: str  # teacher, kd, baseline, or "speed run"
    pflop: float
    accuracy: float
    n: int = 1
    half: float | None = None
    augmented: bool = False  # with views of the test images averaged


def pflop(macs, epochs):
    """PFLOP of a training on all images."""
    return macs * 2 * 3 * IMAGES * epochs / 1e15


def teacher(folder=RESULTS / "cifar10"):
    """The Point of a record's teacher."""
    found = json.loads((folder / "comparison.json").read_text())["teacher"]
    epochs = len((folder / "teacher-s0" / "history.csv").read_text().splitlines()) - 1
    return Point(f"teacher, {epochs} epochs", "teacher", pflop(found["macs"], epochs), found["accuracy"])


def students(record):
    """The Points of a record, a dict: students distilled with the CHOSEN temperature and alpha, and those without a
    teacher."""
    macs, epochs, (temperature, alpha) = record["student"]["macs"], record["settings"]["epochs"], CHOSEN
    (kd,) = (kd for kd in record["kd"] if (kd["temperature"], kd["alpha"]) == CHOSEN)
    points = []
    for role, entry in (("kd", kd), ("baseline", record["baseline"])):
        interval = paired_test(entry["accuracies"])["ci95"]  # of the mean; the pairing is with 0
        half = interval and (interval[1] - interval[0]) / 2
        pair = f", T={temperature:g}, alpha={alpha:g}" if role == "kd" else ""
        what = f"{STYLES[role]['label']}{pair}, {epochs} epochs"
        points.append(Point(what, role, pflop(macs, epochs), entry["mean"], len(entry["seeds"]), half))
    return points


def other_trainings():
    """The Points of results/other_trainings.csv that are to be drawn."""
    with open(RESULTS / "other_trainings.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["drawn"] == "yes"]
    numbers = [(float(row["pflop"]), float(row["accuracy"])) for row in rows]
    return [
        Point(row["what"], row["role"], *pair, augmented=row["augmented"] == "yes")
        for row, pair in zip(rows, numbers, strict=True)
    ]


def all_points():
    """The Points of the teacher of results/cifar10, of its students, and of other_trainings.csv."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("**/comparison.json"))]
    digest = json.loads((RESULTS / "cifar10" / "comparison.json").read_text())["settings"]["teacher"]
    lengths = {}
    for record in sorted(records, key=lambda each: each["baseline"]["seeds"][0]):
        if record["settings"]["teacher"] == digest and len(record["baseline"]["seeds"]) > 2:
            lengths.setdefault(record["settings"]["epochs"], record)
    return [teacher(), *(point for record in lengths.values() for point in students(record)), *other_trainings()]


def place_names(figure, axes, names, places):
    """Moves each of `names`, annotations, to that of PLACES where it covers the fewest marks, bars and other names, of
    equals the first; `places` are the marks and bars as (x, lowest y, highest y)."""
    figure.draw_without_rendering()  # only now is it known where everything lies
    ends = [axes.transData.transform([(x, low), (x, high)]) for x, low, high in places]
    taken = [Bbox(each + MARK * np.array([[-1, -1], [1, 1]])) for each in ends]

    def box(name, place):
        name.xyann = place
        name.set_horizontalalignment("center" if not place[0] else "left" if place[0] > 0 else "right")
        return name.get_window_extent()

    for name in names:
        covered = [box(name, place).count_overlaps(taken) for place in PLACES]
        taken.append(box(name, PLACES[covered.index(min(covered))]))


def draw(points):
    """The figure: accuracy against PFLOP on a logarithmic axis, every point with its name."""
    figure = Figure((10, 6.4), layout="constrained")
    axes = figure.subplots()
    markers = {"teacher": "s", "kd": "D", "baseline": "o", "speed run": "^"}
    labels = {role: style["label"] for role, style in STYLES.items()} | {"speed run": "speed runs of others"}
    colors = {role: style["color"] for role, style in STYLES.items()} | {"speed run": "#009E73"}
    labels["kd"] += ", T={:g}, alpha={:g}".format(*CHOSEN)
    named, names, places = set(), [], []
    for point in points:
        beside = {"kd": 0.97, "baseline": 1.03}.get(point.role, 1)  # both can be seen, though they cost the same
        place = point.pflop * beside
        label = labels[point.role] + (", test images also mirrored and moved" if point.augmented else "")
        axes.errorbar(
            place, point.accuracy, point.half, fmt=markers[point.role], color=colors[point.role], capsize=4,
            markerfacecolor="white" if point.augmented else colors[point.role],
            label=None if label in named else label,
        )  # fmt: skip
        named.add(label)
        name = f"{point.what.removeprefix(f'{labels[point.role]}, ')}: {point.accuracy:.4f}"
        about = {"textcoords": "offset points", "fontsize": 7, "va": "center"}
        names.append(axes.annotate(name, (place, point.accuracy), PLACES[0], **about))
        places.append((place, point.accuracy - (point.half or 0), point.accuracy + (point.half or 0)))
    axes.set(
        xscale="log",
        xlabel="PFLOP of training, with KD without those of teacher and soft targets (logarithmic)\n"
        "KD and baseline, which cost the same, are drawn 3% to either side; bars: 95% intervals over seeds",
        ylabel="test accuracy",
    )
    low, high = min(point.pflop for point in points), max(point.pflop for point in points)
    axes.set_xlim(low / 4, high * 3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    figure.suptitle("CIFAR-10: accuracy against the compute of training")
    place_names(figure, axes, names, places)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "compute.png", metavar="FILE")
    path, points = parser.parse_args().output, all_points()
    print("| what | n | PFLOP | test accuracy |\n| --- | --- | --- | --- |")
    for point in sorted(points, key=lambda point: point.pflop):
        half = f" ± {point.half:.4f}" if point.half else ""
        views = ", with views of the test images averaged" if point.augmented else ""
        print(f"| {point.what}{views} | {point.n} | {point.pflop:.3f} | {point.accuracy:.4f}{half} |")
    draw(points).savefig(path, dpi=150)
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
