"""Linear datamodeling scores, mislabel detection, removal curves: against counts by hand."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from curvlib.influence.bank import RetrainingBank, retraining_bank
from curvlib.influence.lds import LDS, linear_datamodeling_score
from curvlib.influence.mislabel import MislabelDetection, mislabel_detection
from curvlib.influence.ranks import rank_correlation
from curvlib.influence.removal import RemovalCurve, removal_curve
from tests.programs import Program

F64 = torch.float64
N, Q = 20, 6
WORTH = torch.randn(Q, N, dtype=F64, generator=torch.Generator().manual_seed(0))


def train(keep: Tensor, seeds: Sequence[int], noise: float = 0.0) -> Tensor:
    """Linear "models": each example lowers each query's loss by its worth, plus noise."""
    out = -(keep.double() @ WORTH.mT)
    for row, seed in zip(out, seeds, strict=True):
        row += noise * torch.randn(Q, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return out


def noisy(keep: Tensor, seeds: Sequence[int]) -> Tensor:
    return train(keep, seeds, 3.0)


# -------------------------------------------------------------------------- ranks
@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(0, 5), st.integers(0, 10**6))
def test_rank_correlation_is_scipys(n: int, levels: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(3, n, dtype=F64, generator=g)
    b = torch.randint(levels + 1, (3, n), generator=g).double()  # with ties
    found = rank_correlation(a, b)
    for i in range(3):
        if len(set(b[i].tolist())) == 1:
            assert float(found[i]) == 0.0
        else:
            assert float(found[i]) == pytest.approx(stats.spearmanr(a[i], b[i]).statistic)


# --------------------------------------------------------------------------- bank
def test_subsets_and_seeds() -> None:
    asked: list[tuple[Tensor, list[int]]] = []

    def note(keep: Tensor, seeds: Sequence[int]) -> Tensor:
        asked.append((keep.clone(), list(seeds)))
        return train(keep, seeds)

    bank = retraining_bank(note, N, masks=7, repeats=3, fraction=0.3, together=4, seed=5)
    assert [len(seeds) for _, seeds in asked] == [4] * 5 + [1]
    assert torch.equal(torch.cat([keep for keep, _ in asked]), bank.keep.repeat_interleave(3, 0))
    assert len({seed for _, seeds in asked for seed in seeds}) == 21
    assert bank.keep.sum(1).tolist() == [6] * 7
    assert bank.losses.shape == (7, 3, Q)
    torch.testing.assert_close(bank.losses[:, 0], train(bank.keep, [0] * 7))
    again = retraining_bank(train, N, masks=7, repeats=3, fraction=0.3, seed=5)
    torch.testing.assert_close(again.losses, bank.losses)  # one by one, not four at a time
    other = retraining_bank(train, N, masks=7, repeats=3, fraction=0.3, seed=6)
    assert not torch.equal(other.keep, bank.keep)


def test_reliability_tells_noise_from_signal() -> None:
    """Independent noise of variance s2 on signals of variance v: v / (v + s2 / R) for Pearson."""
    bank = retraining_bank(noisy, N, masks=400, repeats=4, seed=1)
    signal_variance = train(bank.keep, [0] * 400).var(0)
    expected = signal_variance / (signal_variance + 9.0 / 4)
    assert float((bank.reliability() - expected).abs().max()) < 0.12
    clean = retraining_bank(train, N, masks=30, repeats=4)
    torch.testing.assert_close(clean.reliability(), torch.ones(Q, dtype=F64))


def test_the_bank_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    code = f"""
import os, signal
from tests.influence.test_evaluation import N, noisy, retraining_bank
calls = 0
def dying(keep, seeds):
    global calls
    calls += 1
    if calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return noisy(keep, seeds)
retraining_bank(dying, N, masks=6, repeats=2, checkpoint={str(path)!r}, save_every=0)
"""
    ended = Program("-c", code).finish()
    assert ended.code == -signal.SIGKILL, ended.error
    calls = []

    def counting(keep: Tensor, seeds: Sequence[int]) -> Tensor:
        calls.append(1)
        return noisy(keep, seeds)

    bank = retraining_bank(counting, N, masks=6, repeats=2, checkpoint=path)
    assert len(calls) == 12 - 4
    assert torch.equal(bank.losses, retraining_bank(noisy, N, masks=6, repeats=2).losses)
    with pytest.raises(ValueError, match="another problem"):
        retraining_bank(noisy, N, masks=6, repeats=2, checkpoint=path, problem="other")


def test_saved_and_loaded(tmp_path: Path) -> None:
    bank = retraining_bank(noisy, N, masks=8, repeats=2)
    again = RetrainingBank.load(bank.save(tmp_path / "bank.safetensors"))
    assert torch.equal(again.keep, bank.keep)
    score = linear_datamodeling_score(WORTH, again)
    assert LDS.load(score.save(tmp_path / "lds.safetensors")).value == score.value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.001}, "fraction= keeps 0 of 20 examples"),
        ({"fraction": 1.0}, "fraction= keeps 20 of 20 examples"),
        ({"masks": 0}, "masks= needs a positive number, got 0"),
        ({"repeats": 0}, "repeats= needs a positive number, got 0"),
        ({"together": -1}, "together= needs a positive number, got -1"),
    ],
)
def test_bad_banks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retraining_bank(train, N, **options)


