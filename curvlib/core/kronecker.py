r"""Block-diagonal matrices with Kronecker-factored eigenvectors: K-FAC and EK-FAC.

The coordinates of each block are arranged as a matrix :math:`X \in \mathbb{R}^{O \times I}` (the
weights of a layer, with the bias as last column), and the block is

.. math:: A_b = Q \,\mathrm{diag}(\Lambda)\, Q^\top, \qquad Q = Q_L \otimes Q_R, \qquad
          A_b X = Q_L \bigl(\Lambda \circ (Q_L^\top X Q_R)\bigr) Q_R^\top,

with orthogonal :math:`Q_L, Q_R` and *any* eigenvalues :math:`\Lambda \in \mathbb{R}^{O \times I}`.
For :math:`\Lambda = l r^\top` it is the Kronecker product :math:`L \otimes R` of K-FAC (Martens and
Grosse, 2015, section 3); otherwise an eigenvalue-corrected one (George, Laurent, Bouthillier,
Ballas and Vincent, "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis",
2018). Without :math:`Q_L` or :math:`Q_R` that side is the identity: the factor is diagonal.

Damping is *relative* by default: each block gets its own :math:`\lambda_b = c\,\bar\Lambda_b`, a
fraction ``c`` of its mean eigenvalue, with ``c = 0.1`` as in Grosse et al., "Studying large
language model generalization with influence functions", 2023, section 3.3. ``relative=False`` is
the same absolute number for every coordinate, as with all other structured operators.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvlib.core.arguments import finite_number
from curvlib.core.digest import digest
from curvlib.core.kronecker_blocks import KroneckerBlock, Part, checked, uncovered
from curvlib.core.operator import LinearOperator
from curvlib.core.ranks.group import together
from curvlib.core.ranks.spread_blocks import SpreadBlock, constant_block
from curvlib.core.space import ParamSpace
from curvlib.core.structured import on_columns

#: Relative damping where none is given.
DAMPING = 0.1


class Kronecker(LinearOperator):
    r"""A block-diagonal matrix whose blocks have Kronecker-factored eigenvectors.

    Args:
        blocks: The blocks, disjoint, with eigenvectors that are orthogonal; as
            :class:`~curvlib.core.ranks.spread_blocks.SpreadBlock` where the space is spread over
            ranks.
        size: ``P``.
        space: The parameters that index it, where there are any.
        rest: The diagonal entry of coordinates that are in no block.
        name: What it is, for legends and reports.

    Attributes:
        blocks_of: The blocks, by name.
        rest: The diagonal entry of coordinates that are in no block.
        uncovered: Ranges ``(start, stop)`` of these coordinates.

    Raises:
        TypeError: If a tensor is none of float32 or float64.
        ValueError: If there is no block, shapes, types or devices do not fit, blocks overlap, have
            the same name, or a number is not finite.

    Example:
        >>> Q = torch.tensor([[[0.6, -0.8], [0.8, 0.6]]])
        >>> block = KroneckerBlock("layer", (Part(0, 1),), Q, None, torch.tensor([[[3.0], [1.0]]]))
        >>> A = Kronecker([block], 2)
        >>> [round(v, 4) for v in (A @ torch.tensor([0.6, 0.8])).tolist()]
        [1.8, 2.4]
        >>> [round(v, 4) for v in A.solve(torch.tensor([0.6, 0.8]), damping=0.5).tolist()]
        [0.15, 0.2]
    """

    #: That ``damping`` of :meth:`solve` is relative unless ``relative=False`` is passed.
    relative_damping = True

    def __init__(
        self,
        blocks: Sequence[KroneckerBlock | SpreadBlock],
        size: int,
        *,
        space: ParamSpace | None = None,
        rest: float = 0.0,
        name: str = "Kronecker",
    ) -> None:
        spread = None if space is None else space.spread
        with together(None if spread is None else spread.group, "checking its blocks"):
            dtype, device = checked(blocks)
        self.spread = spread
        self.blocks_of: dict[str, Any] = {block.name: block for block in blocks}
        self.rest = finite_number("rest", rest)
        self.uncovered = uncovered(blocks, size)
        super().__init__(
            lambda V: self._on_blocks(V, [b.eigenvalues for b in blocks], self.rest),
            (size, size),
            dtype=dtype,
            device=device,
            symmetric=True,
            psd=self.rest >= 0 and not any(self._sums(b.eigenvalues < 0 for b in blocks)),
            space=space,
            name=name,
            identity=lambda: digest(t for b in blocks for t in b.wholes()) + repr(self.rest),
            restrict=None if space is None else self._restricted,
            spread=spread,
        )

    # ------------------------------------------------------------------ products
    def _on_blocks(self, V: Tensor, values: Sequence[Tensor], rest: float) -> Tensor:
        """The operator of other eigenvalues, times columns ``[P, K]``."""
        rows = V.mT
        out = rows * rest if self.uncovered and rest else torch.zeros_like(rows)
        for block, own in zip(self.blocks_of.values(), values, strict=True):
            block.multiply(rows, own, out)
        return out.mT

    def _sums(self, numbers: Iterable[Tensor]) -> list[float]:
        """Sums of numbers that blocks have, those of all ranks together."""
        each = torch.stack([own.sum(dtype=torch.float64) for own in numbers])
        found: list[float] = (each if self.spread is None else self.spread.sum(each)).tolist()
        return found

    def _least(self, values: Tensor) -> float:
        """The smallest of eigenvalues, of which all ranks hold some."""
        least = float(values.min()) if values.numel() else float("inf")
        return least if self.spread is None else -self.spread.most(-least)

    def zero_blocks(self) -> list[KroneckerBlock | SpreadBlock]:
        """The blocks all of whose eigenvalues are zero."""
        every = list(self.blocks_of.values())
        counts = self._sums(block.eigenvalues != 0 for block in every)
        return [block for block, count in zip(every, counts, strict=True) if not count]

    def dampings(self, damping: float = DAMPING, *, relative: bool = True) -> dict[str, float]:
        """The absolute damping of each block.

        Args:
            damping: A fraction of the block's mean eigenvalue; or, with ``relative=False``, the
                damping itself.
            relative: Which of the two.

        Raises:
            RuntimeError: If damping is relative and there are coordinates in no block, or a block
                whose mean eigenvalue is not positive.
        """
        value = finite_number("damping", damping)
        if not relative or value == 0.0:
            return dict.fromkeys(self.blocks_of, value)
        if self.uncovered:
            raise RuntimeError(
                "relative damping is a fraction of a block's mean eigenvalue, but "
                f"{self._outside()}; leave them out (params= of what makes the operator), give "
                "them a diagonal (rest='diagonal' of curvlib.kfac), or pass relative=False"
            )
        sums = self._sums(b.eigenvalues for b in self.blocks_of.values())
        found = {
            name: total / b.size
            for (name, b), total in zip(self.blocks_of.items(), sums, strict=True)
        }
        for name, mean in found.items():
            if not mean > 0.0:
                raise RuntimeError(
                    f"relative damping needs a positive mean eigenvalue, but that of block "
                    f"{name!r} is {mean:.3g}: no gradient reaches it, or its inputs are zero; "
                    "leave it out with params=, or pass relative=False"
                )
        return {name: value * mean for name, mean in found.items()}

    def solve(self, x: Tensor, damping: float = DAMPING, *, relative: bool = True) -> Tensor:
        r""":math:`(A_b + \lambda_b I)^{-1} x_b` on each block, for ``x`` ``[P]`` or ``[P, K]``.

        Args:
            x: The right-hand sides.
            damping: See :meth:`dampings`. Any: nothing is factorized again.
            relative: Whether it is relative, to the mean eigenvalue of each block.

        Raises:
            RuntimeError: If a damped block is singular (it is named), or coordinates in no block
                are.
        """
        values, rest = self._inverted(damping, relative=relative)
        return on_columns(self, x, lambda V: self._on_blocks(V, values, rest))

    def _inverted(self, damping: float, *, relative: bool) -> tuple[list[Tensor], float]:
        each = self.dampings(damping, relative=relative)
        values = [block.eigenvalues + each[name] for name, block in self.blocks_of.items()]
        for (name, block), zero in zip(
            self.blocks_of.items(), self._sums(own == 0 for own in values), strict=True
        ):
            if zero:
                raise RuntimeError(
                    f"{self!r} with damping={each[name]:g} is singular: {int(zero)} of the "
                    f"{block.size} eigenvalues of block {name!r} are zero; pass a larger damping="
                )
        values = [own.reciprocal_() for own in values]
        if not self.uncovered:
            return values, 0.0
        rest = self.rest + finite_number("damping", damping)
        if rest == 0.0:
            raise RuntimeError(
                f"{self!r} without damping is singular: {self._outside()}; pass damping= with "
                "relative=False, or leave them out"
            )
        return values, 1.0 / rest

    # ------------------------------------------------------------------- numbers
    def diagonal(self) -> Tensor:
        """The diagonal, ``[P]``."""
        out = torch.full((1, self.length), self.rest, dtype=self.dtype, device=self.device)
        for block in self.blocks_of.values():
            block.scatter(block.diagonal()[None], out)
        return out[0]

    def trace(self) -> float:
        """The sum of the eigenvalues."""
        each = self._sums(b.eigenvalues for b in self.blocks_of.values())
        return sum(each) + self.rest * self._outside_count()

    def logdet(self, damping: float = DAMPING, *, relative: bool = True) -> float:
        r""":math:`\log \det` of the damped operator; see :meth:`dampings` for ``damping``.

        Raises:
            RuntimeError: If an eigenvalue of the damped operator is not positive.
        """
        each = self.dampings(damping, relative=relative)

        def shifted() -> Iterator[Tensor]:
            yield from (b.eigenvalues.double() + each[n] for n, b in self.blocks_of.items())

        for (name, block), bad in zip(
            self.blocks_of.items(), self._sums(own <= 0 for own in shifted()), strict=True
        ):
            if bad:
                least = self._least(block.eigenvalues.double() + each[name])
                raise RuntimeError(
                    f"log det of {self!r} with damping={each[name]:g} needs positive eigenvalues, "
                    f"but {int(bad)} of {block.size} of block {name!r} are not, the least is "
                    f"{least:.3g}; pass a larger damping="
                )
        total = sum(self._sums(own.log() for own in shifted()))
        if not self.uncovered:
            return total
        rest = torch.tensor(self.rest + float(damping), dtype=torch.float64)
        if not float(rest) > 0.0:
            raise RuntimeError(
                f"log det of {self!r} needs positive eigenvalues, but {self._outside()}, where it "
                f"is {float(rest):g}; pass damping= with relative=False, or leave them out"
            )
        return total + self._outside_count() * float(rest.log())

    # ------------------------------------------------------------------- algebra
    def with_eigenvalues(
        self, eigenvalues: Sequence[Tensor], *, rest: float | None = None, name: str | None = None
    ) -> Kronecker:
        """The operator with the same eigenvectors, and other eigenvalues ``[G, O, I]``.

        Raises:
            ValueError: If there are not as many as blocks, or shapes do not fit.
        """
        blocks = list(self.blocks_of.values())
        if [v.shape for v in eigenvalues] != [b.eigenvalues.shape for b in blocks]:
            raise ValueError(
                f"expected eigenvalues of shapes {[list(b.eigenvalues.shape) for b in blocks]}, "
                f"got {[list(v.shape) for v in eigenvalues]}"
            )
        return Kronecker(
            [replace(b, eigenvalues=v) for b, v in zip(blocks, eigenvalues, strict=True)],
            self.shape[0],
            space=self.space,
            rest=self.rest if rest is None else rest,
            name=self.name if name is None else name,
        )

    def shift(self, value: float) -> Kronecker:
        """``A + value * I``, of the same kind; what is in no block is shifted, too."""
        name = super().shift(value).name
        values = [b.eigenvalues + float(value) for b in self.blocks_of.values()]
        return self.with_eigenvalues(values, rest=self.rest + float(value), name=name)

    def inverse(self, damping: float = DAMPING, *, relative: bool = True) -> Kronecker:
        """The inverse of the damped operator, of the same kind.

        Raises:
            RuntimeError: As :meth:`solve`.
        """
        values, rest = self._inverted(damping, relative=relative)
        return self.with_eigenvalues(values, rest=rest, name=f"({self.name})^-1")

    def power(self, p: float) -> Kronecker:
        """``A ** p``, of the same kind; ``p = 0`` is the identity.

        Raises:
            RuntimeError: If a power of an eigenvalue is not real, or not finite.
        """
        p = finite_number("p", p)
        values = []
        for name, block in self.blocks_of.items():
            least, (zero,) = self._least(block.eigenvalues), self._sums([block.eigenvalues == 0])
            _require_power(f"block {name!r} of {self!r}", least, p, zero=bool(zero))
            values.append(block.eigenvalues**p)
        if self.uncovered:
            _require_power(self._outside(), self.rest, p, zero=self.rest == 0)
        rest = self.rest**p if self.uncovered else 0.0
        return self.with_eigenvalues(values, rest=rest, name=f"({self.name})^{p:g}")

    # ------------------------------------------------------------------- private
    def _restricted(self, names: tuple[str, ...]) -> LinearOperator:
        """The operator of some parameters, of the same kind where they are whole blocks."""
        assert self.space is not None
        small = self.space.restrict(names)
        source, target = self.space.whole(), small.whole()
        inside: list[KroneckerBlock | SpreadBlock] = []
        for block in self.blocks_of.values():
            owners = [source.at(part.start) for part in block.parts]
            chosen = [name in small.names for name, _ in owners]
            if all(chosen):
                parts = tuple(
                    replace(part, start=target.slice(name).start + first)
                    for part, (name, first) in zip(block.parts, owners, strict=True)
                )
                inside.append(block.at(parts, small))
            elif any(chosen):
                where = [torch.arange(*self.space.slice(n).indices(self.length)) for n in names]
                return self.submatrix(torch.cat(where))
        if not inside:
            rest = torch.tensor(self.rest, dtype=self.dtype, device=self.device)
            if small.spread is not None:
                inside.append(constant_block(small, rest))
            else:
                n = small.size
                values = rest.expand(1, 1, n).contiguous()
                inside.append(KroneckerBlock("rest", (Part(0, n),), None, None, values))
        return Kronecker(inside, small.total, space=small, rest=self.rest, name=self.name)

    def _outside_count(self) -> int:
        return sum(stop - start for start, stop in self.uncovered)

    def _outside(self) -> str:
        """What is in no block, in words."""
        if self.space is None:
            first = ", ".join(f"{a}:{b}" for a, b in self.uncovered[:4])
            return f"{self._outside_count()} coordinates ({first}) are in no block"
        whole = self.space.whole()
        places = {name: whole.slice(name) for name in whole.names}
        names = [
            name
            for name, at in places.items()
            if any(a < at.stop and at.start < b for a, b in self.uncovered)
        ]
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        listed = ", ".join(map(repr, names[:6]))
        return f"{self._outside_count()} coordinates ({listed}{more}) are in no block"


def _require_power(what: str, least: float, p: float, *, zero: bool) -> None:
    if least < 0 and not p.is_integer():
        raise RuntimeError(
            f"power {p:g} of {what} is not real: the least eigenvalue is {least:.3g}; use "
            f"op.shift({-least:.3g}) or an integer power"
        )
    if p < 0 and zero:
        raise RuntimeError(
            f"power {p:g} of {what} is infinite: an eigenvalue is zero; use "
            "op.shift(damping).power(p)"
        )
