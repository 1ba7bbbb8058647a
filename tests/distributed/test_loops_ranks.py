"""Loops over examples on several processes give what one process gives on all data."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import loops_work
from tests.problems import error
from tests.ranks import on_ranks

WORK = "tests.distributed.loops_work"


def compare(name: str, size: int, tolerance: float = 1e-12) -> None:
    expected = getattr(loops_work, name)(0, 1)
    found = on_ranks(f"{WORK}:{name}", size)
    assert found[0].keys() == expected.keys()
    for key, value in expected.items():
        assert found[0][key].shape == value.shape, key
        assert error(found[0][key].double(), value.double()) < tolerance, key
        for other in found[1:]:
            assert torch.equal(other[key], found[0][key]), key


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["rows", "values", "normalization"])
def test_ranks_are_one_process(name: str, size: int) -> None:
    compare(name, size)


@pytest.mark.parametrize("size", [2, 3])
def test_windows_and_blocks_of_gradients(size: int) -> None:
    compare("windows", size)


@pytest.mark.parametrize("size", [2, 3])
def test_a_failure_on_one_rank_is_everybodys(size: int) -> None:
    found = on_ranks(f"{WORK}:failures", size)
    for name in found[0]:
        assert found[-1][name] == "ValueError: a target is 1", name
        for rank, other in enumerate(found[:-1]):
            assert other[name].startswith(f"RuntimeError: rank {size - 1} of {size} failed in ")
            assert other[name].endswith("ValueError: a target is 1"), rank


def test_data_without_a_batch_on_any_rank_is_told() -> None:
    for rank, found in enumerate(on_ranks(f"{WORK}:nothing", 2)):
        for name in ("flops", "moments"):
            assert found[name] == (
                "ValueError: the data has no batch on any rank; pass at least one batch"
            )
        assert found["accuracy"].startswith("ValueError: the data has no batch")
        assert found["gradients"] == "nothing"
        assert found["rows"].startswith("ValueError: no loss term is valid")
        wrong = "TypeError: loss= is a number or a tensor of one element, got str"
        told = (
            wrong if rank == 1 else f"RuntimeError: rank 1 of 2 failed in reading its loss: {wrong}"
        )
        assert found["loss"] == told
