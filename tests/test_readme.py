"""What the README promises is so."""

import csv
import json
import re
import shlex
import statistics
import subprocess
import sys

import pytest
import scipy.stats
from conftest import ROOT

import main
import models
import train

README = (ROOT / "README.md").read_text()
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_first_fence_is_two_self_contained_lines():
    lines = FENCES[0][1].splitlines()
    assert len(lines) == 2
    assert all("python -m venv" in line and "pip install" in line for line in lines)
    assert lines[0].endswith("main.py --demo") and "pytest" in lines[1]


def test_every_command_is_one_that_the_program_takes():
    commands = re.findall(r"^(?:.*&& )?\S*python main\.py (.*)$", "\n".join(text for _, text in FENCES), re.MULTILINE)
    assert len(commands) > 6
    for words in commands:
        main.parse(shlex.split(words))


def test_every_option_named_exists():
    of_others = {"--index-url", "--pictures", "--repeats"}  # of pip and throughput.py
    known = set(main.parser()._option_string_actions) | of_others
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def test_the_snippet_classifies_a_picture(finished, pictures, tmp_path):
    (snippet,) = (text for kind, text in FENCES if kind == "python")
    assert len(snippet.strip().splitlines()) <= 12
    picture = next((pictures / "test" / "red").iterdir())
    snippet = snippet.replace("outputs/pets/kd-T4-a0.9-s0/model.pt", str(finished / "kd-T4-a0.1-s0" / "model.pt"))
    script = tmp_path / "snippet.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + snippet.replace("photo.jpg", str(picture)))
    done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    rows = re.findall(r"^ *([\d.]+)%  (\w+)$", done.stdout, re.MULTILINE)
    assert not done.stderr
    assert len(rows) == 3 and {name for _, name in rows} == {"blue", "green", "red"}
    assert abs(sum(float(share) for share, _ in rows) - 100) < 0.3


