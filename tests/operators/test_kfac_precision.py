"""Factors of half-precision models, added up in float32; and what is not finite, told early."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlib as cl
from curvlib.core.kronecker_blocks import KroneckerBlock
from curvlib.operators.kfac import kfac
from tests.operators.factored import F64, PROBLEMS, Experts, Language, classes, draw, seeded

HALF = [torch.bfloat16, torch.float16]


def factor(block: KroneckerBlock, side: str) -> Tensor:
    """A factor of K-FAC up to its scale: with trace one."""
    basis = block.left if side == "left" else block.right
    values = block.eigenvalues.double().sum(2 if side == "left" else 1)
    own = torch.diag_embed(values)
    if basis is not None:
        own = basis.double() @ own @ basis.double().mT
    return own / own.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


MODELS: dict[str, Any] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)),
        lambda: (draw(40, 6), classes(40, below=3)),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2), nn.SiLU(), nn.Flatten(), nn.Linear(36, 3)
        ),
        lambda: (draw(20, 2, 5, 5), classes(20, below=3)),
    ),
    "language model": (
        lambda: Language(tied=True),
        lambda: (classes(12, 4, below=7), classes(12, 4, below=7, seed=1)),
    ),
    "experts": (Experts, lambda: (draw(12, 4, 3), classes(12, below=2))),
}


def half_and_exact(name: str, dtype: torch.dtype) -> tuple[cl.Risk, cl.Risk]:
    """The same numbers, that all fit into the short type, computed with in both."""
    make, data = MODELS[name]
    model = seeded(make()).to(dtype)
    exact = seeded(make())
    exact.load_state_dict({k: v.to(F64) for k, v in model.state_dict().items()})
    x, y = data()
    short = x.to(dtype) if x.is_floating_point() else x
    longer = short.to(F64) if x.is_floating_point() else x
    loss = nn.CrossEntropyLoss()
    return (
        cl.Risk(model, loss, list(zip(short.split(7), y.split(7), strict=True))),
        cl.Risk(exact, loss, (longer, y)),
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_models_have_nearly_the_same_factors(name: str, dtype: torch.dtype) -> None:
    """Activations and gradients have 8 or 11 bits; sums of them have more."""
    short, exact = half_and_exact(name, dtype)
    K, other = kfac(short), kfac(exact)
    assert K.dtype == torch.float32
    bound = 8 * torch.finfo(dtype).eps
    for layer, block in K.kronecker().blocks_of.items():
        theirs = other.kronecker().blocks_of[layer]
        for side in ("left", "right"):
            assert gap(factor(block, side), factor(theirs, side)) < bound, (layer, side)
    assert gap(K.to_dense(), other.to_dense()) < bound
    assert math.isclose(K.trace(), other.trace(), rel_tol=bound)


@pytest.mark.parametrize("dtype", HALF)
def test_sums_are_not_in_half_precision(dtype: torch.dtype) -> None:
    """Of 3000 ones a sum in bfloat16 stops at 256, and in float16 at 2048; this one is exact."""
    model = nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        model.weight.zero_(), model.bias.fill_(1.0)  # each gradient at the outputs is 2
    x, y = torch.ones(3000, 3, dtype=dtype), torch.zeros(3000, 2, dtype=dtype)
    for size in (3000, 50):
        data = list(zip(x.split(size), y.split(size), strict=True))
        K = kfac(cl.Risk(model, nn.MSELoss(reduction="sum"), data), fisher="empirical")
        for op in (K, K.kronecker()):
            A = op.to_dense()
            expected = torch.full((8, 8), 4.0 * 3000)
            assert gap(A, expected) < 1e-6


def test_operators_in_float64_of_float32_models() -> None:
    short, exact = half_and_exact("mlp", torch.float32)
    K = kfac(short, dtype=torch.float64)
    assert K.dtype == torch.float64
    assert gap(K.to_dense(), kfac(exact).to_dense()) < 1e-6


# --------------------------------------------------------------------- not finite
@pytest.mark.parametrize("where", ["inputs", "gradients"])
@pytest.mark.parametrize("prefix", [None, 2])
def test_what_is_not_finite_is_named_before_the_eigendecomposition(
    where: str, prefix: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its batch, with its layer; no decomposition is tried."""

    def never(*of: Any) -> None:
        raise AssertionError("an eigendecomposition of what is not finite")

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs().sqrt()  # no derivative at zero

    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), Root()))
    x, y = PROBLEMS["mlp"][2]
    x = x.clone()
    if where == "inputs":
        x[2] = torch.nan
    else:
        with torch.no_grad():
            model[2].weight.zero_(), model[2].bias.zero_()
    risk = cl.Risk(model, nn.CrossEntropyLoss(), list(zip(x.split(1), y.split(1), strict=True)))
    monkeypatch.setattr(torch.linalg, "eigh", never)
    # with a prefix that is fine, the decomposition has been done
    prefix = prefix if where == "gradients" else None if prefix is None else 3
    text = (
        "the inputs of layer '0' are not finite at batch 2"
        if where == "inputs"
        else "the gradients at the outputs of layer '.' are not finite at batch 0"
    )
    with pytest.raises(FloatingPointError, match=text):
        kfac(risk, prefix=prefix)


def test_what_is_not_finite_after_the_prefix_is_named() -> None:
    x, y = PROBLEMS["mlp"][2]
    x = x.clone()
    x[4] = torch.inf
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    risk = cl.Risk(model, nn.CrossEntropyLoss(), list(zip(x.split(1), y.split(1), strict=True)))
    with pytest.raises(FloatingPointError, match="inputs of layer '0' are not finite at batch 4"):
        kfac(risk, prefix=2)
