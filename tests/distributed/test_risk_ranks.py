"""Products of several processes equal those of one."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import work
from tests.problems import error
from tests.ranks import on_ranks


@pytest.mark.parametrize("size", [2, 3])
def test_products_are_those_of_one_process(size: int) -> None:
    expected = work.products(0, 1)
    found = on_ranks("tests.distributed.work:products", size)
    for name, value in expected.items():
        assert error(found[0][name], value) < 1e-12, name
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), name
