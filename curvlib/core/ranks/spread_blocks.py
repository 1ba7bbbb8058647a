r"""Blocks with Kronecker-factored eigenvectors of which each rank holds rows.

Where parameters are sharded over :math:`R` ranks, so is everything of a block
(:mod:`curvlib.core.kronecker_blocks`): along one axis of its matrices ``[G, O, I]``, which
:func:`cut_of` chooses, a rank holds a slice of the eigenvalues and the rows of both bases. With
:math:`X_r` and :math:`Q_{L,r}` (rows of :math:`X` and :math:`Q_L`) on rank :math:`r`,

.. math:: Q_L^\top X Q_R = \sum_r Q_{L,r}^\top (X_r Q_R), \qquad
          (Q_L Z Q_R^\top)_r = Q_{L,r} (Z Q_R^\top),

so that of the left basis nothing is ever sent. For ``K`` columns a rank sends for one block
:math:`(R - 1) / R` times

==========  =====================================  =======================================
cut along   numbers                                held whole, one block at a time
==========  =====================================  =======================================
``G``       none                                   nothing
``O``       :math:`G I^2 + 2 K G O I`              the right basis, and one chunk of columns
``I``       :math:`2 K I`, or none if diagonal     one chunk of columns
==========  =====================================  =======================================

(less where a side is diagonal: it has no basis.) Where parameters are not cut like the block (a
parameter in ``[in, out]`` layout, groups, projections that share a parameter), its columns are
gathered and cut anew: twice the parameters' entries more for each column.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlib.core.kronecker_blocks import KroneckerBlock, Part
from curvlib.core.ranks.bundles import gathered, own_sum
from curvlib.core.ranks.group import Group
from curvlib.core.ranks.slices import Slices
from curvlib.core.space import ParamSpace

#: Bytes of a block's columns that are whole at once (or one column).
CHUNK = 64 * 2**20


@dataclass(frozen=True)
class Cut:
    """How the matrices ``[G, O, I]`` of a block are cut.

    Attributes:
        shape: ``(G, O, I)``.
        axis: Along which of them.
    """

    shape: tuple[int, int, int]
    axis: int

    @property
    def values(self) -> Slices:
        """Of the eigenvalues, and of matrices."""
        return Slices(self.shape, self.axis)

    def side(self, which: int) -> Slices:
        """Of the left (0) or right (1) eigenvectors, or dense factors."""
        G, n = self.shape[0], self.shape[1 + which]
        return Slices((G, n, n), min(self.axis, 1))

    def diagonal(self, which: int) -> Slices:
        """Of the left (0) or right (1) factor, where it is diagonal."""
        return Slices((self.shape[0], self.shape[1 + which]), min(self.axis, 1))


def cut_of(shape: tuple[int, int, int], left_dense: bool, ranks: int) -> Cut:
    """How a block is cut: by groups where there are enough, else by rows, where there are any.

    Example:
        >>> [cut_of(s, True, 2).axis for s in [(1, 8, 9), (4, 1, 9)]], cut_of((1, 1, 8), False, 2)
        ([1, 0], Cut(shape=(1, 1, 8), axis=2))
    """
    if shape[0] >= ranks and shape[0] > 1:
        return Cut(shape, 0)
    return Cut(shape, 1 if left_dense or shape[1] > 1 or shape[0] > 1 else 2)


@dataclass(frozen=True)
class Place:
    """Where the entries of one part of a block are among this rank's rows of a vector.

    Attributes:
        name: Of the parameter.
        slices: How the parameter is cut.
        first: Of its rows, the first that the part has; and
        rows: how many.
        start: Where the rank's entries of the parameter begin.
    """

    name: str
    slices: Slices
    first: int
    rows: int
    start: int


@dataclass(frozen=True, eq=False)
class SpreadBlock:
    r"""One block of which this rank holds a slice: see :class:`.KroneckerBlock`.

    All functions but :meth:`scatter` of a native block are for all ranks together.

    Attributes:
        name: Name, for messages.
        parts: Where the columns are in whole vectors.
        places: And where this rank's entries of them are in its rows.
        left: Rows of :math:`Q_L`, or ``None`` for the identity.
        right: Rows of :math:`Q_R`, or ``None`` for the identity.
        eigenvalues: A slice of :math:`\Lambda`.
        cut: How they are cut.
        group: The ranks.
    """

    name: str
    parts: tuple[Part, ...]
    places: tuple[Place, ...]
    left: Tensor | None
    right: Tensor | None
    eigenvalues: Tensor
    cut: Cut
    group: Group

    @property
    def size(self) -> int:
        """Number of coordinates, on all ranks."""
        return math.prod(self.cut.shape)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Coordinates of each part in whole vectors, from start to stop."""
        rows = self.cut.shape[0] * self.cut.shape[1]
        return [(part.start, part.start + rows * part.columns) for part in self.parts]

    # -------------------------------------------------------------------- products
    def multiply(self, rows: Tensor, values: Tensor, out: Tensor) -> None:
        """Writes the product of the block with other eigenvalues into flat rows ``[K, length]``.

        Args:
            rows: This rank's rows of vectors, ``[K, length]``.
            values: This rank's slice of the eigenvalues.
            out: ``[K, length]``.
        """
        right = self._right()
        step = max(1, CHUNK // (self.size * rows.element_size()))
        for at in range(0, len(rows), step):
            X = self._rotated(self.gather(rows[at : at + step]), self.left, right) * values
            self.scatter(self._restored(X, self.left, right), out[at : at + step])

    def diagonal(self) -> Tensor:
        r"""This rank's slice of :math:`(Q_L \circ Q_L) \Lambda (Q_R \circ Q_R)^\top`."""
        left = None if self.left is None else self.left.square()
        right = self._right()
        right = None if right is None else right.square()
        return self._restored(self.eigenvalues[None], left, right)[0]

    def _right(self) -> Tensor | None:
        """The right basis as products need it: whole where matrices are cut by rows."""
        if self.right is None or self.cut.axis != 1:
            return self.right
        return gathered(self.right, self.cut.side(1), self.group)

    def _rotated(self, X: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        if self.cut.axis == 2:
            return X if right is None else self._summed(X @ right)
        X = X if right is None else X @ right
        if left is None:
            return X
        X = left.mT @ X
        return X if self.cut.axis == 0 else self._summed(X)

    def _restored(self, X: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        if self.cut.axis == 2:
            return X if right is None else self._whole(X) @ right.mT
        X = X if right is None else X @ right.mT
        if left is None:
            return X
        return left @ (X if self.cut.axis == 0 else self._whole(X))

    def _whole(self, X: Tensor) -> Tensor:
        return gathered(X, self.cut.values, self.group, 1)

    def _summed(self, X: Tensor) -> Tensor:
        return own_sum(X, self.cut.values, self.group, 1)

    # ---------------------------------------------------------------------- vectors
    @property
    def native(self) -> bool:
        """Whether the parameters are cut like the block, so that nothing has to be sent."""
        G, O, _ = self.cut.shape
        axis, size = self.cut.axis, self.group.size
        if (axis == 1 and G > 1) or (axis == 2 and len(self.parts) > 1):
            return False
        chunk = -(-self.cut.shape[axis] // size)
        for part, place in zip(self.parts, self.places, strict=True):
            shape = place.slices.shape
            each = {0: O * part.columns, 1: part.columns, 2: 1}[axis]
            inner = math.prod(shape[1:])
            like = chunk * each == -(-shape[0] // size) * inner
            if part.transposed or place.slices.dim or place.rows != shape[0] or not like:
                return False
        return True

    def gather(self, rows: Tensor) -> Tensor:
        """This rank's slice ``[K, ...]`` of the matrices whose entries are in flat rows."""
        if self.native:
            found = [self._own_view(rows, i) for i in range(len(self.parts))]
            return found[0] if len(found) == 1 else torch.cat(found, -1)
        G, O, _ = self.cut.shape
        found = []
        for part, place in zip(self.parts, self.places, strict=True):
            whole = gathered(self._of(rows, place), place.slices, self.group, 1)
            flat = whole[:, place.first : place.first + place.rows]
            if part.transposed:
                found.append(flat.reshape(-1, G, part.columns, O).mT)
            else:
                found.append(flat.reshape(-1, G, O, part.columns))
        return self.own(found[0] if len(found) == 1 else torch.cat(found, -1), 1)

    def scatter(self, matrices: Tensor, rows: Tensor) -> None:
        """Writes slices ``[K, ...]`` of matrices into flat rows, the converse of :meth:`gather`."""
        native, column = self.native, 0
        matrices = matrices if native else self._whole(matrices)
        for i, (part, place) in enumerate(zip(self.parts, self.places, strict=True)):
            piece = matrices[..., column : column + part.columns]
            column += part.columns
            if native:
                own = self._own_view(rows, i)
                own.copy_(matrices if self.cut.axis == 2 else piece)
                continue
            piece = piece.mT if part.transposed else piece
            shape = place.slices.shape
            flat = piece.reshape(len(rows), place.rows, *shape[1:])
            low, high = place.slices.bounds(self.group.rank, self.group.size)
            target = self._of(rows, place)
            if place.slices.dim:
                own = flat.narrow(place.slices.dim + 1, low, high - low)
                target[:, place.first : place.first + place.rows] = own
            else:
                low, high = max(low, place.first), min(high, place.first + place.rows)
                if low < high:
                    first = place.slices.bounds(self.group.rank, self.group.size)[0]
                    own = flat[:, low - place.first : high - place.first]
                    target[:, low - first : high - first] = own

    def own(self, matrices: Tensor, lead: int = 0) -> Tensor:
        """This rank's slice of whole matrices ``[..., G, O, I]``; ``lead`` axes come before."""
        low, high = self.cut.values.bounds(self.group.rank, self.group.size)
        return matrices.narrow(self.cut.axis + lead, low, high - low)

    def _own_view(self, rows: Tensor, index: int) -> Tensor:
        """This rank's entries of a part, as a slice of matrices: a view where rows allow it."""
        place, part = self.places[index], self.parts[index]
        local = self.cut.values.local(self.group.rank, self.group.size)
        columns = local[2] if self.cut.axis == 2 else part.columns
        length = local[0] * local[1] * columns
        flat = rows[:, place.start : place.start + length]
        view: Tensor = flat.unflatten(1, (local[0], local[1], columns))
        return view

    def _of(self, rows: Tensor, place: Place) -> Tensor:
        """This rank's slice of a parameter in flat rows, ``[K, ...]``, as a view."""
        shape = place.slices.local(self.group.rank, self.group.size)
        flat = rows[:, place.start : place.start + math.prod(shape)]
        view: Tensor = flat.unflatten(1, shape)
        return view

    # --------------------------------------------------------------------- the whole
    def at(self, parts: tuple[Part, ...], space: ParamSpace) -> SpreadBlock:
        """The block with its parts elsewhere, in another space."""
        return replace(self, parts=parts, places=places_of(parts, self.cut.shape, space))

    def whole(self) -> KroneckerBlock:
        """The block as one process has it: on every rank, as long as it is used."""
        left, right = (
            None if own is None else gathered(own, self.cut.side(which), self.group)
            for which, own in enumerate((self.left, self.right))
        )
        values = gathered(self.eigenvalues, self.cut.values, self.group)
        return KroneckerBlock(self.name, self.parts, left, right, values)

    def wholes(self) -> Iterator[Tensor]:
        """Whole tensors of the block, one after the other, as one process would have them."""
        if self.left is not None:
            yield gathered(self.left, self.cut.side(0), self.group)
        if self.right is not None:
            yield gathered(self.right, self.cut.side(1), self.group)
        yield gathered(self.eigenvalues, self.cut.values, self.group)


def places_of(
    parts: Sequence[Part], shape: tuple[int, int, int], space: ParamSpace
) -> tuple[Place, ...]:
    """Where the entries of a block's parts, in whole vectors, are in the rows of a spread space.

    Args:
        parts: Of a block.
        shape: Its ``(G, O, I)``.
        space: The space of this rank's rows.
    """
    assert space.spread is not None
    whole, found = space.whole(), []
    for part in parts:
        name, first = whole.at(part.start)
        index = space.names.index(name)
        slices = space.spread.slices[index]
        inner = math.prod(slices.shape[1:])
        rows = shape[0] * shape[1] * part.columns // inner
        found.append(Place(name, slices, first // inner, rows, space.slice(name).start))
    return tuple(found)


def constant_block(space: ParamSpace, value: Tensor) -> SpreadBlock:
    """All of a spread space as one block, of a multiple of the identity."""
    assert space.spread is not None
    whole, group = space.whole(), space.spread.group
    parts = tuple(
        Part(whole.slice(name).start, whole.sizes[i]) for i, name in enumerate(whole.names)
    )
    cut = Cut((1, 1, space.total), 2)
    own = value.expand(cut.values.local(group.rank, group.size)).contiguous()
    return SpreadBlock(
        "rest", parts, places_of(parts, cut.shape, space), None, None, own, cut, group
    )
