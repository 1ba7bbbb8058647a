"""What files of Kronecker-factored operators hold: that of one process, whoever writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.core.kronecker_blocks import KroneckerBlock, Part
from curvlib.core.ranks.bundles import gathered
from curvlib.core.ranks.file_parts import Later, Stored
from curvlib.core.ranks.group import Group
from curvlib.core.ranks.slices import Slices
from curvlib.core.ranks.spread_blocks import Cut, SpreadBlock, cut_of, places_of
from curvlib.core.space import ParamSpace

Block = KroneckerBlock | SpreadBlock
_DTYPES = {str(t): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def saved_space(space: ParamSpace) -> dict[str, Any]:
    """A parameter space, of whole vectors."""
    return {
        "names": list(space.names),
        "shapes": [list(shape) for shape in space.whole().shapes],
        "dtypes": [str(dtype) for dtype in space.dtypes],
    }


def loaded_space(content: Mapping[str, Any], device: torch.device | str) -> ParamSpace:
    """The space of :func:`saved_space`, with vectors of the type and device of the blocks."""
    values = content["blocks"][0]["kronecker"]
    if isinstance(values, Tensor):
        dtype, device = values.dtype, values.device
    else:
        dtype = values.narrow(0, 0, 0, torch.device("cpu")).dtype
    return ParamSpace(
        names=tuple(content["names"]),
        shapes=tuple(tuple(shape) for shape in content["shapes"]),
        dtypes=tuple(_DTYPES[name] for name in content["dtypes"]),
        dtype=dtype,
        device=torch.device(device),
    )


def saved_blocks(
    blocks: Sequence[Block], first: Sequence[Tensor], second: Sequence[Tensor] | None
) -> list[dict[str, Any]]:
    """Blocks with the eigenvalues of K-FAC, and those of EK-FAC."""
    found: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        tensors = {
            "left": block.left,
            "right": block.right,
            "kronecker": first[i],
            "corrected": None if second is None else second[i],
        }
        own: dict[str, Any] = dict(tensors)
        if isinstance(block, SpreadBlock):
            slices = _slices(block.cut)
            own = {
                name: None if tensor is None else later(tensor, slices[name], block.group)
                for name, tensor in tensors.items()
            }
        parts = [[p.start, p.columns, p.transposed] for p in block.parts]
        found.append({"name": block.name, "parts": parts, **own})
    return found


def _slices(cut: Cut) -> dict[str, Slices]:
    """How the tensors of a block in a file are cut."""
    return {
        "left": cut.side(0),
        "right": cut.side(1),
        "kronecker": cut.values,
        "corrected": cut.values,
    }


def later(tensor: Tensor, slices: Slices, group: Group) -> Later:
    """A tensor that ranks hold slices of, to be written whole."""
    return Later(slices.shape, tensor, lambda: gathered(tensor, slices, group))


def own_slice(stored: Stored, slices: Slices, group: Group, device: torch.device) -> Tensor:
    """This rank's slice of a tensor in a file."""
    first, last = slices.bounds(group.rank, group.size)
    return stored.narrow(slices.dim, first, last, device)


def loaded_blocks(
    content: Sequence[Mapping[str, Any]], space: ParamSpace
) -> tuple[list[Block], list[Tensor], list[Tensor] | None]:
    """Blocks, and both their eigenvalues, of :func:`saved_blocks`."""
    blocks: list[Block] = []
    second: list[Tensor | None] = []
    for own in content:
        parts = tuple(Part(*part) for part in own["parts"])
        if space.spread is None:
            blocks.append(
                KroneckerBlock(own["name"], parts, own["left"], own["right"], own["kronecker"])
            )
            second.append(own["corrected"])
            continue
        group = space.spread.group
        G, O, I = own["kronecker"].shape
        cut = cut_of((G, O, I), own["left"] is not None, group.size)
        found = {
            name: None if own[name] is None else own_slice(own[name], slices, group, space.device)
            for name, slices in _slices(cut).items()
        }
        values = found["kronecker"]
        assert values is not None
        blocks.append(
            SpreadBlock(
                own["name"],
                parts,
                places_of(parts, cut.shape, space),
                found["left"],
                found["right"],
                values,
                cut,
                group,
            )
        )
        second.append(found["corrected"])
    kept = [values for values in second if values is not None]
    return blocks, [b.eigenvalues for b in blocks], kept if len(kept) == len(second) else None
