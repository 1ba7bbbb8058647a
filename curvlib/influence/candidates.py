"""Candidates: the training examples that a filter leaves for a scan.

Candidates of several filters are joined by :func:`merged`; :func:`uniform` draws a random sample,
which favours nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlib.core.random import generator_of
from curvlib.core.result import Result


@dataclass(frozen=True, eq=False, repr=False)
class Candidates(Result):
    """Training examples that a filter keeps.

    Attributes:
        indices: Those kept for any query, increasing, int64 ``[n]``: what a scan goes through.
        per_query: Those kept for each query, the best first, int64.
        similarity: Their similarity to the query, float64, as long; zero for a random sample.
        examples: ``N``, how many there were to choose from.
        method: Name of the filter.
        settings: Its settings.
    """

    indices: Tensor
    per_query: list[Tensor]
    similarity: list[Tensor]
    examples: int
    method: str
    settings: dict[str, Any]

    @property
    def share(self) -> float:
        """The part of the training examples that a scan still goes through."""
        return len(self.indices) / self.examples


def uniform(
    examples: int,
    keep: int,
    *,
    queries: int = 1,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Candidates:
    """A random sample of the training examples, the same for all queries.

    Args:
        examples: ``N``.
        keep: How many; all, where there are fewer.
        queries: How many queries.
        generator: Where random numbers come from, or
        seed: their seed. With neither, the seed is 0.

    Raises:
        ValueError: If a count is not positive.

    Example:
        >>> found = uniform(1000, 10, queries=2, seed=1)
        >>> len(found.indices), found.share
        (10, 0.01)
    """
    require_counts(examples=examples, keep=keep, queries=queries)
    random = generator_of(generator, seed)
    chosen = torch.randperm(examples, generator=random)[:keep]
    return Candidates(
        indices=chosen.sort().values,
        per_query=[chosen] * queries,
        similarity=[torch.zeros(len(chosen), dtype=torch.float64)] * queries,
        examples=examples,
        method="uniform",
        settings={"keep": keep, "seed": (seed or 0) if generator is None else "generator"},
    )


def merged(first: Candidates, *others: Candidates) -> Candidates:
    """What any of several filters keeps: the first one's candidates, then what others add.

    Raises:
        ValueError: If they are of different training examples or numbers of queries.

    Example:
        >>> both = merged(uniform(100, 5, seed=0), uniform(100, 5, seed=1))
        >>> both.method, 5 <= len(both.indices) <= 10
        ('uniform+uniform', True)
    """
    every = [first, *others]
    sizes = [(c.examples, len(c.per_query)) for c in every]
    if len(set(sizes)) > 1:
        raise ValueError(
            "expected candidates of the same training examples and queries, got (examples, "
            f"queries) of {sizes}"
        )
    per_query, similarity = [], []
    for q in range(len(first.per_query)):
        indices = torch.cat([c.per_query[q] for c in every])
        values = torch.cat([c.similarity[q] for c in every])
        _, at = np.unique(indices.numpy(), return_index=True)  # the first place of each
        order = torch.from_numpy(np.sort(at))
        per_query.append(indices[order])
        similarity.append(values[order])
    return Candidates(
        indices=torch.cat([c.indices for c in every]).unique(),
        per_query=per_query,
        similarity=similarity,
        examples=first.examples,
        method="+".join(c.method for c in every),
        settings={str(i): c.settings for i, c in enumerate(every)},
    )


def require_counts(**counts: int) -> None:
    """Raises ValueError unless all are integers of at least 1."""
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}= is a number of at least 1, got {value!r}")
