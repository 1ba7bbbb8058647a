r"""The two sums over data that a Kronecker-factored operator is fitted by, one batch at a time.

Factors (first pass), for the directions ``k`` of :mod:`curvlib.operators.factors.targets` and with
the total weight ``W`` of the loss terms:

expand
    :math:`L = \frac1W \sum_{n,k,t} g_{nkt} g_{nkt}^\top`,
    :math:`R = \frac1M \sum_{n,t} a_{nt} a_{nt}^\top` over all ``M`` rows, as if rows were
    independent examples;
reduce
    the same of :math:`\bar g_{nk} = \sum_t g_{nkt}` and :math:`\bar a_n = \frac1T \sum_t a_{nt}`,
    one for each example

(Eschenhagen, Immer, Turner, Schneider and Hennig, "Kronecker-factored approximate curvature for
modern neural network architectures", 2023). Both are exact for a single row. Embeddings have the
diagonal left factor of their indices' frequencies, and always expand.

Corrected eigenvalues (second pass): :math:`\Lambda = \frac1W \sum_{n,k} (Q_L^\top G_{nk}
Q_R)^{\circ 2}` with the exact gradients of examples, whatever the setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.operators.factors import squares as kfac_squares
from curvlib.operators.layers import rows as layer_rows
from curvlib.operators.layers.factored import FactoredLayer
from curvlib.operators.layers.use import Use, Uses

#: Bytes of rows that are held at once.
CHUNK = 64 * 2**20
#: The same of rows and gradients of examples, which are read again while they are in the cache.
MATRICES = 16 * 2**20
#: Bytes of gradients of several directions that ranks in step keep at once.
HELD = 256 * 2**20
#: Columns of a second moment that are added up at once: only those at and after them are.
TILE = 64

Basis = tuple[Tensor | None, Tensor | None]
Gradients = Sequence[Tensor | None]


@dataclass(frozen=True, eq=False)
class Sums:
    """What one pass adds up.

    Attributes:
        tensors: Sums by ``"layer|role|side"``, or by ``"layer"`` for eigenvalues.
        counts: Rows by ``"layer|role"``.
    """

    tensors: dict[str, Tensor]
    counts: dict[str, float]


def factor_sums(layers: Sequence[FactoredLayer], like: Tensor) -> Sums:
    """Zeros for the first pass, of the type and device of a tensor."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    for layer in layers:
        G, out, width = layer.shape
        for role in layer.roles:
            key = f"{layer.name}|{role}"
            counts[key] = 0.0
            if role != "scale":
                shape = (G, out, out) if layer.left_dense else (G, out)
                sums[f"{key}|left"] = like.new_zeros(shape)
            shape = (G, width, width) if layer.right_dense else (G, width)
            sums[f"{key}|right"] = like.new_zeros(shape)
    return Sums(sums, counts)


def add_inputs(layer: FactoredLayer, found: Uses, sums: Sums, *, reduce: bool) -> None:
    """Adds the moments of a pass's inputs; those of embeddings come with their gradients."""
    n, like = found.examples, next(iter(sums.tensors.values()))
    uses = [use for use in found.of(layer.name) if use.role == "matrix"]
    if not uses:
        return
    key = f"{layer.name}|matrix"
    for at in _chunks(layer, uses, n, like):
        rows = layer_rows.input_matrix(layer, uses, n, at, like.dtype, ones=False)
        keep = layer_rows.kept_rows(uses, n, at)
        rows, count = _reduced(rows, keep) if reduce else _kept(rows, keep)
        _add_input_moment(sums.tensors[f"{key}|right"], rows, count)
        sums.counts[key] += count


