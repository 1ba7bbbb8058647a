"""Influence on models whose parameters are sharded is that on whole ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import sharded_influence_work as work
from tests.problems import error
from tests.ranks import on_ranks

HERE = "tests.distributed.sharded_influence_work:"


@pytest.mark.parametrize("size", [2, 3])
def test_influence_is_that_of_one_process(size: int) -> None:
    expected = work.influences(0, 1)
    found = on_ranks(HERE + "influences", size)
    assert found[0].keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype == torch.int64:
            assert torch.equal(found[0][name], value), name
        else:
            assert error(found[0][name], value) < 1e-10, name
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), name


REFUSED = {
    "compressed": "ValueError: compressed directions need whole ones",
    "curvature": "takes the curvature 'ekfac', 'kfac' or 'identity'",
    "diagonal": "needs them whole",
    "matrix": "all scores of a pass are for one process",
}


def test_what_is_not_followed_is_refused_on_all_ranks() -> None:
    first, last = on_ranks(HERE + "refusals", 2)
    for name, text in REFUSED.items():
        assert text in first[name], (name, first[name])
        assert first[name] == last[name], name
    assert last["not finite"].startswith("FloatingPointError: ")
    told = "RuntimeError: rank 1 of 2 failed in its part of a scan: FloatingPointError: "
    assert first["not finite"].startswith(told)


def test_one_process_may_hold_sharded_parameters() -> None:
    (found,) = on_ranks(HERE + "alone", 1)
    assert found["places"] == 8
    assert found["same"]
    assert "influence in one process needs them whole" in found["influence"]


def test_scans_are_kept_for_any_number_of_ranks(tmp_path: Path) -> None:
    path = str(tmp_path / "scan.ckpt")
    (first, _) = on_ranks(HERE + "checked", 2, path)
    assert [file.name for file in tmp_path.iterdir()] == ["scan.ckpt"]
    for found in (*on_ranks(HERE + "checked", 3, path), work.checked(0, 1, path)):
        assert torch.equal(found["indices"], first["indices"])
        assert error(found["scores"], first["scores"]) < 1e-10
