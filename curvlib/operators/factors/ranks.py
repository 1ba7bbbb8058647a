r"""A fit of Kronecker factors on several processes: sums of shards, eigenvectors layer by layer.

Each rank goes over its shard by itself. A pass ends with one sum over ranks for each type of
number; then each rank decomposes the factors of some layers (those that cost the most first, to
the rank that has least to do) and sends their eigenvectors to the others. For :math:`R` ranks and
layers of :math:`O` outputs and :math:`I` inputs, a rank sends about

=============  ======================================================================
factors        :math:`2 \frac{R - 1}{R} \sum (O^2 + I^2)` numbers
eigenvectors   :math:`\sum_\text{own} (O^2 + I^2)` numbers to each of the others
eigenvalues    :math:`2 \frac{R - 1}{R} \sum O I` numbers
=============  ======================================================================

and decomposes about :math:`\frac 9 R \sum (O^3 + I^3)` floating-point operations' worth; it holds
all factors.

Checkpoints are two: the state after each pass, the same on all ranks, which the first one writes to
the file that was named and from which any number of ranks goes on, one included; and for each rank
a file beside it, with its part of the pass, for the same number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.core.ranks.group import Group
from curvlib.core.ranks.rank_passes import RankPass, run_passes
from curvlib.core.run import Progress
from curvlib.operators.factors.state import DONE, FitState

if TYPE_CHECKING:
    from curvlib.operators.factors.fit import Fit

SIDES = ("left", "right")


def decomposed(
    factors: Mapping[str, Tensor], dtype: torch.dtype, group: Group | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Eigenvalues (float64) and eigenvectors of factors; what is diagonal has no eigenvectors.

    Args:
        factors: Symmetric ``[G, d, d]``, or diagonals ``[G, d]``, float64, the same on all ranks.
        dtype: Of the eigenvectors.
        group: The ranks among which the work is divided.
    """
    dense = {key: factor for key, factor in factors.items() if factor.ndim == 3}
    values = {key: factor for key, factor in factors.items() if factor.ndim == 2}
    bases: dict[str, Tensor] = {}
    shapes = {key: tuple(factor.shape) for key, factor in dense.items()}
    owners = owners_of(shapes, 1 if group is None else group.size)
    own = [key for key, rank in owners.items() if group is None or rank == group.rank]

    def decompose() -> None:
        for key in own:
            found, vectors = torch.linalg.eigh(dense[key])
            # laid out as files and other ranks return them: bits of products depend on it
            values[key], bases[key] = found.clamp_(min=0.0), vectors.to(dtype).contiguous()

    if group is None:
        decompose()
    else:
        with group.together("its eigendecompositions"):
            decompose()
        for key, rank in owners.items():
            factor = dense[key]
            value = values[key] if rank == group.rank else factor.new_empty(factor.shape[:2])
            basis = bases[key] if rank == group.rank else torch.empty_like(factor, dtype=dtype)
            values[key] = group.from_rank(value.contiguous(), rank)
            bases[key] = group.from_rank(basis.contiguous(), rank)
    return {key: values[key] for key in factors}, {key: bases[key] for key in dense}


def owners_of(shapes: Mapping[str, tuple[int, ...]], ranks: int) -> dict[str, int]:
    """Which rank decomposes which factor ``[G, d, d]``, by key.

    The costliest first, to the rank with the least work.
    """
    work = [0.0] * ranks
    out = {}
    cost = {key: shape[0] * float(shape[1]) ** 3 for key, shape in shapes.items()}
    for key in sorted(cost, key=lambda key: (-cost[key], key)):
        out[key] = work.index(min(work))
        work[out[key]] += cost[key]
    return out


