r"""Inner products of per-example gradients with directions, streamed batch by batch.

.. math:: s_{nq} = \langle d_q, g_n \rangle = \sum_b \langle D_q^{(b)}, G_n^{(b)} \rangle ,

with the gradient :math:`g_n` of the *sum* of the loss terms of example ``n``, whatever the loss's
reduction (see :mod:`curvlib.operators.scores.passes`), and the blocks ``b`` of
:mod:`curvlib.operators.scores.blocks`. Gradients of all parameters at once, ``[N, P]``, are never
held: each layer's inputs and output gradients are contracted with its directions, as
:mod:`curvlib.operators.scores.directions` says. Uses of shared weights add up, so scores are those
of autograd's gradients for modules that are called several times and for tied weights, too.

Scores of *tokens* are the parts of the sum over a layer's rows that belong to one token:
:math:`\sum_b l_{nt}^\top D_q r_{nt}`, what the gradient at this position contributes (Grosse et
al., "Studying large language model generalization with influence functions", 2023, section 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.risk import Risk
from curvlib.operators.batch_examples import example_count, some_examples
from curvlib.operators.scores.blocks import ScoreBlock, flat_rows, score_blocks
from curvlib.operators.scores.directions import BlockDirections, DenseDirections
from curvlib.operators.scores.passes import GradientPass, GradientPasses, token_count
from curvlib.operators.scores.rows import Term, by_token, chunks, matrices, norms, terms
from curvlib.operators.scores.spread_directions import pieces


@dataclass(frozen=True, eq=False)
class BatchScores:
    """Scores of the examples of one batch.

    Attributes:
        batch: Number of the batch.
        stop: Examples of the data up to and including this batch.
        numbers: Numbers of the examples in the data, ``[n]``.
        scores: ``[n, Q]``.
        layers: Parts of each block, ``[n, Q, B]``, which add up to the scores.
        tokens: Parts of each token, ``[n, Q, T]``. They add up to the scores where every parameter
            is in a layer that takes a row for each token (of a classifier's head, or of a bare
            parameter, the rest is).
        norms: Norms of the gradients in each block, ``[n, B]``.
        alone: Whether examples went through the model one by one.
    """

    batch: int
    stop: int
    numbers: Tensor
    scores: Tensor
    layers: Tensor
    tokens: Tensor | None
    norms: Tensor | None
    alone: bool


def example_scores(
    risk: Risk,
    directions: Mapping[str, BlockDirections],
    *,
    tokens: bool = False,
    norms: bool = False,
    chosen: Tensor | None = None,
    wanted: Tensor | None = None,
    start: int = 0,
    first: int = 0,
    alone: bool = False,
) -> Iterator[BatchScores]:
    """Scores of all examples of a risk's data, in their order, batch by batch.

    Args:
        risk: Model, loss, data and parameters.
        directions: By the name of the block
            (:func:`~curvlib.operators.scores.blocks.score_blocks`):
            those of absent blocks are zero.
        tokens: Whether to score tokens, too.
        norms: Whether to return the norms of gradients.
        chosen: Numbers of the only examples that are wanted, ascending, int64.
        wanted: Which queries of each of these examples, bool ``[len(chosen), Q]``: where tokens are
            scored, work is for these alone, and the scores of others are zero.
        start: Batches to leave out at the beginning, which
        first: have this many examples.
        alone: Whether examples go through the model one by one, if that is known.

    Raises:
        ValueError: If directions are of no block, differ in number, or have another shape; or
            examples depend on each other, or have unknown shares of the loss.
        FloatingPointError: If scores are not finite; names the layer.

    Example:
        >>> import torch, curvlib as cl
        >>> from curvlib.operators.scores.directions import DenseDirections
        >>> risk = cl.Risk(
        ...     torch.nn.Linear(2, 1, bias=False),
        ...     torch.nn.MSELoss(),
        ...     (torch.eye(2), torch.ones(2, 1)),
        ... )
        >>> D = {"weight": DenseDirections(risk.gradient().view(1, 1, 1, 2))}
        >>> (part,) = example_scores(risk, D)
        >>> bool(torch.allclose(part.scores[:, 0], 2 * risk.gradient() ** 2))
        True
    """
    blocks = _fitting(risk, directions)
    passes = GradientPasses(risk, blocks, alone=alone)
    numbered = _Numbered(chosen, first)
    batches = risk.stream.in_step(numbered.of(islice(_batches(risk), start, None)))
    while True:
        # the model is as it was whenever the caller has control
        with risk.untouched(first_order=True), risk.held.gathering():
            batch = next(batches, None)
            if batch is None:
                return
            numbers, first, pairs = numbered.numbers, numbered.next, None
            if tokens and wanted is not None and chosen is not None and not batch.lent:
                pairs = wanted[torch.searchsorted(chosen, numbers)]
            found = []
            for one in passes.of(batch):
                own = None
                if pairs is not None and one.counts:
                    own, pairs = pairs[: one.examples], pairs[one.examples :]
                scored = passes.attempt(
                    partial(
                        _scores,
                        one,
                        blocks,
                        directions,
                        tokens=tokens,
                        measure=norms,
                        pairs=own,
                    )
                )
                if scored is not None and one.counts:
                    found.append(scored)
        if not batch.lent:
            yield _joined(batch.index, first, numbers, found, passes.alone)


def example_gradients_by_layers(risk: Risk, *, block: int = 64) -> Iterator[Tensor]:
    """Per-example gradients as flat rows, from the inputs and output gradients of layers.

    Like :func:`curvlib.gradients`, but an example may have several loss terms and rows of the
    output (tokens flattened into the first axis), and most of the work is one backward pass for
    each batch.

    Args:
        risk: Model, loss, data and parameters.
        block: Rows of a block at most.

    Yields:
        Rows ``[n, P]`` with ``n <= block``: gradients of sums of loss terms.

    Raises:
        ValueError: As :func:`example_scores`.
        FloatingPointError: If a gradient is not finite; names the layer.
    """
    blocks = score_blocks(risk)
    passes = GradientPasses(risk, blocks)
    return passes.slices(block, lambda found, at: _rows(risk, blocks, found, at))


def _rows(risk: Risk, blocks: list[ScoreBlock], found: GradientPass, at: slice) -> Tensor:
    space = risk.space
    n = at.stop - at.start
    own: dict[str, Tensor] = {}
    for block in blocks:
        zeros = space.empty().new_zeros((n, *block.shape))
        own[block.name] = matrices(block, list(terms(block, found, at, space.dtype)), zeros)
    rows = flat_rows(blocks, own, space.size)
    if not bool(torch.isfinite(rows.sum())):
        found.require_finite()
    return rows


def _scores(
    found: GradientPass,
    blocks: list[ScoreBlock],
    directions: Mapping[str, BlockDirections],
    *,
    tokens: bool,
    measure: bool,
    pairs: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Parts of blocks ``[n, Q, B]`` and of tokens ``[n, Q, T]``, and norms ``[n, B]``."""
    n, batch = found.examples, found.one.batch
    count = next(iter(directions.values())).count
    like = batch.risk.space.empty()
    layers = like.new_zeros((n, count, len(blocks)))
    size = token_count(batch) if tokens else 0
    by_tokens = like.new_zeros((n, count, size))
    sizes = like.new_zeros((n, len(blocks)))
    for b, block in enumerate(blocks):
        for which, own in pieces(directions[block.name]):
            for at in chunks(block, found, like.dtype):
                ones = tokens or measure
                parts = list(terms(block, found, at, like.dtype, apart=tokens, ones=ones))
                for term in parts:
                    if not tokens:
                        layers[at, which, b] += own.contract(term.left, term.right)
                        continue
                    each = _by_rows(own, term, None if pairs is None else pairs[at, which])
                    layers[at, which, b] += each.sum(-1)
                    placed = by_token(each, term.places, n, size)
                    if placed is not None:
                        by_tokens[at, which] += placed
                if measure and which.start == 0:
                    sizes[at, b] = norms(parts, at.stop - at.start, like)
    if not bool(torch.isfinite(layers.sum())) and not bool(torch.isfinite(layers).all()):
        found.require_finite()
        raise FloatingPointError(
            f"scores of batch {batch.index} are not finite, though inputs and gradients are: they "
            "overflow, or the directions are not finite; use float64, or a larger damping"
        )
    return layers, by_tokens if tokens else None, sizes if measure else None


