"""Batches of ranks that have to go through them together, as sharded parameters ask for.

A rank that has no more batches goes through one that it had, or that another rank lends it where
its shard is empty, and multiplies its loss by zero (:attr:`curvlib.core.batch.Batch.lent`). Each
round costs an exchange of three numbers; a batch is lent once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch

from curvlib.core.batch import Batch
from curvlib.core.data import to_device

if TYPE_CHECKING:
    from curvlib.core.ranks.group import Group
    from curvlib.core.risk import Risk

T = TypeVar("T")


class InStep:
    """Goes through batches in step with other ranks.

    Args:
        risk: The risk that they belong to.
    """

    def __init__(self, risk: Risk) -> None:
        self.risk = risk
        self._spare: Batch | None = None

    def batches(self, group: Group, own: Iterator[Batch]) -> Iterator[Batch]:
        """This rank's batches, and lent ones until no rank has another.

        Raises:
            RuntimeError: If the data of another rank fails.
            Exception: This rank's own failure.
        """
        while True:
            batch, failure = None, None
            try:
                batch = next(own, None)
            except Exception as error:  # noqa: BLE001 (told to the other ranks, then raised again)
                failure = error
            state = [failure is not None, batch is not None, self._spare is not None]
            every = group.numbers([float(flag) for flag in state])
            if any(failed for failed, _, _ in every):
                group.raise_failure(failure, "a pass over its data")
            if not any(has for _, has, _ in every):
                return
            if not all(has or spare for _, has, spare in every):
                lender = next(rank for rank, (_, has, _) in enumerate(every) if has)
                self._borrow(group, batch, lender)
            if batch is not None:
                self._spare = replace(batch, lent=True)
            assert self._spare is not None
            yield self._spare if batch is None else batch

    def _borrow(self, group: Group, batch: Batch | None, lender: int) -> None:
        """Gives a rank without a batch that of the lender, with which all ranks call this."""
        own = None
        with group.together("lending a batch"):
            if batch is not None and group.rank == lender:
                own = to_device(batch.data, torch.device("cpu"))
        data = group.lent(own, lender)
        if batch is None:
            self._spare = Batch(self.risk, 0, to_device(data, self.risk.device), lent=True)


def require_begun(group: Group, failure: Exception) -> None:
    """Tells the other ranks, in their first exchange of a pass, that this one has not begun.

    Raises:
        Exception: The failure.
    """
    group.numbers([1.0, 0.0, 0.0])
    group.raise_failure(failure, "a pass over its data")


class Agreement:
    """What ranks that work in step tell each other: numbers, and failures, which are everybody's.

    Work that may fail on one rank alone, and does not communicate, is attempted. A rank that has
    failed goes on to where all ranks agree on something; there all of them raise.

    Args:
        group: The ranks.
        what: What they do, for the message of the others.
    """

    def __init__(self, group: Group, what: str) -> None:
        self.group = group
        self.what = what
        self.failure: Exception | None = None

    def attempt(self, function: Callable[[], T], failures: type[Exception] = Exception) -> T | None:
        """What a function returns; ``None`` if it, or one before it, has failed.

        Args:
            function: It does not communicate, or is done with that when it raises these
            failures: which are told. Others are raised at once.
        """
        if self.failure is not None and failures is Exception:
            return None
        try:
            return function()
        except failures as error:
            self.failure = self.failure or error
        return None

    def most(self, *numbers: float) -> list[float]:
        """The largest of each number over ranks.

        Raises:
            RuntimeError: If another rank has failed.
            Exception: This rank's own failure.
        """
        failed, *found = self.group.most([float(self.failure is not None), *map(float, numbers)])
        if failed:
            self.group.raise_failure(self.failure, self.what)
        return found
