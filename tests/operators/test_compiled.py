"""Products as captured graphs: right on awkward models, and never silently wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import curvlib as cl
from curvlib.operators.captured import compiled, replay
from curvlib.operators.captured.proof import tolerance
from curvlib.operators.captured.replay import MAX_BYTES, Replay, fits, launched
from tests import models
from tests.cases import Case, build
from tests.problems import (
    columns,
    error,
    loader,
    oracle,
    rebatched,
    risk_of,
    snapshot,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:curvlib. scaled_dot.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:curvlib. compiled modules.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),
]
MAKE: dict[str, Callable[..., cl.LinearOperator]] = {"hessian": cl.hessian, "ggn": cl.ggn}


def _two_batches(name: str) -> Case:
    """The row of the table in two batches of one shape, where examples are independent."""
    case = build(name)
    return case if name.endswith("train") else rebatched(case, [4, 4])


# ------------------------------------------------------------------------- right
@pytest.mark.parametrize(
    ("operator", "name"),
    [
        ("hessian", "conv BatchNorm eval ce"),
        ("hessian", "LayerNorm mse"),
        ("hessian", "GroupNorm"),
        ("hessian", "BatchNorm2d train"),
        ("hessian", "weight norm"),
        ("hessian", "embedding"),
        ("hessian", "untouched"),
        ("hessian", "checkpointed"),
        ("hessian", "frozen tensor"),
        ("hessian", "ce weighted"),
        ("hessian", "custom"),
        ("ggn", "LayerNorm mse"),
        ("ggn", "BatchNorm1d train"),
        ("ggn", "conv BatchNorm eval ce"),
        ("ggn", "called twice"),
        ("ggn", "frozen"),
        ("ggn", "custom weight"),
    ],
)
def test_products(operator: str, name: str) -> None:
    case = _two_batches(name)
    op = MAKE[operator](risk_of(case), compile="aot_eager")
    A = oracle(operator, name)
    V = columns(A.shape[0], 2)
    before = snapshot(case.model)
    for _ in range(2):  # the second one from what was kept
        assert error(op @ V, A @ V) < 1e-12
    snapshot(case.model).assert_same(before)


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        ("hessian", "tied"),
        pytest.param("hessian", "encoder train", marks=pytest.mark.slow),
        ("hessian", "hf own loss"),
        ("ggn", "masked lm"),
        pytest.param("hessian", "LSTM", marks=pytest.mark.slow),
        pytest.param("hessian", "GRU", marks=pytest.mark.slow),
        pytest.param("ggn", "GRU", marks=pytest.mark.slow),
    ],
)
def test_products_of_large_graphs(operator: str, name: str) -> None:
    op = MAKE[operator](risk_of(_two_batches(name)), compile="aot_eager")
    A = oracle(operator, name)
    V = columns(A.shape[0], 1)
    for _ in range(2):
        assert error(op @ V, A @ V) < 1e-12


@pytest.mark.parametrize("operator", MAKE)
def test_unequal_batches_blocks_and_streams(operator: str) -> None:
    case = build("mlp ce")  # batches of 3, 1 and 4
    A = oracle(operator, "mlp ce")
    V = columns(A.shape[0], 5)  # 4 + 1 columns
    op = MAKE[operator](risk_of(case), compile="aot_eager")
    assert error(op @ V, A @ V) < 1e-12
    head = op.blocks()["2"]
    assert error(head @ V[:15, 0], A[16:, 16:] @ V[:15, 0]) < 1e-12
    streamed = MAKE[operator](cl.Risk(case.model, case.loss, loader(case)), compile="aot_eager")
    for _ in range(2):
        assert error(streamed @ V[:, :2], A @ V[:, :2]) < 1e-12


@pytest.mark.parametrize("operator", MAKE)
@pytest.mark.parametrize("streamed", [False, True])
def test_dropout_draws_what_the_eager_product_draws(operator: str, streamed: bool) -> None:
    case = rebatched(build("mlp ce"), [4, 4])
    model = nn.Sequential(case.model[0], nn.Dropout(0.5), *case.model[1:]).train()
    data: Any = loader(replace(case), batch_size=4) if streamed else case.data
    risk = cl.Risk(model, case.loss, data)
    V = columns(31, 2)
    before = torch.get_rng_state()
    found = MAKE[operator](risk, compile="aot_eager") @ V  # it draws first
    assert error(found, MAKE[operator](risk) @ V) < 1e-12
    model.eval()
    assert error(found, MAKE[operator](cl.Risk(model, case.loss, data)) @ V) > 1e-2
    assert torch.equal(before, torch.get_rng_state())


def test_kept_linearizations_save_the_forward_pass() -> None:
    """The work of a second product is 2 gradients' (Hessian) and 4/3 (GGN), as it is eagerly."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 40), nn.Tanh())
        model.append(nn.Linear(40, 5))
        x, y = torch.randn(16, 20), torch.randint(5, (16,))
    risk = cl.Risk(model, nn.CrossEntropyLoss(), (x, y))
    v = columns(risk.space.size, 1, dtype=torch.float32)[:, 0]

    def work(call: Callable[[], Any]) -> int:
        counter = FlopCounterMode(display=False)
        with counter:
            call()
        return counter.get_total_flops()

    for make in MAKE.values():
        eager, op = make(risk), make(risk, compile="aot_eager")
        assert error(op @ v, eager @ v) < 1e-5
        assert work(lambda op=op: op @ v) <= work(lambda eager=eager: eager @ v)
        unkept = make(risk, compile="aot_eager", memory=0)
        unkept @ v
        assert work(lambda unkept=unkept: unkept @ v) > work(lambda op=op: op @ v)