def add_gradients(
    layer: FactoredLayer,
    found: Uses,
    gradients: Gradients,
    sums: Sums,
    *,
    reduce: bool,
    first: bool,
) -> None:
    """Adds the moments of the gradients of one direction; ``first`` counts embeddings' indices."""
    n, like = found.examples, next(iter(sums.tensors.values()))
    for role in layer.roles:
        uses, own = _of_role(layer, role, found, gradients)
        if not uses:
            continue
        key = f"{layer.name}|{role}"
        for at in _chunks(layer, uses, n, like):
            if role == "matrix":
                rows = layer_rows.output_matrix(layer, uses, own, n, at, like.dtype)
                rows, _ = _kept(rows, layer_rows.kept_rows(uses, n, at))
                _add_moment(sums.tensors[f"{key}|left"], rows.sum(2, True) if reduce else rows)
            elif role == "scale":
                rows = layer_rows.scale_rows(layer, uses, own, n, at, like.dtype)
                _add_moment(sums.tensors[f"{key}|right"], rows[None, :, None])
                sums.counts[key] += len(rows)
            else:
                for use, gradient in zip(uses, own, strict=True):
                    index, rows, valid = layer_rows.embedding_rows(use, gradient, n, at, like.dtype)
                    keep = layer_rows.kept_rows([use], n, at)
                    valid = valid if keep is None else valid & keep
                    _add_moment(sums.tensors[f"{key}|right"], (rows * valid[..., None])[None])
                    if first:
                        ones = valid.reshape(-1).to(like.dtype)
                        sums.tensors[f"{key}|left"][0].index_add_(0, index.reshape(-1), ones)
                        sums.counts[key] += float(ones.sum())


