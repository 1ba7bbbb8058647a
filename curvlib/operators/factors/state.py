"""What a fit of Kronecker factors depends on, and where it is between two batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: The passes of a fit.
FACTORS, EIGENVALUES, DONE = 0, 1, 2


@dataclass(frozen=True)
class FitSettings:
    """What a fit depends on, beside the risk.

    Attributes:
        fisher: ``"type2"``, ``"mc"`` or ``"empirical"``.
        samples: Sampled targets of each loss term.
        seed: Of the samples.
        sharing: ``"expand"`` or ``"reduce"``.
        eigen_corrected: Whether there is a second pass, for corrected eigenvalues.
        rest: ``"exclude"`` or ``"diagonal"``.
        dtype: Type of the factors.
        gates: ``"joint"`` or ``"separate"``.
        prefix: Batches that factors are of; ``None`` for all.
    """

    fisher: str
    samples: int
    seed: int
    sharing: str
    eigen_corrected: bool
    rest: str
    dtype: torch.dtype
    gates: str = "joint"
    prefix: int | None = None


@dataclass(frozen=True, eq=False)
class FitState:
    """A fit between two batches.

    Attributes:
        phase: The pass: 0 for factors, 1 for eigenvalues, 2 at the end.
        batch: Batches of the pass that are done.
        weight: Their weight.
        examples: Their examples; and
        before: those of the pass before.
        sums: Sums of the pass.
        counts: Rows of each factor.
        calls: Calls of each layer's modules.
        uses: Uses of each parameter, by function.
        alone: Whether examples go through the model one by one.
        bases: Eigenvectors, by ``"layer|left"`` and ``"layer|right"``.
        values: Eigenvalues of each factor, by the same keys, float64.
        uncovered: Why parameters are in no block.
        ended: Whether the pass is at its end, so that what is done with its sums comes next.
    """

    phase: int
    batch: int
    weight: float
    examples: int
    before: int
    sums: dict[str, Tensor]
    counts: dict[str, float]
    calls: dict[str, int]
    uses: dict[str, dict[str, int]]
    alone: bool
    bases: dict[str, Tensor]
    values: dict[str, Tensor]
    uncovered: dict[str, str]
    ended: bool = False