@pytest.mark.parametrize("operator", MAKE)
def test_bfloat16(operator: str) -> None:
    case = rebatched(build("LayerNorm ce"), [4, 4])
    case.model.bfloat16()
    data = [(x.bfloat16(), y) for x, y in case.data]
    risk = cl.Risk(case.model, case.loss, data)
    op = MAKE[operator](risk, compile="aot_eager")
    V = columns(op.shape[0], 2, dtype=torch.float32)
    assert op.dtype == torch.float32
    assert error(op @ V, MAKE[operator](risk) @ V) < 3e-2


def test_a_model_that_was_compiled_itself() -> None:
    case = rebatched(build("LayerNorm ce"), [4, 4])
    case.model[1] = torch.compile(case.model[1], backend="aot_eager")
    A = oracle("hessian", "LayerNorm ce")
    V = columns(A.shape[0], 1)
    op = cl.hessian(risk_of(case), compile="aot_eager")
    assert error(op @ V, A @ V) < 1e-12
    torch._dynamo.reset()


# ------------------------------------------------------------ what changes is seen
class Scaled(nn.Module):
    """Uses numbers and tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = models.mlp()
        self.factor = 2.0
        self.shift = torch.ones(3, dtype=torch.float64)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.body(x)
        return torch.sin(self.factor * self.seen + self.shift)


def test_products_see_changes() -> None:
    case = rebatched(build("mlp mse"), [4, 4])
    model = Scaled().double()
    op = cl.hessian(cl.Risk(model, case.loss, case.data), compile="aot_eager")
    V = columns(31, 1)

    def number() -> None:
        model.factor = 3.0

    def tensor() -> None:
        model.shift = torch.zeros(3, dtype=torch.float64)

    def parameters() -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.3)

    def data() -> None:
        case.data[1][0].mul_(2.0)

    last = torch.zeros_like(V)
    for change in (None, number, tensor, parameters, data):
        if change is not None:
            change()
        fresh = cl.hessian(cl.Risk(model, case.loss, case.data)) @ V
        assert error(fresh, last) > 1e-3
        assert error(op @ V, fresh) < 1e-12
        last = fresh
    assert type(model.seen) is Tensor  # no fake tensor was left behind


# ------------------------------------------------------------------ never silently
class Pretender(nn.Module):
    """Does something slightly else when it is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.body = models.mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (1.0 if type(x) is Tensor else 1.0001)


class Crooked(torch.autograd.Function):
    """A sine whose second derivative is wrong: that of the factor is left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x.sin() * y.cos()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return g * x.cos() * y.detach().cos(), -g * x.sin() * y.sin()


class Bent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return Crooked.apply(self.left(x), self.right(x))


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.body = models.mlp()

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return out if float(out.detach().sum()) > 0.0 else 2.0 * torch.sin(out)


class Reading(nn.Module):
    """A number that is read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = models.mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * x.std().item()


