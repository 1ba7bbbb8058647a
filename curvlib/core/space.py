r"""Parameter spaces: named tensors as one flat vector, and back.

curvlib has one representation of vectors in parameter space: flat tensors ``[P]``, or columns
``[P, K]``. A :class:`ParamSpace` is the only place that splits them into tensors of the
parameters' shapes or joins them. Parameters come in the order of ``model.named_parameters()``,
each flattened in row-major order; a parameter that is tied or used several times counts once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn

from curvlib.core.ranks.spread import Spread

#: What selects parameters: globs on their names, modules, or the tensors themselves.
ParamSelection = str | nn.Module | Tensor | Iterable[str | nn.Module | Tensor] | None


@dataclass(frozen=True)
class ParamSpace:
    """The flat space of some named parameters.

    Attributes:
        names: Name of each parameter, in order.
        shapes: Shape of each parameter.
        dtypes: Type of each parameter.
        dtype: Type of the flat vectors: float64 for float64 parameters, else float32.
        device: Where parameters and vectors live.
        spread: Which rows of the vectors are here where parameters are sharded; shapes, sizes and
            flat vectors are then those of this rank's slices.

    Example:
        >>> import torch
        >>> space = ParamSpace.of(torch.nn.Linear(2, 3))
        >>> space.names, space.size
        (('weight', 'bias'), 9)
        >>> [tuple(t.shape) for t in space.split(torch.arange(9.0))]
        [(3, 2), (3,)]
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: torch.device
    spread: Spread | None = None

    @classmethod
    def of(cls, model: nn.Module, params: ParamSelection = None) -> ParamSpace:
        """The space of a model's parameters, or of a selection of them: see :func:`select`."""
        return cls.from_named(select(model, params))

    @classmethod
    def from_named(cls, named: dict[str, Tensor]) -> ParamSpace:
        """The space of some named tensors.

        Raises:
            TypeError: If a parameter is not real floating-point, or types mix float32 or half
                precision with float64.
            ValueError: If there is none, or they live on several devices.
        """
        if not named:
            raise ValueError(
                "no parameter is selected; the model has none that requires a gradient, "
                "or params= selects none"
            )
        for name, p in named.items():
            if not p.dtype.is_floating_point:
                raise TypeError(
                    f"parameter {name!r} has type {p.dtype}; curvature is defined here for real "
                    "floating-point parameters: leave it out with params="
                )
        devices = {p.device for p in named.values()}
        if len(devices) > 1:
            raise ValueError(
                f"parameters live on several devices ({sorted(map(str, devices))}); move the model "
                "to one with model.to(device), or select those of one device with params="
            )
        dtypes = {p.dtype for p in named.values()}
        if torch.float64 in dtypes and len(dtypes) > 1:
            raise TypeError(
                f"parameters mix {sorted(map(str, dtypes))}; curvlib never casts float64 silently: "
                "use model.double() or model.float()"
            )
        return cls(
            names=tuple(named),
            shapes=tuple(tuple(p.shape) for p in named.values()),
            dtypes=tuple(p.dtype for p in named.values()),
            dtype=torch.float64 if torch.float64 in dtypes else torch.float32,
            device=next(iter(devices)),
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """``P``, the length of a flat vector."""
        return sum(self.sizes)

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """Where each parameter ends in a flat vector."""
        return tuple(accumulate(self.sizes))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """The place of each parameter among all."""
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def _whole(self) -> ParamSpace:
        if self.spread is None:
            return self
        shapes = tuple(part.shape for part in self.spread.slices)
        return replace(self, shapes=shapes, spread=None)

    @property
    def total(self) -> int:
        """``P``, of the whole vector where ranks hold rows of it; else as :attr:`size`."""
        return self.size if self.spread is None else self.spread.size

    def whole(self) -> ParamSpace:
        """The space of whole vectors: itself, where parameters are not sharded."""
        return self._whole

    def gather(self, flat: Tensor) -> Tensor:
        """The whole vector ``[P]`` or block ``[P, K]`` on every rank, from each rank's rows.

        The order is that of one process. Where parameters are not sharded, the vector itself.

        Raises:
            ValueError: If the length does not fit.
        """
        if self.spread is None:
            self.split(flat)  # checks the length
            return flat
        return self.spread.gather(flat)

    def scatter(self, whole: Tensor) -> Tensor:
        """This rank's rows of a whole vector ``[P]`` or block ``[P, K]``: see :meth:`gather`.

        Raises:
            ValueError: If the length does not fit.
        """
        if self.spread is None:
            self.split(whole)  # checks the length
            return whole
        return self.spread.scatter(whole)

    def norm(self, flat: Tensor) -> float:
        """Euclidean norm of a vector, of all ranks' rows together."""
        if self.spread is None:
            return float(torch.linalg.vector_norm(flat))
        square = torch.linalg.vector_norm(flat).double().square()
        return float(self.spread.sum(square).sqrt())

    def whole_slice(self, name: str) -> slice:
        """Where the parameter ``name`` lies in a whole vector, also where ranks hold rows of it.

        Raises:
            ValueError: If there is no parameter of that name.
        """
        return self._whole.slice(name)

    def slice(self, name: str) -> slice:
        """Where the parameter ``name`` lies in a flat vector.

        Raises:
            ValueError: If there is no parameter of that name.
        """
        number = self._numbers.get(name)
        if number is None:
            raise ValueError(f"no parameter is named {name!r}; there are {list(self.names)}")
        stop = self._ends[number]
        return slice(stop - self.sizes[number], stop)

    def at(self, entry: int) -> tuple[str, int]:
        """The parameter that has an entry of a flat vector, and which of its entries it is.

        Raises:
            ValueError: If the vector has no such entry.
        """
        if not 0 <= entry < self.size:
            raise ValueError(f"a flat vector of length {self.size} has no entry {entry}")
        number = bisect_right(self._ends, entry)
        return self.names[number], entry - (self._ends[number] - self.sizes[number])

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Names of the parameters of each layer: the module that owns them, by its name."""
        out: dict[str, tuple[str, ...]] = {}
        for name in self.names:
            layer = name.rpartition(".")[0] or name
            out[layer] = (*out.get(layer, ()), name)
        return out

    def empty(self, columns: int | None = None) -> Tensor:
        """A new flat vector ``[P]``, or a column-contiguous block ``[P, K]``, not filled."""
        shape = (self.size,) if columns is None else (columns, self.size)
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        return out if columns is None else out.mT

    def split(self, flat: Tensor) -> list[Tensor]:
        """Splits ``[P]`` into the parameters' shapes, or ``[P, K]`` into ``[K, *shape]``.

        The columns of a block become the *leading* axis, which is what batched derivatives
        take. The parts are views where ``flat`` is column-contiguous, in the vectors' dtype.

        Raises:
            ValueError: If the length is not ``P``.
        """
        if flat.shape[0] != self.size:
            raise ValueError(
                f"expected a flat vector of length {self.size}, got {list(flat.shape)}"
            )
        rows = flat if flat.ndim == 1 else flat.mT.contiguous()
        parts = torch.split(rows, list(self.sizes), dim=-1)
        return [
            p.reshape((*flat.shape[1:], *shape))
            for p, shape in zip(parts, self.shapes, strict=True)
        ]

    def join(self, parts: Sequence[Tensor | None], *, columns: int | None = None) -> Tensor:
        """Joins the parameters' shapes into ``[P]``, or ``[K, *shape]`` into ``[P, K]``.

        Args:
            parts: One tensor for each parameter; ``None`` stands for zeros.
            columns: ``K`` for blocks; ``None`` for a single vector.

        Returns:
            A flat vector or a column-contiguous block, in the vectors' dtype.
        """
        out = self.empty(columns)
        self.write(parts, out)
        return out

    def join_with_graph(self, parts: Sequence[Tensor | None]) -> Tensor:
        """Joins like :meth:`join` into ``[P]``, on the graph of the parts."""
        zeros = torch.zeros((), dtype=self.dtype, device=self.device)
        flat = [
            zeros.expand(size) if part is None else part.reshape(-1).to(self.dtype)
            for part, size in zip(parts, self.sizes, strict=True)
        ]
        return torch.cat(flat)

    def write(
        self,
        parts: Sequence[Tensor | None],
        out: Tensor,
        *,
        scale: float = 1.0,
        add: bool = False,
    ) -> None:
        """Writes (or adds) ``scale`` times some joined parts into ``out``: see :meth:`join`.

        Args:
            parts: One tensor for each parameter; ``None`` stands for zeros.
            out: ``[P]`` or ``[P, K]``, in the vectors' dtype.
            scale: Factor of the parts.
            add: Whether to add to what ``out`` holds.
        """
        rows = out if out.ndim == 1 else out.mT
        pieces = torch.split(rows, list(self.sizes), dim=-1)
        for piece, part in zip(pieces, parts, strict=True):
            if part is None:
                if not add:
                    piece.zero_()
                continue
            flat = part.detach().reshape(piece.shape)
            if add:
                piece.add_(flat, alpha=scale)
            elif scale == 1.0:
                piece.copy_(flat)
            else:
                torch.mul(flat.to(piece.dtype), scale, out=piece)

    def restrict(self, names: Iterable[str]) -> ParamSpace:
        """The space of some of the parameters, in this space's order."""
        chosen = set(names)
        keep = [i for i, n in enumerate(self.names) if n in chosen]
        if len(keep) != len(chosen):
            raise ValueError(f"no parameters are named {sorted(chosen - set(self.names))}")
        return ParamSpace(
            tuple(self.names[i] for i in keep),
            tuple(self.shapes[i] for i in keep),
            tuple(self.dtypes[i] for i in keep),
            self.dtype,
            self.device,
            None if self.spread is None else self.spread.restrict(keep),
        )


def select(model: nn.Module, params: ParamSelection = None) -> dict[str, Tensor]:
    """Selects parameters of a model, by name.

    Args:
        model: The model. Parameters that are tied appear once, under their first name.
        params: ``None`` for all that require a gradient; else name globs (``"blocks.*.attn.*"``),
            modules, tensors, or a list that mixes them. Globs and modules take only parameters
            that require a gradient; a tensor is taken even when it is frozen. What is selected
            twice counts once.

    Returns:
        Parameters by name, in the order of ``model.named_parameters()``.

    Raises:
        TypeError: If an item is neither glob, module nor tensor.
        ValueError: If an item selects nothing, or does not belong to the model.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> list(select(model, "1.*"))
        ['1.weight', '1.bias']
        >>> list(select(model, [model[0].bias, model[1]]))
        ['0.bias', '1.weight', '1.bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    aliases = [(clean_name(n), p) for n, p in model.named_parameters(remove_duplicate=False)]
    for name, p in aliases:
        if nn.parameter.is_lazy(p):
            raise ValueError(
                f"parameter {name!r} of a lazy module has no shape yet; call the model once on a "
                "batch before you make the risk"
            )
    first: dict[int, str] = {}
    for name, p in aliases:
        first.setdefault(id(p), name)
    by_id = {id(p): p for _, p in aliases}
    if params is None:
        return {n: by_id[i] for i, n in first.items() if by_id[i].requires_grad}
    items = [params] if isinstance(params, (str, nn.Module, Tensor)) else list(params)
    chosen: set[int] = set()
    for item in items:
        chosen |= _match(item, aliases, first)
    return {n: by_id[i] for i, n in first.items() if i in chosen}


def _match(
    item: str | nn.Module | Tensor, aliases: list[tuple[str, nn.Parameter]], first: dict[int, str]
) -> set[int]:
    if isinstance(item, Tensor):
        if id(item) not in first:
            raise ValueError(
                f"a tensor of shape {list(item.shape)} in params= is no parameter of the model; "
                "pass the parameter object itself, not a copy or a view"
            )
        return {id(item)}
    if isinstance(item, nn.Module):
        found = {id(p): p for p in item.parameters()}
        if not found.keys() <= first.keys():
            raise ValueError(
                f"module {type(item).__name__} in params= has parameters that are not the model's"
            )
        what = f"module {type(item).__name__}"
    elif isinstance(item, str):
        found = {id(p): p for n, p in aliases if fnmatchcase(n, item)}
        what = f"{item!r}"
    else:
        raise TypeError(
            "params= takes name globs, modules and tensors, "
            f"got an item of type {type(item).__name__}"
        )
    if not found:
        raise ValueError(f"{what} in params= selects nothing; there are {list(first.values())}")
    trainable = {i for i, p in found.items() if p.requires_grad}
    if not trainable:
        raise ValueError(
            f"{what} in params= selects frozen parameters only; pass the tensors themselves "
            "to include frozen parameters, or set requires_grad"
        )
    return trainable


def clean_name(name: str) -> str:
    """Names without the prefix that ``torch.compile`` adds."""
    return name.replace("_orig_mod.", "")
