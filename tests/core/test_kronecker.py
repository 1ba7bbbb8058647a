"""Kronecker-factored operators, against dense float64 linear algebra."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlib.core.kronecker import DAMPING, Kronecker, KroneckerBlock, Part
from curvlib.core.operator import LinearOperator
from curvlib.core.space import ParamSpace
from curvlib.estimators.solve import solve

F64 = torch.float64


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def _basis(groups: int, n: int, seed: int) -> Tensor:
    return torch.linalg.qr(_draw(groups, n, n, seed=seed)).Q


def _block(
    name: str, parts: tuple[Part, ...], shape: tuple[int, int, int], sides: str = "lr"
) -> KroneckerBlock:
    """``sides`` says which have a basis: ``"lr"``, ``"l"``, ``"r"`` or ``""``."""
    seed = sum(map(ord, name))
    G, out, width = shape
    return KroneckerBlock(
        name,
        parts,
        _basis(G, out, seed) if "l" in sides else None,
        _basis(G, width, seed + 1) if "r" in sides else None,
        _draw(*shape, seed=seed + 2).square() + 1e-3,
    )


def _places(block: KroneckerBlock) -> Tensor:
    """Flat coordinates ``[G, O, I]``, entry by entry from the definition of a part."""
    G, out, _ = block.eigenvalues.shape
    columns = []
    for part in block.parts:
        found = torch.empty(G, out, part.columns, dtype=torch.long)
        for g in range(G):
            for o in range(out):
                for c in range(part.columns):
                    place = c * out + o if part.transposed else o * part.columns + c
                    found[g, o, c] = part.start + g * out * part.columns + place
        columns.append(found)
    return torch.cat(columns, -1)


def _dense(op: Kronecker, size: int) -> Tensor:
    """The matrix by explicit Kronecker products of eigenvectors."""
    A = op.rest * torch.eye(size, dtype=F64)
    for block in op.blocks_of.values():
        places = _places(block)
        for g, index in enumerate(places):
            O, width = index.shape
            left = torch.eye(O, dtype=F64) if block.left is None else block.left[g]
            right = torch.eye(width, dtype=F64) if block.right is None else block.right[g]
            Q = torch.kron(left.contiguous(), right.contiguous())
            flat = index.reshape(-1)
            A[flat[:, None], flat] = (Q * block.eigenvalues[g].reshape(-1)) @ Q.T
    return A


LINEAR = _block("linear", (Part(2, 3), Part(20, 1)), (1, 4, 4))
TURNED = _block("turned", (Part(0, 3, transposed=True),), (1, 2, 3))
GROUPED = _block("grouped", (Part(1, 2), Part(13, 1)), (2, 3, 3))
EMBEDDING = _block("embedding", (Part(0, 3),), (1, 5, 3), "r")
HEAD = _block("head", (Part(0, 3),), (1, 5, 3), "l")
SCALE = _block("scale", (Part(0, 3), Part(3, 3)), (1, 1, 6), "r")
CASES: dict[str, tuple[list[KroneckerBlock], int, float]] = {
    "weight and bias": ([LINEAR], 24, 0.4),
    "transposed": ([TURNED], 6, 0.0),
    "groups": ([GROUPED], 19, 0.3),
    "embedding": ([EMBEDDING], 15, 0.0),
    "diagonal inputs": ([HEAD], 15, 0.0),
    "scale": ([SCALE], 6, 0.0),
    "diagonal": ([_block("d", (Part(0, 4),), (1, 1, 4), "")], 4, 0.0),
    "several": ([LINEAR, replace(EMBEDDING, parts=(Part(24, 3),))], 40, 0.2),
}


@pytest.mark.parametrize("name", CASES)
def test_everything_against_dense(name: str) -> None:
    blocks, n, rest = CASES[name]
    op = Kronecker(blocks, n, rest=rest)
    A = op.to_dense()
    assert torch.allclose(A, _dense(op, n), rtol=1e-12, atol=1e-13)
    eye = torch.eye(n, dtype=F64)
    X = _draw(n, 3, seed=9)
    for damping in (0.0, 0.7):
        B = A + damping * eye
        expected = torch.linalg.solve(B, X)
        assert torch.allclose(op.solve(X, damping, relative=False), expected, rtol=1e-8)
        first = op.solve(X[:, 0], damping=damping, relative=False)
        assert torch.allclose(first, expected[:, 0], rtol=1e-8)
        inverse = op.inverse(damping, relative=False).to_dense()
        assert torch.allclose(inverse, torch.linalg.inv(B), rtol=1e-8, atol=1e-10)
        found = op.logdet(damping, relative=False)
        assert math.isclose(found, float(torch.logdet(B)), rel_tol=1e-9, abs_tol=1e-10)
        shifted = op.shift(damping)
        assert isinstance(shifted, Kronecker)
        assert torch.allclose(shifted.to_dense(), B, rtol=1e-12, atol=1e-13)
    values, vectors = torch.linalg.eigh(A)
    for p in (-1, -0.5, 0, 0.5, 2):
        expected = (vectors * values**p) @ vectors.T
        found = op.power(p).to_dense()
        assert (found - expected).abs().max() <= 1e-10 * float(expected.abs().max())
    assert math.isclose(op.trace(), float(A.trace()), rel_tol=1e-12)
    assert torch.allclose(op.diagonal(), A.diagonal(), rtol=1e-12)
    assert op.psd


@given(
    out=st.integers(1, 4),
    width=st.integers(1, 4),
    fraction=st.floats(1e-3, 10.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_relative_damping_is_a_fraction_of_each_blocks_mean(
    out: int, width: int, fraction: float, seed: int
) -> None:
    n = out * width
    one = _block("a", (Part(0, width),), (1, out, width))
    two = _block("b", (Part(n, width),), (1, out, width))
    two = replace(two, eigenvalues=100.0 * two.eigenvalues)
    op = Kronecker([one, two], 2 * n)
    x = _draw(2 * n, seed=seed)
    A = op.to_dense()
    expected = torch.empty_like(x)
    for where in (slice(0, n), slice(n, 2 * n)):
        block = A[where, where]
        damped = block + fraction * block.diagonal().mean() * torch.eye(n, dtype=F64)
        expected[where] = torch.linalg.solve(damped, x[where])
    assert torch.allclose(op.solve(x, fraction), expected, rtol=1e-8)
    assert torch.allclose(op.inverse(fraction) @ x, expected, rtol=1e-8)


def test_the_default_damping() -> None:
    op = Kronecker([TURNED], 6)
    x = _draw(6)
    assert torch.equal(op.solve(x), op.solve(x, DAMPING, relative=True))
    mean = float(op.to_dense().diagonal().mean())
    assert math.isclose(op.dampings()["turned"], 0.1 * mean, rel_tol=1e-12)
    damped = op.to_dense() + 0.1 * mean * torch.eye(6, dtype=F64)
    assert math.isclose(op.logdet(), float(torch.logdet(damped)), rel_tol=1e-10)


def test_estimators_get_absolute_damping() -> None:
    """``curvlib.solve`` knows one damping, and it is absolute."""
    op = Kronecker([TURNED], 6)
    b = _draw(6)
    expected = torch.linalg.solve(op.to_dense() + 0.5 * torch.eye(6, dtype=F64), b)
    direct = solve(op, b, damping=0.5)
    assert direct.method == "direct"
    assert torch.allclose(direct.value, expected)
    A = op.to_dense()
    cg = solve((A + A.T) * 0.5, b, damping=0.5, preconditioner=op, method="cg")
    assert cg.iterations.tolist() == [1]
    assert torch.allclose(cg.value, expected)


def test_blocks_of_layers_are_of_the_same_kind() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double()
    space = ParamSpace.of(model)
    linear = replace(LINEAR, parts=(Part(0, 3), Part(12, 1)))
    norm = _block("norm", (Part(16, 4), Part(20, 4)), (1, 1, 8), "r")
    op = Kronecker([linear, norm], 24, space=space)
    parts = op.blocks()
    A = op.to_dense()
    assert all(isinstance(part, Kronecker) for part in parts.values())
    assert torch.allclose(parts["0"].to_dense(), A[:16, :16], atol=1e-13)
    assert torch.allclose(parts["1"].to_dense(), A[16:, 16:], atol=1e-13)
    assert parts["1"].shape == (8, 8)
    other = Kronecker([linear], 24, space=space, rest=0.5).blocks()["1"]
    assert torch.equal(other.to_dense(), 0.5 * torch.eye(8, dtype=F64))
    half = op._restricted(("0.weight",))  # a part of a block is a submatrix
    assert isinstance(half, LinearOperator)
    assert torch.allclose(half.to_dense(), A[:12, :12], atol=1e-13)


def test_blocks_that_share_a_parameter_stay_with_it() -> None:
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Linear(8, 1)).double()
    above = replace(LINEAR, name="above", parts=(Part(0, 3), Part(24, 1)))
    below = _block("below", (Part(12, 3), Part(28, 1)), (1, 4, 4))
    op = Kronecker([above, below], 33, space=ParamSpace.of(model), rest=0.5)
    found = op._restricted(("0.weight", "1.weight"))
    where = torch.arange(32)
    assert isinstance(found, Kronecker)
    assert torch.allclose(found.to_dense(), op.to_dense()[where][:, where], atol=1e-13)


def test_fingerprints_differ() -> None:
    first = Kronecker([TURNED], 6)
    other = first.with_eigenvalues([2.0 * TURNED.eigenvalues])
    assert first.fingerprint() == Kronecker([TURNED], 6).fingerprint()
    assert first.fingerprint() != other.fingerprint()
    assert Kronecker([LINEAR], 24).fingerprint() != Kronecker([LINEAR], 24, rest=1).fingerprint()


def _zeroed(block: KroneckerBlock, *, every: bool) -> KroneckerBlock:
    values = block.eigenvalues.clone()
    values.view(-1)[: None if every else 1] = 0.0
    return replace(block, eigenvalues=values)


def test_errors_of_the_constructor() -> None:
    with pytest.raises(ValueError, match="at least one block, got none"):
        Kronecker([], 3)
    with pytest.raises(ValueError, match="different names"):
        Kronecker([TURNED, TURNED], 12)
    with pytest.raises(ValueError, match="'other' overlaps another"):
        Kronecker([TURNED, replace(TURNED, name="other", parts=(Part(5, 3),))], 20)
    with pytest.raises(ValueError, match="ends at 6, but there are 5 coordinates"):
        Kronecker([TURNED], 5)
    with pytest.raises(ValueError, match=r"with as many columns as its parts, 2, got \[1, 2, 3\]"):
        Kronecker([replace(TURNED, parts=(Part(0, 2),))], 6)
    with pytest.raises(ValueError, match=r"expected left eigenvectors \[1, 2, 2\]"):
        Kronecker([replace(TURNED, left=torch.eye(3, dtype=F64)[None])], 6)
    with pytest.raises(TypeError, match="float32 or float64, got torch.float16"):
        Kronecker([replace(TURNED, left=TURNED.left.half())], 6)
    with pytest.raises(ValueError, match="expected all blocks as torch.float64"):
        Kronecker([replace(TURNED, right=TURNED.right.float())], 6)
    bad = TURNED.eigenvalues.clone()
    bad[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="1 of 6 entries of block 'turned' are NaN"):
        Kronecker([replace(TURNED, eigenvalues=bad)], 6)
    with pytest.raises(ValueError, match=r"expected eigenvalues of shapes \[\[1, 2, 3\]\]"):
        Kronecker([TURNED], 6).with_eigenvalues([TURNED.eigenvalues[0]])


def test_errors_of_solving() -> None:
    x = torch.ones(6, dtype=F64)
    singular = Kronecker([_zeroed(TURNED, every=False)], 6)
    with pytest.raises(RuntimeError, match="1 of the 6 eigenvalues of block 'turned' are zero"):
        singular.solve(x, 0.0)
    assert torch.isfinite(singular.solve(x)).all()
    with pytest.raises(RuntimeError, match="1 of 6 of block 'turned' are not, the least is 0"):
        singular.logdet(0.0)
    dead = Kronecker([_zeroed(TURNED, every=True)], 6)
    with pytest.raises(RuntimeError, match="positive mean eigenvalue, but that of block 'turned'"):
        dead.solve(x)
    more = Kronecker([TURNED], 8)
    with pytest.raises(RuntimeError, match=r"2 coordinates \(6:8\) are in no block; leave them"):
        more.solve(torch.ones(8, dtype=F64))
    with pytest.raises(RuntimeError, match="without damping is singular: 2 coordinates"):
        more.solve(torch.ones(8, dtype=F64), 0.0)
    with pytest.raises(RuntimeError, match="log det .* needs positive eigenvalues, but 2 coord"):
        more.logdet(0.0)
    space = ParamSpace.of(nn.Linear(2, 3).double())
    named = Kronecker([TURNED], 9, space=space)
    with pytest.raises(RuntimeError, match=r"3 coordinates \('bias'\) are in no block"):
        named.solve(torch.ones(9, dtype=F64))
    with pytest.raises(ValueError, match="expected a finite number for damping"):
        more.solve(torch.ones(8, dtype=F64), math.inf)


def test_errors_of_powers() -> None:
    singular = Kronecker([_zeroed(TURNED, every=False)], 6)
    with pytest.raises(RuntimeError, match="is infinite: an eigenvalue is zero"):
        singular.power(-1)
    with pytest.raises(RuntimeError, match="block 'turned' .* is not real: the least"):
        Kronecker([TURNED], 6).shift(-1.0).power(0.5)
    with pytest.raises(RuntimeError, match="of 2 coordinates .* is infinite"):
        Kronecker([TURNED], 8).power(-0.5)
