"""Does a smaller student gain more, and at which temperature? Students of several widths, of one teacher.

    python benchmarks/widths.py --teacher results/cifar10/teacher-s0

Hinton et al. (section 3) found for students with far fewer units that temperatures of 2.5 to 4 worked better than
higher and lower ones, and for others that all above 8 worked alike.

For each temperature and width it runs main.py, whose command is printed, always in the same --output-dir, so that the
soft targets are computed once and baselines are trained once. All of it can be interrupted and repeated: what is
finished is reused.

Writes to --results what main.py found of each width, width-0.5.json and so on; gains.json, paired tests by seed (the
order of images and their views are the same for all) of how much more each student gains than that of the last width,
at the first temperature, and how far the other temperatures are ahead of the first at each width; and gain.png.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from commands import run
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from reports.statistics import holm, paired_test
from reports.styles import legend, pair_style, role_line
from runs.files import make_folder, write_json
from runs.settings import pair_name

KEPT = ("settings", "environment", "teacher", "student", "baseline")  # of comparison.json, besides "kd"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, type=Path, help="folder of a finished teacher")
    parser.add_argument("--widths", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="[0.25 0.5 1]")
    parser.add_argument("--epochs", type=int, default=10, help="[10]")
    parser.add_argument("--seeds", type=int, default=5, help="[5]")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[32.0, 4.0], help="[32 4]")
    parser.add_argument("--alpha", type=float, default=0.9, help="[0.9]")
    parser.add_argument("--processes", type=int, default=1, help="that share the trainings [1]")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/widths"), help="[outputs/widths]")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "widths", help="[results/widths]")
    parser.add_argument("options", nargs="*", help="more options for main.py, after --")
    arguments = parser.parse_args()
    if arguments.seeds < 2 or len(set(arguments.widths)) < 2:
        parser.error("widths are compared over two seeds or more, and there must be two of them")
    output, results = arguments.output_dir.resolve(), arguments.results.resolve()
    names = ("epochs", "seeds", "alpha")
    words = [word for name in names for word in (f"--{name}", f"{getattr(arguments, name):g}")]
    words += ["--teacher", str(arguments.teacher.resolve()), "--output-dir", str(output), *arguments.options]
    make_folder(results)
    found = {}
    for temperature, width in itertools.product(arguments.temperatures, arguments.widths):
        pair = ["--temperature", f"{temperature:g}", "--width", f"{width:g}"]
        run("main.py", *pair, *words, processes=arguments.processes)
        comparison = json.loads((output / "comparison.json").read_text())
        earlier = found[width]["kd"] if width in found else []
        found[width] = {name: comparison[name] for name in KEPT} | {"kd": [*earlier, comparison["kd"][0]]}
        write_json(results / f"width-{width:g}.json", found[width])
    write_json(results / "gains.json", tests(found))
    draw(found.values()).savefig(results / "gain.png", dpi=150)
    print(f"\nWritten: {results}")


def tests(found):
    """The paired tests that the header names, of {width: what main.py found}, in two families, each corrected by itself
    (Holm)."""
    *others, last = found
    gains = {width: each["kd"][0]["improvement"]["by_seed"] for width, each in found.items()}
    ahead = {(width, kd["temperature"]): paired(kd["accuracies"], each["kd"][0]["accuracies"], 100)
             for width, each in found.items() for kd in each["kd"][1:]}  # fmt: skip
    more = {width: paired(gains[width], gains[last]) for width in others}
    first = found[last]["kd"][0]["temperature"]
    return {
        "gains": [{"temperature": first, "width": w, "over": last, "points": test} for w, test in corrected(more)],
        "temperatures": [
            {"width": w, "temperature": t, "over": first, "points": test} for (w, t), test in corrected(ahead)
        ],
    }


def paired(ones, others, times=1):
    """The paired test of `times` the differences, rounded so that equal ones are equal numbers."""
    return paired_test([round(times * (one - other), 9) for one, other in zip(ones, others, strict=True)])


def corrected(found):
    """Pairs of key and test of {key: test}, with p corrected for their number."""
    ps = holm([test["p_value"] for test in found.values()])
    return [(key, test | {"p_holm": p}) for (key, test), p in zip(found.items(), ps, strict=True)]


def half(test):
    """Half of the width of a paired test's interval; 0 where all differences are equal."""
    low, high = test["ci95"] or (0, 0)
    return (high - low) / 2


def draw(found):
    """The figure: accuracies and gains against the student's multiply-adds, with 95% intervals over seeds."""
    figure = Figure((9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = sorted(found, key=lambda each: each["student"]["macs"])
    macs = [each["student"]["macs"] / 1e6 for each in found]
    left.axhline(found[0]["teacher"]["accuracy"], **role_line("teacher"))
    lines = [(role_line("baseline") | {"marker": "o"}, [each["baseline"] for each in found])]
    for number, each in enumerate(zip(*(each["kd"] for each in found), strict=True)):
        color, linestyle, marker = pair_style(number)
        style = {"color": color, "linestyle": linestyle, "marker": marker, "label": f"KD, {pair_name(each[0])}"}
        lines.append((style, each))
    for number, (style, entries) in enumerate(lines):
        beside = [each * (1 + 0.05 * (number - (len(lines) - 1) / 2)) for each in macs]  # so that no bar hides another
        halves = [half(paired_test(entry["accuracies"])) for entry in entries]  # of the mean; the pairing is with 0
        left.errorbar(beside, [entry["mean"] for entry in entries], halves, capsize=3, **style)
        if number:
            gains = [entry["improvement"] for entry in entries]
            right.errorbar(beside, [gain["mean"] for gain in gains], list(map(half, gains)), capsize=3, **style)
    right.axhline(0, color="#888888", linewidth=0.8)
    left.set(ylabel="test accuracy")
    right.set(ylabel="gain with KD in points")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="million multiply-adds of the student (logarithmic)")
        axes.set_xticks(macs, [f"{each:.3g}" for each in macs])
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    legend(figure, [left], 4)
    epochs, seeds = found[0]["settings"]["epochs"], len(found[0]["baseline"]["seeds"])
    figure.suptitle(
        f"Students of {len(found)} sizes after {epochs} epoch{'s' * (epochs > 1)}; bars: 95% intervals over {seeds} "
        "seeds"
    )
    return figure


if __name__ == "__main__":
    main()
