"""Forward passes are arranged so that they have two derivatives; what is kept, and when not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import curvlib as cl
from curvlib.operators.scores.example_scores import example_gradients_by_layers
from tests import oracles
from tests.cases import build
from tests.problems import OPERATORS, columns, error, oracle, risk_of, snapshot

quiet = pytest.mark.filterwarnings("ignore:curvlib. .*:UserWarning")
compiler = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")


# --------------------------------------------------------------------- what is said
def test_attention_is_said_once_for_each_risk() -> None:
    risk = risk_of(build("sdpa"))
    op = cl.hessian(risk)
    v = columns(op.shape[1], 1)
    with pytest.warns(
        UserWarning, match="scaled_dot_product_attention runs its MATH kernel"
    ) as said:
        op @ v
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op @ v
        cl.ggn(risk) @ v
        op.blocks()["head"] @ columns(15, 1)


def test_nothing_is_said_of_plain_models() -> None:
    for name in ("mlp ce", "conv BatchNorm eval ce", "LSTM"):
        op = cl.hessian(risk_of(build(name)))
        op @ columns(op.shape[1], 1)


def test_passes_of_first_derivatives_keep_fused_attention() -> None:
    """And nothing is said of it; passes of second derivatives then say it as ever."""
    risk = risk_of(build("sdpa"))
    called: set[str] = set()

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.add(str(func))
            return func(*args, **(kwargs or {}))

    calls: list[Callable[[], Any]] = [
        lambda: cl.kfac(risk, progress=False),
        lambda: list(example_gradients_by_layers(risk)),
    ]
    for call in calls:
        called.clear()
        with warnings.catch_warnings(), Spy():
            warnings.simplefilter("error")
            call()
        assert any("flash_attention" in name for name in called)
    called.clear()
    with pytest.warns(UserWarning, match="runs its MATH kernel"), Spy():
        risk.gradient()
    assert not any("flash_attention" in name for name in called)


def test_fused_attention_has_no_second_derivative_by_itself() -> None:
    """Why the MATH kernel is arranged: without it PyTorch raises (or would be wrong)."""
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        (g,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .*attention.* is not implemented"):
        torch.autograd.grad(g.sum(), q)


@quiet
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_user_may_have_chosen_a_kernel(operator: str) -> None:
    A = oracle(operator, "sdpa")
    V = columns(A.shape[0], 2)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        op = OPERATORS[operator].make(risk_of(build("sdpa")))
        assert error(op @ V, A @ V) < 1e-8
        assert not torch.backends.cuda.math_sdp_enabled()


# ------------------------------------------------------------------ compiled modules
@quiet
@compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
@pytest.mark.parametrize(
    ("operator", "part", "used_before"),
    [
        (operator, part, (i + j) % 2 == 0)
        for i, operator in enumerate(OPERATORS)
        for j, part in enumerate(("whole", "submodule", "in place"))
    ],
)
def test_compiled_modules(operator: str, part: str, used_before: bool) -> None:
    case = build("LayerNorm ce")
    names = tuple(dict(case.model.named_parameters()))
    model: Any = case.model
    if part == "whole":
        model = torch.compile(model, backend="aot_eager")
    elif part == "submodule":
        model[1] = torch.compile(model[1], backend="aot_eager")
    else:
        model.compile(backend="aot_eager")
    if used_before:
        model(case.data[0][0]).sum().backward()
        model.zero_grad()
    before = snapshot(model)
    op = OPERATORS[operator].make(cl.Risk(model, case.loss, case.data))
    A = oracle(operator, "LayerNorm ce")
    V = columns(A.shape[0], 3)
    assert error(op @ V, A @ V) < 1e-8
    assert op.space.names == names
    snapshot(model).assert_same(before)
    torch._dynamo.reset()


@compiler
def test_compiled_modules_are_said_to_run_eagerly() -> None:
    case = build("mlp ce")
    model = torch.compile(case.model, backend="eager")
    with pytest.warns(UserWarning, match="compiled modules run eagerly"):
        cl.Risk(model, case.loss, case.data).value()


@pytest.mark.slow
@quiet
@compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_compiled_to_machine_code() -> None:
    case = build("mlp ce")
    model = torch.compile(case.model)
    try:
        model(case.data[0][0]).sum().backward()
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as reason:
        pytest.skip(f"no compiler works here: {type(reason).__name__}")
    op = cl.hessian(cl.Risk(model, case.loss, case.data))
    A = oracle("hessian", "mlp ce")
    V = columns(A.shape[0], 2)
    assert error(op @ V, A @ V) < 1e-8
    torch._dynamo.reset()


# ---------------------------------------------------- kept graphs see every change
def _sgd(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def _through_data(model: nn.Module) -> None:
    next(model.parameters()).data.mul_(1.5)


def _new_data(model: nn.Module) -> None:
    p = next(model.parameters())
    p.data = 1.5 * p.data


def _load(model: nn.Module) -> None:
    model.load_state_dict({k: 1.1 * v for k, v in model.state_dict().items()})


def _permute(model: nn.Module) -> None:
    """Keeps every sum of entries and of bits."""
    p = next(model.parameters())
    p.data.copy_(p.data.flatten().flip(0).view_as(p))


def _signs(model: nn.Module) -> None:
    next(model.parameters()).data.neg_()


def _numpy(model: nn.Module) -> None:
    next(model.parameters()).detach().numpy()[...] *= 1.25


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "sgd": _sgd,
    "p.data in place": _through_data,
    "p.data replaced": _new_data,
    "load_state_dict": _load,
    "permuted": _permute,
    "signs": _signs,
    "numpy": _numpy,
}


@pytest.mark.parametrize("operator", [*OPERATORS, "jacobian", "ntk", "mc"])
@pytest.mark.parametrize("change", CHANGES)
def test_products_see_changed_parameters(operator: str, change: str) -> None:
    make = _maker(operator)
    case = build("mlp ce")
    op = make(risk_of(case))
    V = columns(op.shape[1], 2)
    old = op @ V
    CHANGES[change](case.model)
    fresh = make(risk_of(case)) @ V
    assert error(fresh, old) > 1e-3
    assert error(op @ V, fresh) < 1e-12


def _maker(operator: str) -> Callable[[cl.Risk], cl.LinearOperator]:
    if operator in OPERATORS:
        return OPERATORS[operator].make
    if operator == "mc":
        return lambda risk: cl.fisher(risk, kind="mc")
    return cl.jacobian if operator == "jacobian" else cl.ntk


@pytest.mark.parametrize("operator", [*OPERATORS, "jacobian"])
@pytest.mark.parametrize("change", ["mode", "buffer", "inputs", "targets", "swap", "append"])
def test_products_see_other_changes(operator: str, change: str) -> None:
    case = build("conv BatchNorm eval ce")
    make = _maker(operator)
    data = [tuple(t.clone() for t in batch) for batch in case.data]
    op = make(cl.Risk(case.model, case.loss, data))
    V = columns(op.shape[1], 2)
    old = op @ V
    if change == "mode":
        case.model.train()
        with torch.no_grad():
            data[1] = tuple(torch.cat([t, t + (t.dtype != torch.int64)]) for t in data[1])
    elif change == "buffer":
        case.model[1].running_var.mul_(3.0)
    elif change == "inputs":
        data[0][0].mul_(2.0)
    elif change == "targets":
        data[0][1].copy_((data[0][1] + 1) % 3)
    elif change == "swap":
        data[0] = (data[0][0] + 1.0, data[0][1])
    else:
        data.append((data[0][0] + 1.0, data[0][1]))
    if change in {"append", "mode"}:  # another number of examples: refused, and said so
        with pytest.raises(RuntimeError, match="the data changed between passes"):
            op @ V
        return
    fresh = make(cl.Risk(case.model, case.loss, data)) @ V
    if not (change == "targets" and operator in {"ggn", "type2", "jacobian"}):
        assert error(fresh, old) > 1e-3
    assert error(op @ V, fresh) < 1e-12


def test_products_see_a_change_of_mode() -> None:
    case = build("BatchNorm1d train")
    op = cl.hessian(risk_of(case))
    V = columns(op.shape[1], 2)
    op @ V
    case.model.eval()
    assert error(op @ V, cl.hessian(risk_of(case)) @ V) < 1e-12


def test_operators_share_nothing_through_a_risk() -> None:
    risk = risk_of(build("mlp ce"))
    H, G = cl.hessian(risk), cl.ggn(risk)
    V = columns(31, 2)
    first = H @ V, G @ V
    assert_close((G @ V, H @ V), (first[1], first[0]), rtol=0, atol=0)
    assert torch.equal((H + G) @ V, first[0] + first[1])


def test_models_can_be_trained_between_products() -> None:
    """A kept graph neither holds the parameters' gradients nor blocks in-place updates."""
    case = build("mlp ce")
    op = cl.hessian(risk_of(case))
    V = columns(31, 1)
    twin = copy.deepcopy(case.model)
    for _ in range(3):
        op @ V
        for model in (case.model, twin):
            loss = sum(case.loss(model(x), y) for x, y in case.data)
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
    for p, q in zip(case.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


# ------------------------------------------------------------------ the last resort
@quiet
@pytest.mark.parametrize("name", ["mlp ce", "LayerNorm ce", "masked lm", "LSTM", "untouched"])
def test_finite_differences(name: str) -> None:
    op = cl.hessian(risk_of(build(name)), method="finite_difference")
    A = oracles.dense("hessian", name)
    assert "finite difference" in op.name
    for scale in (1e-6, 1.0, 1e6):  # the peers' step is not scaled by the vector's norm
        V = scale * columns(A.shape[0], 2)
        V[:, 1] *= 1e3
        out = op @ V
        assert error(out[:, :1], A @ V[:, :1]) < 1e-7
        assert error(out[:, 1:], A @ V[:, 1:]) < 1e-7
    assert float((op @ torch.zeros_like(V)).abs().sum()) == 0.0


@quiet
def test_finite_differences_where_there_is_no_second_derivative() -> None:
    class Opaque(torch.autograd.Function):
        """A sine whose backward pass cannot be differentiated.

        ``torch.autograd.grad`` does not raise for it: the error's node has no path to the
        parameters and is pruned, so the second derivative is silently wrong.
        """

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return g * x.cos()

    class Net(nn.Module):
        def __init__(self, opaque: bool) -> None:
            super().__init__()
            self.body, self.head, self.opaque = nn.Linear(3, 4), nn.Linear(4, 3), opaque

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return self.head(Opaque.apply(h) if self.opaque else h.sin())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net(True).double()
    plain = Net(False).double()
    plain.load_state_dict(net.state_dict())
    data = build("mlp ce").data
    V = columns(31, 2)
    exact = cl.hessian(cl.Risk(plain, nn.CrossEntropyLoss(), data)) @ V
    risk = cl.Risk(net, nn.CrossEntropyLoss(), data)
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="finite_difference"):
        cl.hessian(risk) @ V
    snapshot(net).assert_same(before)
    for operator in ("ggn", "type2", "empirical"):  # the pullback's graph is cut off there, too
        right = OPERATORS[operator].make(cl.Risk(plain, nn.CrossEntropyLoss(), data)) @ V
        try:
            found = OPERATORS[operator].make(risk) @ V
        except RuntimeError as reason:
            assert "second derivative" in str(reason)  # noqa: PT017
        else:
            assert error(found, right) < 1e-8
    assert error(cl.hessian(risk, method="finite_difference") @ V, exact) < 1e-7
    snapshot(net).assert_same(before)


def test_hessian_refuses() -> None:
    risk = risk_of(build("mlp ce"))
    with pytest.raises(ValueError, match=r"method= is 'exact' or 'finite_difference', got 'fd'"):
        cl.hessian(risk, method="fd")
    for make in (cl.hessian, cl.ggn):
        with pytest.raises(ValueError, match=r"memory= is a number of bytes, at least 0, got -1"):
            make(risk, memory=-1)
