"""Rounds of an event: predictions, patterns and budgets."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
from torch import nn

import curvlib as cl
from curvlib.core.partition import Partition
from curvlib.operators.block_mfac import BlockMFAC
from curvlib.pruning import METHODS, Method
from curvlib.pruning.curvature import fisher_blocks, rows_of
from curvlib.pruning.event import updated
from curvlib.pruning.flops import flops
from curvlib.pruning.importance import layer_importance
from curvlib.pruning.methods import method_of
from curvlib.pruning.patterns import check_pattern
from curvlib.pruning.prunable import prunable
from tests.pruning.events import F64, FEW, draw, flat, problem, regression, rows_hessian
from tests.pruning.quadratics import best_subset, constrained_minimum

few = pytest.mark.filterwarnings(FEW)
EXACT = Method(rows_hessian, "greedy", "joint")


def counted(result):
    return {name: int((~mask).sum()) for name, mask in result.keep.items()}


def space_of(model):
    risk = cl.Risk(model, nn.CrossEntropyLoss(), (torch.zeros(1, 1), torch.zeros(1)))
    return prunable(risk).space


# --------------------------------------------------- predicted is measured where it can be
@pytest.mark.parametrize("recompute", [1, 4])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("score", ["greedy", "obs", "diagonal", "magnitude"])
def test_on_a_linear_regression_the_predicted_loss_is_the_measured_one(
    score, first_order, recompute
):
    model, risk, _ = regression(4, 8, at_optimum=not first_order)
    method = Method(rows_hessian, score, "joint", recompute=recompute, first_order=first_order)
    for sparsity in (0.25, 0.6, 0.8):
        found = cl.prune(model, risk, sparsity, method=method, progress=False)
        assert found.predicted == pytest.approx(found.measured, rel=1e-9, abs=1e-12)
        assert abs(found.measured) > 1e-6
    if first_order:  # a step towards the optimum is part of the update
        assert cl.prune(model, risk, 0.0, method=method, progress=False).measured < 0.0


@pytest.mark.parametrize("update", ["none", "single"])
def test_so_it_is_for_the_other_updates(update):
    for at_optimum in (True, False):
        model, risk, _ = regression(4, 8, at_optimum=at_optimum)
        method = Method(rows_hessian, "obs", update, first_order=not at_optimum)
        found = cl.prune(model, risk, 0.5, method=method, progress=False)
        assert found.predicted == pytest.approx(found.measured, rel=1e-9)


def test_the_diagonal_with_the_gradient_counts_slopes():
    model, risk, _ = regression(1, 6, at_optimum=False)
    method = Method(rows_hessian, "diagonal", "none", first_order=True)
    found = cl.prune(model, risk, 1 / 6, method=method, progress=False)
    losses = []
    for q in range(6):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.weight[0, q] = 0.0
        losses.append(float(risk.of(twin).value()))
    assert found.after == pytest.approx(min(losses), rel=1e-12)
    assert found.predicted == pytest.approx(found.measured, rel=1e-9)


@pytest.mark.parametrize("block_size", [16, 64])
def test_steps_along_the_gradient_do_not_go_too_far(block_size):
    """Blocks know nothing of each other: full Newton steps of all raise this loss to 28 and 280."""
    model, risk = problem()
    settings = {"recompute": 4, "rows": 512, "block_size": block_size, "progress": False}
    plain = cl.prune(model, risk, 0.5, **settings)
    found = cl.prune(model, risk, 0.5, first_order=True, **settings)
    assert found.after < plain.after + 0.05


@pytest.mark.parametrize("seed", range(6))
def test_few_weights_against_all_sets_of_them(seed):
    """One weight: the best of all. More: the cheapest again and again, with the best update."""
    model, risk, H = regression(1, 7, seed=10 * seed)
    w, after = model.weight.detach()[0], torch.ones(7, dtype=torch.bool)
    every = after.clone()
    for count in (1, 2, 3):
        found = cl.prune(model, risk, count / 7, method=EXACT, progress=False)
        costs = {}
        for q in after.nonzero()[:, 0].tolist():
            after[q] = False
            costs[q] = constrained_minimum(w, H, None, every, after)[1]
            after[q] = True
        after[min(costs, key=costs.__getitem__)] = False
        assert torch.equal(found.keep["weight"][0], after)
        change, value = constrained_minimum(w, H, None, every, after)
        assert torch.allclose(found.weights["weight"][0], w + change, rtol=1e-9, atol=1e-11)
        assert found.predicted == pytest.approx(value, rel=1e-9)
        gone, least = best_subset(w, H, None, every, count)
        if count == 1:
            assert (~after).nonzero()[:, 0].tolist() == list(gone)
        assert value >= least * (1 - 1e-9)


def test_over_several_rows_the_least_increase_is_taken():
    model, risk, H = regression(3, 5)
    found = cl.prune(model, risk, 1 / 15, method=EXACT, progress=False)
    inverse = torch.linalg.inv(H).diagonal()
    scores = model.weight.detach().square() / (2 * inverse)
    assert int((~found.keep["weight"]).reshape(-1).nonzero()) == int(scores.argmin())
    assert found.measured == pytest.approx(float(scores.min()), rel=1e-8)


def test_curvature_is_computed_anew_at_the_weights_of_each_round():
    model, risk = problem()
    seen = []

    def curvature(part):
        seen.append(torch.cat([p.detach().reshape(-1) for p in part.params.values()]))
        return BlockMFAC(torch.eye(192), Partition.of(part.space, 16))

    method = Method(curvature, "obs", "joint", recompute=4)
    cl.prune(model, risk, 0.9375, method=method, progress=False)
    zeros = [int((w == 0).sum()) for w in seen]
    assert zeros == [0, 96, 144, 168]  # densities fall geometrically


def test_examples_and_labels_are_drawn_anew_in_each_round(monkeypatch):
    model, risk = problem()
    seeds = []

    def rows(part, method, seed):
        seeds.append(seed)
        return rows_of(part, method, seed)

    monkeypatch.setattr("curvlib.pruning.curvature.rows_of", rows)
    for seed in (0, 1):
        cl.prune(model, risk, 0.8, recompute=3, seed=seed, progress=False)
    assert len(set(seeds)) == 6


@pytest.mark.slow
def test_predictions_rank_random_masks_as_measurements_do():
    """Issue 4, section 3: rank correlation above 0.9 over random small masks."""
    from scipy.stats import spearmanr

    from curvlib.demo import digits

    demo = digits(seed=0)
    risk = demo.risk()
    copied = prunable(risk.of(copy.deepcopy(demo.model)))
    space = copied.space
    op = fisher_blocks(copied, method_of("obs", {"rows": 8192}), 0)
    weights = space.join([p.detach() for p in copied.params.values()])
    every = torch.ones(space.size, dtype=torch.bool)
    slope, base = copied.gradient(), float(copied.value())
    generator = torch.Generator().manual_seed(0)
    predicted, measured = [], []
    for i in range(60):
        share = 0.005 + 0.025 * i / 59
        keep = torch.rand(space.size, generator=generator) >= share
        pruned, change = updated(op, weights, every, keep, "none", slope)
        predicted.append(float(change.sum()))
        with torch.no_grad():
            for p, part in zip(copied.params.values(), space.split(pruned), strict=True):
                p.copy_(part)
        measured.append(float(copied.value()) - base)
    assert spearmanr(predicted, measured).statistic > 0.9


# ------------------------------------------------------------------------- patterns
@few
@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("method", METHODS)
def test_patterns_hold_for_every_method(method, kind):
    model, risk = problem(kind)
    found = cl.prune(model, risk, pattern="2:4", method=method, progress=False)
    space = prunable(risk).space
    keep = found.masks.flat(space)
    check_pattern(keep, space, "2:4")
    assert found.sparsity == 0.5
    more = cl.prune(model, risk, 0.7, pattern="2:4", method=method, progress=False)
    check_pattern(more.masks.flat(space), space, "2:4")
    assert more.sparsity == round(0.7 * space.size) / space.size
    again = cl.prune(model, risk, pattern="1:4", method=method, keep=found.masks, progress=False)
    check_pattern(again.masks.flat(space), space, "1:4")
    assert again.sparsity == 0.75
    assert not (again.masks.flat(space) & ~keep).any()


def test_a_group_is_chosen_as_by_exhaustive_search():
    """Blocks of one group: every one of the six choices, with its own joint update."""
    model, risk = problem()
    part = prunable(risk)
    blocks = fisher_blocks(part, method_of("obs", {"block_size": 4, "rows": 256}), 0)
    found = cl.prune(model, risk, pattern="2:4", block_size=4, rows=256, progress=False)
    w, keep = flat(model, part.space.names), found.masks.flat(part.space)
    predicted = 0.0
    for index, F in zip(blocks.partition.stacks[0], blocks.dense(0), strict=True):
        inverse = torch.linalg.inv(F.double())
        costs = {}
        for gone in combinations(range(4), 2):
            q = list(gone)
            v = w[index][q].double()
            costs[gone] = 0.5 * float(v @ torch.linalg.solve(inverse[q][:, q], v))
        chosen = tuple((~keep[index]).nonzero()[:, 0].tolist())
        assert costs[chosen] == pytest.approx(min(costs.values()), rel=1e-5)
        predicted += costs[chosen]
    assert found.predicted == pytest.approx(predicted, rel=1e-4)


def test_the_pattern_goes_by_the_methods_own_score():
    model, risk = problem()
    by_score = Method("fisher-blocks", "magnitude", "joint")
    found = cl.prune(model, risk, pattern="2:4", method=by_score, progress=False)
    plain = cl.prune(model, risk, pattern="2:4", method="magnitude", progress=False)
    assert all(torch.equal(found.keep[n], plain.keep[n]) for n in plain.keep)
    assert found.after < plain.after


def test_patterns_need_blocks_of_whole_groups_that_cover_all():
    model, risk, _ = regression(2, 8)

    def cut(part):
        index = torch.arange(16).view(-1, 2)
        return cl.pruning.curvature.BlockDiagonal(
            Partition((index,), 16, part.space), [torch.eye(2, dtype=F64).expand(8, 2, 2)]
        )

    def partly(part):
        index = torch.arange(8).view(2, 4)
        return cl.pruning.curvature.BlockDiagonal(
            Partition((index,), 16, part.space), [torch.eye(4, dtype=F64).expand(2, 4, 4)]
        )

    with pytest.raises(ValueError, match="blocks of 2 weights cut groups of 4"):
        cl.prune(model, risk, pattern="2:4", method=Method(cut, "obs", "joint"), progress=False)
    with pytest.raises(ValueError, match="8 weights are in no block of the curvature, the first"):
        cl.prune(model, risk, pattern="2:4", method=Method(partly, "obs", "joint"), progress=False)
    spared = cl.prune(model, risk, 0.4, method=Method(partly, "obs", "joint"), progress=False)
    assert spared.keep["weight"][1].all()  # what is in no block is not pruned


# --------------------------------------------------------------------------- scopes
@few
@pytest.mark.parametrize("method", ["magnitude", "obc", "obs", "mfac", "diagonal"])
def test_every_layer_or_every_row_alike(method):
    model, risk = problem()
    layers = cl.prune(model, risk, 0.6, method=method, scope="layer", recompute=3, progress=False)
    assert all(abs(n - 0.6 * layers.keep[name].numel()) <= 1 for name, n in counted(layers).items())
    rows = cl.prune(model, risk, 0.6, method=method, scope="row", recompute=3, progress=False)
    assert sum(counted(rows).values()) == round(0.6 * 192)
    for mask in rows.keep.values():
        each = (~mask).sum(1)
        assert int(each.max() - each.min()) <= 1


def test_outputs_of_transposed_weights_are_their_second_dimension():
    with torch.random.fork_rng():
        model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.Flatten(), nn.Linear(54, 3))
    x = draw(40, 4, 2, 2)
    risk = cl.Risk(model, nn.CrossEntropyLoss(), (x, torch.arange(40) % 3))
    found = cl.prune(model, risk, 0.5, method="magnitude", scope="row", progress=False)
    assert (~found.keep["0.weight"]).sum((0, 2, 3)).tolist() == [8] * 6
    assert (~found.keep["2.weight"]).sum(1).tolist() == [27] * 3
    with pytest.raises(ValueError, match=r"first dimension of \['0.weight'\]"):
        cl.prune(model, risk, pattern="1:2", method="magnitude")


@few
@pytest.mark.parametrize("method", ["magnitude", "mfac", "obs"])
@pytest.mark.parametrize("recompute", [1, 3])
def test_sparsities_by_name(method, recompute):
    model, risk = problem()
    settings = {"method": method, "recompute": recompute, "progress": False}
    found = cl.prune(model, risk, scope={"2.weight": 0.25, "0.*": 0.8}, **settings)
    assert counted(found) == {"0.weight": round(0.8 * 128), "2.weight": 16}
    one = cl.prune(model, risk, scope={"2.*": 0.5}, **settings)
    assert counted(one) == {"0.weight": 0, "2.weight": 32}
    rest = cl.prune(model, risk, 0.7, scope={"2.weight": 0.25}, **settings)
    assert counted(rest) == {"0.weight": round(0.7 * 192) - 16, "2.weight": 16}
    further = cl.prune(model, risk, 0.8, scope={"2.weight": 0.5}, keep=rest.masks, **settings)
    assert counted(further) == {"0.weight": round(0.8 * 192) - 32, "2.weight": 32}


@few
@pytest.mark.parametrize("method", ["magnitude", "diagonal", "wanda", "mfac", "obs"])
def test_multiply_adds_are_saved_to_within_one_weight(method):
    model, risk = problem("conv")
    costs = flops(prunable(risk))
    assert costs["0.weight"] == 16 * costs["4.weight"]  # each is used at 4 x 4 places
    size = {name: risk.params[name].numel() for name in costs}
    total = sum(costs[n] * size[n] for n in costs)
    for sparsity in (0.4, 0.8):
        found = cl.prune(
            model, risk, sparsity, method=method, scope="flops", recompute=3, progress=False
        )
        kept = sum(costs[n] * (size[n] - gone) for n, gone in counted(found).items())
        budget = (1 - sparsity) * total
        assert budget - max(costs.values()) < kept <= budget * (1 + 1e-12)
    pattern = cl.prune(
        model, risk, 0.7, pattern="2:4", method=method, scope="flops", progress=False
    )
    check_pattern(pattern.masks.flat(prunable(risk).space), prunable(risk).space, "2:4")
    kept = sum(costs[n] * (size[n] - gone) for n, gone in counted(pattern).items())
    assert kept <= 0.3 * total * (1 + 1e-12)


def test_multiply_adds_are_saved_where_they_cost_least():
    """The dear layer loses more than where weights are counted, and of each the least."""
    model, risk = problem("conv")
    by_count = cl.prune(model, risk, 0.5, method="diagonal", progress=False)
    by_work = cl.prune(model, risk, 0.5, method="diagonal", scope="flops", progress=False)
    assert counted(by_work)["4.weight"] < counted(by_count)["4.weight"]


@pytest.mark.parametrize("recompute", [1, 4])
def test_kept_weights_in_proportion_to_importance(recompute):
    model, risk = problem()
    settings = {
        "scope": "importance",
        "recompute": recompute,
        "rows": 128,
        "block_size": 16,
        "progress": False,
    }
    found = cl.prune(model, risk, 0.6, **settings)
    assert sum(counted(found).values()) == round(0.6 * 192)
    part = prunable(risk)
    value = layer_importance(part, {n: (n,) for n in part.space.names}, seed=0).by_layer()
    kept = {name: int(mask.sum()) for name, mask in found.keep.items()}
    least = 64 - 51  # at most 0.8 of a parameter is pruned
    share = value["2.weight"] / sum(value.values()) * sum(kept.values())
    expected = min(max(round(share), least), 64)
    assert abs(kept["2.weight"] - expected) <= 1
    more = cl.prune(model, risk, 0.8, keep=found.masks, layer_maximum=0.9, **settings)
    assert sum(counted(more).values()) == round(0.8 * 192)
    for n, mask in more.keep.items():
        assert not (mask & ~found.keep[n]).any()
    with pytest.raises(ValueError, match="out of reach"):
        cl.prune(model, risk, 0.5, keep=found.masks, **settings)
    mixed = cl.prune(model, risk, 0.7, pattern="2:4", **settings)
    assert sum(counted(mixed).values()) == round(0.7 * 192)


@few
@pytest.mark.parametrize("method", METHODS)
def test_the_largest_sparsity_of_a_layer(method):
    model, risk = problem()
    with torch.no_grad():
        model[2].weight.mul_(0.05)
    found = cl.prune(model, risk, 0.6, method=method, layer_maximum=0.65, progress=False)
    assert sum(counted(found).values()) == round(0.6 * 192)
    assert max(n / found.keep[k].numel() for k, n in counted(found).items()) <= 0.65
