r"""Sketches for the exchangeable estimators XTrace and XDiag, and for the Frobenius norm.

The formulas are in :mod:`curvlib.estimators.exchangeable`; here are the long vectors: probes,
the orthonormal basis of their products, and what the basis is mapped to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.estimators.stopping import Plan, multiply

#: Probes whose diagonals are formed together.
BATCH = 8


@dataclass(frozen=True)
class SketchState:
    """Where a run stands.

    Attributes:
        probes: Rows of probes, ``[b, n]`` for each step.
        basis: Rows of Q, ``[b, n]`` for each step.
        images: Rows of AQ, ``[b, n]`` for each step, where they are kept.
        R: ``Q.T @ A @ probes``, upper triangular, ``[m, m]`` in float64 on the CPU.
        H: ``Q.T @ A @ Q``, ``[m, m]``.
        W: ``Q.T @ probes``, ``[m, m]``.
        norms: Squared norms of the probes, ``[m]``.
        products: Columns multiplied.
        generator: State of the random generator.
    """

    probes: tuple[Tensor, ...]
    basis: tuple[Tensor, ...]
    images: tuple[Tensor, ...]
    R: Tensor
    H: Tensor
    W: Tensor
    norms: Tensor
    products: int
    generator: Tensor

    @property
    def count(self) -> int:
        """Number of probes so far."""
        return int(self.norms.shape[0])


def first_state(plan: Plan) -> SketchState:
    """The state before the first product."""
    nothing = torch.zeros((0, 0), dtype=torch.float64)
    return SketchState(
        probes=(),
        basis=(),
        images=(),
        R=nothing,
        H=nothing,
        W=nothing,
        norms=torch.zeros(0, dtype=torch.float64),
        products=0,
        generator=plan.random.get_state(),
    )


def next_state(plan: Plan, state: SketchState, *, keep_images: bool) -> SketchState:
    """Two block products: of some probes, and of what they add to the basis.

    Raises:
        FloatingPointError: If a product is not finite.
    """
    size = plan.following(state.count)
    rows, generator = plan.draw(state.generator, size)
    product = multiply(plan.op, rows, state.products)
    fresh, C, R = extend(state.basis, product)
    image = multiply(plan.op, fresh, state.products + size)
    basis = (*state.basis, fresh)
    probes = (*state.probes, rows)
    columns = inner(basis, (image,))  # Q.T A Q_new
    old = state.count
    H = torch.zeros((old + size, old + size), dtype=torch.float64)
    H[:old, :old] = state.H
    H[:, old:] = columns
    H[old:, :old] = columns[:old].mT
    H[old:, old:] = 0.5 * (columns[old:] + columns[old:].mT)
    W = torch.zeros_like(H)
    W[:old, :old] = state.W
    W[:, old:] = inner(basis, (rows,))
    W[old:, :old] = inner((fresh,), state.probes)
    whole = torch.zeros_like(H)
    whole[:old, :old] = state.R
    whole[:old, old:] = C
    whole[old:, old:] = R
    squares = torch.stack([torch.dot(r.double(), r.double()) for r in rows]).cpu()
    return SketchState(
        probes=probes,
        basis=basis,
        images=(*state.images, image) if keep_images else (),
        R=whole,
        H=H,
        W=W,
        norms=torch.cat([state.norms, squares]),
        products=state.products + 2 * size,
        generator=generator,
    )


def extend(basis: tuple[Tensor, ...], fresh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Orthonormalizes new vectors against a basis: block Gram-Schmidt with Householder QR.

    Args:
        basis: Orthonormal rows, in blocks ``[b, n]``.
        fresh: New rows ``[b, n]``, which may depend on the basis and on one another.

    Returns:
        Orthonormal rows ``[b, n]``, and in float64 on the CPU their coefficients ``C`` on the
        basis ``[m, b]`` and ``R`` ``[b, b]``: ``fresh.T == basis.T @ C + rows.T @ R``.
    """
    size = fresh.shape[0]
    C = torch.zeros((sum(q.shape[0] for q in basis), size), dtype=torch.float64)
    R = torch.eye(size, dtype=torch.float64)
    rows = fresh
    for attempt in range(3):
        coefficients = [q @ rows.mT for q in basis]
        rows = rows.clone()
        for q, c in zip(basis, coefficients, strict=True):
            rows.sub_(c.mT @ q)
        Q, r = torch.linalg.qr(rows.mT)
        rows = Q.mT.contiguous()
        if basis:
            C += torch.cat(coefficients).double().cpu() @ R
        r = r.double().cpu()
        R = r.triu() @ R
        if not basis or (attempt and bool((r.diagonal().abs() > 0.7).all())):
            break
    return rows, C, R


def inner(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> Tensor:
    """Inner products of rows in blocks, ``[m, k]``, in float64 on the CPU."""
    if not left or not right:
        shape = (sum(a.shape[0] for a in left), sum(b.shape[0] for b in right))
        return torch.zeros(shape, dtype=torch.float64)
    out = torch.zeros((), dtype=torch.float64, device=left[0].device)
    for span in spans(left[0]):
        a = torch.cat([x[:, span] for x in left]).double()
        b = torch.cat([x[:, span] for x in right]).double()
        out = out + a @ b.mT
    return out.cpu()


def spans(like: Tensor) -> Iterator[slice]:
    """Slices that cover the columns of rows ``[k, n]``, so that float64 copies stay small.

    On a CPU they fit its caches, on other devices they keep it busy.
    """
    length, chunk = like.shape[1], 2**14 if like.device.type == "cpu" else 2**19
    for start in range(0, max(length, 1), chunk):
        yield slice(start, min(start + chunk, length))


def combine(blocks: tuple[Tensor, ...], coefficients: Tensor) -> Tensor:
    """``coefficients.T @ rows`` for rows in blocks: ``[m, k]`` gives ``[k, n]``."""
    weights = coefficients.mT.to(blocks[0].device, blocks[0].dtype)
    start, out = 0, None
    for block in blocks:
        part = weights[:, start : start + block.shape[0]] @ block
        out = part if out is None else out.add_(part)
        start += block.shape[0]
    assert out is not None
    return out


def sum_of_products(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> Tensor:
    """Entrywise products of rows in blocks, summed over rows, ``[n]``."""
    out = torch.zeros_like(left[0][0])
    for a, b in zip(left, right, strict=True):
        out += (a * b).sum(0)
    return out


def pick(blocks: Sequence[Tensor], chosen: list[int]) -> Tensor:
    """Some of the rows in blocks, as ``[k, n]``."""
    rows = [row for block in blocks for row in block]
    return torch.stack([rows[i] for i in chosen])
