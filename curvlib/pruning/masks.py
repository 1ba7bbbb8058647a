r"""Masks: which weights are kept, by the names of the parameters.

A mask is a boolean tensor of its parameter's shape, ``True`` where the weight is kept. Selections
work on flat vectors (``keep`` of ``[P]``, see :class:`curvlib.core.space.ParamSpace`); models,
files and people work with names. :class:`Masks` is the record between the two.

Pruned weights are zeros and nothing else: :func:`apply` writes them.
:mod:`curvlib.pruning.persistence` keeps them zero while the model is trained on.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.core.forward import uncompiled
from curvlib.core.result import Result
from curvlib.core.space import ParamSpace


@dataclass(frozen=True, eq=False, repr=False)
class Masks(Result):
    """Which weights of a model are kept.

    ``save`` and ``load`` are those of every result: one safetensors file.

    Attributes:
        keep: A boolean tensor for each masked parameter, by its name; ``True`` is kept.

    Raises:
        TypeError: If a mask is no boolean tensor.
        ValueError: If there is none.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> masks = Masks({"weight": torch.eye(2, 4, dtype=torch.bool)})
        >>> masks
        Masks(1 tensors, 2 of 8 weights kept, sparsity=0.75)
        >>> apply(model, masks)
        >>> int(model.weight.count_nonzero())
        2
    """

    keep: dict[str, Tensor]

    def __post_init__(self) -> None:
        if not self.keep:
            raise ValueError("masks hold no tensor; pass a boolean tensor for each parameter")
        for name, mask in self.keep.items():
            _require_boolean(f"the mask of {name!r}", mask)

    @classmethod
    def of(cls, keep: Tensor, space: ParamSpace) -> Masks:
        """Splits a flat mask.

        Args:
            keep: ``[P]``, boolean, ``True`` for kept weights.
            space: The parameters that it indexes. All of them are masked, also those that are
                kept whole; ``space.restrict(names)`` leaves some out.

        Raises:
            TypeError: If ``keep`` is no boolean tensor.
            ValueError: If its shape is not ``[P]``.
        """
        _require_boolean("keep=", keep)
        if keep.ndim != 1:
            raise ValueError(f"expected a flat mask [{space.size}], got {list(keep.shape)}")
        parts = (part.clone() for part in space.split(keep))
        return cls(dict(zip(space.names, parts, strict=True)))

    def flat(self, space: ParamSpace) -> Tensor:
        """The flat mask ``[P]`` on the space's device; parameters without a mask are kept.

        Raises:
            ValueError: If a masked parameter is not in the space, or of another shape.
        """
        shapes = dict(zip(space.names, space.shapes, strict=True))
        self._require(shapes, "the space")
        out = torch.ones(space.size, dtype=torch.bool, device=space.device)
        for name, mask in self.keep.items():
            out[space.slice(name)] = mask.reshape(-1).to(space.device)
        return out

    @property
    def size(self) -> int:
        """Number of masked entries, kept and pruned."""
        return sum(mask.numel() for mask in self.keep.values())

    @property
    def kept(self) -> int:
        """Number of entries that are kept."""
        return sum(int(mask.sum()) for mask in self.keep.values())

    @property
    def sparsity(self) -> float:
        """Share of the masked parameters' entries that is pruned."""
        return 1.0 - self.kept / max(self.size, 1)

    def sparsities(self) -> dict[str, float]:
        """The share that is pruned of each masked parameter, by its name."""
        return {
            name: 1.0 - int(mask.sum()) / max(mask.numel(), 1) for name, mask in self.keep.items()
        }

    def layers(self) -> dict[str, float]:
        """The share that is pruned of each layer (the module that owns parameters), by its name."""
        kept: dict[str, int] = {}
        size: dict[str, int] = {}
        for name, mask in self.keep.items():
            layer = name.rpartition(".")[0] or name
            kept[layer] = kept.get(layer, 0) + int(mask.sum())
            size[layer] = size.get(layer, 0) + mask.numel()
        return {layer: 1.0 - kept[layer] / max(size[layer], 1) for layer in kept}

    def emptied(self) -> tuple[str, ...]:
        """Names of parameters of which nothing is kept."""
        return tuple(name for name, mask in self.keep.items() if not bool(mask.any()))

    def fingerprint(self) -> str:
        """A digest of names and shapes: equal for masks that fit the same model."""
        text = "|".join(f"{name}{tuple(mask.shape)}" for name, mask in sorted(self.keep.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def owners(self, model: nn.Module, *, allow_tied: bool = False) -> dict[str, Owner]:
        """Where a model holds the masked parameters.

        Args:
            model: The model, or its compiled or data-parallel wrapper.
            allow_tied: Whether parameters that are tied (one tensor under several names) or share
                memory may be masked. All places that use such a tensor then see zeros.

        Raises:
            TypeError: If ``model`` is no module.
            ValueError: If a mask does not fit the model, or a masked parameter is tied.
        """
        model = unwrapped(model)
        owners: dict[str, Owner] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for key, p in module._parameters.items():
                if p is not None:
                    name = (f"{path}.{key}" if path else key).replace("_orig_mod.", "")
                    owners[name] = Owner(module, key)
        for name in self.keep:
            if name in owners and _is_lazy(owners[name].parameter):
                raise ValueError(
                    f"parameter {name!r} of a lazy module has no shape yet; call the model once"
                )
        # A lazy parameter that has no mask has no shape that could be compared.
        shapes = {n: tuple(o.parameter.shape) for n, o in owners.items() if n in self.keep}
        self._require(shapes, f"the model ({type(model).__name__})", list(owners))
        if not allow_tied:
            self._require_untied(owners)
        self._require_agreement(owners)
        return {name: owners[name] for name in self.keep}

    def _require(
        self, shapes: dict[str, tuple[int, ...]], what: str, names: list[str] | None = None
    ) -> None:
        unknown = [name for name in self.keep if name not in shapes]
        if unknown:
            raise ValueError(
                f"these masks are for another model: {what} has no parameter {unknown}; "
                f"it has {list(shapes) if names is None else names}"
            )
        for name, mask in self.keep.items():
            if tuple(mask.shape) != shapes[name]:
                raise ValueError(
                    f"these masks are for another model: the mask of {name!r} has shape "
                    f"{list(mask.shape)}, the parameter of {what} has {list(shapes[name])}"
                )

    def _require_untied(self, owners: dict[str, Owner]) -> None:
        every = {n: owner.parameter for n, owner in owners.items()}
        memory = _Memory({n: p for n, p in every.items() if not _is_lazy(p)})
        for name in self.keep:
            for other in memory.of(name):
                same = every[name] is every[other]
                how = "is the same tensor as" if same else "shares memory with"
                raise ValueError(
                    f"cannot prune {name!r}: it {how} {other!r}, which would lose the same "
                    "weights; leave it out of the masks, untie the two, or pass allow_tied=True "
                    "if zeros are meant in both places"
                )

    def _require_agreement(self, owners: dict[str, Owner]) -> None:
        first: dict[int, str] = {}
        for name, mask in self.keep.items():
            other = first.setdefault(id(owners[name].parameter), name)
            if not torch.equal(mask, self.keep[other].to(mask.device)):
                raise ValueError(
                    f"{other!r} and {name!r} are one tied tensor, but their masks differ; "
                    "pass the same mask for both, or a mask for one of them"
                )

    def __repr__(self) -> str:
        return (
            f"Masks({len(self.keep)} tensors, {self.kept} of {self.size} weights kept, "
            f"sparsity={self.sparsity:.4g})"
        )


@dataclass(frozen=True)
class Owner:
    """Where a parameter is held: it may be replaced there, and is then found again."""

    module: nn.Module
    key: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that is held there now."""
        p = self.module._parameters[self.key]
        assert p is not None
        return p


def apply(model: nn.Module, masks: Masks, *, allow_tied: bool = False) -> None:
    """Sets the pruned weights of a model to zero, in place and once.

    Args:
        model: The model, or its compiled or data-parallel wrapper.
        masks: Which weights are kept.
        allow_tied: See :meth:`Masks.owners`.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If the masks do not fit the model, or a masked parameter is tied.
    """
    owners = masks.owners(model, allow_tied=allow_tied)
    with torch.no_grad():
        for name, owner in owners.items():
            zero_pruned(masks.keep[name], owner.parameter)


def zero_pruned(keep: Tensor, *tensors: Tensor) -> None:
    """Zeros what is not kept, in place, also where it is infinite or nan."""
    masks: dict[tuple[torch.device, int], Tensor] = {}
    for tensor in tensors:
        bits = _integers(tensor)
        size = 0 if bits is None else tensor.itemsize
        mask = masks.get((tensor.device, size))
        if mask is None:
            mask = keep.to(tensor.device)
            mask = mask.logical_not() if bits is None else mask.to(bits).neg_()
            masks[tensor.device, size] = mask
        if bits is None:
            tensor.masked_fill_(mask, 0.0)
        else:
            tensor.view(bits).bitwise_and_(mask)


def pruned_to_zero(keep: Tensor, tensor: Tensor) -> Tensor:
    """A copy with zeros for what is not kept, on the graph of ``tensor`` if it has one."""
    keep = keep.to(tensor.device)
    bits = _integers(tensor)
    if bits is None or tensor.requires_grad:
        return torch.where(keep, tensor, 0.0)
    out: Tensor = keep.to(bits).neg_().bitwise_and_(tensor.view(bits)).view(tensor.dtype)
    return out


def _integers(tensor: Tensor) -> torch.dtype | None:
    """Integers as wide as a tensor's entries, where masking their bits is the faster way.

    On a CPU that is six times faster than ``masked_fill_``, which branches for every entry.
    """
    if tensor.device.type != "cpu" or not tensor.is_floating_point():
        return None
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.itemsize)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``torch.compile`` and data-parallel wrappers.

    Raises:
        TypeError: If ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    for inner in _layers_of(model, parallel):
        model = inner
    return model


def _layers_of(model: nn.Module, parallel: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    while True:
        inner = model.module if isinstance(model, parallel) else uncompiled(model)
        if inner is model or not isinstance(inner, nn.Module):
            return
        yield inner
        model = inner


def _require_boolean(what: str, mask: object) -> None:
    kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
    if kind != torch.bool:
        raise TypeError(
            f"{what} should be a boolean tensor (True = kept), got {kind}; use mask.bool()"
        )


def _is_lazy(p: Any) -> bool:
    return bool(nn.parameter.is_lazy(p))


class _Memory:
    """Which of some tensors have bytes in common: those whose extents do, in order of address."""

    def __init__(self, named: dict[str, Tensor]) -> None:
        self._tensors = named
        self._same: dict[int, list[str]] = {}
        for name, t in named.items():
            self._same.setdefault(id(t), []).append(name)
        self._extents = {
            name: _extent(t)
            for name, t in named.items()
            if t.numel() and t.device.type != "meta" and t.layout == torch.strided
        }
        self._order = sorted(self._extents, key=self._extents.__getitem__)
        self._starts = [self._extents[name][:2] for name in self._order]
        ends = (self._extents[name] for name in self._order)
        # the furthest that any of the first ones reaches, on its device
        self._reach = list(accumulate(((e[0], e[2]) for e in ends), max))

    def of(self, name: str) -> list[str]:
        """The others that share memory with a tensor, in the order of all."""
        found = set(self._same[id(self._tensors[name])])
        if name in self._extents:
            device, start, stop = self._extents[name]
            i = bisect_left(self._starts, (device, stop)) - 1
            while i >= 0 and self._reach[i] > (device, start):
                own = self._extents[self._order[i]]
                if own[0] == device and own[2] > start:
                    found.add(self._order[i])
                i -= 1
        return (
            [other for other in self._tensors if other in found - {name}] if len(found) > 1 else []
        )


def _extent(t: Tensor) -> tuple[str, int, int]:
    """Device, and bytes from the first entry to behind the last."""
    reach = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return str(t.device), t.data_ptr(), t.data_ptr() + (int(reach) + 1) * t.element_size()
