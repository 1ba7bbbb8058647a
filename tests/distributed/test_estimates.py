"""Estimates of several processes are those of one, and go on with another number of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import estimates, work
from tests.problems import error
from tests.ranks import on_ranks

HERE = "tests.distributed.estimates"


@pytest.mark.parametrize("size", [2, 3])
def test_estimates_are_those_of_one_process(size: int) -> None:
    expected = estimates.estimates(0, 1)
    found = on_ranks(f"{HERE}:estimates", size)
    for name, value in expected.items():
        assert error(found[0][name].double(), value.double()) < 1e-10, name
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), name


def test_every_rank_has_what_any_of_them_finds() -> None:
    found = on_ranks(f"{HERE}:checks", 3)
    assert found[0] == found[1] == found[2]
    assert found[0]["quiet"]
    assert "dropout" in found[0]["kinds"]


def test_progress_is_for_the_first_rank() -> None:
    first, other = on_ranks(f"{HERE}:told", 2)
    assert first
    assert not other


def test_a_process_may_work_alone() -> None:
    found = on_ranks(f"{HERE}:as_one", 2)
    expected = estimates.as_one(0, 1)
    assert all(torch.equal(f, expected) for f in found)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (2, 1)])
def test_ctrl_c_on_one_rank_stops_all_and_other_numbers_of_ranks_go_on(
    tmp_path: Path, before: int, after: int
) -> None:
    stopped = on_ranks(f"{HERE}:resumed", before, str(tmp_path), True)
    assert all("continues from the last save" in found["stopped"] for found in stopped)
    assert [path.name for path in tmp_path.iterdir()] == ["density.ckpt"]
    if after == 1:
        found = [estimates.resumed(0, 1, str(tmp_path), False)]
    else:
        found = on_ranks(f"{HERE}:resumed", after, str(tmp_path), False)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    expected = estimates.resumed(0, 1, str(fresh), False)
    for own in found:
        assert error(own["nodes"], expected["nodes"]) < 1e-10
        assert error(own["weights"], expected["weights"]) < 1e-9
    batches = len(work.batches())
    assert sum(own["passes"] for own in found) < expected["passes"]
    assert expected["passes"] == 12 * batches
