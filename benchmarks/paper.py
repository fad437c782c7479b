"""What of the 2015 paper holds on CIFAR-10? The experiments of arXiv 1503.02531 and two later losses, trained with
main.py, as one table with intervals.

    python main.py --train-teacher --epochs 7
    python benchmarks/paper.py --epochs 8

Every student is trained with three seeds, each distilled one paired with a baseline that sees the same images:

- all: soft targets and labels (section 2);
- labels not looked at: alpha 1, soft targets alone;
- 10% and 3% of the training images (section 6), for as many epochs as make a quarter of the optimizer's steps;
- one class left out of the transfer set (section 3), with the bias correction;
- DKD and logit standardisation (examples/), over plain distillation and over the baseline, at the same temperature and
  alpha. The authors of logit standardisation take T = 2 and weigh the KL to the cross-entropy 9 : 0.1, the KL
  multiplied by T^2 as here, which is alpha = 0.989: so the row names its temperature.

Every step is a command of main.py, which is printed. So all of it can be interrupted and repeated: what is finished is
reused; and more seeds of one experiment can be added later: --only "without bird" --seeds 5. Writes paper.json and
paper.csv to outputs/paper (--results names another folder), prints a Markdown table.
"""

import argparse
import csv
import io
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tables
from commands import run

from reports.statistics import paired_test, spread
from runs.files import make_folder, read_json, write, write_json

COLUMNS = (
    "experiment", "what", "epochs", "n", "teacher", "teacher_sha256", "distilled", "distilled_std", "other",
    "other_std", "mean", "low", "high", "p_value",
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
    standardised = f"logit standardisation at T = {temperature:g}"
    for name, loss in (("DKD", "dkd.py:dkd"), (standardised, "logit_standardisation.py:standardised")):
        found[name] = ["--epochs", epochs, *pair, "--loss", ROOT / "examples" / loss]
    return found


def rows(name, comparison):
    """The lines of the table that a comparison.json makes: dicts of COLUMNS."""
    kd, baseline = comparison["kd"][0], comparison["baseline"]
    about = {
        "experiment": name, "epochs": comparison["settings"]["epochs"], "n": len(kd["seeds"]),
        "teacher": comparison["teacher"]["accuracy"], "teacher_sha256": digest(comparison),
    }  # fmt: skip

    def row(what, test, one, other):
        low, high = test["ci95"] or (None, None)
        p_value = test["p_value"] if test["ci95"] else None  # a single pair's is of these two networks only
        return about | {
            "what": what, "distilled": one["mean"], "distilled_std": one["std"], "other": other["mean"],
            "other_std": other["std"], "mean": test["mean"], "low": low, "high": high, "p_value": p_value,
        }  # fmt: skip

    found = [row("test accuracy, over the baseline", kd["improvement"], kd, baseline)]
    for plain in comparison["kd"][1:]:
        same = (plain["temperature"], plain["alpha"]) == (kd["temperature"], kd["alpha"])
        if kd.get("loss") and not plain.get("loss") and same and plain["first_over_this"]:  # of two seeds or more
            test = plain["first_over_this"]
            one, other = (
                summary([each["accuracies"][each["seeds"].index(seed)] for seed in test["seeds"]])
                for each in (kd, plain)
            )
            found.append(row("test accuracy, over plain distillation", test, one, other) | {"n": len(test["seeds"])})
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


def digest(comparison):
    """The beginning of the SHA-256 of the teacher's weights; of several teachers those of all."""
    return "+".join(each[:12] for each in comparison["settings"]["teacher"].split("+"))


def read(path, settings):
    """The experiments that are in paper.json already: {name: what is kept of it}. Ends with a sentence where they are
    of other settings."""
    if not path.is_file():
        return {}
    kept = read_json(path)
    kept["settings"] = {"padding": 4} | kept["settings"]  # as it was before it was recorded
    if kept["settings"] != settings:
        sys.exit(f"error: {path} is of other settings: {kept['settings']}. Move it away, or choose another --results.")
    return kept["experiments"]


def same_teacher(path, done, found):
    """Ends with a sentence where the experiments `done` have another teacher than the rows `found`."""
    for name, each in done.items():
        then, now = each["rows"][0]["teacher_sha256"], found[0]["teacher_sha256"]
        if then != now:
            sys.exit(f"error: '{name}' in {path} is of another teacher, {then}, not {now}. Choose another --results.")


def summary(values):
    return {"mean": sum(values) / len(values), "std": spread(values)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8, help="of students that see all images [8]")
    parser.add_argument("--seeds", type=int, default=3, help="of each experiment, or as many as it has already [3]")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--omit", default="bird", metavar="CLASS", help="chosen before anything was trained [bird]")
    parser.add_argument("--padding", type=int, default=4, help="as for main.py, in all experiments alike [4]")
    parser.add_argument("--teacher", nargs="+", default=[], help="as for main.py [the output folder's]")
    parser.add_argument("--processes", type=int, default=1, help="that share the trainings [1]")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument("--results", type=Path, help="where the table goes [the output folder's paper]")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of them; the table keeps the others")
    parser.add_argument("options", nargs="*", help="more options for main.py, after --")
    arguments = parser.parse_args()
    arguments.results = arguments.results or arguments.output_dir / "paper"
    todo = experiments(arguments.epochs, arguments.temperature, arguments.alpha, arguments.omit)
    unknown = set(arguments.only or ()) - todo.keys()
    if unknown:
        parser.error(f"there is no experiment '{unknown.pop()}'. There are: {', '.join(todo)}")
    common = ["--dataset", arguments.dataset, "--data-dir", arguments.data_dir, "--output-dir", arguments.output_dir]
    common += ["--padding", arguments.padding]
    common += ["--teacher", *arguments.teacher] if arguments.teacher else []
    make_folder(arguments.results)
    path = arguments.results / "paper.json"
    names = ("epochs", "temperature", "alpha", "omit", "padding", "teacher", "dataset", "options")
    settings = {name: getattr(arguments, name) for name in names} | {"output_dir": str(arguments.output_dir)}
    done = read(path, settings)
    for name, options in todo.items():
        if arguments.only and name not in arguments.only:
            continue
        seeds = max(arguments.seeds, *(row["n"] for row in done.get(name, {}).get("rows", ())), 1)
        print(f"\n{name}:", end="")
        words = *common, "--seeds", seeds, *options, *arguments.options
        command = run("main.py", *words, processes=arguments.processes)
        comparison = read_json(arguments.output_dir / "comparison.json")
        found = rows(name, comparison)
        same_teacher(path, done, found)
        done[name] = {"command": command, "environment": comparison["environment"], "rows": found}
        done = {name: done[name] for name in [*todo, *done] if name in done}
        found = [row for each in done.values() for row in each["rows"]]
        write_json(path, {"settings": settings, "experiments": done})  # after each: an interruption loses nothing
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(found)
        write(arguments.results / "paper.csv", text.getvalue())
    print(f"\n{tables.paper(arguments.results / 'paper.csv')}")


if __name__ == "__main__":
    main()
