"""What a change of the recipe buys: one training on 45,000 of CIFAR-10's training images, judged on the other 5,000.

    python benchmarks/recipes.py baseline 4                        the recipe as it is, 4 epochs
    python benchmarks/recipes.py baseline 4 padding=4 seed=1       with one thing changed
    python benchmarks/recipes.py kd 4 temperature=2 alpha=0.5 teacher=outputs/teacher-s0

Adds a row to results/recipes.csv; a training that was interrupted is resumed by the same command. The test set is never
read. One seed and 5,000 images cannot show differences below about 0.6 points. The names that can be changed:
"""

import argparse
import csv
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import nn
from torch.nn import functional as F

import data
import distill
import models
import train
from runs.files import Failure
from runs.machine import start_machine
from runs.progress import Options
from runs.run import Run
from runs.settings import Settings, default_padding

FIELDS = ("role", "pflop", "epochs", "batch", "what", "settings", "network", "val_accuracy", "train_accuracy", "n")
CHANGES = {
    "seed": "of the training [0]",
    "batch": "images in a batch; all rates follow its square root [128]",
    "rate": "the learning rate for batches of 128 [0.2]",
    "conv": "the convolutions' share of the learning rate",
    "bias": "the biases' share of it",
    "padding": "by how many pixels views are moved at most",
    "cutout": "side of a grey square in every view [none]",
    "smoothing": "of the labels [0]",
    "decay": "weight decay of the head [0.0005]",
    "batchnorm": "momentum of batch norm [0.1]",
    "activation": "gelu or silu [gelu]",
    "init": "dirac or he [dirac]",
    "widths": "of the network's layers, joined by commas",
    "teacher": "of a distilled student: model.pt or its folder",
    "temperature": "[4]",
    "alpha": "[0.9]",
    "mirrored": "1: soft targets are averaged over a view and its mirror image [0]",
}


class Mirrored(nn.Module):
    """A teacher whose logits are the mean of those of an image and of its mirror image."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.outputs = teacher, teacher.outputs

    def forward(self, images):
        return (self.teacher(images) + self.teacher(images.flip(3))) / 2


def with_cutout(batch, side):
    """data.Views.batch, its views with a square of `side` pixels set to the mean colour; its centre is anywhere."""

    def cut(views, epoch, indices):
        images = batch(views, epoch, indices)
        draws = models.generator(views.stream, "cutout", epoch)
        centres = torch.randint(0, views.size, (2, views.count, 1), generator=draws)[:, indices]
        rows, columns = (torch.arange(views.size) - centres + side // 2).unbind()
        inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
        return images.masked_fill(inside[:, None], 0.0)

    return cut


def patches(role, changes):
    """The patches of this program's modules that make `changes`, which are taken out of the dict."""
    network = models.Teacher if role == "teacher" else models.Student
    found = []
    for name, constant in (("conv", "CONVOLUTIONS"), ("bias", "BIASES")):
        if name in changes:
            found.append(patch.object(train, constant, (float(changes.pop(name)), getattr(train, constant)[1])))
    if "cutout" in changes:
        found.append(patch.object(data.Views, "batch", with_cutout(data.Views.batch, int(changes.pop("cutout")))))
    if "smoothing" in changes:
        entropy, smoothing = F.cross_entropy, float(changes.pop("smoothing"))
        found.append(patch.object(F, "cross_entropy", lambda *about: entropy(*about, label_smoothing=smoothing)))
    if "batchnorm" in changes:
        layer, momentum = nn.BatchNorm2d, float(changes.pop("batchnorm"))
        found.append(patch.object(nn, "BatchNorm2d", lambda width: layer(width, momentum=momentum)))
    if changes.pop("activation", "gelu") == "silu":
        found += [patch.object(nn, "GELU", nn.SiLU), patch.object(F, "gelu", F.silu)]
    if changes.pop("init", "dirac") == "he":
        found.append(patch.object(nn.init, "dirac_", lambda weights: weights))
    if "widths" in changes:
        widths = tuple(map(int, changes.pop("widths").split(",")))
        found.append(patch.object(network.__init__, "__defaults__", (widths, *network.__init__.__defaults__[1:])))
    return found


