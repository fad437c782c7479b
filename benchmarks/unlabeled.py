"""Labels for a tenth of the images: what do the other nine tenths add to distillation, without labels?

    python benchmarks/unlabeled.py --data-dir data --output-dir outputs/few-labels

Writes CIFAR-10 as PNG files, which change no pixel, to a folder images-0.1: of the training images a tenth of each
class to train/CLASS, the others, without their classes, to unlabeled; the test images to test/CLASS. A teacher is
trained on the tenth with labels; then, seed by seed, students that see the other images, too, students of plain
distillation, and baselines. Since the first take twice as many images in a step, plain distillation and baseline are
also trained for twice as many epochs, and compared with these.

Every step is a command, which is printed. So all of it can be interrupted and repeated: what is finished is reused.
Writes comparison.json, longer.json and difference.json to --results.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image

import data
from runs.files import Failure, make_folder
from runs.settings import run_name


def write_images(folder, data_dir, fraction):
    """Writes CIFAR-10 to `folder` as the header says, with labels for `fraction` of the training images, unless it is
    there."""
    if folder.exists():
        return
    loaded = data.load("cifar10", data_dir=data_dir)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an interrupted command, perhaps with another fraction
    labeled = set(loaded.transfer_set(fraction).tolist())
    splits = ("train", loaded.train_images, loaded.train_labels), ("test", loaded.test_images, loaded.test_labels)
    for split, images, labels in splits:
        for number, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
            known = split == "test" or number in labeled
            path = part / (f"{split}/{loaded.classes[label]}" if known else "unlabeled") / f"{number:05d}.png"
            make_folder(path.parent)
            Image.fromarray(image).save(path)
    part.rename(folder)


def run(*words, processes=1):
    """Runs a Python program of this repository, shared by `processes`; ends where it fails."""
    words = [str(word) for word in words]
    print(f"\n$ {'python' if processes == 1 else 'torchrun'} {shlex.join(words)}", flush=True)
    shared = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    status = subprocess.run([sys.executable, *(shared if processes > 1 else []), *words], cwd=ROOT).returncode
    if status:
        sys.exit(status)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="of students; teacher and controls: twice as many [30]")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=32.0)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--fraction", type=float, default=0.1, help="of the images that keep their labels [0.1]")
    parser.add_argument("--processes", type=int, default=1, help="that share the students' trainings [1]")
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 is or is downloaded to [data]")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/few-labels"))
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "few-labels")
    parser.add_argument("options", nargs="*", help="more options for main.py, after --")
    arguments = parser.parse_args()
    output, results = arguments.output_dir.resolve(), arguments.results.resolve()
    folder, longer = output / f"images-{arguments.fraction:g}", output / "longer"
    try:
        make_folder(output)
        write_images(folder, arguments.data_dir, arguments.fraction)
    except Failure as error:
        sys.exit(f"error: {error}")
    common = ["main.py", "--dataset", "folder", "--data-dir", folder, *arguments.options]
    run(*common, "--output-dir", output, "--train-teacher", "--epochs", 2 * arguments.epochs)
    common += ["--teacher", output / "teacher-s0", "--seeds", arguments.seeds]
    common += ["--temperature", arguments.temperature, "--alpha", arguments.alpha]
    more, processes = ["--unlabeled", folder / "unlabeled"], arguments.processes
    run(*common, "--output-dir", output, "--epochs", arguments.epochs, *more, processes=processes)
    run(*common, "--output-dir", longer, "--epochs", 2 * arguments.epochs, processes=processes)
    make_folder(results)
    shutil.copy(output / "comparison.json", results / "comparison.json")
    shutil.copy(longer / "comparison.json", results / "longer.json")
    pair = run_name("kd", arguments.temperature, arguments.alpha, "*").removeprefix("kd-")  # T32-a0.9-s*
    others = [each / name for each in (output, longer) for name in (f"kd-{pair}", "baseline-s*")]
    others = [word for each in others for word in ("--over", each)]
    run("benchmarks/difference.py", output / f"kd-unlabeled-{pair}", *others, "--output", results / "difference.json")


if __name__ == "__main__":
    main()
