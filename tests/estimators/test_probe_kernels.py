"""Probes by position, and kernels that read their products: by emulation, and on a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import curvlib as cl
from curvlib.core.operator import LinearOperator
from curvlib.estimators import sampling, stopping
from curvlib.estimators.philox import BITS, draw_keys, words
from curvlib.estimators.probe_kernels import FILLED, SOURCE, TILE, ProbeKernels
from curvlib.estimators.probes import fill_signs
from tests.cuda_on_cpu import NVCC, Emulated, cubin, emulated, guarded, untouched

F64, F32 = torch.float64, torch.float32
LENGTHS = [1, 31, 128, TILE - 1, TILE, TILE + 5, 3 * TILE + 1]


def _kernels(order: int = 0) -> ProbeKernels:
    return ProbeKernels(Emulated(SOURCE, order))  # type: ignore[arg-type]


def _keys(count: int, seed: int = 0) -> Tensor:
    return draw_keys(count, torch.Generator().manual_seed(seed))


def _signs(keys: Tensor, length: int, dtype: torch.dtype = F64) -> Tensor:
    rows = torch.empty((len(keys), length), dtype=dtype)
    fill_signs(rows, keys)
    return rows


# ------------------------------------------------------------------------------- Philox
def _philox(key: int, counter: int) -> list[int]:
    """Philox4x32-10 from its definition, in Python's integers."""
    k, x = [key % 2**32, key // 2**32 % 2**32], [counter % 2**32, counter // 2**32, 0, 0]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x[2], 2**32)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


def test_words_are_those_of_philox() -> None:
    # the published answer for a counter and a key of zeros
    assert _philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    keys = torch.tensor([0, -1, 2**63 - 1, 0x299F31D0A4093822])
    found = words(keys, 3).to(torch.int64) % 2**32
    expected = [[_philox(k % 2**64, c) for c in range(3)] for k in keys.tolist()]
    assert found.tolist() == expected


def test_keys_do_not_depend_on_how_many_are_drawn() -> None:
    assert torch.equal(_keys(5)[:3], _keys(3))
    assert len(set(_keys(64).tolist())) == 64


@pytest.mark.parametrize("length", LENGTHS)
def test_signs_are_the_bits(length: int) -> None:
    keys = _keys(2)
    found = _signs(keys, length, torch.float16)
    for row, key in zip(found, keys.tolist(), strict=True):
        for j in {0, length // 2, length - 1}:
            bit = _philox(key % 2**64, j // BITS)[j % BITS // 32] >> (j % 32) & 1
            assert row[j] == (-1.0 if bit else 1.0)
    assert torch.equal(found.abs(), torch.ones_like(found))


def test_signs_are_balanced_and_independent() -> None:
    W = _signs(_keys(40), 20_000)
    gram = W @ W.mT / 20_000 - torch.eye(40, dtype=F64)
    assert gram.abs().max() < 5.0 / 20_000**0.5
    assert W.mean(1).abs().max() < 5.0 / 20_000**0.5
    assert W.mean(0).abs().max() < 6.0 / 40**0.5


# ------------------------------------------------------------------ kernels by emulation
@emulated
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("length", [1, 33, FILLED - 1, FILLED + 200])
def test_a_kernel_writes_the_probes(dtype: torch.dtype, length: int) -> None:
    keys, rows = _keys(3), guarded(torch.zeros(3, length, dtype=dtype))
    _kernels().fill(rows, keys)
    assert torch.equal(rows, _signs(keys, length, dtype))
    assert untouched(rows)


@emulated
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_kernel_reads_products(dtype: torch.dtype, length: int) -> None:
    count, known = 19, 3
    generator = torch.Generator().manual_seed(1)
    Y = guarded(torch.randn(count, length, generator=generator, dtype=F64).to(dtype), offset=1)
    keys, W = _keys(count), _signs(_keys(count), length, dtype)
    slopes = torch.randn(length, generator=generator, dtype=F64).to(dtype)
    d, r = guarded(slopes), guarded(slopes.square())
    inner, squares = _kernels().read(Y, keys, known=known, diagonal=d, residual=r)
    size = Y.to(F64).abs().sum(1)
    assert ((inner - (W.to(F64) * Y.to(F64)).sum(1)).abs() <= 1e-15 * length * size).all()
    assert torch.allclose(squares, Y.to(F64).square().sum(1), rtol=1e-13, atol=0)
    expected, residual = slopes.clone(), slopes.square()
    for k, (w, y) in enumerate(zip(W, Y, strict=True)):
        sampling.regress(expected, residual, None, known + k + 1, w, y)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(d, expected, rtol=0, atol=8 * eps)
    assert torch.allclose(r, residual, rtol=40 * eps, atol=40 * eps)
    assert untouched(d)
    assert untouched(r)
    assert torch.equal(_kernels().read(Y, keys)[0], inner)  # without diagonals


@emulated
def test_the_order_of_threads_does_not_matter() -> None:
    Y, keys = torch.randn(40, TILE + 9, generator=torch.Generator().manual_seed(2)), _keys(40)
    found = []
    for order in range(3):
        d, r = torch.zeros(TILE + 9), torch.zeros(TILE + 9)
        found.append((*_kernels(order).read(Y, keys, diagonal=d, residual=r), d, r))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@emulated
@pytest.mark.parametrize("probes_at_once", [1, 7])
def test_estimates_are_the_same_with_kernels(
    probes_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    A = torch.randn(500, 500, generator=torch.Generator().manual_seed(3), dtype=F64)
    op = LinearOperator(lambda V: (A + A.mT) @ V, (500, 500), dtype=F64, symmetric=True)
    settings = {"method": "hutchinson", "probes": 20, "seed": 4, "block": probes_at_once}

    def by_position(rows: Tensor, law: str, generator: torch.Generator, spread: None) -> None:
        fill_signs(rows, draw_keys(len(rows), generator))

    monkeypatch.setattr("curvlib.estimators.stopping.fill_probes", by_position)
    found = []
    kernels = _kernels()
    for choice in (None, kernels):
        monkeypatch.setattr(ProbeKernels, "of", lambda rows, choice=choice: choice)
        norm = cl.frobenius_norm(op, **{k: v for k, v in settings.items() if k != "method"})
        parts = cl.diagonal(op, blocks={"a": slice(0, 99), "b": slice(50, 400)}, **settings)
        found.append((cl.trace(op, **settings), cl.diagonal(op, **settings), norm, parts))
    launched = kernels.kernels.launched  # type: ignore[attr-defined]
    assert launched.count("read_float64") >= 3 * -(-20 // probes_at_once)
    plain, fused = found
    assert torch.allclose(plain[0].samples, fused[0].samples, rtol=1e-12, atol=1e-10)
    assert torch.allclose(plain[1].value, fused[1].value, rtol=1e-12, atol=1e-12)
    assert torch.allclose(plain[1].stderr, fused[1].stderr, rtol=1e-10)
    assert plain[2].value == pytest.approx(fused[2].value, rel=1e-12)
    assert torch.allclose(plain[3].value, fused[3].value, rtol=1e-12, atol=1e-12)
    means = [parts.block_means("blocks") for parts in (plain[3], fused[3])]
    assert torch.allclose(means[0].value, means[1].value, rtol=1e-12, atol=1e-12)
    assert torch.allclose(means[0].stderr, means[1].stderr, rtol=1e-10)


@emulated
def test_a_product_that_is_not_finite_is_named_with_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ProbeKernels, "of", lambda rows: _kernels())
    op = LinearOperator(lambda V: V * torch.nan, (200, 200), dtype=F64, symmetric=True)
    for estimate in (cl.trace, cl.diagonal):
        with pytest.raises(FloatingPointError, match="product 1 with .* NaN or infinite"):
            estimate(op, method="hutchinson", probes=4)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_kernels_compile_without_spills(architecture: str, tmp_path: Path) -> None:
    said = cubin(SOURCE, tmp_path, architecture)
    assert len(re.findall("Compiling entry function", said)) == 4
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"] * 4


# ------------------------------------------------------------------------------ choice
def test_no_kernels_without_a_gpu() -> None:
    assert ProbeKernels.of(torch.zeros(2, 3)) is None
    assert ProbeKernels.of(torch.zeros(3, 2).mT) is None
    assert ProbeKernels.of(torch.zeros(2, 3, dtype=torch.float16)) is None


# -------------------------------------------------------------------------------- CUDA
@pytest.mark.gpu
def test_probes_of_estimates_on_a_gpu_are_by_position() -> None:
    A = torch.ones(10_001, device="cuda")
    op = LinearOperator(lambda V: A[:, None] * V, (10_001,) * 2, dtype=F32, device="cuda", psd=True)
    plan = stopping.plan(
        op, law="rademacher", limit=9, block=4, tolerance=None, generator=None, seed=1,
        checkpoint=None, save_every=30.0, progress=None,
    )  # fmt: skip
    state = plan.random.get_state()
    W, following = plan.draw(state, 3)
    generator = torch.Generator(device="cuda")
    generator.set_state(state)
    keys = draw_keys(3, generator)
    assert torch.equal(following, generator.get_state())
    assert torch.equal(W.cpu(), _signs(keys.cpu(), 10_001, F32))
    plain = torch.empty_like(W)
    fill_signs(plain, keys)
    assert torch.equal(W, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("length", [*LENGTHS, 1_000_003])
def test_kernels_on_a_gpu_are_those_of_torch(dtype: torch.dtype, length: int) -> None:
    pytest.importorskip("cupy")
    count = 19
    Y = torch.randn(count, length, device="cuda", dtype=dtype)
    keys = _keys(count).cuda()
    kernels = ProbeKernels.of(Y)
    assert kernels is not None
    W, plain = torch.empty_like(Y), torch.empty_like(Y)
    kernels.fill(W, keys)
    fill_signs(plain, keys)
    assert torch.equal(W, plain)
    d, r = torch.zeros(2, length, device="cuda", dtype=dtype)
    expected, residual = torch.zeros(2, length, device="cuda", dtype=dtype)
    inner, squares = kernels.read(Y, keys, diagonal=d, residual=r)
    for k, (w, y) in enumerate(zip(W, Y, strict=True)):
        sampling.regress(expected, residual, None, k + 1, w, y)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(inner, torch.linalg.vecdot(W.double(), Y.double()), rtol=0, atol=1e-8)
    assert torch.allclose(squares, Y.double().square().sum(1), rtol=1e-12)
    assert torch.allclose(d, expected, rtol=0, atol=8 * eps)
    assert torch.allclose(r, residual, rtol=40 * eps, atol=40 * eps)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["trace", "diagonal"])
def test_estimates_on_a_gpu_are_the_same_with_kernels(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cupy")
    A = torch.randn(700, 700, generator=torch.Generator().manual_seed(3), dtype=F64).cuda()
    op = LinearOperator(
        lambda V: (A + A.mT) @ V, (700, 700), dtype=F64, device="cuda", symmetric=True
    )
    fused = getattr(cl, method)(op, method="hutchinson", probes=20, seed=4)
    monkeypatch.setattr(ProbeKernels, "of", lambda rows: None)
    plain = getattr(cl, method)(op, method="hutchinson", probes=20, seed=4)
    value = torch.as_tensor(plain.value)
    assert torch.allclose(value, torch.as_tensor(fused.value), rtol=1e-10, atol=1e-10)
