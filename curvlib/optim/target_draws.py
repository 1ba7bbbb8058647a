r"""Numbers from which targets are drawn: one stream for each curvature update, example by example.

Micro-batches take up the stream where the one before left it, and ranks where the rank before
does, so that the targets are those of the joint batch, however it is split. They are never the
same for two examples: correlated targets would bias the curvature.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from curvlib.core.ranks.group import Group, group_of
from curvlib.operators.labels import SampledLabels
from curvlib.operators.live.fisher import Uniform
from curvlib.optim.draws import stream

_CPU = torch.device("cpu")
_CHUNK = 2**20


class TargetDraws:
    """The numbers of one step, over its micro-batches.

    Args:
        key: What tells streams apart: the optimizer's seed, the curvature update, the probe.
    """

    def __init__(self, *key: int) -> None:
        self._key = key
        self._batches = 0
        self._drawn = 0

    def batch(self, count: int, process_group: dist.ProcessGroup | None = None) -> Uniform:
        """What draws the ``count`` numbers of the next micro-batch.

        Args:
            count: How many.
            process_group: Replicas, which all start a step together.
        """
        group = group_of(process_group)
        start, rank = self._drawn, 0
        if group is not None:
            # one exchange a step: ranks may have different numbers of micro-batches
            start = _before(count, group) if self._batches == 0 else 0
            rank = 0 if self._batches == 0 else 1 + group.rank
        generator = stream(_CPU, *self._key, rank, self._batches if rank else 0)
        for at in range(0, start, _CHUNK):
            torch.rand(min(_CHUNK, start - at), generator=generator, dtype=torch.float64)
        self._batches += 1
        self._drawn += count
        return SampledLabels(1, generator).uniform


def _before(count: int, group: Group) -> int:
    """How many numbers the ranks before this one draw."""
    return sum(int(n) for (n,) in group.numbers([count])[: group.rank])
