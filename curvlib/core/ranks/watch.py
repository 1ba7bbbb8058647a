r"""How a rank that fails within a pass in step tells the others, which wait for it.

Where parameters are sharded, ranks gather them together, many times in a batch, so that a rank that
fails leaves the others in a collective call that it will not make. During such a pass ranks
therefore wait in spans of ``SPAN`` seconds, and look in between whether one has left word in the
group's key-value store. If so, all say where they are: those that wait, in which call. The ones
that failed make that call once, with zeros, so that it ends everywhere and the group goes on to be
of use; then every rank raises. A call that ends within a span costs nothing more.

Waiting by spans takes a backend whose calls keep the CPU waiting (gloo). With others (NCCL), and in
collective calls that the model makes by itself, a failure is met when the failed process ends or a
time-out runs out, as ever.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from curvlib.core.ranks.group import Group

#: Seconds that a rank waits in a call before it looks for word of another one.
SPAN = 0.5
#: Seconds that ranks wait for one another's word, once one has failed.
PATIENCE = 300.0


class NoAnswerError(RuntimeError):
    """Another rank has failed, has ended, hangs, or takes another path."""


@dataclass
class Watch:
    """What ranks of a group know of one another's failures within passes.

    Attributes:
        token: What begins the names of keys, the same on all ranks; empty until it is agreed on.
        passes: How many passes there were.
        calls: How many collective calls this rank has begun in the present pass.
        failures: How many failures all ranks alike have had in it, and gone on.
        active: Whether there is a present pass.
        told: Why it has failed, on this rank or another one.
    """

    token: str = ""
    passes: int = 0
    calls: int = 0
    failures: int = 0
    active: bool = False
    told: Exception | None = field(default=None, repr=False)

    def wait(self, group: Group, work: Any, kind: str, sent: Tensor) -> None:
        """Waits for a call, unless another rank has failed that will not make it.

        Raises:
            NoAnswerError: If it has.
        """
        store = _store(group)
        while True:
            try:
                work.wait(timedelta(seconds=SPAN))
            except RuntimeError:
                if work.is_completed():
                    raise
            else:
                return
            if store.check([self._key("failed")]):
                before = int(store.get(self._key("failed")))
                if before < self.calls:  # the failed rank has not begun this call
                    break
        dtype = str(sent.dtype).removeprefix("torch.")
        call = [kind, list(sent.shape), dtype, sent.device.type]
        every = self._exchanged(group, {"waits": call})
        if all(every):
            work.wait(timedelta(seconds=PATIENCE))
        failed = [(r, one["failed"]) for r, one in enumerate(every) if "failed" in one]
        rank, text = failed[0] if failed else ("?", "it has ended since")
        self.told = NoAnswerError(
            f"rank {rank} of {group.size} failed in a pass over its data: {text}"
        )
        raise self.told

    def tell(self, group: Group, failure: Exception) -> bool:
        """Tells the others of a failure of this rank, and ends the call in which they wait.

        Returns:
            Whether all ranks have failed.
        """
        _store(group).set(self._key("failed"), str(self.calls))
        every = self._exchanged(group, {"failed": f"{type(failure).__name__}: {failure}"})
        waiting = [one["waits"] for one in every if "waits" in one]
        if all(every) and waiting:
            kind, shape, dtype, device = waiting[0]
            zeros = torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
            _, work = group.begun(kind, zeros)
            work.wait(timedelta(seconds=PATIENCE))
        return all("failed" in one for one in every)

    def _exchanged(self, group: Group, word: dict[str, Any]) -> list[dict[str, Any]]:
        """What each rank says of itself; nothing of one that does not within some time."""
        store, every = _store(group), []
        store.set(self._key(str(group.rank)), json.dumps(word))
        for rank in range(group.size):
            key = self._key(str(rank))
            try:
                store.wait([key], timedelta(seconds=PATIENCE))
                every.append(json.loads(store.get(key)))
            except RuntimeError:  # it takes another path, or has ended
                every.append({})
        return every

    def _key(self, name: str) -> str:
        return f"curvlib/{self.token}/{self.passes}.{self.failures}/{name}"


def can_watch(group: Group, device: torch.device) -> bool:
    """Whether ranks wait on the CPU for calls with tensors on a device, and have a store."""
    config = str(dist.get_backend_config(group.process_group))
    backends = dict(part.split(":", 1) for part in config.split(",") if ":" in part)
    used = {backends.get(kind) for kind in (device.type, group.device.type)}
    return used == {"gloo"} and _store(group) is not None


@contextmanager
def watching(group: Group, device: torch.device) -> Iterator[None]:
    """A pass during which a rank that fails in :func:`telling` makes the others raise.

    Args:
        group: The ranks.
        device: Where tensors live that they exchange.
    """
    if not can_watch(group, device):
        yield
        return
    watch = group.watch
    if not watch.token:
        own = int.from_bytes(os.urandom(6), "big")
        watch.token = f"{int(group.numbers([float(own)])[0][0]):x}"
    watch.passes, watch.calls, watch.failures = watch.passes + 1, 0, 0
    watch.told, watch.active = None, True
    try:
        yield
    finally:
        watch.active = False


@contextmanager
def telling(group: Group | None) -> Iterator[None]:
    """A part of a pass that may fail on one rank alone."""
    try:
        yield
    except Exception as failure:
        _told(group, failure)
        raise


def failed_alike(group: Group | None, failure: Exception) -> bool:
    """Whether a failure within a pass has met all ranks, so that they may go another way together.

    True where ranks do not watch one another.
    """
    if isinstance(failure, NoAnswerError):
        return False
    if group is None or not group.watch.active:
        return True
    alike = _told(group, failure)
    group.watch.failures += 1
    return alike


def _told(group: Group | None, failure: Exception) -> bool:
    """Tells a failure once; whether all ranks have failed."""
    watch = None if group is None else group.watch
    if group is None or watch is None or not watch.active or watch.told is not None:
        return False
    if isinstance(failure, NoAnswerError):
        return False
    try:
        alike = watch.tell(group, failure)
    except RuntimeError:  # there is nobody to tell
        alike = False
    if not alike:
        watch.told = failure
    return alike


def _store(group: Group) -> Any:
    find = getattr(dist.distributed_c10d, "_get_process_group_store", None)
    return None if find is None else find(group.process_group)