def test_bad_losses() -> None:
    with pytest.raises(ValueError, match=r"should return losses of shape \[1, Q\].*got \[6\]"):
        retraining_bank(lambda keep, seeds: train(keep, seeds)[0], N, masks=2)
    with pytest.raises(FloatingPointError, match=r"of subset 0 with seed \d+ .* diverged"):
        retraining_bank(lambda keep, seeds: train(keep, seeds) / 0.0, N, masks=2)
    one = retraining_bank(train, N, masks=2, repeats=1)
    with pytest.raises(ValueError, match="two retrainings of each subset at least, got 1"):
        one.reliability()


# ---------------------------------------------------------------------------- LDS
def test_perfect_scores_of_clean_and_of_noisy_banks() -> None:
    clean = linear_datamodeling_score(WORTH, retraining_bank(train, N, masks=40, repeats=2))
    assert clean.value == pytest.approx(1.0)
    assert clean.ceiling == pytest.approx(1.0)
    bank = retraining_bank(noisy, N, masks=300, repeats=4)
    found = linear_datamodeling_score(WORTH, bank)
    assert found.value == pytest.approx(found.ceiling, abs=0.03)  # nothing else is to be known
    wrong = linear_datamodeling_score(-WORTH, bank)
    assert wrong.value == pytest.approx(-found.value)
    assert not bool(torch.isnan(found.each).any())
    one = retraining_bank(train, N, masks=5, repeats=1)
    assert linear_datamodeling_score(WORTH, one).ceiling != 0.0  # NaN


def test_the_score_is_the_mean_of_scipys() -> None:
    bank = retraining_bank(noisy, N, masks=30, repeats=3)
    g = torch.Generator().manual_seed(4)
    scores = torch.randn(Q, N, dtype=F64, generator=g)
    found = linear_datamodeling_score(scores, bank)
    for q in range(Q):
        sums = (bank.keep * scores[q]).sum(1)
        truth = stats.spearmanr(sums, -bank.losses[:, :, q].mean(1)).statistic
        assert float(found.each[q]) == pytest.approx(truth)
    assert found.value == pytest.approx(float(found.each.mean()))


def test_the_interval_covers() -> None:
    """95 % intervals of 60 banks, against the value of a very large bank."""
    g = torch.Generator().manual_seed(9)
    scores = WORTH + torch.randn(Q, N, dtype=F64, generator=g)
    truth = linear_datamodeling_score(scores, retraining_bank(noisy, N, masks=4000, together=4000))
    hits = 0
    for seed in range(60):
        bank = retraining_bank(noisy, N, masks=60, seed=seed, together=300)
        found = linear_datamodeling_score(scores, bank, resamples=120, seed=seed)
        hits += found.low <= truth.value <= found.high
        assert found.low < found.value < found.high
    assert hits >= 53  # binomial(60, 0.95): below with probability 0.02; queries add to it


def test_bad_scores() -> None:
    bank = retraining_bank(train, N, masks=4, repeats=1)
    with pytest.raises(TypeError, match="takes scores .* got list and RetrainingBank"):
        linear_datamodeling_score([1.0], bank)  # type: ignore[arg-type]  # the wrong type
    with pytest.raises(ValueError, match=r"expected scores of shape \[6, 20\].*got \[20, 6\]"):
        linear_datamodeling_score(WORTH.mT, bank)
    with pytest.raises(ValueError, match="NaN or infinite"):
        linear_datamodeling_score(WORTH / 0.0, bank)


