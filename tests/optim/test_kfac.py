"""K-FAC and E-KFAC against dense matrices, curvlib.kfac and closed forms, in float64."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvlib as cl
from curvlib.optim.kfac import KFAC
from curvlib.optim.layer_curvature import updated
from curvlib.optim.rules.kfac import (
    averaged,
    debias,
    eigenbasis,
    factored_inverses,
    inverted,
    kl_scale,
    moved,
    outer,
    preconditioned,
    preconditioned_by,
)
from tests.operators.factored import (
    F64,
    PROBLEMS,
    classes,
    draw,
    empirical,
    problem,
    relative,
    rotated_block,
    seeded,
)

#: Every step updates everything, and is nothing but the natural gradient.
PLAIN: dict[str, Any] = {
    "lr": 1.0,
    "momentum": 0.0,
    "kl_clip": None,
    "factor_interval": 1,
    "inverse_interval": 1,
}
KNOWN = [name for name in PROBLEMS if name not in ("bce", "nll, class weights")]


def psd(n: int, seed: int) -> Tensor:
    A = draw(n, n + 2, seed=seed)
    return A @ A.T / n


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


# ------------------------------------------------------------------------------- rules
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 999), st.floats(1e-4, 10.0))
@settings(max_examples=30, deadline=None)
def test_the_natural_gradient_is_that_of_the_dense_matrix(
    out: int, width: int, seed: int, damping: float
) -> None:
    L, R, G = psd(out, seed), psd(width, seed + 1), draw(out, width, seed=seed + 2)
    (left, QL), (right, QR) = eigenbasis(L[None]), eigenbasis(R[None])
    for relative_damping in (False, True):
        dense = torch.kron(L, R)
        shift = damping * float(dense.trace()) / len(dense) if relative_damping else damping
        wanted = torch.linalg.solve(
            dense + shift * torch.eye(len(dense), dtype=F64), G.reshape(-1)
        ).view(out, width)
        inverse = inverted(outer(left, right), damping, relative=relative_damping)
        assert relative(preconditioned(G[None], QL, QR, inverse)[0], wanted) < 1e-9


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_moved_eigenvalues_are_the_diagonal_in_the_new_basis(
    out: int, width: int, seed: int
) -> None:
    values = draw(1, out, width, seed=seed).square()
    old, new = (
        (eigenbasis(psd(out, seed + k)[None])[1], eigenbasis(psd(width, seed + k + 1)[None])[1])
        for k in (3, 5)
    )
    Q, P = (torch.kron(a[0].contiguous(), b[0].contiguous()) for a, b in (old, new))
    dense = Q @ torch.diag(values.reshape(-1)) @ Q.T
    wanted = (P.T @ dense @ P).diagonal().view(out, width)
    assert torch.allclose(moved(values, old, new)[0], wanted, atol=1e-12)
    assert math.isclose(float(moved(values, old, new).sum()), float(values.sum()), rel_tol=1e-12)
    half = moved(values, (old[0], None), (new[0], None))
    assert torch.allclose(half, (new[0].mT @ old[0]).square() @ values)


def test_averages_are_weighted_means_without_bias() -> None:
    values = draw(6, 2, 2)
    average, decay = None, 0.9
    for value in values:
        average = averaged(average, value, decay)
    weights = torch.tensor([decay ** (5 - i) for i in range(6)], dtype=F64)
    wanted = (weights[:, None, None] * values).sum(0) / weights.sum()
    assert torch.allclose(average / debias(decay, 6), wanted)
    found = None
    for value in values:
        square = value @ value.T
        found = updated(found, square[None], 2.0 * square[None], None, decay)
    squares = values @ values.mT
    wanted = (weights[:, None, None] * squares).sum(0) / weights.sum()
    assert torch.allclose(found.left[0] / found.bias, wanted)
    with pytest.raises(RuntimeError, match="not been decomposed yet; call decomposed"):
        found.eigenvalues()
    first = found.decomposed(corrected=False).eigenvalues()
    dense = torch.linalg.eigvalsh(torch.kron(wanted, 2.0 * wanted))
    assert torch.allclose(first.flatten().sort().values, dense, atol=1e-10)


def test_singular_and_indefinite_factors_have_no_negative_eigenvalues() -> None:
    a = draw(5, 1)
    values, vectors = eigenbasis((a @ a.T)[None] - 1e-12 * torch.eye(5, dtype=F64))
    assert float(values.min()) == 0.0
    assert vectors is not None
    assert torch.allclose(vectors @ vectors.mT, torch.eye(5, dtype=F64))
    single = eigenbasis((a @ a.T)[None].float())
    assert single[0].dtype == torch.float32
    values, none = eigenbasis(torch.tensor([[2.0, -1.0]]))
    assert none is None
    assert values.tolist() == [[2.0, 0.0]]


def test_kl_scale() -> None:
    found = kl_scale([3.0, 6.0], 0.5, 1e-2)
    assert math.isclose(found, math.sqrt(1e-2 / (0.25 * 9.0)), rel_tol=1e-12)
    assert kl_scale([3.0, 6.0], 0.5, 100.0) == 1.0
    assert kl_scale([0.0], 0.1, 1.0) == 1.0
    assert kl_scale([3.0], 0.1, None) == 1.0
    assert kl_scale([], 0.1, 1.0) == 1.0


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 999), st.floats(1e-4, 10.0))
@settings(max_examples=30, deadline=None)
def test_factored_damping_is_split_between_the_factors(
    out: int, width: int, seed: int, damping: float
) -> None:
    L, R, G = psd(out, seed), psd(width, seed + 1), draw(out, width, seed=seed + 2)
    for relative_damping in (False, True):
        means = (L.trace() / out, R.trace() / width)
        level = (
            damping * means[0] * means[1] if relative_damping else torch.tensor(damping, dtype=F64)
        )
        pi = (means[1] / means[0]).sqrt()  # Martens and Grosse, section 6.3
        one = L + level.sqrt() / pi * torch.eye(out, dtype=F64)
        two = R + level.sqrt() * pi * torch.eye(width, dtype=F64)
        wanted = torch.linalg.solve(torch.kron(one, two), G.reshape(-1)).view(out, width)
        sides = eigenbasis(L[None]), eigenbasis(R[None])
        inverses = factored_inverses(*sides, damping, relative=relative_damping)
        assert relative(preconditioned_by(G[None], *inverses)[0], wanted) < 1e-9
        pair = torch.stack([G, -G]), *(i.expand(2, -1, -1) for i in inverses)
        assert relative(preconditioned_by(*pair)[1], -wanted) < 1e-9
        diagonals = factored_inverses(
            (sides[0][0], None), (sides[1][0], None), damping, relative=relative_damping
        )
        dense = factored_inverses(
            (sides[0][0], torch.eye(out, dtype=F64)[None]),
            (sides[1][0], torch.eye(width, dtype=F64)[None]),
            damping,
            relative=relative_damping,
        )
        assert (
            relative(preconditioned_by(G[None], *diagonals), preconditioned_by(G[None], *dense))
            < 1e-9
        )


def test_natural_gradients_of_a_stack_are_those_of_its_members() -> None:
    L, R, G = (
        torch.stack([f(k) for k in range(2)])
        for f in (lambda k: psd(3, k), lambda k: psd(4, k + 5), lambda k: draw(3, 4, seed=k))
    )
    (left, QL), (right, QR) = eigenbasis(L), eigenbasis(R)
    inverse = inverted(outer(left, right), 0.1, relative=False)
    whole = preconditioned(G, QL, QR, inverse)
    for k in range(2):
        own = preconditioned(G[k : k + 1], QL[k : k + 1], QR[k : k + 1], inverse[k : k + 1])
        assert relative(whole[k : k + 1], own) < 1e-12


@pytest.mark.parametrize("relative_damping", [False, True])
def test_steps_with_factored_damping(relative_damping: bool) -> None:
    """Against dense solves with the factors that it shows; damping changes on the way."""
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)))
    x, y = draw(8, 3), torch.tensor([0, 1] * 4)
    options = {**PLAIN, "relative": relative_damping, "damping_form": "factored"}
    opt = KFAC(model, damping=0.3, **options)
    for damping in (0.3, 0.05):
        opt.param_groups[0]["damping"] = damping
        before = [p.detach().clone() for p in model.parameters()]
        g = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        opt.step(lambda: F.cross_entropy(model(x), y))
        moves = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
        parts = (
            (torch.cat([g[0], g[1][:, None]], 1), torch.cat([moves[0], moves[1][:, None]], 1)),
            (g[2], moves[2]),
        )
        for own, (G, V) in zip(opt.layers.values(), parts, strict=True):
            L, R = own.left[0] / own.bias, own.right[0] / own.bias
            means = (L.trace() / len(L), R.trace() / len(R))
            level = damping * (float(means[0] * means[1]) if relative_damping else 1.0)
            pi = (means[1] / means[0]).sqrt()
            one = L + level**0.5 / pi * torch.eye(len(L), dtype=F64)
            two = R + level**0.5 * pi * torch.eye(len(R), dtype=F64)
            assert relative(one @ V @ two, G) < 1e-8
            exact = torch.kron(L, R) + level * torch.eye(G.numel(), dtype=F64)
            assert float(V.norm()) < float(torch.linalg.solve(exact, G.reshape(-1)).norm())


# ------------------------------------------------------------ steps against curvlib.kfac
@pytest.mark.parametrize("relative_damping", [False, True])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", KNOWN)
def test_the_first_step_solves_with_the_kfac_of_the_batch(
    name: str, sharing: str, relative_damping: bool
) -> None:
    """Tied, reused, grouped, dilated, transposed layers, embeddings and norms included."""
    if name == "experts" and sharing == "reduce":
        pytest.skip("rows cannot be told apart by example")
    _, loss, (x, y) = PROBLEMS[name]
    risk = problem(name, batches=False)
    settings: dict[str, Any] = {
        "fisher": "empirical",
        "eigen_corrected": False,
        "sharing": sharing,
    }
    K = cl.kfac(risk, **settings)
    names = K.coverage().covered
    covered = torch.zeros(risk.space.size, dtype=torch.bool)
    for covered_name in names:
        covered[risk.space.slice(covered_name)] = True
    if relative_damping:  # of the mean eigenvalue of each block: there is none of the rest
        K = cl.kfac(risk, params=[risk.params[n] for n in names], **settings)
        wanted = K.solve(risk.gradient()[covered], 0.3)
    else:
        wanted = K.solve(risk.gradient(), 0.3, relative=False)[covered]
    opt = KFAC(
        risk.model,
        damping=0.3,
        relative=relative_damping,
        loss=loss,
        sharing=sharing,
        inner="sgd",
        inner_scale=0.0,
        **PLAIN,
    )
    before = risk.space.join([p.detach() for p in risk.params.values()])
    opt.step(lambda: loss(risk.model(x), y))
    step = before - risk.space.join([p.detach() for p in risk.params.values()])
    assert relative(step[covered], wanted) < 1e-8
    assert float(step[~covered].abs().sum()) == 0.0
    assert opt.coverage().covered == names


@pytest.mark.parametrize("name", [n for n in KNOWN if n not in ("experts", "time first")])
def test_e_kfac_has_the_exact_eigenvalues_and_is_closer_to_the_fisher(name: str) -> None:
    _, loss, (x, y) = PROBLEMS[name]
    risk = problem(name, batches=False)
    K = cl.kfac(risk, fisher="empirical")
    opt = KFAC(
        risk.model,
        loss=loss,
        eigen_corrected=True,
        factor_decay=0.0,
        **{**PLAIN, "lr": 0.0, "inverse_interval": 100},
    )
    for _ in range(2):
        opt.step(lambda: loss(risk.model(x), y))
    F = empirical(risk)
    for layer, block in K.blocks_of.items():
        mine = opt.layers[layer]
        exact = rotated_block(K, layer, F)  # in the same basis up to what is degenerate
        values = mine.eigenvalues().reshape(-1)
        assert math.isclose(float(values.sum()), float(exact.trace()), rel_tol=1e-9)
        G, O, width = block.eigenvalues.shape
        bases = [
            torch.eye(n, dtype=torch.float64).expand(G, n, n) if Q is None else Q
            for Q, n in zip(mine.basis, (O, width), strict=True)
        ]
        Q = torch.block_diag(
            *(torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(*bases, strict=True))
        )
        places = block.gather(torch.arange(risk.space.size, dtype=F64)[None])[0].long().reshape(-1)
        own = F[places][:, places]
        assert torch.allclose(values, (Q.T @ own @ Q).diagonal(), atol=1e-10), layer
        kronecker = outer(mine.left_values, mine.right_values).reshape(-1)
        far = (own - Q @ torch.diag(kronecker) @ Q.T).norm()
        near = (own - Q @ torch.diag(values) @ Q.T).norm()
        assert float(near) <= float(far) + 1e-12


def test_one_linear_layer_and_one_example_are_exact() -> None:
    """The Fisher matrix is a Kronecker product then: the step is the dense natural gradient."""
    model = seeded(nn.Linear(3, 2))
    x, y = draw(1, 3), torch.tensor([1])
    risk = cl.Risk(model, nn.CrossEntropyLoss(), (x, y))
    F_dense, g, before = empirical(risk), risk.gradient(), flat(model)
    opt = KFAC(model, damping=1e-2, **PLAIN)
    opt.step(lambda: F.cross_entropy(model(x), y))
    wanted = torch.linalg.solve(F_dense + 1e-2 * torch.eye(8, dtype=F64), g)
    assert relative(before - flat(model), wanted) < 1e-9


def test_one_linear_layer_with_sampled_labels_finds_the_least_squares_solution() -> None:
    """Its Fisher matrix of squared errors is I (x) A: whitened inputs, whatever their scale."""
    x = draw(64, 3) * torch.tensor([1.0, 10.0, 0.1], dtype=F64)
    W = draw(2, 3, seed=3)
    y = x @ W.T
    model = seeded(nn.Linear(3, 2, bias=False))
    opt = KFAC(
        model,
        damping=1e-8,
        fisher="mc",
        loss=nn.MSELoss(),
        **{**PLAIN, "lr": 0.5, "factor_decay": 0.9},
    )
    for _ in range(40):
        opt.step(lambda: F.mse_loss(model(x), y))
    left = opt.layers["model"] if "model" in opt.layers else next(iter(opt.layers.values()))
    exact = 2.0 * x.T @ x / 64 / 2  # of a mean over 128 terms, each 2 x x'
    found = torch.kron(left.left[0], left.right[0]) / left.bias**2
    assert relative(found, torch.kron(torch.eye(2, dtype=F64), exact)) < 0.1
    assert relative(model.weight.detach(), W) < 1e-3


# --------------------------------------------------------------------------- invariance
@pytest.mark.parametrize("conv", [False, True])
def test_steps_do_not_depend_on_affine_changes_of_inputs(conv: bool) -> None:
    """Martens and Grosse, 2015, theorem 1: at zero damping, as functions."""
    A, c = psd(3, 1) + torch.eye(3, dtype=F64), draw(3, seed=2)
    x, y = draw(40, 3), draw(40, 3, seed=5)
    if conv:
        x = draw(40, 3, 4)
    first: nn.Module = nn.Conv1d(3, 4, 1) if conv else nn.Linear(3, 4)
    head = [nn.Flatten(), nn.Linear(16, 3)] if conv else [nn.Linear(4, 3)]
    model = seeded(nn.Sequential(first, nn.Tanh(), *head))
    other = copy.deepcopy(model)

    def changed(v: Tensor) -> Tensor:
        return torch.einsum("ij,nj...->ni...", A, v) + c.view(1, 3, *[1] * (v.ndim - 2))

    with torch.no_grad():
        own = model[0].weight.reshape(4, 3)
        other[0].weight.copy_((own @ torch.linalg.inv(A)).view_as(model[0].weight))
        other[0].bias.sub_(own @ torch.linalg.inv(A) @ c)
    assert torch.allclose(model(x), other(changed(x)), atol=1e-12)
    probe = draw(20, *x.shape[1:], seed=9)
    start = model(probe).detach()
    options = {**PLAIN, "lr": 0.05}
    one, two = (KFAC(m, damping=0.0, **options) for m in (model, other))
    for _ in range(3):
        one.step(lambda: F.mse_loss(model(x), y))
        two.step(lambda: F.mse_loss(other(changed(x)), y))
    assert one.skipped == two.skipped == 0
    end, twin = model(probe).detach(), other(changed(probe)).detach()
    assert relative(end, start) > 1e-2
    assert relative(twin, end) < 1e-6


# --------------------------------------------------------- intervals, momentum, clipping
def small() -> tuple[nn.Module, Tensor, Tensor]:
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    return model, draw(10, 3), classes(10, below=3)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_intervals() -> None:
    """Between updates there are no hooks, and factors, bases and inverses stay as they are."""
    model, x, y = small()
    opt = KFAC(model, lr=0.01, factor_interval=3, inverse_interval=6)
    seen = []
    for t in range(14):
        assert (hooks(model) > 0) == (t % 3 == 0)
        opt.step(lambda: F.cross_entropy(model(x), y))
        own = opt.layers["0"]
        seen.append((id(own.left), id(own.left_basis), id(opt._inverses["0"][1])))
    factors = [t for t in range(1, 14) if seen[t][0] != seen[t - 1][0]]
    bases = [t for t in range(1, 14) if seen[t][1] != seen[t - 1][1]]
    inverses = [t for t in range(1, 14) if seen[t][2] != seen[t - 1][2]]
    assert factors == [3, 6, 9, 12]
    assert bases == inverses == [6, 12]
    assert opt.clock.curvature_updates == 5


def test_averaged_factors_of_several_batches() -> None:
    model, x, y = small()
    opt = KFAC(model, factor_decay=0.8, **{**PLAIN, "lr": 0.0})
    wanted: list[Tensor] = []
    for k in range(4):
        part = slice(2 * k, 2 * k + 4)
        opt.step(lambda part=part: F.cross_entropy(model(x[part]), y[part]))
        ones = torch.ones(4, 1, dtype=F64)
        a = torch.cat([x[part], ones], 1)
        wanted.append(a.T @ a / 4)
    weights = torch.tensor([0.8**3, 0.8**2, 0.8, 1.0], dtype=F64)
    mean = (weights[:, None, None] * torch.stack(wanted)).sum(0) / weights.sum()
    own = opt.layers["0"]
    assert torch.allclose(own.right[0] / own.bias, mean)


def test_momentum_weight_decay_and_groups() -> None:
    """By hand, from natural gradients of curvlib.kfac."""
    model, x, y = small()
    groups = [
        {"params": [model[0].weight, model[2].weight], "weight_decay": 0.1, "lr": 0.05},
        {"params": [model[0].bias, model[2].bias], "momentum": 0.3},
    ]
    rest = {k: v for k, v in PLAIN.items() if k not in ("lr", "momentum")}
    opt = KFAC(model, groups, lr=0.02, momentum=0.7, damping=0.1, factor_decay=0.0, **rest)
    risk = cl.Risk(model, nn.CrossEntropyLoss(), (x, y))
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    buffers = {n: torch.zeros_like(p) for n, p in expected.items()}
    for _ in range(3):
        K = cl.kfac(risk, fisher="empirical", eigen_corrected=False)
        natural = risk.space.split(K.solve(risk.gradient(), 0.1, relative=False))
        opt.step(lambda: F.cross_entropy(model(x), y))
        for n, v in zip(risk.space.names, natural, strict=True):
            heavy = n.endswith("weight")
            lr, momentum, decay = (0.05, 0.7, 0.1) if heavy else (0.02, 0.3, 0.0)
            buffers[n] = momentum * buffers[n] + v
            expected[n] = (1 - lr * decay) * expected[n] - lr * buffers[n]
    for n, p in model.named_parameters():
        assert relative(p.detach(), expected[n]) < 1e-10, n


@pytest.mark.parametrize("kl_clip", [1e-4, 1e-2, 1e6])
def test_kl_clipping_bounds_the_quadratic_form(kl_clip: float) -> None:
    model, x, y = small()
    risk = cl.Risk(model, nn.CrossEntropyLoss(), (x, y))
    K = cl.kfac(risk, fisher="empirical", eigen_corrected=False)
    before = flat(model)
    opt = KFAC(model, damping=0.01, **{**PLAIN, "lr": 0.3, "kl_clip": kl_clip})
    opt.step(lambda: F.cross_entropy(model(x), y))
    step = before - flat(model)
    size = float(step @ (K @ step) + 0.01 * step @ step)
    free = float(
        0.09
        * risk_gradient(model, before, x, y)
        @ K.solve(risk_gradient(model, before, x, y), 0.01, relative=False)
    )
    assert math.isclose(size, min(kl_clip, free), rel_tol=1e-6)


def risk_gradient(model: nn.Module, at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    twin = copy.deepcopy(model)
    torch.nn.utils.vector_to_parameters(at, twin.parameters())
    return gradient(twin, F.cross_entropy(twin(x), y))


# -------------------------------------------------------- what has no factors, and why
@pytest.mark.parametrize("inner", ["adamw", "sgd"])
def test_parameters_without_factors_take_torchs_first_order_steps(inner: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.ones(3))
            self.idle = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            shift = F.linear(x[:, :2], self.idle.weight).sum()  # of one logit: else no gradient
            return self.body(x) * self.scale + shift * torch.eye(3, dtype=F64)[0]

    model = seeded(Model())
    model.body.requires_grad_(False)
    model.body.bias.requires_grad_(True)
    twin = copy.deepcopy(model)
    x, y = draw(8, 3), classes(8, below=3)
    opt = KFAC(
        model,
        lr=0.05,
        momentum=0.9,
        inner=inner,
        inner_scale=0.5,
        weight_decay=0.1,
        factor_interval=1,
    )
    rest = [twin.scale, twin.idle.weight]
    torchs: torch.optim.Optimizer
    if inner == "adamw":
        torchs = torch.optim.AdamW(rest, lr=0.025, weight_decay=0.1)
    else:
        torchs = torch.optim.SGD(rest, lr=0.025, momentum=0.9)
    for _ in range(5):
        twin.load_state_dict({**twin.state_dict(), "body.bias": model.body.bias.detach().clone()})
        torchs.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        if inner == "sgd":
            with torch.no_grad():
                for p in rest:
                    p.mul_(1 - 0.025 * 0.1)
        torchs.step()
        opt.step(lambda: F.cross_entropy(model(x), y))
    assert relative(model.scale.detach(), twin.scale.detach()) < 1e-10
    assert relative(model.idle.weight.detach(), twin.idle.weight.detach()) < 1e-10
    found = opt.coverage()
    assert found.covered == ("body.bias",)
    assert "module was not called" in found.uncovered["idle.weight"]
    assert "it belongs to Model" in found.uncovered["scale"]


def test_routed_layers_keep_their_factors_while_they_are_not_called() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor, route: str) -> Tensor:
            return getattr(self, route)(x)

    model, x, y = seeded(Routed()), draw(6, 3), classes(6, below=2)
    opt = KFAC(model, **{**PLAIN, "lr": 0.01})
    for route in "aabab":
        opt.step(lambda route=route: F.cross_entropy(model(x, route), y))
    assert opt.layers.keys() == {"a", "b"}
    assert math.isclose(opt.layers["a"].bias, 1 - 0.95**3)
    assert math.isclose(opt.layers["b"].bias, 1 - 0.95**2)


@pytest.mark.parametrize("kind", ["lstm", "gru", "attention"])
def test_modules_with_layers_inside_train(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if kind == "attention":
                self.body = nn.MultiheadAttention(4, 2, batch_first=True)
            else:
                self.body = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](4, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = self.body(x, x, x) if kind == "attention" else self.body(x)
            return self.head(out[0].mean(1))

    model = seeded(Model()).train()
    x = draw(16, 5, 4)
    y = (x[..., 0].sum(1) > 0).long()
    for options in ({}, {"eigen_corrected": True}, {"gates": "separate"}):
        twin = copy.deepcopy(model)
        opt = KFAC(twin, lr=0.1, momentum=0.0, damping=0.01, factor_interval=2, **options)
        losses = [float(opt.step(lambda twin=twin: F.cross_entropy(twin(x), y))) for _ in range(25)]
        assert losses[-1] < 0.5 * losses[0]
        assert opt.coverage().percent == 100.0


# ------------------------------------------------------------------ states and lifetimes
def test_closing_and_forgetting() -> None:
    model, x, y = small()
    opt = KFAC(model)
    assert hooks(model) > 0
    opt.close()
    assert hooks(model) == 0
    opt = KFAC(model)
    twin = copy.deepcopy(model)  # an average of weights, say
    twin(x).sum().backward()
    assert not opt.recorder._passes
    alive = weakref.ref(opt)
    del opt
    gc.collect()
    assert alive() is None
    assert hooks(model) == 0
    F.cross_entropy(model(x), y).backward()


def test_a_bias_that_is_frozen_starts_its_layer_anew() -> None:
    model, x, y = small()
    opt = KFAC(model, **{**PLAIN, "lr": 0.01})
    for frozen in (False, True, False):
        model[0].bias.requires_grad_(not frozen)
        before = flat(model)
        for _ in range(3):
            opt.step(lambda: F.cross_entropy(model(x), y))
        assert opt.layers["0"].right.shape[-1] == (3 if frozen else 4)
        assert relative(flat(model), before) > 1e-6
    assert opt.skipped == 0


def test_singular_factors_without_damping_skip_the_step() -> None:
    model, x, y = small()
    opt = KFAC(model, damping=0.0, **PLAIN)
    before = flat(model)
    opt.step(lambda: F.cross_entropy(model(x[:2]), y[:2]))  # two examples span no four columns
    assert opt.skipped == 1
    assert torch.equal(flat(model), before)
    assert not opt.layers


# -------------------------------------------------------------------------------- errors
def test_bad_arguments() -> None:
    model, x, y = small()
    with pytest.raises(TypeError, match=r"the model first, got generator; pass KFAC\(model\)"):
        KFAC(model.parameters())
    for name, bad in {
        "fisher": "type2",
        "sharing": "sum",
        "inner": "lion",
        "gates": "each",
        "damping_form": "split",
    }.items():
        with pytest.raises(ValueError, match=f"{name}= is one of"):
            KFAC(model, **{name: bad})
    for name in ("factor_interval", "inverse_interval", "max_side"):
        with pytest.raises(ValueError, match=f"{name}= is at least 1, got 0"):
            KFAC(model, **{name: 0})
    for name in ("relative", "eigen_corrected", "dense_norms"):
        with pytest.raises(TypeError, match=f"{name}= is True or False, got int"):
            KFAC(model, **{name: 1})
    with pytest.raises(ValueError, match="eigen_corrected=True needs damping_form='exact'"):
        KFAC(model, eigen_corrected=True, damping_form="factored")
    with pytest.raises(ValueError, match="factor_decay= is in"):
        KFAC(model, factor_decay=1.0)
    with pytest.raises(ValueError, match="kl_clip= is above 0"):
        KFAC(model, kl_clip=0.0)
    with pytest.raises(ValueError, match="pass loss=.*fisher='empirical'"):
        KFAC(model, fisher="mc")
    with pytest.raises(ValueError, match="is no parameter of the model; pass the parameter object"):
        KFAC(model, nn.Linear(2, 2).parameters())
    assert hooks(model) == 0
    opt = KFAC(model, [model[0].weight])
    with pytest.raises(ValueError, match="is no parameter of the model"):
        opt.add_param_group({"params": nn.Linear(2, 2).double().parameters()})
    assert len(opt.param_groups) == 1
    opt.step(lambda: F.cross_entropy(model(x), y))


def test_curvature_that_cannot_be_had() -> None:
    model, x, y = small()
    twin = copy.deepcopy(model)
    opt = KFAC(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="no layer of the model that it was given was called"):
        opt.step()
    opt = KFAC(model, fisher="mc", loss=nn.CrossEntropyLoss())
    with pytest.raises(RuntimeError, match="did not reach the output of the model"):
        opt.step(lambda: F.cross_entropy(model[2](model[1](model[0](x))), y))
    opt = KFAC(model)
    state = opt.state_dict()
    state["curvlib"]["extra"]["layers"] = {"7": {}}
    with pytest.raises((ValueError, TypeError), match="has not; load a state|missing"):
        KFAC(twin).load_state_dict(state)


# ---------------------------------------------------------- decompositions that do not converge
class Failing:
    """``torch.linalg.eigh`` that fails in some of its calls."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        self.fails, self.calls, self.own = fails, 0, torch.linalg.eigh

    def __call__(self, matrix: Tensor) -> Any:
        self.calls += 1
        if self.fails(self.calls):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return self.own(matrix)


