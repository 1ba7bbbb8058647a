"""What is recorded of layers while a model trains, against curvlib.kfac and by hand."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import curvlib as cl
from curvlib.core.content_numbers import content_uniform
from curvlib.core.loss import read_loss
from curvlib.operators.factors.pairs import factors
from curvlib.operators.factors.sums import Sums, add_gradients, add_inputs, factor_sums
from curvlib.operators.layers.recorded import Recorded, factor_of_squares
from curvlib.operators.layers.recorder import LayerRecorder
from curvlib.operators.layers.rows import input_matrix, output_matrix
from tests.operators.factored import (
    F64,
    PROBLEMS,
    Hidden,
    Language,
    classes,
    draw,
    problem,
    relative,
    seeded,
)

LIKE = torch.empty(0, dtype=F64)
CE = read_loss(nn.CrossEntropyLoss())
#: Weights of classes and elements are not known to hooks.
KNOWN = [name for name in PROBLEMS if name not in ("bce", "nll, class weights")]


def recorder_of(
    model: nn.Module, loss: Any = None, **settings: Any
) -> tuple[LayerRecorder, list[Recorded]]:
    found: list[Recorded] = []
    recorder = LayerRecorder(model, sink=found.append, loss=loss, **settings)
    recorder.start()
    return recorder, found


def summed(
    recorder: LayerRecorder,
    found: list[Recorded],
    *,
    sampled: bool = False,
    reduce: bool = False,
    scale: float = 1.0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of all layers."""
    terms = torch.stack([one.terms for one in found]).sum()
    factor = factor_of_squares(
        terms, sampled=sampled, sum_of_terms=found[0].sum_of_terms, scale=scale
    )
    out = {}
    for layer in recorder.layers:
        sums = factor_sums([layer], LIKE)
        for one in found:
            own = one if one.aligned(layer.name) else one.merged()
            gradients = own.sampled if sampled else own.gradients
            assert gradients is not None
            add_inputs(layer, own, sums, reduce=reduce)
            add_gradients(layer, own, gradients, sums, reduce=reduce, first=True)
        pair = factors(layer, sums.tensors, sums.counts, 1.0 / float(factor))
        if pair is not None:
            out[layer.name] = pair
    return out


def expected(risk: cl.Risk, sharing: str) -> dict[str, Tensor]:
    """The blocks of curvlib.kfac, since what is split between the two factors is arbitrary."""
    K = cl.kfac(risk, fisher="empirical", eigen_corrected=False, sharing=sharing)
    return {n: dense(b.left, b.right, b.eigenvalues) for n, b in K.blocks_of.items()}


def dense(left: Tensor | None, right: Tensor | None, values: Tensor) -> Tensor:
    """The block ``[G, O I, O I]``."""
    G, O, width = values.shape
    left = torch.eye(O, dtype=F64).expand(G, O, O) if left is None else left
    right = torch.eye(width, dtype=F64).expand(G, width, width) if right is None else right
    Q = torch.stack(
        [torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(left, right, strict=True)]
    )
    return Q @ torch.diag_embed(values.reshape(G, -1)) @ Q.mT


def product(pair: tuple[Tensor, Tensor]) -> Tensor:
    left, right = (torch.diag_embed(f) if f.ndim == 2 else f for f in pair)
    return torch.stack(
        [torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(left, right, strict=True)]
    )


