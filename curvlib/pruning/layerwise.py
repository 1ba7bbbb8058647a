r"""Layer-wise pruning: each layer keeps its own outputs, whatever the loss is.

A layer with weight matrix :math:`W` (``[out, n]``) and input rows :math:`x_t` changes its outputs,
when :math:`W` becomes :math:`\hat W = W + \Delta`, by

.. math:: L(\Delta) = \frac1T \sum_t |\Delta x_t|^2 = \mathrm{tr}(\Delta A \Delta^\top),
          \qquad A = \frac1T X^\top X,

a sum over rows :math:`\delta` of :math:`\Delta` of :math:`\delta^\top A \delta =
\frac12 \delta^\top (2A)\, \delta`: every row has the Hessian :math:`2A`. (Papers leave the sum over
:math:`t` as it is: their ``H = 2 X X^T``, inputs being columns, is :math:`2 T A`.) Here:

:func:`layerwise_curvature`
    :math:`2A` for every row of every layer, as a block-diagonal operator: with it the functions of
    optimal brain surgeon are OBC, or ExactOBS (Frantar, Alistarh, "Optimal brain compression",
    2022).
:func:`sparsegpt`
    Columns from left to right, later columns making up for what earlier ones lose; one
    factorization serves all rows (Frantar, Alistarh, "SparseGPT", 2023, algorithm 1).
:func:`wanda_scores`
    Weights times norms of inputs, nothing made up for (Sun, Liu, Bair, Kolter, "A simple and
    effective pruning approach for large language models", 2023).
:func:`reconstruct`
    The best weights for a given mask: the least squares problem of each row.

Grouped convolutions have a Gram matrix for each group; weights are then ``[G, out / G, n]`` and
Gram matrices ``[G, n, n]``: :meth:`InputGram.matrix` and :attr:`InputGram.stacked` give them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.arguments import finite_number
from curvlib.core.block_diagonal import BlockDiagonal
from curvlib.core.partition import Partition
from curvlib.core.result import Result
from curvlib.core.space import ParamSpace
from curvlib.operators.input_grams import InputGram
from curvlib.pruning.patterns import Pattern, parse_pattern
from curvlib.pruning.updates import joint_update


@dataclass(frozen=True, eq=False, repr=False)
class PrunedLayer(Result):
    r"""A pruned weight matrix.

    Attributes:
        weight: :math:`\hat W`, zero where it is pruned, of the shape and type that was given.
        keep: Which weights are kept, bool.
        loss: :math:`L`, the mean over input rows of the squared change of the layer's outputs,
            without damping.
    """

    weight: Tensor
    keep: Tensor
    loss: float


def layerwise_curvature(
    grams: Mapping[str, InputGram],
    space: ParamSpace,
    *,
    damping: float = 0.0,
    relative: bool = True,
) -> BlockDiagonal:
    """The Hessian ``2 A`` of the layer-wise problem, for every row of every layer.

    Args:
        grams: Input Gram matrices by the name of the weight.
        space: The parameters. Those without a Gram matrix are in no block.
        damping: Is added to the diagonal of each layer. Layers differ in the scale of their
            inputs, so that no single number is right for all of them later.
        relative: Whether ``damping`` is a fraction of the mean diagonal of the layer's blocks.

    Returns:
        An operator ``[P, P]``. One block is one row of a weight matrix; the blocks of a layer (of
        a group) share one matrix, which is stored once.

    Raises:
        ValueError: If there is no Gram matrix, or one that belongs to no parameter of that shape.

    Example:
        >>> import torch, curvlib as cl
        >>> from curvlib.operators.input_grams import input_grams
        >>> model = torch.nn.Linear(2, 3, bias=False)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (x, torch.zeros(2, 3)))
        >>> F = layerwise_curvature(input_grams(risk), risk.space)
        >>> F.dense(0).tolist()[2], F.partition.stacks[0].tolist()
        ([[10.0, 2.0], [2.0, 4.0]], [[0, 1], [2, 3], [4, 5]])
    """
    if not grams:
        raise ValueError("expected at least one input Gram matrix, got none; see input_grams")
    stacks: list[Tensor] = []
    matrices: list[Tensor] = []
    for name, found in grams.items():
        if name not in space.names:
            raise ValueError(
                f"the Gram matrix of {name!r} belongs to no parameter; there are "
                f"{list(space.names)}; take both from one risk"
            )
        place = space.slice(name)
        shape = space.shapes[space.names.index(name)]
        index = torch.arange(place.start, place.stop, device=space.device)
        rows = found.matrix(index.view(shape))
        both = (2.0 * found.stacked).to(space.device)
        both = _damped(both, damping, relative).to(space.dtype)
        if rows.shape[1] == 1:  # depthwise: one row for each matrix
            stacks.append(rows[:, 0])
            matrices.append(both)
            continue
        for indices, one in zip(rows, both, strict=True):
            stacks.append(indices.contiguous())
            matrices.append(one.expand(len(indices), *one.shape))
    return BlockDiagonal(
        Partition(tuple(stacks), space.size, space), matrices, name="layer-wise curvature"
    )


def wanda_scores(weight: Tensor, gram: Tensor) -> Tensor:
    r""":math:`|W_{ij}| \sqrt{A_{jj}}`, which the authors compare within each row (output).

    Args:
        weight: ``[out, n]`` or ``[G, out, n]``.
        gram: :math:`A`, ``[n, n]`` or ``[G, n, n]``. The authors' norms of columns are
            :math:`\sqrt{T}` times as large, which changes no comparison within a layer.

    Returns:
        Scores of the weight's shape. Their squares are what pruning one weight alone, and nothing
        else, adds to the loss of the layer.

    Raises:
        TypeError: If a tensor is not real floating-point.
        ValueError: If shapes do not fit.

    Example:
        >>> import torch
        >>> wanda_scores(torch.tensor([[1.0, -2.0]]), torch.diag(torch.tensor([9.0, 1.0]))).tolist()
        [[3.0, 2.0]]
    """
    W, A = _layer(weight, gram)
    norms = A.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
    return (W.abs() * norms.unsqueeze(-2)).reshape(weight.shape).to(weight.dtype)


def reconstruct(
    weight: Tensor,
    gram: Tensor,
    keep: Tensor,
    *,
    damping: float = 0.01,
    relative: bool = True,
) -> PrunedLayer:
    r"""The weights that keep the layer's outputs best, for a given mask.

    Minimizes :math:`L(\Delta) + \lambda |\Delta|^2`, so that damping keeps weights near where they
    were (not near zero): a row's kept weights :math:`S` get
    :math:`\delta_S = (A_{SS} + \lambda I)^{-1} A_{SQ} w_Q` for the pruned ones :math:`Q`.

    Args:
        weight: ``[out, n]`` or ``[G, out, n]``.
        gram: :math:`A`, ``[n, n]`` or ``[G, n, n]``.
        keep: Which weights are kept, bool, of the weight's shape.
        damping: :math:`\lambda`.
        relative: Whether it is a fraction of the mean diagonal of :math:`A` (of each group).

    Raises:
        TypeError: If a tensor has the wrong type.
        ValueError: If shapes do not fit, numbers are not finite, or ``damping`` is negative.
        RuntimeError: If a row's system is not positive definite.

    Example:
        >>> import torch
        >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> keep = torch.tensor([[True, False]])
        >>> found = reconstruct(torch.ones(1, 2), gram, keep, damping=0.0)
        >>> found.weight.tolist(), found.loss
        ([[1.5, 0.0]], 1.5)
    """
    W, A = _layer(weight, gram)
    kept = _mask(keep, weight).reshape(W.shape)
    H = _damped(A, damping, relative)
    new = torch.stack(
        [
            joint_update(w, h.expand(len(w), *h.shape), torch.ones_like(k), k)
            for w, h, k in zip(W, H, kept, strict=True)
        ]
    )
    return _pruned(weight, W, new, A, kept)


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    sparsity: float | None = None,
    *,
    pattern: Pattern | None = None,
    keep: Tensor | None = None,
    block: int = 128,
    damping: float = 0.01,
    relative: bool = True,
) -> PrunedLayer:
    r"""Prunes a weight matrix column by column, later columns making up for earlier ones.

    With :math:`(A + \lambda I)^{-1} = U^\top U`, :math:`U` upper triangular, row :math:`j` of
    :math:`U` is what optimal brain surgeon needs when columns up to :math:`j` are frozen: all rows
    of :math:`W` share it, because the order of columns is fixed. Within each block of columns
    the weights of least :math:`w_j^2 / U_{jj}^2` are pruned (those of inputs that are always zero
    first: they cost nothing); updates of the columns behind a block are made at its end, as one
    product of matrices.

    Args:
        weight: ``[out, n]`` or ``[G, out, n]``. Columns are pruned in the order given.
        gram: :math:`A`, ``[n, n]`` or ``[G, n, n]``.
        sparsity: Fraction that is pruned, in ``[0, 1)``: the same in each block of columns, the
            count rounded over all columns so far.
        pattern: Or ``"N:M"``: N are *kept* of every M consecutive columns in each row.
        keep: Weights that live now, bool, of the weight's shape: the others stay pruned, and count
            among what is pruned. Default: all.
        block: Columns of a block.
        damping: :math:`\lambda`.
        relative: Whether it is a fraction of the mean diagonal of :math:`A` (of each group).

    Raises:
        TypeError: If a tensor has the wrong type.
        ValueError: If shapes do not fit, not one of ``sparsity`` and ``pattern`` is given, or they,
            ``block`` or ``damping`` are out of range.
        RuntimeError: If the damped Gram matrix is singular.

    Example:
        >>> import torch
        >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> sparsegpt(torch.tensor([[1.0, 4.0]]), gram, 0.5, damping=0.0).weight.tolist()
        [[0.0, 4.5]]
    """
    W, A = _layer(weight, gram)
    groups, rows, n = W.shape
    if (sparsity is None) == (pattern is None):
        raise ValueError("pass a sparsity, or pattern='N:M', and not both")
    if block < 1:
        raise ValueError(f"block= needs at least one column, got {block}")
    if sparsity is not None:
        sparsity = finite_number("sparsity", sparsity)
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity is a fraction in [0, 1) that is pruned, got {sparsity:g}")
    few, many = (0, 1) if pattern is None else _columns_fit(pattern, n, block)
    U = _inverse_factor(_damped(A, damping, relative), damping)
    new = W.clone()
    kept = torch.ones_like(W, dtype=torch.bool)
    if keep is not None:
        kept = _mask(keep, weight).reshape(W.shape).clone()
    dead = A.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) == 0.0
    for start in range(0, n, block):
        stop = min(start + block, n)
        part, alive = new[..., start:stop], kept[..., start:stop]
        upper = U[:, start:stop, start:stop]
        pivots = upper.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        weights = (1.0 / pivots).masked_fill(dead[..., start:stop], 0.0)  # of the scores
        if sparsity is not None:
            until, before = (math.floor(sparsity * groups * rows * c + 0.5) for c in (stop, start))
            _drop_least(part * weights, alive, until - before)
        errors = torch.empty_like(part)
        for j in range(stop - start):
            if pattern is not None and j % many == 0:
                group = slice(j, j + many)
                _drop_least_of_rows(part[..., group] * weights[..., group], alive[..., group], few)
            dropped = torch.where(alive[..., j], 0.0, part[..., j])
            errors[..., j] = dropped / pivots[..., j]
            part[..., j:] -= errors[..., j, None] * upper[:, None, j, j:]
        new[..., stop:] -= errors @ U[:, start:stop, stop:]
    return _pruned(weight, W, new, A, kept)


# --------------------------------------------------------------------------- parts
def _drop_least(scores: Tensor, alive: Tensor, count: int) -> None:
    """Leaves all but ``count`` entries alive: those that are not go first, then least scores."""
    order = scores.abs().masked_fill(~alive, -1.0).reshape(-1).argsort(stable=True)
    chosen = torch.ones_like(order, dtype=torch.bool)
    chosen[order[:count]] = False
    alive &= chosen.view(scores.shape)


def _drop_least_of_rows(scores: Tensor, alive: Tensor, few: int) -> None:
    """Leaves at most ``few`` entries of the last axis alive."""
    order = scores.abs().masked_fill(~alive, -1.0).argsort(dim=-1, stable=True)
    alive.scatter_(-1, order[..., : scores.shape[-1] - few], False)


def _inverse_factor(H: Tensor, damping: float) -> Tensor:
    """Upper triangular ``U`` with ``U.T @ U`` the inverse of ``H``, without inverting ``H``.

    The Cholesky factor of ``H`` from its last row upwards is upper triangular, and U its inverse.
    """
    factor, info = torch.linalg.cholesky_ex(H.flip(-1, -2))
    _require_factor(info, damping)
    upper = factor.flip(-1, -2)
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device).expand_as(H)
    out: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return out


def _pruned(weight: Tensor, before: Tensor, after: Tensor, A: Tensor, keep: Tensor) -> PrunedLayer:
    after = torch.where(keep, after, 0.0)
    new = after.to(weight.dtype)
    change = new.to(before.dtype) - before
    loss = float((change @ A * change).sum())
    return PrunedLayer(new.reshape(weight.shape), keep.reshape(weight.shape), max(loss, 0.0))


def _damped(A: Tensor, damping: float, relative: bool) -> Tensor:
    """``A [G, n, n]`` plus damping, each group's own where it is relative."""
    value = finite_number("damping", damping)
    if value < 0.0:
        raise ValueError(f"damping= is not negative, got {value:g}")
    mean = A.diagonal(dim1=-2, dim2=-1).mean(-1) if relative else A.new_ones(len(A))
    out = A.clone()
    out.diagonal(dim1=-2, dim2=-1).add_(value * mean[:, None])
    return out


