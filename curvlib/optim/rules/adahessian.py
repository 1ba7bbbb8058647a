r"""The update rule of AdaHessian (Yao et al., "ADAHESSIAN", AAAI 2021), on tensors.

With the gradient :math:`g_t`, Rademacher signs :math:`z` and the product :math:`H z`,

.. math::
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad \hat m_t = m_t / (1 - \beta_1^t) \\
    \theta_{t+1} &= \theta_t - \eta \Big( \frac{\hat m_t}{\hat r_t^{\,k} + \epsilon}
        + \lambda \theta_t \Big)

(k is the Hessian power, the weight decay :math:`\lambda` is decoupled), and the curvature
:math:`\hat r_t` depends on the estimand. A bar is a mean over a block of entries, such as a
convolution kernel; :math:`u` counts curvature updates, not steps.

``"rownorm"``, the paper's rule (algorithm 1, equations 10 to 12):

.. math:: v_u = \beta_2 v_{u-1} + (1 - \beta_2)\, \overline{|H z|}^{\,2}, \qquad
          \hat r = \sqrt{v_u / (1 - \beta_2^u)}

Without blocks it converges to :math:`\sqrt{E (Hz)_i^2} = \|H_{i,:}\|`, the norm of a row of the
Hessian, and not to its diagonal, since :math:`|z_i (Hz)_i| = |(Hz)_i|` has lost the sign that
would cancel the other entries.

``"diagonal"``, the unbiased one: signs are averaged first,

.. math:: h_u = \beta_2 h_{u-1} + (1 - \beta_2)\, \overline{z \odot H z}, \qquad
          \hat r = |h_u / (1 - \beta_2^u)|

which converges to the mean over the block of :math:`H_{ii}`, in absolute value. It is noisy for
as long as few updates are averaged: several probes, or a longer average, tame it.

Several probes average :math:`\overline{|Hz|}^{\,2}`, or :math:`\overline{z \odot Hz}`: the variance
falls, the limit stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ESTIMANDS = ("rownorm", "diagonal")


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters, as in the formulas of this module."""

    lr: float
    betas: tuple[float, float]
    eps: float
    hessian_power: float
    weight_decay: float
    estimand: str
    block_size: int | None


@dataclass(frozen=True)
class Moments:
    """What the rule remembers of one parameter.

    Attributes:
        momentum: Moving average of gradients, of the parameter's shape.
        curvature: Moving average of readings, one number for each block.
        steps: How many gradients were averaged.
        curvature_updates: How many readings were.
    """

    momentum: Tensor
    curvature: Tensor
    steps: int = 0
    curvature_updates: int = 0


def block_means(x: Tensor, block_size: int | None) -> Tensor:
    """Means over blocks of entries.

    Args:
        x: A tensor of the shape of a parameter.
        block_size: ``None``: the kernel of a convolution, which is all but the first two
            dimensions (of tensors with 3 to 5 of them, and more); or the length of runs of the
            flattened tensor (of tensors with at least 2 dimensions; the last run may be shorter).

    Returns:
        ``[O, I, 1, ...]`` for kernels, ``[runs]`` for runs, and ``x`` where there are no blocks.

    Example:
        >>> block_means(torch.arange(6.0).view(1, 2, 3), None).flatten().tolist()
        [1.0, 4.0]
        >>> block_means(torch.arange(6.0).view(2, 3), 4).tolist()
        [1.5, 4.5]
    """
    if block_size is None:
        return x.mean(dim=tuple(range(2, x.ndim)), keepdim=True) if x.ndim > 2 else x
    if x.ndim < 2 or block_size == 1 or x.numel() == 0:
        return x
    flat, n = x.reshape(-1), x.numel()
    whole = n // block_size * block_size
    means = flat[:whole].view(-1, block_size).mean(1)
    return torch.cat([means, flat[whole:].mean().view(1)]) if whole < n else means


def spread(blocks: Tensor, shape: torch.Size, block_size: int | None) -> Tensor:
    """Each entry's block: what ``block_means`` returned, in a form that broadcasts to ``shape``."""
    if block_size is None or len(shape) < 2 or block_size == 1:
        return blocks
    return blocks.repeat_interleave(block_size)[: shape.numel()].view(shape)


