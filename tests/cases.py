"""The table of problems: each row is a model, a loss and data, and what they mean to torch.

A row holds twice the same problem: as a user writes it for curvlib (``model, loss, data,
settings``), and as torch defines it on the concatenated data (``outputs``, ``targets``,
``objective``), from which ``oracles.py`` makes matrices. The two halves share no code but the
model itself. ``build(name)`` makes a fresh row, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import models
from tests.truths import Truth, bce, cross_entropy, mse, nll, other

F64 = torch.float64


@dataclass(frozen=True)
class Case:
    """A problem twice: for curvlib, and for the oracles."""

    model: nn.Module
    loss: Any
    data: list[Any]
    truth: Truth
    outputs: Callable[[nn.Module], Tensor]
    single: Callable[[nn.Module, int], Tensor] | None
    settings: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] | None = None  # selected parameters; None: all that require gradients
    smooth: bool = True

    def selected(self) -> dict[str, Tensor]:
        """Selected parameters, by name, tied ones once."""
        named = dict(self.model.named_parameters())
        if self.names is not None:
            return {n: named[n] for n in named if n in self.names}
        return {n: p for n, p in named.items() if p.requires_grad}


# ------------------------------------------------------------------------------ builders
SIZES = (3, 1, 4)  # unequal batches of N = 8 examples
N = sum(SIZES)


def pairs(
    model: nn.Module, loss: Any, x: Tensor, truth: Truth, sizes: Sequence[int] = SIZES, **kw: Any
) -> Case:
    """Batches ``(x, y)``; the truth is the model on all inputs at once."""
    batches = list(
        zip(torch.split(x, list(sizes)), torch.split(truth.targets, list(sizes)), strict=True)
    )
    return Case(
        model.double(),
        loss,
        batches,
        truth,
        outputs=lambda m: m(x),
        single=lambda m, n: m(x[n : n + 1]),
        **kw,
    )


def vectors() -> Tensor:
    return torch.randn(N, 3, dtype=F64)


def images(channels: int = 1) -> Tensor:
    return torch.randn(N, channels, 4, 4, dtype=F64)


def sequences(features: int = 4) -> Tensor:
    return torch.randn(N, 5, features, dtype=F64)


def tokens(vocabulary: int = 6, length: int = 4) -> Tensor:
    return torch.randint(vocabulary, (N, length))


def classes(*shape: int, count: int = 3) -> Tensor:
    return torch.randint(count, shape or (N,))


def _classify(model: nn.Module, x: Tensor, **kw: Any) -> Case:
    """Cross-entropy with three classes."""
    truth = cross_entropy(classes(), 3)
    return pairs(models.shake(model), nn.CrossEntropyLoss(), x, truth, **kw)


def _with_loss(model: Callable[[], nn.Module], x: Callable[[], Tensor], kind: str) -> Case:
    """One of the four known losses on a network with three outputs."""
    net = models.shake(model())
    if kind == "ce":
        return pairs(net, nn.CrossEntropyLoss(), x(), cross_entropy(classes(), 3))
    if kind == "nll":
        return pairs(models.log_probabilities(net), nn.NLLLoss(), x(), nll(classes(), 3))
    if kind == "mse":
        return pairs(net, nn.MSELoss(), x(), mse(torch.randn(N, 3, dtype=F64)))
    return pairs(net, nn.BCEWithLogitsLoss(), x(), bce(torch.rand(N, 3, dtype=F64).round()))


def _mlp_loss(loss: Any, truth: Callable[[], Truth], **kw: Any) -> Case:
    return pairs(models.mlp(), loss, vectors(), truth(), **kw)


def _batch_statistics(norm: nn.Module, x: Tensor, model: Callable[..., nn.Module]) -> Case:
    """Train mode: examples of a batch interact, so the batches define the problem."""
    case = _classify(model(norm), x, sizes=(3, 5))
    parts = torch.split(x, [3, 5])
    case.model.train()
    return replace(case, outputs=lambda m: torch.cat([m(part) for part in parts]), single=None)


def _plainly(model: nn.Module) -> Case:
    """The truth is computed by the model's method ``plain``."""
    x = vectors()
    return replace(
        _classify(model, x),
        outputs=lambda m: m.plain(x),
        single=lambda m, n: m.plain(x[n : n + 1]),
    )


def _frozen(select: Callable[[nn.Module], Any], names: tuple[str, ...]) -> Case:
    case = _classify(models.mlp(), vectors())
    case.model[0].weight.requires_grad_(False)  # type: ignore[index]
    params = select(case.model)
    return replace(case, names=names, settings={} if params is None else {"params": params})


def _masked(y: Tensor, kept: Sequence[int]) -> Tensor:
    """Masks all but the first ``kept[n]`` labels of each example (shuffled positions)."""
    y = y.clone()
    for n, keep in enumerate(kept):
        y[n, torch.randperm(y.shape[1])[keep:]] = -100
    return y


KEPT = (4, 1, 0, 2, 3, 0, 1, 2)  # with SIZES, the batch of one example keeps 2


