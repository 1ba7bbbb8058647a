"""The queries' risk, and what is wrong where they do not fit the training data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from curvlib.core.data import tensors
from curvlib.core.loss import read_loss
from curvlib.core.risk import Risk
from curvlib.influence.arguments import require_order
from curvlib.influence.compression import compressed, require_compression
from curvlib.influence.directions import Directions, Keep, query_directions
from curvlib.influence.factored import factored_blocks, factored_parts
from curvlib.influence.low_rank import joined
from curvlib.influence.preconditioner import Preconditioner
from curvlib.influence.spread_queries import spread_directions


def risk_on(risk: Risk, data: Any) -> Risk:
    """The risk on other data: itself for ``None``, and a risk of the same parameters as it is.

    Raises:
        ValueError: If a risk is given that has other parameters, or a loader shuffles.
    """
    require_order(risk.data if data is None else data.data if isinstance(data, Risk) else data)
    if data is None:
        return risk
    if not isinstance(data, Risk):
        return risk.on(data)
    if [id(p) for p in data.params.values()] != [id(p) for p in risk.params.values()]:
        absent = [name for name, p in risk.params.items() if not _holds(data, p)]
        if absent:
            raise ValueError(
                f"expected a risk of the same model, but it has not the parameters {absent[:6]} of "
                "the training data's; make it with the same model and params="
            )
        return data.restrict(list(risk.held.held.values()))
    return data


def _holds(risk: Risk, param: Tensor) -> bool:
    return any(held is param for held in risk.params.values())


def query_risk(risk: Risk, query: Any, measurement: Callable[[Any, Any], Tensor] | None) -> Risk:
    """The risk whose examples are the queries, the same ones in every process.

    Args:
        risk: The training data's.
        query: Batches, or a risk.
        measurement: What is explained instead of the loss: a sum over examples, unless it says.

    Raises:
        TypeError: If ``measurement`` is no function, or comes with a risk.
        ValueError: If a loader shuffles.
    """
    if measurement is None:
        found = risk_on(risk, query)
        return _everywhere(found.on(found.data)) if risk.places else found.alone()
    if isinstance(query, Risk):
        raise TypeError(
            "measurement= comes with batches of queries; a Risk has its own loss: pass "
            "Risk(model, measurement, data, reduction='sum') alone"
        )
    require_order(query)
    loss = read_loss(measurement)
    declared = loss.known or isinstance(getattr(measurement, "reduction", None), str)
    found = Risk(
        risk.model,
        measurement,
        query,
        forward=risk.take_output,
        target=risk.take_target,
        weight=risk.take_weight,
        reduction=None if declared else "sum",
        params=list(risk.held.held.values()),
        device=risk.device,
        group=risk.group if risk.places else False,
    )
    return _everywhere(found)


def _everywhere(risk: Risk) -> Risk:
    """The risk, of data that is the same on every rank."""
    risk.everywhere = True
    return risk


def misfit(queries: Risk, train: Risk) -> str | None:
    """How the first batch of queries differs in its shapes from the training data's, if it does."""
    mine, others = (_shapes(r) for r in (queries, train))
    if mine == others or "" in (mine, others):
        return None
    return (
        f"the queries have examples of {mine}, but the training data of {others}; pass batches of "
        "the same kind"
    )


def _shapes(risk: Risk) -> str:
    for batch in risk.stream.own():
        each = [f"{list(t.shape[1:])} ({t.dtype})" for t in tensors(batch.data)]
        return "shapes " + ", ".join(each)
    return ""  # this process has no example


@dataclass(frozen=True, eq=False)
class Queries:
    """What is explained, and how far its directions are compressed.

    Attributes:
        risk: Its examples are the queries, the same ones in every process.
        reduction: ``"sum"`` or ``"mean"`` makes one query of all.
        rank: Rank of compressed directions.
        tolerance: Their relative error.
    """

    risk: Risk
    reduction: str | None = None
    rank: int | None = None
    tolerance: float | None = None

    @property
    def compressed(self) -> bool:
        """Whether directions are."""
        return self.rank is not None or self.tolerance is not None

    @property
    def settings(self) -> dict[str, Any]:
        """All but the queries, by the names that callers give it."""
        return {
            "query_reduction": self.reduction,
            "rank": self.rank,
            "tolerance": self.tolerance,
        }

    def directions(self, train: Risk, preconditioner: Preconditioner) -> Directions:
        """Their directions, compressed or not; factored where they are low-rank exactly.

        Raises:
            ValueError: If queries cannot go through the model, and differ from the training data.
        """
        require_compression(self.rank, self.tolerance)
        if train.places:
            if self.compressed:
                raise ValueError(
                    "compressed directions need whole ones, and with sharded parameters each rank "
                    "has a slice (a sharding that curvlib cannot follow here); leave rank= and "
                    "tolerance= out"
                )
            return spread_directions(self.risk, preconditioner, self.reduction)
        keep: Keep | None = None
        if self.compressed:
            keep = functools.partial(compressed, rank=self.rank, tolerance=self.tolerance)
        try:
            if self.reduction is None and factored_blocks(preconditioner):
                parts = list(factored_parts(self.risk, preconditioner, rank=self.rank, keep=keep))
                return {name: joined([part[name] for part in parts]) for name in parts[0]}
            return query_directions(
                self.risk, preconditioner, reduction=self.reduction, keep=keep, join=joined
            )
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            why = misfit(self.risk, train)
            if why is None:
                raise
            raise ValueError(f"{why} ({error})") from error
