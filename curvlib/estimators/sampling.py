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
from typing import ClassVar

import torch
from torch import Tensor

from curvlib.estimators.blocks import Blocks, Moments
from curvlib.estimators.cells import Cells, Piece
from curvlib.estimators.philox import draw_keys
from curvlib.estimators.probe_kernels import ProbeKernels
from curvlib.estimators.rows import dots
from curvlib.estimators.stopping import Plan, multiply, require_finite


@dataclass(frozen=True)
class SamplingState:
    """Where a run stands.

    Attributes:
        traces: Samples of the trace, ``[m]``, float64 on the CPU.
        squares: Samples of the squared Frobenius norm, ``[m]``, where they are wanted.
        layers: Samples of the layers' traces, ``[m, L]``; empty where they are not wanted.
        diagonal: Running estimate ``[P]``, where it is wanted.
        residual: Running sum of squared residuals ``[P]``.
        weight: Running sum of squared probes ``[P]``; ``None`` for Rademacher probes.
        means: Of blocks: see :class:`~curvlib.estimators.blocks.Moments`.
        spreads: Likewise.
        generator: State of the random generator.
    """

    SPREAD: ClassVar = ("diagonal", "residual", "weight")

    traces: Tensor
    squares: Tensor | None
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
    plan: Plan,
    *,
    diagonal: bool = False,
    blocks: Blocks | None = None,
    layers: bool = False,
    squares: bool = False,
) -> SamplingState:
    """The state before the first product."""
    op = plan.op
    zero = torch.zeros(op.length if diagonal else 0, dtype=op.dtype, device=op.device)
    count = blocks.count if blocks is not None and diagonal else 0
    width = len(blocks.groups["layers"]) if blocks is not None and layers else 0
    none = torch.zeros(0, dtype=torch.float64)
    return SamplingState(
        traces=none,
        squares=none if squares else None,
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
    W, generator = plan.draw(state.generator, plan.following(state.count), keep=False)
    square = plan.op.shape[0] == plan.op.shape[1]
    groups = blocks or Blocks(None, {})
    cells, own = groups.cells(len(W), W.device), None
    regressed = state.diagonal is not None and state.residual is not None
    pieced = square and (regressed or blocks is not None)
    Y = multiply(plan.op, W, state.count, check=pieced or not square)
    fused = _fused(plan, state, Y) if square and plan.op.spread is None else None
    left = state if fused is None else replace(state, diagonal=None)
    if pieced and (fused is None or blocks is not None):
        if state.weight is not None:
            own = groups.cells(len(W), W.device)
        width = 2**14 if W.device.type == "cpu" else 2**19
        for piece in groups.pieces(W.shape[1], width):
            _read(left, piece, W[:, piece.span], Y[:, piece.span], cells, own)
    summed = bool(cells.sums.shape[1]) and plan.op.spread is None
    if fused is not None:
        traces = fused[0]
    else:
        traces = dots(W, Y, plan.op.spread) if square and not summed else cells.sums.sum(1)
    norms = None
    if state.squares is not None:
        norms = dots(Y, Y, plan.op.spread) if fused is None else fused[1]
    traces, *more = torch.stack([traces] if norms is None else [traces, norms]).cpu()
    require_finite(plan.op, Y, traces, state.count)
    moments = Moments(state.count, state.means, state.spreads)
    layers = state.layers
    if blocks is not None and square:
        sums = blocks.of_cells(cells)
        layers = torch.cat([layers, sums[:, : layers.shape[1]].cpu()])
        if regressed:
            sizes = block_sizes(blocks, W[0])
            ones = torch.ones_like(sizes).expand_as(sums)
            shares = ones if own is None else blocks.of_cells(own) / sizes
            for x, d in zip(sums / sizes, shares, strict=True):
                moments = moments.with_probe(x, d)
    squares = state.squares
    if squares is not None:
        squares = torch.cat([squares, *more])
    return replace(
        state,
        traces=torch.cat([state.traces, traces]),
        squares=squares,
        layers=layers,
        means=moments.means,
        spreads=moments.squares,
        generator=generator,
    )


def _fused(plan: Plan, state: SamplingState, Y: Tensor) -> tuple[Tensor, Tensor] | None:
    """What is read off products by a kernel that makes the probes again, where there is one.

    Returns:
        Inner products with the probes and squared norms, ``[K]`` each; diagonals are read too.
    """
    kernels = ProbeKernels.of(Y) if plan.law == "rademacher" else None
    if kernels is None:
        return None
    generator = torch.Generator(device=Y.device)
    generator.set_state(state.generator)
    found: tuple[Tensor, Tensor] = kernels.read(
        Y,
        draw_keys(len(Y), generator),
        known=state.count,
        diagonal=state.diagonal,
        residual=state.residual,
    )
    return found


def _read(
    state: SamplingState, piece: Piece, W: Tensor, Y: Tensor, cells: Cells, own: Cells | None
) -> None:
    """Reads a piece of all probes ``[K, c]`` and products, while it is in cache, in order."""
    if cells.sums.shape[1] or cells.chosen.shape[1]:
        cells.add(piece, W * Y)
        if own is not None:
            own.add(piece, W.square())
    if state.diagonal is None or state.residual is None:
        return
    weight = None if state.weight is None else state.weight[piece.span]
    for index, (w, y) in enumerate(zip(W, Y, strict=True)):
        count = state.count + index + 1
        regress(state.diagonal[piece.span], state.residual[piece.span], weight, count, w, y)


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
