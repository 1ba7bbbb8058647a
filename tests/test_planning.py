"""Plans against what runs really do: operations, tensors, and the memory of a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import curvlib as cl
from curvlib.core.allocations import Allocations
from curvlib.core.files import read_record
from curvlib.core.plan import Ranks
from curvlib.core.product_cost import HEADER, ProductCost
from curvlib.core.ranks.group import Group
from curvlib.estimators import plan as phases
from curvlib.operators.measured_product import measured_gradient, measured_product
from curvlib.operators.windows.plan import window_phases
from curvlib.operators.windows.window import Window
from curvlib.planning import KNOBS, planned, planner, what_fits

MAKES = {"hessian": cl.hessian, "ggn": cl.ggn, "fisher": lambda r: cl.fisher(r, "mc")}
ONE = Ranks()
P = 100_000
RIGHT = torch.randn(P, 3, generator=torch.Generator().manual_seed(0))


def problem(streamed=False, n=512, batch=128, width=64, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 4)).to(dtype)
    x = torch.randn(n, 32, generator=draw).to(dtype)
    y = torch.randint(4, (n,), generator=draw)
    if streamed:
        return cl.Risk(
            model, nn.CrossEntropyLoss(), DataLoader(TensorDataset(x, y), batch_size=batch)
        )
    held = [(x[i : i + batch], y[i : i + batch]) for i in range(0, n, batch)]
    return cl.Risk(model, nn.CrossEntropyLoss(), held)


def diagonal_operator(psd=True, size=P, dtype=torch.float32):
    """An operator whose product takes nothing but its result, and its cost."""
    entries = torch.linspace(1, 0, size, dtype=dtype) ** 8
    op = cl.LinearOperator(
        lambda V: (V.T * entries).T, (size, size), dtype=dtype, symmetric=True, psd=psd
    )
    vector = float(size * dtype.itemsize)
    cost = ProductCost(
        size=size,
        vector=vector,
        parameters=vector,
        layer=vector,
        total=1,
        examples=1,
        flops=0.0,
        second=0.0,
        further=0.0,
        again=0.0,
        graph=0.0,
        budget=0.0,
        working=vector,
        pair=vector,
        column=vector,
    )
    return op, cost


def flops_of(call):
    with FlopCounterMode(display=False) as counter:
        out = call()
    return counter.get_total_flops(), out


# ------------------------------------------------------------------------- products
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_work_of_products_is_what_pytorch_counts(make, streamed):
    risk = problem(streamed)
    cost, op = measured_product(make, risk), make(risk)
    V = torch.ones(6, risk.space.size).T
    first, _ = flops_of(lambda: op @ V[:, :1])
    assert first == cost.work(ONE, 1)
    second, _ = flops_of(lambda: op @ V[:, :1])
    assert second == cost.work(ONE, 1, warm=True)
    two, _ = flops_of(lambda: op @ V[:, :2])
    assert two == cost.work(ONE, 1, 2, warm=True)
    many, _ = flops_of(lambda: op @ V)
    assert 0.99 < cost.work(ONE, 1, 6, warm=True) / many < 1.01


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_graphs_are_those_that_are_kept(make):
    risk = problem(width=256)  # parameters are compared by a sketch
    cost, op = measured_product(make, risk), make(risk)
    with Allocations() as memory:
        product = op @ torch.ones(risk.space.size, 1)
        left = memory.live - product.nbytes
    assert 0.98 < cost.graphs(ONE) / left < 1.05
    streamed = measured_product(make, problem(streamed=True))
    assert streamed.graphs(ONE) == 0.0
    assert streamed.flops == streamed.again


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("columns", [1, 6])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_memory_of_products_is_that_of_their_tensors(make, columns, streamed):
    risk = problem(streamed)
    cost, op = measured_product(make, risk), make(risk)
    V = torch.ones(columns, risk.space.size).T
    op @ V
    with Allocations() as memory:
        op @ V
    assert 0.8 < cost.memory(ONE, columns) / memory.peak < 1.3


def test_smaller_batches_are_measured_alike():
    large, small = problem(batch=256, width=256), problem(batch=64, width=256)
    told = measured_product(cl.hessian, large).with_batches_of(64)
    found = measured_product(cl.hessian, small)
    assert told.batches(ONE) == found.batches(ONE) == 8
    assert told.flops == found.flops
    for name in ("working", "graph", "column"):
        assert 0.8 < getattr(told, name) / getattr(found, name) < 1.25


def test_gradients():
    risk = problem(streamed=True)
    cost = measured_gradient(risk)
    counted, _ = flops_of(risk.gradient)
    assert cost.flops == counted
    with Allocations() as memory:
        risk.gradient()
    assert 0.8 < cost.memory(ONE) / memory.peak < 1.25


def test_the_measurement_leaves_no_trace(rng_untouched):
    risk = problem()
    before = [p.clone() for p in risk.params.values()]
    measured_product(cl.hessian, risk)
    assert all(torch.equal(a, b) for a, b in zip(before, risk.params.values(), strict=True))
    assert all(p.grad is None for p in risk.params.values())


def test_data_that_does_not_say_how_much_it_is():
    risk = problem()
    batches = risk.in_memory

    class Stream:
        def __iter__(self):
            return iter(batches)

    stream = cl.Risk(risk.model, nn.CrossEntropyLoss(), Stream())
    with pytest.raises(ValueError, match="does not say how many examples it has; pass examples="):
        measured_product(cl.hessian, stream)
    assert planned(stream, "trace", examples=512).total > 0
    with pytest.raises(ValueError, match="the data has no batch, so that nothing can be measured"):
        measured_product(cl.hessian, cl.Risk(risk.model, nn.CrossEntropyLoss(), []))


class Counted(Group):
    """Two ranks of which the other one says what this one does; counts what is sent."""

    log: list[int] = []  # noqa: RUF012 (one test, one list)

    def add(self, tensor):
        self.log.append(tensor.nbytes)
        return tensor.mul_(2)

    def numbers(self, values):
        self.log.append(-8 * len(values))
        return [list(values)] * 2


def test_traffic_of_products_is_what_is_sent():
    risk = problem()
    cost = measured_product(cl.hessian, risk)
    risk.group = Counted(None, 0, 2, torch.device("cpu"))
    risk.noticed_copies = True
    Counted.log.clear()
    cl.hessian(risk) @ torch.ones(risk.space.size, 3)
    summed = sum(n for n in Counted.log if n > 0)
    headers = -sum(n for n in Counted.log if n < 0)
    assert summed == 3 * risk.space.size * 4
    assert cost.traffic(Ranks(2), 3) == 2 * (1 / 2) * summed + headers


# ------------------------------------------------------------------------ estimates
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_of_bases_are_those_of_the_states(tmp_path, dtype):
    op, cost = diagonal_operator(size=3000, dtype=dtype)
    product = 1e7  # more than all else that is needed for a while
    cost = ProductCost(**{**vars(cost), "working": product, "pair": 0.0, "column": 0.0})
    saved = tmp_path / "state.safetensors"

    def rows(name):
        return read_record(saved)[1]["state"][name].nbytes

    for block in (1, 3):
        pairs = cl.eigenpairs(
            op, 7, block=block, max_products=40, tolerance=0.1, checkpoint=saved, progress=False
        )
        phase = phases.eigenpairs_phase(op, cost, ONE, k=7, block=block)
        assert phase.kept == pairs.vectors.nbytes
        assert phase.kept + phase.working == rows("rows") + product + 2 * cost.vector
        saved.unlink()
    cl.density(op, steps=9, probes=3, checkpoint=saved, progress=False)
    phase = phases.density_phase(op, cost, ONE, steps=9, probes=3)
    assert phase.working == rows("basis") + product + 2 * cost.vector


MEASURED = {
    "eigenpairs": (
        lambda op: cl.eigenpairs(op, 5, max_products=60, tolerance=1e-2, progress=False),
        lambda *own: phases.eigenpairs_phase(*own, k=5),
    ),
    "eigenpairs in blocks": (
        lambda op: cl.eigenpairs(op, 20, block=4, max_products=90, tolerance=0.1, progress=False),
        lambda *own: phases.eigenpairs_phase(*own, k=20, block=4),
    ),
    "density": (
        lambda op: cl.density(op, steps=20, probes=2, progress=False),
        lambda *own: phases.density_phase(*own, steps=20, probes=2),
    ),
    **{
        f"trace {method}": (
            lambda op, method=method: cl.trace(op, method=method, max_products=60, progress=False),
            lambda *own, method=method: phases.trace_phase(*own, method=method, products=60),
        )
        for method in ("hutchinson", "hutch++", "xtrace", "xnystrace")
    },
    **{
        f"diagonal {method}": (
            lambda op, m=method: cl.diagonal(op, method=m, max_products=60, progress=False),
            lambda *own, m=method: phases.diagonal_phase(*own, method=m, products=60),
        )
        for method in ("hutchinson", "xdiag", "xnysdiag")
    },
    **{
        f"solve {method}": (
            lambda op, method=method, more=more: cl.solve(
                op, RIGHT, method=method, damping=1e-3, max_products=300, progress=False, **more
            ),
            lambda *own, method=method: phases.solve_phase(*own, columns=3, method=method),
        )
        for method, more in (("cg", {}), ("minres", {}), ("neumann", {"scale": 0.5}))
    },
}


@pytest.mark.parametrize(("call", "phase"), MEASURED.values(), ids=MEASURED)
@pytest.mark.filterwarnings("ignore:.*did not converge.*:RuntimeWarning")
def test_memory_of_estimates_is_that_of_their_tensors(call, phase):
    op, cost = diagonal_operator()
    with Allocations() as memory:
        out = call(op)
        left = memory.live
    found = phase(op, cost, ONE)
    del out
    assert 0.93 < (found.kept + found.working) / memory.peak < 1.12
    assert abs(left - found.kept) < 0.3 * cost.vector


def test_what_is_chosen_by_default_is_what_is_planned():
    for psd, method in ((True, "xnysdiag"), (False, "xdiag")):
        op, cost = diagonal_operator(psd)
        assert phases.diagonal_phase(op, cost, ONE) == phases.diagonal_phase(
            op, cost, ONE, method=method, products=100
        )
        method = {"xnysdiag": "xnystrace", "xdiag": "xtrace"}[method]
        assert phases.trace_phase(op, cost, ONE) == phases.trace_phase(
            op, cost, ONE, method=method, products=100
        )
        default = "cg" if psd else "minres"
        assert phases.solve_phase(op, cost, ONE) == phases.solve_phase(
            op, cost, ONE, method=default, iterations=100
        )
    op, cost = diagonal_operator(size=50)
    few = ProductCost(**{**vars(cost), "flops": 1.0, "again": 1.0, "second": 1.0, "further": 1.0})
    assert phases.trace_phase(op, few, ONE).flops > 50  # multiplied out, whatever the budget
    with pytest.raises(ValueError, match="method= is one of 'cg', .* got 'direct'"):
        phases.solve_phase(op, cost, ONE, method="direct")


@pytest.mark.parametrize("streamed", [False, True])
def test_work_of_eigenpairs_and_density(streamed):
    """With batches so large that products are most of it (the counter sees no mv)."""
    risk = problem(streamed, n=1024, batch=1024)
    op = cl.hessian(risk)
    counted, pairs = flops_of(lambda: cl.eigenpairs(op, 2, tolerance=0.01, progress=False))
    plan = planned(risk, "eigenpairs", k=2, products=pairs.products)
    assert 0.85 < plan.total / counted < 1.2
    op = cl.hessian(risk)
    counted, _ = flops_of(lambda: cl.density(op, steps=5, probes=3, progress=False))
    assert 0.85 < planned(risk, "density", steps=5, probes=3).total / counted < 1.2


def test_ranks_share_work_and_shards_memory():
    risk = problem()
    one = planned(risk, "spectrum", k=3, memory=0)
    four = planned(risk, "spectrum", k=3, ranks=4, memory=0)
    parts = planned(risk, "spectrum", k=3, ranks=4, sharded=True)
    assert one.traffic == (0.0, 0.0)
    assert one.total / 4 < four.total < one.total  # work on Krylov vectors is not shared
    assert four.kept == one.kept
    assert parts.kept[0] == one.kept[0] / 4
    assert parts.peak < four.peak
    assert all(sent > 0 for sent in (*four.traffic, *parts.traffic))
    vector = risk.space.size * 4
    products = 26 + 3 // 3  # a basis filled, and one block of three residuals
    each = 2 * 3 / 4 * vector + 3 * HEADER
    assert four.traffic[0] == pytest.approx(26 * each + 2 * 3 / 4 * 3 * vector + 3 * HEADER)
    assert products == 27


# ------------------------------------------------------------- windows, fits, names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bytes_of_windows(dtype):
    risk = problem()
    plan = planned(risk, "mfac", size=9, dtype=dtype)
    assert plan.phases == ("window", "row", "direction")
    assert plan.kept[0] == Window(risk.space.size, 9, dtype=dtype).nbytes
    sizes = [p.numel() for p in risk.params.values()]
    parts = planned(risk, "mfac", size=9, dtype=dtype, parts=4)
    assert parts.kept[0] == Window(risk.space.size, 9, dtype=dtype, parts=sizes).nbytes
    elsewhere = planned(risk, "mfac", size=9, dtype=dtype, storage="cpu")
    assert elsewhere.kept[0] == 8 * 9**2


def test_traffic_of_windows():
    """Sharded, a direction takes one all-reduce of a number for each row."""
    cost = measured_gradient(problem())
    ranks = Ranks(4, sharded=True)
    window, row, direction = window_phases(cost, ranks, size=16)
    assert window.kept == 16 * cost.vector / 4 + 8 * 16**2
    assert direction.traffic == 2 * 3 / 4 * 8 * 16
    assert row.traffic == 3 / 4 * (2 * cost.parameters + cost.vector) + 2 * 3 / 4 * 8 * 16
    _, row, direction = window_phases(cost, Ranks(4), size=16)
    assert direction.traffic == 0.0
    assert row.traffic == 2 * 3 / 4 * cost.vector + 3 * HEADER


def test_fits_of_ranks():
    risk = problem()
    one, four = planned(risk, "kfac"), planned(risk, "kfac", ranks=4)
    parts = planned(risk, "kfac", ranks=4, sharded=True)
    assert one.phases == ("factors", "eigenvectors", "eigenvalues")
    assert four.flops == (one.flops[0] / 4, one.flops[1], one.flops[2] / 4)
    assert four.kept == one.kept
    factors = sum(a**2 + b**2 for a, b in ((64, 33), (4, 65))) * 4
    assert four.traffic == (1.5 * factors, 0.0, 1.5 * risk.space.size * 4)
    assert parts.kept == tuple(size / 4 for size in one.kept)
    assert parts.flops[1] == one.flops[1] / 4
    # parameters forward and for each of 4 outputs backward, for each batch; one round of directions
    values, batches = risk.space.size * 4, 1
    gathered = batches * 5 * values
    bases = factors / 4 * (4 + 8)  # bases in float32, and the factors that they are of in float64
    expected = (gathered + batches * factors, bases / 4, gathered + batches * (factors + values))
    assert parts.traffic == pytest.approx([0.75 * sent for sent in expected])
    K = cl.kfac(risk, progress=False)
    held = [t for b in K.blocks_of.values() for t in (b.left, b.right, b.eigenvalues)]
    assert sum(one.kept) == sum(t.nbytes for t in held if t is not None)


def test_influence_of_ranks():
    risk = problem()
    one, four = (planned(risk, "influence", queries=8, ranks=r) for r in (1, 4))
    parts = planned(risk, "influence", queries=8, ranks=4, sharded=True)
    assert repr(one) == repr(cl.influence.planned(risk, 8))
    assert four.flops[-1] == one.flops[-1] / 4
    assert parts.kept[3] == one.kept[3] / 4
    directions = 8 * risk.space.size * 4
    assert four.traffic[-2:] == (0.75 * directions, 3 * 8 * 100 * (8 + 4))
    assert parts.traffic[-1] > four.traffic[-1]
    # parameters forward and backward, bases and eigenvalues, once for the batch of queries
    gathered = (3 * risk.space.size + sum(a**2 + b**2 for a, b in ((64, 33), (4, 65)))) * 4
    assert parts.traffic[3] == 0.75 * gathered


SETTINGS = {
    "spectrum": {"k": 30},
    "eigenpairs": {"k": 30},
    "density": {"steps": 64, "probes": 4},
    "trace": {"products": 200},
    "diagonal": {"products": 200},
    "solve": {"columns": 20},
    "mfac": {"size": 200},
    "kfac": {},
    "influence": {"queries": 40},
}


@pytest.mark.parametrize("what", SETTINGS)
def test_what_is_said_to_fit_does(what):
    assert SETTINGS.keys() == KNOBS.keys()
    risk, settings = problem(streamed=True, batch=512), SETTINGS[what]
    make = planner(risk, what)
    available = 0.5 * make(**settings).peak
    ways = what_fits(make, what, settings, available)
    assert ways
    for way in ways:
        assert make(**{**settings, **way}).peak <= available
        if len(way) == 1:
            ((name, value),) = way.items()
            if type(value) is int and value:
                assert make(**{**settings, name: value + 1}).peak > available
    if what == "spectrum":
        several = what_fits(make, what, settings, 0.35 * make(**settings).peak)
        assert len(several[0]) > 1  # no single one: all are lowered
    assert what_fits(make, what, settings, 1.0) == []


def test_unknown_computations():
    with pytest.raises(ValueError, match="there are plans of 'spectrum', .* not of 'speed'"):
        planned(problem(), "speed")


RUN = """
import resource, sys
import torch
from torch import nn
import curvlib as cl
from curvlib.planning import planned

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 10))
x, y = torch.randn(800, 500), torch.randint(10, (800,))
data = [(x[i : i + 200], y[i : i + 200]) for i in range(0, 800, 200)]
risk = cl.Risk(model, nn.CrossEntropyLoss(), data)
plan = planned(risk, "spectrum", k=8, steps=16)
small = cl.Risk(nn.Linear(2, 2), nn.CrossEntropyLoss(), (torch.ones(3, 2), torch.arange(3) % 2))
pairs = cl.eigenpairs(cl.hessian(small), 2, progress=False)
cl.density(cl.hessian(small), deflate=pairs, progress=False)  # code is loaded


def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = resident("VmRSS")
op = cl.hessian(risk)
pairs = cl.eigenpairs(op, 8, max_products=48, tolerance=1e-4, progress=False)
cl.density(op, steps=16, deflate=pairs, progress=False)
print(plan.peak, resident("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_the_peak_of_a_process():
    """Of a spectrum, graphs and all: within a quarter of the resident memory that it adds."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        check=True,
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    told, found = map(float, done.stdout.split())
    assert 0.8 < told / found < 1.25, (told, found)
