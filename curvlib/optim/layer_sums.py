"""Sums over recorded passes, additive over micro-batches and ranks, and the factors they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvlib.operators.factors.pairs import factors
from curvlib.operators.factors.sums import (
    EigenvalueSums,
    Sums,
    add_gradients,
    add_inputs,
    factor_sums,
)
from curvlib.operators.layers.factored import FactoredLayer
from curvlib.operators.layers.recorded import Recorded, factor_of_squares
from curvlib.operators.layers.use import Uses
from curvlib.optim.layer_curvature import LayerCurvature


def zero_sums(
    layers: Sequence[FactoredLayer],
    dtype: torch.dtype,
    bases: Mapping[str, LayerCurvature],
    device: torch.device,
) -> dict[str, Tensor]:
    """Zeros for all layers, so that ranks hold the same tensors whichever layers were called.

    Args:
        layers: The layers.
        dtype: Of the sums.
        bases: Layers whose corrected eigenvalues are summed, too.
        device: Of the sums.
    """
    zeros = factor_sums(layers, torch.empty(0, dtype=dtype, device=device))
    found = dict(zeros.tensors)
    for key in zeros.counts:
        found[f"{key}|count"] = torch.zeros((), dtype=torch.float64, device=device)
    for layer in layers:
        known = bases.get(layer.name)
        values = None if known is None else known.corrected
        if values is not None and tuple(values.shape) == layer.shape:
            found[f"{layer.name}|squares"] = torch.zeros_like(values)
    found["terms"] = torch.zeros((), dtype=torch.float64, device=device)
    return found


def add_pass(
    layers: Sequence[FactoredLayer],
    found: Recorded,
    pending: dict[str, Tensor],
    *,
    sampled: bool,
    reduce: bool,
    scale: float,
    bases: Mapping[str, LayerCurvature],
) -> dict[str, str]:
    """Adds one pass to the sums.

    Args:
        layers: The layers.
        found: The pass.
        pending: The sums; of other tensors, nothing is changed.
        sampled: Whether squares are of sampled labels' scores.
        reduce: Whether rows of an example are reduced first.
        scale: What the user's loss was multiplied by.
        bases: Bases of corrected eigenvalues.

    Returns:
        Why layers were left out: rows have to be told apart by example, and cannot.

    Raises:
        RuntimeError: If no labels could be drawn.
    """
    raw = found.sampled if sampled else found.gradients
    if raw is None:
        raise RuntimeError(
            "the loss did not reach the output of the model that the optimizer was given, so no "
            "labels can be drawn from it; call that model itself, or use fisher='empirical'"
        )
    gradients = [g if g is None or scale == 1.0 else unscaled(g, scale) for g in raw]
    left_out = {}
    for layer in layers:
        if not found.of(layer.name):
            continue
        squares = pending.get(f"{layer.name}|squares")
        own: Uses = found
        if not found.aligned(layer.name):
            if reduce or squares is not None or "scale" in layer.roles:
                left_out[layer.name] = (
                    f"its rows cannot be told apart by the {found.examples} examples of the "
                    "model's input, as normalization layers, sharing='reduce' and "
                    "eigen_corrected=True need; put examples along the first axis"
                )
                continue
            own = found.merged()
        keys = [f"{layer.name}|{role}" for role in layer.roles]
        sides = [f"{key}|{side}" for key in keys for side in ("left", "right")]
        sums = Sums({k: pending[k] for k in sides if k in pending}, dict.fromkeys(keys, 0.0))
        add_inputs(layer, own, sums, reduce=reduce)
        add_gradients(layer, own, gradients, sums, reduce=reduce, first=True)
        for key, count in sums.counts.items():
            pending[f"{key}|count"] += count
        if squares is not None:
            adder = EigenvalueSums([layer], {layer.name: bases[layer.name].basis})
            adder.add(layer, own, gradients, squares)
    pending["terms"] += found.terms
    return left_out


def batch_curvature(
    layers: Sequence[FactoredLayer],
    pending: Mapping[str, Tensor],
    *,
    sampled: bool,
    sum_of_terms: bool,
    ranks: int,
) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """Left and right factor, and corrected eigenvalues, of each layer that was called.

    See :func:`~curvlib.operators.layers.recorded.factor_of_squares` for the scale.
    """
    scale = factor_of_squares(
        pending["terms"], sampled=sampled, sum_of_terms=sum_of_terms, ranks=ranks
    )
    names = [f"{layer.name}|{role}" for layer in layers for role in layer.roles]
    read = torch.stack([scale.double(), *(pending[f"{name}|count"].double() for name in names)])
    factor, *counted = read.tolist()  # waits for the device once
    counts = dict(zip(names, counted, strict=True))
    out: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
    for layer in layers:
        pair = factors(layer, pending, counts, 1.0 / factor)
        if pair is not None:
            dtype = pending[f"{layer.name}|{layer.roles[0]}|right"].dtype
            squares = pending.get(f"{layer.name}|squares")
            squares = None if squares is None else squares * factor
            out[layer.name] = (pair[0].to(dtype), pair[1].to(dtype), squares)
    return out


def unscaled(gradient: Tensor, scale: float) -> Tensor:
    """A gradient over the scale of its loss, in float32 at least."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale
