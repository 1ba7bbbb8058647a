r"""Masks that persist: pruned weights stay zero while a model is trained on.

:func:`attach` puts a mask ``<parameter>_keep`` (a boolean buffer) beside each masked parameter, so
that ``state_dict``, ``load_state_dict(strict=True)``, ``.to(device)``, ``copy.deepcopy`` and pickle
carry it. There is one copy of each mask; hooks look it up. Three things then keep weights at zero:

1. A hook on the parameter zeros the gradient of pruned weights as it arrives, that is before it
   is accumulated, averaged over processes by ``DistributedDataParallel``, unscaled or clipped:
   norms of gradients are those of the kept weights.
2. A hook after ``optimizer.step`` zeros pruned weights, and their entries of the optimizer's state
   (momentum, ``exp_avg``, ...): neither momentum from before the mask nor weight decay, nor an
   optimizer that mixes coordinates, revives a weight. State is masked where a tensor has the
   parameter's shape, or, as in L-BFGS, is the flat vector of all parameters.
3. Hooks after ``load_state_dict`` of model and optimizer do the same to what was loaded.

**Without an optimizer**, the second is replaced by a hook before the model's forward pass, which
zeros pruned weights. What holds then: every forward pass through the model (not through a
submodule alone) sees zeros, and gradients of pruned weights are zero. Between a step and the next
forward pass a pruned weight may differ from zero, where the optimizer has momentum from before the
mask or mixes coordinates, and that state is not masked.

Copies and unpickled models carry the masks, but not the hooks on parameters, which PyTorch drops:
``attach(copy, masks_of(copy), optimizer)`` masks them again. Sharded parameters (FSDP) are not
supported; with ``DistributedDataParallel``, attach the same masks on every process.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from curvlib.pruning.masks import Masks, Owner, pruned_to_zero, unwrapped, zero_pruned

#: The buffer beside a parameter has the parameter's name with this at its end.
SUFFIX = "_keep"


class Attachment:
    """What :func:`attach` returns: the masks, until they are removed.

    Attributes:
        model: The model that holds the masks.
    """

    def __init__(
        self,
        model: nn.Module,
        owners: dict[str, Owner],
        hooks: Sequence[RemovableHandle],
        after_steps: Sequence[_AfterStep],
    ) -> None:
        self.model = model
        self._owners = owners
        self._hooks = list(hooks)
        self._after_steps = tuple(after_steps)
        self._removed = False

    @property
    def masks(self) -> Masks:
        """The masks as they are now, copied."""
        self._require_attached()
        return Masks({name: _keep(o).detach().clone() for name, o in self._owners.items()})

    def update(self, masks: Masks) -> None:
        """Replaces the masks by others of the same parameters: the next event of a schedule.

        Nothing is registered anew. Weights that are no longer pruned start from zero.

        Raises:
            ValueError: If the masks are of other parameters or shapes.
            RuntimeError: If the masks were removed.
        """
        self._require_attached()
        if masks.fingerprint() != self.masks.fingerprint():
            raise ValueError(
                f"expected masks of {list(self._owners)} in the same shapes, got "
                f"{[(n, list(m.shape)) for n, m in masks.keep.items()]}; "
                "remove() these and attach the others"
            )
        masks.owners(self.model, allow_tied=True)
        for name, owner in self._owners.items():
            _keep(owner).copy_(masks.keep[name])
        self.impose()

    def impose(self) -> None:
        """Zeros pruned weights, their gradients and the optimizer's state of them, now."""
        self._require_attached()
        for owner in self._owners.values():
            keep, grad = _keep(owner), owner.parameter.grad
            zero_pruned(keep, owner.parameter.data)
            if grad is not None and grad.layout == torch.strided:
                zero_pruned(keep, grad.detach())  # in place: it may be a view of a bucket
            elif grad is not None:
                owner.parameter.grad = _masked_gradient(grad, keep)
        for after in self._after_steps:
            after.mask()

    def remove(self) -> None:
        """Removes masks and hooks: plain zeros, and the original keys of ``state_dict``, remain.

        A second call does nothing.
        """
        if self._removed:
            return
        _impose(self.model)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        detach(self.model)
        self._removed = True

    def _require_attached(self) -> None:
        if self._removed:
            raise RuntimeError("these masks were removed; attach(model, masks) again")

    def __repr__(self) -> str:
        return "Attachment(removed)" if self._removed else f"Attachment({self.masks!r})"


