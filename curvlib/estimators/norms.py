r"""The spectral norm of any operator, and the angle between two operators."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlib.core.arguments import finite_number
from curvlib.core.operator import LinearOperator, as_operator
from curvlib.core.result import Result
from curvlib.core.run import Progress, run
from curvlib.estimators.arguments import require_counts
from curvlib.estimators.eigenpairs import eigenpairs
from curvlib.estimators.lanczos import power_of_two
from curvlib.estimators.probes import LAWS, fill_probes, generator_of
from curvlib.estimators.rows import largest, summed


@dataclass(frozen=True, eq=False, repr=False)
class SpectralNorm(Result):
    r"""The largest singular value, from below, with a measured residual.

    Attributes:
        value: The norm: no larger than the true one (up to rounding).
        residual: There is a singular value within this of ``value``.
        converged: Whether the residual is within a tenth of the tolerance.
        vector: Where the norm is attained, ``[n]``: a right singular vector.
        products: Columns multiplied by the operator or its transpose.
        method: ``"symmetric"``, or ``"gram"`` for :math:`A^\top A`.
        name: What was measured.
        settings: The settings, by name.
    """

    value: float
    residual: float
    converged: bool
    vector: Tensor
    products: int
    method: str
    name: str
    settings: dict[str, Any]

    @property
    def interval(self) -> tuple[float, float]:
        """Between ``value`` and ``value + residual``: the norm, if the vector is the right one."""
        return self.value, self.value + self.residual


def spectral_norm(
    op: LinearOperator | Tensor,
    *,
    tolerance: float = 1e-3,
    max_products: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> SpectralNorm:
    r"""The spectral norm :math:`\|A\|_2`, by Lanczos.

    Of differences too: ``spectral_norm(A - B)`` says how far two operators are apart. Operators
    that are not symmetric need a product with their transpose.

    Args:
        op: An operator or a dense matrix, of any shape.
        tolerance: Relative error to aim at: Lanczos goes on until the residual is a tenth of it.
            As Lanczos starts at random, it can take the second largest singular value for the
            largest where they differ little: by a percent, in fewer than one in a hundred runs.
        max_products: Stop after so many products, with what there is.
        generator: Where random vectors come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type, or there is no product with the transpose.
        ValueError: If an argument does not fit.
        FloatingPointError: If a product is not finite.

    Example:
        >>> A = torch.tensor([[0.0, 3.0, 0.0], [-4.0, 0.0, 0.0]], dtype=torch.float64)
        >>> round(spectral_norm(A).value, 6)
        4.0
    """
    op = as_operator(op, spread=True)
    if 0 in op.shape:
        raise ValueError(f"the operator is empty {op.shape}: it has no norm")
    symmetric = op.symmetric
    cost = 1 if symmetric else 2
    if op._transposed_product is None:
        raise TypeError(
            f"the norm of {op!r}, which is not symmetric, needs a product with its transpose; pass "
            "rmatmat= (or symmetric=True, if it is) when you build it"
        )
    wide = op.shape[0] < op.shape[1]
    unit = 1.0 if symmetric else _unit(op)
    scaled = op * (1.0 / unit)
    square = op if symmetric else scaled @ scaled.T if wide else scaled.T @ scaled
    if max_products is not None:
        require_counts(max_products=(max_products, 3 if symmetric else 8))
    if not 0.0 < finite_number("tolerance", tolerance) < 1.0:
        raise ValueError(f"expected 0 < tolerance < 1, got {tolerance}")
    pairs = eigenpairs(
        square,
        1,
        which="LM",
        tolerance=0.1 * tolerance,
        max_products=None if max_products is None else max_products // cost - (cost - 1),
        check=False,
        generator=generator,
        seed=seed,
        checkpoint=checkpoint,
        save_every=save_every,
        progress=progress,
    )
    top, residual = abs(float(pairs.values[0])), float(pairs.residuals[0])
    vector, products = pairs.vectors[:, 0], cost * pairs.products + (0 if symmetric else 1)
    if symmetric:
        value = top
    else:
        root = math.sqrt(max(top, 0.0))
        # sigma^2 is within the residual of top, and sigma + root >= root.
        residual = unit * (residual / root if root > 0.0 else math.sqrt(residual))
        if wide and root > 0.0:
            vector = (scaled.T @ vector) / root
            products += 1
        value = unit * root
    return SpectralNorm(
        value=value,
        residual=residual,
        converged=bool(pairs.converged[0]),
        vector=vector,
        products=products,
        method="symmetric" if symmetric else "gram",
        name=op.name,
        settings={"tolerance": tolerance, "max_products": max_products, **_random(seed, generator)},
    )


def _unit(op: LinearOperator) -> float:
    """A power of two near the operator's norm, so that no square over- or underflows."""
    random = generator_of(None, 0, op.device)
    rows = torch.empty((1, op.length), dtype=op.dtype, device=op.device)
    fill_probes(rows, "sphere", random, op.spread)
    most = largest(op.matmat(rows.mT), op.spread)
    if not math.isfinite(most):
        raise FloatingPointError(
            f"the first product with {op!r} has entries that are NaN or infinite; check the loss "
            "and its derivatives at these parameters (risk.check())"
        )
    least = 4.0 * torch.finfo(op.dtype).tiny  # so that one over it is finite
    return power_of_two(max(most, least), op.dtype) if most > 0.0 else 1.0


