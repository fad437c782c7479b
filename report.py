"""Results: what finished runs say, as the printed block and table, comparison.json, comparison.csv and figures.

Everything comes from what runs keep (their test logits), without PyTorch, data or training, so that a folder can be
reported again at any time.
"""

import csv
import io
import math
import sys
from pathlib import Path

import numpy as np

from files import (
    Damaged,
    Failure,
    load_array,
    load_arrays,
    make_folder,
    pair_name,
    read_json,
    run_name,
    save_arrays,
    write,
    write_json,
)  # fmt: skip
from measures import (
    POWER,
    SIGNIFICANCE,
    SMALL_GAIN,
    calibration_error,
    class_accuracies,
    mcnemar_test,
    negative_log_likelihood,
    paired_test,
    seeds_needed,
    softmax,
    spread,
)  # fmt: skip

# What a folder holds -------------------------------------------------------------------------------------------------


def keep_test_set(output, data, teachers):
    """Keeps what a report needs besides the runs: the test pictures and labels, and the test logits of `teachers`, a
    dict of digests and networks."""
    from train import evaluate

    folder = Path(output) / "data"
    make_folder(folder)
    test = _test_path(output, data.digest)
    if not _whole(test):
        save_arrays(
            test,
            pictures=data.test_pictures.cpu().numpy(),
            labels=data.test_labels.cpu().numpy(),
            classes=np.array(data.classes),
        )
    for digest, teacher in teachers.items():
        path = _teacher_path(output, digest, data.digest)
        if not _whole(path):
            logits = evaluate(teacher, data.test_pictures, data.mean, data.std)
            save_arrays(path, logits=logits.cpu().numpy())


def _whole(path):
    try:
        return path.is_file() and bool(load_arrays(path))
    except Damaged:
        return False


def _test_path(output, data_digest):
    return Path(output) / "data" / f"test-{data_digest[:16]}.npz"


def _teacher_path(output, teacher_digest, data_digest):
    return Path(output) / "data" / f"teacher-{teacher_digest[:16]}-{data_digest[:16]}.npz"


def finished_runs(folder):
    """{(role, temperature, alpha, seed): record} of the finished runs in `folder`; a record is run.json's content with
    the run's folder as `folder`. A record that is damaged is named on standard error and left out."""
    runs = {}
    for path in sorted(Path(folder).glob("*/run.json")):
        if (path.parent / "model.pt").is_file():
            try:
                record = _record(path)
            except Failure as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            settings = record["settings"]
            key = settings["role"], settings["temperature"], settings["alpha"], settings["seed"]
            if record["finished"] and path.parent.name == run_name(settings):  # not a copy under another name
                runs[key] = record | {"folder": path.parent}
    return runs


def _record(path):
    """The content of a run.json; raises Damaged where a report could not rely on it."""
    record = read_json(path)

    def need(place, name, *kinds):
        if type(place.get(name)) not in kinds:
            raise Damaged(f"{path} is damaged: its '{name}' is missing or of a wrong kind.")
        return place[name]

    settings = need(record, "settings", dict)
    for name, kinds in {
        "role": (str,), "data": (str,), "epochs": (int,), "batch_size": (int,), "seed": (int,),
        "val_fraction": (float,), "temperature": (float, type(None)), "alpha": (float, type(None)),
        "teacher": (str, type(None)),
    }.items():  # fmt: skip
        need(settings, name, *kinds)
    if settings["role"] == "kd":
        need(settings, "teacher", str)
    if need(record, "finished", bool):
        need(record, "environment", dict)
        need(record, "seconds", float)
        for name in ("teacher", "student"):
            for count in ("parameters", "macs"):
                need(need(need(record, "costs", dict), name, dict), count, int)
        share = need(record, "val_accuracy" if settings["val_fraction"] else "accuracy", float)
        if not 0 <= share <= 1:
            raise Damaged(f"{path} is damaged: its accuracy is {share}.")
        if not settings["val_fraction"]:
            need(record, "test_logits_sha256", str)
    return record


def best_pair(output, pairs, seeds):
    """The (temperature, alpha) of `pairs` with the best mean validation accuracy over `seeds`; the first of equals."""
    runs = finished_runs(Path(output) / "selection")
    return max(pairs, key=lambda pair: np.mean([runs["kd", *pair, seed]["val_accuracy"] for seed in seeds]))


def agree(one, other, apart=frozenset()):
    """Whether two students' runs differ at most in what distillation is (and in the settings `apart`), and have the
    same teacher where both have one."""
    odd = {"role", "temperature", "alpha", "teacher", "seed"} | apart
    teachers = {one["settings"]["teacher"], other["settings"]["teacher"]} - {None}
    same = all(other["settings"].get(name) == value for name, value in one["settings"].items() if name not in odd)
    return same and len(teachers) < 2