def attach(
    model: nn.Module,
    masks: Masks,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    allow_tied: bool = False,
) -> Attachment:
    """Prunes a model, and keeps its pruned weights at zero while it is trained.

    Args:
        model: The model, before or after it is compiled or wrapped by
            ``DistributedDataParallel``. Its pruned weights become zero.
        masks: Which weights are kept.
        optimizer: What trains the model: any torch optimizer, or several. Without it, masks are
            imposed before each forward pass instead: the module's notes say what holds then. (If
            the model was compiled already, pass what ``torch.compile`` returned as ``model``.)
        allow_tied: Whether tied parameters may be masked: see :meth:`Masks.owners`.

    Returns:
        The attachment: ``.update(masks)``, ``.remove()``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the masks do not fit the model, a masked parameter is tied, or no optimizer
            that was passed trains a masked parameter.
        RuntimeError: If the model has masks attached already.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> keep = torch.tensor([[True, False, True]])
        >>> attached = attach(model, Masks({"weight": keep}), optimizer)
        >>> for _ in range(3):
        ...     model(torch.randn(8, 3)).square().mean().backward()
        ...     optimizer.step()
        >>> model.weight[0, 1].item(), list(model.state_dict())
        (0.0, ['weight', 'bias', 'weight_keep'])
        >>> attached.remove()
        >>> model.weight[0, 1].item(), list(model.state_dict())
        (0.0, ['weight', 'bias'])
    """
    outer, model = model, unwrapped(model)
    owners = masks.owners(model, allow_tied=allow_tied)
    distinct = {id(o.parameter): o for o in owners.values()}
    optimizers = _optimizers(optimizer)
    if optimizers:
        _require_trained(owners, optimizers)
    _require_free(owners)
    detach(outer)  # what a copied or unpickled model brought along

    for name, owner in owners.items():
        keep = masks.keep[name].detach().to(owner.parameter.device, copy=True)
        owner.module.register_buffer(owner.key + SUFFIX, keep)
    hooks: list[RemovableHandle] = [model.register_load_state_dict_post_hook(_after_load)]
    hooks += [
        owner.parameter.register_hook(_GradientMask(owner, hooks))
        for owner in distinct.values()
        if owner.parameter.requires_grad
    ]
    after_steps = [_AfterStep(o, list(distinct.values())) for o in optimizers]
    for step, opt in zip(after_steps, optimizers, strict=True):
        hooks.append(opt.register_step_post_hook(step))
        hooks.append(opt.register_load_state_dict_post_hook(step))
    if not optimizers:
        # What was compiled before does not see new hooks of the model, but those of its wrapper.
        hooks += [m.register_forward_pre_hook(_before_forward) for m in {model, outer}]
    out = Attachment(model, owners, hooks, after_steps)
    out.impose()
    return out


def masks_of(model: nn.Module) -> Masks | None:
    """The masks that a model carries, copied; ``None`` if there are none.

    Raises:
        TypeError: If ``model`` is no module.
    """
    model = unwrapped(model)
    paths = {id(module): path for path, module in model.named_modules()}
    keep = {}
    for owner in _masked(model):
        path = paths[id(owner.module)]
        name = (f"{path}.{owner.key}" if path else owner.key).replace("_orig_mod.", "")
        keep[name] = _keep(owner).detach().clone()
    return Masks(keep) if keep else None


def detach(model: nn.Module) -> None:
    """Removes masks, of a copied or unpickled model too, and hooks; weights stay as they are.

    Raises:
        TypeError: If ``model`` is no module.
    """
    outer, model = model, unwrapped(model)
    for owner in list(_masked(model)):
        for hook in list((owner.parameter._backward_hooks or {}).values()):
            for handle in hook.hooks if isinstance(hook, _GradientMask) else ():
                handle.remove()
        delattr(owner.module, owner.key + SUFFIX)
    for hooks, ours in (
        (model._load_state_dict_post_hooks, _after_load),
        (model._forward_pre_hooks, _before_forward),
        (outer._forward_pre_hooks, _before_forward),
    ):
        for key in [k for k, hook in hooks.items() if hook is ours]:
            del hooks[key]


def _masked(model: nn.Module) -> Iterator[Owner]:
    """Where a model has a mask beside a parameter."""
    for module in model.modules():
        for key, p in module._parameters.items():
            keep = module._buffers.get(key + SUFFIX)
            if p is not None and keep is not None and keep.dtype == torch.bool:
                yield Owner(module, key)


def _keep(owner: Owner) -> Tensor:
    keep = owner.module._buffers.get(owner.key + SUFFIX)
    if keep is None:
        raise RuntimeError(
            f"the mask {owner.key + SUFFIX!r} of a {type(owner.module).__name__} is gone: it was "
            "deleted, or detach(model) was called; use Attachment.remove() instead"
        )
    return keep


def _impose(model: nn.Module) -> None:
    for owner in _masked(model):
        if not isinstance(owner.module._parameters[owner.key], nn.Parameter):
            continue  # torch.func.functional_call put a tensor there, which is not ours to change
        # Not a change that autograd should see: a graph that holds these weights holds zeros.
        zero_pruned(_keep(owner), owner.parameter.data)


