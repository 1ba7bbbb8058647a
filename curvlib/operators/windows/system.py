r"""The small side of M-FAC: factorized systems :math:`K = \lambda c\, I + G G^\top` in float64.

Everything is batched over the parts of a window. A system that is singular to working precision
(no Cholesky factorization, or a squared pivot below ``c * 2.2e-16`` of the largest diagonal entry)
gets ten times the damping, and again until it is not.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

F64 = torch.float64

#: Relative error of Gram entries and products ``G x`` that float32 chunks leave.
CHUNK_ERROR = 2e-8

#: Rounding of one float32 operation.
ROUNDING = 2.0**-24

_ESCALATIONS = 40

#: Of the estimate of the least eigenvalue: each costs as much as a solve.
_ITERATIONS = 4

#: Error of a Gram matrix, relative to the least eigenvalue, above which it is of no use.
_ROUGH = 1e-3

#: Squared norms of vectors whose float32 products stay in range.
_SCALES = (1e-24, 1e24)


@dataclass(frozen=True, eq=False)
class System:
    r"""Factorized systems of all parts, with the rows' order of storage.

    Attributes:
        gram: :math:`G G^\top`, ``[parts, c, c]``.
        cholesky: ``L`` with ``L L^T = gram + c damping I``, ``[parts, c, c]``.
        damping: In use, of each part, ``[parts]`` float64, on the CPU.
        escalations: How often the damping of each part was multiplied by ten.
        least: About the least eigenvalue of each ``K``, ``[parts]``, on the device.
        condition: Largest ratio of a diagonal entry of ``K`` to that.
        rounded: Whether Gram entries came from float32 products.
        extreme: Whether rows are so long or short that float32 products could leave its range.
    """

    gram: Tensor
    cholesky: Tensor
    damping: Tensor
    escalations: tuple[int, ...]
    least: Tensor
    condition: float
    rounded: bool
    extreme: bool

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.gram.shape[-1]

    def solve(self, right: Tensor) -> Tensor:
        """``K^{-1} right`` for ``[parts, c, K]``."""
        out: Tensor = torch.cholesky_solve(right, self.cholesky)
        return out

    def coefficients_of_row(self, slot: int) -> Tensor:
        """``c K^{-1} e_slot``, ``[parts, c, 1]``."""
        unit = torch.zeros_like(self.gram[:, :, :1])
        unit[:, slot] = self.count
        return self.solve(unit)

    def whiten(self, part: int, columns: Tensor) -> Tensor:
        """``L^{-1} columns`` for ``[c, n]`` of one part."""
        factor = self.cholesky[part]
        out: Tensor = torch.linalg.solve_triangular(factor, columns, upper=False)
        return out

    def whitener(self, part: int) -> Tensor:
        """``L^{-1}`` of one part, for many columns: products are faster than substitution."""
        eye = torch.eye(self.count, dtype=F64, device=self.cholesky.device)
        return self.whiten(part, eye).tril_()

    def combination_error(self, coefficients: Tensor) -> Tensor:
        """Squared error of a float32 ``G^T C``, by parts and columns, ``[parts, K]``."""
        norms = self.gram.diagonal(dim1=1, dim2=2)[:, None]
        terms = (norms @ coefficients.square())[:, 0]
        error = ROUNDING**2 * terms
        # errors E of the Gram matrix: || G^T K^-1 E C ||, as || G^T K^-1/2 || <= 1
        return error + CHUNK_ERROR**2 * self._gain() * terms if self.rounded else error

    def _gain(self) -> Tensor:
        """By how much errors of ``G x``, relative to ``|G| |x|``, grow: squared, ``[parts, 1]``."""
        return (self.gram.diagonal(dim1=1, dim2=2).sum(1) / self.least)[:, None]

    def solve_error(self, squares: Tensor, products: Tensor, coefficients: Tensor) -> float:
        r"""Relative error that float32 passes leave in :math:`x - G^\top K^{-1} G x`, about.

        Args:
            squares: :math:`\lVert x \rVert^2` by parts and columns, ``[parts, K]``.
            products: ``G x``, ``[parts, c, K]``.
            coefficients: ``K^{-1} G x``, ``[parts, c, K]``.
        """
        error = self.combination_error(coefficients) + ROUNDING**2 * squares
        error += CHUNK_ERROR**2 * self._gain() * squares
        size = squares + (coefficients * (self.gram @ coefficients - 2 * products)).sum(1)
        floor = ROUNDING**2 * squares
        beyond = (squares > _SCALES[1]) | ((squares < _SCALES[0]) & (squares > 0))
        error = torch.where(beyond, float("inf"), error)  # float32 would overflow or underflow
        return _relative(error.sum(0), size.maximum(floor).sum(0))

    def power(self, p: float) -> tuple[Tensor, Tensor, list[float]]:
        r""":math:`F^p = \lambda^p I + G^\top V \mathrm{diag}(w) V^\top G` of each part.

        Returns:
            ``V`` ``[parts, c, c]``, ``w`` ``[parts, c, 1]`` and :math:`\lambda^p`. The product of
            the three matrices would not be accurate enough.
        """
        values, vectors = torch.linalg.eigh(self.gram)
        used = self.damping.to(values.device)[:, None] * self.count
        ratio = values.clamp(min=0.0) / used
        # ((1 + r)^p - 1) / r without cancellation; p at r = 0
        gain = torch.where(ratio > 0, torch.expm1(p * torch.log1p(ratio)) / ratio, p)
        outside = self.damping**p
        weights = gain / used * outside.to(values.device)[:, None]
        return vectors, weights[:, :, None], outside.tolist()

    def trace(self, lengths: tuple[int, ...]) -> float:
        """The trace of ``F``, summed over parts of these lengths."""
        rows = float(self.gram.diagonal(dim1=1, dim2=2).sum()) / self.count
        return rows + float(torch.tensor(lengths, dtype=F64) @ self.damping)

    def logdet(self, lengths: tuple[int, ...]) -> float:
        r""":math:`P \log \lambda + \log \det K - c \log(\lambda c)`, summed over parts."""
        sizes = torch.tensor(lengths, dtype=F64)
        pivots = 2.0 * self.cholesky.diagonal(dim1=1, dim2=2).log().sum(1).cpu()
        scale = self.count * (self.count * self.damping).log()
        return float((sizes * self.damping.log() + pivots - scale).sum())

    def row_error(self, coefficients: Tensor) -> float:
        """Relative error that a float32 ``G^T C`` has, about."""
        size = (coefficients * (self.gram @ coefficients)).sum(1)
        return _relative(self.combination_error(coefficients).sum(0), size.sum(0))


def eigenvalues(gram: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Eigenvalues of ``G^T G / c``, those of all parts in one descending list, without zeros.

    Args:
        gram: ``[parts, c, c]``, float64.
        lengths: Columns of each part.
    """
    values = torch.linalg.eigvalsh(gram).flip(1).clamp_(min=0.0)
    kept = [v[:n] for v, n in zip(values, lengths, strict=True)]
    return torch.cat(kept).sort(descending=True).values / gram.shape[-1]