def test_a_second_try_with_jitter_is_the_same_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = torch.diag(torch.tensor([1.0, 2.0, 2.0, 5.0], dtype=F64)).expand(2, 4, 4)
    expected, _ = eigenbasis(factor)
    monkeypatch.setattr(torch.linalg, "eigh", Failing(lambda call: call == 1))
    values, vectors = eigenbasis(factor)
    torch.testing.assert_close(values, expected, rtol=1e-8, atol=0.0)
    again = vectors @ torch.diag_embed(values) @ vectors.mT
    torch.testing.assert_close(again, factor, rtol=0.0, atol=1e-8)
    monkeypatch.setattr(torch.linalg, "eigh", Failing(lambda call: True))
    with pytest.raises(torch.linalg.LinAlgError, match="failed to converge"):
        eigenbasis(factor)


@pytest.mark.parametrize("eigen_corrected", [False, True])
def test_a_basis_is_kept_where_there_is_no_new_one(
    monkeypatch: pytest.MonkeyPatch, eigen_corrected: bool
) -> None:
    model, x, y = small()
    opt = KFAC(model, **{**PLAIN, "lr": 0.01}, eigen_corrected=eigen_corrected)

    def step() -> None:
        opt.step(lambda: F.cross_entropy(model(x), y))

    step()
    before = opt.layers
    monkeypatch.setattr(torch.linalg, "eigh", Failing(lambda call: True))
    step()
    assert (opt.failed, opt.skipped, opt.clock.steps) == (2, 0, 2)
    for name, own in opt.layers.items():
        assert torch.equal(own.right_basis, before[name].right_basis)
        assert not torch.equal(own.right, before[name].right)
    assert opt.state_dict()["curvlib"]["extra"]["failed"] == 2
    monkeypatch.undo()
    step()
    assert opt.failed == 2
    assert not torch.equal(opt.layers["0"].right_basis, before["0"].right_basis)


def test_layers_without_any_basis_have_the_inner_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = small()
    opt = KFAC(model, **PLAIN)
    monkeypatch.setattr(torch.linalg, "eigh", Failing(lambda call: call <= 2))  # of the first side
    opt.step(lambda: F.cross_entropy(model(x), y))
    assert opt.failed == 1
    assert set(opt.coverage().uncovered) == {"0.weight", "0.bias"}
    opt.step(lambda: F.cross_entropy(model(x), y))
    assert opt.coverage().percent == 100.0


def test_factors_that_overflow_skip_the_step() -> None:
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, 0.6)
    nn.init.constant_(model.bias, 0.6)
    x, y = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(64, 1)
    opt = KFAC(model, **PLAIN)
    before = flat(model)
    opt.step(lambda: F.mse_loss(model(x), y) * 2e19)  # sums of squares are finite, means are not
    assert (opt.skipped, opt.clock.steps) == (1, 0)
    assert torch.equal(flat(model), before)
    assert not opt.layers
