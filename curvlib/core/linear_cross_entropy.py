r"""The cross-entropy that owns a model's head, for large vocabularies.

The logits of all tokens, ``[tokens, V]``, are most of a language model's memory, and second
derivatives need several of them. :class:`LinearCrossEntropy` makes them for ``chunk`` tokens at a
time, from the hidden states that the head gets; the derivatives, up to the second, are in
:mod:`curvlib.core.chunked_logits`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.core.chunked_logits import Logits, Terms, losses, wide
from curvlib.core.forward import uncompiled

_HEADS = (nn.Linear.forward, nn.Embedding.forward)


@dataclass(frozen=True, eq=False)
class LinearCrossEntropy:
    """Cross-entropy that owns the head of a model, for large vocabularies.

    The model's ``forward=`` returns what the head gets, and this loss applies the head to ``chunk``
    tokens at a time. Values and derivatives are those of ``torch.nn.CrossEntropyLoss`` of the
    logits; the head's weight and bias stay parameters of the model, tied to the input embedding or
    not. It also trains: ``loss(hidden, target).backward()`` takes the same bounded memory.

    For a causal language model of the Hugging Face kind::

        cl.Risk(
            model,
            cl.LinearCrossEntropy(model.lm_head),
            data,
            forward=lambda m, b: m.base_model(b["input_ids"]).last_hidden_state[:, :-1],
            target=lambda b: b["labels"][:, 1:],
        )

    Products of :func:`curvlib.hessian`, :func:`curvlib.ggn` and :func:`curvlib.fisher` (all kinds),
    gradients and values never hold more than a few times ``chunk * V`` numbers beyond vectors.
    What needs the logits themselves (K-FAC, the Jacobian of the outputs) says so.

    Attributes:
        head: ``nn.Linear``, or ``nn.Embedding`` where its weight is the head: a module of the
            model. What the model does to the logits after it (soft-capping, a temperature) is no
            part of this loss.
        chunk: Tokens (times columns of a block product) whose logits exist at the same time.
        weight: Class weights ``[V]``.
        ignore_index: Target that counts for nothing.
        label_smoothing: As in ``torch.nn.CrossEntropyLoss``.
        reduction: ``"mean"`` (over loss terms) or ``"sum"``.

    Raises:
        TypeError: If ``head`` is no plain linear or embedding module, or ``chunk`` no int.
        ValueError: If ``chunk`` is not positive, ``weight`` does not fit the head, or
            ``label_smoothing`` is not between 0 and 1.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 4), torch.nn.Linear(4, 50))
        >>> x, y = torch.randint(50, (3, 7)), torch.randint(50, (3, 7))
        >>> loss = cl.LinearCrossEntropy(model[-1], chunk=8)
        >>> risk = cl.Risk(model, loss, (x, y), forward=lambda m, batch: m[:-1](batch[0]))
        >>> plain = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        >>> bool(torch.isclose(risk.value(), plain))
        True
    """

    head: nn.Module
    chunk: int = 1024
    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"

    def __post_init__(self) -> None:
        _require_plain(self.head)
        if isinstance(self.chunk, bool) or not isinstance(self.chunk, int):
            raise TypeError(
                f"chunk= is a number of tokens, an int; got {type(self.chunk).__name__}"
            )
        if self.chunk < 1:
            raise ValueError(f"chunk= needs at least one token, got {self.chunk}")
        held: Any = self.head.weight
        classes = held.shape[0]
        if self.weight is not None and self.weight.shape != (classes,):
            raise ValueError(
                f"weight= needs one number for each of the head's {classes} classes, got shape "
                f"{list(self.weight.shape)}"
            )
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing= is between 0 and 1, got {self.label_smoothing}")

    def __call__(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The loss of one batch, a scalar that can be differentiated twice.

        Args:
            hidden: What the head gets, ``[..., d]``.
            target: Class indices ``[...]``.
        """
        logits = self.logits(hidden)
        total = self.each(logits, target).sum()
        if self.reduction == "sum":
            return total
        _, _, own = self._targets(logits, target)
        return total / own.sum()

    def logits(self, hidden: Any) -> Logits:
        """The logits of hidden states, not yet computed, with the head as it is now.

        Raises:
            TypeError: If ``hidden`` is no tensor.
            ValueError: If the head does not take it.
        """
        weight: Any = self.head.weight
        if not isinstance(hidden, Tensor):
            raise TypeError(
                "LinearCrossEntropy needs forward= to return what the head gets, one tensor of "
                f"hidden states, got {type(hidden).__name__}; for a Hugging Face model "
                "forward=lambda m, b: m.base_model(b['input_ids']).last_hidden_state"
            )
        if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"LinearCrossEntropy needs hidden states of shape [..., {weight.shape[1]}], which "
                f"its head gets, but the output has shape {list(hidden.shape)}; let forward= "
                "return what the model computes before its head"
            )
        bias = getattr(self.head, "bias", None)
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        bias = None if bias is None else bias.to(dtype)
        return Logits(hidden.to(dtype), weight.to(dtype), bias, self.chunk)

    def each(self, logits: Logits, target: Any) -> Tensor:
        """The loss terms of one batch, of the target's shape, float32 for half precision."""
        terms = self.terms(logits, target)
        return losses(logits.rows, logits.weight, logits.bias, terms).reshape(target.shape)

    def terms(self, logits: Logits, target: Any) -> Terms:
        """The constants of one batch's loss terms.

        Raises:
            TypeError: If the target is no tensor of class indices.
            ValueError: If its shape is not that of the hidden states.
        """
        index, valid, own = self._targets(logits, target)
        smooth = None
        if self.label_smoothing:
            classes = logits.weight.shape[0]
            smooth = own.new_full((classes,), self.label_smoothing / classes)
            if self.weight is not None:
                smooth = smooth * self.weight.to(smooth)
        own = own * (1.0 - self.label_smoothing)
        total = own if smooth is None else own + valid * smooth.sum()
        return Terms(index, total, own, valid, smooth, self.chunk)

    def require_part_of(self, model: nn.Module) -> None:
        """Raises ValueError unless the head is a module of the model."""
        if not any(module is self.head for module in model.modules()):
            raise ValueError(
                f"the head of LinearCrossEntropy, {self.head}, is no module of the model; pass the "
                "model's own, as in cl.LinearCrossEntropy(model.lm_head)"
            )

    def of(self, model: nn.Module, copy: nn.Module) -> LinearCrossEntropy:
        """The same loss with the head of a copy of the model."""
        name = next(n for n, module in model.named_modules() if module is self.head)
        return replace(self, head=uncompiled(copy).get_submodule(name))

    def _targets(self, logits: Logits, target: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, whether they count (0 or 1), and class weights of targets, each ``[T]``."""
        hidden = logits.hidden
        if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32):
            found = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(
                f"LinearCrossEntropy needs class indices (int64) as targets, got {found}; use "
                "target=lambda batch: ... to take them out of a batch, and "
                "torch.nn.CrossEntropyLoss on the logits for class probabilities"
            )
        if target.shape != hidden.shape[:-1]:
            raise ValueError(
                f"LinearCrossEntropy of hidden states of shape {list(hidden.shape)} needs class "
                f"indices of shape {list(hidden.shape[:-1])}, got {list(target.shape)}; reshape "
                "the target, or the hidden states in forward="
            )
        index = target.reshape(-1).long()
        valid = index != self.ignore_index
        index = index.where(valid, 0)
        ones = valid.to(wide(hidden.dtype))
        own = ones if self.weight is None else self.weight.to(ones)[index] * ones
        return index, ones, own


def needs_logits(what: str) -> TypeError:
    """The error of what cannot do without the logits of a whole batch."""
    return TypeError(
        f"{what} needs the logits of a batch as one tensor, which LinearCrossEntropy never forms; "
        "use loss=torch.nn.CrossEntropyLoss() with a forward= that returns the logits, and fewer "
        "tokens a batch"
    )


def _require_plain(head: Any) -> None:
    """Raises TypeError unless a module's weight and bias are all that it does."""
    plain = (
        isinstance(head, nn.Module)
        and type(head).forward in _HEADS
        and "forward" not in vars(head)
        and isinstance(head._parameters.get("weight"), Tensor)
        and not (head._forward_hooks or head._forward_pre_hooks)
    )
    if not plain:
        raise TypeError(
            "head= is a plain nn.Linear (or nn.Embedding) of the model, without hooks, adapters or "
            f"parametrizations, got {type(head).__name__}; keep other heads in the model and use "
            "torch.nn.CrossEntropyLoss on its logits"
        )
