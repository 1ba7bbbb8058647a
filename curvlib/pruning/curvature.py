r"""The curvature that a pruning method asks for, of the weights as they are now.

Fisher blocks are :class:`~curvlib.operators.block_mfac.BlockMFAC` of per-example gradients; the
blocks of ``"inputs"`` are the rows of each layer's least-squares problem. Both come damped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.core.block_diagonal import BlockDiagonal
from curvlib.core.partition import Partition
from curvlib.core.ranks.group import together
from curvlib.core.ranks.turns import added
from curvlib.core.risk import Risk
from curvlib.estimators.diagonal import diagonal
from curvlib.operators.block_mfac import BlockMFAC
from curvlib.operators.hessian import hessian
from curvlib.operators.input_grams import InputGrams, input_grams
from curvlib.operators.rows import RowDraw, example_count
from curvlib.pruning.layerwise import layerwise_curvature
from curvlib.pruning.methods import Method

#: Bytes up to which Fisher blocks are summed in float64, whatever the type of the weights.
MEMORY = 2**31
#: Products of Hutchinson's estimate of the Hessian diagonal.
PRODUCTS = 50


def blocks_of(risk: Risk, method: Method, seed: int) -> BlockDiagonal:
    """The damped blocks of a method.

    Args:
        risk: Of the weights that may be pruned.
        method: With blocks, or the curvature of a layer's inputs.
        seed: Of the examples and labels that are drawn.

    Raises:
        TypeError: If the user's curvature is no block-diagonal operator of these weights.
        ValueError: If it has another size; or as the operators it is made by.
    """
    if callable(method.curvature):
        op = method.curvature(risk)
        if not isinstance(op, BlockDiagonal):
            raise TypeError(
                "curvature= should return a curvlib BlockDiagonal operator, got "
                f"{type(op).__name__}"
            )
        if op.shape[0] != risk.space.size:
            raise ValueError(
                f"curvature= returned an operator of {op.shape[0]} coordinates, expected "
                f"{risk.space.size}, the weights that may be pruned"
            )
        return op
    if method.curvature == "inputs":
        return _layer_blocks(risk, float(method.damping), method.relative)
    return fisher_blocks(risk, method, seed)


def _layer_blocks(risk: Risk, damping: float, relative: bool) -> BlockDiagonal:
    grams = layer_inputs(risk)
    return layerwise_curvature(grams, risk.space, damping=damping, relative=relative)


def layer_inputs(risk: Risk) -> InputGrams:
    """Second moments of the inputs of all weights.

    Raises:
        ValueError: If a weight's inputs cannot be seen, such as those of an LSTM: names it.
    """
    found = input_grams(risk, "*")
    missing = [name for name in risk.space.names if name not in found]
    if missing:
        why = ", ".join(f"{n!r} ({found.uncovered.get(n, 'it is a bias')})" for n in missing)
        raise ValueError(
            f"layer-wise pruning needs the inputs of every weight, and knows none of {why}; leave "
            "them out with params=, or use method='obs', which needs no inputs"
        )
    return found


def fisher_blocks(risk: Risk, method: Method, seed: int) -> BlockMFAC:
    """Damped blocks of the Fisher of sampled or true labels, from ``row_count`` rows."""
    size = min(method.block_size, max(risk.space.sizes))
    double = 8 * size * risk.space.size <= MEMORY
    return BlockMFAC(
        rows_of(risk, method, seed),
        Partition.of(risk.space, size),
        damping=method.damping,
        relative=method.relative,
        dtype=torch.float64 if double else risk.space.dtype,
    )


def rows_of(risk: Risk, method: Method, seed: int) -> RowDraw:
    """The gradient rows that a method's Fisher is made of."""
    return RowDraw.of(risk, row_count(risk, method), kind=method.fisher, seed=seed)


def row_count(risk: Risk, method: Method) -> int:
    """``m``: what the method says, else at least four rows for each row of a block.

    Of true labels there are no more rows than examples.
    """
    if method.rows is not None:
        return method.rows
    wanted = max(512, 4 * method.block_size)
    return wanted if method.fisher == "mc" else min(wanted, example_count(risk))


def diagonal_of(risk: Risk, method: Method, seed: int) -> Tensor:
    """The diagonal ``[P]`` of a method's curvature, not damped; what is negative counts as zero."""
    if method.curvature == "hessian-diagonal":
        found = diagonal(hessian(risk), max_products=PRODUCTS, seed=seed, progress=False)
        return found.value.clamp(min=0.0)
    if method.curvature == "fisher-diagonal":
        total = torch.zeros(risk.space.size, dtype=torch.float64, device=risk.space.device)
        drawn = rows_of(risk, method, seed)
        with together(risk.group, "adding up its gradients"):
            for _, rows in drawn.own():
                total += rows.double().square().sum(0)
        return (added(risk.group, total) / drawn.count).to(risk.space.dtype)
    if method.curvature == "inputs":
        return _layer_blocks(risk, 0.0, relative=True).diagonal()  # Wanda has no damping
    return blocks_of(risk, method, seed).diagonal()
