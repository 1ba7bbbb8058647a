"""Risks whose loss owns the head: derivatives chunk by chunk against the logits all at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian as autograd_hessian
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import curvlib as cl
from curvlib.cli.target import converted
from curvlib.operators.accuracy import accuracy
from curvlib.operators.example_products import example_products
from curvlib.operators.fisher_diagonal import fisher_diagonal
from curvlib.operators.perturbed import perturbed_values
from curvlib.operators.scores.example_values import error_norms, example_losses
from tests import models

pytestmark = pytest.mark.filterwarnings("ignore:curvlib:UserWarning")

F64 = torch.float64
VOCABULARY, LENGTH, WIDTH = 5, 4, 3


class Streamed:
    """Data that are not in memory: graphs are not kept, and products take the forward route."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def body(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """What the head of a :class:`tests.models.GPT` gets."""
    x = model.embed(batch[0]) + model.position[: batch[0].shape[1]]
    return model.norm(model.blocks(x))


def checkpointed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x = model.embed(batch[0]) + model.position[: batch[0].shape[1]]
    return model.norm(checkpoint(model.blocks, x, use_reentrant=False))


@dataclass(frozen=True)
class Case:
    """A transformer, and what is special about it."""

    head: str = "tied"
    params: Any = None
    streamed: bool = False
    forward: Callable[..., Tensor] = body
    loss: dict[str, Any] = field(default_factory=dict)
    chunk: int = 3

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            gpt = models.GPT(VOCABULARY, LENGTH, WIDTH, 1, 2)
            if self.head != "tied":
                gpt.head = nn.Linear(WIDTH, VOCABULARY, bias=self.head == "bias")
            return models.shake(gpt).double()

    def risks(self, model: nn.Module | None = None) -> tuple[cl.Risk, cl.Risk]:
        """The risk by chunks, and the one with all logits."""
        model = self.model() if model is None else model
        batches = data(self.loss.get("ignore_index", -100))
        held = Streamed(batches) if self.streamed else batches
        chunked = cl.Risk(
            model,
            cl.LinearCrossEntropy(model.head, self.chunk, **self.loss),
            held,
            forward=self.forward,
            params=self.params,
        )
        plain = cl.Risk(
            model,
            nn.CrossEntropyLoss(**self.loss),
            held,
            forward=lambda m, b: m(b[0]).transpose(1, 2),
            target=lambda b: b[1],
            params=self.params,
        )
        return chunked, plain


def data(ignored: int = -100) -> list[tuple[Tensor, Tensor]]:
    """Unequal batches of 5 sequences; some tokens, a whole sequence among them, are ignored."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(VOCABULARY, (5, LENGTH), generator=generator)
    y = torch.randint(VOCABULARY, (5, LENGTH), generator=generator)
    y[0, :2] = y[3] = y[4, -1] = ignored
    return [(x[:3], y[:3]), (x[3:], y[3:])]


WEIGHTS = torch.linspace(0.2, 1.7, VOCABULARY, dtype=F64)
CASES = {
    "tied": Case(),
    "tied, streamed": Case(streamed=True),
    "bias": Case("bias"),
    "bias, streamed": Case("bias", streamed=True),
    "no bias": Case("no bias"),
    "frozen head": Case("bias", ["blocks.*", "embed.*", "norm.*"]),
    "frozen body": Case("bias", ["head.*"]),
    "frozen body, streamed": Case("bias", ["head.*"], streamed=True),
    "frozen head weight": Case("bias", ["head.bias", "norm.*"]),
    "checkpoints": Case(forward=checkpointed),
    "checkpoints, streamed": Case(forward=checkpointed, streamed=True),
    "class weights, smoothing": Case("bias", loss={"weight": WEIGHTS, "label_smoothing": 0.2}),
    "smoothing": Case(loss={"label_smoothing": 0.1}),
    "sum": Case(loss={"reduction": "sum"}),
    "another ignored index": Case(loss={"ignore_index": 3}, chunk=5),
    "one token": Case(chunk=1),
    "a chunk that divides": Case(chunk=4),
    "a chunk of all tokens": Case("bias", chunk=10**6),
}


def risks(name: str) -> tuple[cl.Risk, cl.Risk]:
    return CASES[name].risks()