class Selecting(nn.Module):
    """Shapes that depend on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.body = models.mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.body(x[x[:, 0] > 0.0]).sum(0)


class Counting(nn.Module):
    """NumPy, which would be read once and for all."""

    def __init__(self) -> None:
        super().__init__()
        self.body = models.mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * float(x.numpy().std())


REFUSED = {
    Pretender: "differs from the eager one by .* the model's operations do something else",
    Bent: r"the product is not symmetric: u'Hv and v'Hu differ by .* see risk.check\(\)",
    Branching: r"the product cannot be captured \(GuardOnDataDependentSymNode",
    Reading: r"cannot be captured \(RuntimeError: numbers, or shapes, are read from tensors",
    Selecting: r"the product cannot be captured \(",
    Counting: r"the product cannot be captured \(RuntimeError",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_cannot_be_proven_runs_eagerly(kind: type[nn.Module]) -> None:
    case = rebatched(build("mlp mse"), [4, 4])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind().double()
    risk = cl.Risk(model, case.loss, case.data)
    V = columns(risk.space.size, 2)
    eager = cl.hessian(risk) @ V
    op = cl.hessian(risk, compile=True)
    before = snapshot(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._inductor, "compile", lambda graph, *_, **__: graph)
        with pytest.warns(UserWarning, match=REFUSED[kind]) as said:
            found = op @ V
    assert len(said) == 1
    assert torch.equal(found, eager)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(op @ V, eager)
    with pytest.raises(RuntimeError, match="compile='aot_eager', but .*" + REFUSED[kind]):
        cl.hessian(risk, compile="aot_eager") @ V
    snapshot(model).assert_same(before)


def test_errors_of_the_model_are_its_own() -> None:
    """A model that has no second derivative, or does not fit its data, says so as ever."""

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * ctx.saved_tensors[0].cos()

    case = rebatched(build("mlp ce"), [4, 4])
    model = case.model
    risk = cl.Risk(model, case.loss, case.data, forward=lambda m, b: Opaque.apply(m(b[0])))
    with pytest.raises(RuntimeError, match="@once_differentiable, so its gradient has no deriv"):
        cl.hessian(risk, compile=True) @ columns(31, 1)
    wrong = cl.Risk(model, case.loss, [(x, y[:2]) for x, y in case.data])
    with pytest.raises(ValueError, match="needs class indices of shape"):
        cl.ggn(wrong, compile=True) @ columns(31, 1)


def test_a_capture_that_is_wrong_for_several_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    right = compiled.widened

    def wrong(push: Any, rows: Tensor, linearized: Any) -> Any:
        graph = right(push, rows, linearized)
        return lambda *inputs: (graph(*inputs)[0] + 1e-6 * inputs[0],)

    monkeypatch.setattr(compiled, "widened", wrong)
    case = rebatched(build("mlp ce"), [4, 4])
    op = cl.hessian(risk_of(case), compile="aot_eager")
    A = oracle("hessian", "mlp ce")
    V = columns(31, 2)
    assert error(op @ V[:, :1], A @ V[:, :1]) < 1e-12
    with pytest.raises(RuntimeError, match="differs from the eager one"):
        op @ V


@pytest.mark.parametrize("stage", [0, 1])
def test_code_that_cannot_be_run(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def run(*_: Any) -> Any:
        raise AssertionError("expected stride 3")

    def compiler(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return run if len(graphs) == stage + 1 else graph

    case = rebatched(build("mlp ce"), [4, 4])
    op = cl.hessian(risk_of(case), compile=True)
    exact = oracle("hessian", "mlp ce") @ columns(31, 1)
    monkeypatch.setattr(torch._inductor, "compile", compiler)
    with pytest.warns(UserWarning, match=r"cannot be run \(AssertionError: expected stride 3\)"):
        found = op @ columns(31, 1)
    assert error(found, exact) < 1e-12


def test_operations_that_do_not_batch_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Any:
        raise NotImplementedError("no batching rule")

    monkeypatch.setattr(compiled, "widened", none)
    op = cl.hessian(risk_of(rebatched(build("mlp ce"), [4, 4])), compile="aot_eager")
    V = columns(31, 3)
    assert error(op @ V, oracle("hessian", "mlp ce") @ V) < 1e-12


def test_batches_of_too_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MAX_CAPTURES", 1)
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *_, **__: graph)
    case = build("mlp ce")
    V = columns(31, 1)
    op = cl.hessian(risk_of(case), compile=True)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert error(op @ V, oracle("hessian", "mlp ce") @ V) < 1e-12
        assert len(said) == (1 if _ == 0 else 0)
    with pytest.raises(RuntimeError, match="more than 1 different shapes"):
        cl.hessian(risk_of(case), compile="aot_eager") @ V


def test_batches_with_other_objects() -> None:
    case = rebatched(build("mlp ce"), [4, 4])
    data = [{"x": x, "y": y, "names": {"a", "b"}, "scale": 1.0 + i} for i, (x, y) in
            enumerate(case.data)]  # fmt: skip

    def risk(batches: list[Any]) -> cl.Risk:
        return cl.Risk(
            case.model,
            case.loss,
            batches,
            forward=lambda m, b: b["scale"] * m(b["x"]),
            target=lambda b: b["y"],
        )

    V = columns(31, 1)
    with pytest.raises(RuntimeError, match="batches hold a set, which a captured graph cannot"):
        cl.hessian(risk(data), compile="aot_eager") @ V
    plain = [{k: v for k, v in b.items() if k != "names"} for b in data]
    found = cl.hessian(risk(plain), compile="aot_eager") @ V  # each number has its own capture
    assert error(found, cl.hessian(risk(plain)) @ V) < 1e-12
    sparse = [(torch.eye(3, dtype=torch.float64).to_sparse(), torch.tensor([0, 1, 2]))]
    with pytest.raises(RuntimeError, match="batches hold a Tensor of layout torch.sparse_coo"):
        cl.hessian(cl.Risk(case.model, case.loss, sparse), compile="aot_eager") @ V


def test_autocast() -> None:
    case = rebatched(build("mlp ce"), [4, 4])
    risk = cl.Risk(case.model.float(), case.loss, [(x.float(), y) for x, y in case.data])
    op = cl.hessian(risk, compile="aot_eager")
    V = columns(31, 1, dtype=torch.float32)
    op @ V
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match="autocast is on; enter it in forward= instead"),
    ):
        op @ V
    assert error(op @ V, cl.hessian(risk) @ V) < 1e-5


def test_batches_without_a_valid_term() -> None:
    """The mean of a loss that curvlib does not know, over no term at all, counts for nothing."""
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, -1, 2, 1, -1, -1])
    batches = list(zip(x.split(2), y.split(2), strict=True))
    model = build("mlp ce").model

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, ignore_index=-1)

    risk = cl.Risk(model, loss, batches, weight=lambda b: (b[1] != -1).sum())
    exact = cl.Risk(model, nn.CrossEntropyLoss(ignore_index=-1), batches)
    op = cl.hessian(risk, compile="aot_eager")
    V = columns(31, 1)
    for _ in range(3):
        assert error(op @ V, cl.hessian(exact) @ V) < 1e-12


# ---------------------------------------------------------------------- compilers
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(torch._inductor, "compile", broken)
    case = rebatched(build("mlp ce"), [4, 4])
    op = cl.hessian(risk_of(case), compile=True)
    V = columns(31, 1)
    with pytest.warns(UserWarning, match=r"\(RuntimeError: no C\+\+ compiler\), so its captured"):
        found = op @ V
    assert error(found, oracle("hessian", "mlp ce") @ V) < 1e-12
    with pytest.raises(RuntimeError, match="inductor cannot compile the product .* needs a C"):
        cl.hessian(risk_of(case), compile="inductor") @ V


def test_recordings_that_never_run_again_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def frozen(function: Any, inputs: Any) -> Any:
        out = function(*inputs)
        return lambda *_: out

    monkeypatch.setattr("curvlib.operators.captured.compiled.launched", frozen)
    op = cl.hessian(risk_of(build("mlp ce")), compile="aot_eager")
    with pytest.raises(RuntimeError, match="the captured product differs from the eager one"):
        op @ columns(31, 2)


@pytest.mark.parametrize(
    "reason",
    [
        RuntimeError("operation not permitted when stream is capturing"),
        UserWarning("The CUDA Graph is empty. This usually means that the graph was attempted"),
    ],
)
def test_functions_without_a_cuda_graph_run_as_they_are(
    reason: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        if not isinstance(reason, Warning):
            raise reason
        warnings.warn(reason, stacklevel=1)

    monkeypatch.setattr(replay, "fits", lambda inputs: True)
    monkeypatch.setattr(replay, "Replay", refused)
    assert replay.launched(torch.unbind, [torch.ones(2)]) is torch.unbind


def test_tolerances_follow_either_interface_to_tf32() -> None:
    """The older one raises as soon as the newer one has been used."""
    there: Any = SimpleNamespace(
        space=SimpleNamespace(dtypes=(torch.float32,)), device=torch.device("cuda")
    )
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = products.fp32_precision, convolutions.fp32_precision
    try:
        for pair, expected in {("ieee", "ieee"): 2e-4, ("tf32", "ieee"): 3e-2,
                               ("ieee", "tf32"): 3e-2}.items():  # fmt: skip
            products.fp32_precision, convolutions.fp32_precision = pair
            assert tolerance(there) == expected
    finally:
        products.fp32_precision, convolutions.fp32_precision = before


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("operator", MAKE)
def test_machine_code(operator: str) -> None:
    """LayerNorm and dropout: the draws are torch's, not inductor's own."""
    case = rebatched(build("LayerNorm ce"), [4, 4])
    model = nn.Sequential(*case.model[:2], nn.Dropout(0.5), *case.model[2:]).train()
    risk = cl.Risk(model, case.loss, case.data)
    V = columns(risk.space.size, 1)
    op = MAKE[operator](risk, compile="inductor")
    try:
        found = op @ V
    except RuntimeError as reason:
        if "inductor cannot compile" not in str(reason):
            raise
        pytest.skip(f"no compiler works here: {reason}")
    exact = MAKE[operator](risk) @ V
    assert error(found, exact) < 1e-12
    assert error(op @ V, exact) < 1e-12


def test_settings_are_checked() -> None:
    risk = risk_of(build("mlp ce"))
    for make in MAKE.values():
        with pytest.raises(ValueError, match=r"compile= is a bool, 'inductor' or 'aot_eager', got"):
            make(risk, compile="cudagraphs")
    with pytest.raises(ValueError, match="compile= is for method='exact'; finite differences"):
        cl.hessian(risk, method="finite_difference", compile=True)


@pytest.mark.parametrize("operator", MAKE)
def test_losses_that_own_the_head_are_refused(operator: str) -> None:
    head = torch.nn.Linear(3, 5)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), head)
    loss = cl.LinearCrossEntropy(head, chunk=2)
    data = (torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))
    risk = cl.Risk(model, loss, data, forward=lambda m, batch: m[0](batch[0]))
    with pytest.raises(ValueError, match="never holds all logits; leave compile= out"):
        MAKE[operator](risk, compile=True)


# --------------------------------------------------------------------------- CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("operator", MAKE)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("streamed", [False, True])
def test_cuda_graphs(operator: str, backend: str, streamed: bool) -> None:
    case = rebatched(build("LayerNorm ce"), [4, 4])
    case.model.cuda()
    batches: Any = [(x.cuda(), y.cuda()) for x, y in case.data]
    risk = cl.Risk(case.model, case.loss, loader(case, 4) if streamed else batches)
    op = MAKE[operator](risk, compile=backend)
    A = oracle(operator, "LayerNorm ce").cuda()
    V = columns(A.shape[0], 3).cuda()
    for _ in range(3):
        assert error(op @ V, A @ V) < 1e-10
    (found,) = op._product.known.values()
    assert all(isinstance(push, Replay) for push in found.push.values())
    assert isinstance(found.linearize, Replay) == streamed
    with torch.no_grad():
        for p in case.model.parameters():
            p.mul_(1.1)
    assert error(op @ V, MAKE[operator](cl.Risk(case.model, case.loss, batches)) @ V) < 1e-10


@pytest.mark.gpu
def test_what_cannot_be_captured_leaves_the_stream_as_it_was() -> None:
    x, side = torch.ones(3, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for unfit in (lambda a: (a * float(a[0]),), lambda a: (a,)):
            assert launched(unfit, [x]) is unfit
            assert torch.cuda.current_stream() == side
        assert isinstance(launched(lambda a: (2.0 * a,), [x]), Replay)
        assert torch.cuda.current_stream() == side


@pytest.mark.gpu
def test_a_replay_copies_what_may_have_changed() -> None:
    x, y = torch.ones(3, device="cuda"), torch.full((3,), 2.0, device="cuda")
    run = Replay(lambda a, b: (a * b,), [x, y])
    assert run(x, y)[0].tolist() == [2.0] * 3
    x.fill_(5.0)
    assert run(x.detach(), y)[0].tolist() == [10.0] * 3
    assert fits([x])
    assert not fits([torch.empty(MAX_BYTES + 1, dtype=torch.uint8, device="cuda")])
