"""What of the 2015 paper holds on CIFAR-10? The experiments of arXiv 1503.02531 and two later losses, trained with
main.py, as one table with intervals.

    python main.py --train-teacher --epochs 7
    python benchmarks/paper.py --epochs 8

Every student is trained with three seeds, each distilled one paired with a baseline that sees the same images:

- all: soft targets and labels (section 2);
- labels not looked at: alpha 1, soft targets alone;
- 10% and 3% of the training images (section 5), for as many epochs as make a quarter of the optimizer's steps;
- one class left out of the transfer set (section 3), with the bias correction;
- DKD and logit standardisation (examples/), over plain distillation and over the baseline.

Every step is a command of main.py, which is printed. So all of it can be interrupted and repeated: what is finished is
reused. Writes results/paper.json and results/paper.csv (--results names another folder), prints a Markdown table.
"""

import argparse
import csv
import io
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from reports.statistics import paired_test
from runs.files import make_folder, read_json, write, write_json

COLUMNS = (
    "experiment", "what", "epochs", "n", "teacher", "distilled", "distilled_std", "other", "other_std", "mean",
    "low", "high", "p_value",
)  # fmt: skip


def fewer(epochs, fraction):
    """How many epochs of `fraction` of the images make a quarter of the steps of `epochs` of all."""
    return math.ceil(epochs / (4 * fraction))


def experiments(epochs, temperature, alpha, omitted):
    """{name: options of main.py}."""
    pair = ["--temperature", temperature, "--alpha", alpha]
    found = {"all": ["--epochs", epochs, *pair]}
    found["labels not looked at"] = ["--epochs", epochs, "--temperature", temperature, "--alpha", 1]
    for fraction in (0.1, 0.03):
        found[f"{fraction:.0%} of the images"] = [
            "--epochs", fewer(epochs, fraction), *pair, "--train-fraction", fraction,
        ]  # fmt: skip
    found[f"without {omitted}"] = ["--epochs", epochs, *pair, "--omit-class", omitted]
    for name, loss in (("DKD", "dkd.py:dkd"), ("logit standardisation", "logit_standardisation.py:standardised")):
        found[name] = ["--epochs", epochs, *pair, "--loss", ROOT / "examples" / loss]
    return found


def rows(name, comparison):
    """The lines of the table that a comparison.json makes: dicts of COLUMNS."""
    kd, baseline = comparison["kd"][0], comparison["baseline"]
    about = {
        "experiment": name, "epochs": comparison["settings"]["epochs"], "n": len(kd["seeds"]),
        "teacher": comparison["teacher"]["accuracy"],
    }  # fmt: skip

    def row(what, test, one, other):
        low, high = test["ci95"] or (None, None)
        return about | {
            "what": what, "distilled": one["mean"], "distilled_std": one["std"], "other": other["mean"],
            "other_std": other["std"], "mean": test["mean"], "low": low, "high": high, "p_value": test["p_value"],
        }  # fmt: skip

    found = [row("test accuracy, over the baseline", kd["improvement"], kd, baseline)]
    for plain in comparison["kd"][1:]:
        same = (plain["temperature"], plain["alpha"]) == (kd["temperature"], kd["alpha"])
        if kd.get("loss") and not plain.get("loss") and same and plain["first_over_this"]:  # of two seeds or more
            found.append(row("test accuracy, over plain distillation", plain["first_over_this"], kd, plain))
    if "omitted" in kd:
        classes = " and ".join(kd["omitted"]["classes"])
        for key, what in (
            ("accuracies", f"accuracy on {classes}"),
            ("corrected_accuracies", f"accuracy on {classes}, bias corrected"),
            ("corrected_accuracies_on_all", "test accuracy, bias corrected"),
        ):
            one, other = kd["omitted"][key], baseline["omitted"][key]
            test = paired_test([100 * (a - b) for a, b in zip(one, other, strict=True)])
            found.append(row(what, test, summary(one), summary(other)))
    return found


def summary(values):
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None
    return {"mean": mean, "std": deviation}


def markdown(found):
    """The table of all rows."""

    def share(row, name):
        deviation = row[f"{name}_std"]
        return f"{row[name]:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")

    lines = ["| experiment | what | epochs | n | distilled | without, or plain | difference in points (95% interval) |"]
    lines.append("| --- " * 7 + "|")
    for row in found:
        gain = f"{row['mean']:+.2f}"
        if row["low"] is not None:
            gain += f" ({row['low']:+.2f} to {row['high']:+.2f}), p = {row['p_value']:.2g}"
        cells = [row[key] for key in ("experiment", "what", "epochs", "n")]
        cells += [share(row, "distilled"), share(row, "other"), gain]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8, help="of students that see all images [8]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--omit", default="bird", metavar="CLASS", help="chosen before anything was trained [bird]")
    parser.add_argument("--teacher", nargs="+", default=[], help="as for main.py [the output folder's]")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where the table goes [results]")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of them; the table keeps the others")
    parser.add_argument("options", nargs="*", help="more options for main.py, after --")
    arguments = parser.parse_args()
    todo = experiments(arguments.epochs, arguments.temperature, arguments.alpha, arguments.omit)
    unknown = set(arguments.only or ()) - todo.keys()
    if unknown:
        parser.error(f"there is no experiment '{unknown.pop()}'. There are: {', '.join(todo)}")
    common = ["--dataset", arguments.dataset, "--data-dir", arguments.data_dir, "--output-dir", arguments.output_dir]
    common += ["--seeds", arguments.seeds, *(["--teacher", *arguments.teacher] if arguments.teacher else [])]
    make_folder(arguments.results)
    path = arguments.results / "paper.json"
    names = ("epochs", "seeds", "temperature", "alpha", "omit", "dataset", "options")
    settings = {name: getattr(arguments, name) for name in names}
    before = read_json(path) if path.is_file() else {"settings": settings, "experiments": {}}
    if before["settings"] != settings:
        sys.exit(f"error: {path} is of other settings: {before['settings']}. Remove it, or choose another --results.")
    done = before["experiments"]
    for name, options in todo.items():
        if arguments.only and name not in arguments.only:
            continue
        words = [str(word) for word in (*common, *options, *arguments.options)]
        command = f"python main.py {shlex.join(words)}".replace(f"{ROOT}{os.sep}", "")
        print(f"\n{name}: {command}", flush=True)
        status = subprocess.run([sys.executable, str(ROOT / "main.py"), *words]).returncode
        if status:
            sys.exit(status)
        comparison = read_json(arguments.output_dir / "comparison.json")
        done[name] = {"command": command, "environment": comparison["environment"], "rows": rows(name, comparison)}
        done = {name: done[name] for name in [*todo, *done] if name in done}
        found = [row for each in done.values() for row in each["rows"]]
        write_json(
            path, {"settings": settings, "experiments": done}
        )  # after each, so that an interruption loses nothing
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(found)
        write(arguments.results / "paper.csv", text.getvalue())
    print(f"\n{markdown([row for each in done.values() for row in each['rows']])}")


if __name__ == "__main__":
    main()
