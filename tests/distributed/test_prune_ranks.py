"""Pruning on several processes prunes what one process prunes, alike on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import prune_work
from tests.problems import error
from tests.ranks import on_ranks


@pytest.mark.parametrize("size", [2, 3])
def test_events_are_those_of_one_process(size: int, tmp_path: Path) -> None:
    expected = prune_work.events(0, 1, str(tmp_path))
    found = on_ranks("tests.distributed.prune_work:events", size, str(tmp_path))
    far = {}
    for name, numbers in expected.items():
        for field, value in numbers.items():
            mine = found[0][name][field]
            for other in found[1:]:
                assert torch.equal(other[name][field], mine), (name, field)
            if not error(mine, value) < 1e-11:
                far[name, field] = error(mine, value)
    assert not far
