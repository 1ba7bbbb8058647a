r"""Moments of what batch-normalization layers see: mean and variance of each channel over the data.

In one pass, every layer normalizes by the statistics of its batch, as in training, while the rest
of the model is in evaluation mode (no dropout). Counts, means and sums of squared deviations of
batches are merged exactly (Chan, Golub, LeVeque 1983), in float64:

.. math::
    n = n_a + n_b, \quad \delta = \mu_b - \mu_a, \quad \mu = \mu_a + \delta\, n_b / n, \quad
    M = M_a + M_b + \delta^2\, n_a n_b / n,

so that unequal batches weigh by their number of values, and the spread *between* batches counts.
The moments of the first layers are those of the whole data set, however it is cut into batches;
a deeper layer sees inputs that were normalized by batch, which do depend on the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.core.ranks.group import Group, GroupChoice, together
from curvlib.core.risk import Risk


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each channel of a layer's input.

    Attributes:
        count: Number of values of each channel.
        mean: ``[C]``, float64.
        squares: Sum of squared deviations from the mean, ``[C]``, float64.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """The moments of ``[N, C, ...]``."""
        rows = x.detach().double().transpose(0, 1).flatten(1)
        mean = rows.mean(1)
        return cls(rows.shape[1], mean, (rows - mean[:, None]).square().sum(1))

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of values."""
        count = self.count + other.count
        delta = other.mean - self.mean
        squares = self.squares + other.squares
        squares = squares + delta.square() * (self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), squares)

    @property
    def variance(self) -> Tensor:
        """The unbiased variance, ``[C]``."""
        return self.squares / (self.count - 1)


def batch_moments(
    model: nn.Module,
    data: Any,
    layers: Mapping[str, nn.Module],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
    group: GroupChoice = None,
) -> tuple[dict[str, Moments], int]:
    """The moments of the inputs of batch-normalization layers, in one pass.

    The model is left as it was: parameters, buffers, modes, gradients and random state.

    Args:
        model: The model; it has at least one parameter.
        data: Batches, as a :class:`curvlib.core.risk.Risk` takes them.
        layers: Some of the model's layers, by name. A layer that is called more than once per
            batch sees the values of all calls.
        forward: Function of ``(model, batch)``, where the model is not called on the first item
            of a pair or by the names of a mapping.
        device: Where batches are moved. Default: the parameters' device.
        group: The processes whose shards make the data, as for :class:`curvlib.core.risk.Risk`.
            A rank sends a mean and a sum of squares for each channel, as text.

    Returns:
        Moments of the layers that were reached, by name, and the number of batches.

    Raises:
        TypeError: If a batch is of an unknown kind and there is no ``forward=``.
        ValueError: If there is no batch, or a batch has one value per channel only.
        RuntimeError: If another rank failed.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1))
        >>> data = [(torch.tensor([[1.0], [3.0]]), None), (torch.tensor([[8.0], [0.0]]), None)]
        >>> moments, batches = batch_moments(model, data, {"0": model[0]})
        >>> moments["0"].mean.item(), round(moments["0"].variance.item(), 3), batches
        (3.0, 12.667, 2)
    """
    first = next(model.parameters())
    risk = Risk(
        model,
        lambda output, target: output,  # is never called
        data,
        forward=forward,
        reduction="sum",
        params=[first],
        device=device,
        group=group,
    )
    found: dict[str, Moments] = {}
    batches = 0
    with together(risk.group, "a pass over its data"), ExitStack() as stack:
        stack.enter_context(risk.untouched())
        stack.enter_context(torch.no_grad())
        stack.enter_context(_batch_statistics(risk.model, layers.values()))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(_collect(name, found)).remove)
        for batch in risk.batches(shard=True):
            try:
                risk.call(batch.data)
            except _TooFew as error:
                raise ValueError(
                    f"batch {batch.index} gives layer {error.args[0]!r} one value per channel, "
                    "which has no variance; use larger batches, or drop_last=True"
                ) from None
            batches += 1
    if risk.group is None:
        return found, batches
    return _joined(risk.group, found, batches, first.device)


def _joined(
    group: Group, found: Mapping[str, Moments], batches: int, device: torch.device
) -> tuple[dict[str, Moments], int]:
    """The moments of all ranks' batches, merged in the order of ranks."""
    own = {n: [m.count, m.mean.tolist(), m.squares.tolist()] for n, m in found.items()}
    out: dict[str, Moments] = {}
    every = group.values([own, batches])
    for part, _ in every:
        for name, (count, *sums) in part.items():
            mean, squares = (torch.tensor(s, dtype=torch.float64, device=device) for s in sums)
            new = Moments(count, mean, squares)
            out[name] = out[name].merged(new) if name in out else new
    if not out and not any(number for _, number in every):
        raise ValueError("the data has no batch on any rank; pass at least one batch")
    return out, sum(number for _, number in every)


class _TooFew(Exception):  # noqa: N818 (never leaves this file)
    pass


def _collect(name: str, found: dict[str, Moments]) -> Callable[[nn.Module, Any], None]:
    def hook(_: nn.Module, inputs: Any) -> None:
        x = inputs[0]
        if x.numel() <= x.shape[1]:
            raise _TooFew(name)
        new = Moments.of(x)
        found[name] = found[name].merged(new) if name in found else new

    return hook


@contextmanager
def _batch_statistics(model: nn.Module, layers: Any) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for layer in layers:
            layer.training = True
        yield
    finally:
        for module, mode in before:
            module.training = mode
