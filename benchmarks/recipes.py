"""What a change of the recipe buys: one training on 45,000 of CIFAR-10's training images, judged on the other 5,000.

    python benchmarks/recipes.py baseline 4                        the recipe as it is, 4 epochs
    python benchmarks/recipes.py baseline 4 padding=4 seed=1       with the padding and the seed changed
    python benchmarks/recipes.py teacher 12                        a teacher that has not seen the 5,000 images
    python benchmarks/recipes.py kd 4 temperature=2 "teacher=outputs/recipes/teacher 12 as it is"

Adds a row to results/recipes.csv and prints how long the gradients of the biases were; a training that was interrupted
is resumed by the same command. The test set is never read. All are judged on the same images: the standard error of a
difference between two rows is about 0.4 points. A teacher that main.py trained has seen the 5,000 images: its students
are to be compared with each other only. The names that can be changed:
"""

import argparse
import csv
import functools
import io
import math
import sys
from contextlib import ExitStack, contextmanager
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
from runs.files import Failure, write
from runs.lock import lock
from runs.machine import start_machine
from runs.progress import Options
from runs.run import Run
from runs.settings import Settings, default_augmentation

FIELDS = ("role", "pflop", "epochs", "batch", "what", "settings", "network", "val_accuracy", "train_accuracy", "n")
CHANGES = {
    "seed": "of the training [0]",
    "batch": "images in a batch; all rates follow its square root [128]",
    "rate": "the learning rate for batches of 128 [0.2]",
    "conv": "the convolutions' share of the learning rate",
    "bias": "the biases' share of it",
    "head": "the head's share of it",
    "clip": "the norm to which the gradients of all biases together are clipped",
    "padding": "by how many pixels views are moved at most",
    "cutout": "side in pixels of a square of each view that is blanked",
    "smoothing": "of the labels [0]",
    "decay": "weight decay of the head [0.0005]",
    "batchnorm": "momentum of batch norm [0.1]",
    "init": "dirac or he [dirac]",
    "lookahead": "yes or no: every fifth step ends in slow weights that follow the others [no]",
    "whitening": "in how many of the first epochs the whitening's bias is trained [all]",
    "widths": "of the network's layers, joined by commas",
    "teacher": "of a distilled student: model.pt or its folder",
    "temperature": "[4]",
    "alpha": "[0.9]",
    "mixed": "share of a student's views that are mixed with another image's, and so are a baseline's labels [0]",
    "cut": "yes or no: a square of the other view is pasted in, or the two are averaged [no]",
    "mirrored": "yes or no: soft targets are averaged over a view and its mirror image [no]",
}
OF_DISTILLATION = {"teacher", "temperature", "alpha", "mirrored"}
WORDS = {"init", "teacher", "cut", "mirrored", "lookahead"}  # whose values are no numbers
OUT_OF_PLACE = {"kd": set(), "baseline": OF_DISTILLATION, "teacher": OF_DISTILLATION | {"mixed", "cut"}}


