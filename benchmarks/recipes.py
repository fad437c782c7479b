"""Which recipe learns most in a given number of epochs? Chosen on a validation part; the test set is never looked at.

    python benchmarks/recipes.py PICTURES --architecture student --epochs 4 "" "lr=0.4" "lr=0.4 padding=2"

Each quoted argument is a recipe: what it changes in the program's own ("" changes nothing; views and order are those
of students). 45,000 pictures of CIFAR-10's training set are trained on and 5,000 (500 a class) are the validation part,
the same for every recipe. Prints one line a recipe and appends it to --output (CSV). The standard error of one accuracy
on 5,000 pictures is above half a point, so what one run shows is a hint and no proof.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import models
import muon
import train
from distill import DTYPES, SoftTargets, distillation_loss, precision_context
from files import Failure

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
WORDS = {"activation": ACTIVATIONS, "head": ("max", "average"), "optimiser": ("muon", "sgd")}
DEFAULTS = {
    "lr": None,  # None: the program's
    "weight_decay": 5e-4,
    "batch": 128,
    "warmup": train.WARMUP,
    "padding": None,
    "smoothing": 0.0,  # of the labels (Szegedy et al., arXiv 1512.00567)
    "activation": "relu",
    "head": "max",
    "scale": None,  # of the logits
    "whiten": 0,  # 1: the first layer is fixed and whitens patches (arXiv 2404.00498)
    "dirac": 0,  # 1: convolutions begin as the identity, as far as channels go (arXiv 2404.00498)
    "bias_rate": 1.0,  # factor of the learning rate of batch norm's biases (arXiv 2404.00498)
    "zero": 0,  # 1: residual branches begin at zero (arXiv 1706.02677)
    "lookahead": 0,  # 1: weights averaged along the way (arXiv 1907.08610, as in 2404.00498)
    "cutout": 0,  # pixels of a grey square in every view (arXiv 1708.04552)
    "optimiser": "muon",  # or sgd
    "convolutions": muon.CONVOLUTIONS,  # their share of the learning rate, for Muon
    "momentum": train.MOMENTUM,
    "iterations": muon.ITERATIONS,
    "stem": None,
    "widths": None,  # e.g. 64,256,384, or for students 32,64/64,128/128,128
    "depth": None,
    "pictures": 0,  # train on so many, drawn once and for all, instead of all 45,000
    "teacher": None,  # the path of a model.pt
    "temperature": 4.0,
    "alpha": 0.9,
}
COLUMNS = ("architecture", "epochs", "precision", "recipe", "val_accuracy", "train_accuracy", "seconds")


def parse(text):
    """The recipe of "lr=0.4 padding=2": DEFAULTS with these changed."""
    recipe = dict(DEFAULTS)
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in DEFAULTS or not value:
            raise SystemExit(f"error: '{word}' is not NAME=VALUE with one of these names: {', '.join(DEFAULTS)}.")
        if name in WORDS and value not in WORDS[name]:
            raise SystemExit(f"error: {name} is one of {', '.join(WORDS[name])}, not '{value}'.")
        kind = type(DEFAULTS[name])
        if name in ("lr", "scale"):
            kind = float
        elif name in ("padding", "stem", "depth"):
            kind = int
        try:
            recipe[name] = value if kind is type(None) else kind(value)
        except ValueError:
            raise SystemExit(f"error: '{value}' is not a number, which {name} needs.") from None
    if recipe["teacher"] and recipe["cutout"]:
        raise SystemExit("error: cutout does not go with a teacher, who would see other views than the student.")
    if recipe["teacher"] and recipe["smoothing"]:
        raise SystemExit("error: smoothing does not go with a teacher, whose loss takes the labels as they are.")
    return recipe


def network(architecture, classes, recipe, pictures):
    arguments = {name: recipe[name] for name in ("stem", "depth") if recipe[name] is not None}
    if recipe["widths"]:
        stages = [tuple(map(int, stage.split(","))) for stage in recipe["widths"].split("/")]
        arguments["widths"] = stages if architecture == "student" else stages[0]
    plain = models.ARCHITECTURES[architecture]
    models.ARCHITECTURES[architecture] = lambda classes: plain(classes, **arguments)
    made = models.create(architecture, classes, 0)
    models.ARCHITECTURES[architecture] = plain
    for module in made.modules():
        if isinstance(module, models.Block):
            module[-1] = ACTIVATIONS[recipe["activation"]]()
        if isinstance(module, models.Residual) and recipe["zero"]:
            nn.init.zeros_(module.blocks[-1][-2].weight)
    convolutions = [m for m in made.modules() if isinstance(m, nn.Conv2d)]
    if recipe["dirac"]:
        for convolution in convolutions[1:]:
            nn.init.dirac_(convolution.weight[: convolution.in_channels].data)
    if recipe["whiten"]:
        whiten(convolutions[0], pictures)
    scale, pool = recipe["scale"] or made.scale, torch.mean if recipe["head"] == "average" else torch.amax
    made.forward = lambda x: scale * made.head(pool(made.features(x), (2, 3)))
    return made.to(memory_format=torch.channels_last).train()


def whiten(convolution, pictures):
    """Makes a first layer the leading eigenvectors of 3x3 patches, each divided by its deviation, and minus each."""
    patches = pictures[:5000].unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).reshape(27, 3, 3, 3)
    half = convolution.out_channels // 2
    with torch.no_grad():
        convolution.weight.copy_(torch.cat((filters[:half], -filters[:half])))
    convolution.weight.requires_grad_(False)


def make_optimiser(network, peak, recipe, precision):
    """The program's, or SGD with Nesterov momentum; the learning rate of batch norm's biases times bias_rate."""
    muon.CONVOLUTIONS, muon.ITERATIONS = recipe["convolutions"], recipe["iterations"]
    made = muon.Muon(network, peak, recipe["weight_decay"], recipe["momentum"], DTYPES[precision])
    convolutions, _, vectors = made.param_groups
    convolutions["params"] = [p for p in convolutions["params"] if p.requires_grad]
    biases = [m.bias for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    vectors["params"] = [p for p in vectors["params"] if all(p is not bias for bias in biases)]
    made.add_param_group({"params": biases, "weight_decay": 0.0, "factor": recipe["bias_rate"]})
    if recipe["optimiser"] == "sgd":
        convolutions["weight_decay"] = recipe["weight_decay"]
        return torch.optim.SGD(made.param_groups, momentum=recipe["momentum"], nesterov=True, fused=True)
    return made


def run(architecture, epochs, recipe, loaded, folder, precision):
    """(validation accuracy, training accuracy of the last epoch, seconds) of one run."""
    rows, validation = data.split(loaded.train_labels, 0.1)
    if recipe["pictures"]:
        rows = rows[torch.randperm(len(rows), generator=models.generator("part"))[: recipe["pictures"]]]
    size = recipe["batch"]
    views = data.Views(loaded.train_pictures, loaded.mean, loaded.std, padding=recipe["padding"])
    some = rows[torch.randperm(len(rows), generator=models.generator("whiten"))[:5000]]
    clean = models.normalise(loaded.train_pictures[some], loaded.mean, loaded.std)
    student = network(architecture, len(loaded.classes), recipe, clean)
    targets = None
    if recipe["teacher"]:
        content = models.read(recipe["teacher"])
        teacher = models.restore(content).to(memory_format=torch.channels_last)
        teacher_digest = models.digest(content["state_dict"])
        targets = SoftTargets(teacher, teacher_digest, loaded.digest, views, folder, precision)
    peak = recipe["lr"] or train.default_learning_rate(size)
    optimiser = make_optimiser(student, peak, recipe, precision)
    train.WARMUP = recipe["warmup"]
    steps, started, slow = len(rows) // size, time.perf_counter(), None
    for epoch in range(epochs):
        soft = targets and targets.epoch(epoch)
        views.start(epoch)
        order = rows[torch.randperm(len(rows), generator=models.generator("order", 0, epoch))]
        correct = torch.zeros((), dtype=torch.int64)
        for step in range(steps):
            now = epoch * steps + step
            share = train.schedule(now, epochs * steps)
            for group in optimiser.param_groups:
                group["lr"] = peak * share * group.get("factor", 1.0)
            batch = order[step * size : (step + 1) * size]
            pictures, labels = views.batch(batch), loaded.train_labels[batch]
            if recipe["cutout"]:
                cut(pictures, recipe["cutout"], models.generator("cutout", epoch, step))
            with precision_context(pictures.device, precision):
                logits = student(pictures).float()
            if targets:
                loss = distillation_loss(logits, labels, soft[batch], recipe["temperature"], recipe["alpha"])
            else:
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe["smoothing"])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            correct += (logits.argmax(1) == labels).sum()
            if recipe["lookahead"] and now % 5 == 4:
                pull = 0.95**5 * ((now + 1) / (epochs * steps)) ** 3
                current = [t for t in student.state_dict().values() if t.is_floating_point()]
                slow = slow or [t.clone() for t in current]
                for kept, tensor in zip(slow, current, strict=True):
                    kept.lerp_(tensor, 1 - pull)
                    tensor.copy_(kept)
    student.eval()
    logits = train.evaluate(student, loaded.train_pictures[validation], loaded.mean, loaded.std)
    accuracy = train.accuracy(logits, loaded.train_labels[validation])
    return accuracy, correct.item() / (steps * size), time.perf_counter() - started


def cut(pictures, size, draws):
    count, _, height, width = pictures.shape
    top = torch.randint(-(size // 2), height - size // 2, (count, 1), generator=draws)
    left = torch.randint(-(size // 2), width - size // 2, (count, 1), generator=draws)
    rows, columns = torch.arange(height), torch.arange(width)
    inside = ((rows >= top) & (rows < top + size))[:, None, :, None]
    inside = inside & ((columns >= left) & (columns < left + size))[:, None, None, :]
    pictures.masked_fill_(inside, 0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", help="folder with train/ and test/, a folder a class in each")
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--architecture", choices=models.ARCHITECTURES, default="student")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--cache", default="outputs/data", help="where decoded pictures are kept")
    parser.add_argument("--targets", help="where a teacher's soft targets are kept [nowhere]")
    parser.add_argument("--output", default=str(ROOT / "results" / "recipes.csv"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="[fp32]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipes = {text: parse(text) for text in arguments.recipes}
    if arguments.architecture == "student" and any(each["stem"] or each["depth"] for each in recipes.values()):
        sys.exit("error: a student has neither stem nor depth; widths=32,64/64,128/128,128 are its three stages.")
    loaded = data.folder(arguments.pictures, cache=arguments.cache)
    for text, recipe in recipes.items():
        accuracy, training, seconds = run(
            arguments.architecture, arguments.epochs, recipe, loaded, arguments.targets, arguments.precision
        )
        figures = (f"{accuracy:.4f}", f"{training:.4f}", f"{seconds:.0f}")
        row = (arguments.architecture, arguments.epochs, arguments.precision, text, *figures)
        print(*row, flush=True)
        new = not Path(arguments.output).exists()
        with open(arguments.output, "a", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            if new:
                table.writerow(COLUMNS)
            table.writerow(row)


if __name__ == "__main__":
    try:
        main()
    except Failure as error:
        sys.exit(f"error: {error}")