def _after_load(module: nn.Module, _: Any) -> None:
    _impose(module)


def _before_forward(module: nn.Module, _: Any) -> None:
    _impose(module)


def _masked_gradient(grad: Tensor, keep: Tensor) -> Tensor:
    """The gradient with zeros for pruned weights; ``grad`` is left alone."""
    keep = keep.to(grad.device)
    if grad.layout == torch.sparse_coo:  # of nn.Embedding(sparse=True)
        grad = grad.detach().coalesce().clone()
        zero_pruned(keep[tuple(grad.indices())], grad.values())
        return grad
    return pruned_to_zero(keep, grad)


class _GradientMask:
    """A hook on a parameter: the gradient that arrives, without pruned weights."""

    def __init__(self, owner: Owner, hooks: list[RemovableHandle]) -> None:
        self._module = weakref.ref(owner.module)  # the parameter must not keep its module alive
        self._key = owner.key
        self.hooks = hooks  # all of the attachment

    def __call__(self, grad: Tensor) -> Tensor:
        module = self._module()
        keep = None if module is None else module._buffers.get(self._key + SUFFIX)
        return grad if keep is None else _masked_gradient(grad, keep)


class _AfterStep:
    """A hook after a step of an optimizer: weights and state without pruned weights."""

    def __init__(self, optimizer: Optimizer, owners: Sequence[Owner]) -> None:
        self._optimizer = weakref.ref(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._places = [(o, o.parameter) for o in owners if id(o.parameter) in held]

    def __call__(self, *_: Any) -> None:
        self.mask()

    @torch.no_grad()
    def mask(self) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        for owner, p in self._places:
            if owner.module._parameters.get(owner.key) is not p:
                raise RuntimeError(
                    f"parameter {owner.key!r} of a {type(owner.module).__name__} was replaced "
                    "since masks were attached (by assignment, or load_state_dict(assign=True)); "
                    "remove() the masks, make an optimizer of the new parameters and attach again"
                )
            keep = _keep(owner)
            # What has no dimension cannot be told from a count of steps.
            state = optimizer.state.get(p, {}) if p.ndim > 0 else {}
            zero_pruned(keep, p, *_of_shape(list(state.values()), p.shape))
        if any(_has_lists(state) for state in optimizer.state.values()):  # L-BFGS
            self._mask_flat(optimizer)

    def _mask_flat(self, optimizer: Optimizer) -> None:
        keeps = {id(p): _keep(owner) for owner, p in self._places}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        parts = [
            keeps[id(p)].reshape(-1)
            if id(p) in keeps
            else torch.ones(p.numel(), dtype=torch.bool, device=p.device)
            for p in params
        ]
        flat = torch.cat(parts)
        for state in optimizer.state.values():
            zero_pruned(flat, *_of_shape(list(state.values()), flat.shape))


def _has_lists(state: dict[str, Any]) -> bool:
    return any(isinstance(value, (list, tuple)) for value in state.values())


def _of_shape(value: Any, shape: torch.Size) -> Iterator[Tensor]:
    """The floating-point tensors of a shape in a state, which may nest lists."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _of_shape(item, shape)
    elif isinstance(value, Tensor) and value.shape == shape and value.is_floating_point():
        yield value


def _optimizers(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    if isinstance(optimizer, Optimizer):
        return [optimizer]
    found: list[Any] = list(optimizer) if hasattr(optimizer, "__iter__") else [optimizer]
    for item in found:
        if not isinstance(item, Optimizer):
            raise TypeError(
                "optimizer= takes a torch.optim.Optimizer, several, or None, got "
                f"{type(item).__name__}; pass the torch optimizer that a wrapper holds"
            )
    return found


def _require_trained(owners: dict[str, Owner], optimizers: list[Optimizer]) -> None:
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    missing = [
        name
        for name, o in owners.items()
        if o.parameter.requires_grad and id(o.parameter) not in held
    ]
    if missing:
        raise ValueError(
            f"optimizer= does not hold the masked parameters {missing}: it was made for another "
            "copy of the model, or for a part of it; pass the optimizer of this model's "
            "parameters, all of them if there are several, or freeze what is not trained"
        )


def _require_free(owners: dict[str, Owner]) -> None:
    for name, owner in owners.items():
        hooks = owner.parameter._backward_hooks or {}
        if any(isinstance(hook, _GradientMask) for hook in hooks.values()):
            raise RuntimeError(
                f"parameter {name!r} has a mask attached already; use update(masks) of what "
                "attach returned, or remove() it first"
            )
        key = owner.key + SUFFIX
        taken = hasattr(owner.module, key)
        if taken and owner not in list(_masked(owner.module)):
            raise RuntimeError(
                f"a {type(owner.module).__name__} has an attribute {key!r} of its own, where the "
                "mask should go; rename it"
            )
