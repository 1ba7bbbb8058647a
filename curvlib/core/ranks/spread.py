r"""How vectors lie over the ranks where parameters are sharded: local rows, small sums.

With FSDP2 (``fully_shard``) or ``distribute_tensor``, a rank holds a slice of each parameter along
one axis. Every vector in parameter space lies like the parameters: this rank's *rows* of it are
its slices, each flattened, in the order of the space, without padding. Of :math:`P` entries a rank
holds about :math:`P / R`. An inner product is the local one and a sum of one number over the ranks;
estimators send the numbers of a step together.

========================  ==================================  ==============================
what                      bytes a rank sends                  memory of a rank
========================  ==================================  ==============================
inner products, m of them :math:`16 m (R - 1) / R`            :math:`m`
a random vector           none: all ranks draw the stream     a chunk of ``CHUNK`` entries
:meth:`Spread.gather`     :math:`s P (R - 1) / R`             the whole vector, :math:`s P`
:meth:`Spread.scatter`    none                                this rank's rows
========================  ==================================  ==============================

(:math:`s` bytes an entry). A random vector is the same as in one process on a CPU: each rank draws
the whole stream, a chunk at a time, and keeps its rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.ranks.bundles import Bundle, bundled
from curvlib.core.ranks.group import Group
from curvlib.core.ranks.slices import Slices

#: Entries of a vector that are drawn at once: a multiple of what one draw of any law makes.
CHUNK = 2**20
#: PyTorch draws fewer normal numbers than this in another way.
_LEAST = 16


@dataclass(frozen=True)
class Spread:
    """Which rows of vectors in a parameter space this rank holds.

    Attributes:
        slices: Of each parameter, in the order of the space.
        group: The ranks.

    Example:
        >>> two = [Group(None, rank, 2, torch.device("cpu")) for rank in range(2)]
        >>> spreads = [Spread((Slices((3, 2), 0), Slices((3,), 0)), group) for group in two]
        >>> [spread.scatter(torch.arange(9)).tolist() for spread in spreads]
        [[0, 1, 2, 3, 6, 7], [4, 5, 8]]
    """

    slices: tuple[Slices, ...]
    group: Group

    @property
    def size(self) -> int:
        """``P``, of the whole vector."""
        return sum(part.size for part in self.slices)

    @property
    def length(self) -> int:
        """How many rows this rank holds."""
        return sum(math.prod(shape) for shape in self.shapes())

    def shapes(self, rank: int | None = None) -> list[tuple[int, ...]]:
        """Shapes of the slices of a rank, of this one when omitted."""
        rank = self.group.rank if rank is None else rank
        return [part.local(rank, self.group.size) for part in self.slices]

    def restrict(self, keep: Iterable[int]) -> Spread:
        """The rows of some of the parameters, by their places."""
        return Spread(tuple(self.slices[i] for i in keep), self.group)

    # ------------------------------------------------------------------- sums
    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over ranks of numbers that each knows of its rows; the same bits on each."""
        device = self.group.device
        if numbers.device.type == device.type:
            return self.group.add(numbers.clone())
        return self.group.add(numbers.to(device)).to(numbers.device)

    def most(self, number: float) -> float:
        """The largest of a number over ranks."""
        return self.group.most([number])[0]

    # ------------------------------------------------------------ whole vectors
    def gather(self, rows: Tensor) -> Tensor:
        """The whole vector ``[P]`` or block ``[P, K]``, on every rank, in one process's order.

        Args:
            rows: This rank's rows, ``[length]`` or ``[length, K]``.

        Raises:
            ValueError: If the length does not fit.
        """
        if rows.ndim not in (1, 2) or rows.shape[0] != self.length:
            raise ValueError(
                f"expected this rank's rows, [{self.length}] or [{self.length}, K], of vectors of "
                f"length {self.size}, got {list(rows.shape)}"
            )
        return torch.cat(list(self.parameters(rows)))

    def parameters(self, rows: Tensor) -> Iterator[Tensor]:
        """The whole block ``[P, K]`` or vector, one parameter after the other: ``[n, K]`` each."""
        tail = rows.shape[1:]
        shapes = self.shapes()
        split = rows.detach().split([math.prod(shape) for shape in shapes])
        own = [part.reshape(*shape, *tail) for part, shape in zip(split, shapes, strict=True)]
        done, found = 0, dict[int, Tensor]()
        for numbers in bundled(zip(range(len(own)), self.slices, own, strict=True)):
            bundle = Bundle(tuple(self.slices[number] for number in numbers), self.group)
            found.update(zip(numbers, bundle.gathered([own[n] for n in numbers]), strict=True))
            while done in found:
                yield found.pop(done).reshape(self.slices[done].size, *tail)
                done += 1

    def digest(self, rows: Sequence[Tensor]) -> str:
        """What :func:`curvlib.core.digest.digest` says of whole vectors, given rows of them.

        Args:
            rows: Blocks ``[length, K]``.
        """
        sha = hashlib.sha256()
        for tensor in rows:
            sha.update(f"{(self.size, *tensor.shape[1:])}{tensor.dtype}".encode())
            for whole in self.parameters(tensor):
                sha.update(whole.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:16]

    def scatter(self, whole: Tensor) -> Tensor:
        """This rank's rows of a vector ``[P]`` or block ``[P, K]``: the converse of :meth:`gather`.

        Raises:
            ValueError: If the length is not ``P``.
        """
        if whole.ndim not in (1, 2) or whole.shape[0] != self.size:
            raise ValueError(
                f"expected a whole vector [{self.size}] or block [{self.size}, K], got "
                f"{list(whole.shape)}"
            )
        tail, own = whole.shape[1:], []
        for piece, part in zip(
            whole.split([s.size for s in self.slices]), self.slices, strict=True
        ):
            first, last = part.bounds(self.group.rank, self.group.size)
            tensor = piece.reshape(*part.shape, *tail).narrow(part.dim, first, last - first)
            own.append(tensor.reshape(-1, *tail))
        return torch.cat(own)

    def own(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some entries of a whole vector are here, and which rows they are.

        Args:
            index: Places in the whole vector, ``[k]``, in any order.

        Returns:
            Places in ``index``, and this rank's rows of those, ``[j]`` each.

        Example:
            >>> second = Group(None, 1, 2, torch.device("cpu"))
            >>> spread = Spread((Slices((3, 2), 0), Slices((3,), 0)), second)
            >>> [found.tolist() for found in spread.own(torch.tensor([8, 0, 5]))]
            [[0, 2], [2, 1]]
        """
        table, start, before = [], 0, 0
        for part, shape in zip(self.slices, self.shapes(), strict=True):
            first, last = part.bounds(self.group.rank, self.group.size)
            inner = math.prod(part.shape[part.dim + 1 :])
            table.append([start, part.shape[part.dim], inner, first, last, before])
            start, before = start + part.size, before + math.prod(shape)
        numbers = torch.tensor(table, device=index.device)
        which = torch.searchsorted(numbers[:, 0].contiguous(), index.contiguous(), right=True) - 1
        start_, length, inner_, first_, last_, before_ = numbers[which].unbind(1)
        offset = index - start_
        at = offset // inner_ % length  # along the axis that is cut
        row = offset // (inner_ * length) * (last_ - first_) + at - first_
        row = before_ + row * inner_ + offset % inner_
        here = ((at >= first_) & (at < last_)).nonzero()[:, 0]
        return here, row[here]

    # --------------------------------------------------------------- random rows
    def fill(self, rows: Tensor, draw: Callable[[Tensor], object]) -> None:
        """Fills this rank's rows of one vector from a stream of random numbers.

        Args:
            rows: ``[length]``.
            draw: Overwrites a tensor ``[c]`` with the next numbers of the stream.
        """
        room = rows.new_empty(min(self.size, CHUNK + _LEAST))
        at = start = 0
        while start < self.size:
            stop = start + CHUNK if self.size - start >= CHUNK + _LEAST else self.size
            chunk = room[: stop - start]
            draw(chunk)
            for own in self._own(chunk, start):
                rows[at : at + own.numel()] = own
                at += own.numel()
            start = stop

    def _own(self, chunk: Tensor, start: int) -> Iterator[Tensor]:
        """This rank's entries of a chunk of a vector that begins at entry ``start``, in order."""
        stop, offset = start + chunk.numel(), 0
        for part in self.slices:
            low, high = max(start, offset), min(stop, offset + part.size)
            first, last = part.bounds(self.group.rank, self.group.size)
            inner = math.prod(part.shape[part.dim + 1 :])
            if low < high and math.prod(part.shape[: part.dim]) == 1:  # one run of entries
                low, high = max(low, offset + first * inner), min(high, offset + last * inner)
                if low < high:
                    yield chunk[low - start : high - start]
            elif low < high:
                place = torch.arange(low - offset, high - offset, device=chunk.device)
                place = place // inner % part.shape[part.dim]
                yield chunk[low - start : high - start][(place >= first) & (place < last)]
            offset += part.size