def language_model(kept: Sequence[int], sizes: Sequence[int] = SIZES) -> Case:
    """Pair batches, flat forward: ``[N * T, V]`` outputs against ``[N * T]`` labels."""
    x, y = tokens(), _masked(classes(N, 4, count=6), kept)
    model = models.shake(models.GPT(vocabulary=6, length=4, width=4, heads=2, hidden=4))
    case = pairs(model, nn.CrossEntropyLoss(), x, cross_entropy(y, 6), sizes=sizes)
    truth = cross_entropy(y.flatten(), 6)
    return replace(
        case,
        truth=truth,
        outputs=lambda m: m(x).flatten(0, 1),
        single=None,
        settings={
            "forward": lambda m, batch: m(batch[0]).flatten(0, 1),
            "target": lambda batch: batch[1].flatten(),
        },
    )


def dictionaries(style: str) -> Case:
    """Batches of the Hugging Face kind, labels masked unequally, in three ways to write them."""
    x, y = tokens(5), _masked(classes(N, 4, count=5), KEPT)
    mask = (torch.rand(N, 4, dtype=F64) < 0.8).double()
    model = models.shake(models.HuggingFaceLike())
    rows = torch.split(torch.arange(N), list(SIZES))
    batches = [{"input_ids": x[r], "attention_mask": mask[r], "labels": y[r]} for r in rows]
    settings: dict[str, Any]
    if style == "own loss":  # no forward: model(**batch), and the loss takes the batch
        loss = lambda out, batch: out.loss  # noqa: E731
        settings = {"weight": lambda batch: (batch["labels"] != -100).sum()}
    elif style == "target":
        loss = nn.CrossEntropyLoss()
        settings = {
            "forward": lambda m, b: m(b["input_ids"], None, b["attention_mask"]).logits.mT,
            "target": lambda b: b["labels"],
        }
    else:
        loss = lambda out, b: F.cross_entropy(out, b["labels"], reduction="sum")  # noqa: E731
        settings = {
            "forward": lambda m, b: m(b["input_ids"], None, b["attention_mask"]).logits.mT,
            "weight": lambda b: (b["labels"] != -100).sum(),
            "reduction": "sum",
        }
    truth = cross_entropy(y, 5, **({"reduction": "sum"} if style == "sum" else {}))
    return Case(
        model.double(),
        loss,
        batches,
        truth if style == "target" else replace(truth, kind="other"),
        outputs=lambda m: m(x, None, mask).logits.mT,
        single=lambda m, n: m(x[n : n + 1], None, mask[n : n + 1]).logits.mT,
        settings=settings,
    )


def _dense_labels(**kw: Any) -> Case:
    """Cross-entropy with ``[N, C, d]`` outputs: a class for each of d = 4 positions."""
    y = _masked(classes(N, 4), KEPT)
    y[y == -100] = kw.get("ignore_index", -100)
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 3, 1))
    x = torch.randn(N, 2, 4, dtype=F64)
    return pairs(model, nn.CrossEntropyLoss(**kw), x, cross_entropy(y, 3, **kw))


def _soft() -> Tensor:
    return torch.rand(N, 3, dtype=F64).softmax(1)


def _quartic(out: Tensor, y: Tensor) -> Tensor:
    return ((out - y) ** 4 / 4 + (out[:, :1] * out[:, 1:]).sum(1, keepdim=True)).mean()


W3 = torch.tensor([0.2, 1.0, 3.0], dtype=F64)
GRID = {
    "mlp": (models.mlp, vectors),
    "conv BatchNorm eval": (lambda: models.convolution(nn.BatchNorm2d(4)).eval(), images),
    "LayerNorm": (lambda: models.normalized(nn.LayerNorm(4)), vectors),
    "MultiheadAttention": (lambda: models.SelfAttention(fused=False), sequences),
}