# ---------------------------------------------------------------------------- factors
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", KNOWN)
def test_factors_are_those_of_kfac(name: str, sharing: str) -> None:
    if sharing == "reduce" and name == "experts":
        pytest.skip("rows cannot be told apart by example")
    _, loss, (x, y) = PROBLEMS[name]
    risk = problem(name, batches=False)
    model = risk.model
    recorder, found = recorder_of(model, read_loss(loss), apart="all")
    loss(model(x), y).backward()
    recorder.flush()
    got = summed(recorder, found, reduce=sharing == "reduce")
    wanted = expected(risk, sharing)
    assert got.keys() == wanted.keys()
    for layer in wanted:
        assert relative(product(got[layer]), wanted[layer]) < 1e-10, layer
    for layer in recorder.layers:  # and the gradients are those of the parameters
        if layer.roles == ("matrix",) and layer.weight is not None:
            rows = [
                (use, g)
                for use, g in zip(found[0].uses, found[0].gradients, strict=True)
                if use.layer == layer.name
            ]
            uses = [use for use, _ in rows]
            a = input_matrix(layer, uses, 1, slice(None), F64) if uses else None
            if a is not None:
                b = output_matrix(layer, uses, [g for _, g in rows], 1, slice(None), F64)
                grad = recorder.params[layer.weight].grad
                matrix = (b.mT @ a)[:, 0, :, : grad.numel() // (a.shape[0] * b.shape[-1])]
                matrix = matrix.mT if layer.parts[0].transposed else matrix
                assert relative(matrix.reshape(grad.shape), grad) < 1e-10


@pytest.mark.parametrize("name", ["mlp", "language model", "grouped convolutions"])
def test_micro_batches_and_loss_scales_add_up(name: str) -> None:
    """Gradients of losses over k are smaller, but terms are more: as for one large batch."""
    _, loss, (x, y) = PROBLEMS[name]
    x, y = x[:4], y[:4]
    model = problem(name).model
    recorder, found = recorder_of(model, read_loss(loss))
    loss(model(x), y).backward()
    recorder.flush()
    whole = summed(recorder, found)
    found.clear()
    for half in (slice(2), slice(2, 4)):
        (1024.0 * loss(model(x[half]), y[half]) / 2).backward()
    recorder.flush()
    assert len(found) == 2
    parts = summed(recorder, found, scale=1024.0)
    for layer in whole:
        assert relative(product(parts[layer]), product(whole[layer])) < 1e-10


@pytest.mark.parametrize("kind", ["lstm", "gru", "packed", "attention", "cell"])
def test_layers_inside_of_modules(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if kind == "attention":
                self.body = nn.MultiheadAttention(4, 2, batch_first=True)
            elif kind == "cell":
                self.body = nn.LSTMCell(4, 3)
            else:
                made = nn.GRU if kind == "gru" else nn.LSTM
                self.body = made(4, 3, num_layers=2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(4 if kind == "attention" else 3 if kind == "cell" else 6, 2)

        def forward(self, x: Tensor) -> Tensor:
            if kind == "attention":
                out = self.body(x, x, x, need_weights=False)[0]
            elif kind == "cell":
                state = None
                for t in range(x.shape[1]):
                    state = self.body(x[:, t], state)
                return self.head(state[0])
            elif kind == "packed":
                packed = pack_padded_sequence(x, torch.tensor([4, 2, 3]), True, False)
                return self.head(self.body(packed)[1][0][-2:].transpose(0, 1).flatten(1))
            else:
                out = self.body(x)[0]
            return self.head(out.tanh().mean(1))

    model = seeded(Model())
    x, y = draw(3, 4, 4), torch.tensor([1, 0, 1])
    if kind == "packed":
        x[1, 2:] = 0.0
        x[2, 3:] = 0.0
    recorder, found = recorder_of(model, CE)
    F.cross_entropy(model(x), y).backward()
    recorder.flush()
    got = summed(recorder, found)
    assert recorder.coverage().percent == 100.0
    for layer in recorder.layers:
        pairs = [
            (u, g)
            for u, g in zip(found[0].uses, found[0].gradients, strict=True)
            if u.layer == layer.name
        ]
        a = input_matrix(layer, [u for u, _ in pairs], 3, slice(None), F64)
        b = output_matrix(layer, [u for u, _ in pairs], [g for _, g in pairs], 3, slice(None), F64)
        matrix = torch.einsum("gnto,gnti->goi", b, a)
        column = 0
        for name, part in zip(layer.names, layer.parts, strict=True):
            start = part.start - recorder.space.slice(name).start
            size = matrix.shape[0] * matrix.shape[1] * part.columns
            grad = recorder.params[name].grad.reshape(-1)[start : start + size]
            piece = matrix[..., column : column + part.columns].reshape(-1)
            assert torch.allclose(piece, grad, atol=1e-12), (layer.name, name)
            column += part.columns
    if kind != "packed":  # whose batches of examples kfac cannot split
        K = cl.kfac(cl.Risk(model, nn.CrossEntropyLoss(), (x, y)), fisher="empirical")
        for name, block in K.kronecker().blocks_of.items():
            wanted = dense(block.left, block.right, block.eigenvalues)
            assert relative(product(got[name]), wanted) < 1e-10, name


# ----------------------------------------------------------------------- sampled labels
@pytest.mark.parametrize("name", ["mlp", "mse, no bias", "tied, masked", "bce without weights"])
def test_sampled_factors_are_unbiased(name: str) -> None:
    """Left factors over 400 draws, against those of the exact type-2 Fisher matrix."""
    if name == "bce without weights":
        model = seeded(nn.Sequential(nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 2)))
        loss, x, y = nn.BCEWithLogitsLoss(), draw(6, 4), (draw(6, 2, seed=1) > 0).double()
        risk = cl.Risk(model, loss, (x, y))
    else:
        _, loss, (x, y) = PROBLEMS[name]
        risk = problem(name, batches=False)
        model = risk.model
    recorder, found = recorder_of(model, read_loss(loss), sampled=True)
    values: dict[str, list[Tensor]] = {}
    for number in range(400):
        recorder.draw = number
        loss(model(x), y).backward()
        recorder.flush()
        for layer, pair in summed(recorder, found, sampled=True).items():
            values.setdefault(layer, []).append(product(pair))
        found.clear()
    K = cl.kfac(risk, fisher="type2", eigen_corrected=False)
    for layer, block in K.blocks_of.items():
        if len(recorder.layers) and "scale" in _roles(recorder, layer):
            continue  # its right factor is of gradients
        drawn = torch.stack(values[layer]).flatten(1)
        wanted = dense(block.left, block.right, block.eigenvalues).flatten()
        error = drawn.std(0) / len(drawn) ** 0.5
        gap = (drawn.mean(0) - wanted).abs()
        assert float((gap / (error + 1e-12)).max()) < 5.0, layer
        assert relative(drawn.mean(0), wanted) < 0.15, layer


def _roles(recorder: LayerRecorder, name: str) -> tuple[str, ...]:
    return next(layer.roles for layer in recorder.layers if layer.name == name)


def test_sampled_labels_do_not_depend_on_batches() -> None:
    model = problem("mlp").model
    x, y = PROBLEMS["mlp"][2]
    recorder, found = recorder_of(model, CE, sampled=True)
    F.cross_entropy(model(x), y).backward()
    recorder.flush()
    whole = summed(recorder, found, sampled=True)
    first = found[0].sampled
    found.clear()
    for part in (slice(1, 6), slice(0, 1)):
        (512.0 * F.cross_entropy(model(x[part]), y[part])).backward()
    recorder.flush()
    parts = summed(recorder, found, sampled=True)
    for layer in whole:
        assert relative(product(parts[layer]), product(whole[layer])) < 1e-10
    found.clear()
    recorder.draw = 1
    F.cross_entropy(model(x), y).backward()
    recorder.flush()
    other = found[0].sampled
    assert first is not None
    assert other is not None
    assert not torch.equal(first[-1], other[-1])


def test_content_numbers_are_uniform_and_independent() -> None:
    x = draw(64, 3)
    u = content_uniform({"x": x, "n": 64}, 64, "a", torch.Size([64, 500]))
    v = content_uniform({"x": x}, 64, "b", torch.Size([64, 500]))
    n = u.numel()
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(float(u.var()) - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    for other in (v, u.roll(1, 0), u.roll(1, 1)):
        r = torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]
        assert abs(float(r)) < 5 / n**0.5
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    same = content_uniform({"x": x}, 64, "a", torch.Size([64, 500]))
    assert torch.equal(u, same)
    for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.float32):
        rows = (x > 0).to(dtype) if dtype in (torch.bool, torch.int64) else x.to(dtype)
        part = content_uniform(rows[5:9], 4, "a", torch.Size([4, 2]))
        assert torch.equal(part, content_uniform(rows, 64, "a", torch.Size([64, 2]))[5:9])
    assert content_uniform((), 2, "a", torch.Size([3])).shape == (3,)


def test_classes_along_the_last_axis_and_terms_that_are_ignored() -> None:
    """A language model's logits [N, T, V], which the loss flattens."""

    class Logits(Language):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens).transpose(1, 2)

    model = seeded(Logits())
    x = classes(5, 4, below=7)
    y = x.roll(1, 1)
    loss = nn.CrossEntropyLoss(ignore_index=2)
    found = []
    for output in (None, lambda out: out.flatten(0, 1)):
        recorder, own = recorder_of(model, read_loss(loss), sampled=True, output=output)
        loss(model(x).flatten(0, 1), y.flatten()).backward()
        recorder.flush()
        recorder.close()
        found += own
    assert float(found[0].terms) == float(found[1].terms) == float((y != 2).sum()) < y.numel()
    one, two = found[0].sampled, found[1].sampled
    assert one is not None
    assert two is not None
    scores = one[-1]
    assert torch.allclose(scores.sum(-1), torch.zeros(5, 4, dtype=F64), atol=1e-12)
    assert torch.equal((scores != 0).any(-1), y != 2)
    assert torch.allclose(scores, two[-1], atol=1e-12)


