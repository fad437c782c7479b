"""Labels for a tenth of the images: what do the other nine tenths add to distillation, without labels?

    python benchmarks/unlabeled.py --data-dir data --output-dir outputs/few-labels

Writes CIFAR-10 as PNG files, which change no pixel, to a folder images-0.1 in --output-dir: of the training images a
tenth of each class to train/CLASS, the others, without their classes, to unlabeled/same; the test images to test/CLASS.
A teacher is trained on the tenth with labels; then, seed by seed, students that see the other images, too, students of
plain distillation, and baselines. Since the first take twice as many images in a step, plain distillation and baseline
are also trained for twice as many epochs, and compared with these.

    python benchmarks/unlabeled.py --classes bird cat deer dog frog horse \\
        --output-dir outputs/animals --results results/animals

Must these images show the classes? Only the images of --classes have labels and are tested; the images of all other
classes go to unlabeled/other, and of the two folders the larger keeps only as many as the smaller. Students see either
the one or the other.

Every step is a command, which is printed. So all of it can be interrupted and repeated: what is finished is reused.
Writes comparison.json, longer.json and difference.json to --results, with --classes also other.json and
other_difference.json.
"""

import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from commands import run
from PIL import Image

import data
from runs.files import Failure, make_folder
from runs.settings import run_name


def write_images(folder, data_dir, fraction, classes=None):
    """Writes CIFAR-10 to `folder` as the header says, with labels for `fraction` of the training images of `classes`,
    unless it is there."""
    if folder.exists():
        return
    loaded = data.load("cifar10", data_dir=data_dir)
    for name in classes or ():
        if name not in loaded.classes:
            raise Failure(f"{name} is no class of CIFAR-10: {', '.join(loaded.classes)}.")
    known = [label for label, name in enumerate(loaded.classes) if name in (classes or loaded.classes)]
    labeled = set(loaded.transfer_set(fraction).tolist())
    places = {"train": {}, "same": {}, "other": {}, "test": {}}  # of the images to write: their numbers and labels
    for number, label in enumerate(loaded.train_labels.tolist()):
        place = "other" if label not in known else "train" if number in labeled else "same"
        places[place][number] = label
    places["test"] = {number: label for number, label in enumerate(loaded.test_labels.tolist()) if label in known}
    if classes:
        fewer = min(len(places["same"]), len(places["other"]))
        places |= {place: dict(list(places[place].items())[:fewer]) for place in ("same", "other")}
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an interrupted command, perhaps with another fraction
    for place, found in places.items():
        images = loaded.test_images if place == "test" else loaded.train_images
        for number, label in found.items():
            inside = f"unlabeled/{place}" if place in ("same", "other") else f"{place}/{loaded.classes[label]}"
            path = part / inside / f"{number:05d}.png"
            make_folder(path.parent)
            Image.fromarray(images[number].numpy()).save(path)
    part.rename(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="of students; teacher and controls: twice as many [30]")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=32.0)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--fraction", type=float, default=0.1, help="of the images that keep their labels [0.1]")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="with labels; the others' images have none [all]")
    parser.add_argument("--processes", type=int, default=1, help="that share the students' trainings [1]")
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 is or is downloaded to [data]")
    parser.add_argument("--output-dir", type=Path, help="[outputs/few-labels; with --classes there is no default]")
    parser.add_argument("--results", type=Path, help="[results/few-labels; with --classes there is no default]")
    parser.add_argument("options", nargs="*", help="more options for main.py, after --")
    arguments = parser.parse_args()
    if arguments.classes and not (arguments.output_dir and arguments.results):
        parser.error("with --classes, name another --output-dir and --results than those of all classes")
    output = (arguments.output_dir or Path("outputs/few-labels")).resolve()
    results = (arguments.results or ROOT / "results" / "few-labels").resolve()
    folder = output / "-".join(["images", f"{arguments.fraction:g}", *(arguments.classes or [])])
    longer, other = output / "longer", output / "other"
    try:
        make_folder(output)
        write_images(folder, arguments.data_dir, arguments.fraction, arguments.classes)
    except Failure as error:
        sys.exit(f"error: {error}")
    common = ["main.py", "--dataset", "folder", "--data-dir", folder, *arguments.options]
    run(*common, "--output-dir", output, "--train-teacher", "--epochs", 2 * arguments.epochs)
    common += ["--teacher", output / "teacher-s0", "--seeds", arguments.seeds]
    common += ["--temperature", arguments.temperature, "--alpha", arguments.alpha]
    commands = {output: ["--epochs", arguments.epochs, "--unlabeled", folder / "unlabeled" / "same"]}
    if arguments.classes:
        commands[other] = ["--epochs", arguments.epochs, "--unlabeled", folder / "unlabeled" / "other"]
    commands[longer] = ["--epochs", 2 * arguments.epochs]
    pair = run_name("kd", arguments.temperature, arguments.alpha, "*").removeprefix("kd-")  # T32-a0.9-s*
    controls = [f"kd-{pair}", "baseline-s*"]
    make_folder(results)
    for place, words in commands.items():
        if place == other:  # its controls are those that are trained by now
            for control in (path for name in controls for path in output.glob(name)):
                shutil.copytree(control, other / control.name, dirs_exist_ok=True)
        run(*common, "--output-dir", place, *words, processes=arguments.processes)
        shutil.copy(place / "comparison.json", results / f"{'comparison' if place == output else place.name}.json")
    controls = [place / name for place in (output, longer) for name in controls]
    first = output / f"kd-unlabeled-{pair}"
    compare(first, controls, results / "difference.json")
    if arguments.classes:
        compare(other / first.name, [first, *controls], results / "other_difference.json")


def compare(runs, groups, file):
    """Writes to `file` how far `runs` are ahead of each of `groups`."""
    over = [word for group in groups for word in ("--over", group)]
    run("benchmarks/difference.py", runs, *over, "--output", file)


if __name__ == "__main__":
    main()
