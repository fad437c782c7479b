"""On an NVIDIA GPU: what every step launches, recorded once as CUDA graphs, each of which is then launched as a whole.

A step of these small networks is hundreds of kernels of a few microseconds each. Launched one by one from Python they
take several times as long as the GPU needs to compute them. A recorded graph runs the same kernels on the same memory.
"""

import functools
import gc

import torch


def recorded_network(network, images, machine):
    """The network, whose forward and backward passes in training mode are recorded for batches like `images`; they give
    the same bits as launched one by one. Outputs are overwritten by the next batch's. In evaluation mode nothing
    changes."""
    gc.collect()  # An earlier run's network and its graphs refer to each other: nothing else frees their memory.
    # What is recorded on a stream of its own meets gradients on another one in every step. PyTorch waits, but warns.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    before = [buffer.clone() for buffer in network.buffers()]
    with machine.autocast(cache_enabled=False):  # of weights in bfloat16, which change with every step
        network = torch.cuda.make_graphed_callables(network, (images,))
    for buffer, value in zip(network.buffers(), before, strict=True):  # batch norm has seen what was recorded
        buffer.copy_(value)
    return network


class Recorded:
    """Calls a function that takes a list of tensors, returns one, and launches the same kernels every time: first as it
    is, then recorded, for as long as the tensors have the same shapes. Results are overwritten by the next call's. All
    else that the function reads must stay where it is in memory (weights, momenta) or never change (numbers)."""

    def __init__(self):
        self.shapes = self.graph = self.given = self.results = None

    def __call__(self, function, tensors):
        shapes = [tensor.shape for tensor in tensors]
        if self.shapes != shapes:
            self.shapes, self.graph = shapes, None
            return function(tensors)
        if self.graph is None:
            self.given, self.graph = [tensor.clone() for tensor in tensors], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # launches nothing yet
                self.results = function(self.given)
        torch._foreach_copy_(self.given, tensors)
        self.graph.replay()
        return self.results


def side_by_side(function, *lists):
    """The results of `function` for the elements of `lists`. On a GPU, of which one call fills but a part, each call
    has a stream of its own; recorded, they become branches of the graph."""
    calls = list(zip(*lists, strict=True))
    if not calls[0][0].is_cuda:
        return [function(*each) for each in calls]
    results, stream = [], torch.cuda.current_stream()
    for number, each in enumerate(calls):
        own = _stream(number)
        own.wait_stream(stream)
        with torch.cuda.stream(own):
            results.append(function(*each))
    for number in range(len(calls)):
        stream.wait_stream(_stream(number))
    return results


@functools.cache
def _stream(number):
    return torch.cuda.Stream()
