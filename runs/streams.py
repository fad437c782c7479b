"""Streams of random numbers: each purpose has its own, a function of the purpose alone."""

import contextlib
import hashlib
import json
import random

import numpy as np
import torch


def stream_seed(*purpose):
    """The seed of the stream of a purpose."""
    return int.from_bytes(hashlib.sha256(json.dumps(purpose).encode()).digest()[:8], "little") >> 1


def start_stream(*purpose):
    """Sets the global generators of PyTorch, NumPy and Python to the stream of a purpose: what a function of the user's
    own draws from them is a function of that purpose alone, too."""
    seed = stream_seed(*purpose)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (others draw from it)
    random.seed(seed)


@contextlib.contextmanager
def stream(*purpose):
    """A context that begins with `start_stream`, and after which the global generators on the CPU are as before."""
    numpys, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        start_stream(*purpose)
        try:
            yield
        finally:
            np.random.set_state(numpys)  # noqa: NPY002
            random.setstate(pythons)
