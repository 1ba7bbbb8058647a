"""What K-FAC covers, how its fits are saved and resumed, and what it refuses."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlib as cl
from curvlib.operators.batch_examples import one_example
from curvlib.operators.factors.sums import _add_input_moment, _add_moment
from curvlib.operators.factors.targets import _contents
from curvlib.operators.kfac import KFAC, kfac
from tests.operators.factored import (
    F64,
    FISHERS,
    PROBLEMS,
    Conv1D,
    Hidden,
    Language,
    classes,
    coordinates,
    draw,
    problem,
    relative,
    rotated_block,
    seeded,
)


# ------------------------------------------------------------------------ sums
@pytest.mark.parametrize("width", [5, 127, 128, 150, 256])
@pytest.mark.parametrize("rows", [3, 70])
def test_half_of_a_second_moment_gives_all_of_it(width: int, rows: int) -> None:
    total = torch.zeros(2, width, width, dtype=F64)
    x = draw(2, 3 * rows, width).view(2, 3, rows, width)
    _add_moment(total, x)
    _add_moment(total, 2.0 * x[:, :1])
    flat = torch.cat([x, 2.0 * x[:, :1]], 1).flatten(1, 2)
    assert relative(total, torch.einsum("gni,gnj->gij", flat, flat)) < 1e-14


@pytest.mark.parametrize("width", [5, 150])
@pytest.mark.parametrize("dense", [True, False])
def test_a_column_of_ones_may_be_left_out_of_a_second_moment(width: int, dense: bool) -> None:
    """Also where a mask leaves rows out."""
    x, keep = draw(1, 3 * 50, width).view(1, 3, 50, width), torch.arange(150).view(3, 50) % 4 > 0
    kept = x * keep[None, ..., None]
    ones = torch.cat([kept, keep[None, ..., None].to(F64)], -1)
    shape = (1, width + 1, width + 1) if dense else (1, width + 1)
    found, expected = torch.zeros(shape, dtype=F64), torch.zeros(shape, dtype=F64)
    _add_input_moment(found, kept, float(keep.sum()))
    _add_input_moment(expected, ones, math.nan)
    assert relative(found, expected) < 1e-14


@pytest.mark.parametrize("folded", [False, True])
def test_digests_are_those_of_examples_alone(folded: bool) -> None:
    x = torch.arange(24).view(6, 4)
    y = x.flatten() if folded else x[:, 0].to(torch.int32)
    risk = cl.Risk(nn.Embedding(24, 3), nn.CrossEntropyLoss(), (x, y))
    batch = next(risk.batches())
    found = _contents(batch)
    assert found == [_contents(one_example(batch, i))[0] for i in range(6)]
    assert len(set(found)) == 6
    own = hashlib.sha256()
    for tensor in (x[5], y[20:] if folded else y[5:]):
        own.update(f"{tensor.dtype}".encode() + tensor.contiguous().numpy().tobytes())
    assert found[5] == own.hexdigest()


# -------------------------------------------------------------------- coverage
def test_what_is_uncovered_is_listed() -> None:
    risk = cl.Risk(seeded(Hidden()), nn.MSELoss(), (draw(4, 3), draw(4, 2)))
    K = kfac(risk)
    found = K.coverage()
    assert found.covered == ("b.weight", "b.bias")
    assert "called 1 times, but 'a.weight' was used 2 times (linear)" in found.uncovered["a.weight"]
    assert math.isclose(found.percent, 100 * 8 / 20)
    assert found.by_type == {"Linear": (8, 20)}
    assert "not a.weight: its modules were called" in str(found)
    assert "Linear: 8 of 20 (40.0 %)" in str(found)
    v = torch.ones(20, dtype=F64)
    assert (K @ v)[:12].abs().max() == 0
    with pytest.raises(RuntimeError, match=r"12 coordinates \('a.weight', 'a.bias'\) are in no"):
        K.solve(v)


def test_what_is_uncovered_gets_a_diagonal() -> None:
    for fisher, oracle in FISHERS.items():
        model = seeded(nn.Sequential(_Pairs(), nn.Linear(2, 2)))
        risk = cl.Risk(model, nn.CrossEntropyLoss(), (draw(3, 3), torch.tensor([0, 1, 1])))
        K = kfac(risk, fisher=fisher, rest="diagonal")
        F = oracle(risk)
        assert torch.allclose(K.diagonal()[:20], F.diagonal()[:20], rtol=1e-9)
        assert math.isclose(K.trace(), float(F.trace()), rel_tol=1e-10)
        assert K.coverage().by_type == {"Bilinear": (0, 20), "Linear": (6, 6)}
        why = K.coverage().uncovered["0.pairs.weight"]
        assert "it belongs to Bilinear; factored are Linear" in why
        assert "(diagonal instead)" in str(K.coverage())
        assert torch.isfinite(K.solve(torch.ones(26, dtype=F64))).all()
        plain = kfac(risk, fisher=fisher, rest="diagonal", eigen_corrected=False)
        assert torch.allclose(plain.diagonal()[:20], F.diagonal()[:20], rtol=1e-9)


class _Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Bilinear(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pairs(x, x)
        return out


def test_masks_that_do_not_fit() -> None:
    risk = problem("language model")
    with pytest.raises(ValueError, match="mask= returned shape .* but the inputs of the layer"):
        kfac(risk, mask=lambda b: torch.ones(len(b[0]), 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask= returned a tensor of torch.int64"):
        kfac(risk, mask=lambda b: b[0])


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    risk = problem("tied, masked")
    expected = kfac(risk, fisher="mc").to_dense()
    x, y = PROBLEMS["tied, masked"][2]
    there = cl.Risk(risk.model.cuda(), nn.CrossEntropyLoss(ignore_index=0), (x, y))
    assert relative(kfac(there, fisher="mc").to_dense().cpu(), expected) < 1e-8


def test_experts_without_tokens_are_uncovered() -> None:
    found = kfac(problem("experts")).coverage()
    assert found.uncovered == dict.fromkeys(
        ("experts.2.weight", "experts.2.bias"), "its module was never called"
    )


def test_weights_that_no_gradient_reaches_are_uncovered() -> None:
    model = seeded(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with torch.no_grad():
        model[1].weight.zero_()
    risk = cl.Risk(model, nn.MSELoss(), (draw(3, 2), draw(3, 2)))
    assert "no gradient reaches it" in kfac(risk).coverage().uncovered["0.weight"]


def test_a_shared_weight_with_two_biases_has_three_blocks() -> None:
    K = kfac(problem("shared weight"))
    assert list(K.blocks_of) == ["a", "a.bias", "b.bias"]
    assert K.coverage().percent == 100.0


def test_selected_parameters() -> None:
    risk = problem("mlp")
    whole = kfac(risk)
    some = kfac(risk, params=["0.bias", "3.*"])
    assert some.space.names == ("0.bias", "3.weight", "3.bias")
    G = cl.ggn(risk).to_dense()
    for layer in some.blocks_of:
        names = tuple(n for n in some.space.names if n.startswith(layer[0]))
        at = torch.cat([torch.arange(*coordinates(risk, n)) for n in names])
        assert math.isclose(
            float(some.blocks_of[layer].eigenvalues.sum()), float(G.diagonal()[at].sum())
        )
    assert relative(some.blocks()["3"].to_dense(), whole.blocks()["3"].to_dense()) < 1e-12


def test_long_sides_have_diagonal_factors() -> None:
    risk = problem("language model")
    K = kfac(risk, max_side=6)
    head = K.blocks_of["head"]
    assert head.left is None
    assert head.right is not None
    expected = rotated_block(K, "head", cl.ggn(risk).to_dense()).diagonal()
    assert relative(head.eigenvalues.reshape(-1), expected) < 1e-10


# ------------------------------------------------------------------------ masks
def test_padding_does_not_count() -> None:
    """Padded tokens have no gradient, but inputs: the mask leaves them out of the factor."""
    model = seeded(Conv1D(2, 3))
    x, y = draw(2, 4, 3), classes(2, 4, below=2)
    keep = torch.tensor([[True, True, False, False], [True, True, True, False]])
    y[~keep] = -100
    loss = nn.CrossEntropyLoss()

    def forward(m: nn.Module, batch: Any) -> Tensor:
        return m(batch["x"]).transpose(1, 2)

    def risk_of(data: Any) -> cl.Risk:
        return cl.Risk(model, loss, data, forward=forward, target=lambda b: b["y"])

    padded = {"x": x, "y": y, "keep": keep}
    short = [
        {"x": x[n : n + 1, : int(k)], "y": y[n : n + 1, : int(k)]} for n, k in ((0, 2), (1, 3))
    ]
    for sharing in ("expand", "reduce"):
        K = kfac(risk_of(padded), mask=lambda b: b["keep"], sharing=sharing)
        expected = kfac(risk_of(short), sharing=sharing)
        assert relative(K.kronecker().to_dense(), expected.kronecker().to_dense()) < 1e-12
        assert relative(K.to_dense(), expected.to_dense()) < 1e-12
        without = kfac(risk_of(padded), sharing=sharing).kronecker()
        assert relative(without.to_dense(), K.kronecker().to_dense()) > 1e-2


# ------------------------------------------------------------ saving, resuming
def test_saved_and_loaded(tmp_path: Any) -> None:
    risk = problem("tied, masked")
    K = kfac(risk)
    path = K.save(tmp_path / "k.safetensors")
    found = KFAC.load(path, risk)
    assert torch.equal(found.to_dense(), K.to_dense())
    assert torch.equal(found.kronecker().to_dense(), K.kronecker().to_dense())
    assert found.coverage().by_type == K.coverage().by_type
    assert found.space == K.space
    with pytest.raises(ValueError, match=r"is of another model: parameters \['0.bias'"):
        KFAC.load(path, problem("mlp"))
    with torch.no_grad():
        risk.model.tokens.weight += 1.0
    with pytest.raises(ValueError, match="was fitted on another risk: parameters, buffers, loss"):
        KFAC.load(path, risk)
    (tmp_path / "other").mkdir()
    diagonal = cl.diagonal(cl.ggn(problem("mlp"))).save(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="expected a KFAC operator"):
        KFAC.load(diagonal)


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_resumed_with_the_same_bits(tmp_path: Any, stop: int) -> None:
    """Stopped by an error in the middle of any batch of either pass."""
    whole = kfac(problem("tied, masked"), fisher="mc", checkpoint=tmp_path / "whole")
    risk = problem("tied, masked")
    calls = 0

    def hook(m: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise OSError("power cut")

    handle = risk.model.head.register_forward_hook(hook)
    path = tmp_path / "k"
    with pytest.raises(OSError, match="power cut"):
        kfac(risk, fisher="mc", checkpoint=path, save_every=0)
    handle.remove()
    K = kfac(risk, fisher="mc", checkpoint=path, save_every=0)
    assert torch.equal(K.to_dense(), whole.to_dense())
    assert torch.equal(K.kronecker().to_dense(), whole.kronecker().to_dense())
    with pytest.raises(ValueError, match="other settings: fisher was 'mc' and is now 'type2'"):
        kfac(risk, checkpoint=path)


def test_progress_is_reported() -> None:
    seen: list[tuple[float, float | None, str]] = []
    kfac(problem("mlp"), progress=lambda done, total, note: seen.append((done, total, note)))
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)
    assert seen[-1] == (4.0, 4.0, "done")


def test_types() -> None:
    risk = problem("language model")
    K = kfac(risk, dtype=torch.float32)
    assert K.dtype == torch.float32
    assert relative(K.to_dense().double(), kfac(risk).to_dense()) < 1e-4
    model = problem("language model").model.bfloat16()
    x, y = PROBLEMS["language model"][2]
    half = kfac(cl.Risk(model, nn.CrossEntropyLoss(), (x, y)))
    assert half.dtype == torch.float32
    assert relative(half.to_dense().double(), kfac(risk).to_dense()) < 0.1


# ----------------------------------------------------------------------- errors
def test_errors_of_arguments() -> None:
    risk = problem("mlp")
    with pytest.raises(TypeError, match="kfac takes a Risk, got Sequential"):
        kfac(risk.model)
    with pytest.raises(ValueError, match="fisher= is one of 'type2', 'mc', 'empirical', got 'x'"):
        kfac(risk, fisher="x")
    with pytest.raises(TypeError, match="samples= is an int, got float"):
        kfac(risk, samples=1.0)
    with pytest.raises(ValueError, match="samples= needs at least one sampled target, got 0"):
        kfac(risk, samples=0)
    with pytest.raises(ValueError, match="sharing= is one of 'expand', 'reduce', got 'x'"):
        kfac(risk, sharing="x")
    with pytest.raises(ValueError, match="rest= is one of 'exclude', 'diagonal', got 'x'"):
        kfac(risk, rest="x")
    with pytest.raises(TypeError, match="dtype= is torch.float32 or torch.float64, got"):
        kfac(risk, dtype=torch.float16)
    other = cl.Risk(risk.model, lambda o, y: o.square().mean(), risk.data, reduction="mean")
    with pytest.raises(ValueError, match="is no likelihood that curvlib knows, so there is no"):
        kfac(other)
    assert kfac(other, fisher="empirical").coverage().percent == 100.0


def test_errors_of_models() -> None:
    pairs = cl.Risk(seeded(_Pairs()), nn.MSELoss(), (draw(3, 3), draw(3, 2)))
    with pytest.raises(ValueError, match="no parameter has Kronecker-factored curvature"):
        kfac(pairs)
    norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    with pytest.raises(ValueError, match="cannot go through the model alone .Expected more than 1"):
        kfac(cl.Risk(norm, nn.MSELoss(), (draw(4, 3), draw(4, 2))))
    norm = nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="another output when it is alone: examples depend"):
        kfac(cl.Risk(norm.double(), nn.MSELoss(), (draw(4, 1, 2), draw(4, 2))))
    model = seeded(nn.Sequential(nn.Linear(2, 70), nn.Linear(70, 70)))
    wide = cl.Risk(model, nn.MSELoss(), (draw(1, 70, 2), draw(1, 70, 70)))
    with pytest.raises(ValueError, match="each of an example's 4900 outputs, and 4096 are allowed"):
        kfac(wide)
    ignored = cl.Risk(
        seeded(Language()),
        nn.CrossEntropyLoss(),
        [(classes(2, 3, below=7), -100 * torch.ones(2, 3).long())],
    )
    with pytest.raises(ValueError, match="no loss term is valid"):
        kfac(ignored)
    named = cl.Risk(
        seeded(nn.Linear(2, 2)), nn.MSELoss(), (draw(2, 2), draw(2, 2)),
        forward=lambda m, b: {"logits": m(b[0])},
    )  # fmt: skip
    with pytest.raises(TypeError, match="needs the output as one tensor"):
        kfac(named)


def test_not_finite_numbers_are_named_by_layer() -> None:
    model = seeded(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))
    x = draw(4, 2)
    x[3, 1] = math.nan
    risk = cl.Risk(model, nn.MSELoss(), [(x[:2], draw(2, 2)), (x[2:], draw(2, 2))])
    with pytest.raises(
        FloatingPointError, match="the inputs of layer '0' are not finite at batch 1"
    ):
        kfac(risk)

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0.0).abs().sqrt()

    model = seeded(nn.Sequential(nn.Linear(2, 3), Root()))
    risk = cl.Risk(model, nn.MSELoss(), (draw(2, 2), draw(2, 3)))
    with pytest.raises(FloatingPointError, match="gradients at the outputs of layer '0' are not"):
        kfac(risk)


def test_inputs_that_are_changed_in_place_are_refused() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Embedding(3, 2)
            self.b = nn.Linear(2, 2)

        def forward(self, index: Tensor) -> Tensor:
            index = index.clone()
            x = self.a(index)
            index += 1
            return self.b(x)

    risk = cl.Risk(seeded(InPlace()), nn.MSELoss(), (torch.tensor([0, 1]), draw(2, 2)))
    with pytest.raises(RuntimeError, match="the input of layer 'a' was changed in place after"):
        kfac(risk)


def test_outputs_without_examples() -> None:
    model = seeded(nn.Linear(2, 2))
    risk = cl.Risk(
        model,
        nn.MSELoss(),
        [{"x": draw(3, 2), "y": draw(7)}],
        forward=lambda m, b: torch.cat([m(b["x"]).reshape(-1), b["y"][:1] * 0.0]),
        target=lambda b: b["y"],
    )
    with pytest.raises(ValueError, match="cannot be split into its 7 examples"):
        kfac(risk)
