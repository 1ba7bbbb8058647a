"""Losses as sums of terms: which are recognized, what they mean, what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlib.core.loss import read_loss

F64 = torch.float64


@pytest.mark.parametrize(
    ("loss", "kind", "reduction"),
    [
        (nn.CrossEntropyLoss(), "cross_entropy", "mean"),
        (nn.CrossEntropyLoss(reduction="sum"), "cross_entropy", "sum"),
        (F.cross_entropy, "cross_entropy", "mean"),
        (partial(F.cross_entropy, reduction="sum"), "cross_entropy", "sum"),
        (nn.functional.nll_loss, "nll", "mean"),
        (nn.NLLLoss(ignore_index=3), "nll", "mean"),
        (nn.MSELoss(reduction="sum"), "mse", "sum"),
        (partial(F.mse_loss), "mse", "mean"),
        (nn.BCEWithLogitsLoss(), "bce_with_logits", "mean"),
        (partial(F.binary_cross_entropy_with_logits, reduction="sum"), "bce_with_logits", "sum"),
        (nn.L1Loss(), "other", "mean"),
        (nn.SmoothL1Loss(reduction="sum"), "other", "sum"),
        (nn.KLDivLoss(reduction="batchmean"), "other", "mean"),
        (lambda out, y: (out - y).square().mean(), "other", "mean"),
        (partial(F.mse_loss, target=torch.zeros(1)), "other", "mean"),
        (partial(F.cross_entropy, size_average=False), "other", "mean"),
    ],
)
def test_losses_that_are_recognized(loss: Any, kind: str, reduction: str) -> None:
    found = read_loss(loss)
    assert (found.kind, found.reduction) == (kind, reduction)


def test_what_looks_like_a_known_loss_and_is_not() -> None:
    class Doubled(nn.CrossEntropyLoss):
        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            return 2 * super().forward(out, y)

    assert read_loss(Doubled()).kind == "other"
    hooked = nn.CrossEntropyLoss()
    hooked.register_forward_hook(lambda m, i, o: 3 * o)
    assert read_loss(hooked).kind == "other"
    wrapped = partial(partial(F.cross_entropy, reduction="sum"), label_smoothing=0.1)
    found = read_loss(wrapped)
    assert (found.kind, found.reduction, found.label_smoothing) == ("cross_entropy", "sum", 0.1)


def test_a_user_may_say_the_reduction_of_an_unknown_loss() -> None:
    loss = lambda out, y: (out - y).abs().sum()  # noqa: E731
    assert read_loss(loss, "sum").reduction == "sum"
    assert read_loss(nn.MSELoss(), "mean").reduction == "mean"


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"class CrossEntropyLoss; pass an instance: CrossEntropyL"):
        read_loss(nn.CrossEntropyLoss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a callable of \(output, target\), got str"):
        read_loss("mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction= is 'mean' or 'sum', got 'average'"):
        read_loss(F.mse_loss, "average")
    with pytest.raises(ValueError, match="reduction='none', which gives no scalar"):
        read_loss(nn.MSELoss(reduction="none"))
    with pytest.raises(ValueError, match="reduction='none', which gives no scalar"):
        read_loss(partial(F.cross_entropy, reduction="none"))
    with pytest.raises(ValueError, match="reduction='sum' contradicts the loss, which has 'mean'"):
        read_loss(nn.CrossEntropyLoss(), "sum")
    with pytest.raises(ValueError, match="reduction='mean' contradicts the loss, which has 'sum'"):
        read_loss(nn.L1Loss(reduction="sum"), "mean")


# ------------------------------------------------------------------ totals and terms
@st.composite
def classification(draw: st.DrawFn) -> dict[str, Any]:
    classes = draw(st.integers(2, 4))
    shape = draw(st.lists(st.integers(1, 3), max_size=2))
    n = draw(st.integers(2, 6))
    seed = draw(st.integers(0, 10**6))
    g = torch.Generator().manual_seed(seed)
    out = torch.randn(n, classes, *shape, dtype=F64, generator=g)
    soft = draw(st.booleans())
    settings: dict[str, Any] = {"label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.7]))}
    if soft:
        y = torch.rand(n, classes, *shape, dtype=F64, generator=g).softmax(1)
    else:
        y = torch.randint(classes, (n, *shape), generator=g)
        settings["ignore_index"] = draw(st.sampled_from([-100, 0, 7]))
        drop = torch.rand(y.shape, generator=g) < draw(st.sampled_from([0.0, 0.4, 0.8]))
        y = torch.where(drop, settings["ignore_index"], y)
        y.view(-1)[0] = classes - 1 if settings["ignore_index"] != classes - 1 else 0
    if draw(st.booleans()):
        settings["weight"] = torch.rand(classes, dtype=F64, generator=g) + 0.1
    return {"out": out, "y": y, "settings": settings, "cut": draw(st.integers(1, n - 1))}


@settings(max_examples=150, deadline=None)
@given(problem=classification())
def test_sums_over_terms_give_the_cross_entropy_of_the_whole(problem: dict[str, Any]) -> None:
    """However the data is cut, totals over terms are torch's mean of the concatenation."""
    out, y, cut = problem["out"], problem["y"], problem["cut"]
    whole = F.cross_entropy(out, y, **problem["settings"])
    for loss in (
        nn.CrossEntropyLoss(**problem["settings"]),
        partial(F.cross_entropy, **problem["settings"]),
    ):
        read = read_loss(loss)
        assert read.known
        parts = [(out[:cut], y[:cut]), (out[cut:], y[cut:])]
        total = sum(float(read.total(o, t)) for o, t in parts)
        terms = sum(float(read.terms(t)) for _, t in parts)
        torch.testing.assert_close(torch.tensor(total / terms, dtype=F64), whole)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 6),
    shape=st.lists(st.integers(1, 3), max_size=2),
    kind=st.sampled_from(["mse", "bce", "bce pos", "bce weight"]),
    seed=st.integers(0, 999),
)
def test_sums_over_entries(n: int, shape: list[int], kind: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    out = torch.randn(n, *shape, 3, dtype=F64, generator=g)
    y = torch.rand(out.shape, dtype=F64, generator=g)
    w = torch.rand(3, dtype=F64, generator=g)
    loss = {
        "mse": nn.MSELoss(),
        "bce": nn.BCEWithLogitsLoss(),
        "bce pos": nn.BCEWithLogitsLoss(pos_weight=w),
        "bce weight": nn.BCEWithLogitsLoss(weight=w),
    }[kind]
    read = read_loss(loss)
    total = read.total(out[:1], y[:1]) + read.total(out[1:], y[1:])
    torch.testing.assert_close(total / (read.terms(y[:1]) + read.terms(y[1:])), loss(out, y))


def test_half_precision_outputs_are_summed_in_float32() -> None:
    out = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.tensor([0, 1, 2, 1])
    total = read_loss(nn.CrossEntropyLoss()).total(out, y)
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(
        float(F.cross_entropy(out.double(), y, reduction="sum")), rel=1e-6
    )


def test_outputs_and_targets_that_do_not_fit() -> None:
    ce, mse = read_loss(nn.CrossEntropyLoss()), read_loss(nn.MSELoss())
    out = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"\[4, 3\] needs class indices of shape \[4\], got \[5\]"):
        ce.total(out, torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"classes are axis 1.*transpose\(1, 2\)"):
        ce.total(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"class probabilities of shape \[4, 3\], got \[4\]"):
        ce.total(out, torch.zeros(4))
    with pytest.raises(ValueError, match=r"targets of shape \[4, 3\], got \[4\]"):
        mse.total(out, torch.zeros(4))  # torch would broadcast
    with pytest.raises(TypeError, match=r"needs floating-point targets, got torch.int64"):
        mse.total(out, torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(
        TypeError, match="the model returned dict and the target is Tensor; use for"
    ):
        ce.total({"logits": out}, torch.zeros(4, dtype=torch.long))


def test_unknown_losses_that_return_no_scalar() -> None:
    with pytest.raises(ValueError, match=r"should return a scalar, got shape \[4, 3\]; reduce it"):
        read_loss(lambda o, y: (o - y) ** 2).total(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(TypeError, match=r"should return a scalar tensor, got float"):
        read_loss(lambda o, y: 1.0).total(torch.zeros(4, 3), torch.zeros(4, 3))


def test_descriptions() -> None:
    assert read_loss(nn.CrossEntropyLoss(ignore_index=0)).describe() == (
        "cross_entropy (mean, ignore_index=0)"
    )
    weighted = nn.CrossEntropyLoss(torch.ones(3), label_smoothing=0.1, reduction="sum")
    text = read_loss(weighted).describe()
    assert "sum" in text
    assert "label_smoothing=0.1" in text
    assert "weight of 3" in text
