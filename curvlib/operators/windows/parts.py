"""How the rows of a window are split: by parameters, layers, parameter groups, or lengths."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from curvlib.core.space import ParamSpace

#: What splits rows into parts: ``"tensor"``, ``"layer"``, lengths, or groups of name globs.
Parts = str | Sequence[int] | Sequence[Sequence[str]] | None


def part_sizes(parts: Parts, space: ParamSpace | None) -> Sequence[int] | None:
    """Lengths of the contiguous parts that are asked for; ``None`` for one.

    Raises:
        ValueError: If the words or globs are unknown, the space is, or groups are no neighbours.
    """
    given: Any = parts
    if given is None or not (isinstance(given, str) or _are_groups(given)):
        return given  # lengths, which the window checks
    if isinstance(given, str) and given not in ("tensor", "layer"):
        raise ValueError(
            "parts= is 'tensor', 'layer', name globs of each group or lengths of slices, got "
            f"{given!r}"
        )
    if space is None:
        raise ValueError(
            f"parts={given!r} needs space=, which says where parameters lie; pass risk.space, or "
            "the lengths themselves"
        )
    if given == "tensor":
        return [n for n in space.sizes if n]
    owner: dict[str, Any]
    if given == "layer":
        owner = {name: layer for layer, names in space.layers().items() for name in names}
    else:
        owner = _owners(given, space)
    runs = _runs(space, owner)
    if given != "layer" and len(runs) > len(given):
        raise ValueError(
            f"the parameters of each group in parts= are to be neighbours, but {len(given)} groups "
            f"make {len(runs)} runs; make a window of each group, with "
            "ParamSpace.of(model, params=globs)"
        )
    return [n for _, n in runs if n]


def _are_groups(parts: Any) -> bool:
    groups = isinstance(parts, Sequence) and len(parts) > 0
    return groups and all(
        isinstance(group, (list, tuple)) and all(isinstance(glob, str) for glob in group)
        for group in parts
    )


def _owners(groups: Sequence[Sequence[str]], space: ParamSpace) -> dict[str, int]:
    """The first group whose globs match each name."""
    owner: dict[str, int] = {}
    for name in space.names:
        found = [k for k, g in enumerate(groups) if any(fnmatchcase(name, glob) for glob in g)]
        if not found:
            raise ValueError(
                f"parameter {name!r} is in no group of parts=; add a group for the rest, ['*']"
            )
        owner[name] = found[0]
    unused = [list(groups[k]) for k in range(len(groups)) if k not in owner.values()]
    if unused:
        raise ValueError(
            f"group {unused[0]} of parts= has no parameter of its own; the first are "
            f"{', '.join(space.names[:3])}"
        )
    return owner


def _runs(space: ParamSpace, owner: dict[str, Any]) -> list[tuple[Any, int]]:
    """Owners and lengths of neighbouring parameters that belong together."""
    runs: list[tuple[Any, int]] = []
    for name, size in zip(space.names, space.sizes, strict=True):
        if runs and runs[-1][0] == owner[name]:
            runs[-1] = (owner[name], runs[-1][1] + size)
        else:
            runs.append((owner[name], size))
    return runs
