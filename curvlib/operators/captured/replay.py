"""CUDA graphs: a function's kernels, launched as one.

A small network's product is bound by the launches of its kernels, a few microseconds each. A CUDA
graph launches all of them at once, on memory of its own: inputs are copied in.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

#: Bytes of inputs up to which a function is run as a CUDA graph. Above, launches hide behind the
#: kernels' work, and copying the inputs costs as much as they did.
MAX_BYTES = 2**26

TensorFunction = Callable[..., Sequence[Tensor]]


def fits(inputs: Sequence[Tensor]) -> bool:
    """Whether a function of some tensors is small enough to be run as a CUDA graph."""
    device = inputs[0].device.type if inputs else "cpu"
    return device == "cuda" and sum(t.numel() * t.element_size() for t in inputs) <= MAX_BYTES


class Replay:
    """A function of CUDA tensors as a CUDA graph.

    The function must not draw random numbers, read values, or write into its inputs. What a call
    returns is overwritten by the next one. A tensor that is the very object of the last call is
    not copied again: pass a view (``t.detach()``) of what may have been written into since.

    Args:
        function: Of the tensors.
        inputs: Examples of the inputs, of the shapes that all later ones have.

    Raises:
        RuntimeError: If the function cannot be captured.
    """

    def __init__(self, function: TensorFunction, inputs: Sequence[Tensor]) -> None:
        self.inputs = [torch.empty_like(t).copy_(t) for t in inputs]
        device = inputs[0].device
        here, (side, capturing) = torch.cuda.current_stream(device), _streams(device)
        # a capture that fails leaves its stream current: the outer block comes back from it
        with torch.cuda.device(device), torch.cuda.stream(here):
            side.wait_stream(here)
            with torch.cuda.stream(side):  # libraries allocate their workspaces at first calls
                for _ in range(2):
                    function(*self.inputs)
            here.wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=capturing, capture_error_mode="thread_local"):
                self.outputs = list(function(*self.inputs))
        self.last: tuple[Tensor | None, ...] = (None,) * len(inputs)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The function's value, in memory that the next call overwrites."""
        triples = zip(self.inputs, inputs, self.last, strict=True)
        moved = [(own, given) for own, given, last in triples if given is not last]
        if moved:
            own, given = zip(*moved, strict=True)
            torch._foreach_copy_(list(own), list(given))
        self.last = inputs
        self.graph.replay()
        return [t.detach() for t in self.outputs]


@lru_cache(maxsize=16)
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Where functions are run first, and captured; always the same, as each holds a workspace.

    The stream that torch would capture on is on the device of the first capture of all.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def launched(function: TensorFunction, inputs: Sequence[Tensor]) -> TensorFunction:
    """The function as a CUDA graph where its inputs are small CUDA tensors, else as it is."""
    if not fits(inputs):
        return function
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="The CUDA Graph is empty")
            return Replay(function, inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, UserWarning):  # an operation that cannot be captured, or none at all
        return function
