"""Where the values of sharded parameters are: which rank has which slice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from curvlib.core.ranks.dtensors import is_fsdp, is_sharded, slice_of
from curvlib.core.ranks.group import Group
from curvlib.core.ranks.slices import Slices
from curvlib.core.ranks.spread import Spread

#: What begins an error about a sharding that is not supported.
UNFOLLOWED = "a sharding that curvlib cannot follow"


@dataclass(frozen=True)
class Place:
    """Where a parameter's values are.

    Attributes:
        leaf: This rank's slice, which shares the parameter's memory.
        slices: How the parameter is cut.
        group: The ranks; ``None`` for one process.
    """

    leaf: Tensor
    slices: Slices
    group: Group | None


def has_sharded(model: nn.Module) -> bool:
    """Whether a model has a parameter that is sharded, by FSDP2 or otherwise."""
    return any(map(is_sharded, model.parameters())) or any(map(is_fsdp, model.modules()))


def places_of(model: nn.Module, group: Group | None) -> dict[int, Place]:
    """Where the values of a model's sharded parameters are, by the parameters' ``id``.

    Raises:
        ValueError: If a sharding is not one along one axis over the ranks of the group.
    """
    reshard(model)
    places = {}
    for name, p in model.named_parameters():
        if is_sharded(p):
            places[id(p)] = place_of(name, p, group)
    for module_name, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and is_sharded(buffer):
                raise ValueError(
                    f"{UNFOLLOWED}: the buffer {name!r} of {module_name!r} is a DTensor; buffers "
                    "are to be plain tensors, the same on every rank"
                )
        _require_plain_hooks(module_name, module)
    return places


def refresh(model: nn.Module, places: Mapping[int, Place]) -> None:
    """Reshards a model, and lets slices follow parameters whose memory has moved.

    FSDP2 moves it at the first forward pass, where slices have to be padded.
    """
    reshard(model)
    for p in model.parameters():
        if id(p) in places:
            follow(p, places[id(p)])


def follow(param: Tensor, place: Place) -> None:
    """Lets the slice of a sharded parameter follow memory that has moved."""
    own = slice_of(param)
    if own.data_ptr() != place.leaf.data_ptr():
        place.leaf.data = own


def spread_of(params: Mapping[str, Tensor], places: Mapping[int, Place]) -> Spread | None:
    """How vectors in the space of some parameters lie over ranks; ``None`` if they are whole.

    Raises:
        ValueError: If some of the parameters are sharded and some are not.
    """
    found = {name: places.get(id(p)) for name, p in params.items()}
    cut = [place for place in found.values() if place is not None and place.group is not None]
    if not cut:
        return None
    whole = [name for name, place in found.items() if place is None]
    if whole:
        raise ValueError(
            f"{UNFOLLOWED}: parameter {whole[0]!r} is whole on every rank beside sharded ones; "
            "leave it out with params=, or shard it too (no ignored_params= of fully_shard)"
        )
    assert cut[0].group is not None
    return Spread(tuple(place.slices for place in cut), cut[0].group)


def place_of(name: str, param: Any, group: Group | None) -> Place:
    """Where the values of a sharded parameter are.

    Raises:
        ValueError: If its sharding is not one along one axis over the ranks of the group.
    """
    mesh, placements = param.device_mesh, param.placements
    if mesh.ndim != 1:
        raise ValueError(
            f"{UNFOLLOWED}: parameter {name!r} lies on a mesh of {mesh.ndim} dimensions "
            f"{tuple(mesh.shape)}; shard over all ranks along one (no HSDP, no tensor parallelism)"
        )
    ranks = mesh.mesh.flatten().tolist()
    own = [dist.get_rank()]
    if group is not None:
        own = dist.get_process_group_ranks(group.process_group)
    if ranks != own:
        raise ValueError(
            f"{UNFOLLOWED}: parameter {name!r} is spread over ranks {ranks}, and the data over "
            f"ranks {own}; pass Risk(..., group=mesh.get_group()), or process_group= likewise"
        )
    if type(placements[0]).__name__ != "Shard":
        raise ValueError(
            f"{UNFOLLOWED}: parameter {name!r} has the placement {placements[0]}; Shard(dim) over "
            "all ranks is expected"
        )
    leaf = slice_of(param)
    slices = Slices(tuple(param.shape), placements[0].dim % max(param.ndim, 1))
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    if tuple(leaf.shape) != slices.local(rank, size):
        raise ValueError(
            f"{UNFOLLOWED}: rank {rank} holds {list(leaf.shape)} of parameter {name!r} "
            f"{list(param.shape)}, where torch.chunk gives {list(slices.local(rank, size))}"
        )
    return Place(leaf, slices, group)


def _require_plain_hooks(name: str, module: nn.Module) -> None:
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if (getattr(hook, "__module__", "") or "").startswith("torch.distributed.tensor"):
            raise ValueError(
                f"{UNFOLLOWED}: module {name!r} is tensor-parallel (parallelize_module), so its "
                "forward pass works on parts of activations; shard parameters with fully_shard"
            )


def reshard(model: nn.Module) -> None:
    """Frees gathered parameters that FSDP2 has left in a model, such as the root's."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]
