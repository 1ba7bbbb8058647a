r"""Whole tensors from the slices of all ranks, and back: two maps that are each other's adjoint.

With the slices :math:`\theta_r` of rank :math:`r`, :math:`\theta = \mathrm{G}(\theta_1, \dots,
\theta_R)` gathers, and :math:`\mathrm{S}(w_1, \dots, w_R)_r` is rank :math:`r`'s slice of
:math:`\sum_r w_r`. Each is the derivative of the other, so derivatives of any order come out as
slices.

Tensors go in *bundles*, as one message: what is small, such as biases and the scales of
normalizations, would cost its latency otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.core.ranks.group import Group
from curvlib.core.ranks.slices import Slices

#: Bytes of whole tensors that are gathered together, unless one of them has more. About what an
#: interconnect sends in the time that a message takes to start.
ROOM = 2**23


@dataclass(frozen=True, eq=False)
class Bundle:
    """Slices of tensors of one type, on one device, that are gathered and summed together.

    Attributes:
        slices: How each tensor is cut.
        group: The ranks.
    """

    slices: tuple[Slices, ...]
    group: Group

    def gathered(self, own: Sequence[Tensor], columns: int = 0) -> list[Tensor]:
        """The whole tensors, on every rank; ``columns`` axes more lead."""
        ranks, fronts = self.group.size, []
        for slices, tensor in zip(self.slices, own, strict=True):
            front, chunk = tensor.movedim(slices.dim + columns, 0), slices.chunk(ranks)
            fronts.append(_padded(front, chunk))
        every = self.group.joined(_joined([front.reshape(-1) for front in fronts]))
        every, at, out = every.view(ranks, -1), 0, []
        for slices, front in zip(self.slices, fronts, strict=True):
            part = every[:, at : at + front.numel()]
            at += front.numel()
            whole = part.reshape(ranks * front.shape[0], *front.shape[1:])
            whole = whole[: slices.shape[slices.dim]].movedim(0, slices.dim + columns)
            out.append(whole.contiguous())
        return out

    def own_sums(self, wholes: Sequence[Tensor], columns: int = 0) -> list[Tensor]:
        """This rank's slices of the sums over ranks of whole tensors."""
        ranks, fronts = self.group.size, []
        for slices, tensor in zip(self.slices, wholes, strict=True):
            front = tensor.movedim(slices.dim + columns, 0)
            front = _padded(front, ranks * slices.chunk(ranks))
            fronts.append(front.reshape(ranks, -1, *front.shape[1:]))
        sent = _joined([front.reshape(ranks, -1) for front in fronts], 1)
        found, at, out = self.group.own_sum(sent.reshape(-1)), 0, []
        for slices, front in zip(self.slices, fronts, strict=True):
            shape = front.shape[1:]
            first, last = slices.bounds(self.group.rank, ranks)
            part = found[at : at + math.prod(shape)].view(shape)[: last - first]
            at += math.prod(shape)
            out.append(part.movedim(0, slices.dim + columns).contiguous())
        return out

    def of(self, some: Sequence[bool]) -> Bundle:
        """The bundle of some of the tensors."""
        chosen = tuple(s for s, wanted in zip(self.slices, some, strict=True) if wanted)
        return Bundle(chosen, self.group)


def gathered(own: Tensor, slices: Slices, group: Group, columns: int = 0) -> Tensor:
    """A whole tensor from each rank's slice; ``columns`` axes more lead."""
    return Bundle((slices,), group).gathered([own], columns)[0]


def own_sum(whole: Tensor, slices: Slices, group: Group, columns: int = 0) -> Tensor:
    """This rank's slice of the sum over ranks of whole tensors."""
    return Bundle((slices,), group).own_sums([whole], columns)[0]


def gathered_at(own: Tensor, slices: Slices, group: Group, rank: int) -> Tensor | None:
    """A whole tensor from each rank's slice, on one of the ranks alone."""
    front = _padded(own.movedim(slices.dim, 0), slices.chunk(group.size))
    found = group.joined_at(front, rank)
    if found is None:
        return None
    return found[: slices.shape[slices.dim]].movedim(0, slices.dim).contiguous()


def cut_from(whole: Tensor | None, slices: Slices, group: Group, rank: int, like: Tensor) -> Tensor:
    """This rank's slice of a tensor that one rank has whole, of the type and device of another."""
    axis, chunk = slices.dim, slices.chunk(group.size)
    own = like.new_empty((chunk, *slices.shape[:axis], *slices.shape[axis + 1 :]))
    if whole is not None:
        whole = _padded(whole.movedim(axis, 0), chunk * group.size)
    first, last = slices.bounds(group.rank, group.size)
    return group.shares(whole, own, rank)[: last - first].movedim(0, axis).contiguous()


def bundled(tensors: Iterable[tuple[int, Slices, Tensor]]) -> list[list[int]]:
    """Which tensors, by number, make a bundle.

    There is room for :data:`ROOM` bytes, and for no more than the largest of all has. Tensors of an
    eighth of that and less fill bundles of their own, as they come: biases and scales lie between
    large weights, and one message for many of them is what saves.

    Args:
        tensors: The number of each, how it is cut, and this rank's slice.
    """
    every = list(tensors)
    room = min(ROOM, max((_bytes(s, own) for _, s, own in every), default=0))
    out: list[list[int]] = []
    open_: dict[Any, tuple[list[int], int]] = {}
    for number, slices, own in every:
        size = _bytes(slices, own)
        kind = own.dtype, own.device, 8 * size <= room
        members, filled = open_.get(kind, ([], room))
        if filled + size > room:
            members, filled = [], 0
            out.append(members)
        members.append(number)
        open_[kind] = members, filled + size
    return out


def gather(bundle: Bundle, own: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """:meth:`Bundle.gathered`, with derivatives."""
    return _Gather.apply(bundle, *own)  # type: ignore[no-any-return, no-untyped-call]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(bundle: Bundle, *own: Tensor) -> tuple[Tensor, ...]:
        return _columns(own, bundle.gathered)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.bundle = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return _adjoint(_Sum, ctx, cotangents)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(bundle: Bundle, *wholes: Tensor) -> tuple[Tensor, ...]:
        return _columns(wholes, bundle.own_sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.bundle = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return _adjoint(_Gather, ctx, cotangents)


def _adjoint(map_: Any, ctx: Any, cotangents: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[1:]
    some = [c for c, is_wanted in zip(cotangents, wanted, strict=True) if is_wanted]
    found = iter(map_.apply(ctx.bundle.of(wanted), *some))
    return None, *(next(found) if is_wanted else None for is_wanted in wanted)


def _columns(
    tensors: Sequence[Tensor], function: Callable[[Sequence[Tensor], int], list[Tensor]]
) -> tuple[Tensor, ...]:
    """Applies a function under ``torch.autograd.grad(is_grads_batched=True)``, to all columns."""
    batched = [t for t in tensors if torch._C._functorch.is_legacy_batchedtensor(t)]
    if not batched:
        return tuple(function(tensors, 0))
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    count = len(torch._remove_batch_dim(batched[0], level, 1, 0))
    blocks = [torch._remove_batch_dim(t, level, count, 0) for t in tensors]
    return tuple(torch._add_batch_dim(t, 0, level) for t in function(blocks, 1))


def _padded(front: Tensor, length: int) -> Tensor:
    if front.shape[0] == length:
        return front
    padded = front.new_zeros((length, *front.shape[1:]))
    padded[: front.shape[0]] = front
    return padded


def _joined(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def _bytes(slices: Slices, own: Tensor) -> int:
    return slices.size * own.element_size()
