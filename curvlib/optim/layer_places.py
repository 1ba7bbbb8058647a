"""Where the matrix ``[G, O, I]`` of a factored layer lies in its parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvlib.core.space import ParamSpace
from curvlib.operators.layers.factored import FactoredLayer


class LayerPlaces:
    """Reads a layer's matrix from tensors of its parameters' shapes, and writes it back.

    A part of the matrix is a whole parameter, or some consecutive rows of one (of the queries in
    attention's projections).

    Args:
        layer: The layer.
        space: The parameters that it was made for.

    Example:
        >>> from curvlib.core.kronecker_blocks import Part
        >>> model = torch.nn.Linear(2, 3)
        >>> parts = (Part(0, 2), Part(6, 1))
        >>> layer = FactoredLayer("a", "", "weight", "bias", (), (1, 3, 3), parts, True, True)
        >>> places = LayerPlaces(layer, ParamSpace.of(model))
        >>> tensors = {"weight": model.weight.detach(), "bias": model.bias.detach()}
        >>> back = {name: torch.zeros_like(t) for name, t in tensors.items()}
        >>> places.write(places.read(tensors, torch.float32), back)
        >>> all(torch.equal(back[name], tensors[name]) for name in tensors)
        True
    """

    def __init__(self, layer: FactoredLayer, space: ParamSpace) -> None:
        self.layer = layer
        rows = layer.shape[0] * layer.shape[1]
        self._places = []
        for name, part in zip(layer.names, layer.parts, strict=True):
            start = part.start - space.slice(name).start
            self._places.append((name, slice(start, start + rows * part.columns), part))
        #: How many entries of each parameter it covers.
        self.sizes = {name: where.stop - where.start for name, where, _ in self._places}

    def read(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The matrix ``[G, O, I]`` of some tensors of the parameters' shapes.

        Args:
            tensors: By name, one at least; of a parameter that is not there, zeros are taken.
            dtype: Of the matrix.
        """
        groups, out, _ = self.layer.shape
        device = next(iter(tensors.values())).device
        columns = []
        for name, where, part in self._places:
            width = part.columns
            if name not in tensors:
                columns.append(torch.zeros(groups, out, width, dtype=dtype, device=device))
                continue
            flat = tensors[name].reshape(-1)[where].to(dtype)
            if part.transposed:
                columns.append(flat.view(groups, width, out).mT)
            else:
                columns.append(flat.view(groups, out, width))
        return columns[0] if len(columns) == 1 else torch.cat(columns, -1)

    def write(self, matrix: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Writes a matrix ``[G, O, I]`` into contiguous tensors of the parameters' shapes.

        Args:
            matrix: The matrix.
            tensors: By name; parameters that are not there are left out.
        """
        column = 0
        for name, where, part in self._places:
            piece = matrix[..., column : column + part.columns]
            column += part.columns
            if name in tensors:
                piece = piece.mT if part.transposed else piece
                tensors[name].view(-1)[where].view(piece.shape).copy_(piece)
