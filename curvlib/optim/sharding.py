r"""Sharded parameters (FSDP2) in optimizers: a rank steps its slices, and keeps the state of them.

With ``fully_shard``, parameters are ``DTensor``, of which rank :math:`r` holds a slice
:math:`\theta_r`; the gradient that FSDP2 leaves in ``.grad`` is the mean over ranks, likewise cut.
What an optimizer does entry by entry it does on slices, and what it sums over entries it sums over
ranks.

FSDP2's own hooks free parameters that a second derivative needs. A pass whose curvature is read
goes through the model with them off (:mod:`curvlib.core.ranks.sharded`), so that
``torch.autograd.grad`` by the slices gives sums over ranks, to any order; a
``MixedPrecisionPolicy`` is not applied then. All other passes are FSDP2's own, also those in which
layers are watched.

In ``state_dict()``, what is cut like a parameter is a ``DTensor`` too, so that
``torch.distributed.checkpoint`` writes each rank's slice, and any number of ranks reads them (into
an optimizer that has taken a step, so that there is room).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvlib.core.ranks.dtensors import is_fsdp, is_sharded, slice_of
from curvlib.core.ranks.group import group_of
from curvlib.core.ranks.places import UNFOLLOWED, Place, follow, place_of, places_of
from curvlib.core.ranks.sharded import gathering, lending
from curvlib.core.ranks.spread import Spread
from curvlib.operators.graphs import ends_in, reentrant


class Sharding:
    """The slices of an optimizer's parameters, all of which are sharded over the same ranks.

    Args:
        params: The parameters, in the optimizer's order.
        process_group: The ranks; those of the parameters' mesh when omitted.

    Attributes:
        group: The ranks; ``None`` for one.
        places: Of each parameter.
        active: Whether passes gather parameters at present.

    Raises:
        ValueError: If a parameter is whole, or cut otherwise than along one axis over all ranks.
    """

    def __init__(
        self, params: Sequence[Any], process_group: dist.ProcessGroup | None = None
    ) -> None:
        for i, p in enumerate(params):
            if not is_sharded(p):
                raise ValueError(
                    f"{UNFOLLOWED}: parameter {i} is whole on every rank beside sharded ones; "
                    "leave it out, or shard it too (no ignored_params= of fully_shard; after a "
                    "forward pass without a backward pass, call model.reshard())"
                )
        mesh = params[0].device_mesh
        if process_group is None and mesh.ndim == 1:
            process_group = mesh.get_group()
        self.process_group = process_group
        self.group = group_of(process_group)
        self.params = list(params)
        self.places = [place_of(str(i), p, self.group) for i, p in enumerate(params)]
        self.active = False
        self._used: set[int] = set()  # by the last block
        # with what else the model has, once it is known
        self._held = {id(p): (p, place) for p, place in zip(params, self.places, strict=True)}

    # --------------------------------------------------------------------- slices
    def own(self, param: Tensor) -> Tensor:
        """This rank's slice of a parameter, in its memory."""
        return self._held[id(param)][1].leaf

    def place(self, key: int) -> Place:
        """Where a parameter lies, by its ``id``."""
        return self._held[key][1]

    def spread(self, numbers: Iterable[int]) -> Spread | None:
        """How rows over ranks lie that are made up of some of the parameters."""
        if self.group is None:
            return None
        return Spread(tuple(self.places[i].slices for i in numbers), self.group)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over ranks of what each knows of its slices; the same bits on each."""
        spread = self.spread(())
        return numbers if spread is None else spread.sum(numbers)

    def every(self, true: bool) -> bool:
        """Whether something is true on every rank."""
        return true if self.group is None else not self.group.most([float(not true)])[0]

    def follow(self) -> None:
        """Finds slices again whose memory FSDP2 has moved, and takes over gradients.

        Raises:
            RuntimeError: If passes gather parameters, which would not be seen to change.
        """
        if self.active:
            raise RuntimeError(
                "a step changes parameters that this block has gathered; end it before the step: "
                "with opt.gathering(): opt.backward(loss_of(model)), and then opt.step()"
            )
        for p, place in self._held.values():
            follow(p, place)
        self.take_gradients()

    # --------------------------------------------------------------------- passes
    def include(self, model: nn.Module) -> None:
        """Takes in the other sharded parameters of a model; frees what is gathered in it.

        Raises:
            ValueError: If one is cut otherwise, or a module is tensor-parallel.
        """
        found = places_of(model, self.group)
        for p in model.parameters():
            if id(p) in found and id(p) not in self._held:
                self._held[id(p)] = (p, found[id(p)])

    @contextmanager
    def lending(self) -> Iterator[None]:
        """A block in which a module's parameters can be gathered outside of a pass.

        See :func:`curvlib.core.ranks.sharded.whole_in`. Ranks enter it together.
        """
        for p, place in self._held.values():
            follow(p, place)
        with lending({key: place for key, (_, place) in self._held.items()}):
            yield

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """A block whose passes gather parameters, and can be differentiated to any order."""
        if self.active:
            yield
            return
        model = modules_of(self.params)
        self.include(model)
        for p, place in self._held.values():
            follow(p, place)
            place.leaf.requires_grad_(p.requires_grad)
        self.active = True
        try:
            with gathering(model, {key: place for key, (_, place) in self._held.items()}) as mode:
                self._used = mode.used
                yield
        except BaseException:
            self.forget_gradients()
            raise
        finally:
            self.active = False
        self.take_gradients()

    def require_gathered(self, loss: Tensor) -> None:
        """Raises RuntimeError if a loss went through FSDP2's own passes, or its block has ended."""
        own = [place.leaf for _, place in self._held.values()]
        if not self.active or not (ends_in(loss, own) or reentrant(loss)):
            raise RuntimeError(
                "FSDP2's hooks free parameters that second derivatives need, and this step reads "
                "curvature; use opt.step(lambda: loss), or compute the loss and call "
                "opt.backward(loss) in a block: with opt.gathering(): ..."
            )

    def take_gradients(self) -> None:
        """Adds the gradients of slices, sums over ranks, to ``.grad``, which holds means."""
        for p, place in self._held.values():
            total, place.leaf.grad = place.leaf.grad, None
            if total is None or id(p) not in self._used:
                continue  # of what is gathered with others, zeros come back
            mean = total if self.group is None else total / self.group.size
            if p.grad is None:
                p.grad = _shared(p, place, mean, 0)
            else:
                slice_of(p.grad).add_(mean)

    def forget_gradients(self) -> None:
        """Drops gradients of slices that were not taken over."""
        for _, place in self._held.values():
            place.leaf.grad = None

    # ---------------------------------------------------------------------- state
    def shared(self, number: int, value: Any, lead: int = 0) -> Any:
        """A value of a parameter's state: as a ``DTensor`` if it is a tensor that is cut likewise.

        Args:
            number: Of the parameter.
            value: The value, whose memory is shared.
            lead: How many axes more it has, in front.
        """
        return _shared(self.params[number], self.places[number], value, lead)

    def owned(self, number: int, value: Any, lead: int = 0) -> Any:
        """This rank's part of such a value, be it a ``DTensor`` or whole.

        Raises:
            ValueError: If it is spread over other ranks.
        """
        param, place = self.params[number], self.places[number]
        if is_sharded(value):
            if value.device_mesh.mesh.tolist() != param.device_mesh.mesh.tolist():
                raise ValueError(
                    f"the state of parameter {number} is spread over ranks "
                    f"{value.device_mesh.mesh.tolist()}, and the parameter over "
                    f"{param.device_mesh.mesh.tolist()}; torch.distributed.checkpoint reads states "
                    "for other numbers of ranks than wrote them"
                )
            return slice_of(value)
        axis = place.slices.dim + lead
        whole = len(place.slices.shape) + lead
        if not isinstance(value, Tensor) or value.ndim != whole or self.group is None:
            return value
        if value.shape[axis] != place.slices.shape[place.slices.dim]:
            return value
        first, last = place.slices.bounds(self.group.rank, self.group.size)
        return value.narrow(axis, first, last - first)


