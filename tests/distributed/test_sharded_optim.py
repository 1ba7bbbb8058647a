"""Optimizers that step slices of sharded parameters do what they do in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed import sharded_optim_work as work
from tests.problems import error
from tests.ranks import on_ranks

WORK = "tests.distributed.sharded_optim_work:"


def require_alike(found: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    """Within rounding what one process gives, and the same bits on all ranks."""
    for name, value in expected.items():
        assert error(found[0][name].double(), value.double()) < 1e-10, name
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), name


@pytest.mark.parametrize("size", [2, 3])
def test_steps_are_those_of_one_process(size: int) -> None:
    expected = work.trained(0, 1)
    start = work.weights(work.small(1))
    for name, value in expected.items():
        assert len(value) != len(start) or error(value, start) > 1e-3, name
    require_alike(on_ranks(WORK + "trained", size), expected)


@pytest.mark.parametrize("size", [2, 3])
def test_groups_that_freeze_thaw_and_are_added_and_steps_that_are_skipped(size: int) -> None:
    require_alike(on_ranks(WORK + "groups", size), work.groups(0, 1))


def test_states_are_spread_and_go_on_with_any_number_of_ranks() -> None:
    expected, found = work.saved(0, 1), on_ranks(WORK + "saved", 2)
    small = {name: sum(of["numbers"] for of in (f[name] for f in found)) for name in expected}
    for name, value in expected.items():
        assert value["numbers"] <= small[name] <= value["numbers"] + 2 * 9, name
    ends = {name: value["end"] for name, value in expected.items()}
    require_alike([{name: f[name]["end"] for name in ends} for f in found], ends)
    require_alike([work.resumed(0, 1, found[0])], ends)
    require_alike(on_ranks(WORK + "resumed", 3, expected), ends)


def test_distributed_checkpoints_go_on_with_any_number_of_ranks(tmp_path: Path) -> None:
    expected = work.saved(0, 1)
    run = WORK + "checkpointed"
    ends = {name: expected[name]["end"] for name in ("adahessian", "sophia-g", "mfac")}
    require_alike(on_ranks(run, 2, str(tmp_path), True), ends)
    require_alike(on_ranks(run, 3, str(tmp_path), False), ends)
    require_alike(on_ranks(run, 2, str(tmp_path), False), ends)
    alone = work.checkpointed(0, 1, str(tmp_path), False)
    require_alike([alone], {name: ends[name] for name in alone})


def test_what_steps_send() -> None:
    for found in on_ranks(WORK + "sent", 2):
        assert 6 < found["one"][0] <= 3 + 4
        assert 9 < found["two"][0] <= 3 + 4 * 2
        # M-FAC: FSDP2's pass; whether all is finite, the row's norm, two products, another norm
        assert found["mfac"] == (0, [1, 1, 2, 1])


@pytest.mark.parametrize("size", [2, 3])
def test_newton_steps_are_those_of_one_process(size: int) -> None:
    expected = work.newton(0, 1)
    assert expected["hessian, counts"][1] > 0  # some trials were rejected
    require_alike(on_ranks(WORK + "newton", size), expected)


REFUSED = {
    "late": "RuntimeError: FSDP2's hooks free parameters",
    "within": "RuntimeError: a step changes parameters that this block has gathered",
    "failing": "OSError: the disk is gone",
    "backward": "RuntimeError: FSDP2's hooks free parameters .* with opt.gathering",
    "observe": "RuntimeError: FSDP2's hooks free parameters",
    "sophia": "RuntimeError: FSDP2's hooks free parameters",
    "gathered": r"parameter \d is whole on every rank beside sharded ones.*model.reshard\(\)",
    "some whole": "parameter 6 is whole on every rank beside sharded ones",
    "added whole": "is whole on every rank beside sharded ones",
    "runs": "blocks of block_size=2 of a parameter .* use block_size=1, or None",
    "kernels": "blocks of block_size=None of a parameter .* use block_size=1$",
    "tensors": "windows of tensors, and compressed ones, need whole gradients",
    "compressed": "use window='group' without compression=",
    "group": "spread over ranks",
    "foreign state": "the state of parameter 0 is spread over ranks",
}


def test_what_is_not_followed_is_refused_on_all_ranks() -> None:
    for found in on_ranks(WORK + "refusals", 2):
        assert found.keys() == REFUSED.keys()
        for name, text in REFUSED.items():
            with pytest.raises(Exception, match=text):
                raise ValueError(found[name])
