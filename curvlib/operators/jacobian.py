r"""Jacobian of a model's outputs over the data, and the neural tangent kernel.

Rows are all entries of all outputs, batch after batch, each output flattened in row-major order:
``[N * C, P]`` for ``N`` examples with ``C`` outputs. The (empirical) neural tangent kernel is
:math:`J J^T` (Jacot, Gabriel, Hongler, 2018). Neither is scaled.

In a process group, rows are those of all ranks, in the order of ranks, on every rank. A rank
computes those of its shard; with :math:`s` bytes for a number and :math:`K` columns, a product
:math:`J V` sends :math:`s K N C / R` bytes (a gathering), and :math:`J^T U` sends
:math:`2 s K P (R - 1) / R` (a sum).
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.operator import LinearOperator
from curvlib.core.ranks.group import together
from curvlib.core.ranks.joined import gathered
from curvlib.core.risk import Risk
from curvlib.operators.columns import derivative, pieces
from curvlib.operators.gauss_newton import tangents_of
from curvlib.operators.graphs import GraphCache
from curvlib.operators.hessian import MEMORY
from curvlib.operators.loss_hessian import tensor_output


def jacobian(risk: Risk, *, memory: int = MEMORY) -> LinearOperator:
    """The Jacobian of the outputs with respect to the parameters.

    The number of rows is counted by one forward pass over the data when it is built.

    Args:
        risk: Model, data and parameters (the loss is not used). The data must keep its order.
        memory: Bytes for graphs of columns that are done at once.

    Returns:
        An operator ``[N * C, P]`` with its transpose.

    Raises:
        TypeError: If the model's output is not one tensor.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1)
        >>> J = cl.jacobian(cl.Risk(model, torch.nn.MSELoss(), (x, y)))
        >>> J.to_dense().tolist()
        [[1.0, 2.0], [3.0, 4.0]]
    """
    if memory < 0:
        raise ValueError(f"memory= is a number of bytes, at least 0, got {memory}")
    own, first, rows = _row_counts(risk)
    cache = GraphCache(risk, memory, tensor_output)
    space = risk.space

    def product(columns: Tensor) -> Tensor:
        def of_shard() -> Tensor:
            out = torch.empty((columns.shape[1], own), dtype=space.dtype, device=space.device).mT
            start = 0
            with risk.untouched():
                for batch in risk.batches(shard=True):
                    for piece in pieces(columns.shape[1], max(1, cache.room)):
                        part = tangents_of(batch, space.split(columns[:, piece])).flatten(1)
                        _require_rows(start + part.shape[1], own)
                        out[start : start + part.shape[1], piece] = part.mT
                    start += part.shape[1]
            _require_rows(own, start)
            return out

        return gathered(risk, of_shard, columns)

    def transposed(columns: Tensor) -> Tensor:
        count = columns.shape[1]
        start = first

        def add(batch: Batch, total: Tensor | None) -> Tensor:
            nonlocal start
            out = space.empty(count).zero_() if total is None else total
            output, kept = cache.graph(batch)
            stop = start + output.numel()
            _require_rows(stop, first + own)
            where, start = slice(start, stop), stop
            if not output.requires_grad:
                return out
            for piece in pieces(count, cache.room, space):
                cotangents = columns[where, piece].mT.reshape(-1, *output.shape)
                parts = derivative(
                    [output],
                    list(risk.params.values()),
                    [cotangents.to(output.dtype)],
                    retain_graph=kept or piece.stop < count,
                )
                space.write(parts, out[:, piece], add=True)
            return out

        cache.begin()
        out = risk.summed(add, columns)
        _require_rows(first + own, start)
        return out

    return LinearOperator(
        product,
        (rows, space.size),
        dtype=space.dtype,
        device=space.device,
        rmatmat=transposed,
        name="Jacobian",
        identity=risk.fingerprint,
        group=risk.group,
    )


def _row_counts(risk: Risk) -> tuple[int, int, int]:
    """Rows of this rank's shard, where they begin, and rows of all ranks."""
    with together(risk.group, "counting its outputs"), risk.untouched():
        own = sum(tensor_output(batch).numel() for batch in risk.batches(shard=True))
    if risk.group is None:
        return own, 0, own
    every = [int(n) for (n,) in risk.group.numbers([own])]
    return own, sum(every[: risk.group.rank]), sum(every)


def _require_rows(needed: int, present: int) -> None:
    if needed > present:
        raise RuntimeError(
            "the data changed between passes: the Jacobian was built for another number of "
            "outputs; build it again, and use data of fixed length"
        )


def ntk(risk: Risk, *, memory: int = MEMORY) -> LinearOperator:
    """The neural tangent kernel ``J J'`` of the outputs over the data, not scaled.

    Args:
        risk: Model, data and parameters (the loss is not used).
        memory: Bytes for graphs of columns that are done at once.

    Returns:
        A positive semi-definite operator ``[N * C, N * C]``.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1)
        >>> cl.ntk(cl.Risk(model, torch.nn.MSELoss(), (x, y))).to_dense().tolist()
        [[5.0, 11.0], [11.0, 25.0]]
    """
    J = jacobian(risk, memory=memory)
    kernel: LinearOperator = J @ J.T
    kernel.name = "NTK"
    return kernel
