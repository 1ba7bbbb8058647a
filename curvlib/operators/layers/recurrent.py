r"""Recurrent modules run again, step by step, with the inputs of their gates as nodes of a graph.

With the hidden state :math:`h`, for each step (PyTorch's conventions):

LSTM (Hochreiter and Schmidhuber, 1997; projections of Sak et al., 2014)
    :math:`(i, f, g, o) = W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}`,
    :math:`c_t = \sigma(f) \circ c_{t-1} + \sigma(i) \circ \tanh g`,
    :math:`h_t = W_{hr} (\sigma(o) \circ \tanh c_t)`, or without :math:`W_{hr}`;
GRU (Cho et al., 2014)
    :math:`(r, z) = \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})` (their two parts),
    :math:`\nu = \tanh(W_{in} x_t + b_{in} + r \circ (W_{hn} h_{t-1} + b_{hn}))`,
    :math:`h_t = (1 - z) \circ \nu + z \circ h_{t-1}`;
RNN
    :math:`h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})`, or with ReLU.

So both maps of an LSTM or RNN have the same gradients at their outputs. In a GRU those of
:math:`W_{hn} h + b_{hn}` have the factor :math:`r`: *not* the same, as its reset gate acts on the
product.

The left factor of a map is that of all gates together, ``[4H, 4H]``, by default: what K-FAC of the
concatenated weight is. With a block for each gate it is block-diagonal (as if gates were
uncorrelated), and its eigendecomposition 16 times cheaper for an LSTM.

Packed sequences are unpacked; steps past a sequence's end leave its state as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from curvlib.operators.layers.hidden_map import HiddenMap, Unrolled

_SEQUENCES = (nn.LSTM, nn.GRU, nn.RNN)
_CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
KINDS = (*_SEQUENCES, *_CELLS)

_State = tuple[Tensor, Tensor | None]


def is_recurrent(module: nn.Module) -> bool:
    """Whether it is an ``LSTM``, ``GRU`` or ``RNN``, or one of their cells."""
    return isinstance(module, KINDS)


def maps(module: nn.Module) -> tuple[HiddenMap, ...]:
    """The linear maps of a recurrent module, layer by layer, in the order of :func:`run`."""
    return tuple(own for suffix in _suffixes(module) for own in _maps_of(module, suffix))


def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Unrolled:
    """Runs a call again: see :func:`curvlib.operators.layers.hidden_maps.unrolled`."""
    call = _read(module, args, kwargs)
    inputs: list[Tensor] = []
    nodes: list[Tensor] = []
    factors: list[Tensor | None] = []
    ends: list[_State] = []
    x = call.x
    suffixes = _suffixes(module)
    ways = 2 if any(suffix.endswith("_reverse") for suffix in suffixes) else 1
    for layer in range(len(suffixes) // ways):
        outs = []
        for way in range(ways):
            index = layer * ways + way
            done = _way(module, suffixes[index], x, call.states[index], call.valid, back=way == 1)
            inputs += done.inputs
            nodes += done.nodes
            factors += done.factors
            ends.append(done.state)
            outs.append(done.out)
        x = outs[0] if ways == 1 else torch.cat(outs, -1)
    hidden = torch.stack([h for h, _ in ends])
    cells = [c for _, c in ends if c is not None]
    last = (hidden, torch.stack(cells)) if cells else (hidden,)
    valid = None if call.valid is None else call.valid.mT
    return Unrolled(
        maps(module),
        tuple(rows.detach().transpose(0, 1) for rows in inputs),
        tuple(nodes),
        tuple(factors),
        _written(call, x, last),
        valid,
    )


# ------------------------------------------------------------------- one direction
@dataclass(frozen=True, eq=False)
class _Way:
    """One direction of one layer: inputs, nodes and factors of its maps, ``[T, N, ...]``."""

    inputs: list[Tensor]
    nodes: list[Tensor]
    factors: list[Tensor | None]
    out: Tensor
    state: _State


def _way(
    module: nn.Module, suffix: str, x: Tensor, state: _State, valid: Tensor | None, *, back: bool
) -> _Way:
    w_ih, w_hh, b_ih, b_hh, w_hr = (
        _held(module, f"{name}{suffix}")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    )
    assert w_ih is not None
    assert w_hh is not None
    pre = F.linear(x, w_ih, b_ih)
    if torch.is_grad_enabled() and not pre.requires_grad:
        pre.requires_grad_()
    steps = pre.unbind(0)
    probe = pre.new_zeros((*x.shape[:2], 0 if w_hr is None else len(w_hr)))
    probes = probe.requires_grad_(torch.is_grad_enabled()).unbind(0)
    kind = _kind(module)
    befores: list[Any] = [None] * len(steps)
    outs: list[Any] = [None] * len(steps)
    inner: list[Any] = [None] * len(steps)  # what a GRU resets by, or an LSTM projects
    h, c = state
    for t in reversed(range(len(steps))) if back else range(len(steps)):
        befores[t] = h
        own = F.linear(h, w_hh, b_hh)
        new_c = c
        if kind == "LSTM":
            assert c is not None
            i, f, g, o = (steps[t] + own).chunk(4, -1)
            new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            new = torch.sigmoid(o) * torch.tanh(new_c)
            if w_hr is not None:
                inner[t] = new.detach()
                new = F.linear(new, w_hr) + probes[t]
        elif kind == "GRU":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = steps[t].chunk(3, -1), own.chunk(3, -1)
            r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
            inner[t] = r.detach()
            new = torch.lerp(torch.tanh(x_n + r * h_n), h, z)
        else:
            total = steps[t] + own
            new = torch.relu(total) if kind == "RNN_RELU" else torch.tanh(total)
        outs[t] = new
        if valid is not None:
            new = torch.where(valid[t, :, None], new, h)
            new_c = None if c is None or new_c is None else torch.where(valid[t, :, None], new_c, c)
        h, c = new, new_c
    inputs, nodes = [x, torch.stack(befores)], [pre, pre]
    factors: list[Tensor | None] = [None, None]
    if kind == "GRU":
        resets = torch.stack(inner)
        factors[1] = torch.cat([torch.ones_like(resets), torch.ones_like(resets), resets], -1)
    elif w_hr is not None:
        inputs.append(torch.stack(inner))
        nodes.append(probe)
        factors.append(None)
    return _Way(inputs, nodes, factors, torch.stack(outs), (h, c))


def _kind(module: nn.Module) -> str:
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return "LSTM"
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return "GRU"
    return "RNN_RELU" if getattr(module, "nonlinearity", "tanh") == "relu" else "RNN_TANH"


def _held(module: nn.Module, name: str) -> Tensor | None:
    found = getattr(module, name, None)
    return found.detach() if isinstance(found, Tensor) else None


def _suffixes(module: nn.Module) -> list[str]:
    if isinstance(module, _CELLS):
        return [""]
    assert isinstance(module, nn.RNNBase)
    ways = ("", "_reverse") if module.bidirectional else ("",)
    return [f"_l{layer}{way}" for layer in range(module.num_layers) for way in ways]


def _maps_of(module: nn.Module, suffix: str) -> list[HiddenMap]:
    gates = {"LSTM": 4, "GRU": 3}.get(_kind(module), 1)
    found = []
    for name in ("ih", "hh", "hr"):
        weight = _held(module, f"weight_{name}{suffix}")
        if weight is not None:
            bias = f"bias_{name}{suffix}"
            out, width = weight.shape
            found.append(
                HiddenMap(
                    f"{name}{suffix}",
                    f"weight_{name}{suffix}",
                    None if _held(module, bias) is None else bias,
                    0,
                    0,
                    out,
                    width,
                    1 if name == "hr" else gates,
                )
            )
    return found


# ------------------------------------------------------- what goes in and comes out
@dataclass(frozen=True, eq=False)
class _Read:
    """Inputs of a call.

    Attributes:
        x: ``[T, N, I]``.
        states: Of each layer and direction.
        valid: Which steps there are, bool ``[T, N]``, or ``None`` for all.
        places: Time and example of each row of a packed sequence.
        form: ``"time first"``, ``"batch first"``, ``"single"``, ``"packed"``, ``"cell"`` or
            ``"single cell"``.
    """

    x: Tensor
    states: list[_State]
    valid: Tensor | None
    places: tuple[Tensor, Tensor] | None
    form: str


def _read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Read:
    given = args[0] if args else kwargs["input"]
    state = args[1] if len(args) > 1 else kwargs.get("hx")
    places = valid = None
    if isinstance(given, PackedSequence):
        x, valid, places = _unpacked(given)
        form = "packed"
    elif isinstance(module, _CELLS):
        form = "cell" if given.ndim == 2 else "single cell"
        x = given.detach().reshape(1, -1, given.shape[-1])
    elif given.ndim == 2:
        form, x = "single", given.detach()[:, None]
    else:
        form = "batch first" if module.batch_first else "time first"
        x = given.detach().transpose(0, 1) if module.batch_first else given.detach()
    weight = _held(module, f"weight_ih{_suffixes(module)[0]}")
    assert weight is not None
    x = x.to(weight.dtype)
    return _Read(x, _states(module, x, state), valid, places, form)


def _states(module: nn.Module, x: Tensor, given: Any) -> list[_State]:
    suffixes = _suffixes(module)
    n, lstm = x.shape[1], _kind(module) == "LSTM"
    hidden_size: Any = module.hidden_size
    width = int(getattr(module, "proj_size", 0) or hidden_size)
    if given is None:
        hidden = [x.new_zeros(n, width) for _ in suffixes]
        cells = [x.new_zeros(n, hidden_size) if lstm else None for _ in suffixes]
        return list(zip(hidden, cells, strict=True))
    h, c = given if lstm else (given, None)

    def layers(state: Tensor) -> list[Tensor]:
        own = state.detach().to(x.dtype)
        return list(own.reshape(len(suffixes), n, own.shape[-1]).unbind(0))

    return list(zip(layers(h), [None] * len(suffixes) if c is None else layers(c), strict=True))


def _unpacked(packed: PackedSequence) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Steps ``[T, N, I]``, which of them there are, and the places of the packed rows."""
    data, sizes = packed.data.detach(), packed.batch_sizes.tolist()
    order = packed.sorted_indices
    order = torch.arange(sizes[0], device=data.device) if order is None else order
    examples = torch.cat([order[:size] for size in sizes])
    times = torch.repeat_interleave(
        torch.arange(len(sizes), device=data.device),
        torch.tensor(sizes, device=data.device),
    )
    x = data.new_zeros(len(sizes), sizes[0], data.shape[-1])
    x[times, examples] = data
    valid = torch.zeros(x.shape[:2], dtype=torch.bool, device=data.device)
    valid[times, examples] = True
    return x, valid, (times, examples)


def _written(call: _Read, x: Tensor, last: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs in the form of the module's."""
    if call.form == "cell":
        return tuple(state[0] for state in last)
    if call.form == "single cell":
        return tuple(state[0, 0] for state in last)
    if call.form == "packed":
        assert call.places is not None
        return (x[call.places], *last)
    if call.form == "single":
        return (x[:, 0], *(state[:, 0] for state in last))
    return (x.transpose(0, 1) if call.form == "batch first" else x, *last)
