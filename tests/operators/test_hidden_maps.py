"""Recurrent modules and attention, run again in the open, against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from curvlib.operators.layers.hidden_maps import (
    hidden_maps,
    hides_maps,
    outputs_of,
    replay,
    unfit,
    unrolled,
)
from tests.operators.factored import F64, draw, seeded


def attribute(module: nn.Module, name: str) -> Tensor:
    found = dict(module.named_parameters(remove_duplicate=False))[name]
    assert isinstance(found, Tensor)
    return found


def require_exact(module: nn.Module, *args: Any, only: int | None = None, **kwargs: Any) -> None:
    """Rows and gradients give autograd's gradient of every parameter; outputs are the same."""
    output = module(*args, **kwargs)
    shown = outputs_of(output)
    found = unrolled(module, args, kwargs)
    assert len(found.outputs) == len(shown)
    for mine, own in zip(found.outputs, shown, strict=True):
        assert mine.shape == own.shape
        assert torch.allclose(mine, own, rtol=1e-12, atol=1e-12)
    cotangents: list[Tensor | None] = [
        draw(*own.shape, seed=i) if only in (None, i) else None for i, own in enumerate(shown)
    ]
    pairs = [(o, c) for o, c in zip(shown, cotangents, strict=True) if c is not None]
    total = torch.stack([(o * c).sum() for o, c in pairs]).sum()
    params = dict(module.named_parameters())
    expected = torch.autograd.grad(
        total, list(params.values()), allow_unused=True, materialize_grads=True
    )
    sums = {name: torch.zeros_like(p) for name, p in params.items()}
    for one in replay(module, args, kwargs, cotangents):
        sums[one.names[0]][one.outputs] += torch.einsum("nto,nti->oi", one.gradients, one.rows)
        if len(one.names) > 1:
            sums[one.names[1]][one.bias_entries] += one.gradients.sum((0, 1))
        if one.valid is not None:
            assert one.gradients[~one.valid].abs().max() == 0
    for (name, own), grad in zip(sums.items(), expected, strict=True):
        if name in ("bias_k", "bias_v"):
            continue
        assert float((own - grad).norm()) <= 1e-12 * (1.0 + float(grad.norm())), name


KINDS = [nn.LSTM, nn.GRU, nn.RNN]


@given(
    kind=st.sampled_from(KINDS),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
    project=st.booleans(),
    state=st.booleans(),
    only=st.sampled_from([None, 0, 1]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_sequences_have_autograds_gradients(
    kind: Any,
    sizes: tuple[int, int, int, int],
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    bias: bool,
    project: bool,
    state: bool,
    only: int | None,
    seed: int,
) -> None:
    width, hidden, n, steps = sizes
    options: dict[str, Any] = {"bias": bias, "batch_first": batch_first}
    if kind is nn.LSTM and project and hidden > 1:
        options["proj_size"] = hidden - 1
    if kind is nn.RNN and project:
        options["nonlinearity"] = "relu"
    module = seeded(kind(width, hidden, layers, bidirectional=bidirectional, **options), seed)
    x = draw(*((n, steps) if batch_first else (steps, n)), width, seed=seed)
    ways = layers * (2 if bidirectional else 1)
    h = draw(ways, n, options.get("proj_size", hidden), seed=seed + 1)
    hx: Any = (h, draw(ways, n, hidden, seed=seed + 2)) if kind is nn.LSTM else h
    require_exact(module, *((x, hx) if state else (x,)), only=only)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}])
def test_sequences_without_a_batch(kind: Any, options: dict[str, Any]) -> None:
    require_exact(seeded(kind(2, 3, **options)), draw(4, 2))


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind: Any, sort: bool) -> None:
    """Of several lengths, in both directions, with an initial state."""
    module = seeded(kind(2, 3, 2, bidirectional=True))
    lengths = torch.tensor([4, 3, 3, 1] if sort else [3, 1, 4, 3])
    packed = pack_padded_sequence(draw(4, 4, 2), lengths, enforce_sorted=sort)
    h = draw(4, 4, 3, seed=1)
    require_exact(module, packed, (h, draw(4, 4, 3, seed=2)) if kind is nn.LSTM else h)
    found = unrolled(module, (packed,), {})
    assert found.valid is not None
    assert found.valid.sum(1).tolist() == lengths.tolist()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: Any, batched: bool, bias: bool) -> None:
    module = seeded(kind(2, 3, bias=bias))
    shape = (4,) if batched else ()
    h, c = draw(*shape, 3, seed=1), draw(*shape, 3, seed=2)
    require_exact(module, draw(*shape, 2))
    require_exact(module, draw(*shape, 2), (h, c) if kind is nn.LSTMCell else h)


ATTENTION: dict[str, Any] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other widths": {"kdim": 3, "vdim": 5},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, weights: bool) -> None:
    """Cross-attention, masked, with a gradient at its weights, too."""
    options = ATTENTION[name]
    module = seeded(nn.MultiheadAttention(4, 2, **options))
    first = options.get("batch_first", False)
    q, k, v = (
        draw(*((2, length) if first else (length, 2)), width, seed=length + width)
        for length, width in ((3, 4), (5, options.get("kdim", 4)), (5, options.get("vdim", 4)))
    )
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    more = {
        "key_padding_mask": padding,
        "attn_mask": draw(3, 5, seed=9) > 1,
        "need_weights": weights,
    }
    require_exact(module, q, k, v, **more, average_attn_weights=False)
    require_exact(module, q, key=k, value=v, need_weights=weights)