def _layer(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Weight ``[G, out, n]`` and Gram matrices ``[G, n, n]``, in float64 on one device."""
    for name, tensor in (("weight", weight), ("gram", gram)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} has a real floating-point type, got {tensor.dtype}")
    n = weight.shape[-1] if weight.ndim else 0
    if weight.ndim not in (2, 3) or gram.shape != (*weight.shape[:-2], n, n):
        raise ValueError(
            "expected weight [out, n] with gram [n, n], or [G, out, n] with [G, n, n], got "
            f"{list(weight.shape)} and {list(gram.shape)}; InputGram.matrix and InputGram.stacked "
            "give both"
        )
    W = weight.detach().to(torch.float64)
    A = gram.detach().to(device=W.device, dtype=torch.float64)
    return (W[None], A[None]) if W.ndim == 2 else (W, A)


def _mask(keep: Tensor, weight: Tensor) -> Tensor:
    kind = getattr(keep, "dtype", type(keep).__name__)
    if kind != torch.bool:
        raise TypeError(f"keep= is a bool tensor, True where a weight is kept, got {kind}")
    if keep.shape != weight.shape:
        raise ValueError(
            f"expected keep= of the weight's shape {list(weight.shape)}, got {list(keep.shape)}"
        )
    return keep.to(weight.device)


def _columns_fit(pattern: Pattern, n: int, block: int) -> tuple[int, int]:
    few, many = parse_pattern(pattern)
    if n % many or block % many:
        raise ValueError(
            f"pattern={few}:{many} needs a number of columns and a block= that {many} divides, got "
            f"{n} columns and block={block}; leave this layer out, or pass another block="
        )
    return few, many


def _require_factor(info: Tensor, damping: float) -> None:
    if bool((info > 0).any()):
        raise RuntimeError(
            f"the Gram matrix with damping={damping:g} is not positive definite: some inputs are "
            "always zero, or follow from others; pass a larger damping="
        )
