r"""The blocks of parameters in which gradients of examples are scored.

Each factored layer (:mod:`curvlib.operators.layers.factored`) is a block of ``G`` matrices
``[O, I]``, and each parameter that is in none is a block ``[1, size]`` of its own. Together the
blocks are the whole parameter space.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from curvlib.core.kronecker_blocks import KroneckerBlock, Part
from curvlib.core.risk import Risk
from curvlib.core.space import ParamSpace
from curvlib.operators.layers.factored import FactoredLayer, factored_layers
from curvlib.operators.layers.parameters import whole_parameters


@dataclass(frozen=True, eq=False)
class ScoreBlock:
    """One block.

    Attributes:
        name: Name of the layer, or of the parameter.
        names: Names of its parameters.
        shape: ``(G, O, I)``.
        parts: Where the columns lie in the flat vector.
        layer: The layer whose inputs and outputs give the gradient, or ``None``.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, int, int]
    parts: tuple[Part, ...]
    layer: FactoredLayer | None

    def gather(self, rows: Tensor) -> Tensor:
        """Entries of flat rows ``[K, P]`` as matrices ``[K, G, O, I]``."""
        return self._geometry(rows).gather(rows)

    def of_parameters(self, rows: Mapping[str, Tensor], space: ParamSpace) -> Tensor:
        """Matrices ``[K, G, O, I]`` of entries ``[K, n]`` of each of its parameters.

        Args:
            rows: By the name of the parameter.
            space: In which the parts lie.
        """
        starts = dict(
            zip(
                self.names,
                accumulate((rows[n].shape[1] for n in self.names), initial=0),
                strict=False,
            )
        )
        parts = []
        for part in self.parts:
            name, first = space.at(part.start)
            parts.append(replace(part, start=starts[name] + first))
        own = replace(self, parts=tuple(parts))
        return own.gather(torch.cat([rows[name] for name in self.names], 1))

    def scatter(self, matrices: Tensor, rows: Tensor) -> None:
        """Writes matrices ``[K, G, O, I]`` into flat rows ``[K, P]``."""
        self._geometry(rows).scatter(matrices, rows)

    def _geometry(self, rows: Tensor) -> KroneckerBlock:
        nothing = rows.new_empty(1).expand(self.shape)
        return KroneckerBlock(self.name, self.parts, None, None, nothing)


def score_blocks(risk: Risk) -> list[ScoreBlock]:
    """All blocks of a risk's parameters, in their order; of whole vectors, if they are sharded.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.PReLU())
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (torch.ones(1, 2), torch.ones(1, 3)))
        >>> [(block.name, block.shape) for block in score_blocks(risk)]
        [('0', (1, 3, 3)), ('1.weight', (1, 1, 1))]
    """
    held = whole_parameters(risk)
    layers, uncovered = factored_layers(held, dense_norms=False, max_side=2**62)
    blocks = [ScoreBlock(own.name, own.names, own.shape, own.parts, own) for own in layers]
    for name in uncovered:
        where = held.space.slice(name)
        size = where.stop - where.start
        blocks.append(ScoreBlock(name, (name,), (1, 1, size), (Part(where.start, size),), None))
    return sorted(blocks, key=lambda block: block.parts[0].start)


def flat_rows(blocks: Iterable[ScoreBlock], matrices: dict[str, Tensor], size: int) -> Tensor:
    """Flat rows ``[K, P]`` of matrices ``[K, G, O, I]`` by block; zero where there is none."""
    first = next(iter(matrices.values()))
    rows = torch.zeros((len(first), size), dtype=first.dtype, device=first.device)
    for block in blocks:
        if block.name in matrices:
            block.scatter(matrices[block.name], rows)
    return rows
