r"""Shards: the part of some data that a rank of a process group takes.

Of :math:`n` batches, rank :math:`r` of :math:`R` takes those from :math:`\lfloor rn/R \rfloor` to
:math:`\lfloor (r+1)n/R \rfloor`: nothing is repeated and nothing left out, and the shards in the
order of ranks are the data in its order, so that examples keep their numbers. (PyTorch's
``DistributedSampler`` repeats examples until shards are equal, which shifts every mean.)
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
)

from curvlib.core.data import batch_count, in_memory, is_mapping, mapped, reiterable, tensors
from curvlib.core.fingerprint import content_of
from curvlib.core.ranks.group import Group, GroupChoice, group_of

if TYPE_CHECKING:
    from curvlib.core.risk import Risk


def shard(data: Any, *, group: GroupChoice = None) -> Any:
    """This rank's part of data that every rank holds; all of it in a single process.

    One batch in memory is cut into examples (along the first axis of its tensors); everything
    else is taken by whole batches.

    Args:
        data: What :class:`curvlib.Risk` takes: a batch, a list of batches, a ``DataLoader``, or
            what can be iterated again.
        group: The processes, as for :class:`curvlib.Risk`.

    Returns:
        Data of the same kind.

    Raises:
        TypeError: If the data can be iterated only once.
        ValueError: If a loader shuffles, since ranks then draw different orders.

    Example:
        >>> import torch
        >>> x, y = torch.zeros(5, 2), torch.zeros(5, 1)
        >>> shard((x, y))[0].shape  # one process: everything
        torch.Size([5, 2])
    """
    ranks = group_of(group)
    return data if ranks is None else part_of(data, ranks.rank, ranks.size)


def sharded(risk: Risk) -> Risk:
    """The same risk with its data cut over its ranks, if each of them holds all of it.

    Data that is a shard already, as a ``DistributedSampler``'s, or that differs between ranks, is
    left as it is. Ranks call it together.
    """
    group = risk.group
    if group is None or _is_shard(risk.data):
        return risk
    if risk.in_memory is not None:
        content = sum(content_of(batch) for batch in risk.in_memory)
        if len(set(group.texts(f"{len(risk.in_memory)} {content:x}"))) > 1:
            return risk
        return risk.on(part_of(list(risk.in_memory), group.rank, group.size))
    return risk.on(part_of(risk.data, group.rank, group.size))


def _is_shard(data: Any) -> bool:
    samplers = (getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
    return isinstance(data, Part) or any(
        isinstance(sampler, (DistributedSampler, _Batches)) for sampler in samplers
    )


def part_of(data: Any, rank: int, size: int) -> Any:
    """The part of rank ``rank`` of ``size``: see :func:`shard`.

    Example:
        >>> [part_of(["a", "b", "c"], rank, 2) for rank in range(2)]
        [['a'], ['b', 'c']]
    """
    held = in_memory(data, pairs=False)
    if isinstance(data, (list, tuple)) and len(data) == 2 and _is_pair(data):
        held = [tuple(data)]
    if held is not None and len(held) == 1:
        return _examples(held[0], rank, size)
    if held is not None:
        return list(held[_cut(len(held), rank, size)])
    if isinstance(data, DataLoader):
        if isinstance(data.sampler, DistributedSampler):
            return data
        shuffles = isinstance(data.sampler, RandomSampler)
        if shuffles:
            raise ValueError(
                "the DataLoader shuffles, so every rank would draw another order and shards would "
                "overlap; use shuffle=False, which changes nothing in a mean over all data"
            )
        if not isinstance(data.dataset, IterableDataset):
            return _loader(data, rank, size)
    return Part(reiterable(data), rank, size)


class Part:
    """Some consecutive batches of data that can be iterated again.

    Args:
        data: All batches.
        rank: Which part.
        size: Of how many.
    """

    def __init__(self, data: Any, rank: int, size: int) -> None:
        self.whole, self.rank, self.size = data, rank, size

    def __iter__(self) -> Iterator[Any]:
        count = batch_count(self.whole)
        if count is None:  # a pass that only counts
            count = sum(1 for _ in self.whole)
        cut = _cut(count, self.rank, self.size)
        return itertools.islice(iter(self.whole), cut.start, cut.stop)


class _Batches:
    """Some consecutive batches of a sampler's."""

    def __init__(self, batches: Any, rank: int, size: int) -> None:
        self.batches, self.rank, self.size = batches, rank, size

    def __len__(self) -> int:
        cut = _cut(len(self.batches), self.rank, self.size)
        return int(cut.stop - cut.start)

    def __iter__(self) -> Iterator[Any]:
        cut = _cut(len(self.batches), self.rank, self.size)
        return itertools.islice(iter(self.batches), cut.start, cut.stop)


def notice_padding(data: Any, group: Group) -> None:
    """Warns if a loader's ``DistributedSampler`` counts examples twice."""
    sampler = getattr(data, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return
    extra = -len(sampler.dataset) % sampler.num_replicas  # type: ignore[arg-type]
    if extra and group.first:
        warnings.warn(
            f"curvlib: DistributedSampler repeats {extra} of {len(sampler.dataset)} examples "  # type: ignore[arg-type]
            "so that shards are equal, which shifts every mean; curvlib needs no equal shards: "
            "pass Risk(..., curvlib.shard(DataLoader(dataset, ...)))",
            UserWarning,
            stacklevel=3,
        )


def _loader(loader: DataLoader[Any], rank: int, size: int) -> DataLoader[Any]:
    settings: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "generator": loader.generator,
        "persistent_workers": loader.persistent_workers,
    }
    if loader.num_workers:
        settings |= {
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    if loader.batch_sampler is None:  # items of the data set are batches
        items: Any = _Batches(loader.sampler, rank, size)
        return DataLoader(loader.dataset, batch_size=None, sampler=items, **settings)
    batches: Any = _Batches(loader.batch_sampler, rank, size)
    return DataLoader(loader.dataset, batch_sampler=batches, **settings)


def _is_pair(data: Any) -> bool:
    first, second = data
    return isinstance(second, Tensor) and (isinstance(first, Tensor) or is_mapping(first))


def _examples(batch: Any, rank: int, size: int) -> Any:
    """Some consecutive examples of a batch in memory."""
    count = next((len(t) for t in tensors(batch) if t.ndim), 0)
    cut = _cut(count, rank, size)
    if cut.start == cut.stop:
        return []  # no batch

    def own(tensor: Tensor) -> Tensor:
        return tensor[cut] if tensor.ndim and len(tensor) == count else tensor

    return own(batch) if isinstance(batch, Tensor) else mapped(batch, own)


def _cut(count: int, rank: int, size: int) -> slice:
    return slice(rank * count // size, (rank + 1) * count // size)
