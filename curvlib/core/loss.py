r"""Losses as sums of terms: numerator and denominator of a mean.

The risk of a data set is a mean over *loss terms* :math:`t` (an unmasked token, an example, an
entry of a regression target), not over batches:

.. math:: R = \frac{\sum_b \sum_{t \in b} a_t \ell_t}{\sum_b \sum_{t \in b} a_t},

with class weights :math:`a_t` where there are any, zero for ignored targets. A loss that takes a
mean hides its denominator, so the losses that PyTorch users know are taken apart here into the
numerator (:meth:`Loss.total`) and the denominator (:meth:`Loss.terms`) of one batch, in exactly
PyTorch's definition for the concatenated data. Any other callable counts examples, or what the
user's ``weight=`` says. For ``reduction="sum"`` the risk is the numerator alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlib.core.linear_cross_entropy import LinearCrossEntropy, needs_logits

_HALF = (torch.float16, torch.bfloat16)

_FUNCTIONS: dict[Any, str] = {
    F.cross_entropy: "cross_entropy",
    F.nll_loss: "nll",
    F.mse_loss: "mse",
    F.binary_cross_entropy_with_logits: "bce_with_logits",
    nn.CrossEntropyLoss: "cross_entropy",
    nn.NLLLoss: "nll",
    nn.MSELoss: "mse",
    nn.BCEWithLogitsLoss: "bce_with_logits",
}
_OPTIONS = {
    "cross_entropy": ("weight", "ignore_index", "reduction", "label_smoothing"),
    "nll": ("weight", "ignore_index", "reduction"),
    "mse": ("reduction",),
    "bce_with_logits": ("weight", "pos_weight", "reduction"),
}


@dataclass(frozen=True)
class Loss:
    """A loss as curvlib reads it.

    Attributes:
        function: The user's loss.
        kind: ``"cross_entropy"``, ``"nll"``, ``"mse"`` or ``"bce_with_logits"`` when it is one of
            PyTorch's (module, function, or ``functools.partial`` of the function), else
            ``"other"``.
        reduction: ``"mean"`` or ``"sum"``.
        weight: Class weights (``cross_entropy``, ``nll``) or element weights
            (``bce_with_logits``).
        pos_weight: As in ``BCEWithLogitsLoss``.
        ignore_index: Target that counts for nothing.
        label_smoothing: As in ``CrossEntropyLoss``.
        linear: The user's loss where it owns the model's head; outputs are then
            :class:`~curvlib.core.linear_cross_entropy.Logits`.
    """

    function: Callable[[Any, Any], Tensor]
    kind: str
    reduction: str
    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    linear: LinearCrossEntropy | None = None

    @property
    def known(self) -> bool:
        """Whether numerator and denominator are known in closed form."""
        return self.kind != "other"

    @property
    def categorical(self) -> bool:
        """Whether outputs are scores of classes along axis 1 (0 if one-dimensional)."""
        return self.kind in ("cross_entropy", "nll")

    def total(self, output: Any, target: Any, terms: Tensor | float = 1.0) -> Tensor:
        """Weighted sum of the loss terms of one batch: a scalar that carries its graph.

        Half-precision outputs of the known losses are summed in float32.

        Args:
            output: What the model returned.
            target: What the loss compares it with.
            terms: Denominator of the batch, by which an unknown mean is multiplied.

        Raises:
            ValueError: If output and target do not fit, or the loss is not a scalar.
            TypeError: If the loss is not a tensor.
        """
        if self.linear is not None:
            return self.each(output, target).sum()
        if self.known:
            return self._known(self.readable(output, target), target, "sum")
        value = self.function(output, target)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the loss should return a scalar tensor, got {type(value).__name__}; "
                "loss=lambda out, batch: out.loss takes the loss out of a Hugging Face output"
            )
        if value.ndim != 0:
            raise ValueError(
                f"the loss should return a scalar, got shape {list(value.shape)}; "
                "reduce it with .mean() or .sum(), or use reduction='mean'"
            )
        return value if self.reduction == "sum" else value * terms

    def each(self, output: Any, target: Any) -> Tensor:
        """The loss terms of one batch for a known loss: of the target's shape, or ``[n, ...]``.

        Args:
            output: What the model returned.
            target: What the loss compares it with.
        """
        if self.linear is not None:
            return self.linear.each(output, target)
        return self._known(self.readable(output, target), target, "none")

    def _known(self, output: Tensor, target: Tensor, reduction: str) -> Tensor:
        weight = None if self.weight is None else self.weight.to(output)
        if target.dtype in _HALF:  # as the output is: mse_loss of two types has no derivative
            target = target.float()
        if self.kind == "cross_entropy":
            return F.cross_entropy(
                output,
                target,
                weight,
                ignore_index=self.ignore_index,
                reduction=reduction,
                label_smoothing=self.label_smoothing,
            )
        if self.kind == "nll":
            return F.nll_loss(
                output, target, weight, ignore_index=self.ignore_index, reduction=reduction
            )
        if self.kind == "mse":
            return F.mse_loss(output, target, reduction=reduction)
        pos_weight = None if self.pos_weight is None else self.pos_weight.to(output)
        return F.binary_cross_entropy_with_logits(
            output, target, weight, pos_weight=pos_weight, reduction=reduction
        )

    def terms(self, target: Tensor) -> Tensor | float:
        """Denominator that a known loss with ``reduction="mean"`` divides one batch by."""
        if not self.categorical:
            return float(target.numel())
        if target.is_floating_point():
            classes = target.shape[1] if target.ndim > 1 else target.shape[0]
            return float(target.numel() // classes)
        valid = target != self.ignore_index
        if self.weight is None:
            return valid.sum().to(torch.float64)
        weight = self.weight.to(target.device, torch.float64)
        return (weight[target.where(valid, 0)] * valid).sum()

    def readable(self, output: Any, target: Any) -> Tensor:
        """The output of a known loss, checked against its target, half precision as float32.

        Raises:
            TypeError: If they are no tensors, or a loss that owns the head never has one.
            ValueError: If they do not fit.
        """
        if self.linear is not None:
            raise needs_logits("this")
        if not isinstance(output, Tensor) or not isinstance(target, Tensor):
            raise TypeError(
                f"{self.kind} compares tensors, but the model returned {type(output).__name__} "
                f"and the target is {type(target).__name__}; use forward=lambda model, batch: ... "
                "and target=lambda batch: ... to take them out"
            )
        if self.categorical and not target.is_floating_point():
            expected = output.shape[:0] if output.ndim == 1 else output.shape[:1] + output.shape[2:]
            what = "class indices"
        else:
            expected = output.shape
            what = "class probabilities" if self.categorical else "targets"
        if target.shape != expected:
            raise ValueError(
                f"{self.kind} of an output of shape {list(output.shape)} needs {what} of shape "
                f"{list(expected)}, got {list(target.shape)}"
                + (
                    "; classes are axis 1: move them there in forward= (transpose(1, 2))"
                    if self.categorical and output.ndim > 2
                    else "; reshape the target, or the output in forward="
                )
            )
        if not self.categorical and not target.is_floating_point():
            raise TypeError(f"{self.kind} needs floating-point targets, got {target.dtype}")
        return output.float() if output.dtype in _HALF else output

    def of(self, model: nn.Module, copy: nn.Module | None) -> Callable[[Any, Any], Tensor]:
        """The user's loss, for a copy of the model where there is one."""
        if self.linear is None or copy is None:
            return self.function
        return self.linear.of(model, copy)

    def describe(self) -> str:
        """What the loss is, in words that do not change between runs."""
        name = self.kind if self.linear is None else f"linear_{self.kind}"
        if not self.known:
            inner = getattr(self.function, "func", self.function)
            name = getattr(inner, "__qualname__", type(inner).__qualname__)
        details = [self.reduction]
        if self.ignore_index != -100:
            details.append(f"ignore_index={self.ignore_index}")
        if self.label_smoothing:
            details.append(f"label_smoothing={self.label_smoothing:g}")
        for attribute in ("weight", "pos_weight"):
            value = getattr(self, attribute)
            if value is not None:
                details.append(f"{attribute} of {value.numel()}")
        return f"{name} ({', '.join(details)})"