def columns(risk: cl.Risk, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(risk.space.size, count, dtype=F64, generator=generator)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    found, expected = found.detach(), expected.detach()
    scale = float(expected.abs().max())
    assert scale > 0.0
    assert float((found - expected).abs().max()) <= tolerance * scale


# ----------------------------------------------------------------------- exactness
@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_products_are_those_of_the_logits(name: str) -> None:
    chunked, plain = risks(name)
    close(chunked.value(), plain.value())
    close(chunked.gradient(), plain.gradient())
    assert chunked.weight() == plain.weight()
    V = columns(chunked, 4)
    for operator in (cl.hessian, cl.ggn):
        found = operator(chunked) @ V
        close(found, operator(plain) @ V)
        close(V.T @ found, found.T @ V)


@pytest.mark.parametrize("name", ["tied, streamed", "bias"])
def test_dense_matrices_are_those_of_the_logits(name: str) -> None:
    chunked, plain = risks(name)
    for operator in (cl.hessian, cl.ggn):
        found = operator(chunked).to_dense()
        close(found, operator(plain).to_dense())
        close(found, found.T)


def test_against_torch_alone() -> None:
    """Tied weights: cross terms of body and head, by autograd on the whole data."""
    model = CASES["tied"].model()
    chunked, _ = CASES["tied"].risks(model)
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    names = chunked.space.names

    def value(theta: Tensor) -> Tensor:
        parts = dict(zip(names, chunked.space.split(theta), strict=True))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            logits = functional_call(model, parts, (x,))
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    theta = chunked.space.join(list(chunked.params.values()))
    close(chunked.value(), value(theta))
    close(cl.hessian(chunked).to_dense(), autograd_hessian(value, theta))


@pytest.mark.parametrize(
    "name", ["tied", "bias, streamed", "frozen body", "class weights, smoothing"]
)
@pytest.mark.parametrize("kind", ["type2", "mc", "empirical"])
def test_fisher_matrices(name: str, kind: str) -> None:
    """Sampled targets are the same, too."""
    chunked, plain = risks(name)
    settings = {"samples": 3, "seed": 5} if kind == "mc" else {}
    V = columns(chunked, 4)
    found = cl.fisher(chunked, kind, **settings) @ V
    close(found, cl.fisher(plain, kind, **settings) @ V)
    close(V.T @ found, found.T @ V)
    assert bool(((V * found).sum(0) >= 0.0).all())
    if kind == "type2":
        close(found, cl.ggn(chunked) @ V)


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("memory", [0, 2**30])
def test_blocks_of_columns(count: int, streamed: bool, memory: int) -> None:
    chunked, plain = Case("bias", streamed=streamed).risks()
    V = columns(chunked, count)
    for operator in (cl.hessian, cl.ggn):
        op, expected = operator(chunked, memory=memory), operator(plain) @ V
        for _ in range(2):  # the second time on a graph that was kept
            close(op @ V, expected)


def test_parts_of_the_parameters() -> None:
    """Diagonal blocks of layers, which the head or the body alone makes."""
    chunked, plain = risks("bias")
    for operator in (cl.hessian, cl.ggn):
        found, expected = operator(chunked).blocks(), operator(plain).blocks()
        assert list(found) == list(expected)
        for name in ("head", "embed", "norm"):
            v = columns(chunked, 1)[: found[name].shape[0], 0]
            close(found[name] @ v, expected[name] @ v)


def test_differentiable_products() -> None:
    """Third derivatives, by which hypergradients go."""
    chunked, plain = risks("tied")
    close(
        cl.hessian_gradient_product(chunked, differentiable=True),
        cl.hessian_gradient_product(plain, differentiable=True),
    )
    v = columns(chunked, 1)[:, 0]

    def third(risk: cl.Risk) -> Tensor:
        (product,) = (v @ cl.hessian_gradient_product(risk, differentiable=True)).reshape(1)
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(product, list(risk.params.values()))]
        )

    close(third(chunked), third(plain))


@pytest.mark.parametrize("head", ["tied", "bias"])
def test_half_precision(head: str) -> None:
    """bfloat16 parameters: float32 vectors, and errors no larger than with all logits."""
    exact = Case(head).model().bfloat16().double()
    model = copy.deepcopy(exact).bfloat16()
    chunked, plain = Case(head).risks(model)
    truth, _ = Case(head).risks(exact)
    v = columns(truth, 1)[:, 0]
    close(chunked.value().double(), plain.value().double(), 1e-6)
    eps = torch.finfo(torch.bfloat16).eps

    def error(found: Tensor, expected: Tensor) -> float:
        assert found.dtype == torch.float32
        return float((found.double() - expected).norm() / expected.norm())

    for work in (
        cl.Risk.gradient,
        lambda risk: cl.hessian(risk) @ v.to(risk.space.dtype),
        lambda risk: cl.ggn(risk) @ v.to(risk.space.dtype),
    ):
        expected = work(truth)
        assert error(work(chunked), expected) <= 1.2 * error(work(plain), expected) + eps


