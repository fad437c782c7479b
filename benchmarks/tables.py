"""Writes the tables of README.md and results/findings.md from the files in results/.

    python benchmarks/tables.py            writes them between the pages' markers
    python benchmarks/tables.py --check    ends with exit status 1 where a page shows anything else; a test runs this

A block begins with <!-- NAME --> and ends with <!-- end -->, each on a line of its own.
"""

import argparse
import csv
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import compute

import models
from reports.statistics import SIGNIFICANCE, holm
from reports.text import block
from runs.files import decode, write
from runs.settings import Settings, pair_name

RESULTS = ROOT / "results"
PAGES = ROOT / "README.md", RESULTS / "findings.md"
RECORD, COMMANDS = RESULTS / "cifar10", RESULTS / "two-commands"
REPORTED = {"Teacher Network": 0.9313, "(with KD)": 0.9022, "(Baseline)": 0.8997, "Improvement with KD": "0.25%"}
SPEEDS = [RESULTS / f"throughput-{name}.json" for name in ("cpu", "amx")]
OF_ONE_TEACHER = ("cifar10-10-epochs", "cifar10", "seeds-6-to-10", "cifar10-60-epochs", "cifar10-200-epochs")
OF_OTHERS = {  # the same students by other teachers, compared with the same baselines: these teachers' epochs
    "teacher-77-epochs": "77", "teacher-200-epochs": "200", "three-teachers": "24, 35 and 77, together",
}  # fmt: skip

TEACHERS = {  # their names in other_trainings.csv; epochs, whether squares were blanked, recipe
    "teacher, 35 epochs": (35, "no", 4), "teacher, 35 epochs, squares blanked": (35, "yes", 5),
    "teacher, 77 epochs": (77, "yes", 4), "teacher, 200 epochs": (200, "yes", 5),
}  # fmt: skip