def _logits(record, shape):
    """A run's float32 test logits; raises Damaged unless they have `shape` and are finite."""
    path = record["folder"] / "test_logits.npy"
    return _checked(path, load_array(path, record["test_logits_sha256"]), shape)


def _checked(path, logits, shape):
    if logits.shape != shape or logits.dtype != np.float32 or not np.isfinite(logits).all():
        raise Damaged(f"{path} is damaged: it does not hold {shape[0]} x {shape[1]} logits.")
    return logits


def _measures(logits, labels, classes):
    return {
        "calibration_error": calibration_error(softmax(logits), labels),
        "negative_log_likelihood": negative_log_likelihood(logits, labels),
        "class_accuracies": class_accuracies(logits, labels, classes),
    }


def _students(records, labels, classes, teacher_logits):
    """What comparison.json says of the students of several seeds, and their logits."""
    logits = [_logits(record, teacher_logits.shape) for record in records]
    accuracies = [record["accuracy"] for record in records]
    measures = [_measures(each, labels, classes) for each in logits]
    by_class = np.array([m["class_accuracies"] for m in measures], dtype=float)
    return {
        "seeds": [record["settings"]["seed"] for record in records],
        "accuracies": accuracies,
        "mean": float(np.mean(accuracies)),
        "std": spread(accuracies),
        "agreement_with_teacher": [float((each.argmax(1) == teacher_logits.argmax(1)).mean()) for each in logits],
        "calibration_error": [m["calibration_error"] for m in measures],
        "negative_log_likelihood": [m["negative_log_likelihood"] for m in measures],
        "class_accuracies": [None if math.isnan(v) else v for v in by_class.mean(0).tolist()],
        "seconds": [record["seconds"] for record in records],
    }, logits


