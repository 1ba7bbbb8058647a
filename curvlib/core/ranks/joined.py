r"""What ranks exchange at the end of a pass: a header each, and the sum of their shards, once.

The header has twenty numbers: whether the rank failed, the weight, batches and examples of its
shard, the shape and type of its sum, whether that is finite, and digests of what must be alike on
all ranks: program and problem (:func:`problem_digest`), parameters, and the vectors that are
multiplied. So a rank without data learns what zeros to add, a failure is everybody's, and vectors
or parameters that differ are told instead of mixed up.

Where parameters are sharded, sums in their space are complete when a pass ends, each rank with its
own rows of them: then only the header is sent.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.core.ranks.group import Group, devices_of

if TYPE_CHECKING:
    from curvlib.core.risk import Risk

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
_AXES = 4
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Shard:
    """What one rank has to say of its part of a pass.

    Attributes:
        total: The sum over its batches; ``None`` where it has no batch.
        weight: Weight of its loss terms.
        batches: How many batches there were.
        examples: How many examples.
        failure: What went wrong.
        finite: Whether the sum is known to be so; only looked at for rows.
    """

    total: Tensor | None
    weight: float
    batches: int
    examples: int
    failure: Exception | None = None
    finite: bool = True


def joined(
    group: Group, risk: Risk, own: Shard, given: Tensor | None = None, *, rows: bool = False
) -> Shard:
    """The sum of the ranks' shards, the same on every rank.

    Args:
        group: The ranks.
        risk: Their risk.
        own: This rank's shard.
        given: What the pass multiplies: it must be the same on every rank.
        rows: Whether each rank's sum is its own rows of the whole sum.

    Raises:
        RuntimeError: If a rank failed, or ranks differ in program, parameters or vectors.
        Exception: This rank's own failure.
    """
    if own.total is not None and own.total.requires_grad:
        graph = ValueError(
            "a sum that carries a graph is not added up over processes; compute the penalty of "
            "each shard with Risk(..., group=False), and average gradients as for any loss"
        )
        own = Shard(None, 0.0, 0, 0, graph)
    added = None if rows else own.total
    shape = [] if added is None else list(added.shape)
    kind = -1 if added is None else _DTYPES.index(added.dtype)
    finite = not rows or own.total is None or bool(torch.isfinite(own.total).all())
    header = [
        float(own.failure is not None),
        own.weight,
        own.batches,
        own.examples,
        kind,
        len(shape),
        *(shape + [0] * (_AXES - len(shape))),
        float(risk.device.type == "cpu"),
        *halves(risk.signature()),
        *halves(_parameters(risk)),
        *halves(0 if given is None or rows else bits(given)),
        *halves(risk.stream.first_content),
        float(finite),
    ]
    every = group.numbers(header)
    if any(row[0] for row in every):
        group.raise_failure(own.failure, "a pass over its data")
    _require_alike(group, every)
    _notice_copies(group, risk, every)
    total = own.total
    if not rows:
        total = _zeros(every, risk.device) if total is None else total
        total = None if total is None else group.add(total)
    columns = zip(*every, strict=True)
    _, weights, batches, examples, *_ = (sum(column) for column in columns)
    finite = all(row[19] for row in every)
    return Shard(total, float(weights), int(batches), int(examples), finite=finite)


def gathered(risk: Risk, rows: Callable[[], Tensor], given: Tensor | None = None) -> Tensor:
    """Rows of all ranks, in the order of ranks: those of the data in its order.

    A rank sends its own rows once and receives those of the others.

    Args:
        risk: The risk.
        rows: Returns this rank's, ``[n, ...]`` with ``n`` of its own; it does not communicate.
        given: What the pass multiplies: it must be the same on every rank.

    Raises:
        RuntimeError: If a rank failed, or ranks differ in program, parameters or vectors.
        Exception: This rank's own failure.
    """
    if risk.group is None:
        return rows()
    own, failure = None, None
    try:
        own = rows()
    except Exception as error:  # noqa: BLE001 (told to the other ranks, then raised again)
        failure = error
    batches, examples = risk.seen
    joined(risk.group, risk, Shard(None, 0.0, batches, examples, failure), given)
    assert own is not None
    return torch.cat(risk.group.rows(own.contiguous()))


def _require_alike(group: Group, every: list[list[float]]) -> None:
    names = {
        10: ("kind of device", "put every rank's model on the same kind of device"),
        11: (
            "program or problem (versions, loss, reduction, selected parameters, forward=, mode)",
            "run the same script with the same arguments on every rank",
        ),
        13: (
            "parameters or buffers",
            "load one state_dict on every rank, or wrap the model in DistributedDataParallel",
        ),
        15: (
            "vectors that are multiplied",
            "draw them from a generator with the same seed on every rank, or broadcast them",
        ),
    }
    for start, (what, remedy) in names.items():
        for rank, row in enumerate(every):
            width = 1 if start == 10 else 2
            if row[start : start + width] != every[0][start : start + width]:
                raise RuntimeError(
                    f"ranks differ in their {what}: rank {rank} is not like rank 0 (of "
                    f"{group.size}); {remedy}, or pass group=False to work alone"
                )
    shapes = {tuple(row[4:10]) for row in every if row[4] >= 0}
    if len(shapes) > 1:
        told = ", ".join(str([int(n) for n in s[2 : 2 + int(s[1])]]) for s in sorted(shapes))
        raise RuntimeError(
            f"ranks compute sums of different shapes or types ({told}); every rank has to call the "
            "same functions with the same arguments, in the same order"
        )


def _notice_copies(group: Group, risk: Risk, every: list[list[float]]) -> None:
    """Warns once if all shards begin with the same batch: then each holds all data, perhaps."""
    if risk.noticed_copies:
        return
    risk.noticed_copies = True
    first = {(*row[2:4], *row[17:19]) for row in every}
    if len(first) == 1 and every[0][2] and group.first:
        sums = ", and this risk is a sum: it is that many times too large"
        warnings.warn(
            f"curvlib: all {group.size} ranks have shards of equal length that begin with the same "
            "batch, so each example seems to be counted as many times"
            f"{sums if risk.loss.reduction == 'sum' else ', for nothing'}; pass "
            "Risk(..., curvlib.shard(data)), or a loader with a DistributedSampler",
            UserWarning,
            stacklevel=2,
        )


def _zeros(every: list[list[float]], device: torch.device) -> Tensor | None:
    for row in every:
        if row[4] >= 0:
            shape = [int(n) for n in row[6 : 6 + int(row[5])]]
            kind = _DTYPES[int(row[4])]
            if len(shape) == 2:  # blocks of columns are column-contiguous
                return torch.zeros(shape[::-1], dtype=kind, device=device).mT
            return torch.zeros(shape, dtype=kind, device=device)
    return None


def halves(number: int) -> tuple[float, float]:
    """64 bits as two numbers that float64 holds exactly."""
    number &= (1 << 64) - 1
    return float(number >> 32), float(number & 0xFFFFFFFF)


def bits(tensor: Tensor) -> int:
    """The sum of a tensor's bits as integers: a quick way to notice that two differ."""
    flat = tensor.detach()
    if not flat.is_contiguous():
        flat = flat.mT if flat.ndim > 1 and flat.mT.is_contiguous() else flat.contiguous()
    return int(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64))


