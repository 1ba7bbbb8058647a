r"""MKOR's inverses of both sides of a layer: moved by a step's vectors, applied, kept, paid for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.operators.layers.factored import FactoredLayer
from curvlib.operators.layers.vectors import vectors as vectors_of
from curvlib.optim.layer_places import LayerPlaces
from curvlib.optim.layer_shares import Job, LayerShares, cost_of
from curvlib.optim.rules.mkor import Inverse, init, norm_matched, preconditioned, update
from curvlib.optim.sharding import Sharding


@dataclass(frozen=True, eq=False)
class LayerInverses:
    """The inverses of a layer.

    Attributes:
        left: Of the side of outputs; ``None`` for the identity.
        right: Of the side of inputs.
    """

    left: Inverse | None
    right: Inverse | None

    @property
    def tensors(self) -> list[Tensor]:
        """All parts."""
        return [t for side in (self.left, self.right) if side is not None for t in side.tensors]

    def fits(self, layer: FactoredLayer) -> bool:
        """Whether they are of a layer of this shape."""
        G, *sizes = layer.shape
        found = [None if s is None else s.diagonal.shape for s in (self.left, self.right)]
        dense = (layer.left_dense, layer.right_dense)
        wanted = [(G, d) if own else None for d, own in zip(sizes, dense, strict=True)]
        return found == wanted

    def plain(self) -> dict[str, list[Tensor] | None]:
        """As a state dict keeps them."""
        sides = {"left": self.left, "right": self.right}
        return {k: None if side is None else list(side.tensors) for k, side in sides.items()}

    @classmethod
    def from_plain(cls, kept: Mapping[str, Any]) -> LayerInverses:
        """From what :meth:`plain` returned."""
        left, right = (None if kept[k] is None else Inverse(*kept[k]) for k in ("left", "right"))
        return cls(left, right)


def moved(
    layer: FactoredLayer,
    before: LayerInverses | None,
    vectors: tuple[Tensor | None, Tensor | None],
    *,
    dtype: torch.dtype,
    decay: float,
    damping: float,
) -> LayerInverses:
    """The inverses after a step's vectors.

    Args:
        layer: The layer.
        before: Those before; ``None`` at first.
        vectors: Of the left and the right side, ``[G, k, d]``.
        dtype: What they are stored in, at first.
        decay: Of the moving averages.
        damping: See :mod:`curvlib.optim.rules.mkor`.
    """
    known = before if before is not None and before.fits(layer) else LayerInverses(None, None)
    sides: list[Inverse | None] = []
    for old, own, size in zip((known.left, known.right), vectors, layer.shape[1:], strict=True):
        if own is None:
            sides.append(None)
            continue
        start = old if old is not None else init(own.shape[0], size, dtype=dtype, device=own.device)
        sides.append(update(start, own, decay=decay, damping=damping))
    return LayerInverses(*sides)


def sums_of(layer: FactoredLayer, pending: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums over a layer's rows among pending ones: see :func:`row_sums`."""
    names = {key: f"{layer.name}|{key}" for key in ("left", "right", "rows", "terms")}
    found = {key: pending[name] for key, name in names.items() if name in pending}
    sizes = {key: found[key].shape[-1] for key in ("left", "right") if key in found}
    own = {"left": layer.shape[1], "right": layer.shape[2]}
    # none, if a bias was frozen or set free since
    return found if all(size == own[key] for key, size in sizes.items()) else {}


def advanced(
    layers: Iterable[tuple[FactoredLayer, Mapping[str, Any]]],
    inverses: Mapping[str, LayerInverses],
    pending: Mapping[str, Tensor],
    *,
    signed: bool,
    ranks: int,
    dtype: torch.dtype,
) -> dict[str, LayerInverses]:
    """All inverses, those of layers with pending sums moved.

    Args:
        layers: Layers, with the groups of their weights: ``decay`` and ``damping`` are read.
        inverses: Before, by layer.
        pending: Sums over rows.
        signed: Whether rows had random signs.
        ranks: How many ranks there are.
        dtype: What inverses are stored in, at first.
    """
    out = dict(inverses)
    found = [(layer, group, sums_of(layer, pending)) for layer, group in layers]
    found = [(layer, group, sums) for layer, group, sums in found if sums]
    if ranks > 1 and found:  # zeros of layers that no rank has called were sent, too
        rows = torch.stack([sums["rows"] for _, _, sums in found]).tolist()
        found = [own for own, count in zip(found, rows, strict=True) if count]
    for layer, group, sums in found:
        out[layer.name] = moved(
            layer,
            inverses.get(layer.name),
            vectors_of(layer, sums, signed=signed, ranks=ranks),
            dtype=dtype,
            decay=float(group["decay"]),
            damping=float(group["damping"]),
        )
    return out


