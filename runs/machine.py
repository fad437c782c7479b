"""The device that trains, and the precision it trains in."""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass

import numpy as np
import torch

from runs.files import Failure
from runs.settings import VERSION

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt, from its malloc.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NoKernels(Failure):
    """A GPU for which this build of PyTorch has no code, although PyTorch reports it as available."""


@dataclass(frozen=True)
class Machine:
    """A torch.device, the precision to train in ("fp32" or "bf16"), and whether networks are compiled."""

    device: torch.device
    precision: str = "fp32"
    compiled: bool = False

    @property
    def dtype(self):
        return DTYPES[self.precision]

    def autocast(self, precision=None):
        """The context in which a network runs in `precision` [the machine's]."""
        if (precision or self.precision) == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
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
        return {"device": self.device.type, "precision": self.precision, "compiled": self.compiled}

    def environment(self):
        """What a run was made with; recorded, not compared."""
        names = ("torchvision", "scipy", "matplotlib", "pillow")
        return {
            "program": VERSION,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            **{name: importlib.metadata.version(name) for name in names},
            "system": platform.platform(),
            "device": describe(self.device),
            "device_type": self.device.type,
            "precision": self.precision,
            "compiled": self.compiled,
            "threads": torch.get_num_threads(),
        }


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
        why = f"{error}\n".splitlines()[0] or type(error).__name__
        kind = NoKernels if "no kernel image" in why else Failure
        raise kind(f"The device {device} cannot be used: {why}.") from None
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # for calls that ask about the current device
    return device


def choose_precision(name, device):
    """The precision that `name` (auto, fp32, bf16) asks for: auto is bf16 where the device has instructions for it;
    elsewhere bf16 gains nothing, or is emulated and many times slower."""
    if name != "auto":
        return name
    if device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()
        native = has.get("amx_bf16", False) or has.get("avx512_bf16", False)
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def make_deterministic():
    """Sets CUDA to give the same bits again, and full float32 precision where float32 is asked for; for the process."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def keep_memory():
    """Lets this process keep the memory that a step frees for the next step, where its C library is glibc. That library
    otherwise returns large blocks to the system and gets new ones at every step, whose pages are cleared again: of the
    processor time of a student's step a seventh, of a teacher's a twentieth (AMD EPYC, one thread, bf16)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            libc.mallopt(parameter, 2**31 - 1)
