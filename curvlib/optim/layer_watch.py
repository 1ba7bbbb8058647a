"""Watches the layers of a model for an optimizer, in the steps that take curvature in."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from curvlib.core.ranks.places import reshard
from curvlib.operators.coverage import Coverage, coverage_of
from curvlib.operators.layers.factored import FactoredLayer
from curvlib.operators.layers.recorded import Recorded
from curvlib.operators.layers.recorder import LayerRecorder
from curvlib.optim.layer_places import LayerPlaces
from curvlib.optim.sharding import Sharding


class LayerWatch:
    """A recorder of the layers of the parameters that train, made anew when others do.

    Args:
        model: The model.
        take: A method that takes each pass; its owner is not kept alive.
        unfit: Why a layer is of no use, or nothing.
        options: Of :class:`~curvlib.operators.layers.recorder.LayerRecorder`.

    Attributes:
        layers: Layers of use, by name; none before a parameter has required a gradient.
        places: Where their matrices lie.
        unfit: Why parameters of other layers are in none, by name of the parameter.

    Example:
        >>> import torch
        >>> class Owner:
        ...     def take(self, found):
        ...         print(found.uses[0].x.shape)
        >>> owner, model = Owner(), nn.Linear(2, 1)
        >>> watch = LayerWatch(model, owner.take)
        >>> watch.follow(list(model.parameters()), on=True)
        >>> model(torch.ones(3, 2)).sum().backward()
        >>> watch.hand_over()
        torch.Size([3, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        take: Callable[[Recorded], None],
        unfit: Callable[[FactoredLayer], str] | None = None,
        **options: Any,
    ) -> None:
        self.model = model
        self.options = options
        self.layers: dict[str, FactoredLayer] = {}
        self.unfit: dict[str, str] = {}
        self.places: dict[str, LayerPlaces] = {}
        self._judge = unfit
        self._take = weakref.WeakMethod(take)
        self._recorder: LayerRecorder | None = None

    @property
    def recorder(self) -> LayerRecorder:
        """The recorder.

        Raises:
            RuntimeError: If no parameter has required a gradient yet.
        """
        if self._recorder is None:
            raise RuntimeError(
                "no parameter of the optimizer has required a gradient yet, so no layer is "
                "watched; set requires_grad_() of some, and take a step"
            )
        return self._recorder

    def follow(
        self,
        params: Sequence[Tensor],
        *,
        on: bool,
        seed: int = 0,
        draw: int = 0,
        sharding: Sharding | None = None,
    ) -> None:
        """Watches the layers of some parameters, or (``on=False``) takes the hooks off.

        Other parameters than before count from the next time on that it watches.

        Args:
            params: Those that require gradients.
            on: Whether to watch.
            seed: Of sampled labels.
            draw: How often they were drawn before.
            sharding: How parameters are cut, if they are.

        Raises:
            ValueError: If a parameter is not the model's, or the model is compiled.
        """
        old = self._recorder
        if params and (old is None or (on and not _same(params, old.params.values()))):
            reshard(self.model)  # that it has the parameters which the optimizer holds
            made = LayerRecorder(self.model, list(params), sink=self._sink(), **self.options)
            self._recorder = made
            reasons = {own.name: self._judge(own) if self._judge else "" for own in made.layers}
            self.layers = {own.name: own for own in made.layers if not reasons[own.name]}
            self.unfit = {n: reasons[own.name] for own in made.layers for n in own.names}
            self.unfit = {name: reason for name, reason in self.unfit.items() if reason}
            self.places = {key: LayerPlaces(own, made.space) for key, own in self.layers.items()}
            if old is not None:
                old.close()
        if self._recorder is not None:
            self._recorder.seed, self._recorder.draw = seed, draw
            self._recorder.lending = nullcontext if sharding is None else sharding.lending
            (self._recorder.start if on and self.layers else self._recorder.stop)()

    def hand_over(self) -> None:
        """Hands over the passes whose gradients have come."""
        if self._recorder is not None:
            self._recorder.hand_over()

    def forget(self) -> None:
        """Forgets them, for they are set to zero."""
        if self._recorder is not None:
            self._recorder.forget_reached()

    def coverage(self, reasons: Mapping[str, str]) -> Coverage:
        """The coverage of the parameters, all but those that have a reason.

        Args:
            reasons: By name of the layer, besides those that are known before.
        """
        recorder, more = self.recorder, {}
        reshard(self.model)
        for name, reason in reasons.items():
            more.update(dict.fromkeys(self.layers[name].names, reason))
        return coverage_of(self.model, recorder.params, recorder.uncovered | self.unfit | more)

    def _sink(self) -> Callable[[Recorded], None]:
        own = self._take

        def sink(found: Recorded) -> None:
            take = own()
            if take is not None:
                take(found)

        return sink


def _same(params: Sequence[Tensor], others: Any) -> bool:
    return {*map(id, params)} == {*map(id, others)}


def none_seen(method: str) -> RuntimeError:
    """The error of a method whose recorder has met no layer when a step is due."""
    return RuntimeError(
        f"{method} has no curvature yet: no layer of the model that it was given was called with "
        "gradients since; call that model (or its layers), not a copy, not compiled, "
        "and checkpointed with use_reentrant=False if at all"
    )