def table(head, *rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def share(entry):
    """A mean accuracy with its standard deviation over seeds."""
    return f"{entry['mean']:.4f}" + (f" ± {entry['std']:.4f}" if entry["std"] is not None else "")


def seeds(entry):
    """Which seeds an entry has: "0 to 4", or "0"."""
    found = entry["seeds"]
    first, last = found[0], found[-1]
    if found != [*range(first, last + 1)]:
        raise ValueError(f"{found} are not seeds in a row")
    return f"{first} to {last}" if first < last else f"{first}"


def gain(improvement):
    """A gain in points, with its interval and p where there are several seeds."""
    if improvement["ci95"] is None:
        return f"{improvement['mean']:+.2f}"
    low, high = improvement["ci95"]
    return f"{improvement['mean']:+.2f} ({low:+.2f} to {high:+.2f}), p = {improvement['p_value']:.2g}"


def record(folder=RECORD):
    return json.loads((folder / "comparison.json").read_text())


def teachers():
    """The table of the teachers, each alone, and of those that were distilled together."""
    with open(RESULTS / "other_trainings.csv", newline="") as file:
        others = {row["what"]: row for row in csv.DictReader(file) if row["augmented"] == "no"}
    kept, settings = compute.teacher(RECORD), models.load(RECORD / "teacher-s0" / "model.pt").settings
    rows = {"first": [settings["epochs"], "no", settings["recipe"], kept.pflop, kept.accuracy]}
    for name, (epochs, squares, recipe) in TEACHERS.items():
        rows[name] = [epochs, squares, recipe, *(float(others[name][column]) for column in ("pflop", "accuracy"))]
    pflop = sum(rows[name][3] for name in ("first", "teacher, 35 epochs", "teacher, 77 epochs"))
    accuracy = record(RESULTS / "three-teachers")["teacher"]["accuracy"]
    together = [OF_OTHERS["three-teachers"], "", "", pflop, accuracy]
    rows = [[*row[:3], f"{row[3]:.2f}", f"{row[4]:.4f}"] for row in (*rows.values(), together)]
    return table(["epochs of the teacher", "squares blanked", "recipe", "PFLOP", "test accuracy"], *rows)


def machine(found):
    """Where a record was made."""
    made = found["environment"]
    return f"{made['device']}, {made['precision']}, torch {made['torch']}"


def printed():
    """The block that the two commands of 200 epochs printed, and beside it what the earlier program reported."""
    found = record(COMMANDS)
    settings = decode(found["settings"], Settings, COMMANDS)
    lines = block(SimpleNamespace(**found | {"settings": settings})).splitlines()
    for number, line in enumerate(lines):
        for name, reported in REPORTED.items():
            if name in line:
                lines[number] = f"{line:<44}(earlier program: {reported})"
    return "```text\n" + "\n".join(lines) + "\n```"


def results():
    """Two tables: the teachers, and their students beside the same students without a teacher."""
    found, commands = record(), record(COMMANDS)
    others = {name: record(RESULTS / name) for name in OF_OTHERS}
    first = len((RECORD / "teacher-s0" / "history.csv").read_text().splitlines()) - 1
    long = commands["settings"]["epochs"]
    students, recipes, devices, taught = [], set(), {}, set()
    for each in map(record, (RESULTS / name for name in OF_ONE_TEACHER)):
        epochs, of_all = each["settings"]["epochs"], each["baseline"]["accuracies"]
        recipes.add(each["settings"]["recipe"])
        devices |= dict.fromkeys(re.split(", then | and ", each["environment"]["device"]))
        several = sorted(each["kd"], key=lambda kd: (-kd["temperature"], -kd["alpha"]))
        students += [(epochs, first, kd, each["baseline"]) for kd in several]
        for name, who in OF_OTHERS.items():
            if others[name]["baseline"]["accuracies"] == of_all:
                students += [(epochs, who, kd, each["baseline"]) for kd in others[name]["kd"]]
                taught.add(name)
    if taught != OF_OTHERS.keys():
        raise ValueError(f"no record has the baselines of {' and '.join(OF_OTHERS.keys() - taught)}")
    tests = [kd["improvement"]["p_value"] for *_, kd, _ in students]
    shown = [p < SIGNIFICANCE for p in holm(tests)]
    students += [(long, long, kd, commands["baseline"]) for kd in commands["kd"]]
    rows = []
    for number, (epochs, who, kd, without) in enumerate(students):
        if kd["seeds"] != without["seeds"]:
            raise ValueError(f"students of {epochs} epochs, {pair_name(kd)}, have no baseline of the same seeds")
        points, p = gain(kd["improvement"]), kd["improvement"]["p_value"]
        if kd["improvement"]["ci95"] is None:
            points += f", McNemar's p = {p:.2g}"
        elif shown[number]:
            points = "**{}**, {}".format(*points.split(", "))
        pair = f"{kd['temperature']:g}", f"{kd['alpha']:g}"
        rows.append([epochs, who, *pair, seeds(kd), share(kd), share(without), points])
    (recipe,) = recipes  # of all students
    note = (
        "± is the standard deviation over seeds. Each interval and p is for its row alone; in bold are the gains that "
        f"hold for all {len(tests)} t-tests together (5%, Holm's correction). Students by [recipe "
        f"{recipe}](results/findings.md#recipes-4-and-5), a version of networks, optimizer and schedule. One teacher "
        "of each kind was trained; PFLOP: 10^15 operations of training; [why squares](#how-long-to-train). The "
        f"teacher of 35 epochs with squares taught no student; that of {first} is in the repository. In "
        f"{found['environment']['precision']}, on {'; '.join(devices)}: "
        "[which where](results/README.md)."
    )
    head = ["epochs", "teacher (its epochs)", "T", "alpha", "seeds", "with distillation", "without"]
    return "\n\n".join([teachers(), table([*head, "gain in points (95% interval)"], *rows), note])


def ratios(seconds):
    """How many times as fast each repeat was, from the times of {"textbook": [...], "ours": [...]}."""
    return [textbook / ours for textbook, ours in zip(seconds["textbook"], seconds["ours"], strict=True)]


def speed():
    """How many times as fast as the textbook loop, on each machine."""
    measured = [json.loads(path.read_text()) for path in SPEEDS]
    first, made_with = measured[0], measured[0]["environment"]
    rows = []
    for name in first["ratios"]:
        repeats = [ratios(found["seconds"][name]) for found in measured]
        cells = zip((found["ratios"][name] for found in measured), repeats, strict=True)
        rows.append([name, *(f"{middle:.1f} ({min(each):.1f} to {max(each):.1f})" for middle, each in cells)])
    machines = [found["environment"]["device"] + ", AMX" * found.get("amx", False) for found in measured]
    recipes = ", ".join(f"recipe {found['recipe']} ({name})" for found, name in zip(measured, machines, strict=True))
    return table(["times as fast", *machines], *rows) + (
        f"\n\nThis program in {made_with['precision']}, the textbook loop in float32 with SGD; torch "
        f"{made_with['torch']}; networks of {recipes}; ratios of the medians of {len(repeats[0])} "
        "repeats, in brackets the smallest and largest repeat; both loops measured in turn in one process: "
        f"`{first['command']}`, with AMX `{measured[-1]['command']}`."
    )


def few_labels(folder=RESULTS / "few-labels"):
    """Students that saw images without labels, and how far they are ahead of those that did not."""
    tests = json.loads((folder / "difference.json").read_text())
    records = [json.loads((folder / name).read_text()) for name in ("comparison.json", "longer.json")]
    if len(records[0]["classes"]) != 10:
        raise ValueError(f"{folder} is not of all classes, of which the 5,000 images with labels are a tenth")
    (first, plain, *_), epochs = records[0]["kd"], [each["settings"]["epochs"] for each in records]
    others = [(epochs[0], plain), (epochs[0], records[0]["baseline"]),
              (epochs[1], records[1]["kd"][0]), (epochs[1], records[1]["baseline"])]  # fmt: skip
    rows = [["distilled, with images without labels", epochs[0], len(first["seeds"]), share(first), ""]]
    for (length, entry), test in zip(others, tests, strict=True):
        if entry["accuracies"] != test["accuracies"][1] or first["accuracies"] != test["accuracies"][0]:
            raise ValueError(f"{folder / 'difference.json'} is not of these records")
        name = "distilled" if "temperature" in entry else "without a teacher"
        rows.append([name, length, len(entry["seeds"]), share(entry), gain(test["points"])])
    head = ["students", "epochs", "seeds", "test accuracy", "lead of the first row in points (95% interval)"]
    settings, teacher = records[0]["settings"], records[0]["teacher"]
    corrected = max(test["points"]["p_holm"] for test in tests)
    return table(head, *rows) + (
        f"\n\nTeacher: {teacher['accuracy']:.4f}, trained on the 5,000 images for {epochs[1]} epochs. T = "
        f"{settings['temperature']:g}, alpha = {settings['alpha']:g}, recipe {settings['recipe']}. ± is the standard "
        f"deviation over seeds; p corrected for the four (Holm) is at most {corrected:.2g}. {machine(records[0])}: "
        "`python benchmarks/unlabeled.py`."
    )


def other_images(folder=RESULTS / "animals"):
    """Students that saw images without labels: of the classes, or of others."""
    same, other, longer = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("comparison", "other", "longer")
    )
    of_same, of_other = (json.loads((folder / f"{name}difference.json").read_text()) for name in ("", "other_"))
    controls = [*same["kd"][1:], same["baseline"], *longer["kd"], longer["baseline"]]
    rows, epochs = [], [each["settings"]["epochs"] for each in (same, longer)]
    for name, found, tests in (("the animals", same, of_same), ("vehicles", other, of_other[1:])):
        first = found["kd"][0]
        for entry, test in zip(controls, tests, strict=True):
            if [first["accuracies"], entry["accuracies"]] != test["accuracies"]:
                raise ValueError(f"the differences in {folder} are not of its records")
        over = [gain(tests[0]["points"]), gain(tests[2]["points"])]
        rows.append([f"distilled, with images of {name} without labels", epochs[0], share(first), *over])
    for entry, length in zip(controls, (epochs[0], epochs[0], epochs[1], epochs[1]), strict=True):
        name = "distilled" if "temperature" in entry else "without a teacher"
        rows.append([name, length, share(entry), "", ""])
    lead = [f"lead over distilled of {length} epochs, in points (95% interval)" for length in epochs]
    settings, teacher, count = same["settings"], same["teacher"], len(controls[0]["seeds"])
    corrected = " and ".join(f"{max(each['points']['p_holm'] for each in tests):.2g}" for tests in (of_same, of_other))
    return table(["students", "epochs", "test accuracy", *lead], *rows) + (
        f"\n\n{count} seeds each, ± is their standard deviation. Teacher: {teacher['accuracy']:.4f}, trained on the "
        f"3,000 images for {epochs[1]} epochs. T = {settings['temperature']:g}, alpha = {settings['alpha']:g}, recipe "
        f"{settings['recipe']}. p, corrected for the comparisons of each of the first two rows by itself (Holm), is at "
        f"most {corrected}. "
        f"{machine(same)}: `python benchmarks/unlabeled.py --classes bird cat deer dog frog horse --output-dir "
        "outputs/animals --results results/animals`."
    )


