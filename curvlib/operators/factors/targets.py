r"""Cotangents of a batch's output, whose pulled-back squares add up to a Fisher matrix.

For an example with output :math:`f` there are cotangents :math:`s_k` such that
:math:`\sum_k s_k s_k^\top` is

type-2
    the Hessian of its summed loss terms in the output, exactly: for each loss term and class,
    :math:`\sqrt{a\,p_c}\,(e_c - p)` (cross-entropy, NLL), or for each entry, :math:`\sqrt 2\, e`
    (MSE), :math:`\sqrt{a\,\sigma(1-\sigma)}\, e` (BCE-with-logits);
Monte-Carlo
    an unbiased estimate of it: :math:`\sqrt{a / \text{samples}}` times the score of a target
    that is drawn from the model's own prediction, for all loss terms at once;
empirical
    the square of the gradient of its loss at the true target.

Numbers for targets are drawn for each example from a seed that its content gives, so that neither
batches nor the order of the data, nor devices, change the targets.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.data import describe, tensors
from curvlib.core.linear_cross_entropy import needs_logits
from curvlib.operators.batch_examples import example_count, one_example
from curvlib.operators.gradients import example_loss
from curvlib.operators.labels import label_scores
from curvlib.operators.loss_hessian import class_axis, probabilities, term_weights

KINDS = ("type2", "mc", "empirical")
#: Backward passes for a batch that an exact type-2 Fisher may take.
LIMIT = 4096

#: A part of the output and its cotangent (``None`` for a scalar).
Direction = tuple[Tensor, Tensor | None]


def require_kind(loss: Any, kind: str, samples: int) -> None:
    """Raises ValueError unless there is such a Fisher matrix of a loss."""
    if kind not in KINDS:
        raise ValueError(f"fisher= is one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise TypeError(f"samples= is an int, got {type(samples).__name__}")
    if samples < 1:
        raise ValueError(f"samples= needs at least one sampled target, got {samples}")
    if kind != "empirical" and not loss.known:
        raise ValueError(
            f"the loss {loss.describe()} is no likelihood that curvlib knows, so there is no "
            f"{kind} Fisher; use cross-entropy, NLL, MSE or BCE-with-logits, or "
            "fisher='empirical'"
        )


def directions(
    batch: Batch, output: Any, kind: str, samples: int, seed: str
) -> Iterator[Direction]:
    """The cotangents of a batch's output, all examples at once.

    Args:
        batch: The batch.
        output: The model's output, with its graph.
        kind: ``"type2"``, ``"mc"`` or ``"empirical"``.
        samples: Sampled targets of each loss term.
        seed: Of the samples.

    Raises:
        TypeError: If the output is no tensor (``"type2"`` and ``"mc"``).
        ValueError: If output and target do not fit, or type-2 would take too many passes.
    """
    if kind == "empirical":
        value = example_loss(batch, output)
        if value.requires_grad:
            yield value, None
        return
    loss = batch.risk.loss
    if loss.linear is not None:
        raise needs_logits(f"the {kind} Fisher by backward passes")
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the {kind} Fisher needs the output as one tensor, but the model returned "
            f"{describe(output)}; pass forward=lambda model, batch: model(**batch).logits or alike"
        )
    with torch.no_grad():
        readable = loss.readable(output, batch.target).detach()
        single = readable.ndim == 0 or (loss.categorical and readable.ndim == 1)
        weight = term_weights(loss, readable, batch.target)
        if kind == "mc":
            found: Iterator[Tensor] = _sampled(batch, readable, weight, samples, seed)
        else:
            rows = 1 if single else readable.shape[0] // max(1, example_count(batch))
            found = _exact(batch, readable, weight, rows, single=single)
            found = _one_row_each(found, 1 if single else example_count(batch))
    if output.requires_grad:
        for cotangent in found:
            yield output, cotangent.to(output.dtype)


def counted_examples(batch: Batch, output: Any) -> Tensor | None:
    """Which examples have a loss term of a weight, bool ``[n]``; ``None`` for all, or unknown.

    The others (ignored targets, classes of weight zero) are as if they were not in the data.
    """
    loss, target = batch.risk.loss, batch.target
    if not loss.known or not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return None
    with torch.no_grad():
        weight = term_weights(loss, loss.readable(output, target), target)
        n = example_count(batch)
        if not n or weight.numel() % n:
            return None
        kept = (weight != 0).reshape(n, -1).any(1)
    return None if bool(kept.all()) else kept


def _sampled(
    batch: Batch, output: Tensor, weight: Tensor, samples: int, seed: str
) -> Iterator[Tensor]:
    single = output.ndim == 0 or (batch.risk.loss.categorical and output.ndim == 1)
    seeds = [f"{seed}|{content}" for content in _contents(batch)]

    def uniform(shape: torch.Size) -> Tensor:
        each = shape if single else (shape[0] // len(seeds), *shape[1:])
        rows = [_numbers(own, (samples, *each)) for own in seeds]
        return rows[0] if single else torch.cat(rows, 1)

    scores = label_scores(batch.risk.loss, output, uniform)
    yield from scores * (weight / samples).sqrt()


def _numbers(seed: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in (0, 1) that a string determines."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(number)
    return torch.rand(shape, generator=generator, dtype=torch.float64).clamp_(min=1e-300)


def _contents(batch: Batch) -> list[str]:
    """A digest of what each example of a batch holds."""
    out = []
    n, held = example_count(batch), list(tensors(batch.data))
    size = n if n == batch.examples else None  # else examples may be folded
    if all(t.ndim and t.numel() and t.shape[0] % n == 0 and size in (None, len(t)) for t in held):
        rows = [t.detach().cpu().contiguous().reshape(n, -1).view(torch.uint8) for t in held]
        kinds = [f"{t.dtype}".encode() for t in held]
        for i in range(n):
            own = hashlib.sha256()
            for kind, row in zip(kinds, rows, strict=True):
                own.update(kind + row[i].numpy().tobytes())
            out.append(own.hexdigest())
        return out
    for i in range(n):
        own = hashlib.sha256()
        for tensor in tensors(one_example(batch, i).data):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            own.update(f"{tensor.dtype}".encode() + flat.view(torch.uint8).numpy().tobytes())
        out.append(own.hexdigest())
    return out


def _one_row_each(cotangents: Iterator[Tensor], n: int) -> Iterator[Tensor]:
    """The same for one row of each of ``n`` examples at a time, where they have several."""
    for cotangent in cotangents:
        rows = cotangent.shape[0] // n if cotangent.ndim else 1
        if rows <= 1 or n == 0:
            yield cotangent
            continue
        for j in range(rows):
            out = torch.zeros_like(cotangent)
            out.unflatten(0, (n, rows))[:, j] = cotangent.unflatten(0, (n, rows))[:, j]
            yield out


def _exact(
    batch: Batch, output: Tensor, weight: Tensor, rows: int, *, single: bool
) -> Iterator[Tensor]:
    loss = batch.risk.loss
    each = output.shape if single else output.shape[1:]
    count = rows * math.prod(each)
    if count > LIMIT:
        raise ValueError(
            f"the exact type-2 Fisher takes a backward pass for each of an example's {count} "
            f"outputs, and {LIMIT} are allowed; use fisher='mc', which takes one for each sample"
        )
    lead = () if single else (slice(None),)
    if loss.kind in ("mse", "bce_with_logits"):
        p = output.sigmoid() if loss.kind == "bce_with_logits" else None
        curvature = 2.0 * weight if p is None else weight * p * (1.0 - p)
        roots = curvature.sqrt()
        for place in itertools.product(*map(range, each)):
            out = torch.zeros_like(output)
            where = (*lead, *place)
            out[where] = roots[where]
            yield out
        return
    axis = class_axis(output)
    p = probabilities(loss, output)
    rest = [size for d, size in enumerate(each) if d != (0 if single else axis - 1)]
    for place in itertools.product(*map(range, rest)):
        at = (*lead, slice(None), *place)  # classes are the first axis of an example
        for c in range(output.shape[axis]):
            out = torch.zeros_like(output)
            own = -p[at]
            own.select(len(lead), c).add_(1.0)
            root = (weight[at] * p[at].narrow(len(lead), c, 1)).sqrt()
            out[at] = own * root
            yield out
