"""What a sweep's teacher gives away of the images on which the sweep is judged, where it was trained on them.

    python main.py --train-teacher --epochs 7 --output-dir outputs/seen
    python benchmarks/recipes.py teacher 7
    python benchmarks/recipes.py kd 6 teacher=outputs/seen/teacher-s0           and again with seed=1
    python benchmarks/recipes.py kd 6 "teacher=outputs/recipes/teacher 7 as it is"      likewise
    python benchmarks/leak.py --seen STUDENT STUDENT --unseen STUDENT STUDENT

None of the students has seen the 5,000 validation images, and they share all but the teacher. If it gives nothing away,
they differ on these as on the test set. STUDENT is a model.pt or its folder; those named at the same place are a pair.
Nothing is chosen by what is read of the test set here. Writes results/leak.json.
"""

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VAL_FRACTION = 0.1
sys.path.insert(0, str(ROOT))

import numpy as np

import data
import models
from runs.files import Failure, write_json
from runs.machine import start_machine
from train import evaluate


def load_pair(seen, unseen):
    """The two students at these paths; raises Failure unless they have not seen the validation images, and differ in
    the teacher alone."""
    pair = [models.load(path / "model.pt" if path.is_dir() else path) for path in (seen, unseen)]
    one, other = (student.settings for student in pair)
    apart = sorted(name for name in {**one, **other} if one.get(name) != other.get(name))
    if apart != ["teacher"] or one.get("val_fraction") != VAL_FRACTION:
        raise Failure(
            f"{seen} and {unseen} differ in {', '.join(apart) or 'nothing'}, with the validation fraction "
            f"{one.get('val_fraction')}. They must differ in the teacher alone, with {VAL_FRACTION}."
        )
    return pair


def right_answers(student, parts):
    """Of each part, (images, labels), a bool array: which images the student gets right."""
    logits = [evaluate(student, images, student.mean, student.std) for images, _ in parts]
    return [(each.argmax(1) == labels).cpu().numpy() for each, (_, labels) in zip(logits, parts, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--seen", "--unseen"):
        parser.add_argument(name, type=Path, nargs="+", required=True, metavar="STUDENT")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "leak.json", help="[results/leak.json]")
    arguments = parser.parse_args()
    if len(arguments.seen) != len(arguments.unseen):
        parser.error("as many students of the one teacher as of the other are needed")

    machine = start_machine(arguments.device, "fp32")
    loaded = data.load("cifar10", data_dir=arguments.data_dir).to(machine.device)
    rows = data.split(loaded.train_labels, VAL_FRACTION)[1].to(machine.device)
    parts = {
        "validation": (loaded.train_images[rows], loaded.train_labels[rows]),
        "test": (loaded.test_images, loaded.test_labels),
    }
    pairs = [load_pair(*paths) for paths in zip(arguments.seen, arguments.unseen, strict=True)]
    seen, unseen = (
        [right_answers(student.to(**machine.place), parts.values()) for student in students]
        for students in zip(*pairs, strict=True)
    )
    found = {"settings": [[student.settings for student in pair] for pair in pairs]}
    for number, name in enumerate(parts):
        ones, others = (np.array([student[number] for student in each], float) for each in (seen, unseen))
        by_image = 100 * (ones - others).mean(0)
        found[name] = {
            "images": len(by_image),
            "seen": ones.mean(1).tolist(),
            "unseen": others.mean(1).tolist(),
            "points": by_image.mean(),
            "standard_error": by_image.std(ddof=1) / len(by_image) ** 0.5,  # over images, for these students
        }
        accuracies = (" ".join(f"{value:.4f}" for value in found[name][which]) for which in ("seen", "unseen"))
        print("{}: {} against {}".format(name, *accuracies), end=", ")
        print(f"{found[name]['points']:+.2f} points, standard error {found[name]['standard_error']:.2f}")
    gap = found["validation"]["points"] - found["test"]["points"]
    error = math.hypot(found["validation"]["standard_error"], found["test"]["standard_error"])
    found["given_away"] = {"points": gap, "standard_error": error}
    print(f"given away: {gap:+.2f} points, standard error {error:.2f}")
    write_json(arguments.output, found)


if __name__ == "__main__":
    try:
        main()
    except Failure as error:
        sys.exit(f"error: {error}")
