"""Learning rates on several processes are those of one process on all data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import rates_work
from tests.problems import error
from tests.ranks import on_ranks

WORK = "tests.distributed.rates_work"


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, torch.Tensor]]:
    return rates_work.results(0, 1)


@pytest.mark.parametrize("size", [2, 3])
def test_results_are_those_of_one_process(
    size: int, one: dict[str, dict[str, torch.Tensor]]
) -> None:
    found = on_ranks(f"{WORK}:results", size)
    far = {}
    for name, numbers in one.items():
        for field, value in numbers.items():
            mine = found[0][name][field]
            for other in found[1:]:
                assert torch.equal(other[name][field].nan_to_num(), mine.nan_to_num()), field
            if field == "vectors":  # of a sign that is arbitrary
                mine = mine * (mine * value).sum(0).sign()
            gap = error(mine.nan_to_num(), value.nan_to_num())
            if not gap < 1e-12:
                far[name, field] = gap
    assert not far


@pytest.mark.parametrize("size", [2, 3])
def test_a_training_run_is_watched_and_steered_alike(size: int, tmp_path: Path) -> None:
    expected = rates_work.training(0, 1, str(tmp_path))
    found = on_ranks(f"{WORK}:training", size, str(tmp_path))
    for name, value in expected.items():
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), name
        assert error(found[0][name], value) < 1e-9, name
    one, many = ((tmp_path / f"table{n}.csv").read_text().splitlines() for n in (1, size))
    assert len(one) == len(many) == 4


def test_a_checkpoint_fits_other_numbers_of_ranks(tmp_path: Path) -> None:
    """One process stops in the middle of the examples, three go on, two find all done."""
    expected = rates_work.resumed(0, 1, str(tmp_path / "whole"))
    part = tmp_path / "part"
    part.mkdir()
    with pytest.raises(KeyboardInterrupt):
        rates_work.interrupted(str(part))
    for size in (3, 2):
        found = on_ranks(f"{WORK}:resumed", size, str(part))
        for name, numbers in expected.items():
            for field, value in numbers.items():
                gap = error(found[0][name][field].nan_to_num(), value.nan_to_num())
                assert gap < 1e-12 or field == "vectors", (size, name, field, gap)