class _Numbered:
    """Batches of the examples that are chosen, and their numbers.

    Attributes:
        numbers: Of the examples of the last batch.
        next: Number of the first example that follows.
    """

    def __init__(self, chosen: Tensor | None, first: int) -> None:
        self.chosen = chosen
        self.next = first
        self.numbers = torch.zeros(0, dtype=torch.int64)

    def of(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; those without a chosen example are left out."""
        for batch in batches:
            n = example_count(batch)
            first, self.next = self.next, self.next + n
            self.numbers = torch.arange(first, self.next)
            if self.chosen is None:
                yield batch
                continue
            self.numbers = self.chosen[(self.chosen >= first) & (self.chosen < self.next)].cpu()
            if len(self.numbers):
                yield some_examples(batch, self.numbers - first) if len(self.numbers) < n else batch


def _batches(risk: Risk) -> Iterator[Batch]:
    return risk.stream.own() if risk.places else risk.batches()


def _by_rows(own: BlockDirections, term: Term, pairs: Tensor | None) -> Tensor:
    """Scores of rows, ``[n, Q, T]``, of all pairs of examples and queries or of some."""
    if pairs is None or not isinstance(own, DenseDirections):
        return own.contract_tokens(term.left, term.right)
    _, n, T, _ = term.right.shape
    out = term.right.new_zeros((n, own.count, T))
    for i, mine in enumerate(pairs):
        queries = mine.nonzero()[:, 0].to(out.device)
        if len(queries):
            few = DenseDirections(own.matrices[queries])
            one_hot = not term.left.is_floating_point()
            left = term.left[i : i + 1] if one_hot else term.left[:, i : i + 1]
            out[i, queries] = few.contract_tokens(left, term.right[:, i : i + 1])[0]
    return out


def _joined(
    batch: int,
    stop: int,
    numbers: Tensor,
    found: list[tuple[Tensor, Tensor | None, Tensor | None]],
    alone: bool,
) -> BatchScores:
    """The scores of a batch's passes as one."""
    layers = torch.cat([own for own, _, _ in found])
    tokens = [own for _, own, _ in found if own is not None]
    sizes = [own for _, _, own in found if own is not None]
    return BatchScores(
        batch=batch,
        stop=stop,
        numbers=numbers,
        scores=layers.sum(-1),
        layers=layers,
        tokens=torch.cat(tokens) if tokens else None,
        norms=torch.cat(sizes) if sizes else None,
        alone=alone,
    )


def _fitting(risk: Risk, directions: Mapping[str, BlockDirections]) -> list[ScoreBlock]:
    """The blocks that directions are of, in their order."""
    blocks = {block.name: block for block in score_blocks(risk)}
    if not directions:
        raise ValueError(f"expected directions of some of the blocks {list(blocks)}, got none")
    unknown = sorted(directions.keys() - blocks.keys())
    if unknown:
        raise ValueError(
            f"directions are of the blocks {unknown}, but the risk has {list(blocks)}; make them "
            "for the same model and params="
        )
    counts = {own.count for own in directions.values()}
    if len(counts) > 1:
        raise ValueError(f"expected as many directions in every block, got {sorted(counts)}")
    for name, own in directions.items():
        if tuple(own.shape) != blocks[name].shape:
            raise ValueError(
                f"expected directions of shape {list(blocks[name].shape)} in block {name!r}, got "
                f"{list(own.shape)}"
            )
    return [block for name, block in blocks.items() if name in directions]