class Comparison:
    """All that the finished runs of an output folder say, for one teacher."""

    def __init__(self, output, asked=None):
        """`asked` is {"temperature", "alpha", "seeds"}; without it those of the comparison before, or of the first
        students that have a baseline.

        Raises Failure where there is nothing to compare.
        """
        self.output = Path(output)
        runs = finished_runs(self.output)
        asked = asked or self._asked_before(runs)
        pair, seeds = (asked["temperature"], asked["alpha"]), asked["seeds"]
        self.first = runs.get(("kd", *pair, seeds[0]))
        fitting = {key: run for key, run in runs.items() if self.first and agree(self.first, run)}
        wanted = [key for seed in seeds for key in (("kd", *pair, seed), ("baseline", None, None, seed))]
        missing = next((key for key in wanted if key not in fitting), None)
        if missing:
            name = run_name(dict(zip(("role", "temperature", "alpha", "seed"), missing, strict=True)))
            raise Failure(
                f"{self.output} holds no finished {name} that fits this comparison.\n"
                "The command that trains it again (or continues it) prints the comparison, too."
            )
        self.settings, self.environment = self.first["settings"], self.first["environment"]
        self._read_test_set()
        baselines = {key[3]: run for key, run in fitting.items() if key[0] == "baseline"}
        students = {key: run for key, run in fitting.items() if key[0] == "kd"}
        self.runs = self._teacher_runs(runs)
        self.baseline, self.baseline_logits = self._several([baselines[seed] for seed in seeds])
        self.kd, self.kd_logits = [], []
        self._add(*pair, seeds, students, baselines)
        for temperature, alpha in sorted({key[1:3] for key in students} - {pair}):
            shared = [seed for seed in sorted(baselines) if ("kd", temperature, alpha, seed) in students]
            if shared:
                self._add(temperature, alpha, shared, students, baselines)
        self.teacher = {
            "accuracy": float((self.teacher_logits.argmax(1) == self.labels).mean()),
            "members": [float((each.argmax(1) == self.labels).mean()) for each in self.member_logits],
            **{name: len(self.member_logits) * count for name, count in self.first["costs"]["teacher"].items()},
            **_measures(self.teacher_logits, self.labels, len(self.classes)),
        }
        self.student = dict(self.first["costs"]["student"])
        self.selection = self._selection()

    def _teacher_runs(self, runs):
        """The teachers' runs, those that are in this output folder."""
        found = (r for r in runs.values() if r["settings"]["role"] == "teacher")
        return [r for r in found if r.get("weights_sha256") in self.settings["teacher"].split("+")]

    def _asked_before(self, runs):
        path = self.output / "comparison.json"
        if path.is_file():
            try:
                before = read_json(path)["kd"][0]
                asked = {name: before[name] for name in ("temperature", "alpha", "seeds")}
                if ("kd", asked["temperature"], asked["alpha"], asked["seeds"][0]) in runs:
                    return asked
            except (LookupError, TypeError):
                raise Damaged(f"{path} is damaged. Remove it, and the report chooses a pair itself.") from None
        students = sorted(key[1:] for key in runs if key[0] == "kd")
        if not students:
            raise Failure(f"{self.output} holds no finished students to report on.")
        fitting = []
        for *pair, seed in students:
            baseline = runs.get(("baseline", None, None, seed))
            if baseline and agree(runs["kd", *pair, seed], baseline):
                fitting.append((*pair, seed))
        temperature, alpha, seed = (fitting or students)[0]
        seeds = [each[2] for each in fitting if each[:2] == (temperature, alpha)]
        return {"temperature": temperature, "alpha": alpha, "seeds": seeds or [seed]}

    def _read_test_set(self):
        data, teachers = self.settings["data"], self.settings["teacher"].split("+")
        place, *places = _test_path(self.output, data), *(_teacher_path(self.output, each, data) for each in teachers)
        for path in (place, *places):
            if not path.is_file():
                raise Failure(
                    f"{path} is not there. Run the command that trained the students again; it writes it anew."
                )
        path = place
        try:
            test = load_arrays(path)
            self.pictures, self.labels, self.classes = test["pictures"], test["labels"], test["classes"].tolist()
            shape, self.member_logits = (len(self.labels), len(self.classes)), []
            for path in places:
                self.member_logits.append(_checked(path, load_arrays(path)["logits"], shape))
        except (LookupError, TypeError) as error:
            raise Damaged(f"{path} is damaged: {error} is missing.") from None
        self.teacher_logits = np.mean(self.member_logits, axis=0)  # as distill.Ensemble has them for views

    def _several(self, records):
        self.runs += records
        return _students(records, self.labels, len(self.classes), self.teacher_logits)

    def _add(self, temperature, alpha, seeds, students, baselines):
        entry, logits = self._several([students["kd", temperature, alpha, seed] for seed in seeds])
        without = [baselines[seed] for seed in seeds]
        self.runs += [run for run in without if run not in self.runs]
        gains = self._gains(entry["accuracies"], [run["accuracy"] for run in without])
        if len(seeds) == 1:
            right = logits[0].argmax(1) == self.labels
            right_without = _logits(without[0], self.teacher_logits.shape).argmax(1) == self.labels
            mended, broken = int((right & ~right_without).sum()), int((right_without & ~right).sum())
            improvement = {
                "mean": gains[0], "ci95": None, "p_value": mcnemar_test(mended, broken), "method": "exact McNemar test",
                "mended": mended, "broken": broken,
            }  # fmt: skip
        else:
            improvement = paired_test(gains)
        improvement["by_seed"] = gains
        entry = {"temperature": temperature, "alpha": alpha, **entry, "improvement": improvement}
        if self.kd:
            entry["first_over_this"] = self._over(self.kd[0], entry)
        self.kd.append(entry)
        self.kd_logits.append(logits)

    def _gains(self, accuracies, others):
        """The differences in points, seed by seed."""
        count = len(self.labels)  # in whole pictures: equal gains must be equal numbers
        pairs = zip(accuracies, others, strict=True)
        return [100 * (round(one * count) - round(other * count)) / count for one, other in pairs]

    def _over(self, first, other):
        """The paired test of two pairs of temperature and alpha over the seeds of both; None below two such seeds."""
        seeds = [seed for seed in first["seeds"] if seed in other["seeds"]]
        if len(seeds) < 2:
            return None
        one, two = ([e["accuracies"][e["seeds"].index(seed)] for seed in seeds] for e in (first, other))
        gains = self._gains(one, two)
        return {"seeds": seeds, **paired_test(gains), "by_seed": gains}

    def _selection(self):
        """The entries of the sweep that chose the pair, or else of the largest one: runs with the same settings as the
        students', the same validation part and the same seeds (the students', where the sweep had them)."""
        runs = finished_runs(self.output / "selection")
        runs = {key: run for key, run in runs.items() if agree(self.first, run, {"val_fraction"})}
        chosen = ("kd", self.settings["temperature"], self.settings["alpha"])
        fractions = [run["settings"]["val_fraction"] for key, run in runs.items() if key[:3] == chosen]
        fractions = fractions or [run["settings"]["val_fraction"] for run in runs.values()]
        if not fractions:
            return []
        fraction = max(set(fractions), key=fractions.count)
        groups = {}
        for key, run in runs.items():
            if run["settings"]["val_fraction"] == fraction:
                groups.setdefault(key[:3], {})[key[3]] = run
        seeds, there = self.kd[0]["seeds"], groups.get(chosen) or max(groups.values(), key=len)
        seeds = seeds if set(seeds) <= set(there) else sorted(there)
        entries = []
        for (role, temperature, alpha), found in sorted(
            groups.items(), key=lambda item: (-len(item[0][0]), str(item[0]))
        ):
            if set(seeds) <= set(found):
                values = [found[seed]["val_accuracy"] for seed in seeds]
                self.runs += [found[seed] for seed in seeds]
                entries.append(
                    {
                        "role": role, "temperature": temperature, "alpha": alpha, "val_fraction": fraction,
                        "seeds": seeds, "val_accuracies": values, "mean": float(np.mean(values)), "std": spread(values),
                    }
                )  # fmt: skip
        return entries

    def as_dict(self):
        """What comparison.json holds; the teacher's `members` are the accuracies of each of several teachers alone, in
        the order of their digests in the settings."""
        return {
            "settings": self.settings,
            "environment": self.environment,
            "classes": self.classes,
            "teacher": self.teacher,
            "student": self.student,
            "baseline": self.baseline,
            "kd": self.kd,
            "selection": self.selection,
            "seconds": sum(run["seconds"] for run in self.runs),
        }


