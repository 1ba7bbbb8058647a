"""Shards are the data, cut: nothing twice, nothing left out; and their content adds up."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from curvlib.core.content_numbers import mixed
from curvlib.core.fingerprint import content_of
from curvlib.core.ranks.shards import Part, part_of, shard


def parts(data: Any, size: int) -> list[Any]:
    return [part_of(data, rank, size) for rank in range(size)]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 40), size=st.integers(1, 9), batch=st.integers(1, 7))
def test_shards_joined_are_the_data(count: int, size: int, batch: int) -> None:
    x = torch.arange(float(count))[:, None]
    y = torch.arange(count)
    examples = [p for p in parts((x, y), size) if len(p)]
    assert [int(v) for p in examples for v in p[1]] == y.tolist()
    batches = [(x[i : i + batch], y[i : i + batch]) for i in range(0, count, batch)]
    loader = DataLoader(TensorDataset(x, y), batch_size=batch)

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            yield from zip(x, y, strict=True)

    streams = [DataLoader(Stream(), batch_size=batch), Part(batches, 0, 1)]
    for data in (batches if len(batches) > 1 else [], loader, *streams):
        found = [batch for part in parts(data, size) for batch in part]
        assert [t[1].tolist() for t in found] == [t[1].tolist() for t in data]
    lengths = [len(p) for p in parts(list(range(3, count + 3)), size)] if count > 1 else [0]
    assert max(lengths) - min(lengths) <= 1


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 10), max_size=4, unique=True), seed=st.integers(0, 99))
def test_content_adds_up_over_parts_and_sees_every_bit(cuts: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(11, 3, generator=draw), torch.randint(4, (11,), generator=draw)
    ends = [0, *sorted(cuts), 11]
    each = [content_of((x[a:b], y[a:b])) for a, b in itertools.pairwise(ends)]
    whole = content_of((x, y))
    assert sum(each) % (1 << 64) == whole
    order = torch.randperm(11, generator=draw)
    assert content_of((x[order], y[order])) == whole
    changed = x.clone()
    changed[4, 1] = torch.nextafter(changed[4, 1], torch.tensor(torch.inf))
    assert content_of((changed, y)) != whole
    assert content_of((x, y.roll(1))) != whole or bool((y == y.roll(1)).all())
    assert content_of((x.double(), y)) != whole


def test_content_of_other_things() -> None:
    x = torch.ones(2, 3)
    assert content_of([]) == content_of({"name": "none"}) == 0
    assert content_of({"x": x, "scale": torch.tensor(2.0)}) != content_of(
        {"x": x, "scale": torch.tensor(3.0)}
    )
    assert content_of(torch.ones(2, 3, dtype=torch.bfloat16)) != content_of(x)


def test_mixing_is_one_to_one() -> None:
    numbers = torch.arange(-5000, 5000)
    assert len(mixed(numbers).unique()) == len(numbers)


def test_what_is_not_cut() -> None:
    """One process has everything; items of no length and tensors of other lengths stay whole."""
    data = {"x": torch.zeros(4, 2), "weights": torch.ones(3), "scale": torch.tensor(2.0)}
    assert shard(data) is data
    own = part_of(data, 1, 2)
    assert own["x"].shape == (2, 2)
    assert own["weights"] is data["weights"]
    assert own["scale"] is data["scale"]
    assert part_of((torch.zeros(1, 2), torch.zeros(1)), 0, 2) == []
    with pytest.raises(TypeError, match="iterated only once"):
        part_of(iter([1, 2]), 0, 2)
    loader = DataLoader(TensorDataset(torch.zeros(4, 1)), batch_size=1, shuffle=True)
    with pytest.raises(ValueError, match="every rank would draw another order"):
        part_of(loader, 0, 2)
