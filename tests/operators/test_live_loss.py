"""Derivatives of a live loss: against dense Hessians, and what its errors say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from curvlib.operators.live.loss import (
    accumulate_gradient,
    gradient,
    gradient_and_products,
    require_live,
)
from tests import cases

F64 = torch.float64
NAMES = [
    *("RMSNorm", "InstanceNorm", "sdpa", "LSTM", "GRU", "embedding", "tied", "called twice"),
    *("convolutions", "untouched", "0-d", "frozen"),
]


@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_dense_hessian(name: str) -> None:
    case = cases.build(name)
    named = case.selected()
    params, sizes = list(named.values()), [p.numel() for p in named.values()]

    def loss() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return case.outputs(case.model).sin().sum()

    def at(flat: Tensor) -> Tensor:
        parts = [t.view(p.shape) for t, p in zip(flat.split(sizes), params, strict=True)]
        values = dict(zip(named, parts, strict=True))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(
                _Outputs(case), {f"model.{k}": v for k, v in values.items()}, ()
            )

    flat = torch.cat([p.detach().reshape(-1) for p in params])
    g = torch.Generator().manual_seed(0)
    vectors = [[torch.randn(p.shape, generator=g, dtype=F64) for p in params] for _ in range(2)]
    H = torch.autograd.functional.hessian(at, flat)
    first, products = gradient_and_products(loss(), params, vectors)
    expected = torch.autograd.functional.jacobian(at, flat)
    torch.testing.assert_close(_joined(first, params), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(_joined(gradient(loss(), params), params), expected)
    for vector, product in zip(vectors, products, strict=True):
        whole = H @ torch.cat([v.reshape(-1) for v in vector])
        torch.testing.assert_close(_joined(product, params), whole, rtol=1e-8, atol=1e-9)
    assert all(t is None or not t.requires_grad for t in [*first, *products[0]])


class _Outputs(nn.Module):
    def __init__(self, case: cases.Case) -> None:
        super().__init__()
        self.model, self.case = case.model, case

    def forward(self) -> Tensor:
        return self.case.outputs(self.model).sin().sum()


def _joined(parts: list[Tensor | None], params: list[Tensor]) -> Tensor:
    pairs = zip(parts, params, strict=True)
    return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in pairs])


def test_a_linear_loss_has_no_products_and_no_parameters_no_derivatives() -> None:
    w, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    first, products = gradient_and_products((2 * w).sum(), [w, unused], [[w, unused]])
    assert torch.equal(first[0], torch.full((2,), 2.0))
    assert first[1] is None
    assert products == [[None, None]]
    assert gradient((2 * w).sum(), []) == []
    assert gradient_and_products((2 * w).sum(), [], [[]]) == ([], [[]])


def test_the_graph_is_kept_on_request_and_freed_otherwise() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = w.sin().exp().square().sum()
    for _ in range(2):
        gradient_and_products(loss, [w], [[torch.ones(2)]], keep_graph=True)
    gradient(loss, [w], keep_graph=True)
    gradient_and_products(loss, [w], [[torch.ones(2)], [torch.ones(2)]])
    for again in (
        lambda: gradient_and_products(loss, [w], [[torch.ones(2)]]),
        lambda: gradient(loss, [w]),
        lambda: accumulate_gradient(loss),
    ):
        with pytest.raises(RuntimeError, match="freed before.*opt.backward"):
            again()
    accumulate_gradient((w**3).sum())
    assert w.grad is not None


def test_sparse_gradients_become_dense() -> None:
    table = nn.Embedding(5, 2, sparse=True).double()
    dense = nn.Embedding(5, 2, _weight=table.weight.detach().clone())
    rows, v = torch.tensor([1, 1, 3]), torch.randn(5, 2, dtype=F64)
    found = [gradient_and_products(m(rows).cos().sum(), [m.weight], [[v]]) for m in (table, dense)]
    torch.testing.assert_close(found[0], found[1])


# ---------------------------------------------------------------------------------- errors
def products_of(loss: Tensor, *params: Tensor, verify: bool = True) -> None:
    vectors = [[torch.ones_like(p) for p in params]]
    gradient_and_products(loss, list(params), vectors, verify=verify)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.cos()


def test_functions_that_are_differentiable_once_are_found() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="@once_differentiable.*first derivatives only"):
        products_of((Once.apply(w) ** 2).sum(), w)


def test_operations_without_double_backward_are_named() -> None:
    q = torch.randn(1, 1, 3, 2, requires_grad=True)
    attention = F.scaled_dot_product_attention(q, 2 * q, 3 * q)
    with pytest.raises(RuntimeError, match="'_scaled_dot_product_.*' in the graph.*MATH"):
        products_of(attention.sum(), q)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not",
            "'_cudnn_rnn_backward' in the graph.*cudnn.flags",
        ),
        ("derivative for aten::odd_backward is not implemented", "'odd_backward'.*replace it"),
        (
            "torch.compile with aot_autograd does not currently support double backward",
            "the model is compiled.*_orig_mod",
        ),
        ("something else", "cannot be differentiated again: something else; find the operation"),
    ],
)
def test_other_errors_of_pytorch_are_explained(text: str, expected: str) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            raise RuntimeError(text)

    w = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match=expected):
        products_of((Fails.apply(w) ** 2).sum(), w)


def test_parameters_that_changed_since_the_forward_pass() -> None:
    w = torch.ones(2, requires_grad=True)
    loss = (w**3).sum()
    with torch.no_grad():
        w.add_(1.0)
    with pytest.raises(RuntimeError, match="changed since the forward pass.*compute the loss anew"):
        products_of(loss, w)


def test_memory_that_runs_out_is_not_explained_away() -> None:
    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("full")

    w = torch.ones(2, requires_grad=True)
    for call in (
        lambda: products_of(Full.apply(w).sum(), w),
        lambda: gradient(Full.apply(w).sum(), [w]),
        lambda: accumulate_gradient(Full.apply(w).sum()),
    ):
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            call()


def test_losses_that_are_none() -> None:
    w = torch.ones(2, requires_grad=True)
    for loss, error, text in (
        (None, TypeError, "the loss should be a scalar tensor.*got NoneType; does the function"),
        (2.0, TypeError, "got float$"),
        (torch.tensor(2), TypeError, "real floating-point scalar, got torch.int64"),
        (w, ValueError, r"should be a scalar, got shape \[2\]; reduce it"),
        (torch.tensor(2.0), ValueError, "has no graph.*no_grad"),
    ):
        with pytest.raises(error, match=text):
            require_live(loss)
    assert require_live(w.sum().view(1)).shape == (1,)


@pytest.mark.parametrize("exponent", [1, 4, 17, 40])
def test_products_are_those_of_the_loss_without_its_scale(exponent: int) -> None:
    scale, w = 2.0**exponent, torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    z = torch.tensor([1.0, -3.0], dtype=F64)
    loss = (w**3).sum() + w.prod() ** 2
    hessian = torch.autograd.functional.hessian(lambda v: (v**3).sum() + v.prod() ** 2, w.detach())
    (g,), ((product,),) = gradient_and_products(scale * loss, [w], [[z]], scale=scale)
    torch.testing.assert_close(product, hessian @ z, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(g / scale, 3 * w.detach() ** 2 + 2 * 2 * torch.tensor([2.0, 1.0]))


def test_reentrant_checkpointing_is_named_where_it_hides_gradients() -> None:
    w, v = (torch.ones(2, requires_grad=True) for _ in range(2))

    def loss(*, reentrant: bool) -> Tensor:
        x = torch.ones(2, requires_grad=True)
        return (checkpoint(lambda x: (w * x).sin(), x, use_reentrant=reentrant) * v).sum()

    gradient(loss(reentrant=False), [w, v])
    gradient(loss(reentrant=True), [v])  # which is outside
    for call in (gradient, lambda loss, own: gradient_and_products(loss, own, [own])):
        with pytest.raises(RuntimeError, match="reentrant checkpointing.*use_reentrant=False"):
            call(loss(reentrant=True), [w, v])