def reading(products: Sequence[Tensor], settings: Settings) -> Tensor:
    r"""What one curvature update averages in, from what several probes saw.

    Args:
        products: For the row norm :math:`Hz` of each probe, and for the diagonal
            :math:`z \odot Hz` of each (or their mean).
        settings: Of which the estimand and the block size are used.

    Returns:
        One number for each block.
    """
    parts = [p.float() if p.dtype in (torch.float16, torch.bfloat16) else p for p in products]
    if settings.estimand == "rownorm":
        parts = [block_means(p.abs(), settings.block_size).square() for p in parts]
    else:
        parts = [block_means(p, settings.block_size) for p in parts]
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)


def init(param: Tensor, settings: Settings) -> Moments:
    """Zeros, in float32 for parameters of lower precision."""
    low = param.dtype in (torch.float16, torch.bfloat16)
    zeros = torch.zeros_like(param, dtype=torch.float32 if low else param.dtype)
    return Moments(zeros, torch.zeros_like(block_means(zeros, settings.block_size)))


def update(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    readings: Sequence[Tensor | None],
    moments: Sequence[Moments],
    settings: Settings,
) -> tuple[list[Tensor | None], list[Moments]]:
    """One step of several parameters, of one dtype and device; nothing is written in place.

    Args:
        params: Parameters.
        gradients: Their gradients.
        readings: What :func:`reading` returned, ``None`` in steps without curvature.
        moments: What was remembered.
        settings: Hyper-parameters.

    Returns:
        What to add to each parameter (``None``, which is to wait, for one that has had no
        curvature yet), and what to remember.

    Example:
        A Newton step on ``2 x^2`` with ``H = 4``, whose momentum is switched off:

        >>> x, s = torch.tensor([3.0]), Settings(1.0, (0.0, 0.9), 1e-12, 1.0, 0.0, "diagonal", None)
        >>> (step,), _ = update([x], [4 * x], [torch.tensor([4.0])], [init(x, s)], s)
        >>> step
        tensor([-3.])
    """
    b1, b2 = settings.betas
    grads = [g.to(m.momentum.dtype) for g, m in zip(gradients, moments, strict=True)]
    averages = torch._foreach_lerp([m.momentum for m in moments], grads, 1 - b1)
    remembered = [
        replace(m, momentum=a, steps=m.steps + 1) for m, a in zip(moments, averages, strict=True)
    ]
    fresh = [i for i, r in enumerate(readings) if r is not None]
    if fresh:
        known = [remembered[i].curvature for i in fresh]
        seen = [
            r.to(k.dtype)
            for r, k in zip((readings[i] for i in fresh), known, strict=True)
            if r is not None
        ]
        for i, c in zip(fresh, torch._foreach_lerp(known, seen, 1 - b2), strict=True):
            updates = remembered[i].curvature_updates + 1
            remembered[i] = replace(remembered[i], curvature=c, curvature_updates=updates)
    ready = [i for i, m in enumerate(remembered) if m.curvature_updates]
    steps: list[Tensor | None] = [None] * len(params)
    if ready:
        moved = _displacements([params[i] for i in ready], [remembered[i] for i in ready], settings)
        for i, step in zip(ready, moved, strict=True):
            steps[i] = step
    return steps, remembered


def _displacements(
    params: Sequence[Tensor], moments: Sequence[Moments], settings: Settings
) -> Sequence[Tensor]:
    """What a step adds to parameters that have curvature."""
    b1, b2 = settings.betas
    power = settings.hessian_power
    kept = [1 - b2**m.curvature_updates for m in moments]
    scales = list(torch._foreach_div([m.curvature for m in moments], kept))
    if settings.estimand == "rownorm":
        torch._foreach_sqrt_(scales)
    else:
        torch._foreach_abs_(scales)
    if power != 1:
        torch._foreach_pow_(scales, power)
    torch._foreach_add_(scales, settings.eps)
    scales = [spread(s, p.shape, settings.block_size) for s, p in zip(scales, params, strict=True)]
    rates = [-settings.lr / (1 - b1**m.steps) for m in moments]
    steps = torch._foreach_div([m.momentum for m in moments], scales)
    torch._foreach_mul_(steps, rates)
    if settings.weight_decay:
        torch._foreach_add_(steps, list(params), alpha=-settings.lr * settings.weight_decay)
    return list(steps)
