"""Mean of leave-one-out diagonals, its standard errors, and block means, piece by piece."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.estimators import sampling
from curvlib.estimators.blocks import Blocks, block_table
from curvlib.estimators.intervals import degrees_of, mean_and_stderr

#: Numbers in a block of rows that is worked on at once: several such blocks fit a CPU's caches.
CACHED = 2**16


class Samples(Protocol):
    """Diagonals of all probes, for some entries at a time."""

    @property
    def count(self) -> int:
        """Number of probes."""

    def at(self, span: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Samples, what partners do to them and they to the partners', rows ``[m, c]`` each."""


def averaged(
    op: LinearOperator, samples: Samples | None, groups: Blocks | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Mean of the diagonals of all probes, its standard error, and block means.

    Samples share a sketch: to the variance of independent samples comes the covariance, of
    which each probe and its partner give an unbiased estimate; it is kept between 0 and the
    samples' variance, as in :mod:`curvlib.estimators.exchangeable`.

    Args:
        op: The operator.
        samples: The probes' diagonals; ``None`` for the zero operator.
        groups: Blocks whose means are wanted too.
    """
    n = op.length
    mean = torch.zeros(n, dtype=op.dtype, device=op.device)
    variance = torch.zeros_like(mean)
    blocks = groups or Blocks(None, {})
    if samples is None:
        none = groups.sums(mean) if groups is not None else mean
        sizes = sampling.block_sizes(groups, mean)
        return mean, variance, block_table(blocks, none, none, sizes, 0.0) if groups else {}
    count = samples.count
    sums = [blocks.cells(count, op.device) for _ in range(3)]
    width = max(CACHED // count, 512) if op.device.type == "cpu" else 2**22 // count
    for piece in blocks.pieces(n, width):
        found = samples.at(piece.span)
        if groups is not None:
            for cells, rows in zip(sums, found, strict=True):
                cells.add(piece, rows)
        mean[piece.span], variance[piece.span] = _moments(*found)
    if groups is None or not groups.groups:
        return mean, variance.sqrt_(), {}
    sizes = sampling.block_sizes(groups, mean)
    means, changes, partners = (groups.of_cells(cells) / sizes for cells in sums)
    value, error = mean_and_stderr(means)
    degrees = torch.zeros_like(value)
    if count > 1:
        both = changes * partners
        most = count * error.square() / both.mean(0).clamp_min(torch.finfo(both.dtype).tiny)
        both *= torch.where(both.mean(0) > 0.0, most.clamp_max(1.0), 0.0)
        own = (means - value).square() / (count - 1)
        # A pair's product belongs to both of its probes: it counts twice, as in the trace.
        degrees = degrees_of(own + both, own + 2 * both)
        error = (error.square() + both.mean(0)).sqrt()
    return mean, variance.sqrt_(), block_table(groups, value, error, sizes, degrees)


def _moments(samples: Tensor, change: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of samples ``[m, c]`` and its variance, each ``[c]``; NaN with one sample."""
    count = samples.shape[0]
    mean = samples.mean(0)
    if count == 1:
        return mean, torch.full_like(mean, torch.nan)
    own = samples.sub_(mean).square_().sum(0) / (count - 1)
    shared = change.mul_(partner).mean(0).clamp_min_(0.0)
    return mean, own.div_(count).add_(shared.minimum(own))