class EigenvalueSums:
    """Adds up corrected eigenvalues; rows of inputs are kept for all directions of a pass.

    Args:
        layers: The layers.
        bases: Eigenvectors of each, by name.
        directions: How many directions share the inputs, about.
    """

    def __init__(
        self, layers: Sequence[FactoredLayer], bases: dict[str, Basis], directions: int = 1
    ) -> None:
        self.layers = list(layers)
        self.bases = bases
        self.directions = directions
        self._inputs: dict[tuple[str, int], Tensor] = {}
        self._held = 0

    def forget(self) -> None:
        """Forgets the inputs of the last pass."""
        self._inputs, self._held = {}, 0

    def add(self, layer: FactoredLayer, found: Uses, gradients: Gradients, out: Tensor) -> None:
        """Adds the squares of one direction of a pass to ``out``, ``[G, O, I]``."""
        n = found.examples
        own = _of_role(layer, "matrix", found, gradients)
        if layer.roles == ("scale",):
            uses, own_gradients = _of_role(layer, "scale", found, gradients)
            if uses:
                rows = layer_rows.scale_rows(layer, uses, own_gradients, n, slice(0, n), out.dtype)
                right = self.bases[layer.name][1]
                rows = rows if right is None else rows @ right[0]
                out[0, 0] += rows.square().sum(0)
        elif layer.roles == ("embedding",):
            self._add_embedding(layer, found, gradients, out)
        elif "embedding" in layer.roles:
            self._add_tied(layer, found, gradients, out)
        elif own[0]:
            way = self._route(layer, own[0], n)
            for at in _chunks(layer, own[0], n, out, matrices=way != "pairs"):
                left = layer_rows.output_matrix(layer, *own, n, at, out.dtype)
                right = self._right(layer, own[0], n, at, way, out.dtype)
                out += kfac_squares.squares(left, right, self.bases[layer.name], way)

    def _route(self, layer: FactoredLayer, uses: Sequence[Use], n: int) -> str:
        T = sum(use.rows(n) or 0 for use in uses)
        dense = (layer.left_dense, layer.right_dense)
        return kfac_squares.route(T, layer.shape, dense, self.directions)

    def _right(
        self,
        layer: FactoredLayer,
        uses: Sequence[Use],
        n: int,
        at: slice,
        way: str,
        dtype: torch.dtype,
    ) -> Tensor:
        key = (layer.name, at.start)
        if key in self._inputs:
            return self._inputs[key]
        basis = None if way == "form" else self.bases[layer.name][1]
        rows = layer_rows.input_matrix(layer, uses, n, at, dtype, ones=basis is None)
        rows = kfac_squares.rotated(rows, basis)
        size = rows.numel() * rows.element_size()
        if self.directions > 1 and self._held + size <= 8 * CHUNK:
            self._inputs[key] = rows
            self._held += size
        return rows

    def _add_embedding(
        self, layer: FactoredLayer, found: Uses, gradients: Gradients, out: Tensor
    ) -> None:
        uses, own = _of_role(layer, "embedding", found, gradients)
        if uses:
            index, rows = self._embedded(layer, uses, own, found.examples, slice(None), out)
            kfac_squares.embedding_squares(out[0], index, rows)

    def _embedded(
        self,
        layer: FactoredLayer,
        uses: Sequence[Use],
        own: Gradients,
        n: int,
        at: slice,
        out: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Indices ``[n, T]`` and rotated gradients ``[n, T, d]`` of all uses."""
        parts = [
            layer_rows.embedding_rows(use, gradient, n, at, out.dtype)
            for use, gradient in zip(uses, own, strict=True)
        ]
        rows = torch.cat([rows for _, rows, _ in parts], 1)[None]
        rows = kfac_squares.rotated(rows, self.bases[layer.name][1])[0]
        return torch.cat([index for index, _, _ in parts], 1), rows

    def _add_tied(
        self, layer: FactoredLayer, found: Uses, gradients: Gradients, out: Tensor
    ) -> None:
        """A weight that is both an embedding's and a linear layer's: the sum of both, squared."""
        n = found.examples
        linear, linear_gradients = _of_role(layer, "matrix", found, gradients)
        embedding, embedding_gradients = _of_role(layer, "embedding", found, gradients)
        for at in _chunks(layer, [*linear, *embedding], n, out, matrices=True):
            count = len(range(*at.indices(n)))
            total = out.new_zeros((count, *out.shape[1:]))
            if linear:
                left = layer_rows.output_matrix(layer, linear, linear_gradients, n, at, out.dtype)
                right = self._right(layer, linear, n, at, "rotate", out.dtype)
                total += kfac_squares.matrices(left, right, (None, None), "rotate")[0]
            if embedding:
                index, rows = self._embedded(layer, embedding, embedding_gradients, n, at, out)
                places = torch.arange(count, device=index.device)[:, None] * out.shape[1] + index
                total.view(-1, out.shape[2]).index_add_(0, places.reshape(-1), rows.flatten(0, 1))
            out[0] += total.square_().sum(0)


def _of_role(
    layer: FactoredLayer, role: str, found: Uses, gradients: Gradients
) -> tuple[list[Use], list[Tensor | None]]:
    chosen = [
        (use, gradient)
        for use, gradient in found.with_gradients(layer.name, gradients)
        if use.role == role
    ]
    return [use for use, _ in chosen], [gradient for _, gradient in chosen]


def _chunks(
    layer: FactoredLayer, uses: Sequence[Use], n: int, like: Tensor, *, matrices: bool = False
) -> Iterator[slice]:
    """Examples that are done at once, so that rows (and gradients) fit."""
    G, out, width = layer.shape
    T = sum(use.rows(n) or 0 for use in uses)
    each = T * G * (width if out > width else out) + (T * G * max(out, width))
    each += G * out * width if matrices else 0
    step = max(1, (MATRICES if matrices else CHUNK) // max(1, each * like.element_size()))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _kept(rows: Tensor, keep: Tensor | None) -> tuple[Tensor, float]:
    if keep is None:
        return rows, float(rows.shape[1] * rows.shape[2])
    return rows * keep[None, :, :, None], float(keep.sum())


def _reduced(rows: Tensor, keep: Tensor | None) -> tuple[Tensor, float]:
    """Means over the rows that count, ``[G, n, 1, I]``, and how many examples have any."""
    if keep is None:
        return rows.mean(2, True), float(rows.shape[1])
    each = keep.sum(1).to(rows.dtype)
    kept, _ = _kept(rows, keep)
    return kept.sum(2, True) / each.clamp(min=1.0)[None, :, None, None], float((each > 0).sum())


def _add_input_moment(total: Tensor, rows: Tensor, count: float) -> None:
    """Adds the second moment of inputs, whose last column, of ``count`` ones, may be left out."""
    width = rows.shape[-1]
    if width == total.shape[-1]:
        _add_moment(total, rows)
        return
    if total.ndim == 2:
        _add_moment(total[:, :width], rows)
        total[:, width] += count
        return
    _add_moment(total[:, :width, :width], rows)
    sums = rows.sum((1, 2))
    total[:, :width, width] += sums
    total[:, width, :width] += sums
    total[:, width, width] += count


def _add_moment(total: Tensor, rows: Tensor) -> None:
    """Adds the second moment of rows ``[G, n, T, d]`` to ``[G, d, d]``, or its diagonal.

    It is symmetric: of many rows, half of it is multiplied out.
    """
    flat = rows.flatten(1, 2)
    width = flat.shape[2]
    if total.ndim == 2:
        total += flat.square().sum(1)
    elif width < 2 * TILE or flat.shape[1] < 2 * TILE:
        total.baddbmm_(flat.mT, flat)
    else:
        for start in range(0, width, TILE):
            stop = min(start + TILE, width)
            part = flat[:, :, start:stop].mT @ flat[:, :, start:]
            total[:, start:stop, start:] += part
            total[:, stop:, start:stop] += part[:, :, stop - start :].mT
