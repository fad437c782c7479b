"""Results: the printed block and table, comparison.json, comparison.csv and figures; paired statistics.

Everything is computed from what finished runs keep (their test logits), without PyTorch, data or training, so that a
folder can be reported again at any time.

- Agreement: the share of test pictures for which student and teacher choose the same class.
- Expected calibration error: Guo et al., arXiv 1706.04599, equation 3, with 15 bins of equal width.
- Negative log-likelihood: the mean of -log p(label), in nats.
- Paired t-test over seeds (Student 1908), the pairs being students of one seed with and without distillation.
- Exact McNemar test (McNemar 1947) for a single pair: a binomial test over the test pictures on which they differ.
"""

import csv
import io
import math
from pathlib import Path

import numpy as np

from files import Damaged, Failure, load_array, load_arrays, make_folder, read_json, save_arrays, write, write_json

BINS = 15
POWER, SIGNIFICANCE, SMALL_GAIN = 0.8, 0.05, 0.25  # the last in percentage points: the gain of the original run


# Statistics ----------------------------------------------------------------------------------------------------------


def softmax(logits, temperature=1.0):
    """Probabilities (N, classes) of logits (N, classes) at a temperature, in float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    scaled = np.exp(scaled - scaled.max(1, keepdims=True))
    return scaled / scaled.sum(1, keepdims=True)


def reliability(probabilities, labels, bins=BINS):
    """(share of pictures, mean confidence, accuracy) of each of `bins` equal bins of confidence: three arrays (bins,),
    0 where a bin is empty."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    # Bin m holds the confidences in ((m - 1) / bins, m / bins].
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(number, minlength=bins)
    sums = (np.bincount(number, values, bins) for values in (confidence, right))
    mean_confidence, mean_accuracy = (total / np.maximum(count, 1) for total in sums)
    return count / len(labels), mean_confidence, mean_accuracy


def calibration_error(probabilities, labels, bins=BINS):
    """The expected calibration error, from 0 to 1."""
    share, confidence, accuracy = reliability(probabilities, labels, bins)
    return float((share * np.abs(accuracy - confidence)).sum())


def negative_log_likelihood(logits, labels):
    """The mean of -log softmax(logits)[label], in nats."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]).mean())


def class_accuracies(logits, labels, classes):
    """The accuracy on each class's pictures: a list of floats, None for a class without pictures."""
    right = logits.argmax(1) == labels
    return [float(right[labels == k].mean()) if (labels == k).any() else None for k in range(classes)]


def spread(values):
    """The standard deviation with ddof 1, None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_test(differences):
    """The paired t-test of `differences` (a list, one a seed): their mean, 95% confidence interval and two-sided p.

    Interval and p are None where they are undefined: for one difference, or for differences that are all equal.
    """
    from scipy import stats

    mean, deviation = float(np.mean(differences)), spread(differences)
    if not deviation:
        return {"mean": mean, "ci95": None, "p_value": None, "method": "paired t-test"}
    error = deviation / math.sqrt(len(differences))
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(differences) - 1))
    return {"mean": mean, "ci95": [mean - half, mean + half], "p_value": p, "method": "paired t-test"}


def mcnemar_test(mended, broken):
    """The two-sided p of the exact McNemar test: `mended` pictures are right only with distillation, `broken` only
    without."""
    from scipy import stats

    return float(stats.binomtest(mended, mended + broken).pvalue) if mended + broken else 1.0


def seeds_needed(deviation, gain=SMALL_GAIN, power=POWER):
    """The fewest pairs with which a paired t-test shows a mean difference of `gain` with `power`, given the standard
    deviation of the differences (Cohen 1988: the power from the noncentral t distribution). None above 1,000,000."""
    from scipy import stats

    def reached(pairs):
        critical = stats.t.ppf(1 - SIGNIFICANCE / 2, pairs - 1)
        shift = gain / deviation * math.sqrt(pairs)
        return stats.nct.sf(critical, pairs - 1, shift) + stats.nct.cdf(-critical, pairs - 1, shift) >= power

    low, high = 1, 2
    while not reached(high):
        low, high = high, high * 2
        if high > 1_000_000:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


# What a folder holds -------------------------------------------------------------------------------------------------


def keep_test_set(output, data, teacher, teacher_digest, precision):
    """Keeps what a report needs besides the runs: the test pictures and labels, and the teacher's test logits."""
    from train import evaluate

    folder = Path(output) / "data"
    make_folder(folder)
    test, logits = _test_path(output, data.digest), _teacher_path(output, teacher_digest, data.digest)
    if not _whole(test):
        save_arrays(
            test,
            pictures=data.test_pictures.cpu().numpy(),
            labels=data.test_labels.cpu().numpy(),
            classes=np.array(data.classes),
        )
    if not _whole(logits):
        found = evaluate(teacher, data.test_pictures, data.mean, data.std, precision)
        save_arrays(logits, logits=found.cpu().numpy())


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
    the run's folder as `folder`."""
    runs = {}
    for path in sorted(Path(folder).glob("*/run.json")):
        if (path.parent / "model.pt").is_file():
            record = read_json(path)
            if record.get("finished"):
                settings = record["settings"]
                key = settings["role"], settings["temperature"], settings["alpha"], settings["seed"]
                runs[key] = record | {"folder": path.parent}
    return runs


