"""Losses over a whole data set, in torch's own words: what a row of ``cases.py`` means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

F64 = torch.float64


@dataclass(frozen=True)
class Truth:
    """A loss over the whole data set, in torch's own words.

    Attributes:
        kind: ``"ce" | "nll" | "mse" | "bce" | "other"``.
        targets: Targets of all examples, ``[N, ...]``.
        objective: The loss that is meant, of all outputs and targets at once.
        terms: The sum of loss terms of some examples.
        divisor: ``objective = terms / divisor`` (1 for sums).
        weights: How much each loss term counts, in the shape of the terms.
    """

    kind: str
    targets: Tensor
    objective: Callable[[Tensor, Tensor], Tensor]
    terms: Callable[[Tensor, Tensor], Tensor]
    divisor: float
    weights: Tensor | None = None


def cross_entropy(y: Tensor, classes: int, **kw: Any) -> Truth:
    """Class indices or probabilities, class weights, smoothing, ignored indices, sums."""
    weight, smoothing = kw.get("weight"), kw.get("label_smoothing", 0.0)
    w = torch.ones(classes, dtype=F64) if weight is None else weight.double()
    if y.is_floating_point():
        soft = y * (1 - smoothing) + smoothing / classes
        counts = torch.tensordot(soft, w, dims=([1], [0]))
        divisor = y.numel() / classes
    else:
        valid = y != kw.get("ignore_index", -100)
        own = w[y.clamp(min=0)] * valid
        counts = ((1 - smoothing) * own + smoothing * w.mean() * valid).double()
        divisor = float(own.sum())
    return _truth("ce", F.cross_entropy, y, divisor, counts, kw)


def nll(y: Tensor, classes: int, **kw: Any) -> Truth:
    w = kw.get("weight", torch.ones(classes, dtype=F64)).double()
    own = w[y.clamp(min=0)] * (y != kw.get("ignore_index", -100))
    return _truth("nll", F.nll_loss, y, float(own.sum()), own, kw)


def mse(y: Tensor, **kw: Any) -> Truth:
    return _truth("mse", F.mse_loss, y, float(y.numel()), torch.ones_like(y), kw)


def bce(y: Tensor, **kw: Any) -> Truth:
    positive = kw.get("pos_weight", torch.ones((), dtype=F64))
    counts = (positive * y + (1 - y)) * kw.get("weight", torch.ones((), dtype=F64))
    function = F.binary_cross_entropy_with_logits
    return _truth("bce", function, y, float(y.numel()), counts, kw)


def _truth(kind: str, f: Any, y: Tensor, divisor: float, counts: Tensor, kw: Any) -> Truth:
    summed = kw.get("reduction") == "sum"
    rest = {k: v for k, v in kw.items() if k != "reduction"}
    terms = partial(f, reduction="sum", **rest)
    objective = terms if summed else partial(f, **rest)
    return Truth(kind, y, objective, terms, 1.0 if summed else divisor, counts)


def other(y: Tensor, mean: Callable[[Tensor, Tensor], Tensor], count: float) -> Truth:
    """A loss that curvlib does not know: a mean over ``count`` terms."""
    per_example = count / y.shape[0]
    return Truth("other", y, mean, lambda o, t: mean(o, t) * (per_example * t.shape[0]), count)
