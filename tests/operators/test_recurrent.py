"""K-FAC through gates and attention against dense Fisher matrices in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import curvlib as cl
from curvlib.operators.kfac import KFAC, kfac
from curvlib.operators.layers.factored import factored_layers
from curvlib.operators.layers.hidden_calls import HiddenReplay, layers_inside, noted
from curvlib.operators.layers.recorder import LayerRecorder
from curvlib.operators.layers.rows import input_matrix, output_matrix
from curvlib.operators.layers.unseen import ModuleCall
from tests.operators.factored import (
    F64,
    FISHERS,
    classes,
    coordinates,
    draw,
    relative,
    rotated_block,
    seeded,
)


class Tagger(nn.Module):
    """A recurrent module and a head at each step; inputs and outputs have examples first."""

    def __init__(self, rnn: nn.RNNBase, out: int = 2) -> None:
        super().__init__()
        self.rnn = rnn
        own = rnn.proj_size or rnn.hidden_size
        self.head = nn.Linear(own * (2 if rnn.bidirectional else 1), out)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        y = self.head(self.rnn(x)[0])
        return y.transpose(1, 2) if self.rnn.batch_first else y.permute(1, 2, 0)


class Learned(nn.Module):
    """Learned initial states, and the last cell state as output; a module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 3)
        self.start = nn.Parameter(torch.zeros(1, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.start.expand(1, len(x), 3).contiguous()
        y, _ = self.rnn(x.transpose(0, 1), (h, h))
        _, (_, c) = self.rnn(input=y, hx=(torch.tanh(h), h))
        return c[0]


class Stepwise(nn.Module):
    """A cell in a loop."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(self.cell, nn.LSTMCell) else state)


class Packed(nn.Module):
    """Sequences of several lengths, the lengths with the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = self.rnn(packed)
        y, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        there = torch.arange(x.shape[1]) < lengths[:, None]
        return (self.head(y) * there[..., None]).sum(1)


class Cross(nn.Module):
    """Attention of some tokens to others, with a mask and with its weights as outputs, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.mix = nn.Linear(4, options.get("kdim", 4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.mix(x[:, 1:]))
        mask = torch.eye(x.shape[1], x.shape[1] - 1, dtype=torch.bool)
        out, weights = self.attention(x, y, y, attn_mask=mask)
        return out[:, :, :2].sum(1) + weights.square().sum((1, 2))[:, None]


class Encoder(nn.Module):
    """PyTorch's own transformer, time first, as is its default."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x.transpose(0, 1))
        return y.sum(0)[:, :2]


X = draw(5, 4, 3)
WIDE = draw(5, 3, 4)
LABELS = classes(5, below=2)
STEPS = classes(5, 4, below=2)
CE = nn.CrossEntropyLoss()
#: Model and data; the loss is the cross-entropy.
PROBLEMS: dict[str, tuple[Any, tuple[Tensor, Tensor]]] = {
    "lstm": (
        lambda: Tagger(nn.LSTM(3, 2, 2, batch_first=True, bidirectional=True)),
        (X, STEPS),
    ),
    "lstm, projected": (lambda: Tagger(nn.LSTM(3, 4, proj_size=2)), (X, STEPS)),
    "gru, time first": (lambda: Tagger(nn.GRU(3, 3)), (X, STEPS)),
    "rnn, no bias": (lambda: Tagger(nn.RNN(3, 3, 2, bias=False)), (X, STEPS)),
    "lstm cell": (lambda: Stepwise(nn.LSTMCell(3, 3)), (X, LABELS)),
    "gru cell": (lambda: Stepwise(nn.GRUCell(3, 3)), (X, LABELS)),
    "attention": (Cross, (WIDE, LABELS)),
    "attention, widths": (
        lambda: Cross(kdim=3, vdim=3, add_bias_kv=True, add_zero_attn=True),
        (WIDE, LABELS),
    ),
    "encoder": (Encoder, (WIDE, LABELS)),
}


def problem(name: str, **more: Any) -> cl.Risk:
    make, (x, y) = PROBLEMS[name]
    return cl.Risk(seeded(make()), CE, [(x[:3], y[:3]), (x[3:], y[3:])], **more)


def packed() -> cl.Risk:
    lengths = torch.tensor([2, 4, 1, 3, 3])
    batches = [(X[at], lengths[at], LABELS[at]) for at in (slice(0, 3), slice(3, 5))]
    return cl.Risk(
        seeded(Packed()),
        CE,
        batches,
        forward=lambda m, b: m(b[0], b[1]),
        target=lambda b: b[2],
    )


def require_exact(K: KFAC, F: Tensor) -> None:
    """Corrected eigenvalues are the diagonal of a matrix in the basis of each block."""
    for layer, block in K.blocks_of.items():  # that of k's bias is zero: softmax ignores it
        expected = rotated_block(K, layer, F).diagonal()
        found = block.eigenvalues.reshape(-1)
        assert float((found - expected).norm()) < 1e-10 * float(expected.norm()) + 1e-20, layer


def block(op: KFAC, layer: str) -> Tensor:
    """One dense block, in the order of the flat vector."""
    where = torch.cat([torch.arange(*span) for span in op.blocks_of[layer].ranges])
    return op.to_dense()[where][:, where]


def inside(risk: cl.Risk) -> set[str]:
    return {n for n in risk.space.names if not n.endswith(("start", "bias_k", "bias_v"))}


# ------------------------------------------------------------- exact gradients
@pytest.mark.parametrize("gates", ["joint", "separate"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_all_parameters_are_covered_exactly(name: str, fisher: str, gates: str) -> None:
    """The trace is that of the exact Fisher matrix (type-2: of the GGN)."""
    risk = problem(name)
    K, F = kfac(risk, fisher=fisher, gates=gates), FISHERS[fisher](risk)
    require_exact(K, F)
    assert set(K.coverage().covered) == inside(risk)
    at = torch.cat([torch.arange(*coordinates(risk, n)) for n in K.coverage().covered])
    assert math.isclose(K.trace(), float(F.diagonal()[at].sum()), rel_tol=1e-10)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_packed_sequences(sharing: str) -> None:
    """Steps past the end count nowhere: padding to another length changes nothing."""
    risk = packed()
    K = kfac(risk, sharing=sharing)
    require_exact(K, cl.ggn(risk).to_dense())
    assert K.coverage().percent == 100.0
    longer = [
        (torch.cat([x, torch.full((len(x), 3, 3), 9.0, dtype=F64)], 1), n, y)
        for x, n, y in risk.in_memory or ()
    ]
    other = kfac(risk.on(longer), sharing=sharing)
    alone = kfac(
        risk.on([tuple(t[i : i + 1] for t in b) for b in longer for i in range(len(b[0]))])
    )
    bias = float(K.kronecker().blocks_of["rnn.ih_l0"].eigenvalues.sum())
    assert math.isclose(
        float(other.kronecker().blocks_of["rnn.ih_l0"].eigenvalues.sum()), bias, rel_tol=1e-10
    )
    if sharing == "expand":
        for layer in ("rnn.ih_l0", "rnn.hh_l0_reverse"):
            mine, theirs = (block(op.kronecker(), layer) for op in (K, alone))
            assert relative(theirs, mine) < 1e-10


def test_a_module_that_is_called_twice_from_learned_states() -> None:
    risk = cl.Risk(seeded(Learned()), nn.MSELoss(), [(X[:3], draw(3, 3)), (X[3:], draw(2, 3))])
    K = kfac(risk, rest="diagonal")
    G = cl.ggn(risk).to_dense()
    require_exact(K, G)
    assert K.coverage().uncovered.keys() == {"start"}
    assert math.isclose(K.trace(), float(G.trace()), rel_tol=1e-10)


@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    n=st.integers(1, 4),
    steps=st.integers(1, 4),
    width=st.integers(1, 3),
    hidden=st.integers(1, 3),
    batch_first=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_traces_of_any_shape(
    kind: Any, n: int, steps: int, width: int, hidden: int, batch_first: bool, seed: int
) -> None:
    """As many steps as examples, too, which looks the same either way."""
    model = seeded(Tagger(kind(width, hidden, batch_first=batch_first)), seed)
    risk = cl.Risk(model, CE, (draw(n, steps, width, seed=seed), classes(n, steps, below=2)))
    K = kfac(risk)
    assert math.isclose(K.trace(), cl.ggn(risk).to_dense().trace().item(), rel_tol=1e-9)
    assert K.coverage().percent == 100.0


def test_sampled_targets_do_not_depend_on_batches() -> None:
    risk = problem("gru, time first")
    x, y = PROBLEMS["gru, time first"][1]
    K = kfac(risk, fisher="mc", samples=2)
    other = kfac(risk.on([(x[i : i + 1], y[i : i + 1]) for i in range(5)]), fisher="mc", samples=2)
    assert relative(other.to_dense(), K.to_dense()) < 1e-10


# ---------------------------------------------------------------------- gates
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(("name", "count"), [("lstm", 4), ("gru, time first", 3)])
def test_separate_gates_are_the_diagonal_blocks_of_joint_ones(
    name: str, count: int, sharing: str
) -> None:
    risk = problem(name)
    joint = kfac(risk, sharing=sharing).kronecker()
    separate = kfac(risk, sharing=sharing, gates="separate").kronecker()
    for layer in ("rnn.ih_l0", "rnn.hh_l0"):
        whole, parts = block(joint, layer), block(separate, layer)
        weight, _ = risk.params[layer.replace(".", ".weight_")].shape
        rows = torch.arange(len(whole)).repeat(1)
        gates = torch.cat(  # which gate each coordinate is of: the weight's, then the bias's
            [
                torch.arange(count).repeat_interleave((len(rows) - weight) // count),
                torch.arange(count).repeat_interleave(weight // count),
            ]
        )
        same = gates[:, None] == gates
        assert relative(parts, torch.where(same, whole, 0.0)) < 1e-10
        assert float(whole[~same].norm()) > 1e-3 * float(whole.norm())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_one_step_of_one_example_is_exact(kind: Any) -> None:
    """One row: both K-FAC and EK-FAC are the GGN's block, of inputs, and of learned states."""
    model = seeded(Tagger(kind(3, 2, batch_first=True)))
    h = draw(1, 1, 2, seed=3)
    risk = cl.Risk(
        model,
        CE,
        (X[:1, :1], STEPS[:1, :1]),
        forward=lambda m, b: m.head(m.rnn(b[0], (h, h) if kind is nn.LSTM else h)[0]).mT,
    )
    K, G = kfac(risk), cl.ggn(risk).to_dense()
    for layer in ("rnn.ih_l0", "rnn.hh_l0"):
        key = layer.removeprefix("rnn.")
        names = (f"rnn.weight_{key}", f"rnn.bias_{key}")
        at = torch.cat([torch.arange(*coordinates(risk, n)) for n in names])
        for op in (K, K.kronecker()):
            assert relative(block(op, layer), G[at][:, at]) < 1e-12


def test_solving_with_all_gates() -> None:
    risk = problem("lstm")
    K = kfac(risk)
    b = draw(K.shape[0])
    dense = K.to_dense() + 0.1 * torch.eye(K.shape[0], dtype=F64)
    expected = torch.linalg.solve(dense, b)
    assert relative(K.solve(b, damping=0.1, relative=False), expected) < 1e-10


def test_gates_are_saved_and_resumed(tmp_path: Any) -> None:
    risk = problem("lstm")
    K = kfac(risk, gates="separate", checkpoint=tmp_path / "fit")
    assert K.settings["gates"] == "separate"
    K.save(tmp_path / "op")
    assert torch.equal(KFAC.load(tmp_path / "op", risk).to_dense(), K.to_dense())
    with pytest.raises(ValueError, match="gates"):
        kfac(risk, checkpoint=tmp_path / "fit")
    with pytest.raises(ValueError, match="gates= is one of 'joint', 'separate', got 'four'"):
        kfac(risk, gates="four")


# ------------------------------------------------------------- awkward parameters
@pytest.mark.parametrize(
    ("name", "chosen", "layers"),
    [
        ("lstm", ["rnn.bias_hh_l1"], ["rnn.hh_l1.bias"]),
        ("lstm", ["rnn.weight_hh_l0", "head.*"], ["rnn.hh_l0", "head"]),
        ("gru, time first", ["rnn.*_ih_l0"], ["rnn.ih_l0"]),
        (
            "attention",
            ["attention.in_proj_bias"],
            ["attention.q.bias", "attention.k.bias", "attention.v.bias"],
        ),
        ("attention", ["attention.out_proj.bias"], ["attention.out_proj.bias"]),
        (
            "attention, widths",
            ["attention.q_proj_weight", "attention.in_proj_bias"],
            ["attention.q", "attention.q.bias", "attention.k.bias", "attention.v.bias"],
        ),
    ],
)
def test_selected_parameters(name: str, chosen: list[str], layers: list[str]) -> None:
    """A bias whose weights are not all chosen is on its own, whole."""
    risk = problem(name, params=chosen)
    K = kfac(risk)
    assert list(K.blocks_of) == layers
    assert K.coverage().percent == 100.0
    require_exact(K, cl.ggn(risk).to_dense())


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.LSTM(3, 3, batch_first=True)
        self.b = nn.LSTM(3, 3, batch_first=True)
        self.b.weight_hh_l0 = self.a.weight_hh_l0
        self.b.bias_ih_l0 = self.a.bias_ih_l0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x)[0])[0]
        return y.transpose(1, 2)


def test_tied_weights_count_with_all_their_uses() -> None:
    """Two modules share a weight, but not its bias, and a bias, but not its weight."""
    risk = cl.Risk(seeded(_Tied()), CE, [(X[:3], STEPS[:3]), (X[3:], STEPS[3:])])
    K = kfac(risk)
    assert list(K.blocks_of) == [
        "a.ih_l0",
        "a.hh_l0",
        "a.ih_l0.bias",
        "a.hh_l0.bias",
        "b.ih_l0",
        "b.hh_l0.bias",
    ]
    assert K.coverage().percent == 100.0
    require_exact(K, cl.ggn(risk).to_dense())


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 3, batch_first=True)
        self.head = nn.Linear(3, 3)
        self.head.weight = self.rnn.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0])
        return y.transpose(1, 2)


def test_what_a_linear_layer_shares_is_listed() -> None:
    risk = cl.Risk(seeded(_Shared()), CE, (X, STEPS))
    K = kfac(risk)
    assert K.coverage().uncovered == {
        "rnn.weight_hh_l0": "it is shared by layers of different kinds (Linear and RNN)"
    }
    assert "rnn.hh_l0.bias" in K.blocks_of
    require_exact(K, cl.ggn(risk).to_dense())


def test_dropout_inside_is_listed() -> None:
    model = Tagger(nn.LSTM(3, 2, 2, dropout=0.5, batch_first=True)).double()
    risk = cl.Risk(model, CE, (X[:1], STEPS[:1]))
    found = kfac(risk).coverage()
    assert found.covered == ("head.weight", "head.bias")
    assert "its LSTM draws dropout between layers" in found.uncovered["rnn.weight_ih_l0"]
    assert kfac(cl.Risk(model.eval(), CE, (X, STEPS))).coverage().percent == 100.0


# ------------------------------------------------------------------ examples
def test_time_in_the_place_of_examples_is_noticed() -> None:
    """``batch_first=False`` reads examples as steps: they depend on each other."""
    model = nn.Sequential(nn.RNN(3, 2), _First(), nn.Linear(2, 2))
    risk = cl.Risk(seeded(model), nn.MSELoss(), (X, draw(5, 4, 2)))
    with pytest.raises(ValueError, match="another output when it is alone: examples depend"):
        kfac(risk)


class _First(nn.Module):
    def forward(self, x: Any) -> Tensor:
        out: Tensor = x[0]
        return out


def test_padded_steps_that_a_mask_leaves_out() -> None:
    """A mask ``[N, T]`` counts, whichever axis the module takes first."""
    mask = torch.tensor([4, 2, 3, 1, 4])[:, None] > torch.arange(4)
    y = torch.where(mask, STEPS, -100)
    first = seeded(Tagger(nn.GRU(3, 3, batch_first=True)))
    second = seeded(Tagger(nn.GRU(3, 3)))
    found = []
    for model in (first, second):
        risk = cl.Risk(model, CE, (X, y), params=["rnn.*"])  # whose head has no examples first
        masked = kfac(risk, mask=lambda b: b[1] != -100)
        found.append(masked.kronecker().to_dense())
        assert relative(kfac(risk).kronecker().to_dense(), found[-1]) > 1e-3
    assert relative(found[1], found[0]) < 1e-10


class _Changing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = 1.0 * x
        y: Tensor = self.rnn(x)[0]
        x.add_(1.0)
        return y.transpose(1, 2)


def test_inputs_that_are_changed_in_place() -> None:
    risk = cl.Risk(seeded(_Changing()), CE, (X, STEPS))
    with pytest.raises(RuntimeError, match="of layer 'rnn.ih_l0' got was changed in place"):
        kfac(risk)


def test_inputs_that_are_not_finite_are_named() -> None:
    risk = problem("lstm")
    x = X.clone()
    x[1, 2] = math.nan
    with pytest.raises(FloatingPointError, match=r"inputs of layer 'rnn\.ih_l0' are not finite"):
        kfac(risk.on((x, STEPS)))


def test_another_output_when_it_is_run_again() -> None:
    rnn = seeded(nn.GRU(3, 2))
    y, h = rnn(X)
    noted(rnn, (X,), {}, (y, h)).unrolled("rnn.ih_l0", graph=True)
    with pytest.raises(ValueError, match="the GRU of layer 'rnn.ih_l0' gives another output"):
        noted(rnn, (X,), {}, (1.1 * y, h)).unrolled("rnn.ih_l0", graph=True)


def test_rows_for_recorders() -> None:
    """For several sets of gradients; a module whose mode has changed is refused."""
    model = Tagger(nn.LSTM(3, 2, 2, dropout=0.5, batch_first=True)).double().eval()
    risk = cl.Risk(model, CE, (X, STEPS))
    layers, _ = factored_layers(risk, dense_norms=False, max_side=100, gates="separate")
    (module, own), *_ = layers_inside(layers).items()
    assert module is model.rnn
    y, (h, c) = model.rnn(X)
    call = ModuleCall((X,), {}, (y.detach(), h.detach(), c.detach()))
    sets = [[torch.ones_like(y), None, None], [None, None, torch.ones_like(c)]]
    found = HiddenReplay(module, own).rows(call, sets)
    assert [one.layer for one in found] == ["rnn.ih_l0", "rnn.hh_l0", "rnn.ih_l1", "rnn.hh_l1"]
    for one in found:
        weight = model.rnn.get_parameter(one.layer.replace("rnn.", "weight_"))
        for total, gradients in zip((y.sum(), c.sum()), one.gradients, strict=True):
            (expected,) = torch.autograd.grad(total, weight, retain_graph=True)
            product = torch.einsum("gnto,gnti->goi", gradients, one.inputs).flatten(0, 1)
            assert torch.allclose(product, expected, rtol=1e-10)
    model.train()
    with pytest.raises(RuntimeError, match="layer 'rnn.ih_l0' was recorded before, but cannot be"):
        HiddenReplay(module, own).rows(call, sets)


@pytest.mark.parametrize("gates", ["joint", "separate"])
@pytest.mark.parametrize("name", [*PROBLEMS, "packed"])
def test_recorded_rows_give_the_gradients_of_training(name: str, gates: str) -> None:
    """The user's own backward pass, twice, in training mode; hooks change no gradient."""
    risk = packed() if name == "packed" else problem(name)
    model = risk.model.train()
    recorded: list[Any] = []
    recorder = LayerRecorder(model, sink=recorded.append, gates=gates)
    recorder.start()
    for scale in (1.0, 2.0):
        grads = []
        for on in (True, False):
            model.zero_grad()
            if not on:
                recorder.stop()
            output = model(*risk.in_memory[0][:-1])
            (scale * CE(output, risk.in_memory[0][-1])).backward()
            recorder.flush()
            recorder.start()
            grads.append({n: p.grad for n, p in model.named_parameters()})
        mine, plain = grads
        assert all(torch.allclose(mine[n], plain[n], rtol=1e-12, atol=1e-15) for n in plain)
        found = recorded.pop()
        assert not recorded
        seen = set()
        for layer in recorder.layers:
            own = [i for i, use in enumerate(found.uses) if use.layer == layer.name]
            if layer.roles != ("matrix",):
                seen.update(layer.names)
                continue
            uses, gradients = [found.uses[i] for i in own], [found.gradients[i] for i in own]
            n = found.examples
            left = output_matrix(layer, uses, gradients, n, slice(0, n), F64)
            right = input_matrix(layer, uses, n, slice(0, n), F64)
            matrix = torch.einsum("gnto,gnti->goi", left, right)
            column = 0
            for part in layer.parts:
                piece = matrix[..., column : column + part.columns].reshape(-1)
                flat = risk.space.join([plain[n] for n in risk.space.names])
                expected = flat[part.start : part.start + piece.numel()]
                assert torch.allclose(piece, expected, rtol=1e-9, atol=1e-12), layer.name
                column += part.columns
            seen.update(layer.names)
        assert seen == inside(risk)
    recorder.close()
