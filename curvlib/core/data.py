"""Batches as users hold them: pairs, mappings, lists, loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset


def in_memory(data: Any, *, pairs: bool) -> Sequence[Any] | None:
    """The batches, if they are held in memory: one batch, or a list of them.

    A mapping, a tensor and a tuple that begins with a tensor are one batch. A list is a list of
    batches, except for ``[x, y]`` of two tensors where batches are pairs.
    """
    if is_mapping(data):
        return [data]
    if isinstance(data, Tensor):
        if pairs:
            raise TypeError(
                "data= got one tensor; pass (input, target), a list of batches, or forward= and "
                "loss= that understand a tensor as batch"
            )
        return [data]
    if isinstance(data, tuple) and data and isinstance(data[0], Tensor):
        return [data]
    if isinstance(data, (list, tuple)):
        one_pair = (
            pairs
            and len(data) == 2
            and isinstance(data[1], Tensor)
            and (isinstance(data[0], Tensor) or is_mapping(data[0]))
        )
        return [tuple(data)] if one_pair else data
    return None


def batch_count(data: Any) -> int | None:
    """How many batches there are, where that is known without a pass.

    Example:
        >>> batch_count([1, 2]), batch_count(iter([1, 2])) is None
        (2, True)
    """
    try:
        return len(data)
    except TypeError:  # there is no __len__, or (of a DataLoader) its data set has none
        return None


def reiterable(data: Any) -> Any:
    """The data, if every pass can iterate over it anew.

    Raises:
        TypeError: If it is an iterator, a data set of single examples, or no iterable.
    """
    if isinstance(data, Iterator):
        raise TypeError(
            f"data= got a {type(data).__name__}, which can be iterated only once, and every "
            "product needs a pass; pass list(data), or the DataLoader itself instead of iter(...)"
        )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"data= got a {type(data).__name__} of single examples; "
            "pass torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise TypeError(
            "data= should be a batch (input, target), a list of batches or a DataLoader, "
            f"got {type(data).__name__}"
        )
    return data


def is_pair(batch: Any) -> bool:
    """Whether a batch is ``(input, target)``."""
    return isinstance(batch, (tuple, list)) and len(batch) == 2


def is_mapping(batch: Any) -> bool:
    """Whether a batch has named items: a dict, or a ``BatchEncoding``."""
    return isinstance(batch, Mapping) or (hasattr(batch, "keys") and hasattr(batch, "__getitem__"))


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors in a batch, however it nests them, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif is_mapping(batch):
        for key in batch.keys():  # noqa: SIM118 (a BatchEncoding iterates over more than keys)
            yield from tensors(batch[key])
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            yield from tensors(item)


def mapped(
    batch: Any, on_tensor: Callable[[Tensor], Any], otherwise: Callable[[Any], Any] = lambda x: x
) -> Any:
    """A batch of the same nesting, with functions applied to its tensors and to all else.

    Mappings become dictionaries, lists and tuples become tuples.
    """
    if isinstance(batch, Tensor):
        return on_tensor(batch)
    if is_mapping(batch):
        names = batch.keys()  # a BatchEncoding iterates over more than keys
        return {name: mapped(batch[name], on_tensor, otherwise) for name in names}
    if isinstance(batch, (list, tuple)):
        return tuple(mapped(item, on_tensor, otherwise) for item in batch)
    return otherwise(batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on a device, of the same types; itself if it is there already."""
    if isinstance(batch, Tensor) and batch.is_inference():
        return batch.to(device, copy=True)  # autograd cannot save inference tensors
    if all(t.device == device and not t.is_inference() for t in tensors(batch)):
        return batch
    if hasattr(batch, "to") and not any(t.is_inference() for t in tensors(batch)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    parts = [to_device(item, device) for item in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def describe(data: Any) -> str:
    """A few words on what some data is, for messages."""
    if isinstance(data, Tensor):
        return f"a tensor of shape {list(data.shape)}"
    if isinstance(data, (list, tuple)):
        kinds = ", ".join(sorted({type(item).__name__ for item in data}))
        return f"a {type(data).__name__} of {len(data)} ({kinds})"
    return f"a {type(data).__name__}"
