"""Shapes of the matrices that gradients of examples are made of, read from one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.core.risk import Risk
from curvlib.operators.layers.uses import Watcher
from curvlib.operators.scores.blocks import score_blocks


@dataclass(frozen=True)
class LayerShape:
    """A block of parameters, and how many rows an example gives it.

    Attributes:
        name: Name of the layer, or of the parameter.
        groups: ``G``.
        outputs: ``O``.
        inputs: ``I``, the bias's column included.
        rows: ``T``, of one example, over all uses.
        left_dense: Whether its left Kronecker factor is dense; diagonal otherwise.
        right_dense: Whether its right factor is.
        covered: Whether it has Kronecker factors.
    """

    name: str
    groups: int
    outputs: int
    inputs: int
    rows: int
    left_dense: bool = True
    right_dense: bool = True
    covered: bool = True

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.groups * self.outputs * self.inputs


@dataclass(frozen=True)
class ModelShapes:
    """Shapes of all blocks, and of a batch.

    Attributes:
        layers: The blocks, in the order of the parameters.
        batch_size: Examples of the first batch.
        outputs: Entries of an example's output: backward passes of an exact type-2 Fisher.
    """

    layers: tuple[LayerShape, ...]
    batch_size: int
    outputs: int


def layer_shapes(risk: Risk) -> ModelShapes:
    """The shapes of a risk's blocks, from a forward pass of its first batch.

    Raises:
        ValueError: If there is no batch, or its examples depend on each other.

    Example:
        >>> import curvlib as cl
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.Flatten())
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (torch.ones(5, 2, 9), torch.ones(5, 28)))
        >>> layer_shapes(risk).layers[0]
        LayerShape(name='0', groups=1, outputs=4, inputs=7, rows=7, left_dense=True,
                   right_dense=True, covered=True)
    """
    blocks = score_blocks(risk)
    watcher = Watcher(risk, [block.layer for block in blocks if block.layer is not None])
    rows = dict.fromkeys((block.name for block in blocks), 0)
    count, outputs = 0, 0
    with risk.untouched(), torch.no_grad():
        batch = next(risk.batches(), None)
        if batch is None:
            raise ValueError("the data has no batch, so that shapes cannot be read")
        for one in watcher.passes(batch):
            first = count == 0
            count += one.examples
            if isinstance(one.output, Tensor):
                outputs = one.output.numel() // max(1, one.examples)
            for use in one.uses if first else ():
                rows[use.layer] += use.rows(one.examples) or 0
    found = [
        LayerShape(
            block.name,
            *block.shape,
            rows=rows[block.name],
            left_dense=block.layer is not None and block.layer.left_dense,
            right_dense=block.layer is not None and block.layer.right_dense,
            covered=block.layer is not None,
        )
        for block in blocks
    ]
    return ModelShapes(tuple(found), count, outputs)