@dataclass(frozen=True, eq=False, repr=False)
class CosineSimilarity(Result):
    r"""The cosine of the angle between two operators, with its standard error.

    Attributes:
        value: Estimate of :math:`\langle A, B \rangle_F / (\|A\|_F \|B\|_F)`, between -1 and 1.
        stderr: Its standard error, by the jackknife.
        probes: Random vectors that both operators multiplied.
        products: Columns multiplied by either operator.
        converged: Whether the standard error is within the tolerance, where one was given.
        method: ``"shared probes"``.
        name: What was compared.
        settings: The settings, by name.
    """

    value: float
    stderr: float
    probes: int
    products: int
    converged: bool
    method: str
    name: str
    settings: dict[str, Any]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval, by Student's t."""
        from scipy.stats import t

        reach = float(t.ppf(0.975, self.probes - 1)) * self.stderr
        return max(self.value - reach, -1.0), min(self.value + reach, 1.0)


@dataclass(frozen=True)
class CosineState:
    r"""Inner products of the probes so far.

    Attributes:
        moments: :math:`(Aw)^\top Bw`, :math:`\|Aw\|^2` and :math:`\|Bw\|^2`, ``[3, done]``.
        random: State of the generator.
    """

    moments: Tensor
    random: Tensor


def cosine_similarity(
    a: LinearOperator | Tensor,
    b: LinearOperator | Tensor,
    *,
    tolerance: float | None = None,
    max_products: int | None = None,
    law: str = "rademacher",
    block: int = 8,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> CosineSimilarity:
    r"""How alike two operators are: the cosine of their angle as matrices.

    With probes that both multiply, :math:`E\, (Aw)^\top (Bw) = \langle A, B \rangle_F`, which is
    :math:`\mathrm{tr}(AB)` for symmetric operators, and likewise for the norms; the errors of the
    three partly cancel. The estimate is a ratio: its bias falls like one over the probes.

    Args:
        a: An operator or a dense matrix.
        b: Another one of the same shape.
        tolerance: Stop when the standard error is at most this (of the cosine, which has no
            unit), after at least 16 probes.
        max_products: Stop after so many products, two for each probe. 128 when omitted.
        law: Of the probes: ``"rademacher"``, ``"gaussian"`` or ``"sphere"``.
        block: Probes that are multiplied at a time.
        generator: Where random vectors come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument does not fit, or an operator is zero.
        FloatingPointError: If a product is not finite.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        >>> cosine = cosine_similarity(A, 2 * A)
        >>> round(cosine.value, 6), round(cosine.stderr, 6)
        (1.0, 0.0)
    """
    a, b = as_operator(a, spread=True), as_operator(b, spread=True)
    if a.shape != b.shape:
        raise ValueError(f"expected operators of one shape, got {a.shape} and {b.shape}")
    if a.dtype != b.dtype:
        raise TypeError(f"expected operators of one type, got {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"expected operators on one device, got {a.device} and {b.device}")
    if a.spread != b.spread:
        raise ValueError(
            f"expected operators whose vectors are on the same processes, got {a!r} and {b!r}; "
            "make both of risks with the same parameters of the same sharded model"
        )
    if tolerance is not None and not (tolerance > 0.0 and math.isfinite(tolerance)):
        raise ValueError(f"expected a positive tolerance=, got {tolerance}")
    if law not in LAWS:
        raise ValueError(f"unknown law of probes {law!r}; there are {', '.join(LAWS)}")
    budget = 128 if max_products is None else max_products
    require_counts(max_products=(budget, 4), block=(block, 1))
    total = budget // 2
    random = generator_of(generator, seed, a.device)
    settings = {
        "tolerance": tolerance,
        "max_products": budget,
        "law": law,
        "block": block,
        **_random(seed, generator),
    }
    empty = torch.zeros((3, 0), dtype=torch.float64)
    state = run(
        lambda: CosineState(empty, random.get_state()),
        lambda state: _next_cosine(a, b, state, law, min(block, total - state.moments.shape[1])),
        state_type=CosineState,
        done=lambda state: state.moments.shape[1] >= total or _within(state, tolerance),
        report=lambda state: (2 * state.moments.shape[1], 2 * total, ""),
        title=f"cosine of {a.name} and {b.name}",
        checkpoint=checkpoint,
        problem=lambda: a.fingerprint() + b.fingerprint(),
        settings=settings,
        device=a.device,
        save_every=save_every,
        progress=progress,
        group=a.group or b.group,
    )
    count = state.moments.shape[1]
    for name, norm in ((a.name, state.moments[1].sum()), (b.name, state.moments[2].sum())):
        if float(norm) == 0.0:
            raise ValueError(f"{name} is zero on all probes: its angle to others is undefined")
    value, stderr = cosine_and_stderr(state.moments)
    return CosineSimilarity(
        value=value,
        stderr=stderr,
        probes=count,
        products=2 * count,
        converged=tolerance is None or stderr <= tolerance,
        method="shared probes",
        name=f"{a.name} and {b.name}",
        settings=settings,
    )


def _within(state: CosineState, tolerance: float | None) -> bool:
    if tolerance is None or state.moments.shape[1] < 16:
        return False
    return cosine_and_stderr(state.moments)[1] <= tolerance


def _next_cosine(
    a: LinearOperator, b: LinearOperator, state: CosineState, law: str, count: int
) -> CosineState:
    generator = torch.Generator(device=a.device)
    generator.set_state(state.random)
    rows = torch.empty((count, a.length), dtype=a.dtype, device=a.device)
    fill_probes(rows, law, generator, a.spread)
    left, right = a.matmat(rows.mT).mT, b.matmat(rows.mT).mT
    fresh = torch.stack(
        [torch.linalg.vecdot(x, y) for x, y in ((left, right), (left, left), (right, right))]
    )
    fresh = summed(fresh.double().cpu(), a.spread)
    if not bool(torch.isfinite(fresh).all()):
        done = state.moments.shape[1]
        raise FloatingPointError(
            f"the products of probes {done + 1} to {done + count} with {a!r} or {b!r} have entries "
            "that are NaN or infinite; check the loss and its derivatives at these parameters "
            "(risk.check()). With checkpoint=, what came before is saved"
        )
    return replace(
        state, moments=torch.cat([state.moments, fresh], dim=1), random=generator.get_state()
    )


def cosine_and_stderr(moments: Tensor) -> tuple[float, float]:
    """The ratio of sums over probes, and its jackknife standard error, from ``[3, probes]``."""
    sums = moments.sum(1, keepdim=True)
    left_out = (sums - moments).clamp(min=0.0)
    left_out[0] = (sums - moments)[0]
    count = moments.shape[1]
    value = _ratio(sums)
    values = _ratio(left_out)
    spread = (values - values.mean()).square().sum()
    return float(value[0]), float((spread * (count - 1) / count).sqrt())


def _ratio(sums: Tensor) -> Tensor:
    size = (sums[1].sqrt() * sums[2].sqrt()).clamp(min=torch.finfo(sums.dtype).tiny)
    return (sums[0] / size).clamp(-1.0, 1.0)


def _random(seed: int | None, generator: torch.Generator | None) -> dict[str, Any]:
    return {"seed": (seed or 0) if generator is None else "generator"}
