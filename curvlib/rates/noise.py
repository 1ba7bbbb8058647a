r"""Noise of mini-batch curvature: the variance of its entries.

With :math:`H_i` the Hessian of example ``i``, :math:`H` their mean over :math:`N` examples and
:math:`P` parameters, the mean variance of an entry is

.. math:: \sigma^2 = \frac{1}{P^2} \, \frac{1}{N - 1} \sum_i \| H_i - H \|_F^2 .

The Hessian :math:`G` of a mini-batch of :math:`B` examples, drawn without replacement, has
:math:`E \|G - H\|_F^2 = P^2 \sigma^2 / b` with the effective batch :math:`b = B / (1 - B / N)`.

For :math:`k` *disjoint* batches of :math:`n` examples with Hessians :math:`G_j`, and a Rademacher
vector :math:`z`,

.. math:: E \, \frac{1}{k - 1} \sum_j \Big\| G_j z - \tfrac1k \sum_l G_l z \Big\|^2
          = \frac{P^2 \sigma^2}{n}

exactly: batches that exclude each other are correlated by :math:`-\sigma^2 / N`, which cancels the
finite-population factor, and :math:`E \|A z\|^2 = \|A\|_F^2`. So no product with the full Hessian
is needed, and the estimate is unbiased.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlib.core.minibatch import minibatches, require_batch_size
from curvlib.core.random import generator_of
from curvlib.core.result import Result
from curvlib.core.risk import Risk
from curvlib.core.run import Progress, run
from curvlib.estimators.arguments import require_counts
from curvlib.rates.arguments import (
    curvature,
    first_seed,
    mean_and_stderr,
    require_kind,
    require_risk,
)
from curvlib.rates.spiked import additive, effective_batch


@dataclass(frozen=True, eq=False, repr=False)
class HessianNoise(Result):
    r"""Noise of mini-batch curvature.

    Attributes:
        value: :math:`\sigma^2`, the mean variance of an entry of one example's matrix.
        stderr: Its standard error over draws; NaN with one draw.
        samples: What each draw says, ``[draws]``, float64.
        batch_size: :math:`B`, of the mini-batches that are asked about.
        examples: :math:`N`.
        size: :math:`P`.
        products: Columns multiplied, by matrices of ``settings["sample"]`` examples.
        kind: ``"hessian"`` or ``"ggn"``.
        settings: The settings, by name.
    """

    value: float
    stderr: float
    samples: Tensor
    batch_size: int
    examples: int
    size: int
    products: int
    kind: str
    settings: dict[str, Any]

    @property
    def effective_batch(self) -> float:
        """:math:`b = B / (1 - B / N)`, infinite for the full batch."""
        return effective_batch(self.batch_size, self.examples)

    @property
    def frobenius(self) -> float:
        r""":math:`\sqrt{E \|G - H\|_F^2}` of a mini-batch of :math:`B`; 0 for the full batch."""
        return self.size * math.sqrt(max(self.value, 0.0) / self.effective_batch)

    def extreme(self, value: float) -> float:
        """What an extreme eigenvalue of the full matrix shows as under isotropic noise.

        See :func:`curvlib.rates.spiked.additive`.
        """
        return additive(value, max(self.value, 0.0), self.size, self.effective_batch)


@dataclass(frozen=True)
class NoiseState:
    """State of a run: the seed of its draws, and what they gave."""

    base: int
    samples: Tensor


def hessian_noise(
    risk: Risk,
    batch_size: int,
    *,
    kind: str = "hessian",
    draws: int = 16,
    batches: int = 4,
    sample: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> HessianNoise:
    r"""The noise of mini-batch curvature, unbiased, with its standard error.

    Each draw takes disjoint random batches and a Rademacher vector of its own, so that draws are
    independent. A draw costs ``batches`` products with ``sample`` examples each.

    Args:
        risk: Model, loss, data and parameters: a mean over independent examples. Where examples
            have unequal weights (masks), :math:`\sigma^2` is that of batches of ``sample`` times
            ``sample``.
        batch_size: Of the mini-batches that are asked about, 1 to ``N``.
        kind: ``"hessian"`` or ``"ggn"``.
        draws: How many.
        batches: Disjoint batches in each draw, 2 or more.
        sample: Examples in each of them: as many as ``batch_size``, but ``N // batches`` at most,
            when omitted. The expectation does not depend on it.
        generator: Where batches and vectors come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the batch size does not fit, the data has one example, or an argument is
            out of range.
        FloatingPointError: If a product is not finite.

    Example:
        >>> import torch, curvlib as cl
        >>> x, y = torch.randn(64, 3).double(), torch.randn(64, 1).double()
        >>> risk = cl.Risk(torch.nn.Linear(3, 1).double(), torch.nn.MSELoss(), (x, y))
        >>> noise = hessian_noise(risk, 8, draws=64)
        >>> rows = torch.cat([x, torch.ones(64, 1).double()], 1)  # H_i = 2 row row'
        >>> each = 2 * rows[:, :, None] * rows[:, None, :]
        >>> exact = float((each - each.mean(0)).square().sum() / 63 / 4**2)
        >>> abs(noise.value - exact) < 4 * noise.stderr
        True

    Source:
        D. Granziol, S. Zohren and S. Roberts, *Learning rates as a function of batch size*, JMLR
        23 (2022), for the model; the estimate from disjoint batches is derived above.
    """
    count = require_risk(risk)
    require_batch_size(batch_size, count)
    require_kind(kind)
    require_counts(draws=(draws, 1), batches=(batches, 2))
    most = count // min(batches, count)
    if sample is None:
        sample = min(batch_size, most)
    require_counts(sample=(sample, 1))
    groups = min(batches, count // sample)
    if groups < 2:
        raise ValueError(
            f"expected sample <= {count // 2} (two disjoint batches of {count} examples), "
            f"got {sample}"
        )
    settings = {
        "batch_size": batch_size,
        "kind": kind,
        "draws": draws,
        "batches": groups,
        "sample": sample,
        "seed": (seed or 0) if generator is None else "generator",
    }

    def step(state: NoiseState) -> NoiseState:
        draw = state.base + len(state.samples)
        value = _draw(risk, kind, sample, groups, draw)
        return replace(state, samples=torch.cat([state.samples, value.reshape(1)]))

    last = run(
        lambda: NoiseState(first_seed(generator, seed), torch.zeros(0, dtype=torch.float64)),
        step,
        state_type=NoiseState,
        done=lambda state: len(state.samples) >= draws,
        report=lambda state: (len(state.samples), draws, ""),
        title=f"noise of the {kind}",
        checkpoint=checkpoint,
        problem=risk.fingerprint,
        settings=settings,
        save_every=save_every,
        progress=progress,
        group=risk.group,
    )
    value, stderr = mean_and_stderr(last.samples)
    return HessianNoise(
        value=value,
        stderr=stderr,
        samples=last.samples,
        batch_size=batch_size,
        examples=count,
        size=risk.space.size,
        products=draws * groups,
        kind=kind,
        settings=settings,
    )


def _draw(risk: Risk, kind: str, sample: int, groups: int, seed: int) -> Tensor:
    """One unbiased estimate of the variance, a float64 scalar on the CPU."""
    size = risk.space.size
    random = generator_of(None, seed)
    z = torch.randint(2, (size,), generator=random).to(risk.space.dtype).mul_(2.0).sub_(1.0)
    z = z.to(risk.space.device)
    parts = minibatches(risk, sample, groups, disjoint=True, generator=random)
    products = torch.stack([curvature(part, kind) @ z for part in parts]).double()
    spread = (products - products.mean(0)).square().sum() / (groups - 1)
    return (spread * sample / size**2).cpu()
