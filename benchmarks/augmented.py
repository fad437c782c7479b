"""What does averaging over views of a test image add to a network's accuracy?

    python benchmarks/augmented.py results/cifar10/teacher-s0 --data-dir data --output found.json

The speed runs for CIFAR-10 tell accuracies with test-time augmentation, this program without. So that they can be
compared, this tests finished runs in three ways: as they are; with the logits of an image and its mirror image
averaged; and as airbench does it (arXiv 2404.00498, multi-crop evaluation), with half of the weight on that average,
and half on that of the image moved by a pixel to the upper left and to the lower right, each mirrored as well. What a
moved image lacks is filled by reflection.
Nothing is chosen by these figures.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import data
import models
import train
from runs.files import Failure, read_json, write_json
from runs.hooks import Hooks
from runs.machine import start_machine
from use.answers import answers, load_to_ask


def moved(images, pixels):
    """uint8 images (N, H, W, 3), each moved by so many pixels to the right and down."""
    distance = abs(pixels)
    wider = np.pad(images.cpu().numpy(), ((0, 0), (distance, distance), (distance, distance), (0, 0)), mode="reflect")
    start, (height, width) = distance - pixels, images.shape[1:3]
    return torch.from_numpy(wider[:, start : start + height, start : start + width].copy()).to(images.device)


def ways(network, images):
    """The logits (N, classes) of uint8 images in three ways, by name."""
    plain = answers(network, images)
    mirrored = (plain + answers(network, images.flip(2))) / 2
    others = [answers(network, moved(images, pixels), mirror=True) for pixels in (-1, 1)]
    return {
        "plain": plain,
        "mirrored": mirrored,
        "mirrored and moved": mirrored / 2 + sum(others) / 4,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="of this program's own networks: its folder or model.pt"
    )
    parser.add_argument("--dataset", default="cifar10", choices=("cifar10", "cifar100", "folder"), help="[cifar10]")
    parser.add_argument("--data-dir", default="data", help="[data]")
    parser.add_argument("--device", default="auto", help="[auto]")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a JSON file; keeps what it has")
    arguments = parser.parse_args()
    machine = start_machine(arguments.device, "fp32")
    found = read_json(arguments.output) if arguments.output.exists() else {}
    for run in arguments.runs:
        path = run / "model.pt" if run.is_dir() else run
        network = load_to_ask(path, Hooks(), mirror=True).to(**machine.place)
        loaded = data.load(arguments.dataset, data_dir=arguments.data_dir, image_size=network.image_size)
        if network.settings.get("data") != loaded.digest:
            raise Failure(f"{path} was trained on other images than those in {arguments.data_dir}.")
        loaded = loaded.to(machine.device)
        accuracies = {
            name: train.accuracy(logits, loaded.test_labels)
            for name, logits in ways(network, loaded.test_images).items()
        }
        print(f"{path}: " + ", ".join(f"{name} {accuracy:.4f}" for name, accuracy in accuracies.items()), flush=True)
        digest = models.identity(network.state_dict(), network.settings)
        found[digest] = {"settings": network.settings, "accuracies": accuracies}
        write_json(arguments.output, found)


if __name__ == "__main__":
    try:
        main()
    except Failure as error:
        sys.exit(f"error: {error}")
