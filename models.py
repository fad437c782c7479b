"""The two networks, what each costs, and how a saved one is loaded.

Both begin with a whitening of small patches and go on in blocks, convolution - (pooling) - batch norm - GELU.
Pooling comes before batch norm and GELU, as in the speed-run networks for CIFAR-10 (arXiv 2404.00498): those two are
bound by memory, and see a quarter of the data.
"""

import copy
import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

from runs.checkpoints import ModelFile, digest, is_finite, save_checkpoint
from runs.costs import any_macs, layers_macs
from runs.files import Damaged, Failure, decode, last_line
from runs.foreign import load_own
from runs.hooks import Hooks
from runs.machine import HAS_AMX, memory_format
from runs.settings import WIDEST, Costs
from runs.streams import stream, stream_seed

FORMAT = 2  # of model.pt; a file with another number is refused

# Images in an inference batch, of up to LARGE pixels a side. On a CPU the activations of 128 images of 32x32 stay
# in its caches: a teacher is half as fast again as with 1,000. On a GPU those of 2,000 images of 64x64 would fill 8 GB.
INFERENCE_BATCH = {"cpu": 128, "mps": 500, "cuda": 500}
LARGE = 64  # pixels a side, above which fewer images are taken at a time

NARROW, ROW = 8, 64  # pixels: the widest images that are laid side by side for AMX, and how long rows become


class Whitening(nn.Conv2d):
    """A fixed 2x2 convolution, (B, 3, S, S) -> (B, 24, S - 1, S - 1): the patches of the training images on the
    eigenvectors of their covariance, scaled to one variance, each with both signs (arXiv 2404.00498, section 3.2).
    Only its bias is trained."""

    def __init__(self):
        super().__init__(3, 24, 2)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def fit(self, images):
        """Computes the weights from normalized images (N, 3, S, S)."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values.clamp(min=0) + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.weight.copy_(torch.cat((filters, -filters)))


class Convolution(nn.Conv2d):
    """A 3x3 convolution without bias, (B, inputs, H, W) -> (B, outputs, H, W).

    Where a CPU's AMX computes it in bfloat16, narrow images are laid side by side in rows of up to ROW pixels, a column
    of zeros after each. oneDNN sums the gradient of the weights along rows, 32 pixels at a time, of which an image of
    3x3 fills three; results/throughput-amx.json has what this gains. Outputs and the gradient of inputs stay the same
    bits.
    """

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, x):
        images, inputs, height, width = x.shape
        narrow = HAS_AMX and x.device.type == "cpu" and x.dtype == torch.bfloat16 and width <= NARROW
        if torch.compiler.is_compiling():  # which fails where a second size of batches comes
            narrow = False
        count = math.gcd(images, 1 << (ROW // (width + 1)).bit_length() - 1) if narrow else 1  # in a row
        if count == 1:
            return super().forward(x)
        x = F.pad(x, (0, 1)).permute(0, 2, 3, 1).reshape(-1, count, height, width + 1, inputs)
        x = x.transpose(1, 2).reshape(-1, height, count * (width + 1), inputs)
        y = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = y.reshape(-1, height, count, width + 1, self.out_channels)[:, :, :, :width].transpose(1, 2)
        return y.reshape(images, height, width, self.out_channels).permute(0, 3, 1, 2)


class Block(nn.Sequential):
    """3x3 convolution, 2x2 max-pooling if `pool`, batch norm with a fixed scale, GELU if `activation`:
    (B, inputs, H, W) -> (B, outputs, H, W) or half of H and W."""

    def __init__(self, inputs, outputs, pool=False, activation=True):
        layers = [Convolution(inputs, outputs)]
        layers += [nn.MaxPool2d(2)] * pool
        layers.append(nn.BatchNorm2d(outputs))
        layers[-1].weight.requires_grad_(False)  # the next convolution, or the head, has a scale of its own
        super().__init__(*layers, *[nn.GELU()] * activation)


class Stage(nn.Module):
    """x = Block(x), which halves the image; then GELU(x + branch(x)), the residual branch being `depth` Blocks of which
    the last has no GELU (He et al., arXiv 1512.03385): (B, inputs, H, W) -> (B, width, H / 2, W / 2)."""

    def __init__(self, inputs, width, depth):
        super().__init__()
        self.down = Block(inputs, width, pool=True)
        self.branch = nn.Sequential(*(Block(width, width, activation=number < depth - 1) for number in range(depth)))

    def forward(self, x):
        x = self.down(x)
        return F.gelu(x + self.branch(x))


class Network(nn.Module):
    """What teacher and student share: normalized images (B, 3, S, S), S from 16 up -> logits (B, classes).

    A network read with `load` also knows `classes` (their names), `image_size`, `mean`, `std` and `ranges`.
    """

    classes = image_size = mean = std = ranges = None

    def __init__(self, features, channels, classes):
        super().__init__()
        self.outputs = classes
        self.features = nn.Sequential(Whitening(), nn.GELU(), *features)
        self.head = nn.Linear(channels, classes, bias=False)

    @property
    def scale(self):
        """What the head's logits are multiplied by. The features are large and of one sign: at the learning rates that
        suit the convolutions an unscaled head overshoots from the first steps, and a teacher is little better than a
        guess after 12,000 images."""
        return 2 / math.sqrt(self.head.in_features)

    def forward(self, x):
        return self.scale * self.head(largest(self.features(x)))

    def normalize(self, images):
        """uint8 images (B, S, S, 3) -> what the network takes: float32 (B, 3, S, S) on its device."""
        first, *_ = *self.parameters(), *self.buffers(), images  # a frozen program has neither of the others
        return normalize(images.to(first.device), self.mean, self.std)


def largest(x):
    """The largest answer of each channel: (B, channels, H, W) -> (B, channels). See train.uncompiled_largest."""
    return x.amax((2, 3))


def scaled(widths, width):
    """The channels `widths` times `width`, to the nearest multiples of 8, in which processors compute them."""
    return widths if width == 1 else tuple(max(8, 8 * round(channels * width / 8)) for channels in widths)


class Teacher(Network):
    """A ResNet of three stages; `width` multiplies their channels."""

    def __init__(self, classes, widths=(64, 224, 384), depths=(1, 1, 2), width=1.0):
        widths = scaled(widths, width)
        inputs = (24, *widths[:-1])
        super().__init__(map(Stage, inputs, widths, depths), widths[-1], classes)


class Student(Network):
    """A plain CNN of pairs of Blocks, the first of each pair halving the image; `width` multiplies their channels."""

    def __init__(self, classes, widths=(32, 32, 96, 96, 128, 128), width=1.0):
        widths = scaled(widths, width)
        inputs = (24, *widths[:-1])
        super().__init__(map(Block, inputs, widths, (True, False) * 3), widths[-1], classes)


class Own(Network):
    """A `network` of the user's own, any module from normalized images (B, 3, S, S) to logits (B, classes)."""

    def __init__(self, network, classes):
        nn.Module.__init__(self)
        self.network, self.outputs = network, classes

    def forward(self, x):
        return self.network(x)