def best_pair(output, pairs, seeds):
    """The (temperature, alpha) of `pairs` with the best mean validation accuracy over `seeds`; the first of equals."""
    runs = finished_runs(Path(output) / "selection")
    return max(pairs, key=lambda pair: np.mean([runs["kd", *pair, seed]["val_accuracy"] for seed in seeds]))


def _agree(one, other):
    """Whether two students' runs differ at most in what distillation is."""
    odd = {"role", "temperature", "alpha", "teacher", "seed"}
    return all(other["settings"].get(name) == value for name, value in one["settings"].items() if name not in odd)


def _logits(record):
    return load_array(record["folder"] / "test_logits.npy", record["test_logits_sha256"])


def _measures(logits, labels, classes):
    return {
        "calibration_error": calibration_error(softmax(logits), labels),
        "negative_log_likelihood": negative_log_likelihood(logits, labels),
        "class_accuracies": class_accuracies(logits, labels, classes),
    }


def _students(records, labels, classes, teacher_logits):
    """What comparison.json says of the students of several seeds, and their logits."""
    logits = [_logits(record) for record in records]
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
        """`asked` is {"temperature", "alpha", "seeds"}; without it the pair of the comparison before, or the only one.

        Raises Failure where there is nothing to compare.
        """
        self.output = Path(output)
        runs = finished_runs(self.output)
        asked = asked or self._asked_before(runs)
        pair = asked["temperature"], asked["alpha"]
        missing = [s for s in asked["seeds"] if ("kd", *pair, s) not in runs or ("baseline", None, None, s) not in runs]
        if missing:
            raise Failure(
                f"{self.output} holds no finished pair of students with temperature {pair[0]}, alpha {pair[1]} and "
                f"seed {missing[0]}.\nTrain them first; the same command continues what was interrupted."
            )
        first = runs["kd", *pair, asked["seeds"][0]]
        self.settings = first["settings"]
        self.environment = first["environment"]
        self._read_test_set()
        baselines = {key[3]: run for key, run in runs.items() if key[0] == "baseline" and _agree(first, run)}
        students = {
            key: run
            for key, run in runs.items()
            if key[0] == "kd" and _agree(first, run) and run["settings"]["teacher"] == self.settings["teacher"]
        }
        seeds = [seed for seed in asked["seeds"] if seed in baselines]
        self.runs = []
        self.baseline, self.baseline_logits = self._several([baselines[seed] for seed in seeds])
        self.kd, self.kd_logits = [], []
        others = sorted({key[1:3] for key in students} - {pair})
        for temperature, alpha in [pair, *others]:
            shared = [s for s in sorted(baselines) if ("kd", temperature, alpha, s) in students]
            shared = [s for s in shared if s in seeds] if (temperature, alpha) == pair else shared
            if shared:
                self._add(temperature, alpha, shared, students, baselines)
        self.teacher = {
            "accuracy": float((self.teacher_logits.argmax(1) == self.labels).mean()),
            **self._costs(first, "teacher"),
            **_measures(self.teacher_logits, self.labels, len(self.classes)),
        }
        self.student = self._costs(first, "student")
        self.teacher_folder = self._teacher_folder(runs)
        self.selection = self._selection(asked)

    def _teacher_folder(self, runs):
        """The teacher's run, where it is in this output folder: the one whose logits are the teacher's."""
        for (role, *_), run in runs.items():
            if role == "teacher" and np.array_equal(_logits(run), self.teacher_logits):
                return run["folder"]
        return None

    def _asked_before(self, runs):
        path = self.output / "comparison.json"
        if path.is_file():
            before = read_json(path)["kd"][0]
            return {name: before[name] for name in ("temperature", "alpha", "seeds")}
        pairs = {key[1:3] for key in runs if key[0] == "kd"}
        if not pairs:
            raise Failure(f"{self.output} holds no finished students to report on.")
        pair = min(pairs)
        seeds = sorted(k[3] for k in runs if k[:3] == ("kd", *pair) and ("baseline", None, None, k[3]) in runs)
        return {"temperature": pair[0], "alpha": pair[1], "seeds": seeds or [0]}

    def _read_test_set(self):
        data, teacher = self.settings["data"], self.settings["teacher"]
        paths = _test_path(self.output, data), _teacher_path(self.output, teacher, data)
        for path in paths:
            if not path.is_file():
                raise Failure(
                    f"{path} is not there. Run the command that trained the students again; it writes it anew."
                )
        test, teacher = (load_arrays(path) for path in paths)
        self.pictures, self.labels, self.classes = test["pictures"], test["labels"], test["classes"].tolist()
        self.teacher_logits = teacher["logits"]

    def _several(self, records):
        self.runs += records
        return _students(records, self.labels, len(self.classes), self.teacher_logits)

    def _add(self, temperature, alpha, seeds, students, baselines):
        entry, logits = self._several([students["kd", temperature, alpha, seed] for seed in seeds])
        without = [baselines[seed] for seed in seeds]
        self.runs += [run for run in without if run not in self.runs]
        gains = [100 * (a - run["accuracy"]) for a, run in zip(entry["accuracies"], without, strict=True)]
        if len(seeds) == 1:
            right = logits[0].argmax(1) == self.labels
            right_without = _logits(without[0]).argmax(1) == self.labels
            mended, broken = int((right & ~right_without).sum()), int((right_without & ~right).sum())
            improvement = {
                "mean": gains[0], "ci95": None, "p_value": mcnemar_test(mended, broken), "method": "exact McNemar test",
                "mended": mended, "broken": broken,
            }  # fmt: skip
        else:
            improvement = paired_test(gains)
        improvement["by_seed"] = gains
        self.kd.append({"temperature": temperature, "alpha": alpha, **entry, "improvement": improvement})
        self.kd_logits.append(logits)

    def _costs(self, record, name):
        return dict(record["costs"][name])

    def _selection(self, asked):
        runs = finished_runs(self.output / "selection")
        entries = []
        pairs = sorted({key[1:3] for key in runs if key[0] == "kd"})
        for role, temperature, alpha in [("kd", *pair) for pair in pairs] + [("baseline", None, None)]:
            found = [
                runs[key]
                for key in sorted(runs, key=str)
                if key[:3] == (role, temperature, alpha)
                and runs[key]["settings"]["teacher"] in (None, self.settings["teacher"])
                and runs[key]["settings"]["data"] == self.settings["data"]
            ]
            if found:
                values = [run["val_accuracy"] for run in found]
                entries.append(
                    {
                        "role": role,
                        "temperature": temperature,
                        "alpha": alpha,
                        "val_fraction": found[0]["settings"]["val_fraction"],
                        "seeds": [run["settings"]["seed"] for run in found],
                        "val_accuracies": values,
                        "mean": float(np.mean(values)),
                        "std": spread(values),
                    }
                )
                self.runs += found
        return entries if len(entries) > 1 else []

    def as_dict(self):
        """What comparison.json holds."""
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