# ------------------------------------------------------------------ what is recorded when
def net() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)))


def test_only_passes_with_gradients_are_recorded() -> None:
    model, x = net(), draw(5, 3)
    recorder, found = recorder_of(model)
    with torch.no_grad():
        model(x)
    dropped = model(x)  # its gradients never come
    one, two = model(x), model(2 * x)  # two passes, one backward
    (one.sum() + two.square().sum()).backward()
    recorder.flush()
    assert len(found) == 2
    assert torch.equal(found[1].uses[0].x, 2 * x)
    dropped.sum().backward()
    recorder.flush()
    assert len(found) == 2
    y = model(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    recorder.flush()
    assert torch.equal(found[2].gradients[-1], torch.full((5, 2), 2.0, dtype=F64))
    for _ in range(30):
        model(x)
    assert len(recorder._passes) <= 9
    recorder.stop()
    model(x).sum().backward()
    recorder.flush()
    assert len(found) == 3


def test_layers_that_are_called_without_the_model() -> None:
    model, x = net(), draw(5, 3)
    recorder, found = recorder_of(model)
    for _ in range(2):
        model[2](model[0](x).tanh()).sum().backward()
    recorder.flush()
    assert [len(one.uses) for one in found] == [2, 2]
    assert found[0].examples == 5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_recorded_once(reentrant: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 3)
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            inner = checkpoint(lambda v: self.body(v).tanh(), x, use_reentrant=reentrant)
            return self.head(inner)

    model = seeded(Model())
    recorder, found = recorder_of(model)
    model(draw(4, 3).requires_grad_()).square().sum().backward()
    recorder.flush()
    names = [use.layer for use in found[0].uses]
    assert names == (["head"] if reentrant else ["body", "head"])
    assert all(g is not None for g in found[0].gradients)


def test_batch_statistics_are_not_moved() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    twin = copy.deepcopy(model)
    recorder, found = recorder_of(model)
    model(draw(6, 3)).square().sum().backward()
    twin(draw(6, 3)).square().sum().backward()
    recorder.flush()
    summed(recorder, found)
    for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, other)
    rows = found[0].uses[1]
    assert rows.layer == "1"