# Words ---------------------------------------------------------------------------------------------------------------


def points(value, sign=""):
    """A gain in percentage points with two decimals, never -0.00."""
    return f"{round(value, 2) + 0.0:{sign}.2f}"


def block(comparison):
    """The comparison in the form that the program has always printed."""
    entry, settings = comparison.kd[0], comparison.settings
    return (
        "Training Parameters:\n"
        f"- Temperature: {entry['temperature']}\n"
        f"- Alpha: {entry['alpha']}\n"
        f"- Epochs: {settings['epochs']}\n"
        f"- Batch Size: {settings['batch_size']}\n"
        "\n"
        "Final Test Accuracies:\n"
        f"- Teacher Network: {comparison.teacher['accuracy']:.4f}\n"
        f"- Student Network (with KD): {entry['mean']:.4f}\n"
        f"- Student Network (Baseline): {comparison.baseline['mean']:.4f}\n"
        "\n"
        f"Improvement with KD: {points(entry['improvement']['mean'])}%\n"
    )


def _row(name, *cells):
    return f"{name:<26}" + "".join(f"{cell:>12}" for cell in cells) + "\n"


def _std(entry):
    return "" if entry["std"] is None else f"{entry['std']:.4f}"


def details(comparison):
    """The table below the block, the gain with its interval, and what can be claimed."""
    teacher, baseline, entry = comparison.teacher, comparison.baseline, comparison.kd[0]

    def students(name, given):
        means = (
            np.mean(given[key]) for key in ("agreement_with_teacher", "calibration_error", "negative_log_likelihood")
        )
        agreement, error, likelihood = means
        return _row(
            name,
            f"{given['mean']:.4f}",
            _std(given),
            len(given["seeds"]),
            f"{agreement:.4f}",
            f"{error:.4f}",
            f"{likelihood:.4f}",
        )

    text = _row("", "accuracy", "std", "n", "agreement", "ECE", "NLL")
    several = len(teacher["members"]) > 1
    text += _row(
        f"Teacher, {len(teacher['members'])} networks" if several else "Teacher",
        f"{teacher['accuracy']:.4f}",
        "",
        1,
        "",
        f"{teacher['calibration_error']:.4f}",
        f"{teacher['negative_log_likelihood']:.4f}",
    )
    if several:
        alone = teacher["members"]
        text += _row("  each alone", f"{np.mean(alone):.4f}", f"{spread(alone):.4f}", len(alone))
    for each in comparison.kd:
        text += students(f"KD, {pair_name(each)}", each)
    text += students("Baseline", baseline)
    text += "(agreement: same class as the teacher; ECE: expected calibration error, 15 bins; NLL in nats)\n\n"
    text += _row("Accuracy by class", "teacher", "with KD", "baseline")
    for number, name in enumerate(comparison.classes):
        values = (each["class_accuracies"][number] for each in (teacher, entry, baseline))
        text += _row(name[:25], *("-" if value is None else f"{value:.4f}" for value in values))
    if comparison.selection:
        text += "\n" + _row("Sweep, on validation", "accuracy", "std", "n")
        for each in sorted(comparison.selection, key=lambda each: -each["mean"]):
            name = "Baseline" if each["role"] == "baseline" else f"KD, {pair_name(each)}"
            text += _row(name, f"{each['mean']:.4f}", _std(each), len(each["seeds"]))
    text += "\n" + claim(entry["improvement"], len(entry["seeds"]), len(comparison.labels)) + "\n"
    for each in comparison.kd[1:]:
        over = each["first_over_this"]
        if over and over["ci95"]:
            mean, low, high = (points(value, "+") for value in (over["mean"], *over["ci95"]))
            text += (
                f"{pair_name(entry)} over {pair_name(each)}: {mean} points, 95% confidence interval {low} to {high}, "
                f"{_p(over['p_value'])} (n = {len(over['seeds'])} seeds).\n"
            )
    for who, sweep in (("these students", False), ("the students of the sweep", True)):
        ways = trained_ways([run for run in comparison.runs if bool(run["settings"]["val_fraction"]) == sweep])
        if len(ways) > 1:
            text += f"Mind that {who} were not all trained in the same way: " + "; ".join(ways) + ".\n"
    return text


