r"""Processes that work on one risk together: a thin layer over ``torch.distributed``.

With :math:`R` ranks, each holding a shard of the data, every pass over the data ends with

=============  ============================  ==========================================
what           bytes a rank sends            why
=============  ============================  ==========================================
a header       :math:`8 n R`, n = 20         weights, failures, and whether ranks agree
the sum        :math:`2 S (R - 1) / R`       the sum itself, :math:`S` bytes, once
=============  ============================  ==========================================

(for the ring algorithm of an all-reduce). A collective call returns the same bits on every rank, so
that whatever ranks derive from it they derive alike. A rank that fails says so in its header (where
parameters are sharded, at once: :mod:`curvlib.core.ranks.watch`), and all ranks raise; one that has
died or hangs ends the others when PyTorch notices: at once where the connection closes, else after
the group's timeout.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvlib.core.ranks.watch import NoAnswerError, Watch

#: Which processes work together: ``None`` for the default group where one is initialized,
#: ``True`` for the same, required; ``False`` for this process alone; or a group.
GroupChoice = Any


@dataclass(frozen=True)
class Group:
    """Some ranks of ``torch.distributed``, at least two.

    Attributes:
        process_group: PyTorch's group.
        rank: This process among them.
        size: ``R``, how many there are.
        device: Where small tensors live that are sent: the CPU if the backend takes it.
        watch: What is known of failures within passes that ranks make in step.
    """

    process_group: dist.ProcessGroup
    rank: int
    size: int
    device: torch.device
    watch: Watch = field(default_factory=Watch, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes files and shows progress."""
        return self.rank == 0

    # --------------------------------------------------------------- collectives
    def add(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place; the same bits on each.

        Args:
            tensor: Of the same shape and type on each rank, in any dense layout.

        Raises:
            RuntimeError: If another rank has ended or does not answer.
        """
        strides = tensor.stride()
        axes = sorted(range(tensor.ndim), key=lambda d: (-strides[d], d))
        flat = tensor.permute(axes)
        sent = flat if flat.is_contiguous() else tensor.contiguous()
        self._call("add", sent, "a sum over ranks")
        return tensor if sent is flat else tensor.copy_(sent)

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest of each number over ranks."""
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        self._call("most", numbers, "a comparison of ranks")
        return [float(v) for v in numbers.tolist()]

    def numbers(self, values: Sequence[float]) -> list[list[float]]:
        """As many numbers of each rank, in the order of ranks."""
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        every = self._call("rows", own, "an exchange of headers")
        rows: list[list[float]] = torch.stack(every).tolist()
        return rows

    def rows(self, tensor: Tensor) -> list[Tensor]:
        """Each rank's tensor ``[n_r, ...]``, on every rank, in the order of ranks.

        Args:
            tensor: Of the same type and trailing shape on each rank; ``n_r`` may differ and be 0.
        """
        counts = [int(n) for (n,) in self.numbers([len(tensor)])]
        most = max(counts)
        if most == 0:
            return [tensor] * self.size
        padded = tensor.new_zeros((most, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        every = self._call("rows", padded, "a gathering of rows")
        return [part[:n] for part, n in zip(every, counts, strict=True)]

    def joined(self, block: Tensor) -> Tensor:
        """Blocks ``[c, ...]`` of equal shape, one of each rank, as ``[R c, ...]``."""
        out: Tensor = self._call("joined", block.contiguous(), "a gathering of a sharded tensor")
        return out

    def exchanged(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """What each rank has for this one, ``[n]`` each, in the order of ranks.

        Args:
            parts: What this rank has for each, ``[n]`` of one type on one device; ``n`` may be 0.
            lengths: How much each rank has for this one.
        """
        sent = torch.cat(list(parts))
        out = sent.new_empty(sum(lengths))
        given = [len(part) for part in parts]
        with self._answered("an exchange of slices"):
            dist.all_to_all_single(out, sent, list(lengths), given, group=self.process_group)
        return list(out.split(list(lengths)))

    def own_sum(self, blocks: Tensor) -> Tensor:
        """This rank's block ``[c, ...]`` of the sum over ranks of ``[R c, ...]``."""
        what, rows = "a sum of a sharded tensor", len(blocks) // self.size
        if self.watch.active:  # gloo cannot wait for this call by spans, and sums all in it anyway
            every: Tensor = self._call("add", blocks.clone().contiguous(), what)
            return every[self.rank * rows : (self.rank + 1) * rows].clone()
        out: Tensor = self._call("own_sum", blocks.contiguous(), what)
        return out

    def begun(self, kind: str, sent: Tensor) -> tuple[Any, Any]:
        """A collective call that has begun: what it fills, and what to wait for.

        Args:
            kind: ``"add"``, ``"most"``, ``"rows"``, ``"joined"`` or ``"own_sum"``.
            sent: What this rank gives, contiguous.
        """
        settings: Any = {"group": self.process_group, "async_op": True}
        size, length = self.size, len(sent) if sent.ndim else 0
        if kind in ("add", "most"):
            op = dist.ReduceOp.SUM if kind == "add" else dist.ReduceOp.MAX
            return sent, dist.all_reduce(sent, op=op, **settings)
        if kind == "rows":
            every = [torch.empty_like(sent) for _ in range(size)]
            return every, dist.all_gather(every, sent, **settings)
        if kind == "joined":
            out = sent.new_empty((size * length, *sent.shape[1:]))
            send = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        else:
            out = sent.new_empty((length // size, *sent.shape[1:]))
            send = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return out, send(out, sent, **settings)

    def _call(self, kind: str, sent: Tensor, what: str) -> Any:
        if self.watch.active and self.watch.told is not None:
            raise self.watch.told  # this pass has failed
        with self._answered(what):
            out, work = self.begun(kind, sent)
            if self.watch.active:
                self.watch.calls += 1
                self.watch.wait(self, work, kind, sent)
            else:
                work.wait()
        return out

    def joined_at(self, block: Tensor, rank: int) -> Tensor | None:
        """Blocks ``[c, ...]`` of equal shape, as ``[R c, ...]``, on one of the ranks alone."""
        out, parts = None, None
        if self.rank == rank:
            out = block.new_empty((self.size * block.shape[0], *block.shape[1:]))
            parts = list(out.chunk(self.size))
        with self._answered("a gathering of a sharded tensor"):
            target = dist.get_global_rank(self.process_group, rank)
            dist.gather(block.contiguous(), parts, dst=target, group=self.process_group)
        return out

    def shares(self, blocks: Tensor | None, own: Tensor, rank: int) -> Tensor:
        """This rank's block ``[c, ...]`` of ``[R c, ...]``, which one of the ranks has.

        Args:
            blocks: On that rank, the tensor.
            own: A block, which is filled.
            rank: Which one.
        """
        parts = None
        if self.rank == rank and blocks is not None:
            parts = [part.contiguous() for part in blocks.chunk(self.size)]
        with self._answered("a scattering of a tensor"):
            source = dist.get_global_rank(self.process_group, rank)
            dist.scatter(own, parts, src=source, group=self.process_group)
        return own

    def texts(self, text: str) -> list[str]:
        """A text of each rank, in the order of ranks."""
        own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        return [bytes(part.tolist()).decode() for part in self.rows(own)]

    def values(self, value: Any) -> list[Any]:
        """A value of each rank that JSON can hold."""
        return [json.loads(text) for text in self.texts(json.dumps(value))]

    def from_first(self, tensor: Tensor | None, like: Tensor | None = None) -> Tensor:
        """The first rank's tensor, on every rank.

        Args:
            tensor: On the first rank, the tensor.
            like: A tensor of its shape and type, where the other ranks have one to be filled;
                without, bytes (uint8) of any number are sent.
        """
        if like is None:
            count = int(self.most([0.0 if tensor is None else float(tensor.numel())])[0])
            like = torch.empty(count, dtype=torch.uint8, device=self.device)
        if self.first and tensor is not None:
            like.copy_(tensor)
        return self.from_rank(like, 0)

    def from_rank(self, own: Tensor, rank: int) -> Tensor:
        """One rank's tensor, on every rank.

        Args:
            own: On that rank what is sent, elsewhere a tensor of its shape and type to be filled.
            rank: Which one, in the order of the group.
        """
        with self._answered("a broadcast"):
            source = dist.get_global_rank(self.process_group, rank)
            dist.broadcast(own, src=source, group=self.process_group)
        return own

    def lent(self, value: Any, lender: int) -> Any:
        """A value of one rank, pickled, on every rank."""
        items = [value]
        source = dist.get_global_rank(self.process_group, lender)
        with self._answered("the lending of a batch"):
            dist.broadcast_object_list(items, src=source, group=self.process_group)
        return items[0]

    def wait(self) -> None:
        """Returns when every rank has come here."""
        self.most([0.0])

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A block that may fail on some ranks: afterwards, all of them raise.

        The ranks where it failed raise their own error, the others a RuntimeError that quotes it.
        The block itself must not communicate.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 (told to the others, then raised again)
            failure = error
        self.require_success(failure, what)

    def require_success(self, failure: Exception | None, what: str) -> None:
        """Raises on every rank if there was a failure on any: see :meth:`together`."""
        if self.most([float(failure is not None)])[0]:
            self.raise_failure(failure, what)

    def raise_failure(self, failure: Exception | None, what: str) -> None:
        """Raises everywhere, once all ranks know that at least one has failed."""
        texts = self.texts("" if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        rank, text = next((r, t) for r, t in enumerate(texts) if t)
        raise RuntimeError(f"rank {rank} of {self.size} failed in {what}: {text}")

    @contextmanager
    def _answered(self, what: str) -> Iterator[None]:
        try:
            yield
        except NoAnswerError:
            raise
        except RuntimeError as error:  # torch.distributed.DistError is one, and gloo's are plain
            raise NoAnswerError(
                f"rank {self.rank} of {self.size} got no answer in {what}: another rank has ended, "
                "hangs, or takes another path through the program. Look at the first error among "
                "the ranks' outputs; a run with checkpoint= goes on from its last save. A longer "
                "wait is timeout= of torch.distributed.init_process_group. "
                f"(torch.distributed: {error})"
            ) from error


_NO_MEMBER = (
    "group= is a process group that this process is no member of; make the risk only on its "
    "members, or pass group=False to work alone"
)


def group_of(choice: GroupChoice = None) -> Group | None:
    """The group that is meant; ``None`` for one process.

    Args:
        choice: See :data:`GroupChoice`.

    Raises:
        TypeError: If it is no group.
        RuntimeError: If one is required, and none is initialized.

    Example:
        >>> group_of() is None  # nothing is initialized
        True
    """
    if choice is False:
        return None
    ready = dist.is_available() and dist.is_initialized()
    if not ready and (choice is None or choice is True):
        if choice is None:
            return None
        raise RuntimeError(
            f"group={choice!r} needs an initialized process group, and there is none; start the "
            "script with torchrun and call torch.distributed.init_process_group() first, or leave "
            "group= out for one process"
        )
    if ready and choice == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(_NO_MEMBER)
    if choice is None or choice is True:
        process_group = dist.group.WORLD
    elif isinstance(choice, Group):
        return choice
    elif dist.is_available() and isinstance(choice, dist.ProcessGroup):
        process_group = choice
    else:
        raise TypeError(
            "group= is None (the default group, if there is one), True, False (this process "
            f"alone) or a torch.distributed.ProcessGroup, got {type(choice).__name__}"
        )
    assert process_group is not None  # dist.group.WORLD, once initialized
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
    if rank < 0:
        raise ValueError(_NO_MEMBER)
    if size == 1:
        return None
    return Group(process_group, rank, size, _small_device(process_group))


def together(group: Group | None, what: str) -> AbstractContextManager[None]:
    """:meth:`Group.together`, where there is a group."""
    return nullcontext() if group is None else group.together(what)


def devices_of(group: Group) -> set[str]:
    """Kinds of devices whose tensors the group's backend can send."""
    config = str(dist.get_backend_config(group.process_group))
    parts = dict(part.split(":", 1) for part in config.split(",") if ":" in part)
    backend = dist.get_backend(group.process_group)
    if not parts:
        return {"cpu", "cuda"} if backend in ("gloo", "mpi") else {"cuda"}
    return {device for device, name in parts.items() if not (name == "nccl" and device == "cpu")}


def _small_device(process_group: dist.ProcessGroup) -> torch.device:
    found = devices_of(Group(process_group, 0, 0, torch.device("cpu")))
    return torch.device("cpu") if "cpu" in found else torch.device("cuda")