def soft_targets(changes, loaded, padding, machine, folder):
    """The distill.Ensemble of the teacher that `changes` name, and its digest."""
    path = Path(changes.pop("teacher"))
    teacher = models.load(path / "model.pt" if path.is_dir() else path).to(**machine.place)
    digest = models.digest(teacher.state_dict())
    if changes.pop("mirrored", "0") == "1":
        teacher, digest = Mirrored(teacher).eval(), f"{digest} mirrored"
    views = data.Views(loaded.train_images, loaded.mean, loaded.std, padding=padding)
    return distill.Ensemble([distill.SoftTargets(teacher, digest, loaded.digest, views, folder, machine)]), digest


def main():
    names = "\n".join(f"    {name:12} {what}" for name, what in CHANGES.items())
    about = {"description": __doc__ + names, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**about)
    parser.add_argument("role", choices=("teacher", "kd", "baseline"))
    parser.add_argument("epochs", type=int)
    parser.add_argument("changes", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/recipes"))
    parser.add_argument("--table", type=Path, default=ROOT / "results" / "recipes.csv", help="[results/recipes.csv]")
    arguments = parser.parse_args()
    changes = dict(change.partition("=")[::2] for change in arguments.changes)
    if unknown := sorted(changes.keys() - CHANGES.keys()):
        parser.error(f"{unknown[0]} is not a name that can be changed: {', '.join(CHANGES)}")
    if (arguments.role == "kd") != ("teacher" in changes):
        parser.error("a distilled student needs teacher=PATH, the others have none")
    what = " ".join(arguments.changes) or "as it is"

    machine = start_machine(arguments.device, "auto")
    loaded = data.load("cifar10", data_dir=arguments.data_dir).to(machine.device)
    batch = int(changes.pop("batch", 128))
    given = {
        "role": arguments.role, "data": loaded.digest, "epochs": arguments.epochs, "batch_size": batch,
        "learning_rate": float(changes.pop("rate", 0.2)) * math.sqrt(batch / 128), "image_size": loaded.image_size,
        "weight_decay": float(changes.pop("decay", 5e-4)), "seed": int(changes.pop("seed", 0)), "val_fraction": 0.1,
    }  # fmt: skip
    given["padding"] = int(changes.pop("padding", default_padding(arguments.epochs, loaded.image_size)))
    with ExitStack() as stack:
        for change in patches(arguments.role, changes):
            stack.enter_context(change)
        targets = None
        if arguments.role == "kd":
            targets, digest = soft_targets(changes, loaded, given["padding"], machine, arguments.output_dir / "targets")
            given |= {"temperature": float(changes.pop("temperature", 4)), "alpha": float(changes.pop("alpha", 0.9))}
            given["teacher"] = digest
        settings = Settings(**given)
        folder = arguments.output_dir / f"{arguments.role} {arguments.epochs} {what}".replace("/", "_")
        accuracy = train.train(Run(folder, settings), loaded, machine, Options(), targets)
        network = models.create(settings.architecture, len(loaded.classes), seed=0)
        costs = models.costs_of(network, loaded.image_size)
    with open(folder / "history.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    images = len(data.split(loaded.train_labels, settings.val_fraction)[0])
    size = f"{costs.macs / 1e6:.1f}M MACs, {costs.parameters / 1e6:.2f}M params"
    row = (
        arguments.role, f"{costs.macs * 6 * images * settings.epochs / 1e15:.4f}", settings.epochs, batch, what,
        f"recipe {settings.recipe}, seed {settings.seed}", size, f"{accuracy:.4f}",
        f"{float(last['train_accuracy']):.4f}", 1,
    )  # fmt: skip
    new = not arguments.table.exists()
    with open(arguments.table, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([FIELDS] * new + [row])
    print(", ".join(map(str, row)))


if __name__ == "__main__":
    try:
        main()
    except Failure as error:
        sys.exit(f"error: {error}")