# -------------------------------------------------------------------------- memory
class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.entries = max([self.entries, *found])
        return out


class Multiplied(TorchDispatchMode):
    """Floating-point operations of matrix products, those in place included."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            self.operations += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def _largest(work: Callable[[], Any]) -> int:
    with Largest() as largest:
        work()
    return largest.entries


PRODUCTS = {
    "value": lambda risk, V: risk.value(),
    "gradient": lambda risk, V: risk.gradient(),
    "Hessian": lambda risk, V: cl.hessian(risk) @ V,
    "GGN": lambda risk, V: cl.ggn(risk) @ V,
    "type-2": lambda risk, V: cl.fisher(risk, "type2") @ V,
    "Monte-Carlo": lambda risk, V: cl.fisher(risk, "mc", samples=2) @ V,
    "empirical": lambda risk, V: cl.fisher(risk, "empirical") @ V,
    "example losses": lambda risk, V: example_losses(risk),
    "accuracy": lambda risk, V: accuracy(risk),
}


@pytest.mark.parametrize("work", PRODUCTS)
@pytest.mark.parametrize(("count", "streamed"), [(1, False), (1, True), (8, True)])
def test_no_tensor_is_larger_than_a_chunk(work: str, count: int, streamed: bool) -> None:
    """Beside the vectors themselves; with all logits at once there is."""
    vocabulary, tokens, chunk = 101, 256, 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(vocabulary, 2), nn.Linear(2, 2), nn.Tanh())
        model.append(nn.Linear(2, vocabulary))
        batch = (torch.randint(vocabulary, (16, 16)), torch.randint(vocabulary, (16, 16)))
    held = Streamed([batch]) if streamed else batch
    loss = cl.LinearCrossEntropy(model[3], chunk)
    chunked = cl.Risk(model, loss, held, forward=lambda m, b: m[:3](b[0]))
    plain = cl.Risk(
        model,
        nn.CrossEntropyLoss(),
        held,
        forward=lambda m, b: m(b[0]).flatten(0, 1),
        target=lambda b: b[1].flatten(),
    )
    V = torch.randn(chunked.space.size, count)
    bound = max(chunk * vocabulary, V.numel(), count * tokens * 2)  # and the hidden states'
    assert bound < tokens * vocabulary / 4
    assert _largest(lambda: PRODUCTS[work](chunked, V)) <= bound
    assert _largest(lambda: PRODUCTS[work](plain, V)) >= tokens * vocabulary


@pytest.mark.gpu
@pytest.mark.parametrize("operator", [cl.hessian, cl.ggn])
def test_memory_on_a_gpu(operator: Callable[[cl.Risk], cl.LinearOperator]) -> None:
    """Right there, too, in less memory than one copy of all logits."""
    vocabulary, tokens = 50_257, 4096
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(vocabulary, 16), nn.Linear(16, 16), nn.Tanh())
        model.append(nn.Linear(16, vocabulary, bias=False))
        batch = (torch.randint(vocabulary, (tokens,)), torch.randint(vocabulary, (tokens,)))
    model[3].weight = model[0].weight

    def risk(device: str, count: int) -> cl.Risk:
        model.to(device)
        loss = cl.LinearCrossEntropy(model[3], 128)
        part = tuple(t[:count].to(device) for t in batch)
        return cl.Risk(model, loss, part, forward=lambda m, b: m[:3](b[0]))

    expected = operator(risk("cpu", 64))
    v = torch.randn(expected.shape[1], generator=torch.Generator().manual_seed(0))
    exact = expected @ v
    close((operator(risk("cuda", 64)) @ v.cuda()).cpu(), exact, 1e-4)
    op, along = operator(risk("cuda", tokens)), v.cuda()
    op @ along
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    op @ along
    assert torch.cuda.max_memory_allocated() - before < 4 * tokens * vocabulary


def test_work_is_that_of_the_formulas() -> None:
    """Products of ``[tokens, V]`` with ``[V, d]``: 1, 3 and 7; a GGN takes 1 + 4 K."""
    tokens, vocabulary, width = 12, 11, 5
    head = nn.Linear(width, vocabulary)
    hidden = torch.randn(tokens, width, requires_grad=True)
    target = torch.randint(vocabulary, (tokens,))
    loss = cl.LinearCrossEntropy(head, chunk=4)
    leaves = [hidden, head.weight, head.bias]
    unit = 2 * tokens * vocabulary * width

    def units(work: Callable[[], Any]) -> tuple[float, Any]:
        with Multiplied() as counter:
            out = work()
        return counter.operations / unit, out

    cost, value = units(lambda: loss(hidden, target))
    assert cost == 1
    cost, first = units(lambda: torch.autograd.grad(value, leaves, create_graph=True))
    assert cost == 3
    along = [torch.randn_like(leaf) for leaf in leaves]
    cost, _ = units(lambda: torch.autograd.grad(first, leaves, along))
    # beside the means <p, r>: 1 / d
    assert 7 <= cost <= 7 + 1 / width

    model = nn.Sequential(nn.Identity(), head)
    risk = cl.Risk(model, loss, (hidden.detach(), target), forward=lambda m, b: b[0])
    for count in (1, 8):
        V = torch.randn(risk.space.size, count)
        cost, _ = units(lambda V=V: cl.ggn(risk) @ V)
        assert cost == 1 + 2 * count  # the hidden states do not depend on parameters


# ------------------------------------------------------------------ what surrounds them
def test_model_is_untouched() -> None:
    model = Case("bias").model()
    model.head.weight.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    chunked, _ = Case("bias", ["embed.*", "head.bias"]).risks(model)
    v = torch.ones(chunked.space.size, dtype=F64)
    cl.hessian(chunked) @ v, cl.ggn(chunked) @ v, chunked.gradient(), chunked.value()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not model.head.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_copies_have_their_own_head() -> None:
    chunked, _ = risks("bias")
    twin = copy.deepcopy(chunked.model)
    with torch.no_grad():
        twin.head.weight.mul_(2.0)
    moved, expected = chunked.of(twin), Case("bias").risks(twin)[1]
    close(moved.value(), expected.value())
    close(moved.gradient(), expected.gradient())
    assert float(moved.value()) != float(chunked.value())
    single = converted(chunked, dtype=torch.float32)
    assert single.loss.linear.head is single.model.head
    close(single.value().double(), chunked.value(), 1e-5)
    wrapped = torch.compile(copy.deepcopy(chunked.model), backend="eager")
    assert chunked.of(wrapped).loss.linear.head is wrapped._orig_mod.head


def test_what_needs_losses_and_gradients_alone() -> None:
    chunked, plain = risks("bias")
    close(example_losses(chunked), example_losses(plain))
    assert accuracy(chunked) == accuracy(plain)
    for rows in (cl.gradients, lambda risk: cl.gradient_rows(risk, 5)):
        close(torch.cat(list(rows(chunked))), torch.cat(list(rows(plain))))
    found, expected = (fisher_diagonal(r, fisher="empirical").diagonal() for r in (chunked, plain))
    close(found, expected)
    point = {"head.weight": 1.5 * chunked.model.head.weight.detach()}
    found, expected = (perturbed_values(r, [lambda: point]) for r in (chunked, plain))
    close(found, expected)
    assert not chunked.check().findings
    v = columns(chunked, 1)[:, 0]
    for kind in ("hessian", "ggn"):
        found, expected = (
            torch.cat([part.matmat(v[:, None]) for part in example_products(r, kind=kind)])
            for r in (chunked, plain)
        )
        close(found, expected)
    difference = cl.hessian(chunked, method="finite_difference") @ v
    close(difference, cl.hessian(plain) @ v, 1e-7)


NEEDS_LOGITS = {
    "K-FAC": cl.kfac,
    "K-FAC of true targets": lambda risk: cl.kfac(risk, fisher="empirical"),
    "Jacobian": lambda risk: cl.jacobian(risk) @ torch.ones(risk.space.size, dtype=F64),
    "Fisher diagonal": lambda risk: fisher_diagonal(risk, fisher="type2"),
    "sampled rows": lambda risk: list(cl.gradient_rows(risk, 2, kind="mc")),
    "error norms": error_norms,
    "optimizer": lambda risk: cl.optim.KFAC(risk.model, loss=risk.loss.function),
}


@pytest.mark.parametrize("what", NEEDS_LOGITS)
def test_what_needs_the_logits_says_so(what: str) -> None:
    chunked, _ = risks("bias")
    with pytest.raises(
        TypeError, match=r"needs the logits of a batch as one .*CrossEntropyLoss\(\)"
    ):
        NEEDS_LOGITS[what](chunked)
