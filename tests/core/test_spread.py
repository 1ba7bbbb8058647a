"""Vectors that are spread over ranks: what each holds, and the same random numbers as in one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from curvlib.core.ranks import spread as spread_module
from curvlib.core.ranks.group import Group
from curvlib.core.ranks.slices import Slices
from curvlib.core.ranks.spread import Spread
from curvlib.core.ranks.spread_files import put_together, taken_apart
from curvlib.estimators.hutchpp import HutchppState
from curvlib.estimators.krylov_state import KrylovState
from curvlib.estimators.probes import LAWS, fill_normal, fill_probes
from curvlib.estimators.solve_state import SolveState

CUTS = (((7, 5), 0), ((5,), 0), ((4, 3, 6), 1), ((2, 9), 1), ((1,), 0))
SHAPES = tuple(Slices(shape, dim) for shape, dim in CUTS)


def spreads(size: int) -> list[Spread]:
    group = [Group(None, rank, size, torch.device("cpu")) for rank in range(size)]  # type: ignore[arg-type]
    return [Spread(SHAPES, one) for one in group]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_slices_are_those_of_chunk(size: int) -> None:
    whole = torch.arange(float(spreads(1)[0].size))
    pieces = whole.split([part.size for part in SHAPES])
    for rank, spread in enumerate(spreads(size)):
        own = []
        for piece, part in zip(pieces, SHAPES, strict=True):
            cut = piece.reshape(part.shape).chunk(size, part.dim)
            own.append(cut[rank].reshape(-1) if rank < len(cut) else piece[:0])
        expected = torch.cat(own)
        assert torch.equal(spread.scatter(whole), expected)
        assert spread.length == len(expected)
        block = torch.stack([whole, -whole], 1)
        assert torch.equal(spread.scatter(block), torch.stack([expected, -expected], 1))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_rows_are_those_of_one_process(
    law: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread_module, "CHUNK", 64)
    whole = torch.empty(2, spreads(1)[0].size, dtype=dtype)
    fill_probes(whole, "gaussian" if law == "sphere" else law, torch.Generator().manual_seed(3))
    for spread in spreads(3):
        rows, generator = torch.empty(2, spread.length, dtype=dtype), torch.Generator()
        generator.manual_seed(3)
        if law == "sphere":  # but for its norm, which takes all ranks
            for row in rows:
                fill_normal(row, generator, spread)
        else:
            fill_probes(rows, law, generator, spread)
        assert torch.equal(rows, spread.scatter(whole.mT).mT)


@pytest.mark.parametrize("size", [1, 15, 16, 63, 64, 79, 80, 81, 128, 145])
def test_streams_of_all_lengths_are_drawn_alike(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread_module, "CHUNK", 64)
    one = Spread((Slices((size,), 0),), Group(None, 0, 1, torch.device("cpu")))  # type: ignore[arg-type]
    for fill in (fill_normal, lambda row, g, s=None: fill_probes(row[None], "rademacher", g, s)):
        plain, chunked = torch.empty(size), torch.empty(size)
        fill(plain, torch.Generator().manual_seed(1))
        fill(chunked, torch.Generator().manual_seed(1), one)
        assert torch.equal(plain, chunked)


def test_states_are_taken_apart_and_put_together() -> None:
    work = {"r": torch.ones(2, 5), "rz": torch.ones(2)}
    fields: dict[str, Any] = {field.name: None for field in dataclasses.fields(SolveState)}
    state = SolveState(**(fields | {"x": torch.zeros(2, 5), "work": work, "products": 3}))
    small, rows = taken_apart(state)
    assert rows.keys() == {"x", "work/r"}
    assert small["x"] is None
    assert small["work"].keys() == {"rz"}
    back = SolveState(**put_together(small, rows))
    assert back.x is state.x
    assert back.work.keys() == work.keys()
    assert KrylovState.SPREAD == ("rows",)


def test_blocks_of_states_keep_their_order() -> None:
    blocks = tuple(torch.full((1, 3), float(i)) for i in range(11))
    state = HutchppState(blocks, 1.0, torch.zeros(2), 22, torch.zeros(1))
    small, rows = taken_apart(state)
    assert small["basis"] == ()
    assert len(rows) == 11
    back = HutchppState(**put_together(small, dict(sorted(rows.items()))))
    assert all(a is b for a, b in zip(back.basis, blocks, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_own_rows_of_some_entries(size: int) -> None:
    index = torch.randperm(spreads(1)[0].size, generator=torch.Generator().manual_seed(0))[:60]
    whole = torch.arange(spreads(1)[0].size)
    found = torch.full((60,), -1)
    for spread in spreads(size):
        here, rows = spread.own(index)
        assert bool((found[here] == -1).all())  # on one rank each
        found[here] = spread.scatter(whole)[rows]
    assert torch.equal(found, index)