def directions(
    layers: Iterable[tuple[FactoredLayer, LayerPlaces]],
    inverses: Mapping[str, LayerInverses],
    params: Mapping[str, Tensor],
    gradients: Mapping[int, Tensor],
    sharding: Sharding | None = None,
) -> dict[int, Tensor]:
    """Gradients, preconditioned where a layer's inverses reach, by ``id`` of the parameter.

    The gradient of each layer keeps its norm, weight and bias together. Of sharded parameters, it
    is preconditioned whole on one of the ranks.

    Args:
        layers: Layers, and where their matrices lie.
        inverses: By layer.
        params: Parameters, by name.
        gradients: Of parameters (their slices), by ``id``; some may be absent.
        sharding: How parameters and gradients are cut, if they are.
    """
    covered = []
    dtypes: dict[int, torch.dtype] = {}
    for layer, places in layers:
        keys = {n: id(params[n]) for n in layer.names if id(params[n]) in gradients}
        own = inverses.get(layer.name)
        if not keys or own is None or not own.fits(layer):
            continue
        covered.append((layer, places, keys, own))
        for key in keys.values():
            dtypes.setdefault(key, own.tensors[-1].dtype)
    jobs = [Job(tuple(keys.values()), cost_of(layer.shape)) for layer, _, keys, _ in covered]
    shares = LayerShares(jobs, gradients, sharding)
    made: dict[int, Tensor] = {}
    for number, (layer, places, keys, own) in enumerate(covered):
        if not shares.mine(number):
            continue
        dtype = own.tensors[-1].dtype
        present = {n: shares.whole[key] for n, key in keys.items()}
        matrix = places.read(present, dtype)
        found = preconditioned(matrix, own.left, own.right)
        if len(keys) < len(layer.names):
            found = found * places.read({n: torch.ones_like(g) for n, g in present.items()}, dtype)
        (found,) = norm_matched([found], [matrix])
        for key in keys.values():
            if key not in made:
                made[key] = shares.whole[key].to(
                    dtypes[key], copy=True, memory_format=torch.contiguous_format
                )
        places.write(found, {n: made[key] for n, key in keys.items()})
    return {**gradients, **shares.parts(made, dtypes)}


def cost_of_steps(
    layers: Iterable[tuple[FactoredLayer, float]], *, interval: int, vectors: int
) -> float:
    """Floating-point work of a preconditioned step in gradients of the same layers.

    A gradient costs six operations for each entry of the matrix and row; both products of the
    preconditioning ``2 (O + I)`` for each entry; an update of an inverse about
    ``d^2 (4 k + 10)``.

    Args:
        layers: Layers, and how many rows they have in a batch.
        interval: Steps from one update to the next.
        vectors: ``k``.

    Example:
        >>> from curvlib.operators.layers.recorder import LayerRecorder
        >>> (layer,) = LayerRecorder(torch.nn.Linear(99, 100), sink=print).layers
        >>> round(cost_of_steps([(layer, 1000.0)], interval=10, vectors=1), 3)
        1.067
    """
    gradient = extra = 0.0
    for layer, rows in layers:
        G, out, width = layer.shape
        sides = [d for d, own in ((out, layer.left_dense), (width, layer.right_dense)) if own]
        gradient += 6.0 * G * out * width * rows
        extra += sum(2.0 * G * out * width * d for d in sides)
        extra += sum(G * d * d * (4.0 * vectors + 10.0) for d in sides) / interval
    return 1.0 + extra / gradient if gradient else 1.0
