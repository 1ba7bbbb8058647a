"""KFAC and MKOR step slices of sharded parameters as they step whole ones in one process."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvlib.optim.layer_shares import Job, owners_of
from tests.distributed import sharded_layers_limits as limits
from tests.distributed import sharded_layers_work as work
from tests.distributed.test_sharded_optim import require_alike
from tests.problems import error
from tests.ranks import on_ranks

WORK = "tests.distributed.sharded_layers_work:"
LIMITS = "tests.distributed.sharded_layers_limits:"


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", work.BUILDS)
def test_steps_are_those_of_one_process(name: str, size: int) -> None:
    expected = work.trained(0, 1, (name,))
    start = work.weights(work.words(1, attends=name != "mkor, means"))
    moved = [value for value in expected.values() if len(value.shape) and len(value) == len(start)]
    assert moved
    assert all(error(value, start) > 1e-3 for value in moved)
    require_alike(on_ranks(WORK + "trained", size, (name,)), expected)


def test_the_model_is_one_that_clips_and_where_settings_matter() -> None:
    ends = {name: work.trained(0, 1, (name,))[f"{name}, by_closure"] for name in work.BUILDS}
    ends.pop("mkor, means")  # of another model
    for i, (name, end) in enumerate(ends.items()):
        for other in list(ends.values())[:i]:
            assert error(end, other) > 1e-3, name


@pytest.mark.parametrize("size", [2, 3])
def test_models_that_are_cut_without_fsdp(size: int) -> None:
    require_alike(on_ranks(WORK + "cut", size), work.cut(0, 1))


@pytest.mark.parametrize("size", [2, 3])
def test_recurrent_networks_and_convolutions(size: int) -> None:
    expected = work.kinds(0, 1)
    assert all(value > 90 for name, value in expected.items() if name.endswith("kfac, covered"))
    require_alike(on_ranks(WORK + "kinds", size), expected)


@pytest.mark.parametrize("size", [2, 3])
def test_changes_that_are_not_finite_on_one_rank_are_made_on_none(size: int) -> None:
    for found in (work.overflowing(0, 1), *on_ranks(WORK + "overflowing", size)):
        assert found["unchanged"]


def test_fsdp_in_one_process() -> None:
    (found,) = on_ranks(WORK + "alone", 1)
    for name, (whole, sharded) in found.items():
        assert error(sharded, whole) < 1e-10, name


@pytest.mark.parametrize("size", [2, 3])
def test_what_freezes_and_thaws_and_steps_that_are_skipped(size: int) -> None:
    require_alike(on_ranks(WORK + "changing", size), work.changing(0, 1))


def test_states_go_on_with_any_number_of_ranks() -> None:
    expected, found = work.saved(0, 1), on_ranks(WORK + "saved", 2)
    ends = {name: value["end"] for name, value in expected.items()}
    require_alike([{name: f[name]["end"] for name in ends} for f in found], ends)
    require_alike([work.resumed(0, 1, found[0])], ends)
    require_alike(on_ranks(WORK + "resumed", 3, expected), ends)


def test_distributed_checkpoints_go_on_with_any_number_of_ranks(tmp_path: Path) -> None:
    expected = work.saved(0, 1)
    run, folder = WORK + "checkpointed", str(tmp_path)
    ends = {name: value["end"] for name, value in expected.items()}
    require_alike(on_ranks(run, 2, folder, True), ends)
    require_alike(on_ranks(run, 3, folder, False), ends)
    require_alike(on_ranks(run, 2, folder, False), ends)
    require_alike([work.checkpointed(0, 1, folder, False)], ends)


def test_what_steps_send() -> None:
    for found in on_ranks(LIMITS + "sent", 2):
        # half of the slices to the other rank, and half of the other's back; in sums, whether all
        # is finite, and inner products
        assert found["kfac"] == ([0.5, 0.5], [1, 20])
        # whether gradients are finite, and whether changes are
        assert found["mkor"] == ([0.5, 0.5], [1, 1])


def test_layers_are_divided_among_ranks() -> None:
    found = on_ranks(LIMITS + "held", 2)
    assert found[0]["jobs"] == [8, 10]  # the last is as large as eight others
    assert found[1]["jobs"] == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    assert [of["held"] for of in found] == [64 * 8 + 64 + 72, 9 * 72]


@given(st.data())
def test_what_shares_a_parameter_is_one_ranks(data: st.DataObject) -> None:
    keys = st.lists(st.integers(0, 12), min_size=1, max_size=3)
    costs = st.floats(0.1, 10.0)
    pairs = data.draw(st.lists(st.tuples(keys, costs), max_size=12))
    ranks = data.draw(st.integers(1, 4))
    jobs = [Job(tuple(own), cost) for own, cost in pairs]
    owners = owners_of(jobs, ranks)
    assert len(owners) == len(jobs)
    assert {*owners} <= {*range(ranks)}
    for (one, a), (other, b) in itertools.combinations(zip(jobs, owners, strict=True), 2):
        assert a == b or not {*one.keys} & {*other.keys}
    if len({key for job in jobs for key in job.keys}) == sum(len(job.keys) for job in jobs):
        loads = [
            sum(j.cost for j, o in zip(jobs, owners, strict=True) if o == r) for r in range(ranks)
        ]
        assert max(loads) <= sum(loads) / ranks + max((j.cost for j in jobs), default=0.0)


def test_mixed_precision_of_fsdp() -> None:
    expected = limits.mixed(0, 1)
    for found in on_ranks(LIMITS + "mixed", 2):
        for name, value in expected.items():
            assert torch.isfinite(found[name]).all()
            if name != "mkor":  # whose signs depend on every bit
                assert 0.0 < error(found[name], value) < 0.02, name


REFUSED = {
    "hybrid": "lies on a mesh of 2 dimensions .*no HSDP",
    "parallel": "module '0' is tensor-parallel",
    "beside": r"parameter \d is whole on every rank beside sharded ones",
    "gathered": r"parameter \d is whole on every rank beside sharded ones.*model.reshard\(\)",
    "late": "is whole on every rank beside sharded ones",
    "foreign": "spread over ranks",
    "other state": "the state of parameter 0 is spread over ranks",
}


def test_what_is_not_followed_is_refused_on_all_ranks() -> None:
    expected = {
        f"{method}, {case}": t for method in ("kfac", "mkor") for case, t in REFUSED.items()
    }
    expected["unfollowed"] = "parameter 0 is a DTensor, and Plain needs it whole"
    for found in on_ranks(LIMITS + "refusals", 2):
        assert found.keys() == expected.keys()
        for name, text in expected.items():
            with pytest.raises(Exception, match=text):
                raise ValueError(found[name])