def sharding_of(
    params: Sequence[Tensor], process_group: dist.ProcessGroup | None, needs: str = ""
) -> Sharding | None:
    """The slices of an optimizer's parameters; ``None`` if they are whole.

    Args:
        params: The parameters.
        process_group: What the user passed for it.
        needs: Name of a method that needs them whole.

    Raises:
        ValueError: If they are cut in a way that is not followed.
    """
    cut = [i for i, p in enumerate(params) if is_sharded(p)]
    if cut and needs:
        raise ValueError(
            f"{UNFOLLOWED}: parameter {cut[0]} is a DTensor, and {needs} needs it whole; wrap the "
            "model in DistributedDataParallel, or use an optimizer of curvlib.optim"
        )
    return Sharding(params, process_group) if cut else None


def modules_of(params: Iterable[Tensor]) -> nn.ModuleList:
    """The modules of FSDP2 whose parameters these are, with those around them."""
    from torch.distributed._composable_state import _module_state_mapping

    wanted = {id(p) for p in params}
    every: list[Any] = [module for module in list(_module_state_mapping) if is_fsdp(module)]
    own = set()
    for module in every:
        if any(id(p.sharded_param) in wanted for p in _fsdp_params(module)):
            own.add(module)
    return nn.ModuleList([module for module in every if own & set(module.modules())])


def _fsdp_params(module: Any) -> list[Any]:
    """What FSDP2 itself manages of a module: in one group, or since torch 2.13 in several."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [p for group in groups if group is not None for p in group.fsdp_params]


def _shared(param: Any, place: Place, value: Any, lead: int) -> Any:
    slices = place.slices
    axis = slices.dim + lead
    if not isinstance(value, Tensor) or value.ndim != len(slices.shape) + lead:
        return value
    if value.shape[axis] != place.leaf.shape[slices.dim]:
        return value
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size([*value.shape[:axis], slices.shape[slices.dim], *value.shape[axis + 1 :]])
    return DTensor.from_local(
        value.detach(),
        param.device_mesh,
        [Shard(axis)],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
