"""K-FAC and EK-FAC against dense Fisher matrices in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvlib as cl
from curvlib.operators.factors.squares import matrices, rotated, squares
from curvlib.operators.factors.targets import directions
from curvlib.operators.kfac import kfac
from tests.cases import build
from tests.operators.factored import (
    F64,
    FISHERS,
    PROBLEMS,
    Language,
    classes,
    coordinates,
    draw,
    empirical,
    problem,
    relative,
    rotated_block,
    seeded,
)
from tests.problems import oracle, risk_of, snapshot


# ------------------------------------------------------------- exact gradients
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_corrected_eigenvalues_are_the_diagonal_in_the_eigenbasis(name: str, fisher: str) -> None:
    """And so is their sum the trace: of the exact Fisher matrix, of exact gradients."""
    risk = problem(name)
    K = kfac(risk, fisher=fisher)
    F = FISHERS[fisher](risk)
    for layer, block in K.blocks_of.items():
        expected = rotated_block(K, layer, F).diagonal()
        assert relative(block.eigenvalues.reshape(-1), expected) < 1e-10, layer
    covered = torch.cat([torch.arange(*coordinates(risk, name)) for name in K.coverage().covered])
    assert math.isclose(K.trace(), float(F.diagonal()[covered].sum()), rel_tol=1e-10)


TABLE = [
    "MultiheadAttention ce",
    "InstanceNorm",
    "sdpa",
    "encoder eval",
    "LSTM",
    "tied",
    "masked lm",
    "convolutions",
    "untouched",
    "0-d",
    "checkpointed",
    "hf target",
    "dense labels weighted",
    "ce smooth weighted masked",
    "ce soft weighted smooth",
    "ce sum",
    "bce weighted",
]


@pytest.mark.filterwarnings("ignore:curvlib. scaled_dot_product_attention:UserWarning")
@pytest.mark.parametrize("name", TABLE)
def test_traces_of_the_table(name: str) -> None:
    """Against the table's own oracles: what is not covered has the exact diagonal."""
    K = kfac(risk_of(build(name)), rest="diagonal")
    expected = oracle("type2", name)
    assert math.isclose(K.trace(), float(expected.trace()), rel_tol=1e-10)
    places = [K.space.slice(n) for n in K.coverage().uncovered]
    for where in places:
        assert torch.allclose(K.diagonal()[where], expected.diagonal()[where], rtol=1e-9)


@pytest.mark.parametrize("fisher", ["type2", "mc", "empirical"])
def test_flattened_tokens_are_of_their_sequence(fisher: str) -> None:
    """Logits ``[N T, V]`` give the same as ``[N, V, T]``, uncovered parameters included."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Language()
            self.shift = nn.Parameter(torch.zeros(7, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.shift * x[:, None]

    model = seeded(Model())
    x, y = PROBLEMS["language model"][2]
    loss = nn.CrossEntropyLoss(ignore_index=2)
    plain = cl.Risk(model, loss, (x, y))
    flat = cl.Risk(
        model,
        loss,
        (x, y.reshape(-1)),
        forward=lambda m, b: m(b[0]).transpose(1, 2).reshape(-1, 7),
    )
    options: dict[str, Any] = {"fisher": fisher, "rest": "diagonal"}
    if fisher == "mc":  # targets are drawn from what the example holds, which is the same
        options["samples"] = 2
    K, other = kfac(plain, **options), kfac(flat, **options)
    assert relative(other.to_dense(), K.to_dense()) < 1e-10
    assert relative(other.kronecker().to_dense(), K.kronecker().to_dense()) < 1e-10


def test_routes_that_change_between_batches_of_the_same_shapes() -> None:
    """As many rows for each expert in both batches, but of other examples."""
    risk = problem("experts")
    x = draw(2, 2, 3).abs()
    x[:, 1, 0] *= -1.0  # one token of each example for each expert
    other = x.clone()
    other[0, :, 0] = other[0, :, 0].abs()  # two of one example for one expert
    other[1, :, 0] = -other[1, :, 0].abs()
    y = torch.tensor([0, 1])
    risk = risk.on([(x, y), (other, y)])
    K = kfac(risk, fisher="empirical")
    F = empirical(risk)
    for layer, block in K.blocks_of.items():
        expected = rotated_block(K, layer, F).diagonal()
        assert relative(block.eigenvalues.reshape(-1), expected) < 1e-10


class _Sorted(nn.Module):
    """Sorts all rows of a batch by value before its layer, and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        order = rows[:, 0].argsort()
        out = torch.tanh(self.layer(rows[order]))[order.argsort()]
        return out.unflatten(0, x.shape[:2]).sum(1)


