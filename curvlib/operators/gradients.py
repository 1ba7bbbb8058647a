r"""Per-example gradients, streamed as blocks of rows.

Row ``n`` is the gradient of the summed (and weighted) loss terms of example ``n``, so that

.. math:: \nabla R = \frac1W \sum_n g_n, \qquad F_{\mathrm{empirical}} = \frac1W \sum_n g_n g_n^T

with the total weight ``W = risk.weight()``. Rows are computed by ``vmap`` over ``torch.func.grad``
in chunks (first derivatives are right through all layers); for models that ``vmap`` cannot follow
(recurrent modules, data-dependent control flow), one example after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlib.core.batch import Batch
from curvlib.core.examples import batch_of_one, chosen_examples, require_independent
from curvlib.core.exhausted import is_exhausted, names_what_fits
from curvlib.core.ranks.turns import in_turns
from curvlib.core.risk import Risk
from curvlib.operators.columns import batched_quietly


def gradients(risk: Risk, *, block: int = 64) -> Iterator[Tensor]:
    """Per-example gradients of a risk, in the order of the data.

    Args:
        risk: Model, loss, data and parameters. Examples of a batch must be independent (no
            batch-statistics BatchNorm): the sum of the first batch's rows is checked against its
            gradient. All tensors of a batch have examples along their first axis.
        block: Rows of a block at most; memory is about that of ``block`` gradients.

    Yields:
        Rows ``[n, P]`` with ``n <= block``. Divide by ``risk.weight()`` for terms of the mean. In a
        process group, every rank gets the rows of all, and computes those of its shard: see
        :mod:`curvlib.core.ranks.turns` for the traffic.

    Raises:
        ValueError: If ``block`` is not positive, a batch cannot be split into examples, or
            examples are not independent.
        RuntimeError: If another rank failed.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.randn(5, 2), torch.randn(5, 1)
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (x, y))
        >>> rows = torch.cat(list(cl.gradients(risk, block=2)))
        >>> rows.shape, bool(torch.allclose(rows.mean(0), risk.gradient()))
        (torch.Size([5, 2]), True)
    """
    return in_turns(risk.group, shard_gradients(risk, block=block), risk.space.empty())


def shard_gradients(risk: Risk, *, block: int = 64) -> Iterator[Tensor]:
    """Gradients of the examples of this rank's shard, without communication.

    For loops that add up what ranks make of them: see :func:`gradients`.
    """
    if block < 1:
        raise ValueError(f"block= needs at least one row, got {block}")
    return _stream(risk, block)


def _stream(risk: Risk, block: int) -> Iterator[Tensor]:
    batched = True
    batches = risk.batches(shard=True)
    while True:
        # the model is as it was whenever the caller has control
        with risk.untouched():
            batch = next(batches, None)
            if batch is None:
                return
            expected = risk.space.join(batch.gradient()) if batch.index == 0 else None
            count = batch.examples
        total = risk.space.empty().zero_()
        for start in range(0, count, block):
            told = names_what_fits("rows of gradients", {"rows": min(block, count)})
            with told, risk.untouched():
                part = chosen_examples(batch, slice(start, min(start + block, count)))
                rows, batched = example_gradients(part, example_loss, batched=batched)
            if expected is not None:
                total += rows.sum(0)
            yield rows
        if expected is not None:
            require_independent(total, expected, risk)


#: A scalar of one example's batch, its output, and what else belongs to the example.
Value = Callable[[Batch, Any, Any], Tensor]


def example_loss(one: Batch, output: Any, _: Any = None) -> Tensor:
    """The summed loss terms of one example."""
    known = one.risk.loss.known or one.risk.loss.reduction == "sum"
    return one.risk.loss.total(output, one.target, 1.0 if known else one.weight)


def example_gradients(
    batch: Batch, value: Value, extra: Tensor | None = None, *, batched: bool = True
) -> tuple[Tensor, bool]:
    """Gradients of a scalar of each example of a batch.

    Args:
        batch: The batch: see :func:`~curvlib.core.examples.chosen_examples` for parts of one.
        value: The scalar, of a batch of one example and its output.
        extra: What ``value`` gets besides, examples along its first axis.
        batched: Whether to try ``vmap`` first.

    Returns:
        Rows ``[n, P]``, and whether ``vmap`` could follow the model.
    """
    rows = _batched_rows(batch, value, extra) if batched else None
    if rows is not None:
        return rows, True
    return _looped_rows(batch, value, extra), False


def _batched_rows(batch: Batch, value: Value, extra: Tensor | None) -> Tensor | None:
    """Rows by vmap, or ``None`` if the model cannot be followed by it."""
    risk = batch.risk
    params = {n: p.detach() for n, p in risk.params.items()}

    def total(values: dict[str, Tensor], example: Any, own: Tensor | None) -> Tensor:
        one = Batch(risk, batch.index, batch_of_one(example))
        own = None if own is None else own.unsqueeze(0)
        return value(one, risk.call(one.data, values), own)

    per_example = torch.func.vmap(
        torch.func.grad(total), in_dims=(None, 0, None if extra is None else 0)
    )
    try:
        # fused attention has no rule for vmap
        with batched_quietly(), sdpa_kernel(SDPBackend.MATH):
            rows = per_example(params, batch.data, extra)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        if is_exhausted(error):
            # fewer rows at a time are the user's to ask for; one by one would be silently slow
            raise
        return None  # errors that are the model's own come again in the loop
    return risk.space.join(list(rows.values()), columns=batch.examples).mT


def _looped_rows(batch: Batch, value: Value, extra: Tensor | None) -> Tensor:
    risk = batch.risk
    rows = torch.empty(
        (batch.examples, risk.space.size), dtype=risk.space.dtype, device=risk.space.device
    )
    params = list(risk.params.values())
    for i in range(batch.examples):
        one = chosen_examples(batch, slice(i, i + 1))
        scalar = value(one, one.output(), None if extra is None else extra[i : i + 1])
        parts: list[Tensor | None] = [None] * len(params)
        if scalar.requires_grad:
            parts = list(torch.autograd.grad(scalar, params, allow_unused=True))
        risk.space.write(parts, rows[i])
    return rows
