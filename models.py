"""The two networks, what each costs, and how a kept one is read back.

Both are built from one block, convolution - (pooling) - batch norm - ReLU. Pooling comes before batch norm and ReLU, as
in the speed-run networks for CIFAR-10 (arXiv 2404.00498): those two are bound by memory, and see a quarter of the data.
"""

import functools
import hashlib
import json
import math

import torch
from torch import nn

from files import Damaged, load_checkpoint, save_checkpoint

FORMAT = 2  # of model.pt; a file with another number is refused


class Block(nn.Sequential):
    """3x3 convolution, 2x2 max-pooling if `pool`, batch norm, ReLU: (B, inputs, H, W) -> (B, outputs, H, W) or half."""

    def __init__(self, inputs, outputs, pool=False):
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
        if pool:
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """x + Block(Block(... x)): (B, channels, H, W) -> the same shape (He et al., arXiv 1512.03385)."""

    def __init__(self, channels, depth):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(channels, channels) for _ in range(depth)))

    def forward(self, x):
        return x + self.blocks(x)


class Network(nn.Module):
    """What teacher and student share: normalised pictures (B, 3, S, S), S from 16 to 64 -> logits (B, classes).

    A network read with `load` also knows `classes` (their names), `image_size`, `mean` and `std`.
    """

    classes = image_size = mean = std = None

    def __init__(self, features, channels, classes):
        super().__init__()
        self.features = features
        self.head = nn.Linear(channels, classes)

    @property
    def scale(self):
        """What the head's logits are multiplied by. The features are large and of one sign: at the learning rates that
        suit the convolutions an unscaled head overshoots from the first steps, and a teacher is little better than a
        guess after 12,000 pictures."""
        return 2 / math.sqrt(self.head.in_features)

    def forward(self, x):
        return self.scale * self.head(self.features(x).amax((2, 3)))

    def normalise(self, pictures):
        """uint8 pictures (B, S, S, 3) -> what the network takes: float32 (B, 3, S, S) on its device."""
        return normalise(pictures.to(self.head.weight.device), self.mean, self.std)


class Teacher(Network):
    """A ResNet of three stages, each a widening Block that halves the picture and a residual branch."""

    def __init__(self, classes, stem=32, widths=(64, 256, 384), depth=2):
        layers, inputs = [Block(3, stem)], stem
        for width in widths:
            layers += [Block(inputs, width, pool=True), Residual(width, depth)]
            inputs = width
        super().__init__(nn.Sequential(*layers), inputs, classes)


class Student(Network):
    """A plain CNN: three stages of Blocks, the first of each stage halving the picture, no shortcuts."""

    def __init__(self, classes, widths=((32, 64), (64, 128), (128, 128))):
        layers, inputs = [], 3
        for stage in widths:
            for position, width in enumerate(stage):
                layers.append(Block(inputs, width, pool=position == 0))
                inputs = width
        super().__init__(nn.Sequential(*layers), inputs, classes)


ARCHITECTURES = {"teacher": Teacher, "student": Student}


def generator(*purpose):
    """A CPU random generator that is a function of `purpose` alone, e.g. ("order", seed, epoch).

    Every random draw of the program comes from one of these, each purpose a stream of its own, and none from the
    running global state: so every draw can be made again, in any order, by whoever knows its purpose.
    """
    digest = hashlib.sha256(json.dumps(purpose).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def create(architecture, classes, seed):
    """A new network on the CPU with weights drawn from (architecture, seed); `classes` is their number.

    Convolutions are drawn as He et al. do (arXiv 1502.01852, fan out), the head with a variance of 1 / inputs.
    """
    with torch.random.fork_rng(devices=[]):  # PyTorch's own first weights, which these replace, move the global state
        network = ARCHITECTURES[architecture](classes)
    draws = generator("weights", architecture, seed)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=draws)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features), generator=draws)
            nn.init.zeros_(layer.bias)
    return network


