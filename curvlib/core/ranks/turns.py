r"""Streams of rows that ranks make of their shards, as one stream that every rank sees.

The rows come in the order of the data: first those of rank 0, then those of rank 1, and so on.
All ranks work at once, since each makes its rows ahead of its turn, up to a number of bytes; those
that a rank has left then are made while the others wait. A rank sends :math:`n_r` of its own rows
and receives the other :math:`n - n_r`: with rows of :math:`P` numbers :math:`s`,

=================  ===============================================
traffic per rank   :math:`s P n (R - 1) / R` bytes, if shares are even
memory per rank    :math:`\min(s P n / R, \text{ahead})` bytes
=================  ===============================================

and a header of two numbers for each block of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from curvlib.core.ranks.group import Group

#: Bytes of rows that a rank makes ahead of its turn, unless told otherwise.
AHEAD = 2**30


def in_turns(
    group: Group | None, rows: Iterable[Tensor], like: Tensor, *, ahead: float = AHEAD
) -> Iterator[Tensor]:
    """Blocks of rows of all ranks, in the order of ranks, the same on every rank.

    Args:
        group: The ranks; ``None`` for one process, whose rows come as they are.
        rows: This rank's blocks ``[n, P]``; making them does not communicate.
        like: A tensor ``[..., P]`` of the type and on the device of the rows.
        ahead: Bytes of rows that this rank makes before its turn.

    Raises:
        RuntimeError: If another rank failed.
        Exception: This rank's own failure.
    """
    if group is None:
        yield from rows
        return
    own = _Ahead(rows, ahead)
    own.fill()
    for rank in range(group.size):
        while True:
            block = own.next() if rank == group.rank else None
            count = 0 if block is None else len(block)
            every = group.numbers([float(own.failure is not None), count])
            if any(failed for failed, _ in every):
                group.raise_failure(own.failure, "making rows of its data")
            length = int(every[rank][1])
            if length == 0:
                break
            if block is None:
                block = like.new_empty((length, like.shape[-1]))
            yield group.from_rank(block.contiguous(), rank)


class _Ahead:
    """An iterator of blocks, some of which are made early, and what went wrong in it."""

    def __init__(self, rows: Iterable[Tensor], ahead: float) -> None:
        self.failure: Exception | None = None
        self._rows = iter(rows)
        self._ahead = ahead
        self._held: list[Tensor] = []

    def fill(self) -> None:
        """Makes blocks as far as they may be ahead."""
        size = 0
        while size < self._ahead and (block := self._made()) is not None:
            self._held.append(block)
            size += block.numel() * block.element_size()

    def next(self) -> Tensor | None:
        """The next block that has rows; ``None`` at the end or after a failure."""
        return self._held.pop(0) if self._held else self._made()

    def _made(self) -> Tensor | None:
        try:
            return next((block for block in self._rows if len(block)), None)
        except Exception as error:  # noqa: BLE001 (told to the other ranks, then raised again)
            self.failure = error
            return None


def added(group: Group | None, tensor: Tensor) -> Tensor:
    """The sum over ranks, in place, where there is a group; for sums that ranks made together."""
    return tensor if group is None else group.add(tensor)
