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
from dataclasses import dataclass

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


def averaged(
    gradients: Sequence[Tensor],
    readings: Sequence[Tensor | None],
    moments: Sequence[Moments],
    settings: Settings,
) -> list[Moments]:
    """What to remember of several parameters after one step more; nothing is written in place.

    Args:
        gradients: Their gradients, of one device.
        readings: What :func:`reading` returned, ``None`` in steps without curvature.
        moments: What was remembered.
        settings: Hyper-parameters.
    """
    b1, b2 = settings.betas
    grads = [g.to(m.momentum.dtype) for g, m in zip(gradients, moments, strict=True)]
    averages = torch._foreach_lerp([m.momentum for m in moments], grads, 1 - b1)
    known = [m.curvature for m in moments]
    fresh = [i for i, r in enumerate(readings) if r is not None]
    if fresh:
        seen = [r.to(k.dtype) for r, k in zip(readings, known, strict=True) if r is not None]
        new = torch._foreach_lerp([known[i] for i in fresh], seen, 1 - b2)
        for i, c in zip(fresh, new, strict=True):
            known[i] = c
    return [
        Moments(a, c, m.steps + 1, m.curvature_updates + (r is not None))
        for a, c, m, r in zip(averages, known, moments, readings, strict=True)
    ]


def move(params: Sequence[Tensor], moments: Sequence[Moments], settings: Settings) -> None:
    r"""Moves parameters of one dtype and device, in place.

    With :math:`\hat r^k = v^{k'} c` where :math:`v` is the average and :math:`c` its correction,
    this is :math:`\hat m / (v^{k'} c + \epsilon) = c^{-1} \hat m / (v^{k'} + \epsilon / c)`.

    Args:
        params: Parameters; those that have had no curvature yet stay where they are.
        moments: What :func:`averaged` returned.
        settings: Hyper-parameters.

    Example:
        A Newton step on ``2 x^2`` with ``H = 4``, whose momentum is switched off:

        >>> x, s = torch.tensor([3.0]), Settings(1.0, (0.0, 0.9), 1e-12, 1.0, 0.0, "diagonal", None)
        >>> moments = averaged([4 * x], [torch.tensor([4.0])], [init(x, s)], s)
        >>> move([x], moments, s)
        >>> x
        tensor([0.])
    """
    b1, b2 = settings.betas
    ready = [(p, m) for p, m in zip(params, moments, strict=True) if m.curvature_updates]
    if not ready:
        return
    moved, averages = [p for p, _ in ready], [m.momentum for _, m in ready]
    power = settings.hessian_power * (0.5 if settings.estimand == "rownorm" else 1.0)
    scales = _powers([m.curvature for _, m in ready], power, settings.estimand)
    factors = [(1 - b2**m.curvature_updates) ** power for _, m in ready]
    torch._foreach_add_(scales, [settings.eps * f for f in factors])
    size = settings.block_size
    scales = [spread(s, p.shape, size) for s, p in zip(scales, moved, strict=True)]
    rates = [-settings.lr * f / (1 - b1**m.steps) for (_, m), f in zip(ready, factors, strict=True)]
    if settings.weight_decay:
        torch._foreach_mul_(moved, 1 - settings.lr * settings.weight_decay)
    torch._foreach_addcdiv_(moved, averages, scales, rates)


def _powers(averages: list[Tensor], power: float, estimand: str) -> list[Tensor]:
    """Averages to the power, their absolute values for the diagonal; new tensors."""
    if estimand == "rownorm" and power == 0.5:
        return list(torch._foreach_sqrt(averages))
    if estimand == "rownorm":
        return list(torch._foreach_pow(averages, power))
    sizes = list(torch._foreach_abs(averages))
    return sizes if power == 1.0 else list(torch._foreach_pow(sizes, power))
