r"""Forward passes that have second derivatives and leave no trace.

Some of PyTorch's fastest kernels have no second derivative: fused attention, cuDNN recurrent
networks, compiled modules. While :func:`arranged` is entered, their plain counterparts run
instead, which compute the same function:

======================  =======================================================
attention               the MATH kernel of ``scaled_dot_product_attention``
``nn.LSTM``, ``nn.GRU``  native kernels instead of cuDNN, on CUDA
``torch.compile``       eager execution (``torch.compiler.set_stance``)
transformer fast path   the ordinary Python path
weight normalization    primitive operations: the derivative of the fused kernel treats the
                        norms as constants, so its second derivatives are silently wrong
======================  =======================================================

Passes that take first derivatives alone (``first_order=True``) keep fused attention: it never holds
the matrix of all pairs of tokens.

The model is left as it was, also after an exception: buffers are swapped for copies, which the
pass may change; ``requires_grad`` is on for just the chosen parameters, and hooks on their
gradients (clipping, say) are off; torch's random state is put back.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def arranged(
    model: nn.Module,
    params: Mapping[str, Tensor],
    device: torch.device,
    *,
    first_order: bool = False,
) -> Iterator[None]:
    """Arranges the model and the kernels for second derivatives with respect to ``params``.

    Args:
        model: The model.
        params: The parameters.
        device: Where they are.
        first_order: Whether first derivatives are enough: attention runs whatever kernel it would.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        cuda = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(_requires_grad(model, params))
        stack.enter_context(_without_hooks(params))
        stack.enter_context(_copied_buffers(model))
        stack.enter_context(_first_order(first_order))
        if not first_order:
            stack.enter_context(_MATH.entered())
        stack.enter_context(_NO_FAST_PATH.entered())
        if has_weight_norm(model):
            stack.enter_context(_PrimitiveWeightNorm())
        if cuda and has_recurrent(model):
            stack.enter_context(_NO_CUDNN.entered())
        if has_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


_FIRST_ORDER: ContextVar[bool] = ContextVar("first_order", default=False)


@contextmanager
def _first_order(on: bool) -> Iterator[None]:
    token = _FIRST_ORDER.set(on)
    try:
        yield
    finally:
        _FIRST_ORDER.reset(token)


def is_first_order() -> bool:
    """Whether the innermost :func:`arranged` is for first derivatives alone."""
    return _FIRST_ORDER.get()


def has_recurrent(model: nn.Module) -> bool:
    """Whether a recurrent module, which cuDNN would run on CUDA, is part of the model."""
    return any(isinstance(m, nn.RNNBase) for m in model.modules())


def has_compiled(model: nn.Module) -> bool:
    """Whether a part of the model was compiled by ``torch.compile`` or ``module.compile()``."""
    return any(
        "_orig_mod" in m._modules or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


def has_weight_norm(model: nn.Module) -> bool:
    """Whether a module is weight-normalized, by parametrization or the older hook."""
    return any(
        type(m).__name__ == "_WeightNorm"
        or any(type(h).__name__ == "WeightNorm" for h in m._forward_pre_hooks.values())
        for m in model.modules()
    )


def tell_what_is_slower(
    model: nn.Module, device: torch.device, attention: bool, *, compiled: bool
) -> None:
    """Warns of slower kernels that run in the place of those without second derivatives."""
    what = ["scaled_dot_product_attention runs its MATH kernel"] if attention else []
    if device.type == "cuda" and has_recurrent(model):
        what.append("recurrent modules run without cuDNN")
    if compiled:
        what.append("compiled modules run eagerly")
    if what:
        warnings.warn(
            f"curvlib: {' and '.join(what)}, since the faster kernels have no second "
            "derivative; values agree up to rounding (said once for each risk)",
            UserWarning,
            stacklevel=3,
        )


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, or the module itself."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


class Holder(nn.Module):
    """Runs any function of a model as a module, so that ``torch.func`` can replace parameters.

    What the function does, derivatives included, happens while they are replaced: activation
    checkpointing, which runs parts of the model again in the backward pass, needs that.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        """Calls the function on the model."""
        return function(self.model)


class Draws:
    """Random states at which forward passes begin, so that each batch always draws the same.

    Only passes that draw are remembered.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.states: dict[int, tuple[Tensor, Tensor | None]] = {}

    def run(self, index: int, forward: Callable[[], Any]) -> Any:
        """Runs the forward pass of batch ``index`` from the random state of its first time."""
        before = self.states.get(index)
        if before is not None:
            torch.set_rng_state(before[0])
            if before[1] is not None:
                torch.cuda.set_rng_state(before[1], self.device)
            return forward()
        before = self._now()
        output = forward()
        after = self._now()
        pairs = zip(before, after, strict=True)
        if not all(a is None or b is None or torch.equal(a, b) for a, b in pairs):
            self.states[index] = before
        return output

    def _now(self) -> tuple[Tensor, Tensor | None]:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return torch.get_rng_state(), cuda


class SpotAttention(TorchFunctionMode):
    """Notices whether ``scaled_dot_product_attention`` is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Forwards the call, and remembers attention."""
        if func is F.scaled_dot_product_attention:
            self.seen = True
        return func(*args, **(kwargs or {}))


class _PrimitiveWeightNorm(TorchFunctionMode):
    """Computes weight normalization by operations whose second derivatives are right."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        v, g, dim = (*args, 0)[:3] if not kwargs else (args[0], args[1], kwargs.get("dim", 0))
        axes = [d for d in range(v.ndim) if dim == -1 or d != dim % v.ndim]
        return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=True))


@contextmanager
def _requires_grad(model: nn.Module, params: Mapping[str, Tensor]) -> Iterator[None]:
    chosen = {id(p) for p in params.values()}
    changed = [p for p in model.parameters() if p.requires_grad != (id(p) in chosen)]
    try:
        for p in changed:
            p.requires_grad_(not p.requires_grad)
        yield
    finally:
        for p in changed:
            p.requires_grad_(id(p) not in chosen)


@contextmanager
def _without_hooks(params: Mapping[str, Tensor]) -> Iterator[None]:
    hooked = [(p, p._backward_hooks) for p in params.values() if p._backward_hooks]
    try:
        for p, _ in hooked:
            p._backward_hooks = None
        yield
    finally:
        for p, hooks in hooked:
            p._backward_hooks = hooks


@contextmanager
def _copied_buffers(model: nn.Module) -> Iterator[None]:
    found = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    copies = {id(b): b.detach().clone() for _, _, b in found}
    try:
        for module, name, buffer in found:
            setattr(module, name, copies[id(buffer)])
        yield
    finally:
        for module, name, buffer in found:
            setattr(module, name, buffer)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


class _OfProcess:
    """A context of the whole process, which is entered once however many threads are in it.

    PyTorch's switches are not those of a thread: where two threads each put back what they found,
    the one that leaves last would leave the other's setting behind.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._inside = 0
        self._context: AbstractContextManager[Any] | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        with self._lock:
            if self._context is None:
                context = self._make()
                context.__enter__()
                self._context = context
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    context, self._context = self._context, None
                    context.__exit__(None, None, None)


_MATH = _OfProcess(lambda: sdpa_kernel(SDPBackend.MATH))
_NO_FAST_PATH = _OfProcess(_without_fast_path)
_NO_CUDNN = _OfProcess(_without_cudnn)
