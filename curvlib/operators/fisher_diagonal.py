r"""The diagonal of a Fisher matrix, exactly: sums of squares of per-example gradients.

.. math:: d = \frac1W \sum_{n,k} (g_{nk})^{\circ 2}

over the directions ``k`` of :mod:`curvlib.operators.factors.targets`, with the total weight ``W``
of the loss terms: the diagonal of ``curvlib.fisher(risk, kind)``, hence of ``curvlib.ggn(risk)``
for ``"type2"``. It takes one pass over the data, with as many backward passes as there are
directions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.ranks.joined import gathered
from curvlib.core.risk import Risk
from curvlib.core.structured import Diagonal
from curvlib.operators.batch_examples import example_count
from curvlib.operators.factors import squares as kfac_squares
from curvlib.operators.factors.targets import Direction, directions, require_kind
from curvlib.operators.layers.uses import Pass
from curvlib.operators.scores.blocks import ScoreBlock, flat_rows, score_blocks
from curvlib.operators.scores.passes import GradientPass, GradientPasses
from curvlib.operators.scores.rows import chunks, matrices, terms

#: Outputs of an example up to which the exact Fisher matrix is affordable.
AFFORDABLE = 64


def fisher_diagonal(
    risk: Risk, *, fisher: str = "type2", samples: int = 1, seed: int = 0
) -> Diagonal:
    """The exact diagonal of a Fisher matrix as an operator.

    Args:
        risk: Model, loss, data and parameters. Examples must be independent, which is checked.
        fisher: ``"type2"``, ``"mc"`` or ``"empirical"``: see :func:`curvlib.kfac`.
        samples: Sampled targets of each loss term, for ``"mc"``.
        seed: Of the samples.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is unknown, or examples depend on each other.
        FloatingPointError: If a gradient is not finite; names the layer.

    Example:
        >>> import torch, curvlib as cl
        >>> x, y = torch.randn(5, 2).double(), torch.tensor([0, 1, 2, 1, 0])
        >>> risk = cl.Risk(torch.nn.Linear(2, 3).double(), torch.nn.CrossEntropyLoss(), (x, y))
        >>> D = fisher_diagonal(risk)
        >>> bool(torch.allclose(D.diagonal(), cl.ggn(risk).to_dense().diagonal()))
        True
    """
    require_kind(risk.loss, fisher, samples)
    blocks = score_blocks(risk)
    passes = GradientPasses(risk, blocks)

    def chosen(one: Pass) -> Iterator[Direction]:
        yield from directions(one.batch, one.output, fisher, samples, f"{seed}|0")

    def add(batch: Batch, total: Tensor | None) -> Tensor:
        out = risk.space.empty().zero_() if total is None else total
        for found in passes.of(batch, chosen):
            squares = {block.name: _squares(block, found, out) for block in blocks}
            out += flat_rows(blocks, squares, risk.space.size)[0] * batch.scale
            if not bool(torch.isfinite(out.sum())):
                found.require_finite()
        return out

    return Diagonal(risk.accumulate(add), name=f"{fisher} Fisher diagonal")


def _squares(block: ScoreBlock, found: GradientPass, like: Tensor) -> Tensor:
    """Sums of squares over a pass's examples, ``[1, G, O, I]``."""
    out = like.new_zeros((1, *block.shape))
    for at in chunks(block, found, like.dtype):
        parts = list(terms(block, found, at, like.dtype))
        if len(parts) == 1 and parts[0].left.is_floating_point():
            left, right = parts[0].left, parts[0].right
            way = kfac_squares.route(right.shape[2], block.shape, (False, False))
            out[0] += kfac_squares.squares(left, right, (None, None), way)
        elif parts:
            zeros = like.new_zeros((at.stop - at.start, *block.shape))
            out[0] += matrices(block, parts, zeros).square_().sum(0)
    return out


def affordable_fisher(risk: Risk) -> str:
    """The best kind of Fisher matrix whose directions are few: ``"type2"``, else ``"mc"``.

    The exact one takes a backward pass for each of an example's outputs, of which
    :data:`AFFORDABLE` are few. A loss that is no known likelihood has the empirical one only.
    """
    if not risk.loss.known:
        return "empirical"
    none = torch.zeros(0, dtype=torch.float64, device=risk.space.device)

    def outputs() -> Tensor:
        with risk.untouched(first_order=True), risk.held.gathering(), torch.no_grad():
            for batch in risk.stream.together():
                output = risk.loss.readable(batch.output(), batch.target)
                return none.new_tensor([output.numel() / max(1, example_count(batch))])
        return none

    each = float(gathered(risk, outputs)[0])  # of the first batch of all ranks'
    return "type2" if each <= AFFORDABLE else "mc"