def test_masks_of_two_types() -> None:
    """PyTorch warns of them; the second time is silent."""
    module = seeded(nn.MultiheadAttention(4, 2))
    x, padding = draw(3, 2, 4), torch.tensor([[False, False, True], [False, True, False]])
    more = {"key_padding_mask": padding, "attn_mask": draw(3, 3, seed=1)}
    with pytest.warns(UserWarning, match="mismatched"):
        expected, _ = module(x, x, x, **more)
    assert torch.allclose(unrolled(module, (x, x, x), more).outputs[0], expected, rtol=1e-12)


def test_attention_of_one_sequence_to_itself() -> None:
    module = seeded(nn.MultiheadAttention(4, 2))
    x = draw(3, 4)
    require_exact(module, x, x, x)
    mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=F64)
    require_exact(module, x, x, x, attn_mask=mask, is_causal=True, need_weights=False)


def test_weights_that_two_layers_share() -> None:
    module = nn.GRU(3, 3, 2)
    module.weight_hh_l1 = module.weight_hh_l0
    module.weight_ih_l1 = module.weight_ih_l0
    found = replay(seeded(module), (draw(4, 2, 3),), {}, [draw(4, 2, 3, seed=1), None])
    out, _ = module(draw(4, 2, 3))
    for name, at in (("weight_ih_l0", 0), ("weight_hh_l0", 1)):
        (expected,) = torch.autograd.grad(
            out, attribute(module, name), draw(4, 2, 3, seed=1), retain_graph=True
        )
        own = [torch.einsum("nto,nti->oi", f.gradients, f.rows) for f in found[at::2]]
        assert torch.allclose(own[0] + own[1], expected, rtol=1e-12)


def test_gradients_are_pulled_back_many_times() -> None:
    """And need not arrive at every output, nor at any."""
    module = seeded(nn.LSTM(2, 3))
    found = unrolled(module, (draw(4, 2, 2),), {})
    at = [draw(4, 2, 3, seed=1), draw(1, 2, 3, seed=2), draw(1, 2, 3, seed=3)]
    whole = found.pulled(at)
    parts = [found.pulled([g if i == j else None for j, g in enumerate(at)]) for i in range(3)]
    for i, own in enumerate(whole):
        assert own is not None
        assert torch.allclose(own, sum(part[i] for part in parts), rtol=1e-12)  # type: ignore[arg-type, misc]  # a sum of tensors
    assert found.pulled([None, None, None]) == [None, None]
    assert not any(t.requires_grad for t in found.inputs)
    nothing = replay(module, (draw(4, 2, 2),), {}, [None, None, None])
    assert all(one.gradients.abs().max() == 0 for one in nothing)


def test_gates_are_known() -> None:
    gates = {
        type(m).__name__: [own.gates for own in hidden_maps(m)]
        for m in (nn.LSTM(2, 3, proj_size=2), nn.GRUCell(2, 3), nn.RNN(2, 3))
    }
    assert gates == {"LSTM": [4, 4, 1], "GRUCell": [3, 3], "RNN": [1, 1]}
    assert hidden_maps(nn.Linear(2, 2)) == ()
    assert not hides_maps(nn.Linear(2, 2))


class _Own(nn.GRU):
    def forward(self, x: Any, hx: Any = None) -> Any:
        return super().forward(2.0 * x, hx)


def test_what_cannot_be_run_again() -> None:
    with pytest.raises(TypeError, match="a Linear hides no linear map"):
        replay(nn.Linear(2, 2), (draw(1, 2),), {}, [])
    dropping = nn.LSTM(2, 3, 2, dropout=0.5)
    with pytest.raises(ValueError, match="its LSTM draws dropout between layers"):
        replay(dropping, (torch.ones(3, 1, 2),), {}, [None, None, None])
    assert "nn.Dropout between modules" in unfit(dropping)
    assert unfit(dropping.eval()) == ""
    assert "draws dropout on attention weights" in unfit(nn.MultiheadAttention(2, 1, dropout=0.1))
    assert "has a forward pass of its own" in unfit(_Own(2, 3))
    with pytest.raises(ValueError, match="gradients at the module's 3 outputs"):
        replay(nn.LSTM(2, 3), (torch.ones(3, 1, 2),), {}, [None])


def test_half_precision_is_run_again_in_the_weights_own() -> None:
    """As under autocast, whose own rounding differs."""
    module = nn.LSTM(2, 3).float()
    x = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = unrolled(module, (x.bfloat16(),), {})
    assert half.outputs[0].dtype == torch.float32
    pulled = half.pulled([torch.ones(4, 2, 3, dtype=torch.bfloat16), None, None])[0]
    assert pulled is not None
    whole = unrolled(module, (x.bfloat16().float(),), {}).pulled([torch.ones(4, 2, 3), None, None])
    assert torch.equal(pulled, whole[0])  # type: ignore[arg-type]  # is a tensor, like pulled
