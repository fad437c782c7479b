"""Are these students better than those? Any two groups of finished runs, paired by seed.

    python main.py --epochs 200 --alpha 0.9 --seeds 5
    python main.py --epochs 200 --alpha 0.9 --seeds 5 --label-smoothing 0.1 \\
        --teacher outputs/teacher-s0 --output-dir outputs/smoothed
    python benchmarks/difference.py outputs/kd-T4-a0.9-s? \\
        --over outputs/smoothed/baseline-s? --over outputs/baseline-s?

A group may also be named as comparison.json:NAME, where NAME is its runs' folders' name without the seed; so what is in
results/ can be compared without its runs:

    python benchmarks/difference.py results/cifar10/comparison.json:kd-T4-a0.9 \\
        --over results/cifar10/comparison.json:baseline

What main.py compares differs in nothing but the teacher. Here the two may differ in anything; what differs is printed.
Each difference is tested by itself (paired t-test), and p is also given corrected for all of this command (Holm).
"""

import argparse
import glob
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from reports.statistics import holm, paired_test, spread
from runs.code import FILES
from runs.files import Damaged, Failure, read_json, write_json
from runs.settings import NotNegative, RunRecord, Settings, Share


@dataclass(frozen=True)
class Students:
    """Students of a comparison.json that differ in the seed alone: its baseline, or one of its kd."""

    seeds: list[NotNegative]
    accuracies: list[Share]
    temperature: float | None = None
    alpha: Share | None = None
    loss: str | None = None
    loss_sha256: str | None = None
    unlabeled: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What is needed here of a comparison.json. Settings and environment are those of its first distilled student; with
    which machine and code the others were trained it does not tell."""

    settings: Settings
    environment: dict
    baseline: Students
    kd: list[Students]


def read_comparison(path, name):
    """The RunRecords of the students `name`, such as kd-T4-a0.9, in a comparison.json; raises Failure where it holds
    none of that name."""
    found, groups = read_json(path, Comparison), {}
    for role, students in (("baseline", found.baseline), *(("kd", each) for each in found.kd)):
        about = asdict(students)
        about |= {"role": role, "teacher": found.settings.teacher if role == "kd" else None}
        if students.loss_sha256 != found.settings.loss_sha256:
            about["loss_file"] = None
        seeds, accuracies = about.pop("seeds"), about.pop("accuracies")
        if len(seeds) != len(accuracies):
            raise Damaged(f"{path} is damaged: it has {len(seeds)} seeds and {len(accuracies)} accuracies.")
        for seed, accuracy in zip(seeds, accuracies, strict=True):
            settings = replace(found.settings, seed=seed, **about)
            run = RunRecord(True, settings.epochs, settings, found.environment, {}, accuracy=accuracy)
            groups.setdefault(settings.name.rpartition("-s")[0], []).append(run)
    if name not in groups:
        missing = f"holds no students {name!r}" if name else "holds several groups of students"
        raise Failure(f"{path} {missing}: name one of them as {path}:NAME, with NAME one of {', '.join(groups)}.")
    return groups[name]


def read_group(named, seeds=None):
    """{seed: RunRecord} of the finished runs `named`, by their folders or as comparison.json:NAME, and of these of
    `seeds` [all]; raises Failure unless they differ in the seed alone, or where one of `seeds` is missing."""
    found, runs = [], {}
    for each in map(str, named):
        path, _, name = each.rpartition(":") if ".json:" in each else (each, "", "")
        if path.endswith(".json"):
            found += [(each, record) for record in read_comparison(Path(path), name)]
        else:
            folders = sorted(glob.glob(each)) or [each]  # which not every shell expands
            found += [(folder, read_json(Path(folder) / "run.json", RunRecord)) for folder in folders]
    for where, record in found:
        if seeds and record.settings.seed not in seeds:
            continue
        if record.accuracy is None:
            raise Failure(f"{where} holds no accuracy on the test set: the run is unfinished, or a sweep's.")
        if record.settings.seed in runs:
            raise Failure(f"{where}: there is a run with seed {record.settings.seed} in this group already.")
        runs[record.settings.seed] = record
    apart = differing("settings", *runs.values()) - {"seed"}
    if apart:
        raise Failure(f"the runs of one group differ in {', '.join(sorted(apart))}: {' '.join(map(str, named))}")
    if missing := [str(seed) for seed in seeds or () if seed not in runs]:
        raise Failure(f"there is no run with seed {' or '.join(missing)} among {' '.join(map(str, named))}.")
    return dict(sorted(runs.items()))


def differing(what, *runs):
    """The names of the "settings" in which RunRecords differ, or of what else is told of their "environment". A file
    may be moved or renamed, and a version that did not record its code is taken for the same."""
    about = [asdict(run.settings) if what == "settings" else run.environment for run in runs]
    names = {name for each in about for name in each if not name.endswith("_file")}
    told = {name: [each.get(name) for each in about if name in each or name not in FILES] for name in names}
    return {name for name, values in told.items() if any(value != values[0] for value in values)}


def difference(one, other):
    """What is kept of two groups, as `read_group` returns them: their accuracies and the test of their differences, in
    percentage points; raises Failure unless they have the same seeds and data."""
    if one.keys() != other.keys():
        seeds = [", ".join(map(str, group)) for group in (one, other)]
        raise Failure(f"one group has the seeds {seeds[0]}, the other {seeds[1]}. Name those of both with --seeds.")
    seeds, first, second = list(one), next(iter(one.values())), next(iter(other.values()))
    if first.settings.data != second.settings.data:
        raise Failure("the two groups were trained and tested on different images.")
    groups = [[runs[seed].accuracy for seed in seeds] for runs in (one, other)]
    return {
        "settings": [run.settings.as_dict() for run in (first, second)],
        "differ_in": sorted(differing("settings", first, second)),
        "trained_with_other": sorted(differing("environment", *one.values(), *other.values())),
        "seeds": seeds,
        "accuracies": groups,
        "means": [sum(group) / len(group) for group in groups],
        "stds": [spread(group) for group in groups],
        "points": paired_test([100 * (a - b) for a, b in zip(*groups, strict=True)]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="folders of finished runs, one a seed, or comparison.json:NAME")  # fmt: skip
    parser.add_argument("--over", nargs="+", action="append", required=True, metavar="RUN",
                        help="those of another group; may be given several times")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="compare the runs with these seeds [all]")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures to this JSON file, too")
    arguments = parser.parse_args()
    one = read_group(arguments.runs, arguments.seeds)
    found = [difference(one, read_group(folders, arguments.seeds)) for folders in arguments.over]
    corrected = holm([each["points"]["p_value"] for each in found])
    for each, p_value, folders in zip(found, corrected, arguments.over, strict=True):
        each["points"]["p_holm"] = p_value
        names = " over ".join(str(group[0]) + (" …" if len(group) > 1 else "") for group in (arguments.runs, folders))
        print(f"{names}: they differ in {', '.join(each['differ_in']) or 'nothing'}")
        if each["trained_with_other"]:
            print(f"  (not all were trained with the same {', '.join(each['trained_with_other'])})")
        for group, mean in zip(each["accuracies"], each["means"], strict=True):
            print(f"  {' '.join(f'{accuracy:.4f}' for accuracy in group)}, mean {mean:.4f}")
        points = each["points"]
        words = f"  {points['mean']:+.2f} points (n = {len(each['seeds'])} seeds)"
        if points["ci95"]:
            low, high = points["ci95"]
            words += f", 95% interval {low:+.2f} to {high:+.2f}, p = {points['p_value']:.2g}"
            words += f", {p_value:.2g} corrected" if len(found) > 1 else ""
        print(words)
    if arguments.output:
        write_json(arguments.output, found)


if __name__ == "__main__":
    try:
        main()
    except Failure as error:
        sys.exit(f"error: {error}")
