r"""Linear maps inside of modules, where no hook on a layer sees them.

``nn.LSTM``, ``nn.GRU``, ``nn.RNN``, their cells and ``nn.MultiheadAttention`` multiply by their
weights in one fused function. A :class:`HiddenMap` names one such product :math:`y = W a + b`, and
:func:`unrolled` runs a call of the module again, step by step, from what it got, so that the rows
:math:`a` are at hand and the outputs :math:`y` are nodes of a graph. Gradients that arrived at
what the module *gave* are pulled back to these nodes: gradients of the loss by every :math:`y`,
exactly, with the module's own (fused, cuDNN) kernels in the model. They determine those of the
parameters, :math:`\sum_{n,t} g_{nt} a_{nt}^\top` and :math:`\sum_{n,t} g_{nt}`.

=====================  =============================================  ============================
module                 maps                                           where
=====================  =============================================  ============================
LSTM, GRU, RNN         ``ih_l0``, ``hh_l0``, ``ih_l0_reverse``, ...   :mod:`.recurrent`
LSTM with proj_size    ``hr_l0``, ... as well                         :mod:`.recurrent`
LSTM/GRU/RNNCell       ``ih``, ``hh``                                 :mod:`.recurrent`
MultiheadAttention     ``q``, ``k``, ``v``, ``out_proj``              :mod:`.attention_maps`
=====================  =============================================  ============================

Running again costs about one forward pass of the module, and pulling back one backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.core.data import tensors
from curvlib.core.ranks.dtensors import plain_type
from curvlib.core.ranks.sharded import whole_in
from curvlib.operators.layers import attention_maps, recurrent
from curvlib.operators.layers.hidden_map import HiddenMap, Unrolled


@dataclass(frozen=True, eq=False)
class MapRows:
    """What one linear map got and what gradients arrived at its output, in one call.

    Attributes:
        names: Names of its weight and, if it has one, its bias, in the module.
        outputs: Which rows of the weight it multiplies by.
        bias_entries: Which entries of the bias it adds.
        rows: Its inputs, ``[N, T, I]``: examples, time steps or tokens.
        gradients: Gradients at its outputs, ``[N, T, O]``.
        valid: Which rows there are, bool ``[N, T]``, for sequences of several lengths; ``None``
            for all. The others have no gradient.
    """

    names: tuple[str, ...]
    outputs: slice
    bias_entries: slice
    rows: Tensor
    gradients: Tensor
    valid: Tensor | None


def hides_maps(module: nn.Module) -> bool:
    """Whether a module is of a type that hides linear maps (whatever its settings)."""
    return recurrent.is_recurrent(module) or attention_maps.is_attention(module)


def hidden_maps(module: nn.Module) -> tuple[HiddenMap, ...]:
    """The linear maps that a module hides; none for other modules.

    Example:
        >>> [found.key for found in hidden_maps(nn.LSTM(2, 3, bidirectional=True))]
        ['ih_l0', 'hh_l0', 'ih_l0_reverse', 'hh_l0_reverse']
    """
    if recurrent.is_recurrent(module):
        return recurrent.maps(module)
    return attention_maps.maps(module) if attention_maps.is_attention(module) else ()


def unfit(module: nn.Module) -> str:
    """Why a module's calls cannot be run again, or nothing; depends on its mode."""
    if type(module).forward is not _forward(module) or "forward" in module.__dict__:
        return f"its module, a {plain_type(module).__name__}, has a forward pass of its own"
    dropout = getattr(module, "dropout", 0.0)
    deep = getattr(module, "num_layers", 2) > 1
    if module.training and deep and isinstance(dropout, float) and dropout > 0.0:
        inside = "between layers" if recurrent.is_recurrent(module) else "on attention weights"
        instead = (
            "or put nn.Dropout between modules of one layer each"
            if recurrent.is_recurrent(module)
            else "or put nn.Dropout behind it"
        )
        return (
            f"its {plain_type(module).__name__} draws dropout {inside}, where the mask cannot be "
            f"seen; set dropout=0.0 there (or model.eval()), {instead}"
        )
    return ""


def unrolled(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, graph: bool = True
) -> Unrolled:
    """Runs a call of a module again, step by step.

    Args:
        module: A module with hidden maps that is not :func:`unfit`.
        args: What it got.
        kwargs: What it got by name.
        graph: Whether gradients will be pulled back.

    Returns:
        Inputs of the maps, and nodes of a graph at their outputs. Nothing in it requires gradients
        by parameters or by ``args``.
    """
    run = recurrent.run if recurrent.is_recurrent(module) else attention_maps.run
    # counted functions, hooks on functions and autocast are of the model's own pass
    with whole_in(module), torch._C.DisableTorchFunction(), torch.set_grad_enabled(graph):
        device = next(tensors([list(args), dict(kwargs)])).device.type
        with torch.autocast(device, enabled=False):
            return run(module, tuple(args), dict(kwargs))


def outputs_of(output: Any) -> tuple[Tensor, ...]:
    """The tensors of a module's output at which gradients can arrive, in order."""
    return tuple(tensor for tensor in tensors(output) if tensor.is_floating_point())


def replay(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output_gradients: Sequence[Tensor | None],
) -> list[MapRows]:
    """Rows and gradients of the linear maps in one call of a module.

    Args:
        module: An ``LSTM``, ``GRU``, ``RNN``, one of their cells, or ``MultiheadAttention``.
        args: What it got.
        kwargs: What it got by name.
        output_gradients: Gradients that arrived at each of :func:`outputs_of` its output (of
            an LSTM: the sequence, the last hidden state, the last cell state); ``None`` where none
            did.

    Raises:
        TypeError: If it hides no linear map.
        ValueError: If there are not as many gradients as outputs, or it is :func:`unfit`.

    Example:
        >>> lstm, x = nn.LSTM(2, 3), torch.randn(5, 4, 2)  # 5 steps of 4 examples
        >>> out, (h, c) = lstm(x)
        >>> out.sum().backward()
        >>> found = replay(lstm, (x,), {}, [torch.ones_like(out), None, None])
        >>> [(one.names[0], *one.rows.shape) for one in found]
        [('weight_ih_l0', 4, 5, 2), ('weight_hh_l0', 4, 5, 3)]
        >>> weight_gradient = torch.einsum("nto,nti->oi", found[1].gradients, found[1].rows)
        >>> bool(torch.allclose(weight_gradient, lstm.weight_hh_l0.grad, atol=1e-5))
        True
    """
    if not hides_maps(module):
        raise TypeError(
            f"a {plain_type(module).__name__} hides no linear map that curvlib knows; pass an "
            "LSTM, GRU, RNN, one of their cells, or a MultiheadAttention"
        )
    reason = unfit(module)
    if reason:
        raise ValueError(f"the call cannot be run again: {reason}")
    found = unrolled(module, args, kwargs)
    gradients = found.pulled(output_gradients)
    return [
        MapRows(
            own.names,
            slice(own.first, own.first + own.outputs),
            slice(own.bias_first, own.bias_first + own.outputs),
            rows,
            torch.zeros_like(node).transpose(0, 1) if gradient is None else gradient,
            found.valid,
        )
        for own, rows, node, gradient in zip(
            found.maps, found.inputs, found.nodes, gradients, strict=True
        )
    ]


def _forward(module: nn.Module) -> Any:
    kinds = (*recurrent.KINDS, attention_maps.KIND)
    return next((kind.forward for kind in kinds if isinstance(module, kind)), None)
