r"""The algebra of linear operators: each function returns an operator that multiplies lazily."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from curvlib.core.operator import LinearOperator

#: What selects rows or columns: indices, a boolean mask, a slice, or parameter-name globs.
Index = Tensor | slice | Sequence[int] | str | Sequence[str]


def scaled(op: LinearOperator, factor: float) -> LinearOperator:
    """``factor * A``."""
    return op._like(
        lambda V: op.matmat(V) * factor,
        rmatmat=lambda V: op.rmatmat(V) * factor,
        psd=op.psd and factor >= 0,
        name=f"{factor:g} * {_group(op.name)}",
        identity=lambda: f"{op.fingerprint()}*{factor!r}",
        restrict=_lift(lambda part: scaled(part, factor), op),
    )


def shifted(op: LinearOperator, value: float) -> LinearOperator:
    """``A + value * I``."""
    return op._like(
        lambda V: op.matmat(V) + value * V,
        rmatmat=lambda V: op.rmatmat(V) + value * V,
        psd=op.psd and value >= 0,
        name=f"{op.name} {'+' if value >= 0 else '-'} {abs(value):g} I",
        identity=lambda: f"{op.fingerprint()}+{value!r}",
        restrict=_lift(lambda part: shifted(part, value), op),
    )


def combined(a: LinearOperator, b: LinearOperator, sign: float) -> LinearOperator:
    """``A + sign * B``."""
    return a._like(
        lambda V: a.matmat(V).add(b.matmat(V), alpha=sign),
        rmatmat=(
            None
            if b._transposed_product is None
            else lambda V: a.rmatmat(V).add(b.rmatmat(V), alpha=sign)
        ),
        symmetric=a.symmetric and b.symmetric,
        psd=a.psd and b.psd and sign > 0,
        space=a.space if a.space == b.space else None,
        name=f"{a.name} {'+' if sign > 0 else '-'} {b.name if sign > 0 else _group(b.name)}",
        identity=lambda: a.fingerprint() + b.fingerprint(),
        group=a.group or b.group,
        restrict=(
            None
            if a._restrict is None or b._restrict is None or a.space != b.space
            else lambda names: combined(_part(a, names), _part(b, names), sign)
        ),
    )


def product(a: LinearOperator, b: LinearOperator) -> LinearOperator:
    """``A @ B``; symmetric where one is the other's transpose."""
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"cannot multiply shapes {a.shape} and {b.shape}")
    require_same_kind(a, b, "@")
    gram = b._base is a or a._base is b or (a is b and a.symmetric)
    return a._like(
        lambda V: a.matmat(b.matmat(V)),
        rmatmat=None if b._transposed_product is None else lambda V: b.rmatmat(a.rmatmat(V)),
        shape=(a.shape[0], b.shape[1]),
        symmetric=gram,
        psd=gram,
        space=a.space if a.space == b.space else None,
        name=f"{_group(a.name)} @ {_group(b.name)}",
        identity=lambda: a.fingerprint() + b.fingerprint(),
        group=a.group or b.group,
    )


def submatrix(op: LinearOperator, rows: Index, columns: Index | None) -> LinearOperator:
    """Some rows and columns of ``A``; the same selection of both where ``columns`` is ``None``.

    Where vectors of ``A`` are spread over processes, those of the result are whole on each.
    """
    left = indices(op, rows, 0)
    right = left if columns is None else indices(op, columns, 1)
    spread = op.spread

    def embed(V: Tensor, index: Tensor, length: int) -> Tensor:
        if spread is not None:
            here, index = spread.own(index)
            V = V[here]
        full = V.new_zeros((V.shape[1], length)).T
        return full.index_copy_(0, index, V)

    def taken(out: Tensor, index: Tensor) -> Tensor:
        if spread is None:
            return out.index_select(0, index)
        here, own = spread.own(index)
        found = out.new_zeros((len(index), out.shape[1]))
        found[here] = out[own]
        return spread.sum(found)

    return op._like(
        lambda V: taken(op.matmat(embed(V, right, op.length)), left),
        rmatmat=lambda V: taken(op.rmatmat(embed(V, left, op._height)), right),
        shape=(left.numel(), right.numel()),
        symmetric=op.symmetric and columns is None,
        psd=op.psd and columns is None,
        space=None,
        name=f"{_group(op.name)}[{left.numel()} x {right.numel()}]",
        identity=lambda: f"{op.fingerprint()}[{left.tolist()},{right.tolist()}]",
        spread=None,
    )