class MixedViews(data.Views):
    """Views of which a `share` is mixed with the view of another image of `among`: averaged with a weight drawn evenly
    from 0 to 1 (mixup, arXiv 1710.09412), or, with `cut`, covered by a square of it of such a part of the area (CutMix,
    arXiv 1905.04899). A function of the epoch and the image's index alone, as all views are (arXiv 2106.05237)."""

    def __init__(self, *about, among, share, cut, **augmentation):
        super().__init__(*about, **augmentation)
        self.among, self.share, self.cut = among, share, cut
        self.mixing = functools.lru_cache(maxsize=1)(self._mixing)

    def _mixing(self, epoch):
        """Of all images in `epoch`: the others' indices (N,), their weights (N,), places of the squares (2, N)."""
        draws = models.generator(self.stream, "mixing", epoch)
        others = torch.arange(self.count)
        others[self.among] = self.among[torch.randperm(len(self.among), generator=draws)]
        weights = torch.rand(self.count, generator=draws)
        weights[torch.rand(self.count, generator=draws) >= self.share] = 0
        places = torch.rand(2, self.count, generator=draws)
        return others.to(self.device), weights.to(self.device), places.to(self.device)

    def squares(self, epoch, indices):
        """bool (B, S, S): the pixels that are another view's."""
        _, weights, places = self.mixing(epoch)
        sides = self.size * weights[indices].sqrt()
        starts = (places[:, indices] * (self.size - sides))[..., None]
        pixels = torch.arange(self.size, device=self.device) + 0.5
        rows, columns = (starts < pixels) & (pixels < starts + sides[:, None])
        return rows[:, :, None] & columns[:, None]

    def batch(self, epoch, indices):
        others, weights, _ = self.mixing(epoch)
        own, other = super().batch(epoch, indices), super().batch(epoch, others[indices])
        if self.cut:
            return torch.where(self.squares(epoch, indices)[:, None], other, own)
        return own.lerp(other, weights[indices][:, None, None, None])


class MixedLabels:
    """What a baseline is taught about MixedViews: each view's labels by their parts of it, as logits at T = 1."""

    def __init__(self, views, labels, classes):
        self.views, self.labels, self.classes = views, F.one_hot(labels, classes).float(), classes

    def epoch(self, epoch, description=""):
        others, weights, _ = self.views.mixing(epoch)
        if self.views.cut:
            everything = torch.arange(self.views.count, device=self.views.device).split(1000)
            weights = torch.cat([self.views.squares(epoch, part).float().mean((1, 2)) for part in everything])
        return distill.compress(self.labels.lerp(self.labels[others], weights[:, None]).log())


class Mirrored(nn.Module):
    """A teacher whose logits are the mean of those of an image and of its mirror image."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.outputs = teacher, teacher.outputs

    def forward(self, images):
        return (self.teacher(images) + self.teacher(images.flip(3))) / 2


class Lookahead(train.Muon):
    """Muon with slow weights, to which the network is set back in every fifth step and in the last one (Zhang et al.,
    arXiv 1907.08610): they move towards its weights by 1 - 0.95^5 t^3 of the way, where t rises from 0 to 1 (as in the
    repository cifar10-airbench), in the last step not at all."""

    def __init__(self, network, learning_rate, *rest):
        super().__init__(network, learning_rate, *rest)
        self.learning_rate = learning_rate

    @torch.no_grad()
    def step(self):
        first = self.param_groups[0]
        for group in self.param_groups:
            for parameter in group["params"] if not first.get("steps") else ():
                self.state[parameter]["slow"] = parameter.clone()
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        super().step()
        first["steps"] = first.get("steps", 0) + 1
        left = first["lr"] / self.learning_rate  # falls from 1 by the same share in every step, to that share
        is_last = first["steps"] > 1 and left < 1.5 * (1 - left) / (first["steps"] - 1)
        if first["steps"] % 5 and not is_last:
            return
        way = 0.0 if is_last else 1 - 0.95**5 * (1 - left) ** 3
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            parameter.copy_(self.state[parameter]["slow"].lerp_(parameter, way))


def word(changes, name, default, other):
    """Whether the change `name` says `other`; raises Failure where it says neither that nor `default`."""
    said = changes.pop(name, default)
    if said not in (default, other):
        raise Failure(f"{name}={said}: it can be {default} or {other}.")
    return said == other


def patches(role, changes):
    """The patches of this program's modules that make `changes`, which are taken out of the dict."""
    network = models.Teacher if role == "teacher" else models.Student
    found = []
    for name, constant in (("conv", "CONVOLUTIONS"), ("bias", "BIASES"), ("head", "HEAD")):
        if name in changes:
            found.append(patch.object(train, constant, (float(changes.pop(name)), getattr(train, constant)[1])))
    if "clip" in changes:
        found.append(patch.object(train, "CLIPPED", float(changes.pop("clip"))))
    if "batchnorm" in changes:
        layer, momentum = nn.BatchNorm2d, float(changes.pop("batchnorm"))
        found.append(patch.object(nn, "BatchNorm2d", lambda width: layer(width, momentum=momentum)))
    if word(changes, "lookahead", "no", "yes"):
        found.append(patch.object(train, "Muon", Lookahead))
    if word(changes, "init", "dirac", "he"):
        found.append(patch.object(nn.init, "dirac_", lambda weights: weights))
    if "whitening" in changes:
        epochs, one_epoch = int(changes.pop("whitening")), train.train_one_epoch

        def train_one_epoch(model, *about):
            model.features[0].bias.requires_grad_(about[-1].epoch < epochs)
            one_epoch(model, *about)

        found.append(patch.object(train, "train_one_epoch", train_one_epoch))
    if "widths" in changes:
        widths = tuple(map(int, changes.pop("widths").split(",")))
        found.append(patch.object(network.__init__, "__defaults__", (widths, *network.__init__.__defaults__[1:])))
    return found