def details(comparison):
    """The table below the block, the gain with its interval, and what can be claimed."""
    teacher, baseline, entry = comparison.teacher, comparison.baseline, comparison.kd[0]

    def students(name, given):
        std = "" if given["std"] is None else f"{given['std']:.4f}"
        means = (
            np.mean(given[key]) for key in ("agreement_with_teacher", "calibration_error", "negative_log_likelihood")
        )
        agreement, error, likelihood = means
        return _row(
            name,
            f"{given['mean']:.4f}",
            std,
            len(given["seeds"]),
            f"{agreement:.4f}",
            f"{error:.4f}",
            f"{likelihood:.4f}",
        )

    text = _row("", "accuracy", "std", "n", "agreement", "ECE", "NLL")
    text += _row(
        "Teacher",
        f"{teacher['accuracy']:.4f}",
        "",
        1,
        "",
        f"{teacher['calibration_error']:.4f}",
        f"{teacher['negative_log_likelihood']:.4f}",
    )
    for each in comparison.kd:
        text += students(f"KD, T={each['temperature']:g}, alpha={each['alpha']:g}", each)
    text += students("Baseline", baseline)
    text += "(agreement: same class as the teacher; ECE: expected calibration error, 15 bins; NLL in nats)\n\n"
    text += _row("Accuracy by class", "teacher", "with KD", "baseline")
    for number, name in enumerate(comparison.classes):
        values = (each["class_accuracies"][number] for each in (teacher, entry, baseline))
        text += _row(name[:25], *("-" if value is None else f"{value:.4f}" for value in values))
    if comparison.selection:
        text += "\n" + _row("Sweep, on validation", "accuracy", "std", "n")
        for each in sorted(comparison.selection, key=lambda each: -each["mean"]):
            name = (
                "Baseline" if each["role"] == "baseline" else f"KD, T={each['temperature']:g}, alpha={each['alpha']:g}"
            )
            text += _row(
                name, f"{each['mean']:.4f}", "" if each["std"] is None else f"{each['std']:.4f}", len(each["seeds"])
            )
    return text + "\n" + claim(entry["improvement"], len(entry["seeds"]), len(comparison.labels)) + "\n"  # fmt: skip


