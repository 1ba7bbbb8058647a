r"""The ways to M-FAC operators: from rows, from a risk, or an empty window for one's own loop.

In a process group of :math:`R` ranks, the rows of a risk are those of one process: each rank
computes the gradients of its own examples. Per rank, with :math:`s` bytes for a number:

==================  ==================================  ============================================
what                bytes sent                          memory
==================  ==================================  ============================================
``mfac(risk)``      :math:`s P m / R`                   :math:`s P m` (the window is on every rank)
                                                        and :math:`s P m / R` while it is made
``block_size=b``    :math:`2 s P b (R - 1) / R`;        :math:`s P \min(b, m)`
                    :math:`s P m / R` for :math:`m < b`
``push(row)``       nothing                             none
==================  ==================================  ============================================

Windows and rows that are given belong to one process: push the same rows on every rank, such as
``risk.gradient()``, which is summed over ranks (:math:`2 s P (R - 1) / R` bytes), or the gradient
that ``DistributedDataParallel`` has averaged. Nothing more is sent then, in products and solves
neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from curvlib.core.ranks.turns import AHEAD
from curvlib.core.risk import Risk
from curvlib.core.space import ParamSpace
from curvlib.operators.mfac_operator import ACCURACY, MFAC
from curvlib.operators.windows.arguments import require_size
from curvlib.operators.windows.parts import Parts, part_sizes
from curvlib.operators.windows.window import Window

if TYPE_CHECKING:
    from curvlib.operators.block_mfac import BlockMFAC
    from curvlib.operators.rows import RowDraw

__all__ = ["MFAC", "mfac", "mfac_window"]

#: Rows that are drawn from a risk unless told otherwise.
ROWS = 256


def mfac_window(
    space: ParamSpace | int,
    size: int,
    *,
    damping: float = 0.01,
    relative: bool = True,
    parts: Parts = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    storage: str | None = None,
    accuracy: float = ACCURACY,
    fused: bool | None = None,
) -> MFAC:
    """An M-FAC operator whose window is empty yet: push gradients in your own loop.

    Args:
        space: The parameters, or the length ``P`` of a row.
        size: ``m``, how many rows the window keeps at most.
        damping: A fraction of the mean diagonal entry of the rows' matrix, or absolute.
        relative: Which of the two.
        parts: ``None`` for one window over all parameters; ``"tensor"`` or ``"layer"`` for one of
            each (``space`` says where they lie); name globs of each parameter group, whose
            parameters are neighbours, as ``[["body.*"], ["head.*"]]``; or the lengths of
            contiguous slices.
        dtype: How rows are stored: float32, float64 or bfloat16; that of the space's vectors (or
            float32) when omitted.
        device: Where vectors live; that of the space (or the CPU) when omitted.
        storage: ``"cpu"`` keeps the rows in host memory: see :class:`Window`.
        accuracy: Relative error above which passes are repeated in float64: see :class:`MFAC`.
        fused: Whether passes are CUDA kernels of curvlib's own; ``None``: where they can be had:
            see :class:`Window`.

    Raises:
        TypeError: If an argument is of the wrong type, or ``dtype`` is float16.
        ValueError: If a number is not positive, parts do not add up, or ``fused`` is asked for
            where no kernel is.
        ImportError: If ``fused`` is asked for and CuPy is missing.
        MemoryError: If the window does not fit; the message says what would.

    Example:
        >>> import torch, curvlib as cl
        >>> F = mfac_window(4, size=2, damping=0.1)
        >>> for step in range(5):
        ...     _ = F.push(torch.ones(4) * (1 + step % 2))
        >>> F.window.count, F.solve_row().shape
        (2, torch.Size([4]))
    """
    known = space if isinstance(space, ParamSpace) else None
    length = space.size if isinstance(space, ParamSpace) else space
    window = Window(
        length,
        size,
        dtype=dtype or (torch.float32 if known is None else known.dtype),
        device=device or ("cpu" if known is None else known.device),
        parts=part_sizes(parts, known),
        storage=storage,
        spread=None if known is None else known.spread,
        fused=fused,
    )
    return MFAC(window, damping=damping, relative=relative, accuracy=accuracy, space=known)


@overload
def mfac(
    rows: Tensor | Iterable[Tensor] | Risk,
    *,
    damping: float = ...,
    relative: bool = ...,
    block_size: None = ...,
    size: int | None = ...,
    dtype: torch.dtype | None = ...,
    parts: Parts = ...,
    space: ParamSpace | None = ...,
    storage: str | None = ...,
    accuracy: float = ...,
    kind: str = ...,
    count: int | None = ...,
    micro_batch: int = ...,
    seed: int = ...,
) -> MFAC: ...


@overload
def mfac(
    rows: Tensor | Iterable[Tensor] | Risk,
    *,
    damping: float | str = ...,
    relative: bool = ...,
    block_size: int,
    space: ParamSpace | None = ...,
    kind: str = ...,
    count: int | None = ...,
    micro_batch: int = ...,
    seed: int = ...,
) -> BlockMFAC: ...


def mfac(
    rows: Tensor | Iterable[Tensor] | Risk,
    *,
    damping: float | str = 0.01,
    relative: bool = True,
    block_size: int | None = None,
    size: int | None = None,
    dtype: torch.dtype | None = None,
    parts: Parts = None,
    space: ParamSpace | None = None,
    storage: str | None = None,
    accuracy: float = ACCURACY,
    kind: str = "empirical",
    count: int | None = None,
    micro_batch: int = 1,
    seed: int = 0,
) -> MFAC | BlockMFAC:
    r"""M-FAC: :math:`\lambda I + \frac1m G^\top G` of gradient rows, with its inverse.

    Args:
        rows: Gradients ``[m, P]``; an iterable of such blocks, as
            :func:`curvlib.gradients` gives; or a risk, whose gradients are then computed.
        damping: :math:`\lambda`: a fraction of the mean diagonal entry of
            :math:`\frac1m G^\top G`, or absolute. ``"auto"`` chooses it on held-out rows, with
            ``block_size``.
        relative: Which of the two.
        block_size: Makes a matrix of blocks of this size inside each parameter tensor, from all
            rows, which are streamed: see
            :class:`~curvlib.operators.block_mfac.BlockMFAC`. It needs a space.
        size: Rows that the window keeps, the last ones; all when omitted. An iterable is streamed
            into the window if this is given, else all its rows are collected first.
        dtype: How rows are stored; as they come (float16: as float32) when omitted.
        parts: Windows by ``"tensor"``, ``"layer"``, groups of name globs or lengths of slices;
            one for all when omitted: see :func:`mfac_window`.
        space: The parameters that index the columns; that of the risk when omitted.
        storage: ``"cpu"`` keeps the rows in host memory: see :class:`Window`.
        accuracy: Relative error above which passes are repeated in float64: see :class:`MFAC`.
        kind: ``"empirical"`` or ``"mc"`` (sampled targets), for a risk.
        count: Rows that are computed, for a risk; ``size``, or 256 (or as many as the data has
            examples for), when omitted.
        micro_batch: Examples of each row, for a risk.
        seed: Of the subset of examples and the sampled targets, for a risk.

    Returns:
        An :class:`MFAC`, or with ``block_size`` a :class:`BlockMFAC`.

    Raises:
        TypeError: If ``rows`` is none of these, or an argument is of the wrong type.
        ValueError: If there are no rows, or shapes or numbers do not fit.
        FloatingPointError: If a row is not finite.
        MemoryError: If the window does not fit; the message says what would.

    Example:
        >>> import torch, curvlib as cl
        >>> rows = torch.randn(8, 100, dtype=torch.float64)
        >>> F = mfac(rows, damping=0.1)
        >>> x = torch.ones(100, dtype=torch.float64)
        >>> bool(torch.allclose(F @ F.solve(x), x))
        True
    """
    others = {"size": size, "dtype": dtype, "parts": parts, "storage": storage}
    if isinstance(rows, Risk):
        from curvlib.operators.rows import RowDraw, example_count

        space = rows.space if space is None else space
        if count is None:
            count = size
        if count is None:
            count = ROWS
            if kind == "empirical":
                count = max(1, min(ROWS, example_count(rows) // max(1, micro_batch)))
        drawn = RowDraw.of(rows, count, kind=kind, micro_batch=micro_batch, seed=seed)
        if block_size is not None:
            return _blocked(drawn, block_size, damping, relative, space, others)
        # a window holds all rows anyway: one in the device's memory has room for a rank's share
        blocks: Iterable[Tensor] = drawn.everywhere(math.inf if storage is None else AHEAD)
        known = count if size is None else min(require_size("size", size), count)
    elif isinstance(rows, Tensor):
        if rows.ndim != 2:
            raise ValueError(f"expected rows [m, P], got shape {list(rows.shape)}")
        blocks, known = [rows], len(rows) if size is None else require_size("size", size)
    else:
        _require_iterable(rows)
        blocks, known = rows, 0 if size is None else require_size("size", size)
    if not isinstance(rows, Risk):
        _require_plain(count, kind, micro_batch)
    if block_size is not None:
        return _blocked(blocks, block_size, damping, relative, space, others)
    if isinstance(damping, str):
        raise ValueError(  # noqa: TRY004 (a word is a right type elsewhere)
            f"damping={damping!r} belongs to blocks, which choose it on held-out rows: pass "
            "block_size= too, or a number"
        )
    if not known:
        blocks = list(blocks)
        known = sum(_row_count(block) for block in blocks)
    return _filled(blocks, known, damping, relative, dtype, parts, space, storage, accuracy)


def _filled(
    blocks: Iterable[Tensor],
    size: int,
    damping: float,
    relative: bool,
    dtype: torch.dtype | None,
    parts: Parts,
    space: ParamSpace | None,
    storage: str | None,
    accuracy: float,
) -> MFAC:
    found: MFAC | None = None
    for block in blocks:
        if not _row_count(block):
            continue
        if found is None:
            found = mfac_window(
                block.shape[-1] if space is None else space,
                size,
                damping=damping,
                relative=relative,
                parts=parts,
                dtype=dtype or (torch.float32 if block.dtype == torch.float16 else block.dtype),
                device=block.device,
                storage=storage,
                accuracy=accuracy,
            )
        found.push(block)
    if found is None:
        raise ValueError("there are no rows: M-FAC needs at least one gradient")
    return found


def _blocked(
    blocks: Iterable[Tensor] | RowDraw,
    block_size: int,
    damping: float | str,
    relative: bool,
    space: ParamSpace | None,
    others: dict[str, Any],
) -> BlockMFAC:
    from curvlib.core.partition import Partition
    from curvlib.operators.block_mfac import BlockMFAC

    given = [f"{name}=" for name, value in others.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} belong to a window, but block_size= makes blocks of all rows, "
            "which are streamed; leave out one or the other"
        )
    if space is None:
        raise ValueError(
            "block_size= makes blocks inside each parameter tensor, so it needs space=, which "
            "says where they lie: risk.space, or ParamSpace.of(model)"
        )
    if space.spread is not None:
        raise ValueError(
            "block_size= needs whole rows, and those of this space are spread over "
            f"{space.spread.group.size} processes (a sharding that curvlib cannot follow); use a "
            "window: leave block_size= out"
        )
    partition = Partition.of(space, block_size)
    return BlockMFAC(blocks, partition, damping=damping, relative=relative)


def _require_plain(count: int | None, kind: str, micro_batch: int) -> None:
    others = {"count=": count is not None, "kind=": kind != "empirical"}
    others["micro_batch="] = micro_batch != 1
    given = [name for name, is_given in others.items() if is_given]
    if given:
        raise ValueError(
            f"{', '.join(given)} belong to a risk, whose gradients are computed, but rows were "
            "given; leave them out, or pass the risk"
        )


def _require_iterable(rows: Any) -> None:
    if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes, dict)):
        raise TypeError(
            "expected rows [m, P], an iterable of such blocks or a curvlib.Risk, got "
            f"{type(rows).__name__}"
        )


def _row_count(block: Any) -> int:
    if not isinstance(block, Tensor):
        raise TypeError(
            f"expected blocks of rows as tensors [n, P], got {type(block).__name__}; "
            "torch.from_numpy(rows) converts NumPy arrays"
        )
    if block.ndim not in (1, 2):
        raise ValueError(f"expected blocks of rows [n, P], got shape {list(block.shape)}")
    return len(block) if block.ndim == 2 else 1
