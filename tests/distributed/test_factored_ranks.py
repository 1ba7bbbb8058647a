"""K-FAC and influence of several processes are those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import factored_work as work
from tests.problems import error
from tests.ranks import on_ranks

HERE = "tests.distributed.factored_work"


@pytest.mark.parametrize("size", [2, 3])
def test_fits_are_those_of_one_process(size: int) -> None:
    expected = work.fits(0, 1)
    found = on_ranks(f"{HERE}:fits", size)
    for name, value in expected.items():
        assert error(found[0][name], value) < 1e-10, name
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), name


@pytest.mark.parametrize("size", [2, 3])
def test_influence_is_that_of_one_process(size: int) -> None:
    expected = work.influences(0, 1)
    found = on_ranks(f"{HERE}:influences", size)
    for name, value in expected.items():
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), name
        if value.dtype == torch.int64:
            assert torch.equal(found[0][name], value), name
        else:
            assert error(found[0][name], value) < 1e-9, name


@pytest.mark.parametrize("what", ["fit", "scan"])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 3), (3, 1)])
def test_what_fails_on_one_rank_goes_on(tmp_path: Path, what: str, before: int, after: int) -> None:
    """With as many ranks from where each was, with others from the last pass that was joined."""
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = work.resumed(0, 1, str(whole), what, None)
    # on two ranks the last one has four batches: for a fit, it fails in its second pass
    failing = {("fit", 2): 6, ("fit", 3): 1, ("scan", 2): 3, ("scan", 3): 2}[(what, before)]
    stopped = on_ranks(f"{HERE}:resumed", before, str(tmp_path), what, failing)
    assert stopped[-1]["error"] == "LookupError: the disk with the images is gone"
    for other in stopped[:-1]:
        assert f"rank {before - 1} of {before} failed in its part of a" in other["error"]
        assert "the disk with the images is gone" in other["error"]
    if after == 1:
        found = [work.resumed(0, 1, str(tmp_path), what, None)]
    else:
        found = on_ranks(f"{HERE}:resumed", after, str(tmp_path), what, None)
    for own in found:
        assert error(own["value"], expected["value"]) < 1e-9
    if (before, after) == (2, 2):
        other = tmp_path / "other"
        other.mkdir()
        fresh = on_ranks(f"{HERE}:resumed", 2, str(other), what, None)
        calls = [sum(own["calls"] for own in runs) for runs in (found, fresh)]
        assert calls[0] < calls[1]
        again = on_ranks(f"{HERE}:resumed", 3, str(tmp_path), what, None)  # it is finished
        assert what == "scan" or not any(own["calls"] for own in again)
        assert torch.equal(again[0]["value"], found[0]["value"])
        assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [f"{what}.ckpt"]


def test_queries_that_fail_on_one_rank_fail_on_all(tmp_path: Path) -> None:
    *others, last = on_ranks(f"{HERE}:resumed", 3, str(tmp_path), "scan", 0)
    assert last["error"] == "LookupError: the disk with the images is gone"
    for other in others:
        assert "rank 2 of 3 failed in the directions of its queries" in other["error"]


def test_what_is_for_one_process_says_so(tmp_path: Path) -> None:
    for found in on_ranks(f"{HERE}:refused", 2, str(tmp_path / "matrix")):
        assert "all scores of a pass are for one process" in found["matrix"]
        assert "group=False" in found["proximal"]


def test_input_grams_are_those_of_one_process() -> None:
    expected = work.grams(0, 1)
    for found in on_ranks(f"{HERE}:grams", 3):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert error(found[name].double(), value.double()) < 1e-12, name