def absolute_damping(
    gram: Tensor, damping: float, lengths: tuple[int, ...], *, relative: bool
) -> Tensor:
    """The damping of each part ``[parts]``, on the device, without waiting for it.

    Args:
        gram: ``[parts, c, c]``, float64.
        damping: Absolute, or a fraction of the mean diagonal entry of ``G^T G / c`` in each part.
            A part whose rows are zero is damped like the whole.
        lengths: Columns of each part.
        relative: Which of the two.
    """
    if not relative:
        return torch.full((len(lengths),), damping, dtype=F64, device=gram.device)
    traces = gram.diagonal(dim1=1, dim2=2).sum(1) / gram.shape[-1]
    means = torch.stack([trace / n for trace, n in zip(traces, lengths, strict=True)])
    return damping * torch.where(means > 0, means, traces.sum() / sum(lengths))


def attempt(gram: Tensor, damping: Tensor, *, rounded: bool) -> System | None:
    """Factorizes ``gram + c damping I``, or returns ``None`` if that is too near to singular.

    Args:
        gram: ``[parts, c, c]``, float64.
        damping: ``[parts]``, float64, on the same device.
        rounded: Whether entries of ``gram`` came from float32 products; if so, it must be regular
            enough for that.
    """
    trial = _Trial(gram, damping)
    if not bool(trial.good().all()):
        return None
    system = trial.system((0,) * len(gram), rounded=rounded)
    rough = rounded and (system.extreme or CHUNK_ERROR * system.condition > _ROUGH)
    return None if rough else system


