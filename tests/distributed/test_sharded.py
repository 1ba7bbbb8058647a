"""What processes with sharded parameters compute equals what one process computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import curvlib as cl
from curvlib.core.plan import Ranks
from curvlib.core.product_cost import ProductCost
from curvlib.estimators.plan import diagonal_phase, trace_phase
from curvlib.estimators.trace import METHODS
from tests.distributed import sharded_work as work
from tests.problems import error
from tests.ranks import Pool, on_ranks

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
@pytest.mark.parametrize("what", ["sketches", "solvers"])
def test_sketches_are_those_of_one_process(what: str, size: int) -> None:
    expected = getattr(work, what)(0, 1)
    found = on_ranks(WORK + what, size)
    for name, value in expected.items():
        assert error(found[0][name].double(), value.double()) < 1e-10, name
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), name


@pytest.mark.parametrize("size", [2, 3])
def test_factors_of_spread_blocks(size: int) -> None:
    ranks = on_ranks(WORK + "factors", size)
    for name, (rows, Q, R) in ranks[0].items():
        assert float((Q @ Q.mT - torch.eye(6)).abs().max()) < 1e-14, name
        assert error(R.mT @ Q, rows) < 1e-14 or float((R.mT @ Q - rows).abs().max()) < 1e-14, name
        assert torch.equal(R, R.triu())
        assert all(torch.equal(other[name][1], Q) for other in ranks[1:])


def test_sums_over_ranks_are_as_planned() -> None:
    found = on_ranks(WORK + "sums", 2)[0]
    none = ProductCost(360, 2880, 2880, 2880, 1, 1, *9 * [0.0], gathers=(0.0, 0.0), moves=0.0)
    ranks = Ranks(2, sharded=True)
    op = cl.Diagonal(torch.ones(360, dtype=torch.float64))
    for method, numbers in found.items():
        phase = trace_phase if method in METHODS else diagonal_phase
        planned = phase(op, none, ranks, method=method, products=60).traffic
        assert 0.7 < planned / (8 * sum(numbers)) < 1.4, (method, planned / 8, sum(numbers))


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


def test_products_of_awkward_models_are_those_of_one_process() -> None:
    for found in on_ranks(WORK + "awkward", 2, work.AWKWARD):
        assert found.keys() == set(work.AWKWARD)
        for name, errors in found.items():
            assert max(errors) < 1e-10, (name, errors)


def test_a_risk_follows_training() -> None:
    for found in on_ranks(WORK + "trained", 2):
        sharded, whole = found[:3], found[3:]
        assert abs(whole[0] - whole[1]) > 0.01
        assert sharded == pytest.approx(whole, abs=1e-12)


def test_no_rank_holds_a_whole_vector_and_the_model_is_left_as_found() -> None:
    for found in on_ranks(WORK + "footprint", 2):
        assert found["rows"] == found["own"] <= found["total"] / 2
        assert found["longest"] == found["rows"]
        assert found["gathered"] > 20
        assert found["alive"] == 0
        assert found["same"]
        assert found["trains"]
        sent = found["sent"]
        assert sent["gradient"] <= 3, sent
        assert sent["hessian"] <= 7, sent
        assert sent["hessian of 4"] <= 5 + 2 * 4, sent
        assert sent["ggn"] <= 8, sent


REFUSED = {
    "whole": "this function needs whole vectors",
    "preconditioner": "one that is made with spread=op.spread",
    "combined": "spread over processes differently with '+'",
    "angle": "expected operators whose vectors are on the same processes",
    "low rank": "are spread over 2 processes, of which each knows its rows only",
    "own rows": "rows of values, got [",
    "own numbers": "of 53 entries of values are NaN or infinite",
    "singular": "is singular: ",
    "not positive": "the least is -0.5; pass damping > 1",
    "no power": "eigenvalues are negative, the least is -1;",
    "trained through": "TypeError: products of <Hessian",
    "compiled hessian": "compile= needs them whole",
    "compiled ggn": "compile= needs them whole",
    "head": "a loss that owns the head of the model needs them whole",
    "hybrid": "lies on a mesh of 2 dimensions (1, 2); shard over all ranks along one (no HSDP",
    "differentiable": "TypeError: products of <Hessian",
    "gather": "expected this rank's rows",
    "scatter": "expected a whole vector [53]",
    "gradients": "this function needs them whole",
    "accuracy": "this function needs them whole",
    "jacobian": "this function needs them whole",
    "mfac": "this function needs them whole",
    "check": "load the parameters into a model without fully_shard",
    "alone": "the parameters are sharded",
    "group": "is spread over ranks [0, 1], and the data over ranks [",
    "parts": "has one part, of this process's",
    "block_size": "leave block_size= out",
    "window of a space": "make the window with curvlib.mfac_window",
    "window's file": "save each process's state_dict() to a file of its own",
    "prune": "pruning needs them whole",
    "rates": "this measurement needs them whole",
    "refined": "refined needs them whole",
    "replicated": "has the placement R; Shard(dim) over all ranks is expected",
    "two dimensions": "lies on a mesh of 2 dimensions (2, 1)",
    "some whole": "is whole on every rank beside sharded ones; leave it out with params=",
    "buffer": "the buffer 'scale' of '' is a DTensor",
    "tensor parallel": "is tensor-parallel (parallelize_module)",
    "replaced": "RuntimeError: parameter '3.bias' was replaced",
    "once": "where products J v need a second derivative",
    "not finite": "FloatingPointError: the sum over the batches of all ranks is not finite",
    "value not finite": "FloatingPointError: the sum over the batches of all ranks is not finite",
    "broken data": "OSError: the disk is gone",
}


def test_what_is_not_followed_is_refused_on_all_ranks() -> None:
    plain = {"differentiable", "gather", "scatter", "replaced", "once", "not finite", "broken data"}
    plain |= {"value not finite", "preconditioner", "angle", "low rank", "own rows", "own numbers"}
    plain |= {"singular", "not positive", "no power", "trained through"}
    for found in on_ranks(WORK + "refusals", 2):
        assert found.keys() == REFUSED.keys()
        for name, text in REFUSED.items():
            assert text in found[name], (name, found[name])
            told = ("a sharding that curvlib cannot follow", "spread over processes differently")
            assert name in plain or any(t in found[name] for t in told), (name, found[name])


def test_runs_go_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("whole", "two", "three", "one")}
    for folder in folders.values():
        folder.mkdir()
    expected = work.resumed(0, 1, str(folders["whole"]), 0, True)
    resumed = WORK + "resumed"
    assert on_ranks(resumed, 2, str(folders["two"]), 3, True) == [{}, {}]
    files = [p.name for p in folders["two"].iterdir() if p.name.startswith("pairs")]
    assert len(files) == 3, files  # older rows are removed
    work.resumed(0, 1, str(folders["one"]), 3)
    on_ranks(resumed, 3, str(folders["three"]), 2)
    answers = {
        "2 to 3": on_ranks(resumed, 3, str(folders["two"]), 0, True)[0],
        "3 to 1": work.resumed(0, 1, str(folders["three"]), 0),
        "1 to 2": on_ranks(resumed, 2, str(folders["one"]), 0)[0],
        "again": on_ranks(resumed, 2, str(folders["two"]), 0)[1],
        "3 to 1 again": work.resumed(0, 1, str(folders["two"]), 0, True),
    }
    for which, found in answers.items():
        for name, value in found.items():
            assert error(value, expected[name]) < 1e-6, (which, name)
    assert answers["2 to 3"].keys() == expected.keys()
    rows = next(p for p in folders["one"].iterdir() if p.name.startswith("pairs."))
    rows.unlink()
    with pytest.raises(ValueError, match="absent or damaged.*all processes have to see one folder"):
        work.resumed(0, 1, str(folders["one"]), 0)


@pytest.mark.parametrize("size", [2, 3])
def test_a_failure_within_a_pass_is_everybodys_at_once(size: int) -> None:
    own = {
        "forward": "LookupError: no such word",
        "value": "LookupError: no such word",
        "backward": "RuntimeError: no derivative here",
        "second derivative": "cannot be differentiated again: no derivative here",
        "weight": "ValueError: weight= returned -1.0",
        "everywhere": "LookupError: no such word on rank",
        "replaced": "RuntimeError: parameter '3.bias' was replaced",
    }
    *others, failed = on_ranks(WORK + "told", size)
    for name, text in own.items():
        assert text in failed[name], (name, failed[name])
        for found in others:
            said = "" if name == "everywhere" else f"rank {size - 1} of {size} failed in a pass"
            assert said in found[name], (name, found[name])
            assert text.split(": ")[-1] in found[name], (name, found[name])
            assert found[name + " seconds"] < 30.0, name


def test_runs_that_fail_go_on_from_the_last_step(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "ranks"
    whole.mkdir()
    folder.mkdir()
    expected = work.interrupted(0, 1, str(whole), False)
    on_ranks(WORK + "interrupted", 2, str(folder), True)
    assert (folder / "xtrace.stopped").is_file()
    torn = next(folder.glob("xdiag.*-1of2"))
    torn.unlink()  # this run begins anew
    found = on_ranks(WORK + "interrupted", 3, str(folder), False)[0]
    for name, value in expected.items():
        if "products" in name:
            again = 0 if name.startswith("xdiag") else 2 if "x" in name else 3
            assert found[name] == value - again, (name, found[name], value)
        else:
            assert error(found[name], value) < 1e-9, name
    assert not list(folder.glob("*.stopped"))


def test_a_rank_that_is_gone_ends_the_others() -> None:
    pool = Pool(2)
    try:
        pool.start(WORK + "left_alone", ())
        said = [process.stdout.readline().strip() for process in pool.processes if process.stdout]
        told = torch.load(pool.folder / "1.1.pt", weights_only=False)
    finally:
        pool.close()
    assert said[0] == ""
    assert "NoAnswerError: rank 1 of 2 got no answer in a gathering of a sharded tensor" in told
