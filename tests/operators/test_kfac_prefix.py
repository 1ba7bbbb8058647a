"""Fits in one pass: eigenvectors of the first batches, corrected eigenvalues of all data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvlib as cl
from curvlib.operators.kfac import KFAC, kfac
from tests.operators.factored import (
    CE,
    F64,
    FISHERS,
    PROBLEMS,
    classes,
    coordinates,
    draw,
    problem,
    relative,
    rotated_block,
    seeded,
)


class Counted:
    """Batches that are counted as they are read; without a length if ``count`` is false."""

    def __init__(self, batches: list[Any], *, stop: int | None = None) -> None:
        self.batches, self.read, self.started, self.stop = batches, 0, 0, stop

    def __iter__(self) -> Iterator[Any]:
        self.started += 1
        for batch in self.batches:
            self.read += 1
            if self.read == self.stop:
                raise OSError("the disk is gone")
            yield batch


class Sized(Counted):
    def __len__(self) -> int:
        return len(self.batches)


def batches(name: str, size: int = 1) -> list[Any]:
    x, y = PROBLEMS[name][2]
    return list(zip(x.split(size), y.split(size), strict=True))


NAMES = ["mlp", "tied, masked", "grouped convolutions", "language model"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fisher", FISHERS)
def test_eigenvalues_are_of_all_data_in_the_basis_of_the_prefix(name: str, fisher: str) -> None:
    """So their sum is the trace of the whole Fisher matrix, exactly."""
    data = batches(name)
    risk = problem(name).on(data)
    K = kfac(risk, fisher=fisher, prefix=2)
    first = kfac(risk.on(data[:2]), fisher=fisher)
    whole = FISHERS[fisher](risk)
    assert list(K.blocks_of) == list(first.blocks_of)
    for layer, block in K.blocks_of.items():
        for mine, other in ((block.left, first.blocks_of[layer].left),
                            (block.right, first.blocks_of[layer].right)):  # fmt: skip
            assert (mine is None) == (other is None)
            assert mine is None or torch.equal(mine, other)
        expected = rotated_block(K, layer, whole).diagonal()
        assert relative(block.eigenvalues.reshape(-1), expected) < 1e-10, layer
    covered = torch.cat([torch.arange(*coordinates(risk, n)) for n in K.coverage().covered])
    assert math.isclose(K.trace(), float(whole.diagonal()[covered].sum()), rel_tol=1e-10)
    # the factors are those of the prefix
    assert relative(K.kronecker().to_dense(), first.kronecker().to_dense()) < 1e-12


@given(prefix=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_correction_never_increases_the_error_for_any_prefix(prefix: int, seed: int) -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), seed)
    x, y = draw(6, 3, seed=seed), classes(6, below=3, seed=seed)
    risk = cl.Risk(model, CE, list(zip(x.split(1), y.split(1), strict=True)))
    K = kfac(risk, prefix=prefix)
    G = cl.ggn(risk).to_dense()
    for layer in K.blocks_of:
        target = rotated_block(K, layer, G)
        mine, other = (
            (torch.diag(op.blocks_of[layer].eigenvalues.reshape(-1)) - target).norm()
            for op in (K, K.kronecker())
        )
        assert mine <= other + 1e-12 * target.norm()


@pytest.mark.parametrize("prefix", [1.0, 5, 6, 50])
@pytest.mark.parametrize("kind", [Counted, Sized])
def test_a_prefix_of_everything_is_the_fit_in_two_passes(prefix: float, kind: Any) -> None:
    data = batches("tied, masked")
    risk = problem("tied, masked").on(kind(data))
    if prefix == 1.0 and kind is Counted:
        with pytest.raises(ValueError, match="the data does not say how many there are"):
            kfac(risk, prefix=prefix)
        return
    K, other = kfac(risk, fisher="mc", prefix=prefix), kfac(risk, fisher="mc")
    assert torch.equal(K.to_dense(), other.to_dense())
    assert torch.equal(K.kronecker().to_dense(), other.kronecker().to_dense())


def test_data_are_read_once() -> None:
    """And most batches go through the model once."""
    data = Sized(batches("mlp"))
    risk = problem("mlp").on(data)
    calls = 0

    def hook(m: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal calls
        calls += 1

    risk.model.register_forward_hook(hook)
    kfac(risk, prefix=2)
    assert (data.started, data.read) == (1, 6)
    assert calls == 2 + 6
    kfac(risk)
    assert (data.started, data.read) == (1 + 2, 6 + 12)
    assert calls == 8 + 12
    kfac(risk, prefix=0.3)  # rounded up
    assert (data.started, calls) == (4, 20 + 2 + 6)


def test_sums_are_scaled_to_all_data() -> None:
    """Of a loss with reduction="sum", whose factors grow with the data."""
    x, y = draw(8, 3).repeat(2, 1), draw(8, 2, seed=1).repeat(2, 1)  # both halves are the same
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)))
    data = list(zip(x.split(8), y.split(8), strict=True))
    risk = cl.Risk(model, nn.MSELoss(reduction="sum"), data)
    K, other = kfac(risk, prefix=1), kfac(risk)
    assert relative(K.to_dense(), other.to_dense()) < 1e-12
    assert relative(K.kronecker().to_dense(), other.kronecker().to_dense()) < 1e-12


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6, 7])
def test_resumed_with_the_same_bits(stop: int, tmp_path: Path) -> None:
    """Stopped when any batch is read, or while it goes through the model."""
    data = batches("tied, masked")
    risk = problem("tied, masked")
    options: dict[str, Any] = {"fisher": "mc", "prefix": 2}
    whole = kfac(risk.on(data), checkpoint=tmp_path / "whole", **options)
    path = tmp_path / "k"
    for broken in ("read", "model"):
        fragile = Sized(data, stop=stop if broken == "read" else None)
        calls = 0

        def hook(m: nn.Module, args: Any, output: Tensor) -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise OSError("the disk is gone")

        handle = risk.model.head.register_forward_hook(hook) if broken == "model" else None
        own = risk.on(fragile)
        if broken == "model" or stop <= len(data):
            with pytest.raises(OSError, match="the disk is gone"):
                kfac(own, checkpoint=path, save_every=0, **options)
        if handle is not None:
            handle.remove()
        fragile.stop = None
        K = kfac(own, checkpoint=path, save_every=0, **options)
        assert torch.equal(K.to_dense(), whole.to_dense())
        assert torch.equal(K.kronecker().to_dense(), whole.kronecker().to_dense())
        with pytest.raises(ValueError, match="other settings: prefix was 2 and is now 3"):
            kfac(own, checkpoint=path, **(options | {"prefix": 3}))
        path.unlink()


def test_progress_counts_the_prefix_twice() -> None:
    seen: list[tuple[float, float | None, str]] = []
    risk = problem("mlp").on(batches("mlp"))
    kfac(risk, prefix=2, progress=lambda done, total, note: seen.append((done, total, note)))
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)
    assert seen[-1] == (8.0, 8.0, "done")


def test_what_the_prefix_never_calls_is_listed() -> None:
    """An expert whose tokens come later: excluded, or with the exact diagonal of all data."""
    x = draw(4, 3, 3)
    x[:2, :, 0] = x[:2, :, 0].abs()  # the first examples have tokens of one expert alone
    x[2, 0, 0] = -1.0
    y = classes(4, below=2)
    risk = problem("experts").on(list(zip(x.split(1), y.split(1), strict=True)))
    found = kfac(risk, prefix=2).coverage().uncovered
    assert found["experts.0.weight"] == "its module was never called (in the prefix)"
    K = kfac(risk, prefix=2, rest="diagonal")
    F = FISHERS["type2"](risk)
    at = slice(*coordinates(risk, "experts.0.weight"))
    assert float(F.diagonal()[at].sum()) > 0
    assert torch.allclose(K.diagonal()[at], F.diagonal()[at], rtol=1e-9)
    assert math.isclose(K.trace(), float(F.trace()), rel_tol=1e-10)


class _Later(nn.Module):
    """Uses its weight by a function, too, in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x)
        return F.linear(out, self.a.weight) if float(x.sum()) > 0 else out


