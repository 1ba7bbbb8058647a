"""Gradients of examples as the products of rows that they are, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from curvlib.core.risk import Risk
from curvlib.operators.scores.blocks import ScoreBlock, score_blocks
from curvlib.operators.scores.passes import GradientPass, GradientPasses
from curvlib.operators.scores.rows import Term, matrices, terms


@dataclass(frozen=True, eq=False)
class ExampleRows:
    r"""Gradients :math:`G_n = \sum_t l_{nt} r_{nt}^\top` of some examples in one block.

    Attributes:
        block: The block.
        left: ``[G, n, T, O]``, or ``None`` where gradients are no products of fewer rows.
        right: ``[G, n, T, I]``, or ``None``.
        whole: The gradients ``[n, G, O, I]`` where they are not.
    """

    block: ScoreBlock
    left: Tensor | None
    right: Tensor | None
    whole: Tensor | None

    def matrices(self) -> Tensor:
        """The gradients, ``[n, G, O, I]``."""
        if self.whole is not None:
            return self.whole
        assert self.left is not None
        assert self.right is not None
        return (self.left.mT @ self.right).transpose(0, 1)

    def total(self) -> Tensor:
        """Their sum, ``[1, G, O, I]``."""
        if self.whole is not None:
            return self.whole.sum(0, keepdim=True)
        assert self.left is not None
        assert self.right is not None
        return (self.left.flatten(1, 2).mT @ self.right.flatten(1, 2))[None]

    @property
    def examples(self) -> int:
        """``n``."""
        if self.whole is not None:
            return len(self.whole)
        assert self.right is not None
        return self.right.shape[1]


def example_rows(risk: Risk, *, block: int = 64) -> Iterator[list[ExampleRows]]:
    """Gradients of summed loss terms of a risk's examples, in their order, in all blocks.

    Rows are given where they take less memory than the gradient: ``T (O + I) < O I``.

    Args:
        risk: Model, loss, data and parameters.
        block: Examples at a time, at most.

    Raises:
        ValueError: If examples depend on each other, or have unknown shares of the loss.
        FloatingPointError: If a gradient is not finite; names the layer.

    Example:
        >>> import torch, curvlib as cl
        >>> x, y = torch.randn(3, 8), torch.randn(3, 8)
        >>> risk = cl.Risk(torch.nn.Linear(8, 8), torch.nn.MSELoss(), (x, y))
        >>> ((rows,),) = example_rows(risk)
        >>> rows.left.shape, rows.right.shape
        (torch.Size([1, 3, 1, 8]), torch.Size([1, 3, 1, 9]))
    """
    blocks = score_blocks(risk)

    def rows(found: GradientPass, at: slice) -> list[ExampleRows]:
        if at.start == 0:
            found.require_finite()
        count = at.stop - at.start
        parts = [list(terms(own, found, at, risk.space.dtype)) for own in blocks]
        return [_rows(own, part, count, risk) for own, part in zip(blocks, parts, strict=True)]

    return GradientPasses(risk, blocks).slices(block, rows)


def _rows(block: ScoreBlock, own: Sequence[Term], n: int, risk: Risk) -> ExampleRows:
    _, O, I = block.shape
    if len(own) == 1 and own[0].left.is_floating_point():
        left, right = own[0].left, own[0].right
        if right.shape[2] * (O + I) < O * I:
            return ExampleRows(block, left, right, None)
    zeros = risk.space.empty().new_zeros((n, *block.shape))
    return ExampleRows(block, None, None, matrices(block, own, zeros))
