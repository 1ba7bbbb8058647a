"""Plans against numbers written out, PyTorch's own count of operations, and actual tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import curvlib as cl
from curvlib.core.plan import Plan
from curvlib.core.result import Result
from curvlib.influence.influence import Influence
from curvlib.influence.plan import plan, planned
from curvlib.influence.queries import Queries, query_risk
from curvlib.operators.layers.shapes import LayerShape, layer_shapes
from curvlib.operators.scores.example_scores import example_scores
from curvlib.operators.scores.known_examples import known_examples

LAYER = LayerShape("a", groups=2, outputs=6, inputs=5, rows=3)


class Flat(nn.Module):
    """A network for each token; its outputs come with tokens in the first axis."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x).flatten(0, 1)


def tokens(depth=5, width=24, classes=12, n=32, t=6, batch=8):
    """Layers of one width, so that what the first one is spared is little."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential()
        for _ in range(depth):
            body += nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh())
        model = Flat(body.append(nn.Linear(width, classes)))
        x, y = torch.randn(n, t, width), torch.randint(classes, (n * t,))
    data = [(x[i : i + batch], y[i * t : (i + batch) * t]) for i in range(0, n, batch)]
    return model, nn.CrossEntropyLoss(), data


def counted(call):
    with FlopCounterMode(display=False) as counter:
        out = call()
    return counter.get_total_flops(), out


def phases(found):
    return {
        name: (flops, kept)
        for name, flops, kept in zip(found.phases, found.flops, found.kept, strict=True)
    }


def test_work_is_the_formulas_written_out():
    found = phases(plan([LAYER], examples=7, queries=3, batch_size=2, backward_passes=4))
    once = 2 * 3 * 2 * 6 * 5  # 2 T G O I
    assert found["factors"][0] == 7 * (5 * once + 2 * 3 * 2 * (4 * 36 + 25))
    assert found["eigenvectors"][0] == 9 * 2 * (216 + 125)
    # T (T + 1) O I < 2 T O I + ... : pairs, after rotations of 4 gradients and one input
    squares = 2 * (2 * 3 * (4 * 36 + 25) + 4 * 3 * 4 * 30)
    assert found["eigenvalues"][0] == 7 * (5 * once + squares)
    assert found["queries"][0] == 3 * (3 * once + 4 * 60 * (6 + 5))
    assert found["scan"][0] == 7 * (2 * once + 2 * (3 + 3) * 60)  # gradients are formed


def test_rank_and_filters_change_the_scan():
    wide = LayerShape("a", 1, outputs=100, inputs=80, rows=4)
    common = {"examples": 50, "queries": 10, "batch_size": 5, "fitted": True}
    dense = phases(plan([wide], **common))
    low = phases(plan([wide], rank=3, **common))
    assert list(dense) == ["queries", "scan"]
    assert list(low) == ["queries", "compression", "scan"]
    assert low["scan"][0] == 50 * (4 * 4 * 8000 + 2 * 4 * 10 * 3 * 180)
    assert dense["scan"][0] == 50 * (4 * 4 * 8000 + 2 * (4 + 10) * 8000)
    assert low["compression"][1] == 10 * (3 * 180 * 4 + 16)
    assert dense["queries"][1] == 10 * 8000 * 4
    # rows are rotated, T < O; and back, if dense
    once = 10 * (3 * 2 * 4 * 8000 + 2 * 4 * (100**2 + 80**2))
    assert low["queries"][0] == once
    assert dense["queries"][0] == once + 10 * 2 * 8000 * 180
    few = phases(plan([wide], scanned=5, **common))
    assert few["scan"][0] == dense["scan"][0] / 10


def test_half_of_a_second_moment_is_multiplied_out():
    """In tiles of 64 columns: 10 of 16 of 256, and all of 100."""
    wide = LayerShape("a", 1, outputs=256, inputs=100, rows=4)
    found = phases(plan([wide], examples=5, queries=1, batch_size=5))
    assert found["factors"][0] == 5 * 4 * (2 * 2 * 25600 + 2 * (256**2 * 10 / 16 + 100**2))


def test_what_needs_no_fit_has_none():
    common = {"examples": 5, "queries": 2, "batch_size": 5}
    assert plan([LAYER], curvature="identity", **common).phases == ("queries", "scan")
    assert plan([LAYER], curvature="diagonal", **common).phases == ("diagonal", "queries", "scan")
    kfac = phases(plan([LAYER], curvature="kfac", **common))
    assert kfac["eigenvalues"] == (0.0, 60 * 4)


@pytest.mark.parametrize("rank", [None, 3])
def test_work_is_what_pytorch_counts(rank):
    model, loss, data = tokens()
    risk = cl.Risk(model, loss, data)
    shapes = layer_shapes(risk)
    common = {"examples": 32, "queries": 8, "batch_size": 8, "rank": rank}
    expected = phases(plan(shapes.layers, **common))
    inf = Influence(model, loss, data, cl.kfac(risk, fisher="mc"), progress=False)
    queries = query_risk(inf.risk, data[:1], None)
    own = (inf.risk, inf.preconditioner)
    flops, _ = counted(lambda: Queries(queries).directions(*own))
    dense = phases(plan(shapes.layers, **(common | {"rank": None})))
    assert 0.8 < flops / dense["queries"][0] < 1.15
    directions = Queries(queries, rank=rank).directions(*own)
    flops, _ = counted(lambda: list(example_scores(inf.risk, directions)))
    assert 0.8 < flops / expected["scan"][0] < 1.15


def test_work_of_the_fit_is_what_pytorch_counts(monkeypatch):
    model, loss, data = tokens()
    risk = cl.Risk(model, loss, data)
    own = plan(layer_shapes(risk).layers, examples=32, queries=1, batch_size=8)
    expected = phases(own)
    # the counter knows baddbmm, but not its in-place form
    monkeypatch.setattr(
        torch.Tensor, "baddbmm_", lambda out, a, b: out.copy_(torch.baddbmm(out, a, b))
    )
    flops, _ = counted(lambda: cl.kfac(risk, fisher="mc", eigen_corrected=False))
    assert 0.8 < flops / expected["factors"][0] < 1.15
    both, _ = counted(lambda: cl.kfac(risk, fisher="mc"))
    assert 0.8 < (both - flops) / expected["eigenvalues"][0] < 1.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_are_those_of_the_tensors(dtype):
    model, loss, data = tokens(depth=2)
    model = model.to(dtype)
    data = [(x.to(dtype), y) for x, y in data]
    risk = cl.Risk(model, loss, data)
    K = cl.kfac(risk, fisher="mc")
    inf = Influence(model, loss, data, K, progress=False)
    layers = layer_shapes(risk).layers
    common = {"examples": 32, "queries": 8, "batch_size": 8, "itemsize": dtype.itemsize}
    found = phases(plan(layers, **common))
    blocks = list(K.blocks_of.values())
    bases = [t for b in blocks for t in (b.left, b.right) if t is not None]
    assert found["eigenvectors"][1] == sum(t.numel() * t.element_size() for t in bases)
    values = sum(b.eigenvalues.numel() * dtype.itemsize for b in blocks)
    assert found["eigenvalues"][1] == values
    queries = query_risk(inf.risk, data[:1], None)
    for rank in (None, 2, 9):
        directions = Queries(queries, rank=rank).directions(inf.risk, inf.preconditioner)
        held = sum(part.bytes for part in directions.values())
        found = phases(plan(layers, rank=rank, **common))
        most = sum(found[name][1] for name in ("queries", "compression") if name in found)
        # a shared rank is spent but for what is less than the cost of one more
        assert held == most if rank is None else 0.8 * most < held <= most


def test_shapes_are_read_from_convolutions_embeddings_and_the_rest():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(11, 6)
            self.conv = nn.Conv1d(6, 4, 3, groups=2)
            self.slope = nn.PReLU(4)
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 3)

        def forward(self, index):
            h = self.conv(self.words(index).mT)
            return self.head(self.norm(self.slope(h).mean(2)) + self.norm(h.mean(2)))

    x, y = torch.arange(20).view(2, 10) % 11, torch.tensor([0, 2])
    risk = cl.Risk(Net(), nn.CrossEntropyLoss(), (x, y))
    shapes = layer_shapes(risk)
    found = {
        s.name: (s.groups, s.outputs, s.inputs, s.rows, s.left_dense, s.right_dense, s.covered)
        for s in shapes.layers
    }
    assert found == {
        "words": (1, 11, 6, 10, False, True, True),
        "conv": (2, 2, 10, 8, True, True, True),
        "slope.weight": (1, 1, 4, 0, False, False, False),
        "norm": (1, 1, 8, 2, False, False, True),
        "head": (1, 3, 5, 1, True, True, True),
    }
    assert sum(s.size for s in shapes.layers) == risk.space.size
    assert (shapes.batch_size, shapes.outputs) == (2, 3)


def test_known_examples():
    model, loss, data = tokens()
    assert known_examples(cl.Risk(model, loss, data)) == 32
    x, y = torch.ones(10, 3), torch.ones(10, 1)
    head = nn.Linear(3, 1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    assert known_examples(cl.Risk(head, nn.MSELoss(), loader)) == 10

    class Stream:
        def __iter__(self):
            yield x, y

    assert known_examples(cl.Risk(head, nn.MSELoss(), Stream())) is None


def test_the_plan_of_a_risk_reads_its_shapes():
    model, loss, data = tokens()
    risk = cl.Risk(model, loss, data)
    shapes = layer_shapes(risk)
    common = {"examples": 32, "queries": 4, "batch_size": 8}
    assert shapes.outputs == 6 * 12  # more than are affordable: sampled
    assert repr(planned(risk, 4, rank=3)) == repr(plan(shapes.layers, rank=3, **common))
    for fisher, passes in (("type2", 72), ("mc", 5), ("empirical", 1)):
        expected = plan(shapes.layers, backward_passes=passes, **common)
        assert repr(planned(risk, 4, fisher=fisher, samples=5)) == repr(expected)
    few = planned(risk, 4, examples=3, batch_size=2)
    assert repr(few) == repr(plan(shapes.layers, **{**common, "examples": 3, "batch_size": 2}))

    class Stream:
        def __iter__(self):
            yield from data

    stream = cl.Risk(model, loss, Stream())
    with pytest.raises(ValueError, match="does not say how many examples it has; pass examples="):
        planned(stream, 4)
    assert planned(stream, 4, examples=32).total == planned(risk, 4).total
    with pytest.raises(ValueError, match="fisher= is one of .* got 'exact'"):
        planned(risk, 4, fisher="exact")


def test_a_plan_reads_well_and_is_kept(tmp_path):
    own = plan([LAYER], examples=10**6, queries=3, batch_size=2, rank=1)
    lines = repr(own).splitlines()
    assert lines[0] == "Plan"
    assert len({len(line) for line in lines[1:]}) == 1  # a table
    assert [line.split()[0] for line in lines[2:]] == [*own.phases, "all"]
    assert own.seconds(1e9) == own.total / 1e9
    assert own.peak >= sum(own.kept)
    assert own.peak == max(sum(own.kept[: i + 1]) + own.working[i] for i in range(len(own.phases)))
    loaded = Result.load(own.save(tmp_path / "plan.safetensors"))
    assert isinstance(loaded, Plan)
    assert repr(loaded) == repr(own)


def test_bad_input():
    common = {"examples": 5, "queries": 2, "batch_size": 5}
    with pytest.raises(ValueError, match=r"curvature= is one of 'ekfac', .* got 'hessian'"):
        plan([LAYER], curvature="hessian", **common)
    with pytest.raises(ValueError, match="queries= is a number of at least 1, got 0"):
        plan([LAYER], **{**common, "queries": 0})
    with pytest.raises(ValueError, match="rank= is a number of at least 1, got 0"):
        plan([LAYER], rank=0, **common)
    with pytest.raises(ValueError, match="the data has no batch"):
        layer_shapes(cl.Risk(nn.Linear(3, 1), nn.MSELoss(), []))