def trained_ways(runs):
    """The ways in which the students among `runs` were trained (device, precision, compiled or not), in words."""
    ways = {}
    for run in runs:
        if run["settings"]["role"] != "teacher":
            made = run["environment"]
            words = f"{made.get('device')} in {made.get('precision')}" + (", compiled" if made.get("compiled") else "")
            ways.setdefault(words, []).append(run["folder"].name)
    return [f"{', '.join(names)} on {words}" for words, names in ways.items()]


def claim(improvement, seeds, pictures):
    """What can be claimed, in plain sentences."""
    mean, interval, p = improvement["mean"], improvement["ci95"], improvement["p_value"]
    if seeds == 1:
        return (
            f"These two networks: of {pictures:,} test pictures, distillation mends {improvement['mended']} and breaks "
            f"{improvement['broken']} (exact McNemar test, {_p(p)}).\n"
            "One pair says nothing about distillation itself: add --seeds 5 for an interval."
        )
    covers = (
        "(The interval covers other initial weights and orders of pictures, for the same teacher and test set and\n"
        "the same crops and flips.)"
    )
    if interval is None:
        return f"All {seeds} seeds gain exactly {points(mean, '+')} points, so no interval can be computed.\n{covers}"
    gain = (
        f"Gain with KD: {points(mean, '+')} points, 95% confidence interval {points(interval[0], '+')} to "
        f"{points(interval[1], '+')}, {_p(p)} (paired t-test, n = {seeds} seeds)."
    )
    if p < SIGNIFICANCE:
        verb = "improves" if mean > 0 else "worsens"
        return f"{gain}\nDistillation {verb} this student, with this teacher and recipe.\n{covers}"
    needed = seeds_needed(spread(improvement["by_seed"]))
    if needed is not None and needed <= seeds:
        more = f"a gain of {SMALL_GAIN} points would have been shown with {POWER:.0%} power"
    else:
        about = f"about {needed:,}" if needed else "more than half a million"
        more = f"{about} would show a gain of {SMALL_GAIN} points ({POWER:.0%} power, this spread)"
    return f"{gain}\nNo difference can be shown with {seeds} seeds; {more}.\n{covers}"


def _p(value):
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.4f}" if value < 0.1 else f"p = {value:.2f}"


# Output --------------------------------------------------------------------------------------------------------------

COLUMNS = (
    "run", "role", "temperature", "alpha", "seed", "accuracy", "val_accuracy", "epochs", "batch_size", "learning_rate",
    "weight_decay", "image_size", "val_fraction", "seconds",
)  # fmt: skip


def table(comparison):
    """comparison.csv: one row a run."""
    text = io.StringIO()
    rows = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    rows.writeheader()
    for run in comparison.runs:
        name = run["folder"].relative_to(comparison.output).as_posix()
        rows.writerow({**run["settings"], **run, "run": name})
    return text.getvalue()


def report(output, asked=None):
    """Prints the comparison of a folder's finished runs, and writes comparison.json, comparison.csv and figures."""
    import figures

    comparison = Comparison(output, asked)
    print(f"\n{block(comparison)}\n{details(comparison)}", flush=True)
    write_json(comparison.output / "comparison.json", comparison.as_dict())
    write(comparison.output / "comparison.csv", table(comparison))
    drawn = figures.draw(comparison)
    print(
        f"Written: {comparison.output / 'comparison.json'}, comparison.csv, {len(drawn)} figures in {drawn[0].parent}"
    )
