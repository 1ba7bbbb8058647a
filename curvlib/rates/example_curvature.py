r"""What each example's curvature says about the spectra of mini-batches.

Let :math:`V` hold the top :math:`k` eigenvectors of the full matrix :math:`H`, with
:math:`\lambda_1 \ge \dots \ge \lambda_k`, and let :math:`H_i` be that of example ``i``. From the
products :math:`H_i V` come two small matrices for each example,

.. math:: M_i = V^\top H_i V, \qquad
          C_i = R_i^\top R_i, \quad R_i = (I - V V^\top) H_i V .

A mini-batch :math:`S` of :math:`B` examples has the matrix, in the basis of :math:`V` and its
complement,

.. math:: G = \begin{pmatrix} A & R^\top \\ R & D \end{pmatrix}, \qquad
          A = \frac1B \sum_{i \in S} M_i, \quad R^\top R \approx \frac{1}{B^2} \sum_{i \in S} C_i
          \cdot \frac{N - B}{N - 1},

and the noise :math:`R` meets the complement with the curvature

.. math:: \mu = \frac{\operatorname{tr} R^\top G R}{\operatorname{tr} R^\top R} \approx
          \frac1B \, \frac{\sum_{i \in S} \operatorname{tr} R_i^\top H_i R_i}
                      {\sum_{i \in S} \operatorname{tr} C_i}
          + \Big(1 - \frac1B\Big)
          \frac{\sum_i \operatorname{tr} R_i^\top H R_i}{\sum_i \operatorname{tr} C_i} .

So :math:`\lambda_{\max}(G)` is that of a matrix of size :math:`2k`, in which :math:`D` is
:math:`\mu I`; its mean over many random :math:`S` costs no further product, for any :math:`B`.
That is the *corrected* value. With :math:`\mu = 0` it is a lower estimate (a Rayleigh-Ritz bound
where :math:`D` is positive semi-definite), with the bound
:math:`\|D\| \le \lambda_k + \|D - E D\|_F` in the place of :math:`\mu` an upper one.

For one direction, :math:`k = 1`, and small noise this is the second-order perturbation
:math:`\lambda_1 + \frac1b E \|R_i\|^2 / (\lambda_1 - \mu)`; the resampling of :math:`A` adds what
the mean of the largest of several close outliers exceeds the largest mean by. The isotropic theory
of :mod:`curvlib.rates.spiked` has neither, and is off by up to two times on real networks.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlib.core.digest import digest
from curvlib.core.minibatch import minibatches, require_batch_size
from curvlib.core.operator import LinearOperator
from curvlib.core.random import generator_of
from curvlib.core.result import Result
from curvlib.core.risk import Risk
from curvlib.core.run import Progress, run
from curvlib.estimators.arguments import require_counts
from curvlib.estimators.eigenpairs import eigenpairs
from curvlib.rates.arguments import curvature, require_kind, require_risk
from curvlib.rates.example_sums import PROBES, ExampleSums, SumsState
from curvlib.rates.preconditioned import Preconditioner, inverse_root, preconditioned
from curvlib.rates.resampling import Sharpness, resampled_sharpness
from curvlib.rates.spiked import additive, effective_batch


@dataclass(frozen=True, eq=False, repr=False)
class ExampleCurvature(Result):
    r"""Curvature of single examples in the top eigenspace of the whole, and what it implies.

    All of it belongs to :math:`P^{-1/2} H P^{-1/2}` where a preconditioner was given.

    Attributes:
        values: :math:`\lambda_1 \ge \dots \ge \lambda_k` of the full matrix, ``[k]``, float64.
        vectors: Their eigenvectors, ``[P, k]``.
        projected: :math:`M_i`, ``[M, k, k]``, float64, scaled so that their mean is
            :math:`\operatorname{diag}(\lambda)`.
        spread: :math:`C_i`, ``[M, k, k]``, float64.
        own: Estimates of :math:`\operatorname{tr} R_i^\top H_i R_i` and
            :math:`\operatorname{tr} C_i` with one random vector, ``[M, 2]``, float64.
        shared: :math:`\sum_i \operatorname{tr} R_i^\top H R_i / \sum_i \operatorname{tr} C_i`.
        trace: :math:`\operatorname{tr} H`, estimated.
        trace_stderr: Its standard error, as if the examples were drawn at random themselves.
        square: :math:`\frac1M \sum_i \|H_i\|_F^2`, estimated.
        complement: :math:`\|(I - V V^\top) H (I - V V^\top)\|_F^2`, estimated.
        examples: :math:`N`.
        size: :math:`P`.
        products: Columns multiplied by matrices of all ``M`` examples.
        kind: ``"hessian"`` or ``"ggn"``.
        settings: The settings, by name.
    """

    values: Tensor
    vectors: Tensor
    projected: Tensor
    spread: Tensor
    own: Tensor
    shared: float
    trace: float
    trace_stderr: float
    square: float
    complement: float
    examples: int
    size: int
    products: int
    kind: str
    settings: dict[str, Any]

    @property
    def top(self) -> float:
        r""":math:`\lambda_1` of the full matrix."""
        return float(self.values[0])

    @property
    def variance(self) -> float:
        r""":math:`\sigma^2`, the mean variance of an entry of one example's matrix."""
        n = self.examples
        full = self.complement + float(self.values.square().sum())
        return max(self.square - full, 0.0) * n / (n - 1) / self.size**2

    def isotropic(self, batch_size: int) -> float:
        """The largest eigenvalue of a batch's matrix if noise were isotropic (spiked Wigner)."""
        require_batch_size(batch_size, self.examples)
        b = effective_batch(batch_size, self.examples)
        return additive(self.top, self.variance, self.size, b)

    def effective_batch(self, batch_size: int) -> float:
        """:math:`b = (B - B / N) / (1 - B / N)`, exact for draws without replacement.

        Raises:
            ValueError: If the batch size does not fit.
        """
        require_batch_size(batch_size, self.examples)
        n = self.examples
        return effective_batch(batch_size, n) * (n - 1) / n

    def noise(self, direction: int = 0) -> tuple[float, float]:
        r"""The noise of one example along an eigenvector :math:`v`, and its standard error.

        Returns:
            :math:`\frac{1}{M} \sum_i \|(H_i - H) v\|^2`, of which :math:`1 / b` is a batch's.
        """
        square = self.projected[:, :, direction].square().sum(1)
        each = square + self.spread[:, direction, direction]
        value = float(self.values[direction])
        return float(each.mean()) - value**2, float(each.std()) / math.sqrt(len(each))

    def sharpness(
        self,
        batch_size: int,
        *,
        resamples: int = 512,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> Sharpness:
        r"""The mean largest eigenvalue of a mini-batch's matrix, without further products.

        Args:
            batch_size: :math:`B`, 1 to :math:`N`.
            resamples: Random mini-batches whose small matrices are formed.
            generator: Where they come from, or
            seed: their seed. With neither, the seed is 0.

        Returns:
            The corrected value with its standard error over resamples, and the lower and upper
            estimates. The full batch has :math:`\lambda_1` exactly.

        Raises:
            TypeError: If a number is no int.
            ValueError: If the batch size does not fit, or there is no resample.
        """
        require_batch_size(batch_size, self.examples)
        require_counts(resamples=(resamples, 1))
        n, b = self.examples, self.effective_batch(batch_size)
        inside = self.projected.square().sum((1, 2)) + 2.0 * _traces(self.spread)
        outside = max(self.square - float(inside.mean()), 0.0)  # of the complement's blocks
        noise = math.sqrt(max(outside - self.complement, 0.0) / b)
        return resampled_sharpness(
            self.projected,
            self.spread,
            self.values,
            batch_size,
            n,
            own=self.own,
            shared=self.shared,
            bound=max(float(self.values[-1]), 0.0) + noise,
            resamples=resamples,
            generator=generator_of(generator, seed),
        )


def example_curvature(
    risk: Risk,
    directions: int = 8,
    *,
    kind: str = "hessian",
    preconditioner: Preconditioner | Tensor | torch.optim.Optimizer | None = None,
    examples: int | None = None,
    block: int | None = None,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> ExampleCurvature:
    r"""Per-example products along the top eigenvectors, from which all batch sizes follow.

    The cost is that of the top eigenpairs, and of about ``directions + 10`` products with the
    whole data (the largest part of it example by example).

    Args:
        risk: Model, loss, data and parameters: a mean over independent examples.
        directions: :math:`k`, how many top eigenvectors: a few more than there are outliers of
            nearly the same size (for classification, about as many as classes).
        kind: ``"hessian"`` or ``"ggn"``.
        preconditioner: :math:`P`, for an adaptive method: its optimizer, its diagonal, or an
            operator with powers; see :func:`curvlib.rates.preconditioned.preconditioned`.
        examples: Take the products of so many random examples only.
        block: Examples at a time: see :func:`curvlib.operators.example_products.example_products`.
        tolerance: Of the eigenpairs, relative to the norm.
        generator: Where random vectors come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists; the eigenpairs have
            their own beside it, with ``-eigenpairs`` in its name.
        save_every: Seconds between saves.
        progress: Whether to show bars, of the eigenpairs and of the examples.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument does not fit, or examples depend on each other.
        FloatingPointError: If a product is not finite.

    Example:
        >>> import torch, curvlib as cl
        >>> x, y = torch.randn(64, 3).double(), torch.randn(64, 1).double()
        >>> risk = cl.Risk(torch.nn.Linear(3, 1).double(), torch.nn.MSELoss(), (x, y))
        >>> found = example_curvature(risk, 4)
        >>> bool(abs(found.top - torch.linalg.eigvalsh(cl.hessian(risk).to_dense())[-1]) < 1e-6)
        True
        >>> found.sharpness(4).value > found.sharpness(32).value > found.sharpness(64).value
        True
    """
    count = require_risk(risk)
    require_kind(kind)
    require_counts(directions=(directions, 1))
    taken = count if examples is None else require_batch_size(examples, count)
    require_counts(examples=(taken, 2))
    random = generator_of(generator, seed)
    H = curvature(risk, kind)
    root: LinearOperator | None = None
    if preconditioner is not None:
        root = inverse_root(risk, preconditioner)
        P: Any = preconditioner
        H = preconditioned(H, P, risk)
    k = min(directions, H.shape[0])
    saved: dict[str, Any] = {"save_every": save_every, "progress": progress}
    pairs = eigenpairs(
        H,
        k,
        tolerance=tolerance,
        check=False,
        generator=random,
        checkpoint=None if checkpoint is None else beside(checkpoint, "eigenpairs"),
        **saved,
    )
    part = risk if taken == count else minibatches(risk, taken, 1, generator=random)[0]
    sums = ExampleSums(H, root, pairs.vectors, part, kind, block)
    settings = {
        "directions": k,
        "kind": kind,
        "preconditioner": None if root is None else root.name,
        "examples": taken,
        "tolerance": tolerance,
        "seed": (seed or 0) if generator is None else "generator",
    }
    last = run(
        lambda: sums.first(random),
        sums.next,
        state_type=SumsState,
        done=lambda state: state.ends is not None,
        report=lambda state: (len(state.weights), taken, ""),
        title=f"{kind} of {taken} examples",
        checkpoint=checkpoint,
        problem=lambda: f"{H.fingerprint()} {digest([pairs.vectors])}",
        settings={**settings, "block": block},
        device=pairs.vectors.device,
        group=risk.group,
        **saved,
    )
    return ExampleCurvature(
        values=pairs.values,
        vectors=pairs.vectors,
        examples=count,
        size=H.shape[0],
        products=pairs.products + k + 2 + 2 * PROBES,
        kind=kind,
        settings=settings,
        **sums.finished(last, pairs.values),
    )


def beside(path: str | os.PathLike[str], word: str) -> Path:
    """The path of another file of the same run."""
    path = Path(path)
    return path.with_name(f"{path.stem}-{word}{path.suffix}")


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)
