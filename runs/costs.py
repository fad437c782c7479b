"""What a network costs, found by running it on the CPU once: multiply-adds, and the memory of training."""

import contextlib
import math
import warnings
from pathlib import Path

import torch
from torch import nn

# Where Linux keeps the limits of containers and of a scheduler's jobs, by the controllers in /proc/self/cgroup: the
# names of a group's limit and usage, and what of its memory.stat holds files and is given back when memory is short.
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = {
    "": (CGROUPS, "memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": (
        CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
}  # fmt: skip


def layers_macs(network, image_size):
    """Multiply-adds for one image of a network that computes nothing but its Conv2d and Linear layers, each once."""
    total = 0

    def count(layer, _, output):
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    hooks = [each.register_forward_hook(count) for each in network.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    _answer(network, image_size)
    for hook in hooks:
        hook.remove()
    return total


def any_macs(network, image_size):
    """Multiply-adds for one image of convolutions and matrix products in any network, attention included: those of
    PyTorch's FlopCounterMode, which takes longer to import than `layers_macs` to count."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),  # others are not counted on a CPU
        _without_onednn(),
    ):
        _answer(network, image_size, torch.enable_grad())  # without gradients attention takes a path of its own
    return counter.get_total_flops() // 2


@contextlib.contextmanager
def _without_onednn():
    """oneDNN would compute an LSTM in one piece, which is not counted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32")  # which the flags touch, too
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def _answer(network, image_size, context=None):
    """The logits of a network on the CPU for one black image."""
    training = network.training
    with context or torch.no_grad():
        network.eval()(torch.zeros(1, 3, image_size, image_size))
    network.train(training)


def training_memory(network, image_size, batch_size, precision="fp32"):
    """About how many bytes it takes to train a network on the CPU: those that autograd keeps of a forward pass for the
    backward pass, measured for two images and for four; as much again as the largest of them, for gradients; and
    weights, gradients and momenta. A kernel's workspace and the images of the data set are not in it."""
    two, four = (_kept(network, image_size, count, precision) for count in (2, 4))
    one = (sum(four) - sum(two)) / 2  # what is the same for any number of images, such as weights in bfloat16, is left
    largest = max((b - a for a, b in zip(two, four, strict=False)), default=0) / 2
    rest = sum(two) - 2 * one
    return round(batch_size * (one + largest) + rest + 3 * sum(each.nbytes for each in network.parameters()))


def _kept(network, image_size, count, precision):
    """The sizes in bytes of all storages that autograd keeps of a forward pass of `count` images, parameters aside."""
    parameters = {each.untyped_storage().data_ptr() for each in network.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    training, images = network.training, torch.zeros(count, 3, image_size, image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        answer = network.train()(images)
    network.train(training)
    del answer  # not earlier: storage that is freed gives its address to the next
    return list(kept.values())


def describe_memory(name, network, image_size, batch_size, machine, processes=1):
    """In words how much memory it takes to train the network called `name`, and how much `machine` has free for each of
    `processes` that share it."""
    takes = training_memory(network, image_size, batch_size, machine.precision)
    text = f"Memory: about {takes / 1e9:.1f} GB to train the {name} with batches of {batch_size:,}"
    free = free_memory(machine.device)
    if free is None:
        return text
    each = ""
    if machine.device.type == "cuda":  # the others have GPUs of their own, if there are as many
        processes = math.ceil(processes / torch.cuda.device_count())
    if processes > 1:
        free, each = free / processes, f" for each of {processes} processes"
    if takes > free:
        return f"{text}, but only {free / 1e9:.1f} GB are free{each}: choose a smaller --batch-size"
    return f"{text}, of {free / 1e9:.1f} GB that are free{each}"


def free_memory(device):
    """How many bytes of memory are free on a device, no more than this process's container or job has left; None where
    the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # no Linux
        return None
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        groups = ""
    return max(0, min([free, *_left_in_groups(groups)]))


def _left_in_groups(groups, files=None):
    """How many bytes each control group with a limit has left, of those that the text of /proc/self/cgroup names and
    of those around them; `files` are the CGROUP_FILES."""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller, (top, limit, usage, caches) in (files or CGROUP_FILES).items():
            if controller not in controllers.split(","):
                continue
            group = top / path.strip("/")
            for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
                try:
                    most, used = (int((folder / name).read_text()) for name in (limit, usage))
                    counts = dict(each.split() for each in (folder / "memory.stat").read_text().splitlines())
                    yield most - used + sum(int(counts[name]) for name in caches)
                except (OSError, KeyError, ValueError):  # "max", or not seen from inside the container
                    continue