def test_what_is_used_otherwise_after_the_prefix_is_refused() -> None:
    x, y = draw(4, 3).abs(), classes(4, below=3)
    risk = cl.Risk(seeded(_Later()), CE, [(-x[:2], y[:2]), (x[2:], y[2:])])
    with pytest.raises(ValueError, match="after the prefix, layer 'a' is used otherwise: its mod"):
        kfac(risk, prefix=1)


def test_saved_and_loaded(tmp_path: Path) -> None:
    risk = problem("mlp").on(batches("mlp"))
    K = kfac(risk, prefix=0.5)
    found = KFAC.load(K.save(tmp_path / "k"), risk)
    assert found.settings["prefix"] == "3"
    assert torch.equal(found.to_dense(), K.to_dense())
    assert found.dtype == F64


@pytest.mark.parametrize(
    ("prefix", "error", "message"),
    [
        ("1", TypeError, "prefix= is a number of batches or a fraction, got str"),
        (True, TypeError, "prefix= is a number of batches or a fraction, got bool"),
        (0, ValueError, "prefix= is at least 1 batch, got 0"),
        (0.0, ValueError, "a fraction prefix= is above 0 and at most 1, got 0.0; a number of"),
        (2.0, ValueError, "a fraction prefix= is above 0 and at most 1, got 2.0"),
        (math.nan, ValueError, "a fraction prefix= is above 0 and at most 1, got nan"),
    ],
)
def test_bad_prefixes(prefix: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kfac(problem("mlp"), prefix=prefix)


def test_a_prefix_without_correction_is_refused() -> None:
    with pytest.raises(ValueError, match="prefix= leaves all data to the corrected eigenvalues"):
        kfac(problem("mlp"), prefix=1, eigen_corrected=False)


def test_a_data_set_without_a_length() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            yield from ((x[0], y[0]) for x, y in batches("mlp"))

    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    risk = problem("mlp").on(loader)
    with pytest.raises(ValueError, match="pass a number of batches, an int"):
        kfac(risk, prefix=0.5)
    K = kfac(risk, prefix=1)
    assert math.isclose(K.trace(), float(cl.ggn(risk).to_dense().trace()), rel_tol=1e-10)
