r"""Independent probes: one pass of products from which many things are read.

For each probe :math:`w` with product :math:`y = A w`:
:math:`w^\top y` samples the trace, its parts the traces of layers, :math:`\|y\|^2` the squared
Frobenius norm, and :math:`w \odot y` the diagonal.

The diagonal is kept as a running regression of :math:`y_j` on :math:`w_j`: the estimate
:math:`\sum w_j y_j / \sum w_j^2` (the mean of :math:`w \odot y` divided, entry by entry, by the
mean of :math:`w \odot w`) is unbiased for every law, exact on diagonal operators, and its
standard error is the regression's, exact for Gaussian probes. It takes two vectors of length P
for Rademacher probes and three for others, however many probes there are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlib.estimators.blocks import Blocks, Moments
from curvlib.estimators.stopping import Plan, multiply


@dataclass(frozen=True)
class SamplingState:
    """Where a run stands.

    Attributes:
        traces: Samples of the trace, ``[m]``, float64 on the CPU.
        squares: Samples of the squared Frobenius norm, ``[m]``.
        layers: Samples of the layers' traces, ``[m, L]``; empty where they are not wanted.
        diagonal: Running estimate ``[P]``, where it is wanted.
        residual: Running sum of squared residuals ``[P]``.
        weight: Running sum of squared probes ``[P]``; ``None`` for Rademacher probes.
        means: Of blocks: see :class:`~curvlib.estimators.blocks.Moments`.
        spreads: Likewise.
        generator: State of the random generator.
    """

    traces: Tensor
    squares: Tensor
    layers: Tensor
    diagonal: Tensor | None
    residual: Tensor | None
    weight: Tensor | None
    means: Tensor
    spreads: Tensor
    generator: Tensor

    @property
    def count(self) -> int:
        """Number of probes so far."""
        return int(self.traces.shape[0])


def first_state(
    plan: Plan, *, diagonal: bool, blocks: Blocks | None, layers: bool
) -> SamplingState:
    """The state before the first product."""
    op = plan.op
    zero = torch.zeros(op.shape[1] if diagonal else 0, dtype=op.dtype, device=op.device)
    count = blocks.count if blocks is not None and diagonal else 0
    width = len(blocks.groups["layers"]) if blocks is not None and layers else 0
    none = torch.zeros(0, dtype=torch.float64)
    return SamplingState(
        traces=none,
        squares=none,
        layers=torch.zeros((0, width), dtype=torch.float64),
        diagonal=zero if diagonal else None,
        residual=zero.clone() if diagonal else None,
        weight=zero.clone() if diagonal and plan.law != "rademacher" else None,
        means=torch.zeros((2, count), dtype=torch.float64, device=op.device),
        spreads=torch.zeros((3, count), dtype=torch.float64, device=op.device),
        generator=plan.random.get_state(),
    )


def next_state(plan: Plan, state: SamplingState, blocks: Blocks | None) -> SamplingState:
    """One block product, from which each probe is read by itself, in order.

    Raises:
        FloatingPointError: If a product is not finite; the state is then as it was.
    """
    W, generator = plan.draw(state.generator, plan.following(state.count))
    Y = multiply(plan.op, W, state.count)
    square = plan.op.shape[0] == plan.op.shape[1]
    traces, squares, layers = [], [], []
    moments = Moments(state.count, state.means, state.spreads)
    sizes = None
    for index, (w, y) in enumerate(zip(W, Y, strict=True)):
        wide = y.double()
        squares.append(torch.dot(wide, wide))
        if not square:
            traces.append(torch.zeros_like(squares[-1]))
            continue
        sums = None
        if blocks is not None:
            sums = blocks.sums(w * y)
        if state.layers.shape[1] and sums is not None:
            layers.append(sums[: state.layers.shape[1]])
            traces.append(layers[-1].sum())
        else:
            traces.append(torch.dot(w.double(), wide))
        if state.diagonal is None or state.residual is None:
            continue
        if sums is not None:
            sizes = block_sizes(blocks, w) if sizes is None else sizes
            own = torch.ones_like(sizes)
            if state.weight is not None and blocks is not None:
                own = blocks.sums(w.square()) / sizes
            moments = moments.with_probe(sums / sizes, own)
        regress(state.diagonal, state.residual, state.weight, state.count + index + 1, w, y)
    return replace(
        state,
        traces=torch.cat([state.traces, torch.stack(traces).cpu()]),
        squares=torch.cat([state.squares, torch.stack(squares).cpu()]),
        layers=torch.cat([state.layers, torch.stack(layers).cpu()]) if layers else state.layers,
        means=moments.means,
        spreads=moments.squares,
        generator=generator,
    )


def regress(
    diagonal: Tensor, residual: Tensor, weight: Tensor | None, count: int, w: Tensor, y: Tensor
) -> None:
    """Adds one observation ``y = diagonal * w + noise`` to every entry's regression, in place.

    Args:
        diagonal: Slopes, ``[P]``.
        residual: Sums of squared residuals, ``[P]``.
        weight: Sums of ``w * w``, ``[P]``; ``None`` where they equal ``count``.
        count: Number of observations, this one included.
        w: Probe, ``[P]``.
        y: Its product, ``[P]``.
    """
    innovation = torch.addcmul(y, diagonal, w, value=-1.0)
    if weight is None:
        diagonal.addcmul_(innovation, w, value=1.0 / count)
        residual.addcmul_(innovation, innovation, value=1.0 - 1.0 / count)
        return
    known = weight.clone()
    weight.addcmul_(w, w)
    total = weight.clamp_min(torch.finfo(weight.dtype).tiny)
    # What the new slope leaves of the innovation is its share of the old weights: none at first.
    residual.addcmul_(innovation.square(), known.div_(total))
    innovation.mul_(w).div_(total)
    diagonal.add_(innovation)


def diagonal_stderr(residual: Tensor, weight: Tensor | None, count: int) -> Tensor:
    """Standard error of every entry, ``[P]``; NaN with one probe."""
    if count == 1:
        return torch.full_like(residual, torch.nan)
    total = count if weight is None else weight
    return (residual.clamp_min(0.0) / (count - 1) / total).sqrt()


def block_sizes(blocks: Blocks | None, like: Tensor) -> Tensor:
    """Entries of each block, ``[B]``."""
    if blocks is None:
        return torch.zeros(0, dtype=torch.float64, device=like.device)
    return blocks.sums(torch.ones_like(like))
