r"""Passes of models whose parameters are sharded (FSDP2, ``distribute_tensor``), to any order.

Where a model uses a parameter, its slices are gathered, with those of its bundle, by a function
whose derivatives exist to any order (:mod:`curvlib.core.ranks.bundles`), and freed when two others
are in use: ``torch.autograd.grad`` on all ranks together differentiates the *sum over ranks* of
what each computes from its batch, and gives slices.

A graph saves no gathered parameter: it remembers which one it was
(``torch.autograd.graph.saved_tensors_hooks``), and gathers it again where a backward pass needs it,
as FSDP does. FSDP2's own hooks, which free parameters that a second derivative needs and reduce
gradients into ``.grad``, are off during a pass; a ``MixedPrecisionPolicy`` is thereby not applied.

Memory of a rank beside activations: its slices, and two bundles whole, neither larger than the
largest parameter. Traffic: a pass sends each parameter's :math:`s` bytes :math:`(R - 1) / R` times

=====================  =============================================
gradient               3: gathered forward and backward, summed once
Hessian, K columns     about :math:`5 + 2 K`
GGN, K columns         about :math:`5 + 3 K`
=====================  =============================================

Ranks have to use the same bundles in the same order, as FSDP asks too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from curvlib.core.ranks.bundles import Bundle, bundled, gather
from curvlib.core.ranks.places import Place

#: What is asked of a parameter without its values.
_WITHOUT_VALUES = frozenset({"size", "dim", "numel", "stride", "is_floating_point", "is_complex"})
#: Attributes of a tensor that are made of its values.
_VALUES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
#: Functions within which modules may run that are checkpointed.
_BACKWARD = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
_HOOKS = ("torch.distributed.fsdp", "torch.distributed._composable")


class Regather(TorchFunctionMode):
    """Puts gathered values in the place of sharded parameters, wherever a function takes one.

    Attributes:
        saved: Bytes that graphs have saved.
        used: Parameters that functions took, by ``id``. Others of their bundles have gradients too,
            of zeros.
    """

    def __init__(self, places: Mapping[int, Place]) -> None:
        super().__init__()
        self.saved = 0
        self.used: set[int] = set()
        self.suspended = False  # by torch.autograd.grad, as modes are while a function runs
        self._whole: dict[StorageWeakRef, _Member] = {}  # gathered tensors that are alive, or were
        self._kept = _Kept()
        self._set(places)

    def _set(self, places: Mapping[int, Place]) -> None:
        self._places = dict(places)
        self._members: dict[int, _Member] = {}
        cut = [(i, p.slices, p.leaf) for i, p in places.items() if p.group is not None]
        for numbers in bundled(cut):
            some = [self._places[number] for number in numbers]
            assert some[0].group is not None
            bundle = Bundle(tuple(place.slices for place in some), some[0].group)
            leaves = tuple(place.leaf for place in some)
            for at, number in enumerate(numbers):
                self._members[number] = _Member(bundle, leaves, at)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Forwards the call, with gathered values."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _WITHOUT_VALUES:
            return func(*args, **kwargs)
        if name in ("__get__", "__set__"):
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if name == "__set__" or attribute not in _VALUES:
                return func(*args, **kwargs)
        if func in _BACKWARD:
            self._kept.clear()
            self.suspended = True
            try:
                return func(*args, **kwargs)
            finally:
                self.suspended = False
                self._kept.clear()
        return func(*tree_map(self._value, args), **tree_map(self._value, kwargs))

    @contextmanager
    def resumed_in(self, model: nn.Module) -> Iterator[None]:
        """A block in which modules that run within a backward pass (checkpointing) gather too."""
        entered: list[bool] = []

        def before(*_: Any) -> None:
            entered.append(self.suspended)
            if self.suspended:
                self.suspended = False
                self.__enter__()  # type: ignore[no-untyped-call]

        def after(*_: Any) -> None:
            if entered.pop():
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                self.suspended = True

        handles: list[Any] = []
        try:
            for module in model.modules():
                handles.append(module.register_forward_pre_hook(before, prepend=True))
                handles.append(module.register_forward_hook(after, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _value(self, item: Any) -> Any:
        place = self._places.get(id(item)) if isinstance(item, Tensor) else None
        if place is None:
            return item
        self.used.add(id(item))
        if place.group is None:
            return place.leaf
        member = self._members[id(item)]
        graph = torch.is_grad_enabled()
        return self._gathered(member, graph, lambda: gather(member.bundle, member.leaves))

    def _gathered(
        self, member: _Member, graph: bool, work: Callable[[], Sequence[Tensor]]
    ) -> Tensor:
        """A whole tensor, gathered with its bundle unless that was done just now."""
        every = self._kept.get(member.bundle, graph)
        if every is None:
            every = self._kept.put(member.bundle, graph, work())
            if len(self._whole) > 1024:
                self._whole = {ref: p for ref, p in self._whole.items() if not ref.expired()}
            for at, whole in enumerate(every):
                storage = StorageWeakRef(whole.untyped_storage())
                self._whole[storage] = _Member(member.bundle, member.leaves, at)
        return every[member.at]

    @contextmanager
    def whole_in(self, module: nn.Module) -> Iterator[None]:
        """A block in which a module has plain parameters, gathered, in the place of sharded ones.

        They carry no gradient. For functions that this mode does not see.
        """
        with torch.no_grad():
            found = [
                (table, key, held, self._value(held).detach())
                for table in (m._parameters for m in module.modules())
                for key, held in table.items()
                if id(held) in self._places
            ]
        try:
            for table, key, _, value in found:
                table[key] = value
            yield
        finally:
            for table, key, held, _ in found:
                table[key] = held

    @contextmanager
    def instead(self, values: Mapping[int, Tensor], *, whole: bool = False) -> Iterator[None]:
        """A block in which parameters, by ``id``, have other slices, or whole values."""
        before = self._places
        moved = {
            i: Place(v, before[i].slices, None if whole else before[i].group)
            for i, v in values.items()
        }
        self._set(before | moved)
        try:
            yield
        finally:
            self._set(before)

    def pack(self, tensor: Tensor) -> Any:
        """What a graph keeps of a tensor: of views of gathered parameters, how to make them."""
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # a batch of columns
            return tensor
        member = self._whole.get(StorageWeakRef(storage))
        if member is None:
            self.saved += storage.nbytes()
            return tensor.detach()  # what is its graph's own result would keep the graph alive
        return member, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(self, kept: Any) -> Tensor:
        """The tensor that :meth:`pack` was given."""
        if isinstance(kept, Tensor):
            return kept
        member, size, stride, offset = kept
        with torch.no_grad():
            own = [leaf.detach() for leaf in member.leaves]
            whole = self._gathered(member, False, lambda: member.bundle.gathered(own))
            return whole.as_strided(size, stride, offset)


@dataclass(frozen=True, eq=False)
class _Member:
    """A parameter of a bundle, by its place in it, with the slices of all."""

    bundle: Bundle
    leaves: tuple[Tensor, ...]
    at: int


class _Kept:
    """The whole tensors of the last two bundles: one in use, and one beside it."""

    def __init__(self) -> None:
        self._found: dict[tuple[Bundle, bool], Sequence[Tensor]] = {}

    def get(self, bundle: Bundle, graph: bool) -> Sequence[Tensor] | None:
        found = self._found.pop((bundle, graph), None)
        if found is not None:
            self._found[bundle, graph] = found  # the last used is the last to go
        return found

    def put(self, bundle: Bundle, graph: bool, wholes: Sequence[Tensor]) -> Sequence[Tensor]:
        self._found[bundle, graph] = wholes
        if len(self._found) > 2:
            del self._found[next(iter(self._found))]
        return wholes

    def clear(self) -> None:
        self._found.clear()


_CURRENT: ContextVar[Regather | None] = ContextVar("regather", default=None)


def whole_in(module: nn.Module) -> AbstractContextManager[None]:
    """:meth:`Regather.whole_in` of the pass that runs, if parameters are sharded in it."""
    mode = _CURRENT.get()
    return nullcontext() if mode is None else mode.whole_in(module)


@contextmanager
def lending(places: Mapping[int, Place]) -> Iterator[None]:
    """A block in which :func:`whole_in` gathers parameters, though no pass runs."""
    token = _CURRENT.set(Regather(places))
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def gathering(model: nn.Module, places: Mapping[int, Place]) -> Iterator[Regather]:
    """A block in which the model's forward pass gathers parameters as it goes."""
    with ExitStack() as stack:
        mode = Regather(places)
        stack.callback(_CURRENT.reset, _CURRENT.set(mode))
        stack.enter_context(_without_sharding_hooks(model))
        stack.enter_context(mode.resumed_in(model))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(mode.pack, mode.unpack))
        stack.enter_context(mode)
        yield mode


@contextmanager
def _without_sharding_hooks(model: nn.Module) -> Iterator[None]:
    """Takes FSDP2's hooks off, and puts them back in their old order."""
    tables = [t for m in model.modules() for t in (m._forward_pre_hooks, m._forward_hooks)]
    before = [(table, list(table.items())) for table in tables if table]
    try:
        for table, hooks in before:
            for key, hook in hooks:
                if (getattr(hook, "__module__", "") or "").startswith(_HOOKS):
                    del table[key]
        yield
    finally:
        for table, hooks in before:
            table.clear()
            table.update(hooks)
