"""The device that trains, and the precision it trains in."""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from runs.code import CODE
from runs.files import Failure, first_line, is_out_of_memory
from runs.settings import VERSION

version = functools.cache(importlib.metadata.version)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt, from its malloc.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of `check_arithmetic`, as a share of the largest value. TF32, the coarsest float32, makes a thousandth, bf16 five
# (on a CPU with AMX).
LARGEST_ERROR = {"fp32": 0.01, "bf16": 0.05}
CONVOLUTIONS = (24, 32, 31), (224, 384, 7)  # of the networks: channels in and out, and the size of the images


class NoKernels(Failure):
    """A GPU for which this build of PyTorch has no code, although PyTorch reports it as available."""


@dataclass(frozen=True)
class Machine:
    """A torch.device, the precision to train in ("fp32" or "bf16"), whether networks are compiled, and whether a run
    that was trained on another kind of device may be resumed: where the command names the device."""

    device: torch.device
    precision: str = "fp32"
    compiled: bool = False
    may_change_device: bool = False

    @property
    def dtype(self):
        return DTYPES[self.precision]

    @property
    def place(self):
        """What a network's, or an image's, `to` is given."""
        return {"device": self.device, "memory_format": memory_format(self.device)}

    @property
    def records(self):
        """Whether training steps are recorded as CUDA graphs (runs.graphs): not on AMD's GPUs, which PyTorch calls CUDA
        as well, and where it was never tried."""
        return self.device.type == "cuda" and torch.version.hip is None

    def autocast(self, precision=None, cache_enabled=True):
        """The context in which a network runs in `precision` [the machine's]; `cache_enabled` as in torch.autocast."""
        if (precision or self.precision) == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=cache_enabled)
        return contextlib.nullcontext()

    def synchronize(self):
        """Waits for the GPU, so that a time is the time of what was launched before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    @property
    def must_match(self):
        """What must be equal to continue an unfinished run: other kernels would give other last bits."""
        return {name: value for name, value in self.kind.items() if name != "device" or not self.may_change_device}

    @property
    def kind(self):
        """What a saved state says of the machine."""
        return {"device": self.device.type, "precision": self.precision, "compiled": self.compiled}

    def environment(self):
        """What a run was made with; recorded, not compared."""
        names = ("torchvision", "scipy", "matplotlib", "pillow")
        return {
            "program": VERSION,
            **CODE,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            **{name: version(name) for name in names},
            "system": platform.platform(),
            "device": describe(self.device),
            "device_type": self.device.type,
            "precision": self.precision,
            "compiled": self.compiled,
            "threads": torch.get_num_threads(),
        }


def start_machine(device, precision, compiled=False, local_rank=None):
    """The Machine of `device` and `precision` as the command line names them, with this process set up for it; of
    several GPUs the process `local_rank` of a group takes its own. Raises Failure where the device is missing, cannot
    be used, or computes wrongly."""
    may_change_device, device = device != "auto", choose_device(device, local_rank)
    make_deterministic()
    keep_memory()
    machine = Machine(device, choose_precision(precision, device), bool(compiled), may_change_device)
    check_arithmetic(machine)
    return machine


def describe(device):
    """The device in words: the GPU's name, or the processor's name and number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores" + (" (MPS)" if device.type == "mps" else "")


def choose_device(name, local_rank=None):
    """The torch.device that `name` (auto, cpu, cuda, cuda:N, mps) asks for; raises Failure where there is none. Of
    several GPUs the process `local_rank` of a group takes its own."""
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    kinds = [kind for kind, is_available in available.items() if is_available()]
    if name == "auto":
        for kind in kinds:
            try:
                return _usable(_own(torch.device(kind), local_rank))
            except NoKernels as error:
                print(f"{error} The next device is used instead.", file=sys.stderr)
    kind, _, index = name.partition(":")
    if kind not in kinds or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        raise Failure(f"This machine has no device {name}. It has: {', '.join(kinds)}.")
    return _usable(_own(torch.device(name), local_rank))


def _own(device, local_rank):
    if device.type == "cuda" and device.index is None and local_rank is not None:
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return device


def _usable(device):
    """`device`, once it has computed something. Raises NoKernels, or Failure where it is busy, say."""
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        why = first_line(error)
        kind = NoKernels if "no kernel image" in why else Failure
        raise kind(f"The device {device} cannot be used: {why}.") from None
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # for calls that ask about the current device
    return device


