"""The loss that owns the head, as a function of hidden states, weight and bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import curvlib as cl
from curvlib.core.loss import read_loss

F64 = torch.float64


def problem(
    tokens: int, vocabulary: int, width: int, *, bias: bool, ignored: float, seed: int
) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(width, vocabulary, bias=bias, dtype=F64)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=F64))
    hidden = torch.randn(tokens, width, generator=generator, dtype=F64, requires_grad=True)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < ignored] = -100
    target[0] = 0  # a mean over nothing is nan
    return head, hidden, target


def derivatives(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The value, its gradient, and the gradient of ``<gradient, ones / (1 + i)>``."""
    first = torch.autograd.grad(value, leaves, create_graph=True)
    along = sum((g.flatten() / torch.arange(1, g.numel() + 1, dtype=g.dtype)).sum() for g in first)
    return [value, *first, *torch.autograd.grad(along, leaves)]


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(1, 6),
    width=st.integers(1, 3),
    chunk=st.integers(1, 11),
    bias=st.booleans(),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_no_chunk_changes_anything(
    tokens: int,
    vocabulary: int,
    width: int,
    chunk: int,
    bias: bool,
    weighted: bool,
    smoothing: float,
    reduction: str,
    ignored: float,
    seed: int,
) -> None:
    """Value and first and second derivatives are those of ``F.cross_entropy`` of the logits."""
    head, hidden, target = problem(tokens, vocabulary, width, bias=bias, ignored=ignored, seed=seed)
    kw: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    kw["weight"] = torch.arange(1.0, vocabulary + 1.0, dtype=F64) if weighted else None
    leaves = [hidden, *head.parameters()]
    found = derivatives(cl.LinearCrossEntropy(head, chunk, **kw)(hidden, target), leaves)
    expected = derivatives(F.cross_entropy(head(hidden), target, **kw), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
def test_two_derivatives_by_differences(bias: bool) -> None:
    head, hidden, target = problem(5, 4, 2, bias=bias, ignored=0.4, seed=0)
    loss = cl.LinearCrossEntropy(head, 2, label_smoothing=0.1)

    def terms(hidden: Tensor, *held: Tensor) -> Tensor:
        names = dict(zip(("weight", "bias"), held, strict=False))
        with torch.nn.utils.stateless._reparametrize_module(head, names):
            return loss.each(loss.logits(hidden), target)

    leaves = (hidden, *(p.detach().clone().requires_grad_() for p in head.parameters()))
    assert torch.autograd.gradcheck(terms, leaves)
    assert torch.autograd.gradgradcheck(terms, leaves)


def test_sequences_and_single_tokens() -> None:
    head, hidden, target = problem(6, 5, 3, bias=True, ignored=0.0, seed=1)
    loss = cl.LinearCrossEntropy(head, 4)
    whole = loss(hidden, target)
    torch.testing.assert_close(loss(hidden.view(2, 3, 3), target.view(2, 3)), whole)
    each = loss.each(loss.logits(hidden.view(2, 3, 3)), target.view(2, 3))
    assert each.shape == (2, 3)
    torch.testing.assert_close(each.mean(), whole)
    torch.testing.assert_close(loss(hidden[0], target[0]), each[0, 0])
    assert loss.each(loss.logits(hidden[:0]), target[:0]).shape == (0,)


def test_an_embedding_is_a_head() -> None:
    table = nn.Embedding(5, 3)
    hidden, target = torch.randn(4, 3), torch.tensor([0, 4, 2, 2])
    found = cl.LinearCrossEntropy(table)(hidden, target)
    torch.testing.assert_close(found, F.cross_entropy(hidden @ table.weight.T, target))


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, F64)])
def test_hidden_states_of_another_type(types: tuple[torch.dtype, torch.dtype]) -> None:
    """Autocast leaves half-precision hidden states before a float32 head."""
    head = nn.Linear(3, 5, dtype=types[1])
    hidden = torch.randn(4, 3).to(types[0]).requires_grad_()
    target = torch.tensor([0, 4, 2, 2])
    found = cl.LinearCrossEntropy(head, 3)(hidden, target)
    assert found.dtype == types[1]
    torch.testing.assert_close(found, F.cross_entropy(head(hidden.to(types[1])), target))
    found.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == types[0]