ARCHITECTURES = {"teacher": Teacher, "student": Student}


def generator(*purpose):
    """A CPU random generator that is a function of `purpose` alone, e.g. ("order", seed, epoch).

    Every random draw of the program comes from one of these, each purpose a stream of its own, and none from the
    running global state: so every draw can be made again, in any order, by whoever knows its purpose.
    """
    return torch.Generator().manual_seed(stream_seed(*purpose))


def create(architecture, classes, seed, images=None, width=1.0):
    """A new network on the CPU with weights drawn from (architecture, seed); `classes` is their number, `width`
    multiplies the channels.

    3x3 convolutions begin as the identity (Dirac) on as many channels as there are inputs, the others as PyTorch draws
    them (He et al., arXiv 1502.01852); the head has a variance of 1 / inputs. The whitening is fitted to `images`,
    normalized ones (N, 3, S, S) of the training set; without them it is drawn as well.
    """
    with torch.random.fork_rng(devices=[]):  # PyTorch's own first weights, which these replace, move the global state
        network = ARCHITECTURES[architecture](classes, width=width)
    draws = generator("weights", architecture, seed)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=draws)
        if isinstance(layer, Whitening):
            nn.init.zeros_(layer.bias)
            if images is not None:
                layer.fit(images)
        elif isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight.data[: layer.in_channels])
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features), generator=draws)
    return network


def build(function, role, classes, seed):
    """A new network that a function of the user's own returns for so many classes, on the CPU. What it draws from
    global generators is a function of ("teacher" or "student", seed); weights that it loads stay as they are. It is a
    copy of what the function returns, so that layers which several calls share are not trained by several runs."""
    with stream("weights", role, seed):
        return Own(copy.deepcopy(function(classes)), classes).cpu()


@functools.lru_cache
def costs(architecture, classes, image_size, width=1.0):
    """The Costs of one of this program's networks."""
    return costs_of(create(architecture, classes, seed=0, width=width), image_size)


def costs_of(network, image_size):
    """The Costs of any network on the CPU that takes images (B, 3, S, S): parameters, and multiply-adds of convolutions
    and matrix products for one image."""
    count = layers_macs if isinstance(network, tuple(ARCHITECTURES.values())) else any_macs
    return Costs(sum(each.numel() for each in network.parameters()), count(network, image_size))


def inference_batch(device, image_size):
    """How many images are put through a network at a time: one fixed number for a device and size, so that a view's
    logits are the same bits whoever asks; of large images fewer, so that all sizes take about as much memory."""
    return max(1, INFERENCE_BATCH[device.type] * LARGE**2 // max(LARGE, image_size) ** 2)


def normalize(images, mean, std):
    """uint8 images (B, H, W, 3) -> float32 (B, 3, H, W) in the device's `memory_format`, (x / 255 - mean) / std by
    channel."""
    count, height, width, _ = images.shape
    scale, shift = _for_rows(tuple(mean), tuple(std), width, images.device)
    rows = images.reshape(count, height, width * 3).to(torch.float32)  # whole rows are long enough to vectorize
    images = torch.addcmul(shift, rows, scale).view(count, height, width, 3).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=memory_format(images.device))


