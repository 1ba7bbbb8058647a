r"""Batch sharpness: the mean largest curvature of a mini-batch, measured and predicted.

.. math:: \lambda'(B) = E_S \, \lambda_{\max} \Big( \frac1B \sum_{i \in S} H_i \Big)
          \;\ge\; \lambda_{\max}(H) .

It grows as batches shrink, by Jensen's inequality, and so the largest stable step of a step that
sees one batch shrinks. Three values side by side:

*measured*
    the mean over random mini-batches, each with its own Lanczos run;
*isotropic*
    the prediction of random-matrix theory for noise without structure (:mod:`curvlib.rates.spiked`
    with the variance that the examples have), which understates it on real networks;
*corrected*
    the prediction from per-example products along the top eigenvectors
    (:mod:`curvlib.rates.example_curvature`), with a lower and an upper estimate. One pass gives it
    for all batch sizes.
"""

from __future__ import annotations

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
from curvlib.estimators.eigenpairs import eigenpairs
from curvlib.rates.arguments import (
    curvature,
    first_seed,
    mean_and_stderr,
    require_kind,
    require_risk,
)
from curvlib.rates.example_curvature import ExampleCurvature, example_curvature
from curvlib.rates.spiked import effective_batch


@dataclass(frozen=True, eq=False, repr=False)
class BatchSharpness(Result):
    r"""Batch sharpness, measured and predicted.

    Attributes:
        measured: Mean of the largest eigenvalue over random mini-batches.
        measured_stderr: Its standard error; NaN with one draw.
        corrected: Predicted from per-example products along the top eigenvectors.
        corrected_stderr: Its standard error over resampled batches.
        lower: The lower estimate that goes with it.
        upper: The upper one.
        isotropic: Predicted for isotropic noise.
        full: :math:`\lambda_{\max}` of the full matrix.
        batch_size: :math:`B`.
        examples: :math:`N`.
        effective_batch: :math:`b = B / (1 - B / N)`.
        samples: The largest eigenvalue of each mini-batch, ``[draws]``, float64.
        products: Columns multiplied by matrices of mini-batches.
        kind: ``"hessian"`` or ``"ggn"``.
        settings: The settings, by name.
    """

    measured: float
    measured_stderr: float
    corrected: float
    corrected_stderr: float
    lower: float
    upper: float
    isotropic: float
    full: float
    batch_size: int
    examples: int
    effective_batch: float
    samples: Tensor
    products: int
    kind: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class SharpnessState:
    """State of a run: the seed of its draws, what they gave, and columns multiplied."""

    base: int
    samples: Tensor
    products: int


