r"""Per-example gradients, streamed as blocks of rows.

Row ``n`` is the gradient of the summed (and weighted) loss terms of example ``n``, so that

.. math:: \nabla R = \frac1W \sum_n g_n, \qquad F_{\mathrm{empirical}} = \frac1W \sum_n g_n g_n^T

with the total weight ``W = risk.weight()``. Rows are computed by ``vmap`` over ``torch.func.grad``
in chunks (first derivatives are right through all layers); for models that ``vmap`` cannot follow
(recurrent modules, data-dependent control flow), one example after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.data import describe, is_mapping
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
        Rows ``[n, P]`` with ``n <= block``. Divide by ``risk.weight()`` for terms of the mean.

    Raises:
        ValueError: If ``block`` is not positive, a batch cannot be split into examples, or
            examples are not independent.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.randn(5, 2), torch.randn(5, 1)
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (x, y))
        >>> rows = torch.cat(list(cl.gradients(risk, block=2)))
        >>> rows.shape, bool(torch.allclose(rows.mean(0), risk.gradient()))
        (torch.Size([5, 2]), True)
    """
    if block < 1:
        raise ValueError(f"block= needs at least one row, got {block}")
    return _stream(risk, block)


def _stream(risk: Risk, block: int) -> Iterator[Tensor]:
    batched = True
    batches = risk.batches()
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
            stop = min(start + block, count)
            with risk.untouched():
                rows = _batched_rows(batch, start, stop) if batched else None
                if rows is None:
                    batched = False
                    rows = _looped_rows(batch, start, stop)
            if expected is not None:
                total += rows.sum(0)
            yield rows
        if expected is not None:
            _require_independent(total, expected, risk)


def _batched_rows(batch: Batch, start: int, stop: int) -> Tensor | None:
    """Rows by vmap, or ``None`` if the model cannot be followed by it."""
    risk = batch.risk
    params = {n: p.detach() for n, p in risk.params.items()}
    data = _examples(batch, start, stop)

    def total(values: dict[str, Tensor], example: Any) -> Tensor:
        one = Batch(risk, batch.index, _unsqueezed(example))
        output = risk.call(one.data, values)
        return risk.loss.total(output, one.target, _terms(one))

    try:
        with batched_quietly():
            rows = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(params, data)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return None  # errors that are the model's own come again in the loop
    return risk.space.join(list(rows.values()), columns=stop - start).mT


def _looped_rows(batch: Batch, start: int, stop: int) -> Tensor:
    risk = batch.risk
    rows = torch.empty(
        (stop - start, risk.space.size), dtype=risk.space.dtype, device=risk.space.device
    )
    params = list(risk.params.values())
    for i in range(start, stop):
        one = Batch(risk, batch.index, _examples(batch, i, i + 1))
        value = risk.loss.total(one.output(), one.target, _terms(one))
        parts: list[Tensor | None] = [None] * len(params)
        if value.requires_grad:
            parts = list(torch.autograd.grad(value, params, allow_unused=True))
        risk.space.write(parts, rows[i - start])
    return rows


def _terms(batch: Batch) -> Any:
    known = batch.risk.loss.known or batch.risk.loss.reduction == "sum"
    return 1.0 if known else batch.weight


def _examples(batch: Batch, start: int, stop: int) -> Any:
    def cut(item: Any) -> Any:
        if isinstance(item, Tensor):
            if item.ndim == 0 or item.shape[0] != batch.examples:
                raise ValueError(
                    f"batch {batch.index} cannot be split into its {batch.examples} examples: "
                    f"it holds a tensor of shape {list(item.shape)}; give per-example data along "
                    "the first axis of every tensor, or batches of one example"
                )
            return item[start:stop]
        if is_mapping(item):
            return {key: cut(item[key]) for key in item.keys()}  # noqa: SIM118
        if isinstance(item, (list, tuple)):
            return tuple(cut(part) for part in item)
        raise ValueError(
            f"batch {batch.index} cannot be split into examples: it holds {describe(item)}; "
            "give batches of tensors, or of one example"
        )

    return cut(batch.data)


def _unsqueezed(example: Any) -> Any:
    if isinstance(example, Tensor):
        return example.unsqueeze(0)
    if is_mapping(example):
        return {key: _unsqueezed(example[key]) for key in example.keys()}  # noqa: SIM118
    return tuple(_unsqueezed(part) for part in example)


def _require_independent(total: Tensor, expected: Tensor, risk: Risk) -> None:
    gap = float(torch.linalg.vector_norm(total - expected))
    scale = float(torch.linalg.vector_norm(expected)) + float(torch.linalg.vector_norm(total))
    precision = max(torch.finfo(d).eps for d in risk.space.dtypes)
    if not gap <= 100.0 * precision**0.5 * scale:
        raise ValueError(
            "per-example gradients do not add up to the gradient of the batch "
            f"(relative difference {gap / scale:.2g}): examples depend on each other, or the loss "
            "is not the sum or mean that it seems; put BatchNorm into eval mode, switch off "
            "dropout (model.eval()), or see risk.check()"
        )
