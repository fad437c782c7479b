"""The comparison of distilled students with their baseline, from what their runs kept."""

import math
from pathlib import Path

import msgspec
import numpy as np

from reports.calibration import calibration
from reports.fidelity import fidelity
from reports.omitted import omitted_classes
from reports.records import Key, all_finished_runs, comparable, load_speed, load_test_set
from reports.statistics import (
    balanced_accuracy,
    class_accuracies,
    interval_with_images,
    mcnemar_test,
    paired_test,
    spread,
)
from runs.files import Damaged, Failure, decode, read_json
from runs.settings import PLAIN, Settings, pair_name, run_name, variant_of
from sources import survey


def _key(way, seed):
    """The Key of a student distilled in a `way`, (temperature, alpha, variant)."""
    temperature, alpha, variant = way
    return Key("kd", temperature, alpha, seed, variant)


def _baseline(seed):
    """The Key of a baseline."""
    return Key("baseline", None, None, seed, None)


def _tell_apart(entries):
    """Adds `version`, the first digits of a digest, to entries of a loss that was edited between their trainings, and
    of different images without labels: they have one name and are not one way to distil."""
    variants = [(variant_of(each), each.get("loss_sha256") or each.get("unlabeled")) for each in entries]
    names = [name for name, _ in {*variants}]
    for entry, (name, digest) in zip(entries, variants, strict=True):
        if names.count(name) > 1:
            entry["version"] = digest[:8]


