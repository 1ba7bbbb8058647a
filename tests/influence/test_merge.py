"""Searches of parts of the data, by processes of their own, against one search of all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import curvlib as cl
from curvlib.influence import Influence, TopInfluence, merged_searches
from tests.programs import Program


def influence(normalize_size: int = 5) -> Influence:
    """Sequences in batches of unequal sizes, some examples twice (ties)."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    x = torch.randn(23, 4, 3, dtype=torch.float64, generator=g)
    y = torch.randn(23, 4, 2, dtype=torch.float64, generator=g)
    x[20], y[20] = x[1], y[1]
    data = [(x[i : i + normalize_size], y[i : i + normalize_size]) for i in range(0, 23, 5)]
    return Influence(model, nn.MSELoss(), data, progress=False)


def queries(inf: Influence) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = inf.risk.data[2]
    return x[:3] * 1.1, y[:3]


PARTS = (range(5), range(5, 15), range(15, 23))


def test_processes_of_their_own(tmp_path: Path) -> None:
    """Three processes fit, scan and save; the fourth merges what they wrote."""
    code = """
import sys
from tests.influence.test_merge import PARTS, influence, queries
number = int(sys.argv[1])
inf = influence()
inf.top(queries(inf), 4, 2, chosen=PARTS[number]).save(sys.argv[2])
"""
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    running = [Program("-c", code, i, path) for i, path in enumerate(paths)]
    for ended in [program.finish() for program in running]:
        assert ended.code == 0, ended.error
    merged = merged_searches([TopInfluence.load(path) for path in paths])
    inf = influence()
    whole = inf.top(queries(inf), 4, 2)
    for name in ("indices", "bottom_indices", "sample_keys", "token_counts"):
        assert torch.equal(getattr(merged, name), getattr(whole, name)), name
    for name in ("scores", "per_layer", "per_token", "bottom_scores", "bottom_per_layer",
                 "bottom_per_token", "mean", "std", "sample"):  # fmt: skip
        torch.testing.assert_close(
            getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-12
        )
    assert merged.examples == whole.examples == 23
    torch.testing.assert_close(merged.per_layer.sum(2), merged.scores)


def test_order_of_parts_and_ties_do_not_matter() -> None:
    inf = influence()
    asked = queries(inf)
    parts = [inf.top(asked, 4, chosen=part) for part in PARTS]
    found = merged_searches(parts[::-1])
    assert torch.equal(found.indices, inf.top(asked, 4).indices)
    alone = merged_searches(parts[:1])
    assert torch.equal(alone.indices, parts[0].indices)
    plain = [inf.top(asked, 4, chosen=p, per_layer=False, per_token=False) for p in PARTS]
    assert merged_searches(plain).per_layer is None
    both = {1, 20}  # the same example twice
    every = inf.top(asked, 23)
    places = [[row.index(i) for i in sorted(both)] for row in every.indices.tolist()]
    assert all(abs(b - a) == 1 for a, b in places)


def test_what_cannot_be_merged() -> None:
    inf = influence()
    asked = queries(inf)
    part, other = (inf.top(asked, 4, chosen=own) for own in PARTS[:2])
    with pytest.raises(ValueError, match="there is no search to merge"):
        merged_searches([])
    with pytest.raises(TypeError, match=r"expected results of Influence.top, got int"):
        merged_searches([part, 3])  # type: ignore[list-item]  # the wrong type is the point
    with pytest.raises(ValueError, match=r"have example \d+ in common; choose disjoint"):
        merged_searches([part, part])
    with pytest.raises(ValueError, match=r"differ in damping: 0.1 and 0.3"):
        merged_searches([part, inf.damped(0.3).top(asked, 4, chosen=PARTS[1])])
    with pytest.raises(ValueError, match="differ in queries or settings: 3 queries"):
        merged_searches([part, inf.top(asked, 3, chosen=PARTS[1])])
    fewer = replace(other, scores=other.scores[:2])
    with pytest.raises(ValueError, match="differ in queries or settings: 3 queries .* and 2 with"):
        merged_searches([part, fewer])
    assert isinstance(cl.influence.merged_searches([part, other]), TopInfluence)