def test_it_trains() -> None:
    head, hidden, target = problem(6, 5, 3, bias=True, ignored=0.3, seed=2)
    cl.LinearCrossEntropy(head, 4)(hidden, target).backward()
    expected = torch.autograd.grad(
        F.cross_entropy(head(hidden), target), [hidden, head.weight, head.bias]
    )
    for leaf, g in zip((hidden, head.weight, head.bias), expected, strict=True):
        torch.testing.assert_close(leaf.grad, g)


def test_how_a_risk_reads_it() -> None:
    loss = read_loss(cl.LinearCrossEntropy(nn.Linear(2, 5), label_smoothing=0.1, reduction="sum"))
    assert loss.known
    assert loss.describe() == "linear_cross_entropy (sum, label_smoothing=0.1)"


# -------------------------------------------------------------------------- bad input
class Adapted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def _hooked() -> nn.Module:
    head = nn.Linear(2, 5)
    head.register_forward_hook(lambda *_: None)
    return head


HEADS = {
    "a subclass": lambda: Adapted(2, 5),
    "weight norm": lambda: weight_norm(nn.Linear(2, 5)),
    "hooks": _hooked,
    "not linear": lambda: nn.Sequential(nn.Linear(2, 5)),
    "a weight": lambda: torch.zeros(5, 2),
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_that_do_more_are_refused(head: str) -> None:
    with pytest.raises(TypeError, match=r"head= is a plain nn.Linear .* use torch.nn.CrossEntropy"):
        cl.LinearCrossEntropy(HEADS[head]())


SETTINGS = {
    "chunk= is a number of tokens, an int; got float": {"chunk": 2.0},
    "chunk= is a number of tokens, an int; got bool": {"chunk": True},
    "chunk= needs at least one token, got 0": {"chunk": 0},
    "weight= needs one number for each of the head's 5 classes": {"weight": torch.ones(4)},
    "label_smoothing= is between 0 and 1, got 1.5": {"label_smoothing": 1.5},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_bad_settings(message: str) -> None:
    error = TypeError if "an int" in message else ValueError
    with pytest.raises(error, match=message):
        cl.LinearCrossEntropy(nn.Linear(2, 5), **SETTINGS[message])


def test_a_reduction_that_is_none() -> None:
    with pytest.raises(ValueError, match="reduction='none', which gives no scalar"):
        read_loss(cl.LinearCrossEntropy(nn.Linear(2, 5), reduction="none"))


def test_a_head_of_another_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 5))
    data = (torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="is no module of the model; pass the model's own"):
        cl.Risk(model, cl.LinearCrossEntropy(nn.Linear(2, 5)), data)


OUTPUTS = {
    "needs hidden states of shape .*2.*, which its head gets, but the output has shape .3, 5.": (
        lambda m, b: m(b[0])
    ),
    "needs forward= to return what the head gets, one tensor of hidden states, got tuple": (
        lambda m, b: (m[0](b[0]), None)
    ),
    "needs class indices of shape .3, 1., got .3.": lambda m, b: m[0](b[0])[:, None],
}


@pytest.mark.parametrize("message", OUTPUTS)
def test_outputs_that_are_no_hidden_states(message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 5))
    data = (torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    loss = cl.LinearCrossEntropy(model[1])
    risk = cl.Risk(model, loss, data, forward=OUTPUTS[message])
    v = torch.ones(risk.space.size)
    for work in (cl.Risk.value, lambda risk: cl.hessian(risk) @ v, lambda risk: cl.ggn(risk) @ v):
        with pytest.raises((TypeError, ValueError), match=message):
            work(risk)


def test_targets_that_are_no_indices() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 5))
    loss, forward = cl.LinearCrossEntropy(model[1]), lambda m, b: m[0](b[0])
    risk = cl.Risk(model, loss, (torch.zeros(3, 2), torch.ones(3, 5) / 5), forward=forward)
    v = torch.ones(risk.space.size)
    with pytest.raises(TypeError, match="needs class indices .* got torch.float32; use target="):
        risk.value()
    with pytest.raises(TypeError, match="needs class indices .* got torch.float32; use target="):
        cl.ggn(risk) @ v