def scale_and_shift(mean, std):
    """What normalized pixels are: uint8 ones times the first, plus the second; two float32 tensors (3,)."""
    return torch.tensor([1 / (255 * s) for s in std]), torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])


@functools.lru_cache(maxsize=8)  # on a GPU these would otherwise be copied there, and waited for, at every step
def _for_rows(mean, std, width, device):
    """`scale_and_shift` for whole rows of `width` pixels: two tensors (width * 3,)."""
    return tuple(each.repeat(width).to(device) for each in scale_and_shift(mean, std))


@torch.inference_mode()
def predict(network, batches, autocast, finish=None):
    """The float32 logits (N, classes) of `batches`, an iterable of normalized images (B, 3, S, S), computed in the
    context `autocast`; of each batch what `finish` makes of them, so that never all of them are held wider."""
    with autocast:
        logits = (network(batch).float() for batch in batches)
        parts = [finish(each) if finish else each for each in logits]
    return torch.cat(parts)  # outside: autocast on CPUs knows no float16


def identity(state_dict, settings):
    """The digest by which a teacher is known, from its weights and its `settings`, a dict. Of one that was trained
    elsewhere the file of its code counts, too: it may become another network with the same weights."""
    return digest(state_dict, "" if settings.get("epochs") else settings.get("network_sha256") or "")


def save(path, network, architecture, *, classes, image_size, mean, std, settings, accuracy, ranges=None):
    """Writes model.pt."""
    content = ModelFile(
        format=FORMAT,
        architecture=architecture,
        arguments={"classes": len(classes)} | ({"width": settings["width"]} if "width" in settings else {}),
        classes=list(classes),
        image_size=image_size,
        mean=list(mean),
        std=list(std),
        settings=settings,
        accuracy=accuracy,
        state_dict={name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()},
        ranges={kind: list(span) for kind, span in (ranges or {}).items()},
    )
    save_checkpoint(path, vars(content))


def load(path, network=None, hooks=None):
    """The network in a model.pt, on the CPU, in evaluation mode, with the file's `architecture`, `classes` (names),
    `image_size`, `mean`, `std`, `ranges` (how samples of more than 8 bits are scaled), `settings` and test `accuracy`
    as attributes.

        network = models.load("outputs/kd-T4-a0.1-s0/model.pt")
        with torch.inference_mode():
            logits = network(network.normalize(images))  # uint8 (B, S, S, 3) -> float32 (B, classes)

    On CUDA: `network.to("cuda", memory_format=torch.channels_last)`; `normalize` brings the images there. To train it
    further: `network.train()`, which lets batch norm follow the new images; its weights already require gradients.
    Back to answers: `network.eval()`.

    Of a network of your own the file holds weights and the function's name, never code: give that function as `network`
    (from the number of classes to a module), or `hooks` with what the command line names (runs.hooks.Hooks).

    Raises Failure where the file cannot be read or no function is given, and Damaged where it is not a complete
    checkpoint of this format and one of these architectures. Nothing in the file can run code.
    """
    file = decode(load_own(path, FORMAT), ModelFile, path)
    if file.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise Damaged(f"{path} holds the unknown architecture '{file.architecture}'; known are: {known}.")
    width = file.arguments.get("width", 1.0)
    if file.arguments | {"width": width} != {"classes": len(file.classes), "width": width}:
        raise Damaged(f"{path} is damaged: its class names do not match its arguments.")
    if not 0 < width <= WIDEST:
        raise Damaged(f"{path} is damaged: a width of {width} is out of range.")
    network = network or (hooks or Hooks()).network_of(file.settings, path)
    count, seed = len(file.classes), file.settings.get("seed", 0)  # of what a network draws outside its state_dict
    if network:
        network = build(network, file.architecture, count, seed)
    else:
        network = ARCHITECTURES[file.architecture](count, width=width)
    own = file.settings.get("network")
    load_weights(network, file.state_dict, path, own and f"{own} in {file.settings.get('network_file')}")
    for name in ("architecture", "classes", "image_size", "mean", "std", "ranges", "settings", "accuracy"):
        setattr(network, name, getattr(file, name))
    return network.eval()


def load_weights(network, state_dict, path, own=None):
    """Loads a state_dict read from `path`; raises Damaged unless names, shapes and types match and all is finite. Where
    it is of a network of the user's `own`, named so, another one may have been given for it, which is a Failure."""
    expected = network.state_dict()
    try:
        network.load_state_dict(state_dict)
    except RuntimeError as error:
        if own:
            text = f"{path} holds weights of {own}, which do not fit the network given ({last_line(error)})."
            raise Failure(text) from None
        text = f"{path} is damaged, or models.py has changed since: its weights do not fit this architecture"
        raise Damaged(f"{text} ({last_line(error)}).") from None
    if any(tensor.dtype != expected[name].dtype for name, tensor in state_dict.items()):
        raise Damaged(f"{path} is damaged: its weights are of another type.")
    if not is_finite(state_dict):
        raise Damaged(f"{path} is damaged: it holds weights that are not finite.")
