r"""A digest of what a risk measures, by which checkpoints and results are matched.

Of the data it holds, the digest is the sum of 64 bits of each example's content, so that it is the
same however examples are split into batches and over processes: a run that is started again with
another number of ranks finds its checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Subset, TensorDataset

from curvlib.core.content_numbers import content_keys, mixed
from curvlib.core.data import batch_count, tensors
from curvlib.core.digest import digest

if TYPE_CHECKING:
    from curvlib.core.risk import Risk

_WORD = 1 << 64


def fingerprint(risk: Risk) -> str:
    """A digest of parameters, loss and data, as far as that can be read without a pass.

    The same on all ranks, which have to call it together.
    """
    weights = [w for w in (risk.loss.weight, risk.loss.pos_weight) if w is not None]
    held = map(risk.held.whole, [*risk.model.parameters(), *risk.model.buffers(), *weights])
    modes = "".join("t" if m.training else "e" for m in risk.model.modules())
    return "|".join([digest(held), modes, *risk.space.names, risk.loss.describe(), _data(risk)])


def content_of(batch: Any) -> int:
    """64 bits of a batch's content: the sum over its examples."""
    found = list(tensors(batch))
    if not found:
        return 0
    examples = next((len(t) for t in found if t.ndim), 1)
    rows = [t for t in found if t.ndim and len(t) == examples and not t.is_complex()]
    others = [t for t in found if not any(t is row for row in rows)]
    layout = int(digest([torch.empty(0, *t.shape[1:], dtype=t.dtype) for t in rows]), 16)
    total = layout * examples + (int(digest(others), 16) if others else 0)
    if rows:
        total += int(mixed(content_keys(rows, examples)).sum())
    return total % _WORD


def _data(risk: Risk) -> str:
    """What the data is, the same for every way to split it."""
    if risk.in_memory is not None:
        content = sum(content_of(batch) for batch in risk.in_memory)
        return f"memory {_over_ranks(risk, content, everywhere=False):x}"
    whole = getattr(risk.data, "whole", None)  # what a part of a stream is a part of
    data = risk.data if whole is None else whole
    dataset = getattr(data, "dataset", None)
    name = type(data).__name__
    if dataset is None:
        count = batch_count(data) or 0
        return f"{name} {_over_ranks(risk, count, everywhere=whole is not None)}"
    count = batch_count(dataset) or 0
    content = _over_ranks(risk, _dataset_content(dataset), everywhere=True)
    return f"{name} {_over_ranks(risk, count, everywhere=True)} {content:x}"


def _dataset_content(dataset: Any) -> int:
    """Content of what a data set holds in memory; nothing of others, which would take a pass."""
    if isinstance(dataset, TensorDataset):
        return content_of(dataset.tensors)
    if isinstance(dataset, (list, tuple)):
        return sum(content_of(_with_axis(example)) for example in dataset) % _WORD
    if isinstance(dataset, Subset):
        inner: Any = dataset.dataset
        indices = [int(i) for i in dataset.indices]
        if isinstance(inner, TensorDataset):
            return content_of([t[indices] for t in inner.tensors])
        if isinstance(inner, (list, tuple)):
            return _dataset_content([inner[i] for i in indices])
        return (_dataset_content(inner) + int(digest([torch.tensor(indices)]), 16)) % _WORD
    return 0


def _with_axis(example: Any) -> list[torch.Tensor]:
    """One example as a batch of one."""
    if isinstance(example, (torch.Tensor, Mapping, list, tuple)):
        return [t.unsqueeze(0) for t in tensors(example)]
    return []


def _over_ranks(risk: Risk, number: int, *, everywhere: bool) -> int:
    """The sum over ranks; one rank's number where all hold the same whole data set."""
    if risk.group is None or risk.everywhere:
        return number % _WORD
    every = [int(text) for text in risk.group.texts(str(number % _WORD))]
    if everywhere and len(set(every)) == 1:
        return every[0]
    return sum(every) % _WORD