class Comparison:
    """All that the finished runs of an output folder say, for one teacher (or one ensemble of teachers)."""

    def __init__(self, output, asked=None):
        """`asked` is {"temperature", "alpha", "seeds", "variant", "shared"}, the last two being those of Settings and
        of plain distillation if they are missing. Without it they are taken from comparison.json or, where there is
        none, from the first students that have a baseline.

        Raises Failure where there is nothing to compare.
        """
        self.output = Path(output)
        everything = all_finished_runs(self.output)
        asked = {"variant": None, "shared": PLAIN, **(asked or self._asked_before(everything))}
        runs = {run.key: run for run in everything if run.settings.shared == tuple(asked["shared"])}
        first, seeds = (asked["temperature"], asked["alpha"], asked["variant"]), asked["seeds"]
        self.first = runs.get(_key(first, seeds[0]))
        matching = {k: run for k, run in runs.items() if self.first and comparable(self.first.settings, run.settings)}
        wanted = [key for seed in seeds for key in (_key(first, seed), _baseline(seed))]
        missing = next((key for key in wanted if key not in matching), None)
        if missing:
            raise Failure(
                f"{self.output} holds no finished {run_name(*missing, asked['shared'])} that this comparison can use.\n"
                "The command that trains it again (or resumes it) prints the comparison, too."
            )
        self.settings, made = self.first.settings, [matching[key].environment for key in wanted]
        several = {
            name: dict.fromkeys(str(each[name]) for each in made if name in each) for name in ("device", "torch")
        }
        several = {name: " and ".join(words) for name, words in several.items() if words}
        self.environment = self.first.environment | several  # of all students that are compared
        self.images, self.labels, self.classes, self.member_logits = load_test_set(
            self.output, self.settings.data, self.settings.teacher.split("+")
        )
        self.teacher_logits = np.mean(self.member_logits, axis=0)  # as distill.Ensemble has them for views
        self.counts = np.bincount(self.labels, minlength=len(self.classes))  # test images by class
        self.balanced = {}  # balanced accuracy of a run, by its folder
        baselines = {key.seed: run for key, run in matching.items() if key.role == "baseline"}
        students = {key: run for key, run in matching.items() if key.role == "kd"}
        self.runs = self._teacher_runs(everything)
        self.baseline, self.baseline_logits = self._several([baselines[seed] for seed in seeds], first[0])
        self.kd, self.kd_logits = [], []  # the logits of the first way alone: what is drawn is of it
        self._add(first, seeds, students, baselines)
        ways = {key.way for key in students} - {first}
        for way in sorted(ways, key=lambda way: (way != (*first[:2], None), way[:2], way[2] or ())):
            shared = [seed for seed in sorted(baselines) if _key(way, seed) in students]
            if shared:
                self._add(way, shared, students, baselines)
        self.teacher = {
            "accuracy": float((self.teacher_logits.argmax(1) == self.labels).mean()),
            "members": [float((each.argmax(1) == self.labels).mean()) for each in self.member_logits],
            **vars(self.first.costs.get("teachers", self.first.costs["teacher"])),
            **self._by_class(self.teacher_logits),
            **calibration(self.teacher_logits, self.labels),
        }
        self.student = dict(vars(self.first.costs["student"]))
        self._add_speed()
        self.selection = self._selection()
        _tell_apart([*self.kd, *self.selection])
        for run in self.runs:
            if not run.settings.val_fraction:
                self.balanced[run.folder] = self._by_class(self._test_logits(run))["balanced_accuracy"]

    @property
    def students(self):
        """The rows of the printed tables: (name, entry) of each way to distil and of the baseline."""
        return [*((f"KD, {pair_name(each)}", each) for each in self.kd), ("Baseline", self.baseline)]

    def entry_of(self, run):
        """The entry of the way in which a distilled student was trained."""
        names = ("temperature", "alpha", "loss", "loss_sha256", "unlabeled")
        wanted = [getattr(run.settings, name) for name in names]
        return next(each for each in self.kd if [each.get(name) for name in names] == wanted)

    @property
    def is_balanced(self):
        """Whether all classes have equally many test images, so that balanced accuracy is the accuracy."""
        return bool((self.counts == self.counts[0]).all())

    def _teacher_runs(self, runs):
        teachers = sorted((run for run in runs if run.settings.role == "teacher"), key=lambda r: r.settings.seed)
        return [run for run in teachers if run.weights_sha256 in self.settings.teacher.split("+")]

    def _add_speed(self):
        """Adds to teacher and student what their files and their speed cost: `cost`, None where it was not measured."""
        network = self.settings.shared[2]
        speed = load_speed(self.output, self.settings.teacher.split("+"), self.settings.data, network)
        sizes = {"teacher": speed and speed.teacher_bytes, "student": (self.first.folder / "model.pt").stat().st_size}
        for name, size in sizes.items():
            getattr(self, name)["cost"] = speed and {
                "bytes": size, "device": speed.device, "threads": speed.threads, "batch": speed.batch,
                **{precision: vars(measured) for precision, measured in getattr(speed, name).items()},
            }  # fmt: skip

    def _asked_before(self, runs):
        path = self.output / "comparison.json"
        if path.is_file():
            try:
                content = read_json(path)
                asked = {name: content["kd"][0][name] for name in ("temperature", "alpha", "seeds")}
                settings = decode(content["settings"], Settings, path)
                asked |= {"variant": settings.variant, "shared": settings.shared}
                key = _key((asked["temperature"], asked["alpha"], settings.variant), asked["seeds"][0])
                if any(run.key == key and run.settings.shared == asked["shared"] for run in runs):
                    return asked
            except (Damaged, LookupError, TypeError):
                raise Damaged(f"{path} is damaged. Remove it; the report then chooses what to compare.") from None
        students = [run for run in runs if run.settings.role == "kd"]
        if not students:
            raise Failure(f"{self.output} holds no finished students to report on.")
        shared = min((run.settings.shared for run in students), key=lambda shared: (shared != PLAIN, str(shared)))
        runs = {run.key: run for run in runs if run.settings.shared == shared}
        students = sorted((key for key in runs if key.role == "kd"), key=lambda key: (key.variant or (), key[:4]))
        with_baseline = []
        for key in students:
            baseline = runs.get(_baseline(key.seed))
            if baseline and comparable(runs[key].settings, baseline.settings):
                with_baseline.append(key)
        first = (with_baseline or students)[0]
        alike = [key for key in with_baseline if comparable(runs[first].settings, runs[key].settings)]
        seeds = [key.seed for key in alike if key.way == first.way] or [first.seed]
        asked = {"temperature": first.temperature, "alpha": first.alpha, "seeds": seeds}
        return asked | {"variant": first.variant, "shared": shared}

    def _test_logits(self, run):
        if run.settings.role == "teacher":
            return self.member_logits[self.settings.teacher.split("+").index(run.weights_sha256)]
        return run.logits(self.teacher_logits.shape)

    def _by_class(self, logits):
        by_class = class_accuracies(logits, self.labels, len(self.classes))
        return {
            "balanced_accuracy": balanced_accuracy(by_class),
            "class_accuracies": by_class,
        }

    def _several(self, runs, temperature):
        """What comparison.json says of the students of several seeds, and their logits; they are compared with the
        teacher at `temperature`, too."""
        self.runs += [run for run in runs if run not in self.runs]
        teacher_logits = self.teacher_logits
        logits = [run.logits(teacher_logits.shape) for run in runs]
        accuracies = [run.accuracy for run in runs]
        measures = [self._by_class(each) for each in logits]
        calibrated = [calibration(each, self.labels) for each in logits]
        by_class = np.array([m["class_accuracies"] for m in measures], dtype=float)
        return {
            "seeds": [run.settings.seed for run in runs],
            "accuracies": accuracies,
            "mean": float(np.mean(accuracies)),
            "std": spread(accuracies),
            "balanced_accuracy": [m["balanced_accuracy"] for m in measures],
            "agreement_with_teacher": [float((each.argmax(1) == teacher_logits.argmax(1)).mean()) for each in logits],
            **fidelity(teacher_logits, logits, temperature),
            **{name: [each[name] for each in calibrated] for name in calibrated[0]},
            "class_accuracies": [None if math.isnan(v) else v for v in by_class.mean(0).tolist()],
            "seconds": [run.seconds for run in runs],
            **omitted_classes(runs, logits, self.labels, self.classes),
        }, logits

    def _add(self, way, seeds, students, baselines):
        """Adds the entry of a way to distil, (temperature, alpha, variant)."""
        temperature, alpha, _ = way
        entry, logits = self._several([students[_key(way, seed)] for seed in seeds], temperature)
        without = [baselines[seed] for seed in seeds]
        self.runs += [run for run in without if run not in self.runs]
        gains = self._gains(entry["accuracies"], [run.accuracy for run in without])
        others = [run.logits(self.teacher_logits.shape) for run in without]
        right, right_without = ([each.argmax(1) == self.labels for each in several] for several in (logits, others))
        by_image = np.subtract(right, right_without, dtype=int)  # (seeds, images): 1 where only distillation is right
        if len(seeds) == 1:
            fixed, broken = int((by_image > 0).sum()), int((by_image < 0).sum())
            improvement = {
                "mean": gains[0], "ci95": None, "p_value": mcnemar_test(fixed, broken), "method": "exact McNemar test",
                "fixed": fixed, "broken": broken,
            }  # fmt: skip
        else:
            improvement = paired_test(gains) | {"ci95_with_images": interval_with_images(100 * by_image)}
        improvement["by_seed"] = gains
        settings, names = students[_key(way, seeds[0])].settings, ("loss", "loss_sha256", "unlabeled")
        variant = {name: value for name in names if (value := getattr(settings, name))}
        entry = {"temperature": temperature, "alpha": alpha, **variant, **entry, "improvement": improvement}
        if self.kd:
            entry["first_over_this"] = self._over(self.kd[0], entry)
        else:
            self.kd_logits = logits
        self.kd.append(entry)

    def _gains(self, accuracies, others):
        """The differences in points, seed by seed."""
        count = len(self.labels)  # in whole images: equal gains must be equal numbers
        pairs = zip(accuracies, others, strict=True)
        return [100 * (round(one * count) - round(other * count)) / count for one, other in pairs]

    def _over(self, first, other):
        """The paired test of two ways to distil over the seeds that both have; None where those are fewer than two."""
        seeds = [seed for seed in first["seeds"] if seed in other["seeds"]]
        if len(seeds) < 2:
            return None
        one, two = ([e["accuracies"][e["seeds"].index(seed)] for seed in seeds] for e in (first, other))
        gains = self._gains(one, two)
        return {"seeds": seeds, **paired_test(gains), "by_seed": gains}

    def _selection(self):
        """What comparison.json says of the sweep that chose the pair, or else of the largest one: an entry for each
        pair, one for the baseline and one for the teacher that has not seen the validation part, where there is one;
        the students' all over the same seeds (the compared ones, where the sweep had them) and of the same teacher.
        Runs with settings other than the students' are left out."""
        everything = all_finished_runs(self.output / "selection")
        students = [run for run in everything if run.settings.role != "teacher"]
        runs = {run.key: run for run in students if run.settings.shared == self.settings.shared}
        apart = {"val_fraction", "split", "sweep_teacher"}
        runs = {key: run for key, run in runs.items() if comparable(self.settings, run.settings, apart)}
        chosen = ("kd", self.settings.temperature, self.settings.alpha, self.settings.variant)
        found = [run for key, run in runs.items() if (key.role, *key.way) == chosen]
        found = found or [run for key, run in runs.items() if key.role == "kd"] or list(runs.values())
        if not found:
            return []
        sweeps = [(run.settings.val_fraction, run.settings.split, run.settings.sweep_teacher) for run in found]
        *part, teacher = max(sweeps, key=sweeps.count)  # the first of equals
        groups = {}
        for key, run in runs.items():
            taught_alike = key.role == "baseline" or run.settings.sweep_teacher == teacher
            if [run.settings.val_fraction, run.settings.split] == part and taught_alike:
                groups.setdefault((key.role, *key.way), {})[key.seed] = run
        seeds, found = self.kd[0]["seeds"], groups.get(chosen) or max(groups.values(), key=len)
        seeds = seeds if set(seeds) <= set(found) else sorted(found)
        digests = (teacher or "").split("+")
        members = [run for run in everything if run.settings.role == "teacher" and run.weights_sha256 in digests]
        ways = {("teacher", None, None, None): members} if members else {}
        for way, found in sorted(groups.items(), key=lambda item: (item[0][0] != "baseline", str(item[0]))):
            if set(seeds) <= set(found):
                ways[way] = [found[seed] for seed in seeds]
        entries = []
        for (role, temperature, alpha, _), found in ways.items():
            values, settings = [run.val_accuracy for run in found], found[0].settings
            self.runs += found
            entries.append(
                {
                    "role": role, "temperature": temperature, "alpha": alpha, "val_fraction": part[0],
                    **({"loss": settings.loss, "loss_sha256": settings.loss_sha256} if settings.loss else {}),
                    "sweep_teacher": teacher if role == "kd" else None, "val_accuracies": values,
                    "seeds": [run.settings.seed for run in found],
                    "mean": float(np.mean(values)), "std": spread(values),
                }
            )  # fmt: skip
        return entries

    @property
    def sweep_teacher_has_seen(self):
        """Whether the teacher of the sweep was trained on the images on which it was judged."""
        return any(each["role"] == "kd" and each["alpha"] and not each["sweep_teacher"] for each in self.selection)

    def notes(self):
        """What must be said of the images beside the figures, lines; raises Damaged where that cannot be read."""
        unlabeled = {run.settings.unlabeled: run.images["unlabeled"] for run in self.runs if run.settings.unlabeled}
        try:
            return survey.notes(self.first.images or {}, [*unlabeled.values()], len(self.labels), self.output)
        except msgspec.ValidationError as error:
            raise Damaged(f"{self.first.folder / 'run.json'} is damaged: images: {error}.") from None

    def as_dict(self):
        """The content of comparison.json. The teacher's `members` are the accuracies of the ensemble's teachers, each
        alone, in the order of their digests in the settings."""
        return {
            "settings": self.settings.as_dict(),
            "environment": self.environment,
            "images": self.first.images,
            "classes": self.classes,
            "test_images_by_class": self.counts.tolist(),
            "teacher": self.teacher,
            "student": self.student,
            "baseline": self.baseline,
            "kd": self.kd,
            "selection": self.selection,
            "seconds": sum(run.seconds for run in self.runs),
        }
