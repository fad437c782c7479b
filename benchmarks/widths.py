"""Does a smaller student gain more? Students of several widths, of one teacher, with distillation and without.

    python benchmarks/widths.py --teacher results/cifar10/teacher-s0

For each of --widths it runs main.py, whose command is printed, always in the same --output-dir, so that the soft
targets are computed once. All of it can be interrupted and repeated: what is finished is reused.

Writes to --results what main.py found of each width, width-0.5.json and so on; gains.json, how much more each student
gains than that of the last width, paired by seed (the order of images and their views are the same for all widths); and
gain.png.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from reports.statistics import holm, paired_test
from reports.styles import STYLES, legend, role_line
from runs.files import make_folder, write_json

COMPARED = ("settings", "environment", "teacher", "student", "baseline", "kd")  # what is kept of comparison.json


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, type=Path, help="folder of a finished teacher")
    parser.add_argument("--widths", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="[0.25 0.5 1]")
    parser.add_argument("--epochs", type=int, default=10, help="[10]")
    parser.add_argument("--seeds", type=int, default=5, help="[5]")
    parser.add_argument("--temperature", type=float, default=32.0, help="[32]")
    parser.add_argument("--alpha", type=float, default=0.9, help="[0.9]")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/widths"), help="[outputs/widths]")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "widths", help="[results/widths]")
    parser.add_argument("options", nargs="*", help="more options for main.py, after --")
    arguments = parser.parse_args()
    if arguments.seeds < 2 or len(set(arguments.widths)) < 2:
        parser.error("widths are compared over two seeds or more, and there must be two of them")
    output, results = arguments.output_dir.resolve(), arguments.results.resolve()
    names = ("epochs", "seeds", "temperature", "alpha")
    words = [word for name in names for word in (f"--{name}", f"{getattr(arguments, name):g}")]
    words += ["--teacher", str(arguments.teacher.resolve()), "--output-dir", str(output), *arguments.options]
    make_folder(results)
    found = []
    for width in arguments.widths:
        command = ["main.py", "--width", f"{width:g}", *words]
        print(f"\n$ python {shlex.join(command)}", flush=True)
        status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
        if status:
            sys.exit(status)
        found.append(json.loads((output / "comparison.json").read_text()))
        write_json(results / f"width-{width:g}.json", {name: found[-1][name] for name in COMPARED})
    write_json(results / "gains.json", gains(arguments.widths, found))
    draw(found).savefig(results / "gain.png", dpi=150)
    print(f"\nWritten: {results}")


def gains(widths, found):
    """How much more, in points, the students of each width gain than those of the last: paired tests."""
    *others, last = [each["kd"][0]["improvement"]["by_seed"] for each in found]
    tests = [paired_test([one - other for one, other in zip(each, last, strict=True)]) for each in others]
    corrected = holm([test["p_value"] for test in tests])
    return [
        {"width": width, "over": widths[-1], "points": test | {"p_holm": p}}
        for width, test, p in zip(widths, tests, corrected, strict=False)
    ]


def half(test):
    """Half of the width of a paired test's interval; 0 where all differences are equal."""
    low, high = test["ci95"] or (0, 0)
    return (high - low) / 2


def draw(found):
    """The figure: accuracies and gain against the student's multiply-adds, with 95% intervals over seeds."""
    figure = Figure((9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = sorted(found, key=lambda each: each["student"]["macs"])
    macs = [each["student"]["macs"] / 1e6 for each in found]
    distilled, without = [each["kd"][0] for each in found], [each["baseline"] for each in found]
    for role, entries in (("kd", distilled), ("baseline", without)):
        halves = [half(paired_test(entry["accuracies"])) for entry in entries]  # of the mean; the pairing is with 0
        beside = [each * (0.97 if role == "kd" else 1.03) for each in macs]  # so that both bars can be seen
        left.errorbar(beside, [entry["mean"] for entry in entries], halves, marker="o", capsize=4, **role_line(role))
    left.axhline(found[0]["teacher"]["accuracy"], **role_line("teacher"))
    tests, color = [entry["improvement"] for entry in distilled], STYLES["kd"]["color"]
    right.errorbar(macs, [test["mean"] for test in tests], list(map(half, tests)), marker="D", capsize=4, color=color)
    for place, test in zip(macs, tests, strict=True):
        right.plot([place * 1.06] * len(test["by_seed"]), test["by_seed"], ".", color=color, alpha=0.5)
    right.axhline(0, color="#888888", linewidth=0.8)
    left.set(ylabel="test accuracy")
    right.set(ylabel="gain with KD in points (dots: seeds)")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="million multiply-adds of the student (logarithmic)")
        axes.set_xticks(macs, [f"{each:.3g}" for each in macs])
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    legend(figure, [left], 3)
    epochs, kd = found[0]["settings"]["epochs"], distilled[0]
    figure.suptitle(
        f"Students of {len(found)} sizes after {epochs} epoch{'s' * (epochs > 1)}, T = {kd['temperature']:g}, alpha = "
        f"{kd['alpha']:g}; bars: 95% intervals over {len(kd['seeds'])} seeds"
    )
    return figure


if __name__ == "__main__":
    main()