@contextmanager
def said_of_biases():
    """Prints of the trainings in this context how long the biases' gradients were and how many were clipped."""
    norms, step = [], train.Muon.step

    def noted(optimizer):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [each.grad for each in parameters if each.ndim == 1 and each.grad is not None]
        norms.append(nn.utils.get_total_norm(gradients))
        step(optimizer)

    with patch.object(train.Muon, "step", noted):
        yield
    if norms:  # none where a finished training is repeated
        found = torch.stack(norms).cpu()
        said = f"median {found.median():.3f}, largest {found.max():.3f}"
        clipped = f"{(found > train.CLIPPED).float().mean():.0%} of {len(norms):,} steps"
        print(f"Norm of the biases' gradients: {said}; clipped in {clipped}")


def soft_targets(changes, loaded, views, machine, folder):
    """The distill.Ensemble of the teacher that `changes` name, and its digest."""
    path = Path(changes.pop("teacher"))
    teacher = models.load(path / "model.pt" if path.is_dir() else path).to(**machine.place)
    digest = models.digest(teacher.state_dict())
    if word(changes, "mirrored", "no", "yes"):
        teacher, digest = Mirrored(teacher).eval(), f"{digest} mirrored"
    if isinstance(views, MixedViews):
        digest += f" mixed {views.share} {views.cut}"  # whose soft targets are not those of the plain views
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
    pairs = [change.partition("=")[::2] for change in arguments.changes]
    changes = dict(pairs)
    known = CHANGES.keys() - OUT_OF_PLACE[arguments.role]
    if unknown := sorted(changes.keys() - known):
        parser.error(f"{unknown[0]} cannot be changed in a {arguments.role}: {', '.join(sorted(known))}")
    if len(changes) < len(pairs):
        parser.error("a name is given twice")
    if arguments.epochs < 1:
        parser.error("a training takes one epoch or more")
    for name, value in changes.items():
        number = int if name in ("seed", "batch", "padding", "widths", "whitening", "cutout") else float
        for part in value.split(",") if name == "widths" else [value]:
            try:
                number(0 if name in WORDS and part else part)
            except ValueError:
                wanted = "a value" if name in WORDS else "a whole number" if number is int else "a number"
                parser.error(f"{name}={value} needs {wanted}")
    if arguments.role == "kd" and "teacher" not in changes:
        parser.error("a distilled student needs teacher=PATH")
    if arguments.role == "kd" and "mixed" in changes and float(changes.get("alpha", 0.9)) != 1:
        parser.error("a mixed view has no label of its own: mixed needs alpha=1")
    if "smoothing" in changes and (
        "mixed" in changes or (arguments.role == "kd" and float(changes.get("alpha", 0)) == 1)
    ):
        parser.error("smoothing would change nothing: with mixed, or with alpha=1, no label is looked at")
    if "cut" in changes and "mixed" not in changes:
        parser.error("cut says how views are mixed: it needs mixed")
    what = " ".join(arguments.changes) or "as it is"

    machine = start_machine(arguments.device, "auto")
    loaded = data.load("cifar10", data_dir=arguments.data_dir).to(machine.device)
    batch = int(changes.pop("batch", 128))
    given = {
        "role": arguments.role, "data": loaded.digest, "epochs": arguments.epochs, "batch_size": batch,
        "learning_rate": float(changes.pop("rate", 0.2)) * math.sqrt(batch / 128), "image_size": loaded.image_size,
        "weight_decay": float(changes.pop("decay", 5e-4)), "seed": int(changes.pop("seed", 0)), "val_fraction": 0.1,
        "label_smoothing": float(changes.pop("smoothing", 0)),
    }  # fmt: skip
    usual = default_augmentation(arguments.role, arguments.epochs, loaded.image_size)
    augmentation = {name: type(value)(changes.pop(name, value)) for name, value in usual.items()}
    if not 0 <= augmentation["padding"] < loaded.image_size:
        parser.error(f"padding must be less than the image size, {loaded.image_size}")
    if not 0 <= augmentation["cutout"] <= loaded.image_size:
        parser.error(f"cutout must be at most the image size, {loaded.image_size}")
    with ExitStack() as stack:
        stack.enter_context(lock(arguments.output_dir))
        for change in patches(arguments.role, changes):
            stack.enter_context(change)
        share, cut, make_views = float(changes.pop("mixed", 0)), word(changes, "cut", "no", "yes"), data.Views
        if share:
            among = data.split(loaded.train_labels.cpu(), given["val_fraction"])[0]
            make_views = functools.partial(MixedViews, among=among, share=share, cut=cut)
        stack.enter_context(patch.object(train, "Views", make_views))
        views = make_views(loaded.train_images, loaded.mean, loaded.std, **augmentation)
        targets = None
        if arguments.role == "kd":
            targets, digest = soft_targets(changes, loaded, views, machine, arguments.output_dir / "targets")
            given |= {"temperature": float(changes.pop("temperature", 4)), "alpha": float(changes.pop("alpha", 0.9))}
            given["teacher"] = digest
        elif share:
            targets = MixedLabels(views, loaded.train_labels, len(loaded.classes))
            given |= {"role": "kd", "temperature": 1.0, "alpha": 1.0, "teacher": "mixed labels"}
        settings = Settings(**given, **augmentation)
        folder = arguments.output_dir / f"{arguments.role} {arguments.epochs} {what}".replace("/", "_")
        with said_of_biases():
            accuracy = train.train(Run(folder, settings), loaded, machine, Options(), targets)
        network = models.create(settings.architecture, len(loaded.classes), seed=0)
        costs = models.costs_of(network, loaded.image_size)
    with open(folder / "history.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    images = len(data.split(loaded.train_labels, settings.val_fraction)[0])
    size = f"{costs.macs / 1e6:.1f}M MACs, {costs.parameters / 1e6:.2f}M params"
    cutout = f", cutout {settings.cutout}" if settings.cutout else ""
    row = (
        arguments.role, f"{costs.macs * 6 * images * settings.epochs / 1e15:.4f}", settings.epochs, batch, what,
        f"recipe {settings.recipe}, seed {settings.seed}, padding {settings.padding}{cutout}", size, f"{accuracy:.4f}",
        f"{float(last['train_accuracy']):.4f}", 1,
    )  # fmt: skip
    lines = list(csv.reader(arguments.table.read_text().splitlines())) if arguments.table.exists() else [FIELDS]
    if list(map(str, row)) not in lines:  # when a finished training is repeated
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*lines, row])
        write(arguments.table, text.getvalue())
    print(", ".join(map(str, row)))


if __name__ == "__main__":
    try:
        main()
    except Failure as error:
        sys.exit(f"error: {error}")
