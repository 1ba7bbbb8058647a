"""Data that is gone over again and again: the same batches at every pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from curvlib.core.batch import Batch
from curvlib.core.data import in_memory, reiterable, to_device
from curvlib.core.fingerprint import content_of
from curvlib.core.ranks.in_step import InStep

if TYPE_CHECKING:
    from curvlib.core.risk import Risk

NO_BATCH = (
    "the data has no batch: the data set is empty, or drop_last=True dropped its only "
    "batch; pass at least one batch"
)


class Batches:
    """This rank's batches of a risk.

    Args:
        risk: The risk.
        data: Its data.

    Attributes:
        in_memory: All data, where it need not be read again.
        data: What batches are read from.
        reading: Which batch of a pass was read last, and its examples.
        first_content: Digest of the first batch, for other ranks.

    Raises:
        TypeError: If the data cannot be iterated again.
    """

    def __init__(self, risk: Risk, data: Any) -> None:
        self.in_memory: Sequence[Any] | None = in_memory(data, pairs=risk.take_output is None)
        self.reading: tuple[int, int] | None = None
        self.first_content = 0
        self._risk = risk
        self.data = reiterable(data) if self.in_memory is None else self.in_memory
        self._seen: tuple[int, int] | None = None  # batches and examples of the first full pass
        self._in_step = InStep(risk)

    @property
    def seen(self) -> tuple[int, int]:
        """How many batches and examples there are; zeros before the first full pass."""
        return self._seen or (0, 0)

    def own(self, scale: float = 1.0) -> Iterator[Batch]:
        """The batches in order, on the risk's device.

        Args:
            scale: See :class:`Batch`.

        Raises:
            ValueError: If there is none, in one process.
            RuntimeError: If the data changed since the first pass.
        """
        risk, count, examples = self._risk, 0, 0
        for data in self.data:
            batch = Batch(risk, count, to_device(data, risk.device), scale)
            if count == 0 and risk.group is not None and self._seen is None:
                self.first_content = content_of(batch.data)
            self.reading = (batch.index, batch.examples)
            count, examples = count + 1, examples + batch.examples
            yield batch
        if count == 0 and risk.group is None:
            raise ValueError(NO_BATCH)
        if self._seen is None:
            self._seen = (count, examples)
        elif self._seen != (count, examples):
            raise RuntimeError(
                f"the data changed between passes: {self._seen[0]} batches with "
                f"{self._seen[1]} examples first, now {count} with {examples}; "
                "use data of fixed length (no growing list, no sampler of random length)"
            )

    def together(self, scale: float = 1.0) -> Iterator[Batch]:
        """The batches; where parameters are sharded, in step with other ranks."""
        return self.in_step(self.own(scale))

    def in_step(self, own: Iterator[Batch]) -> Iterator[Batch]:
        """Some of this rank's batches; where parameters are sharded, in step with other ranks."""
        group = self._risk.group
        if group is None or not self._risk.places:
            return own
        return self._in_step.batches(group, own)
