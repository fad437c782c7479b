"""What do shared views buy? Students distilled from logits of the clean images instead, the same in every epoch.

    python benchmarks/ablation.py OUTPUT_DIR --data-dir data --temperature 4 --alpha 0.9

OUTPUT_DIR holds finished kd and baseline runs of that temperature and alpha. For every seed of theirs this trains the
same student with the teacher's logits of the uncropped, unflipped images in place of its logits of the views: the
shortcut of much published code, which costs one pass of the teacher for a whole training.
Runs are kept in OUTPUT_DIR/fixed and can be resumed; writes OUTPUT_DIR/fixed.json.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import models
from arguments import parse
from distill import Ensemble, compress
from models import inference_batch, predict
from reports.records import comparable, finished_runs
from reports.statistics import paired_test, spread
from runs.files import Failure, write_json
from runs.lock import lock
from runs.machine import describe, start_machine
from runs.progress import Options
from runs.run import Run
from runs.settings import RECIPE, VIEWS_VERSION
from runs.teachers import find_teachers
from train import train


class FixedTargets:
    """The teacher's logits of the clean training images: what SoftTargets is, but the same for every epoch."""

    def __init__(self, teacher, loaded, machine):
        parts = loaded.train_images.split(inference_batch(machine.device, loaded.image_size))
        self.asked = teacher, (models.normalize(part, loaded.mean, loaded.std) for part in parts), machine.autocast()
        self.logits = None

    def epoch(self, epoch, description=""):
        if self.logits is None:
            self.logits = compress(predict(*self.asked))
        return self.logits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dataset", default="cifar10", choices=("cifar10", "folder"))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--alpha", type=float, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", help="[all that OUTPUT_DIR holds]")
    parser.add_argument("--teacher", nargs="+", help="as for main.py [the only one, or that of seed 0, in OUTPUT_DIR]")
    parser.add_argument("--device", default="auto", help="must be what the runs were trained on")
    arguments = parser.parse_args()
    temperature, alpha, output = arguments.temperature, arguments.alpha, arguments.output

    runs = finished_runs(output)
    pairs = {key.seed: run for key, run in runs.items() if key.way == (temperature, alpha, None)}
    baselines = {key.seed: run for key, run in runs.items() if key.role == "baseline"}
    seeds = sorted(pairs.keys() & baselines.keys() & set(arguments.seeds or pairs))
    seeds = [seed for seed in seeds if comparable(pairs[seed].settings, baselines[seed].settings)]
    missing = sorted(set(arguments.seeds or ()) - set(seeds))
    if missing or not seeds:
        which = f" with seed {missing[0]}" if missing else ""
        raise Failure(
            f"{output} holds no pair of temperature {temperature} and alpha {alpha}{which}, by plain distillation of "
            "this program's student on all training images."
        )
    settings = [pairs[seed].settings for seed in seeds]
    if not all(comparable(settings[0], each) for each in settings):
        raise Failure(f"the runs in {output} were not all trained alike. Name seeds that were with --seeds.")
    if {(each.recipe, each.views) for each in settings} != {(RECIPE, VIEWS_VERSION)}:
        raise Failure(f"the runs in {output} are of another recipe than this version of the program trains.")
    made_with = pairs[seeds[0]].environment
    machine = start_machine(arguments.device, made_with["precision"], made_with["compiled"])
    if describe(machine.device) != made_with["device"]:
        raise Failure(f"the runs were trained on {made_with['device']}, and this is {describe(machine.device)}.")
    size, kept = settings[0].image_size, output / "data"
    loaded = data.load(arguments.dataset, data_dir=arguments.data_dir, image_size=size, cache=kept).to(machine.device)
    places = ["--teacher", *arguments.teacher] if arguments.teacher else []
    teachers = [models.load(path) for path in find_teachers(parse(["--output-dir", str(output), *places]))]
    teachers = {models.digest(teacher.state_dict()): teacher for teacher in teachers}
    if any(each.data != loaded.digest for each in settings):
        raise Failure(f"the runs in {output} were trained on other images than those in {arguments.data_dir}.")
    if any(each.teacher != "+".join(sorted(teachers)) for each in settings):
        raise Failure(f"the runs in {output} were not distilled from this teacher. Name theirs with --teacher.")
    networks = [teachers[digest].to(**machine.place) for digest in sorted(teachers)]
    targets = Ensemble([FixedTargets(network, loaded, machine) for network in networks])
    fixed = []
    for each in settings:
        with lock(output):
            fixed.append(train(Run(output / "fixed" / each.name, each), loaded, machine, Options(), targets))
        shared = pairs[each.seed].accuracy
        print(f"seed {each.seed}: {fixed[-1]:.4f} with fixed targets, {shared:.4f} with shared views")
    shared = [pairs[seed].accuracy for seed in seeds]
    baseline = [baselines[seed].accuracy for seed in seeds]
    result = {"temperature": temperature, "alpha": alpha, "seeds": seeds}
    for name, accuracies in (("baseline", baseline), ("fixed", fixed), ("shared", shared)):
        result[name] = {"accuracies": accuracies, "mean": sum(accuracies) / len(seeds), "std": spread(accuracies)}
    for name, one, other in (
        ("fixed_over_baseline", fixed, baseline),
        ("shared_over_baseline", shared, baseline),
        ("shared_over_fixed", shared, fixed),
    ):
        result[name] = paired_test([100 * (a - b) for a, b in zip(one, other, strict=True)])
        words = f"{name.replace('_', ' ')}: {result[name]['mean']:+.2f} points"
        if result[name]["ci95"]:
            low, high = result[name]["ci95"]
            words += f", 95% interval {low:+.2f} to {high:+.2f}, p = {result[name]['p_value']:.2g}"
        print(words)
    write_json(output / "fixed.json", result)


if __name__ == "__main__":
    try:
        main()
    except Failure as error:
        sys.exit(f"error: {error}")