CASES: dict[str, Callable[[], Case]] = {
    **{
        f"{net} {kind}": partial(_with_loss, model, x, kind)
        for net, (model, x) in GRID.items()
        for kind in ("ce", "nll", "mse", "bce")
    },
    # --- normalization
    "GroupNorm": lambda: _classify(models.convolution(nn.GroupNorm(2, 4)), images()),
    "InstanceNorm": lambda: _classify(
        models.convolution(nn.InstanceNorm2d(4, affine=True)), images()
    ),
    "RMSNorm": lambda: _classify(models.normalized(nn.RMSNorm(4)), vectors()),
    "BatchNorm1d train": lambda: _batch_statistics(nn.BatchNorm1d(4), vectors(), models.normalized),
    "BatchNorm2d train": lambda: _batch_statistics(nn.BatchNorm2d(4), images(), models.convolution),
    "weight norm": lambda: _plainly(models.WeightNormed()),
    # --- attention and recurrence
    "sdpa": lambda: _classify(models.SelfAttention(fused=True), sequences()),
    "encoder eval": lambda: _classify(models.EncoderLayer().eval(), sequences()),
    "encoder train": lambda: _classify(models.EncoderLayer().train(), sequences()),
    "LSTM": lambda: _classify(models.Recurrent(nn.LSTM(2, 3, batch_first=True)), sequences(2)),
    "GRU": lambda: _classify(models.Recurrent(nn.GRU(2, 3, batch_first=True)), sequences(2)),
    # --- structure
    "embedding": lambda: _classify(models.Bag(), tokens()),
    "tied": lambda: language_model((4,) * N),
    "called twice": lambda: _classify(models.Twice(), vectors()),
    "convolutions": lambda: _classify(models.convolutions(), images(2)),
    "untouched": lambda: _with_loss(models.Untouched, vectors, "mse"),
    "0-d": lambda: _classify(models.Scalars(), vectors()),
    "checkpointed": lambda: _plainly(models.Checkpointed()),
    "kinked": lambda: replace(_classify(models.kinked(), images()), smooth=False),
    # --- selections
    "frozen": lambda: _frozen(lambda m: None, ("0.bias", "2.weight", "2.bias")),
    "glob": lambda: _frozen(lambda m: ["2.*"], ("2.weight", "2.bias")),
    "module": lambda: _frozen(lambda m: m[2], ("2.weight", "2.bias")),
    "frozen tensor": lambda: _frozen(lambda m: [m[0].weight, m[2].bias], ("0.weight", "2.bias")),
    # --- batches and masks
    "hf own loss": lambda: dictionaries("own loss"),
    "hf target": lambda: dictionaries("target"),
    "hf sum": lambda: dictionaries("sum"),
    "masked lm": lambda: language_model(KEPT),
    "masked batch": lambda: language_model((4, 1, 0, 0, 3, 2, 1, 2)),
    "one batch": lambda: _mlp_loss(
        nn.CrossEntropyLoss(), lambda: cross_entropy(classes(), 3), sizes=(N,)
    ),
    "dense labels": _dense_labels,
    "dense labels weighted": lambda: _dense_labels(weight=W3, ignore_index=-1),
    # --- losses
    "ce weighted": lambda: _mlp_loss(
        nn.CrossEntropyLoss(weight=W3), lambda: cross_entropy(classes(), 3, weight=W3)
    ),
    "ce smooth": lambda: _mlp_loss(
        partial(F.cross_entropy, label_smoothing=0.2),
        lambda: cross_entropy(classes(), 3, label_smoothing=0.2),
    ),
    "ce smooth weighted masked": lambda: _dense_labels(weight=W3, label_smoothing=0.3),
    "ce soft": lambda: _mlp_loss(F.cross_entropy, lambda: cross_entropy(_soft(), 3)),
    "ce soft weighted smooth": lambda: _mlp_loss(
        nn.CrossEntropyLoss(weight=W3, label_smoothing=0.1),
        lambda: cross_entropy(_soft(), 3, weight=W3, label_smoothing=0.1),
    ),
    "ce sum": lambda: _mlp_loss(
        nn.CrossEntropyLoss(weight=W3, reduction="sum"),
        lambda: cross_entropy(classes(), 3, weight=W3, reduction="sum"),
    ),
    "nll weighted": lambda: pairs(
        models.log_probabilities(models.mlp()),
        nn.NLLLoss(weight=W3, ignore_index=2),
        vectors(),
        nll(classes(), 3, weight=W3, ignore_index=2),
    ),
    "mse function": lambda: _mlp_loss(F.mse_loss, lambda: mse(torch.randn(N, 3, dtype=F64))),
    "mse sum": lambda: _mlp_loss(
        nn.MSELoss(reduction="sum"),
        lambda: mse(torch.randn(N, 3, dtype=F64), reduction="sum"),
    ),
    "bce pos_weight": lambda: _mlp_loss(
        nn.BCEWithLogitsLoss(pos_weight=W3),
        lambda: bce(torch.rand(N, 3, dtype=F64), pos_weight=W3),
    ),
    "bce weighted": lambda: _mlp_loss(
        partial(F.binary_cross_entropy_with_logits, weight=W3),
        lambda: bce(torch.rand(N, 3, dtype=F64).round(), weight=W3),
    ),
    "custom": lambda: _mlp_loss(
        _quartic, lambda: other(torch.randn(N, 3, dtype=F64), _quartic, float(N))
    ),
    "custom weight": lambda: _mlp_loss(
        lambda out, y: F.smooth_l1_loss(out, y, beta=3.0),
        lambda: other(torch.randn(N, 3, dtype=F64), partial(F.smooth_l1_loss, beta=3.0), float(N)),
        settings={"weight": lambda batch: len(batch[0])},
    ),
    "custom sum": lambda: _mlp_loss(
        lambda out, y: (out - y).cosh().log().sum(),
        lambda: Truth(
            "other",
            torch.randn(N, 3, dtype=F64),
            lambda o, t: (o - t).cosh().log().sum(),
            lambda o, t: (o - t).cosh().log().sum(),
            1.0,
        ),
        settings={"reduction": "sum"},
    ),
}


def build(name: str, *, rounded: torch.dtype | None = None) -> Case:
    """A fresh row of the table; its parameters rounded to a shorter type if asked."""
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        case = CASES[name]()
    if rounded is not None:
        with torch.no_grad():
            for p in case.model.parameters():
                p.copy_(p.to(rounded).double())
    return case