def test_rows_that_are_sorted() -> None:
    """Tokens of all examples, by value."""
    x, y = draw(4, 2, 3), draw(4, 2, seed=1)
    rows = x.flatten(0, 1)
    first = rows[rows[:, 0].argsort()].view_as(x)  # sorted already: verified; the second is not
    risk = cl.Risk(seeded(_Sorted()), nn.MSELoss(), [(first, y), (x, y)])
    K = kfac(risk, fisher="empirical")
    expected = rotated_block(K, "layer", empirical(risk)).diagonal()
    assert relative(K.blocks_of["layer"].eigenvalues.reshape(-1), expected) < 1e-10


@pytest.mark.parametrize("name", ["mlp", "grouped convolutions", "tied, masked", "experts"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_correction_never_increases_the_error(name: str, sharing: str, fisher: str) -> None:
    risk = problem(name)
    K = kfac(risk, fisher=fisher, sharing=sharing)
    F = FISHERS[fisher](risk)
    for layer in K.blocks_of:
        target = rotated_block(K, layer, F)
        errors = [
            (torch.diag(op.blocks_of[layer].eigenvalues.reshape(-1)) - target).norm()
            for op in (K, K.kronecker())
        ]
        assert errors[0] <= errors[1] * (1 + 1e-12)


@given(
    n=st.integers(1, 5),
    wide=st.integers(1, 4),
    out=st.integers(2, 4),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=15, deadline=None)
def test_correction_never_increases_the_error_of_any_layer(
    n: int, wide: int, out: int, seed: int
) -> None:
    model = seeded(nn.Sequential(nn.Linear(wide, 3), nn.Tanh(), nn.Linear(3, out)), seed)
    risk = cl.Risk(
        model, nn.CrossEntropyLoss(), (draw(n, wide, seed=seed), classes(n, below=out, seed=seed))
    )
    K = kfac(risk)
    G = cl.ggn(risk).to_dense()
    for layer in K.blocks_of:
        target = rotated_block(K, layer, G)
        errors = [
            (torch.diag(op.blocks_of[layer].eigenvalues.reshape(-1)) - target).norm()
            for op in (K, K.kronecker())
        ]
        assert errors[0] <= errors[1] + 1e-12 * target.norm()


# --------------------------------------------------------------- where it is exact
@pytest.mark.parametrize("fisher", FISHERS)
def test_one_example_with_one_row_is_exact(fisher: str) -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    risk = cl.Risk(model, nn.CrossEntropyLoss(), (draw(1, 4), torch.tensor([1])))
    K = kfac(risk, fisher=fisher)
    F = FISHERS[fisher](risk)
    for op in (K, K.kronecker()):
        for layer, block in op.blocks().items():
            names = risk.space.layers()[layer]
            where = torch.cat([torch.arange(*coordinates(risk, n)) for n in names])
            assert relative(block.to_dense(), F[where][:, where]) < 1e-12


class _Deep(nn.Module):
    """A deep linear network; with a mean over tokens at its end, or token by token."""

    def __init__(self, *, pooled: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2))
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out.mean(1) if self.pooled else out


@pytest.mark.parametrize(
    ("x", "y", "pooled", "sharing"),
    [
        (draw(6, 3), draw(6, 2), False, "expand"),
        (draw(6, 3), draw(6, 2), False, "reduce"),
        (draw(4, 5, 3), draw(4, 5, 2), False, "expand"),
        (draw(4, 5, 3), draw(4, 2), True, "reduce"),
    ],
    ids=["vectors", "vectors, reduce", "tokens, expand", "pooled, reduce"],
)
def test_deep_linear_networks_are_exact(x: Tensor, y: Tensor, pooled: bool, sharing: str) -> None:
    """Eschenhagen et al. (2023), propositions 1 and 2."""
    risk = cl.Risk(seeded(_Deep(pooled=pooled)), nn.MSELoss(), [(x[:3], y[:3]), (x[3:], y[3:])])
    G = cl.ggn(risk).to_dense()
    K = kfac(risk, sharing=sharing)
    for op in (K, K.kronecker()):
        for layer, block in op.blocks().items():
            names = risk.space.layers()[layer]
            where = torch.cat([torch.arange(*coordinates(risk, n)) for n in names])
            assert relative(block.to_dense(), G[where][:, where]) < 1e-11
    if x.ndim == 3:  # the other setting is not exact there
        other = kfac(risk, sharing="reduce" if sharing == "expand" else "expand").kronecker()
        assert relative(other.to_dense(), K.to_dense()) > 1e-2


def test_dense_blocks_of_norms_are_exact() -> None:
    risk = problem("mlp")
    K = kfac(risk, dense_norms=True)
    G = cl.ggn(risk).to_dense()
    where = torch.cat([torch.arange(*coordinates(risk, n)) for n in ("2.weight", "2.bias")])
    assert relative(K.blocks()["2"].to_dense(), G[where][:, where]) < 1e-12
    assert relative(K.kronecker().blocks()["2"].to_dense(), G[where][:, where]) < 1e-12


def test_factors_of_a_convolution_are_their_definition() -> None:
    """From rows that are taken entry by entry, per group."""
    conv = nn.Conv2d(2, 4, 2, groups=2)
    model = seeded(nn.Sequential(conv, nn.Flatten()))
    x = draw(3, 2, 3, 3)
    risk = cl.Risk(model, nn.MSELoss(), (x, draw(3, 16)))
    K = kfac(risk).kronecker()
    for g in range(2):
        rows = torch.stack([
            torch.cat([x[n, g, i : i + 2, j : j + 2].reshape(-1), torch.ones(1, dtype=F64)])
            for n in range(3) for i in range(2) for j in range(2)
        ])  # fmt: skip
        A = rows.T @ rows / 12
        S = torch.eye(2, dtype=F64) * (2.0 * 12 / 48)  # each output has the curvature 2 / 48
        block = K.blocks_of["0"]
        found = block.left[g] @ torch.diag(block.eigenvalues[g].sum(1)) @ block.left[g].T
        assert torch.allclose(found, S * A.trace(), rtol=1e-10, atol=1e-12)
        found = block.right[g] @ torch.diag(block.eigenvalues[g].sum(0)) @ block.right[g].T
        assert torch.allclose(found, S.trace() * A, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------- sampled targets
def test_sampled_targets_are_those_of_the_exact_gradients() -> None:
    """Lambda against rows of autograd with the same targets, including class weights and masks."""
    risk = problem("tied, masked")
    K = kfac(risk, fisher="mc", samples=3)
    F = torch.zeros(risk.space.size, risk.space.size, dtype=F64)
    with risk.untouched():
        for batch in risk.batches():
            output = batch.output()
            for tensor, cotangent in directions(batch, output, "mc", 3, "0|1"):
                for n in range(batch.examples):
                    value = (tensor[n] * cotangent[n]).sum()
                    parts = torch.autograd.grad(
                        value, list(risk.params.values()), retain_graph=True
                    )
                    row = risk.space.join(list(parts))
                    F += torch.outer(row, row) / risk.weight()
    for layer, block in K.blocks_of.items():
        expected = rotated_block(K, layer, F).diagonal()
        assert relative(block.eigenvalues.reshape(-1), expected) < 1e-10


@pytest.mark.parametrize("name", ["mlp", "mse, no bias", "bce", "nll, class weights"])
def test_sampled_targets_approach_the_exact_fisher(name: str) -> None:
    risk = problem(name)
    exact, sampled = kfac(risk).kronecker(), kfac(risk, fisher="mc", samples=500)
    gap = relative(sampled.kronecker().to_dense(), exact.to_dense())
    assert 1e-4 < gap < 0.15
    trace = exact.eigen_corrected().trace()
    assert math.isclose(sampled.trace(), trace, rel_tol=0.1)
    assert sampled.trace() != trace


@pytest.mark.parametrize("fisher", ["mc", "type2", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "tied, masked", "time first"])
def test_batches_and_order_change_nothing(name: str, fisher: str) -> None:
    first = problem(name)
    x, y = PROBLEMS[name][2]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    others = [(x[i : i + 1], y[i : i + 1]) for i in order.tolist()]
    K, other = kfac(first, fisher=fisher), kfac(first.on(others), fisher=fisher)
    assert relative(other.to_dense(), K.to_dense()) < 1e-10
    assert relative(other.kronecker().to_dense(), K.kronecker().to_dense()) < 1e-10
    if fisher == "mc":
        assert relative(kfac(first, fisher="mc", seed=1).to_dense(), K.to_dense()) > 1e-3


def test_the_model_is_left_as_it_was() -> None:
    risk = problem("mlp")
    before = snapshot(risk.model)
    kfac(risk)
    snapshot(risk.model).assert_same(before)


# ---------------------------------------------------------------------- routes
@given(
    groups=st.integers(1, 3),
    n=st.integers(1, 4),
    rows=st.integers(1, 4),
    out=st.integers(1, 4),
    width=st.integers(1, 4),
)
@settings(max_examples=25, deadline=None)
def test_all_routes_give_the_same_squares(
    groups: int, n: int, rows: int, out: int, width: int
) -> None:
    left, right = draw(groups, n, rows, out), draw(groups, n, rows, width, seed=1)
    QL = torch.linalg.qr(draw(groups, out, out, seed=2)).Q
    QR = torch.linalg.qr(draw(groups, width, width, seed=3)).Q
    expected = torch.zeros(groups, out, width, dtype=F64)
    for g in range(groups):
        for i in range(n):
            G = sum(torch.outer(left[g, i, t], right[g, i, t]) for t in range(rows))
            expected[g] += (QL[g].T @ G @ QR[g]).square()
    for way in ("pairs", "rotate", "form"):
        R = right if way == "form" else rotated(right, QR)
        assert torch.allclose(squares(left, R, (QL, QR), way), expected, rtol=1e-9, atol=1e-11)
    assert matrices(left, right, (None, None), "form").shape == (groups, n, out, width)


# ------------------------------------------------------------- solving with it
def test_solves_and_switches_without_fitting_again() -> None:
    risk = problem("grouped convolutions")
    K = kfac(risk)
    x = draw(risk.space.size)
    assert K.corrected
    assert K.name == "EK-FAC"
    assert K.kronecker().name == "K-FAC"
    assert K.kronecker().eigen_corrected().fingerprint() == K.fingerprint()
    for op in (K, K.kronecker()):
        A = op.to_dense()
        for damping in (1e-3, 0.1, 10.0):
            D = torch.empty_like(x)
            for layer, value in op.dampings(damping).items():
                for start, stop in op.blocks_of[layer].ranges:
                    D[start:stop] = value
            expected = torch.linalg.solve(A + torch.diag(D), x)
            assert relative(op.solve(x, damping), expected) < 1e-9
    only = kfac(risk, eigen_corrected=False)
    assert relative(only.to_dense(), K.kronecker().to_dense()) < 1e-13
    with pytest.raises(RuntimeError, match="no corrected eigenvalues, which take a second pass"):
        only.eigen_corrected()


@pytest.mark.parametrize(
    ("model", "damping", "share"),
    [
        (nn.Linear(20, 5), 1e-4, 0.2),
        (nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)), 1e-5, 0.6),
    ],
    ids=["one layer", "two layers"],
)
def test_as_a_preconditioner(model: nn.Module, damping: float, share: float) -> None:
    """Conjugate gradients on a badly conditioned GGN take a fraction of the iterations."""
    model = seeded(model)
    width = next(model.parameters()).shape[1]
    x = draw(200, width)
    if width == 20:
        x = x * torch.logspace(0, -2, 20, dtype=F64)
    risk = cl.Risk(model, nn.CrossEntropyLoss(), (x, classes(200, below=4)))
    G, b = cl.ggn(risk), draw(risk.space.size)
    K = kfac(risk)
    options: dict[str, Any] = {"damping": damping, "method": "cg", "tolerance": 1e-8}
    plain = cl.solve(G, b, **options)
    helped = cl.solve(G, b, preconditioner=K, **options)
    assert relative(helped.value, plain.value) < 1e-6
    assert int(helped.iterations) < share * int(plain.iterations)