def batch_sharpness(
    risk: Risk,
    batch_size: int,
    *,
    kind: str = "hessian",
    draws: int = 16,
    curvature: ExampleCurvature | None = None,
    directions: int = 8,
    resamples: int = 512,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> BatchSharpness:
    r"""The mean largest eigenvalue of mini-batches: measured, isotropic and corrected.

    Args:
        risk: Model, loss, data and parameters: a mean over independent examples.
        batch_size: :math:`B`, 1 to :math:`N`.
        kind: ``"hessian"`` or ``"ggn"``.
        draws: Random mini-batches to measure; their Lanczos runs start from the full matrix's
            top eigenvectors and cost some ten products with ``B`` examples each.
        curvature: What :func:`example_curvature` returned for this risk and kind, when several
            batch sizes are asked about: it serves all.
        directions: For that function, when omitted.
        resamples: Of the corrected value.
        tolerance: Of the eigenpairs, relative to the norm.
        generator: Where mini-batches and random vectors come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save the measurement to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the batch size does not fit, the data has one example, ``curvature`` is of
            another problem, or an argument is out of range.
        FloatingPointError: If a product is not finite.

    Example:
        >>> import torch, curvlib as cl
        >>> x, y = torch.randn(64, 3).double(), torch.randn(64, 1).double()
        >>> risk = cl.Risk(torch.nn.Linear(3, 1).double(), torch.nn.MSELoss(), (x, y))
        >>> found = batch_sharpness(risk, 8, draws=40)
        >>> found.full < found.measured, abs(found.corrected / found.measured - 1) < 0.25
        (True, True)
    """
    count = require_risk(risk)
    require_batch_size(batch_size, count)
    require_kind(kind)
    require_counts(draws=(draws, 1), resamples=(resamples, 1))
    random = generator_of(generator, seed)
    known = curvature
    if known is None:
        known = example_curvature(
            risk, directions, kind=kind, tolerance=tolerance, generator=random
        )
    _require_same(known, risk, kind, count)
    settings = {
        "batch_size": batch_size,
        "kind": kind,
        "draws": draws,
        "directions": known.values.numel(),
        "resamples": resamples,
        "tolerance": tolerance,
        "seed": (seed or 0) if generator is None else "generator",
    }
    start = known.vectors.to(risk.space.device)

    def step(state: SharpnessState) -> SharpnessState:
        draw = state.base + len(state.samples)
        value, products = _largest(risk, kind, batch_size, start, tolerance, draw)
        samples = torch.cat([state.samples, torch.tensor([value], dtype=torch.float64)])
        return replace(state, samples=samples, products=state.products + products)

    last = run(
        lambda: SharpnessState(first_seed(random, None), torch.zeros(0, dtype=torch.float64), 0),
        step,
        state_type=SharpnessState,
        done=lambda state: len(state.samples) >= draws,
        report=lambda state: (len(state.samples), draws, ""),
        title=f"batch sharpness of the {kind}",
        checkpoint=checkpoint,
        problem=risk.fingerprint,
        settings=settings,
        save_every=save_every,
        progress=progress,
        group=risk.group,
    )
    measured, stderr = mean_and_stderr(last.samples)
    predicted = known.sharpness(batch_size, resamples=resamples, seed=last.base)
    return BatchSharpness(
        measured=measured,
        measured_stderr=stderr,
        corrected=predicted.value,
        corrected_stderr=predicted.stderr,
        lower=predicted.lower,
        upper=predicted.upper,
        isotropic=known.isotropic(batch_size),
        full=known.top,
        batch_size=batch_size,
        examples=count,
        effective_batch=effective_batch(batch_size, count),
        samples=last.samples,
        products=last.products,
        kind=kind,
        settings=settings,
    )


def _largest(
    risk: Risk, kind: str, batch_size: int, start: Tensor, tolerance: float, seed: int
) -> tuple[float, int]:
    """The largest eigenvalue of one random mini-batch, and how many products it took."""
    random = generator_of(None, seed)
    (part,) = minibatches(risk, batch_size, 1, generator=random)
    mix = torch.randn(start.shape[1], generator=random).to(start)
    rest = torch.randn(start.shape[0], generator=random).to(start)
    first = start @ (mix / mix.norm()) + 0.3 * rest / rest.norm()
    pairs = eigenpairs(
        curvature(part, kind),
        1,
        start=first[:, None],
        tolerance=tolerance,
        check=False,
        generator=random,
        progress=False,
    )
    return float(pairs.values[0]), pairs.products


def _require_same(known: ExampleCurvature, risk: Risk, kind: str, count: int) -> None:
    if not isinstance(known, ExampleCurvature):
        raise TypeError(f"curvature= takes an ExampleCurvature, got {type(known).__name__}")
    found = (known.kind, known.size, known.examples)
    if found != (kind, risk.space.size, count):
        raise ValueError(
            f"curvature= is that of a {found[0]} of {found[1]} parameters and {found[2]} "
            f"examples, but the risk has {risk.space.size} and {count}, and kind={kind!r}"
        )
    if known.settings["preconditioner"] is not None:
        raise ValueError(
            "curvature= is preconditioned, and mini-batches are measured without; pass one without "
            "preconditioner="
        )
