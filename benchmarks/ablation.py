"""What do shared views buy? Students distilled from logits of the clean pictures instead, the same in every epoch.

    python benchmarks/ablation.py OUTPUT_DIR PICTURES --temperature 4 --alpha 0.9

OUTPUT_DIR holds finished kd and baseline runs of that temperature and alpha, trained on the folder PICTURES. For every
seed of theirs this trains the same student with the teacher's logits of the uncropped, unflipped pictures in place of
its logits of the views: the shortcut of much published code, which costs one pass of the teacher for a whole training.
Runs are kept in OUTPUT_DIR/fixed and can be continued; writes OUTPUT_DIR/fixed.json.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import main as command_line
import models
import train
from distill import INFERENCE_BATCH, Ensemble, describe, predict, rounded
from files import Failure, Stop, lock, write_json
from measures import paired_test, spread
from report import agree, finished_runs


class FixedTargets:
    """The teacher's logits of the clean training pictures: what SoftTargets is, but the same for every epoch."""

    def __init__(self, teacher, loaded, precision):
        parts = loaded.train_pictures.split(INFERENCE_BATCH[loaded.train_pictures.device.type])
        self.asked = teacher, (models.normalise(part, loaded.mean, loaded.std) for part in parts), precision
        self.logits = None

    def epoch(self, epoch, description=""):
        if self.logits is None:
            self.logits = rounded(predict(*self.asked))
        return self.logits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--alpha", type=float, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", help="[all that OUTPUT_DIR holds]")
    parser.add_argument(
        "--teacher",
        nargs="+",
        help="its folder or model.pt, or those of several [the only one, or that of seed 0, in OUTPUT_DIR]",
    )
    parser.add_argument("--device", default="auto", help="must be what the runs were trained on")
    arguments = parser.parse_args()
    temperature, alpha, output = arguments.temperature, arguments.alpha, arguments.output

    runs = finished_runs(output)
    pairs = {key[3]: runs[key] for key in runs if key[:3] == ("kd", temperature, alpha)}
    baselines = {key[3]: run for key, run in runs.items() if key[0] == "baseline"}
    seeds = sorted(pairs.keys() & baselines.keys() & set(arguments.seeds or pairs))
    seeds = [seed for seed in seeds if agree(pairs[seed], baselines[seed])]
    missing = sorted(set(arguments.seeds or ()) - set(seeds))
    if missing or not seeds:
        which = f" with seed {missing[0]}" if missing else ""
        sys.exit(f"error: {output} holds no pair of temperature {temperature} and alpha {alpha}{which}.")
    recipes = {(pairs[seed]["settings"]["recipe"], pairs[seed]["settings"]["views"]) for seed in seeds}
    if recipes != {(train.RECIPE, data.VIEWS_VERSION)}:
        sys.exit(f"error: the runs in {output} are of another recipe than this version of the program trains.")
    device = command_line.choose_device(arguments.device)
    made_with = pairs[seeds[0]]["environment"]
    precision = made_with["precision"]
    if describe(device) != made_with["device"]:
        sys.exit(f"error: the runs were trained on {made_with['device']}, and this is {describe(device)}.")
    loaded = data.folder(arguments.pictures, pairs[seeds[0]]["settings"]["image_size"], cache=output / "data")
    loaded = loaded.to(device)
    places = ["--teacher", *arguments.teacher] if arguments.teacher else []
    paths = command_line.find_teachers(command_line.parse(["--output-dir", str(output), *places]))
    teachers = {models.digest(teacher.state_dict()): teacher for teacher in map(models.load, paths)}
    settings = [pairs[seed]["settings"] for seed in seeds]
    if any(each["data"] != loaded.digest for each in settings):
        sys.exit(f"error: the runs in {output} were trained on other pictures than those in {arguments.pictures}.")
    if any(each["teacher"] != "+".join(sorted(teachers)) for each in settings):
        sys.exit(f"error: the runs in {output} were not distilled from this teacher. Name theirs with --teacher.")
    trainer = train.Trainer(loaded, device, precision, stop=Stop(), compiled=made_with.get("compiled", False))
    teachers = [teachers[digest].to(device, memory_format=torch.channels_last) for digest in sorted(teachers)]
    targets = Ensemble([FixedTargets(teacher, loaded, precision) for teacher in teachers])
    fixed = []
    for seed in seeds:
        settings = train.Settings(**{k: v for k, v in pairs[seed]["settings"].items() if k != "architecture"})
        with lock(output):
            fixed.append(trainer.train(output / "fixed" / settings.name, settings, targets))
        print(f"seed {seed}: {fixed[-1]:.4f} with fixed targets, {pairs[seed]['accuracy']:.4f} with shared views")
    shared = [pairs[seed]["accuracy"] for seed in seeds]
    baseline = [baselines[seed]["accuracy"] for seed in seeds]
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