def read_loss(loss: Callable[[Any, Any], Tensor], reduction: str | None = None) -> Loss:
    """Reads a loss module or function.

    Args:
        loss: ``nn.Module``, function or any callable of ``(output, target)``.
        reduction: ``"mean"`` or ``"sum"``, for callables that do not say it themselves.

    Raises:
        TypeError: If ``loss`` is not callable, or is a class.
        ValueError: If the reduction is neither, or contradicts the loss.

    Example:
        >>> import torch
        >>> read_loss(torch.nn.CrossEntropyLoss(ignore_index=0)).describe()
        'cross_entropy (mean, ignore_index=0)'
    """
    if isinstance(loss, type):
        raise TypeError(f"loss= got the class {loss.__name__}; pass an instance: {loss.__name__}()")
    if not callable(loss):
        raise TypeError(f"loss= needs a callable of (output, target), got {type(loss).__name__}")
    if reduction not in (None, "mean", "sum"):
        raise ValueError(f"reduction= is 'mean' or 'sum', got {reduction!r}")
    out = _recognize(loss)
    if out.reduction not in ("mean", "sum"):
        raise ValueError(
            f"the loss has reduction={out.reduction!r}, which gives no scalar; "
            "use reduction='mean' or 'sum'"
        )
    declared = out.known or isinstance(getattr(loss, "reduction", None), str)
    if reduction is not None and declared and reduction != out.reduction:
        raise ValueError(
            f"reduction={reduction!r} contradicts the loss, which has {out.reduction!r}; "
            "leave reduction= out"
        )
    return out if reduction is None else replace(out, reduction=reduction)


def _recognize(loss: Callable[[Any, Any], Tensor]) -> Loss:
    other = Loss(loss, "other", _declared_reduction(loss))
    if isinstance(loss, LinearCrossEntropy):
        settings = {name: getattr(loss, name) for name in _OPTIONS["cross_entropy"]}
        return Loss(loss, "cross_entropy", linear=loss, **settings)
    if isinstance(loss, nn.Module):
        kind = _FUNCTIONS.get(type(loss))  # a subclass may compute something else
        options: Mapping[str, Any] = {} if kind is None else vars(loss) | loss._buffers
        hooked = bool(loss._forward_hooks or loss._forward_pre_hooks)
        if kind is None or hooked:
            return other
        options = {o: options[o] for o in _OPTIONS[kind] if o in options}
    else:
        function, options = loss, {}
        if isinstance(loss, functools.partial) and not loss.args:
            function, options = loss.func, loss.keywords
        kind = _FUNCTIONS.get(function) if not isinstance(function, type) else None
        if kind is None or not options.keys() <= set(_OPTIONS[kind]):
            return other
    settings = {"reduction": "mean", **options}
    return Loss(loss, kind, **settings)


def _declared_reduction(loss: Any) -> str:
    value = getattr(loss, "reduction", None)
    if value is None and isinstance(loss, functools.partial):
        value = loss.keywords.get("reduction")
    if isinstance(value, str):
        return "mean" if value in ("elementwise_mean", "batchmean") else value
    return "mean"