# ------------------------------------------------------------------------ mislabel
@settings(max_examples=40, deadline=None)
@given(st.integers(3, 30), st.integers(0, 10**6))
def test_detection_against_counting(n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(6, (n,), generator=g).double()  # with ties
    flipped = torch.rand(n, generator=g) < 0.4
    flipped[0], flipped[1] = True, False
    found = mislabel_detection(scores, flipped, inspected=[0.5, 1.0])
    above = scores[flipped][:, None] - scores[~flipped][None]
    auc = float((above > 0).double().mean() + 0.5 * (above == 0).double().mean())
    assert found.auc == pytest.approx(auc)
    assert float(found.found[1]) == 1.0
    top = sorted(range(n), key=lambda i: (-float(scores[i]), i))[: max(1, round(0.5 * n))]
    share = sum(bool(flipped[i]) for i in top) / int(flipped.sum())
    assert float(found.found[0]) == pytest.approx(share)
    assert bool((found.curve.diff() >= 0).all())


def test_bad_detection(tmp_path: Path) -> None:
    scores, flipped = torch.arange(4.0), torch.tensor([True, False, False, True])
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((scores, flipped.double()), {}, r"flipped \[N\] of type bool.*float64"),
        ((scores / 0.0, flipped), {}, "NaN or infinite"),
        ((scores, flipped & False), {}, "0 of 4 examples are mislabelled; detection needs both"),
        ((scores, flipped), {"inspected": [1.5]}, r"takes fractions in \(0, 1\], got \[1.5\]"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            mislabel_detection(*arguments, **options)
    found = mislabel_detection(scores, flipped)
    assert MislabelDetection.load(found.save(tmp_path / "m.safetensors")).auc == found.auc


# ------------------------------------------------------------------------- removal
def test_removal_of_linear_models_is_the_sum_of_scores(tmp_path: Path) -> None:
    total = WORTH.mean(0)
    found = removal_curve(noisy, total, removed=[1, 3, 8], repeats=4)
    top = total.sort(descending=True).values
    expected = torch.stack([top[:1].sum(), top[:3].sum(), top[:8].sum()])
    torch.testing.assert_close(found.change, expected)  # seeds are paired: no noise
    assert bool((found.change_stderr < 1e-12).all())
    assert bool((found.random < found.change).all())
    assert bool((found.random_stderr > 0.0).all())
    path = tmp_path / "curve.safetensors"

    def dying(keep: Tensor, seeds: Sequence[int]) -> Tensor:
        if not bool(keep.all()):
            raise RuntimeError("power cut")
        return noisy(keep, seeds)

    with pytest.raises(RuntimeError, match="power cut"):
        removal_curve(dying, total, removed=[1, 3, 8], repeats=4, checkpoint=path, save_every=0)
    again = removal_curve(noisy, total, removed=[1, 3, 8], repeats=4, checkpoint=path)
    assert torch.equal(again.losses, found.losses)
    assert torch.equal(RemovalCurve.load(found.save(tmp_path / "r")).change, found.change)


def test_bad_removal() -> None:
    total = WORTH.mean(0)
    for removed in ([], [0], [3, 2], [20], [2, 2]):
        with pytest.raises(ValueError, match="takes increasing numbers of examples from 1 to 19"):
            removal_curve(train, total, removed=removed)
    with pytest.raises(ValueError, match="needs two models at least, for standard errors, got 1"):
        removal_curve(train, total, removed=[1], repeats=1)
    with pytest.raises(ValueError, match=r"finite scores of shape \[N\], got \[6, 20\]"):
        removal_curve(train, WORTH, removed=[1])
    with pytest.raises(ValueError, match=r"losses of shape \[5, Q\], got \[6\]"):
        removal_curve(lambda keep, seeds: train(keep, seeds)[0], total, removed=[1])


# ------------------------------------------------------------------------- pictures
def test_figures() -> None:
    pytest.importorskip("matplotlib")
    bank = retraining_bank(noisy, N, masks=10, repeats=2)
    ax = linear_datamodeling_score(WORTH, bank).plot()
    assert ax.get_ylabel() == "linear datamodeling score"
    ax = mislabel_detection(torch.arange(4.0), torch.tensor([True, False, False, True])).plot()
    assert ax.get_xlabel() == "examples inspected"
    ax = removal_curve(noisy, WORTH.mean(0), removed=[1, 3]).plot()
    assert ax.get_xlabel() == "examples removed"
