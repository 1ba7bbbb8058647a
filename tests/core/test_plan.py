"""Plans: the table, ranks, and the search for what fits."""

from __future__ import annotations

import pytest

from curvlib.core.plan import Phase, Plan, Ranks, fitting
from curvlib.core.product_cost import HEADER, ProductCost
from curvlib.core.result import Result

COST = ProductCost(
    size=1000,
    vector=4000.0,
    parameters=2000.0,
    layer=500.0,
    total=100,
    examples=10,
    flops=900.0,
    second=700.0,
    further=600.0,
    again=600.0,
    graph=7000.0,
    budget=1e6,
    working=20_000.0,
    pair=5000.0,
    column=6000.0,
)
PHASES = [Phase("a", 3e9, kept=1e6, working=5e6, traffic=2e3), Phase("b", 1e9, 2e6, 1e6, 0.0)]


def test_peak_total_and_time():
    plan = Plan.of(PHASES, Ranks(4))
    assert plan.total == 4e9
    assert plan.sent == 2e3
    assert plan.peak == max(1e6 + 5e6, 1e6 + 2e6 + 1e6)
    assert plan.seconds(1e9) == 4.0
    assert plan.seconds(1e9, 1e3) == 6.0


def test_one_process_has_no_column_of_traffic():
    assert "sends" not in repr(Plan.of(PHASES, Ranks()))
    lines = repr(Plan.of(PHASES, Ranks(4, sharded=True), notes=["measured: x"])).splitlines()
    assert lines[0] == "Plan of each of 4 ranks (sharded)"
    assert lines[1].split() == ["phase", "work", "keeps", "works", "in", "sends"]
    assert lines[2].split()[-2:] == ["2", "kB"]
    assert lines[-1] == "  measured: x"
    assert len({len(line) for line in lines[1:-1]}) == 1


def test_plans_are_kept(tmp_path):
    plan = Plan.of(PHASES, Ranks(4, sharded=True), {"k": 3}, ["n"])
    loaded = Result.load(plan.save(tmp_path / "plan.safetensors"))
    assert repr(loaded) == repr(plan)
    assert loaded.settings == {"k": 3}


def test_ring_formulas_and_shares():
    ranks = Ranks(4)
    assert ranks.all_reduce(1000) == 2 * 3 / 4 * 1000
    assert ranks.gather(1000) == 3 / 4 * 1000
    assert ranks.held(1000) == 1000
    assert Ranks(4, sharded=True).held(1000) == 250
    assert (ranks.most(10), ranks.share(10)) == (3, 0.3)
    assert Ranks().all_reduce(1000) == 0.0
    with pytest.raises(ValueError, match="ranks= is a number of at least 1, got 0"):
        Ranks(0)


def test_products_in_one_process():
    one = Ranks()
    assert COST.batches(one) == 10
    assert COST.kept_batches(one) == 10
    assert COST.graphs(one) == 70_000
    assert COST.work(one, 3) == 900 + 2 * 600  # the first builds the graphs
    assert COST.work(one, 3, warm=True) == 3 * 600
    assert COST.work(one, 2, columns=3, warm=True) == 2 * (600 + 700 + 600)
    assert COST.memory(one, 3) == 20_000 + 5000 + 6000
    assert COST.memory(one, 18) == 20_000 + 5000 + 14 * 6000 + 2 * 4000  # 16 at once
    assert COST.traffic(one) == 0.0


def test_graphs_that_do_not_fit_are_built_each_time():
    one, few = Ranks(), ProductCost(**{**vars(COST), "budget": 15_000.0})
    assert few.kept_batches(one) == 2
    assert few.work(one, 1, warm=True) == pytest.approx(900 - 2 / 10 * 300)
    assert few.memory(one) == 27_000  # one graph that is not kept
    none = ProductCost(**{**vars(COST), "budget": 0.0})
    assert none.work(one, 3) == 3 * 900


def test_products_of_ranks():
    ranks = Ranks(3)
    assert COST.batches(ranks) == 4  # of 34 examples
    assert COST.work(ranks, 1, warm=True) == pytest.approx(0.34 * 600)
    assert COST.traffic(ranks, 2) == 2 * 2 / 3 * 2 * 4000 + 2 * HEADER
    sharded = Ranks(4, sharded=True)
    assert COST.graphs(sharded) == 0.0
    assert COST.work(sharded, 3) == 0.25 * 3 * 900
    # activations, two layers, and a share of two vectors
    assert COST.memory(sharded) == 27_000 - 2 * 4000 + 2 * 500 + 2 * 4000 / 4
    three = 27_000 - 8000 + (5000 + 6000 - 2 * 4000) + 2 * 500 + 4 * 4000 / 4
    assert COST.memory(sharded, 3) == three
    assert COST.traffic(sharded, 2) == 3 * 3 / 4 * (3 * 2000 + 2 * 2 * 4000)
    differences = ProductCost(**{**vars(COST), "gathers": (0.0, 4.0)})
    assert differences.traffic(sharded, 2) == 3 * 3 / 4 * 2 * (4 * 2000 + 2 * 4000)


def test_smaller_batches():
    half = COST.with_batches_of(5)
    assert half.batches(Ranks()) == 20
    assert half.working == 8000 + 12_000 / 2  # two vectors stay as they are
    assert half.graph == 4000 + 3000 / 2
    assert (half.pair, half.column) == (4000 + 1000 / 2, 4000 + 2000 / 2)
    assert COST.on(Ranks(50)).examples == 2  # a rank has no more
    assert COST.on(Ranks(), 4).examples == 4


def test_what_fits():
    def make(size=100, kind="wide"):
        return Plan.of([Phase("a", 0.0, kept=10.0 * size * (2 if kind == "wide" else 1))], Ranks())

    found = fitting(make, {"size": 100, "kind": ("wide", "slim")}, 1000.0)
    assert found == {"size": 50, "kind": "slim"}
    assert make(size=50).peak <= 1000 < make(size=51).peak
    assert fitting(make, {"size": 100, "kind": ("slim",)}, 15.0) == {}
    assert fitting(make, {"size": 1}, 5.0) == {}