def costs(architecture, classes, image_size):
    """(parameters, multiply-adds for one picture) of an architecture; convolutions and matrix products are counted."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):  # shapes without memory and without arithmetic
        network = ARCHITECTURES[architecture](classes).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, 3, image_size, image_size))
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2


def normalise(pictures, mean, std):
    """uint8 pictures (B, H, W, 3) -> float32 (B, 3, H, W) in channels_last order, (x / 255 - mean) / std by channel."""
    count, height, width, _ = pictures.shape
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), width, pictures.device)
    rows = pictures.reshape(count, height, width * 3).to(torch.float32)  # whole rows are long enough to vectorise
    return torch.addcmul(shift, rows, scale).view(count, height, width, 3).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=8)  # on a GPU these would otherwise be copied there, and waited for, at every step
def _scale_and_shift(mean, std, width, device):
    """What a row of `width` pixels is multiplied by and added to: two tensors (width * 3,)."""
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    return scale.repeat(width).to(device), shift.repeat(width).to(device)


def digest(state_dict):
    """The SHA-256 of a network's weights and buffers: names, types, shapes and bits."""
    total = hashlib.sha256()
    for name, tensor in state_dict.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def is_finite(state_dict):
    """Whether no weight or buffer is infinite or NaN."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in state_dict.values()]).all())


def save(path, network, architecture, *, classes, image_size, mean, std, settings, accuracy):
    """Writes model.pt: all it takes to use the network without knowing how it was made."""
    save_checkpoint(
        path,
        {
            "format": FORMAT,
            "architecture": architecture,
            "arguments": {"classes": len(classes)},
            "classes": list(classes),
            "image_size": image_size,
            "mean": list(mean),
            "std": list(std),
            "settings": settings,
            "accuracy": accuracy,
            "state_dict": {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()},
        },
    )


def read(path):
    """The verified content of a model.pt, as `save` wrote it; raises Damaged with what is wrong with it."""
    content = load_checkpoint(path)
    if type(content.get("format")) is not int or content["format"] != FORMAT:
        raise Damaged(f"{path} has format {content.get('format')!r}, but this version of the program reads {FORMAT}.")
    kinds = {
        "architecture": str, "arguments": dict, "classes": list, "image_size": int, "mean": list, "std": list,
        "settings": dict, "accuracy": float, "state_dict": dict,
    }  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise Damaged(f"{path} is damaged: its '{name}' is missing or not a {kind.__name__}.")
    classes, state_dict = content["classes"], content["state_dict"]
    if content["architecture"] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise Damaged(f"{path} holds the unknown architecture '{content['architecture']}'; known are: {known}.")
    if content["arguments"] != {"classes": len(classes)} or not all(isinstance(name, str) for name in classes):
        raise Damaged(f"{path} is damaged: its class names and its arguments do not agree.")
    numbers = [*content["mean"], *content["std"], content["accuracy"]]
    if len(content["mean"]) != 3 or len(content["std"]) != 3 or not all(isinstance(v, float) for v in numbers):
        raise Damaged(f"{path} is damaged: its mean and std are not three numbers each.")
    if not all(map(math.isfinite, numbers)) or min(content["std"]) <= 0 or not 0 <= content["accuracy"] <= 1:
        raise Damaged(f"{path} is damaged: its mean, std or accuracy cannot be.")
    if not all(isinstance(value, str | int | float | None) for value in content["settings"].values()):
        raise Damaged(f"{path} is damaged: its settings are not plain values.")
    if len(classes) < 2 or not 16 <= content["image_size"] <= 64:
        raise Damaged(f"{path} is damaged: {len(classes)} classes and image size {content['image_size']} cannot be.")
    with torch.device("meta"):
        expected = ARCHITECTURES[content["architecture"]](len(classes)).state_dict()
    verify_weights(state_dict, expected, path)
    return content


def verify_weights(state_dict, expected, path):
    """Raises Damaged unless a state_dict read from `path` has the names, shapes and types of `expected`, all finite."""
    if list(state_dict) != list(expected):
        raise Damaged(f"{path} is damaged: its weights are not those of this architecture.")
    for name, tensor in expected.items():
        found = state_dict[name]
        if (
            not isinstance(found, torch.Tensor)
            or found.layout is not torch.strided
            or (found.shape, found.dtype, found.device.type) != (tensor.shape, tensor.dtype, "cpu")
        ):
            raise Damaged(f"{path} is damaged: '{name}' should be {tensor.dtype} of shape {tuple(tensor.shape)}.")
    if not is_finite(state_dict):
        raise Damaged(f"{path} is damaged: it holds weights that are not finite.")


def restore(content):
    """The network in the content of a model.pt (see `read`), in evaluation mode, with `classes`, `image_size`, `mean`
    and `std` set."""
    network = ARCHITECTURES[content["architecture"]](**content["arguments"])
    network.load_state_dict(content["state_dict"])
    for name in ("classes", "image_size", "mean", "std"):
        setattr(network, name, content[name])
    return network.eval()


def load(path):
    """The network kept in a model.pt, on the CPU and ready to use. Raises Failure where it cannot be read, and Damaged
    where it is not a whole checkpoint of this format and one of these architectures. Nothing in the file can run code.
    """
    return restore(read(path))
