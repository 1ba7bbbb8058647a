r"""Quadratures as smooth densities: Gaussians as wide as what is known of each node."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Kernel widths that a grid reaches beyond the outermost nodes.
REACH = 6.0


def even_grid(
    nodes: Tensor, residuals: Tensor, points: int, width: float | None, psd: bool
) -> Tensor:
    """An even grid that holds all kernels, with kernels no narrower than its spacing."""
    reach = residuals if width is None else torch.full_like(residuals, width)
    low = float((nodes - REACH * reach).min())
    high = float((nodes + REACH * reach).max())
    if psd:
        low, high = max(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = 0.05 * max(abs(low), abs(high)) or 0.5
        low, high = low - half, high + half
    margin = (high - low) * REACH / (points - 1 - 2 * REACH)
    low, high = low - margin, high + margin
    return torch.linspace(max(low, 0.0) if psd else low, high, points, dtype=torch.float64)


def kernel_widths(nodes: Tensor, residuals: Tensor, grid: Tensor, width: float | None) -> Tensor:
    """Width of each node's kernel: ``width``, or its residual, at least the grid's spacing there.

    Raises:
        ValueError: If ``width`` is not positive.
    """
    if width is not None:
        if not (width > 0.0 and math.isfinite(width)):
            raise ValueError(f"expected a positive width, got {width}")
        return torch.full_like(residuals, width)
    spacing = grid.diff()
    at = torch.searchsorted(grid, nodes.contiguous()).clamp(1, grid.numel() - 1) - 1
    return torch.maximum(residuals, spacing[at])


def smooth(grid: Tensor, nodes: Tensor, weights: Tensor, widths: Tensor, psd: bool) -> Tensor:
    """Density of each probe, ``[probes, points]``, reflected at zero for ``psd``."""
    out = _gaussians(grid, nodes, weights, widths)
    return out + _gaussians(-grid, nodes, weights, widths) if psd else out


def cumulative(grid: Tensor, nodes: Tensor, weights: Tensor, widths: Tensor, psd: bool) -> Tensor:
    """Mean over probes of the mass up to each point, ``[points]``."""

    def below(x: Tensor) -> Tensor:
        scaled = (x[:, None, None] - nodes) / (widths * math.sqrt(2.0))
        return (weights * 0.5 * (1.0 + torch.erf(scaled))).sum(2).mean(1)

    return below(grid) - below(-grid) if psd else below(grid)


def mass_between(
    nodes: Tensor, weights: Tensor, residuals: Tensor, low: float, high: float
) -> Tensor:
    """Mass of each probe from ``low`` to ``high``, ``[probes]``; nodes are as wide as residuals."""
    sharp = residuals <= 1e-12 * nodes.abs().max()
    scale = math.sqrt(2.0) * torch.where(sharp, 1.0, residuals)
    share = 0.5 * (torch.erf((high - nodes) / scale) - torch.erf((low - nodes) / scale))
    inside = (nodes >= low) & (nodes <= high)
    return (weights * torch.where(sharp, inside.double(), share)).sum(1)


def _gaussians(grid: Tensor, nodes: Tensor, weights: Tensor, widths: Tensor) -> Tensor:
    scaled = (grid[None, :, None] - nodes[:, None, :]) / widths[:, None, :]
    heights = weights / (widths * math.sqrt(2.0 * math.pi))
    return (heights[:, None, :] * torch.exp(-0.5 * scaled.square())).sum(2)
