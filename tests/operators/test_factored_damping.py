"""Factored damping against Martens and Grosse's formula on dense factors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlib.core.kronecker import Kronecker
from curvlib.core.kronecker_blocks import KroneckerBlock, Part
from curvlib.operators.factors.factored_damping import factor_eigenvalues, factored_damping


def spd(n, seed, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n + 2, generator=draw, dtype=torch.float64)
    return scale * root @ root.mT


def block(L, R, name="layer", start=0):
    """The Kronecker product of two dense factors as a block."""
    l, left = torch.linalg.eigh(L)
    r, right = torch.linalg.eigh(R)
    parts = (Part(start, len(R)),)
    return KroneckerBlock(name, parts, left[None], right[None], (l[:, None] * r)[None])


sizes = st.integers(1, 4)


@given(sizes, sizes, st.floats(1e-3, 10.0), st.floats(1e-3, 1e3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_each_factor_is_damped_as_in_the_paper(n, m, damping, scale, seed):
    L, R = spd(n, seed, scale), spd(m, seed + 1)
    K = Kronecker([block(L, R)], n * m)
    found = factored_damping(K, damping, relative=False).to_dense()
    pi = math.sqrt((float(R.trace()) / m) / (float(L.trace()) / n))
    eye = [torch.eye(k, dtype=torch.float64) for k in (n, m)]
    damped = L + math.sqrt(damping) / pi * eye[0], R + pi * math.sqrt(damping) * eye[1]
    assert torch.allclose(found, torch.kron(*damped), rtol=1e-9, atol=1e-12 * float(found.max()))


def test_relative_damping_is_a_fraction_of_the_mean_eigenvalue():
    L, R = spd(3, 0), spd(2, 1)
    K = Kronecker([block(L, R)], 6)
    mean = float(K.to_dense().trace()) / 6
    found, expected = (
        factored_damping(K, 0.3),
        factored_damping(K, 0.3 * mean, relative=False),
    )
    assert torch.allclose(found.to_dense(), expected.to_dense(), rtol=1e-12)
    x = torch.arange(6.0, dtype=torch.float64)
    exact = torch.linalg.solve(found.to_dense(), x)
    assert torch.allclose(found.solve(x, damping=0.0), exact, rtol=1e-9)
    assert "factors damped" in found.name


def test_groups_have_their_own_split_and_diagonals_are_damped_as_always():
    two = [block(spd(2, s, 10.0**s), spd(3, s + 7)) for s in (0, 1)]
    grouped = KroneckerBlock(
        "conv",
        (Part(0, 3),),
        torch.cat([b.left for b in two]),
        torch.cat([b.right for b in two]),
        torch.cat([b.eigenvalues for b in two]),
    )
    values = torch.tensor([[[1.0, 5.0], [2.0, 1.0]]], dtype=torch.float64)
    diagonal = KroneckerBlock("norm", (Part(12, 2),), None, None, values)
    K = Kronecker([grouped, diagonal], 16)
    found = factored_damping(K, 0.5, relative=False)
    for g, own in enumerate(two):
        alone = factored_damping(Kronecker([own], 6), 0.5, relative=False).to_dense()
        at = slice(6 * g, 6 * g + 6)
        assert torch.allclose(found.to_dense()[at, at], alone, rtol=1e-10)
    assert torch.allclose(found.diagonal()[12:], values.reshape(-1) + 0.5)


def test_which_eigenvalues_are_products():
    own = block(spd(3, 0), spd(4, 1))
    l, r = factor_eigenvalues(own)
    assert torch.allclose(l[:, :, None] * r[:, None], own.eigenvalues, rtol=1e-12)
    assert l.dtype == torch.float64
    bent = own.eigenvalues.clone()
    bent[0, 1, 2] *= 1.0 + 1e-6
    assert factor_eigenvalues(KroneckerBlock("b", own.parts, None, None, bent)) is None
    zero = torch.zeros(1, 2, 2)
    assert factor_eigenvalues(KroneckerBlock("b", (Part(0, 2),), None, None, zero)) is None


def test_what_is_in_no_block_is_damped_too():
    K = Kronecker([block(spd(2, 0), spd(2, 1))], 5, rest=1.0)
    assert factored_damping(K, 0.25, relative=False).diagonal()[4] == 1.25


def test_bad_input():
    K = Kronecker([block(spd(2, 0), spd(2, 1))], 4)
    with pytest.raises(TypeError, match="expected a Kronecker-factored operator, got Tensor"):
        factored_damping(torch.eye(2))
    with pytest.raises(ValueError, match="damping= is at least 0, got -1"):
        factored_damping(K, -1.0)
    values = torch.tensor([[[1.0, 5.0], [2.0, 1.0]]])
    corrected = Kronecker([KroneckerBlock("a", (Part(0, 2),), None, None, values)], 4)
    with pytest.raises(ValueError, match="no block .* is a product of two factors"):
        factored_damping(corrected)