def memory_format(device):
    """How networks and images lie in the memory of `device`: channels last, but contiguous on MPS, where PyTorch has
    computed wrong convolutions and gradients of batch norm for channels last (pytorch issues 175189 and 192212)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def check_arithmetic(machine):
    """Computes what a training step does (convolution, batch norm, pooling, their gradients) on the machine's device,
    in float32 and in its precision, and on the CPU in float32, in some milliseconds; raises Failure where they differ
    by more than rounding, which a training would show only as a network that learns badly."""
    device = machine.device
    if device.type == "cpu":
        return
    remedy = (
        f"This is an error of PyTorch {torch.__version__} or of the driver. Try another version of them, or train with "
        "--device cpu."
    )
    for shape in CONVOLUTIONS:
        expected = _sample(Machine(torch.device("cpu")), *shape)
        for precision in dict.fromkeys(["fp32", machine.precision]):
            try:
                found = _sample(Machine(device, precision), *shape)
            except (RuntimeError, TypeError) as error:
                if is_out_of_memory(error):
                    raise
                why = f"in {precision}: {first_line(error)}"
                raise Failure(f"The device {device} cannot compute a step of a training {why}.\n{remedy}") from error
            for name, value in found.items():
                error = ((value - expected[name]).abs().max() / expected[name].abs().max()).item()
                if not error <= LARGEST_ERROR[precision]:  # nor NaN
                    raise Failure(
                        f"The device {device} computes wrongly in {precision}: {name} differs from the CPU's by "
                        f"{error:.2g} of its largest value.\n{remedy}"
                    )


def _sample(machine, inputs, outputs, size):
    """{name: float32 result on the CPU} of a small piece of a training step, as the networks compute it: a convolution
    from `inputs` to `outputs` channels of maps of `size` pixels a side, and what follows it."""
    device, draws = machine.device, torch.Generator().manual_seed(0)
    shapes = {"images": (8, inputs, size, size), "weight": (outputs, inputs, 3, 3), "bias": (outputs,)}
    shapes["slope"] = (8, outputs, size, size)
    given = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    for name, tensor in given.items():
        place = {"memory_format": memory_format(device)} if tensor.ndim == 4 else {}
        given[name] = tensor.to(device, **place).requires_grad_(name != "slope")
    mean, variance, scale = (each(outputs).to(device) for each in (torch.zeros, torch.ones, torch.ones))
    with machine.autocast():
        convolved = F.conv2d(given["images"], given["weight"], padding=1)
        # As in the networks: the scale is there, but fixed. Without one CUDA has no gradient of the bias.
        normalized = F.batch_norm(convolved, mean, variance, scale, given["bias"], training=True)
        activated = F.gelu(normalized)
    activated.backward(given["slope"].to(activated.dtype))
    results = {"a convolution": convolved, "batch norm": normalized, "the gradient of batch norm": given["bias"].grad}
    results["the gradient of a convolution's input"] = given["images"].grad
    results["the gradient of a convolution's weights"] = given["weight"].grad
    maps = given["slope"].clone().requires_grad_()  # the same bits everywhere, so that no maximum moves by rounding
    pooled = F.max_pool2d(maps, 2)
    F.cross_entropy(pooled.amax((2, 3)), torch.arange(len(maps)).to(device)).backward()
    results |= {"max-pooling": pooled, "the gradient of max-pooling": maps.grad}
    windows, offsets = torch.arange(12).to(device).unfold(0, 8, 1), torch.tensor([4, 0, 2]).to(device)
    results["the places of pixels in a crop"] = windows[offsets]
    return {name: tensor.detach().float().cpu() for name, tensor in results.items()}


def capabilities():
    """{name: bool} of the instructions that this CPU has."""
    return getattr(torch.cpu, "get_capabilities", dict)()


HAS_AMX = capabilities().get("amx_bf16", False)  # multiplies bfloat16 matrices in tiles


def choose_precision(name, device):
    """The precision that `name` (auto, fp32, bf16) asks for: auto is bf16 where the device has instructions for it;
    elsewhere bf16 gains nothing, or is emulated and many times slower."""
    if name != "auto":
        return name
    if device.type == "cpu":
        has = capabilities()
        native = has.get("amx_bf16", False) or has.get("avx512_bf16", False)
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def make_deterministic():
    """Sets CUDA to give the same bits again in what the program's own networks compute, and full float32 precision
    where float32 is asked for; for the process."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def keep_memory():
    """Lets this process keep the memory that a step frees for the next step, where its C library is glibc. That library
    otherwise returns large blocks to the system and gets new ones at every step, whose pages are cleared again: of the
    processor time of a student's step a seventh, of a teacher's a twentieth (AMD EPYC, one thread, bf16)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # An older glibc takes no more than 32 MB. Where it takes neither, the other threshold stays, too: setting that
        # one alone would end their growth with what is freed.
        if any(libc.mallopt(MMAP_THRESHOLD, size) for size in (2**31 - 1, 1 << 25)):
            libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
