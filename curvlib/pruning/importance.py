r"""How much the loss feels each layer, from forward passes alone.

The slope of the loss along a random direction :math:`z \sim N(0, I)` of the parameters of layer
:math:`l` is, from values at two points (Malladi et al., "Fine-tuning language models with just
forward passes", MeZO, 2023),

.. math:: s_l = \frac{R(\theta + \epsilon z) - R(\theta - \epsilon z)}{2 \epsilon}
              = z^\top g_l + O(\epsilon^2),

so that :math:`|s_l|` has the mean :math:`\sqrt{2/\pi}\, |g_l|`. ECoFLaP (Sung, Yoon, Bansal,
"ECoFLaP: efficient coarse-to-fine layer-wise pruning for vision-language models", 2024) divides a
budget among layers by such slopes, without a backward pass and its memory, and prunes by local
scores within each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.arguments import finite_number
from curvlib.core.random import generator_of
from curvlib.core.result import Result
from curvlib.core.risk import Risk
from curvlib.operators.perturbed import perturbed_values


@dataclass(frozen=True, eq=False, repr=False)
class LayerImportance(Result):
    r"""Gradient norms of layers, estimated from values of the risk.

    Attributes:
        layers: Names of the layers, in order.
        value: Estimates of :math:`|g_l|`: :math:`\sqrt{\pi/2}` times the mean of :math:`|s_l|` over
            the draws, ``[L]``, float64.
        stderr: Standard errors of ``value``, ``[L]``; NaN for a single draw.
        slopes: The slopes :math:`s_l`, ``[draws, L]``, float64.
        scale: :math:`\epsilon`.
    """

    layers: tuple[str, ...]
    value: Tensor
    stderr: Tensor
    slopes: Tensor
    scale: float

    def by_layer(self) -> dict[str, float]:
        """Values by the layers' names."""
        return dict(zip(self.layers, self.value.tolist(), strict=True))


def layer_importance(
    risk: Risk,
    layers: Mapping[str, Sequence[str]] | None = None,
    *,
    draws: int = 16,
    scale: float = 1e-3,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> LayerImportance:
    r"""Zeroth-order importance of layers: ``2 * draws * L`` forward passes over the data.

    The data are gone through once; the model is not written to.

    Args:
        risk: Model, loss, data and parameters.
        layers: Names of the parameters of each layer. Default: the modules that own parameters of
            the risk, ``risk.space.layers()``.
        draws: Random directions for each layer.
        scale: :math:`\epsilon`. Differences of values lose about ``eps * R / scale`` to rounding
            where ``eps`` is the precision of the model: 1e-3 suits float32.
        generator: Source of randomness.
        seed: Or a seed; 0 by default.

    Raises:
        TypeError: If ``scale``, ``generator`` or ``seed`` is of another type.
        ValueError: If a layer is empty or names an unknown parameter, or ``draws`` or ``scale`` is
            not positive.
        FloatingPointError: If a value is not finite.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> x, y = torch.ones(4, 1).double(), model.weight.detach().expand(4, 1) - 1.0
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (x, y))
        >>> found = layer_importance(risk, draws=400)
        >>> bool((found.value - risk.gradient().norm()).abs() < 4 * found.stderr)
        True
    """
    if draws < 1:
        raise ValueError(f"draws= needs at least one direction, got {draws}")
    scale = finite_number("scale", scale)
    if scale <= 0.0:
        raise ValueError(f"scale= is positive, got {scale:g}")
    chosen = _layers(risk, layers)
    drawn = generator_of(generator, seed)
    seeds = torch.randint(2**63 - 1, (draws, len(chosen)), generator=drawn).tolist()
    points = [
        _point(risk, names, number, sign * scale)
        for row in seeds
        for names, number in zip(chosen.values(), row, strict=True)
        for sign in (1.0, -1.0)
    ]
    values = perturbed_values(risk, points).double().cpu().view(draws, len(chosen), 2)
    slopes = (values[..., 0] - values[..., 1]) / (2.0 * scale)
    sizes = math.sqrt(math.pi / 2.0) * slopes.abs()
    spread = sizes.std(0) if draws > 1 else torch.full_like(sizes[0], math.nan)
    return LayerImportance(
        layers=tuple(chosen),
        value=sizes.mean(0),
        stderr=spread / math.sqrt(draws),
        slopes=slopes,
        scale=scale,
    )


def _layers(risk: Risk, layers: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    if layers is None:
        return risk.space.layers()
    if not layers:
        raise ValueError("layers= names no layer; leave it out for one layer for each module")
    for layer, names in layers.items():
        unknown = [name for name in names if name not in risk.space.names]
        if unknown or not names:
            what = f"unknown parameters {unknown}" if unknown else "no parameter"
            raise ValueError(
                f"layers= gives layer {layer!r} {what}; the risk has {list(risk.space.names)}"
            )
    return {layer: tuple(names) for layer, names in layers.items()}


def _point(
    risk: Risk, names: Sequence[str], seed: int, scale: float
) -> Callable[[], dict[str, Tensor]]:
    """A function that draws its direction anew at each call, from the seed."""

    def values() -> dict[str, Tensor]:
        device, dtype = risk.space.device, risk.space.dtype
        drawn = torch.Generator(device=device).manual_seed(seed)
        out = {}
        for name in names:
            param = risk.params[name].detach()
            z = torch.randn(param.shape, generator=drawn, device=device, dtype=dtype)
            out[name] = (param + scale * z).to(param.dtype)
        return out

    return values