def test_half_precision_rows_are_wide() -> None:
    model = net().float()
    recorder, found = recorder_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(draw(5, 3).float()).float().square().sum().backward()
        model(draw(5, 3).float())  # hands the first over, within autocast
        sums = factor_sums(list(recorder.layers), torch.empty(0))
    assert len(found) == 1
    for layer in recorder.layers:
        rows = input_matrix(
            layer,
            [u for u in found[0].uses if u.layer == layer.name],
            5,
            slice(None),
            torch.float32,
        )
        assert rows.dtype == torch.float32
    assert isinstance(sums, Sums)


# ---------------------------------------------------------------------- no trace is left
def test_close_leaves_the_model_as_it_was() -> None:
    model = net()
    model[0].register_forward_hook(lambda *_: None)
    before = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    more = [set(vars(m)) for m in model.modules()]
    recorder, _ = recorder_of(model)
    recorder.start()
    assert sum(len(m._forward_hooks) for m in model.modules()) == 4
    model(draw(2, 3))
    recorder.close()
    recorder.close()
    assert before == [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    assert more == [set(vars(m)) for m in model.modules()]
    assert not any(
        m._forward_hooks_with_kwargs or m._forward_pre_hooks_with_kwargs for m in model.modules()
    )


def test_copies_are_not_recorded() -> None:
    model, x = net(), draw(5, 3)
    recorder, found = recorder_of(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        copied(x).sum().backward()
        recorder.flush()
        assert not found
        assert torch.equal(copied(x), model(x))


def test_a_forgotten_recorder_takes_its_hooks_along() -> None:
    model = net()
    recorder, _ = recorder_of(model)
    model(draw(5, 3)).sum().backward()
    alive = weakref.ref(recorder)
    del recorder
    gc.collect()
    assert alive() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(draw(5, 3)).sum().backward()


# ------------------------------------------------------------------------------- errors
def test_changed_inputs_are_named() -> None:
    model, x = nn.Linear(3, 3), draw(5, 3).float()
    model.weight.requires_grad_(False)  # or autograd itself would complain
    recorder, _ = recorder_of(model)
    out = model(x)
    x.add_(1.0)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="input of layer.*changed in place.*x = x"):
        recorder.flush()


def test_bad_arguments() -> None:
    sink = print
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got list"):
        LayerRecorder([], sink=sink)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="do not run inside torch.compile; pass the model before"):
        LayerRecorder(torch.compile(net(), backend="eager"), sink=sink)  # type: ignore[arg-type]  # a function
    with pytest.raises(ValueError, match="pass loss=.*or use fisher='empirical'"):
        LayerRecorder(net(), sink=sink, sampled=True)
    loss = read_loss(nn.CrossEntropyLoss(weight=torch.ones(2)))
    with pytest.raises(ValueError, match="weights of classes or elements.*leave loss= out"):
        LayerRecorder(net(), sink=sink, loss=loss)
    with pytest.raises(ValueError, match="none whose terms curvlib knows.*leave loss= out"):
        LayerRecorder(net(), sink=sink, loss=read_loss(nn.L1Loss()))


def test_losses_that_do_not_fit() -> None:
    model = seeded(nn.Conv1d(3, 4, 1))
    x = draw(2, 3, 5)
    recorder_of(model, CE, sampled=True)
    recorder, _ = recorder_of(model, CE)
    with pytest.raises(ValueError, match=r"not one of cross-entropy.*axis 1 nor along the last"):
        model(x).square().sum().backward()
    recorder.close()

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), x

    pair = Pair().double()
    recorder, _ = recorder_of(pair, CE, sampled=True)
    with pytest.raises(TypeError, match="reads the output as one tensor.*output=lambda"):
        pair(draw(2, 3))[0].sum().backward()


def test_uncovered_parameters_have_a_reason() -> None:
    recorder = LayerRecorder(Hidden(), "a.*", sink=print)
    assert recorder.coverage().percent == 100.0
    model = nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 2, 1))
    recorder = LayerRecorder(model, sink=print)
    assert list(recorder.uncovered) == ["1.weight", "1.bias"]
    assert "it belongs to Bilinear" in recorder.uncovered["1.weight"]