def claim(improvement, seeds, pictures):
    """What can be claimed, in plain sentences."""
    mean, interval, p = improvement["mean"], improvement["ci95"], improvement["p_value"]
    if seeds == 1:
        return (
            f"These two networks: of {pictures:,} test pictures, distillation mends {improvement['mended']} and breaks "
            f"{improvement['broken']} (exact McNemar test, p = {_p(p)}).\n"
            "One pair says nothing about distillation itself: add --seeds 5 for an interval."
        )
    covers = (
        "(The interval covers other initial weights and orders of pictures, for this one teacher and one test set.)"
    )
    if interval is None:
        return f"All {seeds} seeds gain exactly {points(mean, '+')} points, so no interval can be computed.\n{covers}"
    gain = (
        f"Gain with KD: {points(mean, '+')} points, 95% confidence interval {points(interval[0], '+')} to "
        f"{points(interval[1], '+')}, p = {_p(p)} (paired t-test, n = {seeds} seeds)."
    )
    if p < SIGNIFICANCE:
        verb = "improves" if mean > 0 else "worsens"
        return f"{gain}\nDistillation {verb} this student, with this teacher and recipe.\n{covers}"
    needed = seeds_needed(np.std(improvement["by_seed"], ddof=1))
    about = f"about {needed:,}" if needed else "more than a million"
    return (
        f"{gain}\nNo difference can be shown with {seeds} seeds; {about} would show a gain of {SMALL_GAIN} points "
        f"({POWER:.0%} power, this spread).\n{covers}"
    )


def _p(value):
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}" if value < 0.01 else f"{value:.2f}"


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
    write_json(comparison.output / "comparison.json", comparison.as_dict())
    write(comparison.output / "comparison.csv", table(comparison))
    drawn = figures.draw(comparison)
    print(f"\n{block(comparison)}\n{details(comparison)}")
    print(
        f"Written: {comparison.output / 'comparison.json'}, comparison.csv, {len(drawn)} figures in {drawn[0].parent}"
    )
