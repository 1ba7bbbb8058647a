"""What an operator's products cost, measured by some of them on the first batch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from curvlib.core.allocations import Allocations
from curvlib.core.batch import Batch
from curvlib.core.exhausted import is_exhausted
from curvlib.core.operator import LinearOperator
from curvlib.core.product_cost import ProductCost
from curvlib.core.risk import Risk
from curvlib.operators.batch_examples import example_count
from curvlib.operators.hessian import MEMORY
from curvlib.operators.scores.known_examples import known_examples


def measured_product(
    make: Callable[[Risk], LinearOperator],
    risk: Risk,
    *,
    examples: int | None = None,
    budget: int = MEMORY,
    differences: bool = False,
) -> ProductCost:
    """The cost of products of an operator on all data, from its products on the first batch.

    A product with one column, another one (on the graph that the first has kept, for data in
    memory), and products with two and three columns, as far as there is memory for them. Work is
    what ``torch.utils.flop_counter`` counts: matrix products, convolutions and attention, not what
    is done entry by entry. Memory is that of all tensors at once, but not what kernels allocate
    inside. Other batches are taken to be alike.

    Args:
        make: The operator of a risk, such as :func:`curvlib.hessian`.
        risk: Model, loss, data and parameters.
        examples: ``N``, where the data does not say.
        budget: Bytes that the operator may keep graphs in: its ``memory=``.
        differences: Whether products are finite differences of gradients.

    Raises:
        ValueError: If the number of examples is not known, or there is no batch.

    Example:
        >>> import curvlib as cl
        >>> x, y = torch.randn(64, 100), torch.randn(64, 100)
        >>> risk = cl.Risk(torch.nn.Linear(100, 100), torch.nn.MSELoss(), [(x, y)] * 5)
        >>> cost = measured_product(cl.hessian, risk)
        >>> cost.total, cost.examples, cost.vector, cost.flops / (5 * 2 * 64 * 100 * 100)
        (320, 64, 40400, 4.0)
    """
    found = known_examples(risk) if examples is None else examples
    if found is None:
        raise ValueError("the data does not say how many examples it has; pass examples=")
    first = next(iter(risk.data if risk.in_memory is None else risk.in_memory), None)
    if first is None:
        raise ValueError("the data has no batch, so that nothing can be measured")
    count = max(1, example_count(Batch(risk, 0, first)))
    part = risk.alone().on(_Stream(first) if risk.in_memory is None else [first])
    op = make(part)
    space = risk.space
    flops, peak, left = _measured(op, 1)
    vector = space.size * space.dtype.itemsize
    graph = max(0, left - vector)
    again, peak_again, _ = _measured(op, 1)
    steps = [(again, vector)]  # of work and memory, by each column more
    before = (again, peak_again)
    try:
        for columns in (2, 3):
            more = _measured(op, columns)
            steps.append((more[0] - before[0], more[1] - before[1]))
            before = more[:2]
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
    second, further = steps[min(1, len(steps) - 1)], steps[-1]
    scale = found / count
    sizes = dict(zip(space.names, _parameter_bytes(risk), strict=True))
    return ProductCost(
        size=space.size,
        vector=vector,
        parameters=sum(sizes.values()),
        layer=max(sum(sizes[name] for name in names) for names in space.layers().values()),
        total=found,
        examples=count,
        flops=scale * flops,
        second=scale * second[0],
        further=scale * further[0],
        again=scale * again,
        graph=graph,
        budget=budget,
        working=max(peak - graph, peak_again),
        pair=max(second[1], vector),
        column=max(further[1], vector),
        gathers=(0.0, 4.0) if differences else (3.0, 0.0),
    )


def measured_gradient(risk: Risk, *, examples: int | None = None) -> ProductCost:
    """The cost of a gradient on all data, from that of the first batch: one column alone.

    Sharded, parameters are gathered for the forward and the backward pass, and the gradient is
    scattered.

    Raises:
        ValueError: If the number of examples is not known, or there is no batch.

    Example:
        >>> import curvlib as cl
        >>> x, y = torch.randn(64, 100), torch.randn(64, 100)
        >>> risk = cl.Risk(torch.nn.Linear(100, 100), torch.nn.MSELoss(), [(x, y)] * 5)
        >>> measured_gradient(risk).flops / (5 * 2 * 64 * 100 * 100)
        2.0
    """
    size, dtype, device = risk.space.size, risk.space.dtype, risk.space.device

    def make(part: Risk) -> LinearOperator:
        return LinearOperator(
            lambda columns: part.gradient()[:, None].expand(size, columns.shape[1]),
            (size, size),
            dtype=dtype,
            device=device,
        )

    cost = measured_product(make, risk, examples=examples)
    return replace(cost, graph=0.0, gathers=(2.0, 0.0), moves=1.0)


class _Stream:
    """A batch that is not held in memory, as far as risks know."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch])


def _measured(op: LinearOperator, columns: int) -> tuple[int, int, int]:
    """Work of a product with some columns, most bytes at once, and bytes that it leaves."""
    vectors = torch.ones((columns, op.shape[1]), dtype=op.dtype, device=op.device)
    with FlopCounterMode(display=False) as counter, Allocations() as memory:
        product = op.matmat(vectors.T)
        left = memory.live
    del product
    return int(counter.get_total_flops()), memory.peak, left


def _parameter_bytes(risk: Risk) -> list[int]:
    return [p.numel() * p.element_size() for p in risk.params.values()]
