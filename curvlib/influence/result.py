"""What influence functions return: scores with their unit and sign, saved and plotted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.core.result import Result, axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What the sign of every score means.
SIGN = "positive: a proponent, whose removal from the training data raises the query's loss"
#: Units of scores, in words.
UNITS = {
    "inner_product": "inner product of gradients of summed losses, g_q (H + damping)^-1 g_n",
    "nats": "predicted rise of the query's summed loss if the example is removed",
    "normalized": "inner product divided by a norm of the training example's gradient",
}


@dataclass(frozen=True, eq=False, repr=False)
class InfluenceScores(Result):
    """Scores of all training examples for all queries.

    Attributes:
        scores: ``[Q, N]``.
        per_layer: Parts of each block, ``[Q, N, B]``, or ``None``.
        layers: Names of the blocks.
        unit: ``"inner_product"``, ``"nats"``, or ``"normalized"`` for normalized scores.
        sign: What the sign means.
        curvature: Name of the matrix.
        damping: As it was asked for.
        relative: Whether that is a fraction of the mean eigenvalue.
        settings: The other settings, by name.
    """

    scores: Tensor
    per_layer: Tensor | None
    layers: tuple[str, ...]
    unit: str
    sign: str
    curvature: str
    damping: float
    relative: bool
    settings: dict[str, Any]

    def plot(self, query: int = 0, ax: Axes | None = None) -> Axes:
        """Draws the histogram of one query's scores."""
        return _histogram(self.scores[query], None, self.unit, query, ax)


@dataclass(frozen=True, eq=False, repr=False)
class SelfInfluence(Result):
    """Influence of training examples on themselves.

    Attributes:
        scores: ``[N]``, not negative for a positive definite curvature.
        unit: ``"inner_product"`` or ``"nats"``.
        sign: What the sign means.
        curvature: Name of the matrix.
        damping: As it was asked for.
        relative: Whether that is a fraction of the mean eigenvalue.
    """

    scores: Tensor
    unit: str
    sign: str
    curvature: str
    damping: float
    relative: bool

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws their histogram."""
        axes = _histogram(self.scores, None, self.unit, None, ax)
        axes.set_title("self-influence")
        return axes


@dataclass(frozen=True, eq=False, repr=False)
class TopInfluence(Result):
    """Proponents and opponents of queries, best first.

    Attributes:
        indices: Numbers of the proponents in the training data, ``[Q, k]``.
        scores: Their scores, descending; ties by the smaller number.
        per_layer: Parts of each block, ``[Q, k, B]``, which add up to the scores; or ``None``.
        per_token: Parts of each training token, ``[Q, k, T]``, zero beyond an example's tokens; or
            ``None``. They add up to the scores where every parameter is in a layer that takes a row
            for each token: what is left belongs to none.
        token_counts: Tokens of each example, ``[Q, k]``, or ``None``.
        bottom_indices: Numbers of the opponents, ``[Q, bottom]``.
        bottom_scores: Their scores, ascending.
        bottom_per_layer: As ``per_layer``.
        bottom_per_token: As ``per_token``.
        bottom_token_counts: As ``token_counts``.
        layers: Names of the blocks.
        mean: Mean of all scores of each query, ``[Q]``.
        std: Their standard deviation, ``[Q]``.
        sample: Scores of a uniform random sample of the training examples, ``[Q, S]``.
        sample_keys: What that sample is drawn by, a function of the examples' numbers, ``[S]``.
        examples: Training examples that were scored.
        rescored: Whether scores are those of uncompressed directions.
        unit: ``"inner_product"``, ``"nats"``, or ``"normalized"`` for normalized scores.
        sign: What the sign means.
        curvature: Name of the matrix.
        damping: As it was asked for.
        relative: Whether that is a fraction of the mean eigenvalue.
        settings: The other settings, by name.
    """

    indices: Tensor
    scores: Tensor
    per_layer: Tensor | None
    per_token: Tensor | None
    token_counts: Tensor | None
    bottom_indices: Tensor
    bottom_scores: Tensor
    bottom_per_layer: Tensor | None
    bottom_per_token: Tensor | None
    bottom_token_counts: Tensor | None
    layers: tuple[str, ...]
    mean: Tensor
    std: Tensor
    sample: Tensor
    sample_keys: Tensor
    examples: int
    rescored: bool
    unit: str
    sign: str
    curvature: str
    damping: float
    relative: bool
    settings: dict[str, Any]

    def plot(self, query: int = 0, ax: Axes | None = None) -> Axes:
        """Draws the histogram of a sample of one query's scores, with what was kept above it."""
        kept = torch.cat([self.scores[query], self.bottom_scores[query]])
        return _histogram(self.sample[query], kept, self.unit, query, ax)

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        queries: Any = None,
        train: Any = None,
        query_captions: Any = None,
        captions: Any = None,
        title: str = "Influence",
        shown: int = 10,
        provenance: Mapping[str, Any] | None = None,
        date: str | None = None,
    ) -> Path:
        """Writes a page that shows proponents and opponents to a person: one file, no network.

        Each of the four contents is a sequence in the order of the data, a mapping of numbers, or
        a function of the number.

        Args:
            path: The file, such as ``"influence.html"``.
            queries: What the queries are: strings, lists of strings (tokens), images (``[H, W]``,
                ``[C, H, W]`` or ``[H, W, C]``), or numbers.
            train: What the training examples are. Tokens are shaded by their parts of the score
                where they are as many as ``per_token`` has; so are the characters of a string.
            query_captions: A line on each query: its label, what the model said.
            captions: A line on each training example.
            title: The heading.
            shown: Proponents and opponents of each query that are shown; the rest is listed.
            provenance: More lines for the table at the end, by name.
            date: When it was made; now when omitted.

        Raises:
            OSError: If the file cannot be written.
            TypeError: If the content of an example is none that can be shown.
            ValueError: If one is missing, or ``shown`` is not positive.
        """
        from curvlib.influence.page import Contents, Page

        contents = Contents(queries, train, query_captions, captions)
        return Page(self, contents, title, shown, provenance or {}, date).write(path)


def _histogram(
    scores: Tensor, kept: Tensor | None, unit: str, query: int | None, ax: Axes | None
) -> Axes:
    axes = axes_or_new(ax)
    axes.hist(scores.double().numpy(), bins=60, log=True, color="0.6")
    if kept is not None:
        height = axes.get_ylim()[1]
        axes.plot(kept.double().numpy(), [height] * len(kept), "|", color="C1", label="kept")
        axes.legend()
    axes.set_xlabel(f"influence ({unit})")
    axes.set_ylabel("training examples")
    if query is not None:
        axes.set_title(f"query {query}")
    return axes
