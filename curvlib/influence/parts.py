r"""Influence of training data that several processes hold: scans of shards, merged once.

Queries and their directions are the same on every rank. A rank scores its own examples, whose
numbers begin where those of the ranks before it end, and keeps its best; then the kept scores are
gathered, so that all ranks have what one process would have found. For :math:`Q` queries of which
:math:`k` scores are kept, a rank sends about :math:`16 Q k` bytes (numbers and scores) at the end,
and for layers and tokens :math:`2 Q k (B + T)` numbers. The examples stay where they are.

An unfinished scan is kept in a file for each rank beside the named one, and goes on with the same
number of ranks; the merged result is in the named file, for any number of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlib.core.ranks.group import Group
from curvlib.core.ranks.rank_passes import RankPass, run_passes
from curvlib.core.ranks.watch import telling, watching
from curvlib.core.risk import Risk
from curvlib.core.run import Progress, run
from curvlib.influence.details import Details
from curvlib.influence.scan import Scan, ScanState, ranked
from curvlib.operators.batch_examples import example_count


@dataclass(frozen=True, eq=False)
class Part:
    """The examples of this process among all training examples.

    Attributes:
        risk: Their risk, which does not communicate.
        first: Number of the first one.
        counts: Examples of each rank; ``None`` where there is one process, which need not know.
        group: The ranks.
    """

    risk: Risk
    first: int = 0
    counts: tuple[int, ...] | None = None
    group: Group | None = None

    @property
    def empty(self) -> bool:
        """Whether this process has no example."""
        if self.group is None or self.counts is None:
            return False
        return self.counts[self.group.rank] == 0

    def gathered(self, own: Callable[[], Tensor], empty: Callable[[], Tensor]) -> Tensor:
        """Rows ``[n, ...]`` of this process's examples, and those of the others around them.

        Args:
            own: Computes them.
            empty: Makes none of them, of the same type and trailing shape.
        """
        if self.group is None:
            return own()
        rows = empty()
        if self.stepped:
            with self.watched():
                rows = own()
        else:
            with self.group.together("scoring its examples"):
                if not self.empty:
                    rows = own()
        rows = empty() if not rows.numel() else rows
        return torch.cat(self.group.rows(rows.contiguous()))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A part of a scan that ranks go through in step: a failure of one is everybody's."""
        if not self.stepped or self.group is None:
            yield
            return
        with watching(self.group, self.risk.device), telling(self.group):
            yield

    @property
    def stepped(self) -> bool:
        """Whether ranks go through their examples together, as sharded parameters ask for."""
        return bool(self.risk.places)


def own_part(risk: Risk) -> Part:
    """The examples that are this process's: all of a risk of one process."""
    group = risk.group
    if group is None:
        return Part(risk)
    own = 0
    with group.together("counting its examples"):
        own = sum(example_count(batch) for batch in risk.stream.own())
    counts = tuple(int(n) for (n,) in group.numbers([float(own)]))
    return Part(risk if risk.places else risk.alone(), sum(counts[: group.rank]), counts, group)


def whole_part(risk: Risk) -> Part:
    """The examples of a risk of one process.

    Raises:
        ValueError: If it belongs to several.
    """
    if risk.group is not None:
        raise ValueError(
            f"all scores of a pass are for one process, and the risk belongs to {risk.group.size}: "
            "use Influence.top, which they share, or give each process its own part, with "
            "Risk(..., group=False) and chosen="
        )
    return Part(risk)


def scanned(
    scan: Scan,
    part: Part,
    *,
    problem: Callable[[], str],
    settings: Mapping[str, Any],
    checkpoint: str | os.PathLike[str] | None,
    save_every: float,
    progress: Progress,
) -> ScanState:
    """Runs a scan to its end, over the examples of all processes.

    Raises:
        RuntimeError: If another rank fails.
    """
    if part.group is None:
        return run(
            scan.init,
            scan.step,
            state_type=ScanState,
            done=lambda state: state.done,
            report=scan.report,
            title="influence",
            checkpoint=checkpoint,
            problem=problem,
            settings=settings,
            save_every=save_every,
            progress=progress,
        )
    group = part.group
    idle = part.empty and not part.stepped
    one = RankPass(
        "its part of a scan",
        begun=lambda _: replace(scan.init(), done=idle),
        step=scan.step,
        passed=lambda state: state.done,
        joined=lambda _, own: merged(group, own, scan),
        report=scan.report,
        settings=lambda _: {"first": part.first, "examples": list(part.counts or ())},
        stepped=part.stepped,
    )
    return run_passes(
        group,
        scan.init,
        one,
        state_type=ScanState,
        done=lambda state: state.done,
        title="influence",
        checkpoint=checkpoint,
        problem=problem,
        settings=settings,
        device=part.risk.device,
        save_every=save_every,
        progress=progress,
    )


def merged(group: Group, own: ScanState, scan: Scan) -> ScanState:
    """What one process would have kept, on every rank; numbers ascend with ranks, as ties need."""
    sides = {}
    for name, k, descending in (("top", scan.k, True), ("bottom", scan.bottom, False)):
        scores = _columns(group, getattr(own, f"{name}_scores"))
        indices = _columns(group, getattr(own, f"{name}_indices"))
        best = ranked(scores, k, descending=descending)
        sides[f"{name}_indices"] = indices.gather(1, best.indices)
        sides[f"{name}_scores"] = best.scores
    told = group.values([own.batch, own.examples, own.alone])
    batches, examples, alone = zip(*told, strict=True)
    keys = torch.cat(group.rows(own.sample_keys))
    kept = keys.sort(stable=True).indices[: scan.sample]
    totals = group.rows(torch.stack([own.total, own.squares]))
    total, squares = torch.stack(totals).sum(0)
    return replace(
        own,
        **sides,
        batch=sum(batches),
        seen=sum(examples),
        examples=sum(examples),
        alone=any(alone),
        done=True,
        total=total,
        squares=squares,
        sample_keys=keys[kept],
        sample_scores=_columns(group, own.sample_scores)[:, kept],
    )


def _columns(group: Group, own: Tensor) -> Tensor:
    """``[Q, m_r]`` of all ranks beside each other."""
    return torch.cat(group.rows(own.mT.contiguous())).mT.contiguous()


def joined_details(group: Group, own: Details) -> Details:
    """Parts of kept scores, each from the rank that has the example; zero elsewhere."""
    width = int(group.most([float(own.tokens.shape[2])])[0])
    wide = torch.nn.functional.pad(own.tokens, (0, width - own.tokens.shape[2]))
    return Details(
        group.add(own.scores),
        group.add(own.layers),
        group.add(wide) if wide.numel() else wide,
        group.add(own.counts),
    )