def factorize(gram: Tensor, damping: Tensor) -> System:
    """Factorizes ``gram + c damping I``, with more damping where that is singular.

    Args:
        gram: ``[parts, c, c]``, float64.
        damping: ``[parts]``, float64, on the same device.

    Raises:
        FloatingPointError: If the Gram matrix is not finite.
        RuntimeError: If no damping helps, or all rows are zero and so is the damping.
    """
    count = gram.shape[-1]
    raised = torch.zeros(len(gram), dtype=torch.int64)
    trial = _Trial(gram, damping)
    trial.require_finite()
    if not bool(trial.damping.all()):
        raise RuntimeError(
            f"all {count} rows of the window are zero, so a damping relative to their mean "
            "square is zero too; pass relative=False with an absolute damping="
        )
    first = trial.damping
    while not bool((good := trial.good()).all()):
        raised = torch.where(good, raised, raised + 1)
        if int(raised.max()) > _ESCALATIONS:
            raise RuntimeError(
                f"no Cholesky factorization of the {count} x {count} window system, even with "
                f"damping={float(trial.damping.max()):.3g}; the squared length of the longest row "
                f"is {float(trial.largest.max()):.3g}: pass a larger damping="
            )
        trial = _Trial(gram, damping * (10.0 ** raised.to(damping)))
    if int(raised.max()):
        most = int(raised.argmax())
        several = f" of {int((raised > 0).sum())} of {len(gram)} parts" if len(gram) > 1 else ""
        warnings.warn(
            f"the window system{several} is singular to working precision with damping "
            f"{float(first[most]):.3g}; {float(trial.damping[most]):.3g} is used instead "
            "(damping_used says so): pass a larger damping=, or remove rows that repeat",
            RuntimeWarning,
            stacklevel=2,
        )
    return trial.system(tuple(raised.tolist()))


class _Trial:
    """One factorization, and all that is decided by it, read from the device at once."""

    def __init__(self, gram: Tensor, damping: Tensor) -> None:
        self.gram = gram
        self.count = count = gram.shape[-1]
        system = gram.clone()
        system.diagonal(dim1=1, dim2=2).add_((count * damping)[:, None])
        self.factor, info = torch.linalg.cholesky_ex(system)
        pivots = self.factor.diagonal(dim1=1, dim2=2).square().amin(1)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        largest = diagonal.amax(1) + count * damping
        self.smallest = _least_eigenvalue(self.factor)
        rows = [info.to(F64), largest, pivots, damping, diagonal.sum(1), self.smallest]
        read = torch.stack(rows).cpu()
        self.info, self.largest, self.pivots, self.damping, self.traces, self.least = read

    def good(self) -> Tensor:
        """Which parts are regular, ``[parts]``."""
        floor = torch.finfo(F64).eps * self.count * self.largest
        out: Tensor = (self.info == 0) & (self.pivots > floor)
        return out

    def require_finite(self) -> None:
        if bool(torch.isfinite(self.traces).all()):
            return
        bad = int((~torch.isfinite(self.gram.diagonal(dim1=1, dim2=2))).any(0).sum())
        raise FloatingPointError(
            f"{bad} of {self.count} rows of the window are not finite; remove them with "
            "remove(index), and push with check=True (the default), which refuses such rows"
        )

    def system(self, raised: tuple[int, ...], *, rounded: bool = False) -> System:
        mean = self.traces[self.traces > 0] / self.count
        return System(
            gram=self.gram,
            cholesky=self.factor,
            damping=self.damping,
            escalations=raised,
            least=self.smallest,
            condition=float((self.largest / self.least).max()),
            rounded=rounded,
            extreme=bool(((mean < _SCALES[0]) | (mean > _SCALES[1])).any()),
        )


def _least_eigenvalue(factor: Tensor) -> Tensor:
    """An upper bound of the least eigenvalue of ``L L^T``, close to it: inverse iteration.

    Pivots are no substitute: they can exceed it by the factor of thousands.
    """
    count = factor.shape[-1]
    position = torch.arange(count, dtype=F64, device=factor.device)
    start = torch.stack([torch.cos(position.square()), torch.sin(1.0 + 2.3 * position**1.5)], 1)
    block = start.expand(len(factor), count, 2)
    for _ in range(_ITERATIONS):
        block = block / torch.linalg.vector_norm(block, dim=1, keepdim=True)
        block = torch.cholesky_solve(block, factor)
    least: Tensor = torch.linalg.vector_norm(block, dim=1).amax(1).reciprocal()
    return least


def _relative(error: Tensor, size: Tensor) -> float:
    """Largest ratio of roots; 0 where nothing is there."""
    ratio = torch.where(error > 0, error / size, 0.0)
    return float(ratio.max().sqrt()) if ratio.numel() else 0.0