def fitted_by_ranks(
    fit: Fit,
    group: Group,
    settings: Mapping[str, Any],
    checkpoint: str | os.PathLike[str] | None,
    save_every: float,
    progress: Progress,
) -> FitState:
    """Runs a fit over the shards of all ranks: passes of each, joined at their ends.

    Raises:
        RuntimeError: If another rank fails.
    """
    fit.prefix = _own_prefix(fit, group)

    def joined(state: FitState, own: FitState) -> FitState:
        if state.ended:  # in one process, which is where the checkpoint is from
            return fit.concluded(state)
        sums = own.sums if fit.stepped else _summed(group, own.sums)
        return fit.concluded(_joined(group, state, own, sums))

    def begun(state: FitState) -> FitState:
        if state.ended:
            return state
        if not fit.stepped:
            return _begun(state, {name: torch.zeros_like(t) for name, t in state.sums.items()})
        for total in state.sums.values():  # nothing saves the state before until the pass ends
            total.zero_()
        return _begun(state, state.sums)

    one: RankPass[FitState] = RankPass(
        "its part of a fit",
        begun=begun,
        step=fit.step,
        passed=lambda state: state.ended,
        joined=joined,
        report=fit.report,
        settings=lambda state: {"pass": state.phase, "rank": group.rank},
        stepped=fit.stepped,
    )
    return run_passes(
        group,
        fit.init,
        one,
        state_type=FitState,
        done=lambda state: state.phase == DONE,
        title="K-FAC",
        checkpoint=checkpoint,
        problem=fit.risk.fingerprint,
        settings=settings,
        device=fit.risk.space.device,
        save_every=save_every,
        progress=progress,
        parts=fit.parts,
    )


def _begun(state: FitState, sums: dict[str, Tensor]) -> FitState:
    """A rank's state at the beginning of a pass: sums and counts of its own, from zero."""
    return replace(
        state,
        batch=0,
        weight=0.0,
        examples=0,
        sums=sums,
        counts=dict.fromkeys(state.counts, 0.0),
        calls=dict.fromkeys(state.calls, 0),
        uses={name: {} for name in state.uses},
    )


def _own_prefix(fit: Fit, group: Group) -> int | None:
    """How many of the batches that factors are of are this rank's."""
    if fit.settings.prefix is None:
        return None
    own = fit.total
    if own is None:
        own = sum(1 for _ in fit.risk.stream.own())
    counts = [int(n) for (n,) in group.numbers([float(own)])]
    before = sum(counts[: group.rank])
    return min(max(fit.settings.prefix - before, 0), own)


def _summed(group: Group, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over ranks, one for each type of number."""
    names = sorted(own)
    summed: dict[str, Tensor] = {}
    for dtype in sorted({own[name].dtype for name in names}, key=str):
        members = [name for name in names if own[name].dtype == dtype]
        flat = group.add(torch.cat([own[name].reshape(-1) for name in members]))
        parts = flat.split([own[name].numel() for name in members])
        for name, part in zip(members, parts, strict=True):
            summed[name] = part.view(own[name].shape)
    return {name: summed[name] for name in own}


def _joined(group: Group, before: FitState, own: FitState, sums: dict[str, Tensor]) -> FitState:
    """The state of a pass over all data, which each rank has afterwards."""
    told = group.values(
        [own.weight, own.examples, own.counts, own.calls, own.uses, own.alone, own.batch]
    )
    weights, examples, counts, calls, uses, alone, batches = zip(*told, strict=True)
    return replace(
        before,
        batch=sum(batches),
        weight=float(sum(weights)),
        examples=sum(examples),
        sums=sums,
        counts={name: sum(each[name] for each in counts) for name in own.counts},
        calls={name: sum(each[name] for each in calls) for name in own.calls},
        uses={name: _added([each[name] for each in uses]) for name in own.uses},
        alone=any(alone),
        ended=True,
    )


def _added(parts: list[dict[str, int]]) -> dict[str, int]:
    out: dict[str, int] = {}
    for part in parts:
        for name, count in part.items():
            out[name] = out.get(name, 0) + count
    return out
