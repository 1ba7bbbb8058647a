"""Whole gradients of layers where parameters are sharded, and slices of what is made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

from curvlib.core.ranks.bundles import Bundle, bundled
from curvlib.core.ranks.places import Place
from curvlib.optim.sharding import Sharding


class WholeGradients:
    r"""Gathers slices of gradients when a layer asks for them, and drops them after the last use.

    All ranks ask in the same order. Small gradients are gathered together. A rank sends
    :math:`s P (R - 1) / R` bytes for :math:`P` entries of :math:`s` bytes, and holds two bundles
    whole, neither larger than the largest gradient. Where nothing is sharded, gradients are handed
    through.

    Args:
        gradients: This rank's slices, by ``id`` of the parameter.
        uses: Each use by ``id``, in the order in which :meth:`take` is called.
        sharding: How parameters are cut; ``None`` if they are whole.

    Example:
        >>> import torch
        >>> wholes = WholeGradients({7: torch.ones(2)}, [7, 7], None)
        >>> (wholes.take(7).tolist(), wholes.done(7)), (wholes.take(7).tolist(), wholes.done(7))
        (([1.0, 1.0], False), ([1.0, 1.0], True))
    """

    def __init__(
        self, gradients: Mapping[int, Tensor], uses: Iterable[int], sharding: Sharding | None
    ) -> None:
        self._gradients = gradients
        self._left = Counter(uses)
        self._whole: dict[int, Tensor] = {}
        self._places: dict[int, Place] = {}
        self._bundles: dict[int, list[int]] = {}
        if sharding is not None and sharding.group is not None:
            self._places = {key: sharding.place(key) for key in self._left}
            cut = [(key, place.slices, gradients[key]) for key, place in self._places.items()]
            self._bundles = {key: keys for keys in bundled(cut) for key in keys}

    def take(self, key: int) -> Tensor:
        """The whole gradient of a parameter, by its ``id``; not to be written to."""
        self._left[key] -= 1
        if key not in self._places:
            return self._gradients[key]
        if key not in self._whole:
            keys = self._bundles[key]
            group = self._places[key].group
            assert group is not None
            bundle = Bundle(tuple(self._places[k].slices for k in keys), group)
            found = bundle.gathered([self._gradients[k] for k in keys])
            self._whole.update(zip(keys, found, strict=True))
        return self._whole.pop(key) if self.done(key) else self._whole[key]

    @property
    def kept(self) -> list[Tensor]:
        """Whole gradients that are here, for a later use."""
        return list(self._whole.values())

    def done(self, key: int) -> bool:
        """Whether the last use of a parameter has begun."""
        return self._left[key] == 0

    def part(self, key: int, whole: Tensor) -> Tensor:
        """This rank's slice of a whole tensor of a parameter's shape, in memory of its own."""
        place = self._places.get(key)
        if place is None or place.group is None:
            return whole
        slices, group = place.slices, place.group
        first, last = slices.bounds(group.rank, group.size)
        return whole.narrow(slices.dim, first, last - first).contiguous().clone()