def _parameters(risk: Risk) -> int:
    """Bits of parameters, and of the buffers that a forward pass reads in evaluation mode."""
    held: list[Tensor] = [p for p in risk.model.parameters() if id(p) not in risk.places]
    for module in risk.model.modules():
        if not module.training:
            held += [b for b in module._buffers.values() if b is not None]
    versions = tuple((id(t), t._version) for t in held)
    if risk.known_bits is None or risk.known_bits[0] != versions:
        risk.known_bits = (versions, sum((i + 1) * bits(t) for i, t in enumerate(held)))
    return risk.known_bits[1]


def problem_digest(parts: Iterable[Any], functions: Sequence[Any]) -> int:
    """64 bits of what must be alike on all ranks: words, and the code of functions."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(f"{part}|".encode())
    for function in functions:
        code = getattr(function, "__code__", None)
        sha.update(b"-" if function is None else type(function).__name__.encode())
        sha.update(b"" if code is None else code.co_code)
    return int.from_bytes(sha.digest()[:8], "big")


def require_device(group: Group, device: torch.device) -> None:
    """Raises ValueError if the group's backend cannot sum tensors that live on a device."""
    able = devices_of(group)
    if device.type not in able:
        raise ValueError(
            f"the process group's backend sums tensors on {', '.join(sorted(able))}, and the "
            f"risk's are on {device.type}; move the model there, or use "
            "torch.distributed.init_process_group('cpu:gloo,cuda:nccl')"
        )
