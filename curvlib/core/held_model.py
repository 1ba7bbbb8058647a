"""A model as a function of chosen parameters: whole or sharded, and left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvlib.core import forward as passes
from curvlib.core.owners import Owners
from curvlib.core.ranks import places, sharded
from curvlib.core.ranks.bundles import Bundle
from curvlib.core.ranks.group import Group
from curvlib.core.space import ParamSelection, ParamSpace, select

T = TypeVar("T")


class HeldModel:
    """A model, and where the parameters are that a risk depends on.

    Args:
        model: The model, not compiled.
        params: Which parameters.
        group: The ranks over which parameters may be sharded; ``None`` for one process.

    Attributes:
        model: The model.
        held: Its own parameters, by name: ``DTensor`` where they are sharded.
        params: What is differentiated, by name: those parameters, or slices of them.
        places: Where the values of sharded parameters are, by the parameters' ``id``.
        space: The parameters as flat vectors.

    Raises:
        ValueError: If nothing is selected, or the model is sharded in a way that is not followed.
    """

    def __init__(self, model: nn.Module, params: ParamSelection, group: Group | None) -> None:
        self.model = model
        self.held = select(model, params)
        self.places: dict[int, places.Place] = {}
        if places.has_sharded(model):
            self.places = places.places_of(model, group)
            self.held = select(model, params)  # what resharding has put back
        self.params = {name: self._leaf(p) for name, p in self.held.items()}
        spread = places.spread_of(self.held, self.places)
        self.space = replace(ParamSpace.from_named(self.params), spread=spread)
        self.regather: sharded.Regather | None = None  # during a pass over sharded parameters
        self._group = group
        self._holder = passes.Holder(model)
        owners = Owners(model)
        self._owners = [
            (module, key, name) for name, p in self.held.items() for module, key in owners.of(p)
        ]

    def _leaf(self, param: Tensor) -> Tensor:
        place = self.places.get(id(param))
        return param if place is None else place.leaf.requires_grad_()

    def untouched(
        self, device: torch.device, *, first_order: bool = False
    ) -> AbstractContextManager[None]:
        """See :func:`curvlib.core.forward.arranged`.

        Raises:
            RuntimeError: If a parameter of the model was replaced since.
        """
        if self.places:
            places.refresh(self.model, self.places)
        for module, key, name in self._owners:
            if module._parameters.get(key) is not self.held[name]:
                raise RuntimeError(
                    f"parameter {name!r} was replaced by another tensor since this risk was made "
                    "(by assignment, or load_state_dict(assign=True)); make a new Risk"
                )
        return passes.arranged(self.model, self.held, device, first_order=first_order)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """A block in which forward passes may use sharded parameters."""
        if not self.places:
            yield
            return
        with sharded.gathering(self.model, self.places) as self.regather:
            try:
                yield
            finally:
                self.regather = None

    def replaced(self, params: Mapping[str, Tensor], function: Callable[[], Any]) -> Any:
        """Calls a function while parameters have other values, by their names."""
        if self.places:
            assert self.regather is not None  # or Risk.call() has refused
            with self.regather.instead({id(self.held[n]): v for n, v in params.items()}):
                return function()
        raw = {id(p): name for name, p in self._holder.named_parameters()}
        values = {raw[id(self.params[name])]: value for name, value in params.items()}
        return torch.func.functional_call(self._holder, values, (lambda _: function(),))

    def with_whole(self, params: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Entered within :meth:`gathering`: some parameters have whole values, each rank its own.

        Derivatives by them are those of this rank's batch alone.
        """
        assert self.regather is not None
        values = {id(self.held[name]): value for name, value in params.items()}
        return self.regather.instead(values, whole=True)

    def bytes_saved(self, build: Callable[[], T]) -> tuple[T, int]:
        """A graph of sharded parameters, and the bytes that it holds, the most of any rank."""
        assert self.regather is not None
        before = self.regather.saved
        graph = build()
        size = self.regather.saved - before
        return graph, size if self._group is None else int(self._group.most([size])[0])

    def whole(self, param: Tensor) -> Tensor:
        """A parameter of the model as a plain tensor, gathered where it is sharded."""
        place = self.places.get(id(param))
        if place is None:
            return param
        if place.group is None:
            return place.leaf.detach()
        return Bundle((place.slices,), place.group).gathered([place.leaf.detach()])[0]

    def require_whole(self, what: str) -> None:
        """Raises ValueError if parameters are sharded, for a function that does not follow that."""
        if self.places:
            raise ValueError(
                f"{places.UNFOLLOWED}: the parameters are sharded, and {what} needs them whole. "
                "risk.value(), risk.gradient(), curvlib.hessian, curvlib.ggn, curvlib.fisher, "
                "curvlib.kfac, influence and windows follow them; for others, load the parameters "
                "into a model without fully_shard"
            )
