"""One pass over a risk's data: the sum of a function of batches, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.data import to_device
from curvlib.core.ranks.in_step import require_begun
from curvlib.core.ranks.joined import Shard, joined
from curvlib.core.ranks.watch import telling, watching

if TYPE_CHECKING:
    from curvlib.core.risk import Risk

#: Adds a batch's term to the sum so far.
Add = Callable[[Batch, Tensor | None], Tensor]


def one_pass(
    risk: Risk, add: Add, scale: float | None, given: Tensor | None = None, rows: bool = False
) -> Shard:
    """The sum over all batches, which is the same on every rank.

    Args:
        risk: Data and model.
        add: As for :meth:`curvlib.core.risk.Risk.accumulate`.
        scale: Of each batch. ``None`` for 1, and for a sum whose weight is not asked for.
        given: What is multiplied.
        rows: Whether each rank's sum is complete as it is.
    """
    if risk.group is None:
        return _own_pass(risk, add, scale)
    if risk.places:
        with watching(risk.group, risk.device):
            return joined(risk.group, risk, _own_pass(risk, add, scale), given, rows=rows)
    try:
        own = _own_pass(risk, add, scale)
    except Exception as failure:  # noqa: BLE001 (told to the other ranks, then raised again)
        own = Shard(None, 0.0, 0, 0, failure)
    return joined(risk.group, risk, own, given)


def _own_pass(risk: Risk, add: Add, scale: float | None) -> Shard:
    """One pass over this rank's batches; weights are summed where the scale is 1."""
    total: Tensor | None = None
    weight: Tensor | float = 0.0
    count, examples = 0, 0
    with _entered(risk):
        for batch in risk.stream.together(1.0 if scale is None else scale):
            with telling(risk.group):
                total = add(batch, total)
                if batch.lent:
                    continue
                count, examples = count + 1, examples + batch.examples
                if scale == 1.0 and risk.loss.reduction != "sum":
                    weight = weight + batch.weight
                if batch.index > 0 and risk.misread is not None:
                    raise ValueError(risk.misread)
    return Shard(total, float(weight), count, examples)


@contextmanager
def _entered(risk: Risk) -> Iterator[None]:
    """The model is left as it was, and sharded parameters are gathered where they are used."""
    with ExitStack() as stack:
        try:
            stack.enter_context(risk.untouched())
            stack.enter_context(risk.held.gathering())
        except Exception as failure:
            if risk.places and risk.group is not None:
                require_begun(risk.group, failure)
            raise
        yield


def known_weight(risk: Risk) -> float | None:
    """``W`` where it is known before the pass: sums, and data in memory of one process."""
    if risk.loss.reduction == "sum":
        return 1.0
    if risk.group is not None or not risk.in_memory:
        return None
    data = (to_device(d, risk.device) for d in risk.in_memory)
    return positive(float(sum(Batch(risk, i, d).weight for i, d in enumerate(data))))


def positive(weight: float) -> float:
    """The weight, or ValueError where it is zero."""
    if weight == 0.0:
        raise ValueError(
            "no loss term is valid: every target is ignored, or all weights are zero; "
            "check ignore_index, class weights and weight="
        )
    return weight