def part(op: LinearOperator, names: tuple[str, ...]) -> LinearOperator:
    """The diagonal block of some parameters, whose vectors lie over processes as those of ``A``."""
    assert op.space is not None
    if op.spread is None:
        where = [torch.arange(s.start, s.stop) for s in map(op.space.slice, names)]
        return submatrix(op, torch.cat(where), None)
    space, slices = op.space.restrict(names), [op.space.slice(name) for name in names]

    def product(V: Tensor) -> Tensor:
        full = V.new_zeros((V.shape[1], op.length)).T
        pieces = V.split([s.stop - s.start for s in slices])
        for own, piece in zip(slices, pieces, strict=True):
            full[own] = piece
        out = op.matmat(full)
        return torch.cat([out[own] for own in slices])

    return op._like(
        product,
        rmatmat=None if op._transposed_product is None else lambda V: part(op.T, names).matmat(V),
        shape=(space.total, space.total),
        space=space,
        name=f"{_group(op.name)}[{space.total} x {space.total}]",
        identity=lambda: f"{op.fingerprint()}[{list(names)}]",
        spread=space.spread,
    )


def indices(op: LinearOperator, index: Index, axis: int) -> Tensor:
    """Rows (axis 0) or columns (axis 1) that are selected, as indices on the operator's device."""
    length = op.shape[axis]
    globs = [index] if isinstance(index, str) else index
    if isinstance(globs, Sequence) and any(isinstance(g, str) for g in globs):
        if op.space is None:
            raise ValueError(
                f"{op!r} is not indexed by parameters: select by indices, not {index!r}"
            )
        names = [n for n in op.space.names if any(fnmatchcase(n, str(g)) for g in globs)]
        if not names:
            raise ValueError(f"no parameter matches {list(globs)}; there are {op.space.names}")
        parts = [torch.arange(s.start, s.stop) for s in map(op.space.whole_slice, names)]
        return torch.cat(parts).to(op.device)
    if isinstance(index, slice):
        return torch.arange(length, device=op.device)[index]
    where = torch.as_tensor(index, device=op.device)
    if where.dtype == torch.bool:
        if where.shape != (length,):
            raise ValueError(f"a mask needs shape [{length}], got {list(where.shape)}")
        return where.nonzero()[:, 0]
    where = where.to(torch.int64).flatten()
    if where.numel() and not (-length <= int(where.min()) and int(where.max()) < length):
        raise ValueError(f"indices must lie in [{-length}, {length}), got {where.tolist()}")
    where = where % length
    if where.unique().numel() != where.numel():
        raise ValueError("indices of a submatrix must not repeat")
    return where


def require_same_kind(a: LinearOperator, b: LinearOperator, sign: str) -> None:
    """Raises unless two operators have vectors of one dtype on one device, and fit in ranks."""
    if a.dtype != b.dtype:
        raise TypeError(f"cannot combine {a.dtype} and {b.dtype} operators with {sign!r}")
    if a.device != b.device:
        raise ValueError(f"cannot combine operators on {a.device} and {b.device} with {sign!r}")
    if a.spread != b.spread:
        raise ValueError(
            f"cannot combine operators whose vectors are spread over processes differently with "
            f"{sign!r}: make both of risks with the same parameters of the same sharded model"
        )
    if a.group is not None and b.group is not None and a.group != b.group:
        raise ValueError(
            f"cannot combine operators of different process groups with {sign!r}: make both risks "
            "with the same group="
        )


def _part(op: LinearOperator, names: tuple[str, ...]) -> LinearOperator:
    if op._restrict is None:
        raise ValueError(f"{op!r} is not indexed by parameters")
    return op._restrict(names)


def _lift(
    change: Callable[[LinearOperator], LinearOperator], op: LinearOperator
) -> Callable[[tuple[str, ...]], LinearOperator] | None:
    restrict = op._restrict
    return None if restrict is None else lambda names: change(restrict(names))


def _group(name: str) -> str:
    return f"({name})" if " " in name else name


def scalar(value: Any) -> float | None:
    """A finite factor from a number or a zero-dimensional tensor; ``None`` for anything else.

    Raises:
        ValueError: If it is NaN or infinite.
    """
    if isinstance(value, Tensor) and value.ndim > 0:
        return None
    return finite(value) if hasattr(value, "__float__") else None


def finite(value: Any) -> float:
    """A finite factor or shift.

    Raises:
        ValueError: If it is NaN or infinite.
    """
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite factor or shift, got {number}")
    return number


def as_column(vector: Tensor, length: int) -> Tensor:
    """A vector as one column ``[length, 1]``.

    Raises:
        ValueError: If it is of another length.
    """
    if vector.shape[0] != length:
        raise ValueError(
            f"expected a vector of length {length}, got {vector.shape[0]}; "
            f"the operator has {length} parameters or columns"
        )
    return vector[:, None]
