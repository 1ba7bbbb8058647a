"""What processes with sharded parameters compute equals what one process computes."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import sharded_work as work
from tests.problems import error
from tests.ranks import on_ranks

WORK = "tests.distributed.sharded_work:"


@pytest.mark.parametrize("size", [2, 3])
def test_products_are_those_of_one_process(size: int) -> None:
    expected = work.products(0, 1)
    found = on_ranks(WORK + "products", size)
    for name, value in expected.items():
        tolerance = 1e-6 if name == "differences" else 1e-12
        assert error(found[0][name], value) < tolerance, name
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), name


@pytest.mark.parametrize("size", [2, 3])
def test_estimates_are_those_of_one_process(size: int) -> None:
    expected = work.estimates(0, 1)
    found = on_ranks(WORK + "estimates", size)
    for name, value in expected.items():
        assert error(found[0][name].double(), value.double()) < 1e-6, name
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), name


@pytest.mark.parametrize("size", [2, 3])
def test_windows_are_those_of_one_process(size: int) -> None:
    expected = work.windows(0, 1)
    found = on_ranks(WORK + "windows", size)
    for name, value in expected.items():
        if name == "sent":
            continue
        tolerance = 1e-10 if value.dtype == torch.float64 else 1e-4
        assert error(found[0][name].double(), value.double()) < tolerance, name
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), name
    # pushing a row: m numbers; solving for it: none; two columns: 2 m, and 2 where rows are rounded
    assert found[0]["sent"].tolist() == [4, 8, 4, 8, 2, 4, 8, 2]
