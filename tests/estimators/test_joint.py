"""Many answers from the same products: that they agree with each other and with single calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from curvlib.core.operator import LinearOperator
from curvlib.core.result import Result
from curvlib.core.space import ParamSpace
from curvlib.estimators.diagonal import diagonal
from curvlib.estimators.frobenius import frobenius_norm
from curvlib.estimators.intervals import mean_interval
from curvlib.estimators.joint import Estimate, estimate
from curvlib.estimators.trace import trace
from tests.estimators.small import columnwise, interrupted, killed, matrix, operator, same

EVERYTHING = ("trace", "diagonal", "frobenius", "layers")


def quick(op: Any, of: Any = EVERYTHING, **changes: Any) -> Estimate:
    return estimate(op, of, progress=False, **changes)


def network() -> tuple[LinearOperator, torch.Tensor, ParamSpace]:
    """A matrix that is indexed by the parameters of a small network."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 4))
    space = ParamSpace.of(model.double())
    A = matrix(torch.linspace(-1.0, 3.0, space.size) ** 3)
    op = columnwise(A)
    op.space = space
    return op, A, space


@pytest.mark.parametrize("law", ["rademacher", "gaussian", "sphere"])
def test_the_answers_are_those_of_single_calls(law: str) -> None:
    op, _, _ = network()
    settings = {"law": law, "probes": 20, "seed": 2, "progress": False}
    joint = estimate(op, EVERYTHING, **settings)
    single = trace(op, method="hutchinson", **settings)
    assert joint.trace == pytest.approx(single.value, rel=1e-13)
    assert joint.trace_stderr == pytest.approx(single.stderr, rel=1e-12)
    assert joint.interval["trace"] == pytest.approx(single.interval, rel=1e-12)
    norm = frobenius_norm(op, method="hutchinson", **settings)
    assert joint.squared_frobenius == norm.squared
    assert joint.frobenius == norm.value
    assert joint.frobenius_stderr == norm.stderr
    assert joint.interval["frobenius"] == norm.interval
    entries = diagonal(op, method="hutchinson", **settings)
    assert joint.diagonal is not None
    assert torch.equal(joint.diagonal, entries.value)
    assert torch.equal(joint.interval["diagonal"][0], entries.interval[0])
    same(joint.block_means("kernels"), entries.block_means("kernels"))
    assert joint.products == 20


def test_layers_sum_to_the_trace() -> None:
    op, A, space = network()
    for law in ("rademacher", "gaussian"):
        joint = quick(op, law=law, probes=16)
        assert sum(joint.layers.values()) == joint.trace
        assert torch.allclose(joint.layer_traces.sum(1), joint.traces, rtol=1e-13)
    assert joint.layers.keys() == space.layers().keys() == joint.interval["layers"].keys()
    assert joint.interval["layers"]["1"] == mean_interval(joint.layer_traces[:, 1])
    joint = quick(op, probes=4000, block=500)
    start = 0
    for layer, names in space.layers().items():
        size = sum(space.sizes[space.names.index(n)] for n in names)
        truth = float(A.diagonal()[start : start + size].sum())
        assert abs(joint.layers[layer] - truth) < 4 * joint.layers_stderr[layer]
        start += size


def test_with_rademacher_probes_the_diagonal_sums_to_the_trace() -> None:
    op, _, _ = network()
    joint = quick(op, probes=7)
    assert joint.diagonal is not None
    assert float(joint.diagonal.sum()) == pytest.approx(joint.trace, rel=1e-12)


def test_only_what_was_asked_for() -> None:
    op, _, _ = network()
    joint = quick(op, "trace", probes=5)
    assert joint.value.keys() == joint.stderr.keys() == joint.interval.keys() == {"trace"}
    assert joint.diagonal is None
    assert joint.frobenius is None
    assert repr(joint).startswith("Estimate(trace=")
    joint = quick(op, ["layers", "diagonal"], probes=5)
    assert joint.value.keys() == {"diagonal", "layers"}
    assert joint.stderr.keys() == joint.interval.keys() == {"diagonal", "layers"}
    assert quick(torch.eye(5), ["frobenius"], probes=3).value == {"frobenius": 5**0.5}


def test_tolerance_waits_for_everything() -> None:
    op = operator(matrix(torch.linspace(1.0, 2.0, 60)))
    loose = quick(op, "trace", tolerance=0.05)
    both = quick(op, ["trace", "diagonal"], tolerance=0.05, max_products=5000)
    assert loose.converged
    assert both.converged
    assert loose.products < both.products
    assert both.diagonal is not None
    assert both.diagonal_stderr is not None
    norms = [float(torch.linalg.vector_norm(x)) for x in (both.diagonal_stderr, both.diagonal)]
    assert norms[0] <= 0.05 * norms[1]
    assert not quick(op, ["trace", "frobenius"], tolerance=1e-9, probes=None).converged


def test_blocks_of_probes_change_nothing() -> None:
    op, _, _ = network()
    whole = quick(op, probes=19, block=64)
    for block in (1, 5):
        same(quick(op, probes=19, block=block), whole)


def test_a_nan_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    def call(op: LinearOperator, **changes: Any) -> Estimate:
        return quick(op, EVERYTHING[:3], probes=24, block=4, law="sphere", **changes)

    interrupted(call, matrix(0.8 ** torch.arange(60)), tmp_path / "c")


def test_kill_9_resumes_bitwise(tmp_path: Path) -> None:
    expression = "estimate(op, probes=40, block=4, checkpoint=path, save_every=0, progress=seen)"
    result = killed(expression, tmp_path / "c", psd=False)
    straight = quick(operator(matrix(0.8 ** torch.arange(90))), EVERYTHING[:3], probes=40, block=4)
    same(result, straight)


def test_results_are_kept(tmp_path: Path) -> None:
    op, _, _ = network()
    result = quick(op, probes=9)
    loaded = Result.load(result.save(tmp_path / "e.safetensors"))
    assert isinstance(loaded, Estimate)
    same(loaded, result)
    assert loaded.interval["layers"] == result.interval["layers"]


def test_misuse_is_named() -> None:
    op = operator(torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="of= is empty; there are trace, diagonal"):
        quick(op, [])
    with pytest.raises(ValueError, match="unknown quantity 'rank'; there are trace"):
        quick(op, ["rank"])
    with pytest.raises(ValueError, match="is not indexed by parameters, so it has no layers"):
        quick(op, ["layers"])
    with pytest.raises(ValueError, match="this estimate has no diagonal; pass of="):
        quick(op, ["trace"]).block_means()
    with pytest.raises(ValueError, match="unknown law"):
        quick(op, ["trace"], law="cauchy")
    with pytest.raises(ValueError, match="expected a symmetric operator"):
        quick(torch.ones(3, 3).triu(), ["trace"])
    with pytest.raises(ValueError, match="expected max_products >= 1, got 0"):
        quick(op, ["trace"], max_products=0)