NUMBERS = ("distilled", "distilled_std", "other", "other_std", "mean", "low", "high")


def paper(path=None):
    """The paper's own questions, and losses of others: each variant over what it is paired with."""
    with open(path or RESULTS / "paper.csv", newline="") as file:
        found = list(csv.DictReader(file))
    rows, p_values = [], [float(row["p_value"]) if row["p_value"] else None for row in found]
    shown = [p is not None and p < SIGNIFICANCE for p in holm(p_values)]
    for position, row in enumerate(found):
        number = {name: float(value) if value else None for name, value in row.items() if name in NUMBERS}
        one, other = (share({"mean": number[name], "std": number[f"{name}_std"]}) for name in ("distilled", "other"))
        difference = f"{number['mean']:+.2f}"
        if number["low"] is not None:  # of one seed, or of seeds that differ by nothing, there is no interval
            difference += f" ({number['low']:+.2f} to {number['high']:+.2f})"
        difference = f"**{difference}**" if shown[position] else difference
        rows.append([row["experiment"], row["what"], row["epochs"], row["n"], one, other, difference])
    head = ["students", "measured", "epochs", "seeds", "distilled", "compared with"]
    head.append("difference in points (95% interval)")
    tested = sum(p is not None for p in p_values)
    return table(head, *rows) + (
        f"\n\nMeans ± standard deviations of the seeds; teacher {float(found[0]['teacher']):.4f}. Each interval is for "
        f"its row alone; in bold are the differences that hold for all {tested} together (5%, Holm's correction)."
    )


BLOCKS = {
    "printed": printed, "results": results, "paper": paper, "few labels": few_labels, "other images": other_images,
    "speed": speed,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where a page differs")
    check = parser.parse_args().check
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    for name, make in BLOCKS.items():
        start = f"<!-- {name} -->\n"
        found = [number for number, text in enumerate(pages) for _ in range(text.count(start))]
        if len(found) != 1:
            names = " and ".join(page.name for page in PAGES)
            sys.exit(f"error: {names} have {len(found)} blocks <!-- {name} -->, but one is needed.")
        before, _, rest = pages[found[0]].partition(start)
        old, end, after = rest.partition("<!-- end -->")
        if not end or "<!-- " in old:
            sys.exit(f"error: in {PAGES[found[0]].name} the block <!-- {name} --> has no <!-- end -->.")
        pages[found[0]] = f"{before}{start}{make()}\n{end}{after}"
    for page, text in zip(PAGES, pages, strict=True):
        if text == page.read_text(encoding="utf-8"):
            continue
        if check:
            sys.exit(f"error: {page.name} differs from results/. Run: python benchmarks/tables.py")
        write(page, text)


if __name__ == "__main__":
    main()