def test_the_output_files_are_those_of_the_table(finished):
    rows = re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)
    named = {name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    there = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert there <= named and named - there == {"selection"}


def test_the_requirements_are_what_the_modules_import():
    required = {re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    imported = set()
    for path in ROOT.glob("*.py"):
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
    own = {path.stem for path in ROOT.glob("*.py")}
    others = {{"PIL": "pillow"}.get(name, name) for name in imported - own - set(sys.stdlib_module_names)}
    assert others == required


RECORD = ROOT / "results" / "jpeg-cpu"
THREE = ROOT / "results" / "jpeg-cpu-ensemble"
EARLIER = {epochs: ROOT / "results" / "earlier" / f"{epochs}-epochs" for epochs in (8, 24, 20)}
NOTES = " ".join((ROOT / "results" / "README.md").read_text().split())


def comparison(folder):
    return json.loads((folder / "comparison.json").read_text())


def gain(test):
    low, high = test["ci95"]
    return f"{test['mean']:+.2f} ({low:+.2f} to {high:+.2f})"


def by_seed(gains):
    return ", ".join(f"{gain:+.2f}" for gain in gains)


def spread(entry):
    return f"{len(entry['accuracies'])} | {entry['mean']:.4f} ± {entry['std']:.4f}"


def results_rows(record):
    """The rows of the README's table of a record's results and its row beside others', from what the program wrote."""
    teacher, baseline, epochs = record["teacher"]["accuracy"], record["baseline"], record["settings"]["epochs"]
    alone = sorted(record["teacher"].get("members", [teacher]))
    several = len(alone) > 1
    who = "teacher"
    if several:
        who = f"three teachers together (each alone {', '.join(f'{each:.4f}' for each in alone)})"
    results = [f"| {who} | 1 | {teacher:.4f} | | |"]
    for kd in record["kd"]:
        test = kd["improvement"]
        pair = f"T = {kd['temperature']:g}, alpha = {kd['alpha']:g}"
        results.append(f"| student with KD, {pair} | {spread(kd)} | {gain(test)} | {test['p_value']:.2g} |")
    results.append(f"| baseline | {spread(baseline)} | | |")
    kd = record["kd"][0]
    three = "three teachers, " if several else ""
    this = (
        f"| this program, JPEG copy, {three}T = {kd['temperature']:g}, alpha = {kd['alpha']:g} | {epochs} | "
        f"{len(kd['seeds'])} | {teacher:.4f} | {kd['mean']:.4f} | {baseline['mean']:.4f} | {gain(kd['improvement'])} |"
    )
    return results, this


def ablation_rows(record, fixed):
    """What the best pair is ahead of the same with one choice taken away."""
    _, sharp, users = record["kd"]
    rows = []
    for words, seeds, test in (
        ("alpha 0.1, the default", users["first_over_this"]["seeds"], users["first_over_this"]),
        ("temperature 1", sharp["first_over_this"]["seeds"], sharp["first_over_this"]),
        ("soft targets of the clean pictures, the same in every epoch", fixed["seeds"], fixed["shared_over_fixed"]),
    ):
        rows.append(f"| {words} | {len(seeds)} | {gain(test)} | {test['p_value']:.2g} |")
    return rows


def test_the_results_are_those_recorded():
    section = README.split("## Results")[1].split("\n## ")[0]
    tables = [
        re.findall(r"^\|.*", table, re.MULTILINE)[2:] for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    ]
    record, fixed = comparison(RECORD), json.loads((RECORD / "fixed.json").read_text())
    results, this = results_rows(record)
    three = comparison(THREE)
    results_of_three, this_of_three = results_rows(three)
    assert tables[0] == results and tables[1] == ablation_rows(record, fixed) and tables[2] == results_of_three
    assert tables[3][-2:] == [this, this_of_three]

    words = " ".join(section.split())
    for epochs, folder in EARLIER.items():
        earlier = comparison(folder)
        kd, without = earlier["kd"][0], earlier["baseline"]["mean"]
        told = f"{kd['mean']:.4f} with and {without:.4f} without, {gain(kd['improvement'])}, n = {len(kd['seeds'])}"
        assert f"{epochs} epochs {told}" in words
    short, before = json.loads((EARLIER[8] / "fixed.json").read_text()), comparison(EARLIER[20])["kd"][1]["improvement"]
    assert f"8 epochs ({gain(short['shared_over_fixed']).replace(' (', ', ')}; Beyer" in words
    assert f"20 epochs the gain at 0.1 was as large, {gain(before).replace(' (', ' points (')}" in words
    assert f"{gain(fixed['fixed_over_baseline']).replace(' (', ' points (')} over the baseline." in words
    best, _, users = record["kd"]
    for measure in ("calibration_error", "negative_log_likelihood"):
        means = (statistics.mean(entry[measure]) for entry in (record["baseline"], users, best))
        assert ", ".join(f"{mean:.3f}" for mean in means) in words


def test_three_teachers_are_ahead_of_one_as_the_readme_says():
    one, three = (comparison(folder) for folder in (RECORD, THREE))
    assert three["baseline"]["accuracies"] == one["baseline"]["accuracies"]
    for kd in three["kd"]:
        (other,) = (e for e in one["kd"] if (e["temperature"], e["alpha"]) == (kd["temperature"], kd["alpha"]))
        seeds = [seed for seed in kd["seeds"] if seed in other["seeds"]]
        pairs = [[e["accuracies"][e["seeds"].index(seed)] for seed in seeds] for e in (kd, other)]
        test = scipy.stats.ttest_rel(*pairs)
        low, high = (100 * limit for limit in test.confidence_interval(0.95))
        mean = 100 * (statistics.mean(pairs[0]) - statistics.mean(pairs[1]))
        words = f"{mean:+.2f} points ({low:+.2f} to {high:+.2f}; p = {test.pvalue:.2g}, n = {len(seeds)}) at alpha "
        assert f"{words}{kd['alpha']:g}" in " ".join(README.split()), words
    for measure, words in (("calibration_error", "error is"), ("negative_log_likelihood", "log-likelihood")):
        with_one, with_three = (statistics.mean(record["kd"][0][measure]) for record in (one, three))
        assert with_three < with_one and f"{words} {with_three:.3f}" in " ".join(README.split())
    first, second = (record["kd"][0]["improvement"]["mean"] for record in (one, three))
    claim = f"gains {first:.2f} points of test accuracy, with three that answer together {second:.2f}, five paired"
    assert claim in " ".join(README.split())


def test_the_record_of_three_teachers_is_the_one_planned_before_it():
    one, three = (comparison(folder) for folder in (RECORD, THREE))
    seeds = {(kd["temperature"], kd["alpha"]): kd["seeds"] for kd in three["kd"]}
    assert seeds[4, 0.9] == [0, 1, 2, 3, 4] and seeds[4, 0.1][:3] == [0, 1, 2] and len(seeds) == 2
    teachers = three["settings"]["teacher"].split("+")
    assert len(teachers) == len(three["teacher"]["members"]) == 3 and one["settings"]["teacher"] in teachers
    assert three["settings"] == one["settings"] | {"teacher": "+".join(sorted(teachers))}
    assert comparison(THREE / "seed-5")["kd"][0]["seeds"] == [5]
    ends = []
    for seed in range(3):
        with open(THREE / f"teacher-s{seed}" / "history.csv", newline="") as file:
            ends.append(f"{float(list(csv.DictReader(file))[-1]['train_accuracy']):.3f}")
    assert f"on their augmented training pictures they end at {ends[0]}, {ends[1]} and {ends[2]}." in NOTES


def test_the_record_is_the_one_planned_before_it():
    record, fixed = comparison(RECORD), json.loads((RECORD / "fixed.json").read_text())
    pairs = {(kd["temperature"], kd["alpha"]): kd["seeds"] for kd in record["kd"]}
    assert pairs == {(4, 0.9): [0, 1, 2, 3, 4], (1, 0.9): [0, 1, 2], (4, 0.1): [0, 1, 2]}
    assert (fixed["temperature"], fixed["alpha"], fixed["seeds"]) == (4, 0.9, [0, 1, 2])
    assert comparison(RECORD / "seed-5")["kd"][0]["seeds"] == [5]
    assert record["settings"]["epochs"] == 24 and record["settings"]["recipe"] == train.RECIPE
    assert record["environment"]["precision"] == "bf16"


@pytest.mark.parametrize("folder", [RECORD, THREE, *EARLIER.values()], ids=lambda folder: folder.name)
def test_the_histories_are_of_the_epochs_named(folder):
    def epochs(run):
        return len((folder / run / "history.csv").read_text().splitlines()) - 1

    record = comparison(folder)
    runs = {"baseline": record["baseline"]}
    runs |= {f"kd-T{kd['temperature']:g}-a{kd['alpha']:g}": kd for kd in record["kd"]}
    assert all(len(entry["seeds"]) >= 3 for entry in runs.values())
    lengths = {epochs(f"{role}-s{seed}") for role, entry in runs.items() for seed in entry["seeds"]}
    assert lengths == {record["settings"]["epochs"]}
    assert len({epochs(each.name) for each in folder.glob("teacher-s*")}) == 1
    words = f"teacher {epochs('teacher-s0')} epochs, students {record['settings']['epochs']}"
    assert words in " ".join((README + NOTES).lower().split())


def test_the_notes_on_the_records_are_those_recorded():
    for folder in (RECORD, THREE, *EARLIER.values()):
        for entry in comparison(folder)["kd"]:
            gains, pair = by_seed(entry["improvement"]["by_seed"]), f"T = {entry['temperature']:g} and alpha"
            endings = (" points", f" at alpha {entry['alpha']:g}", f" at {pair} {entry['alpha']:g}")
            assert any(gains + ending in NOTES for ending in endings), gains
    fixed = json.loads((RECORD / "fixed.json").read_text())
    pairs = zip(fixed["shared"]["accuracies"], fixed["fixed"]["accuracies"], strict=True)
    assert f"{by_seed(100 * (a - b) for a, b in pairs)} over the logits of the clean pictures" in NOTES


@pytest.mark.parametrize("folder", [RECORD, THREE, EARLIER[8]], ids=lambda folder: folder.name)
def test_another_seed_is_inside_the_spread(folder):
    record, another = comparison(folder), comparison(folder / "seed-5")
    kd, baseline, sixth = another["kd"][0], another["baseline"], another["kd"][0]["improvement"]["mean"]
    assert not set(kd["seeds"]) & set(record["kd"][0]["seeds"]) and kd["alpha"] == record["kd"][0]["alpha"]
    assert f"{kd['mean']:.4f} with KD at alpha 0.9, {baseline['mean']:.4f} without, a gain of {sixth:+.2f}" in NOTES
    five = record["kd"][0]["improvement"]["by_seed"]
    reach = scipy.stats.t.ppf(0.975, 4) * statistics.stdev(five) * (1 + 1 / 5) ** 0.5
    low, high = statistics.mean(five) - reach, statistics.mean(five) + reach
    assert low < sixth < high and f"between {low:+.2f} and {high:+.2f} (95% prediction" in NOTES


def test_the_longer_records_teacher_is_that_recorded():
    folder = EARLIER[24] / "teacher-s0"
    accuracy = json.loads((folder / "run.json").read_text())["accuracy"]
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    words = f"{accuracy:.4f} on the test pictures, {float(rows[-1]['train_accuracy']):.3f} on its augmented"
    assert len(rows) == 20 and words in NOTES


def test_the_sizes_of_the_networks_are_those_of_the_readme():
    (parameters, macs), (few, cheap) = (models.costs(name, 10, 32) for name in ("teacher", "student"))
    words = (
        f"{parameters / 1e6:.2f} million parameters and takes {macs / 1e6:.0f} million multiply-adds a picture, the "
    )
    assert words + f"student {few / 1e6:.2f} and {cheap / 1e6:.0f} million" in " ".join(README.split())


def test_the_recipes_tried_are_those_measured():
    """In the order of the file, without the words that the text over a table says of every row of it."""
    text = (ROOT / "results" / "README.md").read_text()
    measured = {}
    with open(ROOT / "results" / "recipes.csv", newline="") as file:
        for row in csv.DictReader(file):
            recipe = row["recipe"].replace(" pictures=15000", "")
            if row["precision"] == "fp32":
                recipe = re.sub(r" ?(widths=32,64/64,96/96,128|depth=1)$", "", recipe)
            table = measured.setdefault((row["architecture"], row["precision"]), [])
            table.append((recipe or '""', row["val_accuracy"]))
    groups = [("student", "bf16"), ("teacher", "bf16"), ("student", "fp32"), ("teacher", "fp32")]
    assert sum(map(len, measured.values())) > 30
    rows = [row for group in groups for row in measured[group]]
    assert re.findall(r"^\| `(.*?)` \| ([\d.]+) \|", text, re.MULTILINE) == rows


def test_the_learning_rate_is_as_good_for_the_baseline_as_the_readme_says():
    with open(ROOT / "results" / "recipes.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["precision"], row["epochs"]) == ("bf16", "16")]
    accuracy = {row["recipe"]: row["val_accuracy"] for row in rows}
    kd = "teacher=TEACHER temperature=4 alpha=0.9"
    told = f"{accuracy['lr=0.1']} instead of {accuracy['']} for the baseline, {accuracy[f'lr=0.1 {kd}']} instead of "
    assert told + f"{accuracy[kd]} with KD" in " ".join(README.split())
    gains = [float(accuracy[f"{rate}{kd}"]) - float(accuracy[rate.strip()]) for rate in ("", "lr=0.1 ")]
    assert f"the gain would be {100 * (gains[0] - gains[1]):.1f} points smaller" in " ".join(README.split())


def test_the_speeds_are_those_measured():
    measured = json.loads((ROOT / "results" / "throughput-cpu.json").read_text())
    table = README.split("## How fast")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| (.*?) \| ([\d.]+) \|$", table, re.MULTILINE))
    assert rows == {name: f"{ratio:.1f}" for name, ratio in measured["ratios"].items()}
    assert f"({measured['kd_kept_over_baseline']:.3f} of it" in table
    made_with = measured["environment"]
    assert (made_with["device"], made_with["precision"]) == ("Intel(R) Xeon(R) Processor, 2 cores", "bf16")
    assert measured["recipe"] == train.RECIPE and measured["command"] in table
    step = measured["student_step_ms"]
    assert f"{step['compiled']:.0f} ms against {step['eager']:.0f}" in " ".join(table.split())
    start = statistics.median(measured["start_up"]["command_to_first_step"])
    assert f"{start:.1f} s from the command to the first step" in " ".join(table.split())
