"""Models and moments at which matrix-free products go wrong without saying so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import curvlib as cl
from tests.problems import Counting, columns, error, snapshot

F64 = torch.float64
CE = nn.CrossEntropyLoss()

MAKERS: dict[str, Callable[[cl.Risk], cl.LinearOperator]] = {
    "hessian": cl.hessian,
    "ggn": cl.ggn,
    "type2": lambda r: cl.fisher(r, kind="type2"),
    "empirical": lambda r: cl.fisher(r, kind="empirical"),
    "mc": lambda r: cl.fisher(r, kind="mc"),
    "jacobian": cl.jacobian,
    "ntk": cl.ntk,
}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def _data(*shape: int, count: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(count, *shape, dtype=F64, generator=g)
    return x, torch.randint(3, (count,), generator=g)


def _by_hand(model: nn.Module, x: Tensor, y: Tensor, V: Tensor) -> Tensor:
    """Double backward on a copy of the model."""
    twin = copy.deepcopy(model)
    params = list(twin.parameters())
    grads = torch.autograd.grad(F.cross_entropy(twin(x), y), params, create_graph=True)
    out = []
    for v in V.T:
        parts = [
            q.view_as(p) for q, p in zip(v.split([p.numel() for p in params]), params, strict=True)
        ]
        rows = torch.autograd.grad(grads, params, parts, retain_graph=True)
        out.append(torch.cat([r.reshape(-1) for r in rows]))
    return torch.stack(out, 1)


# ------------------------------------------------------------------------ randomness
def _dense_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def _conv_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.Dropout(0.5), nn.GELU(), nn.Flatten(), nn.Linear(8, 3)
    )


def _functional_dropout() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return self.head(h * torch.bernoulli(torch.full_like(h, 0.5)))

    return Net()


RANDOM = {
    "dropout": (_dense_dropout, (3,)),
    "dropout after convolution": (_conv_dropout, (1, 3, 3)),
    "bernoulli": (_functional_dropout, (3,)),
}


@pytest.mark.parametrize(
    ("name", "streamed", "operator"),
    [
        (name, (i + j) % 2 == 0, operator)
        for i, name in enumerate(RANDOM)
        for j, operator in enumerate(MAKERS)
    ],
)
def test_dropout_in_training_mode_is_one_matrix(name: str, streamed: bool, operator: str) -> None:
    """One draw of the masks, the same for each product, column and route."""
    make, shape = RANDOM[name]
    model = _seeded(make).train()
    x, y = _data(*shape)
    data: Any = [(x[:2], y[:2]), (x[2:], y[2:])]
    before = snapshot(model)
    op = MAKERS[operator](cl.Risk(model, CE, Counting(data) if streamed else data))
    one = op.to_dense(block=1)
    assert error(op.to_dense(block=7), one) < 1e-12
    assert error(op.to_dense(block=7), one) < 1e-12
    assert error(op.T.to_dense(block=3), one.T) < 1e-12
    snapshot(model).assert_same(before)


# ---------------------------------------------------------------- layouts, power steps
def test_channels_last_memory() -> None:
    model = _seeded(lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3)
    ))  # fmt: skip
    x, y = _data(3, 6, 6)
    V = columns(sum(p.numel() for p in model.parameters()), 3)
    expected = _by_hand(model, x, y, V)
    model = model.to(memory_format=torch.channels_last)
    risk = cl.Risk(model, CE, (x.to(memory_format=torch.channels_last), y))
    assert error(cl.hessian(risk) @ V, expected) < 1e-12


@pytest.mark.parametrize("training", [False, True])
def test_spectral_norm(training: bool) -> None:
    """In training mode each forward pass takes a power step on buffers."""
    model = _seeded(
        lambda: nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))
    ).train(training)
    x, y = _data(3)
    before = snapshot(model)
    V = columns(31, 3)
    op = cl.hessian(cl.Risk(model, CE, (x, y)))
    assert error(op @ V, _by_hand(model, x, y, V)) < 1e-12
    assert error(op @ V, _by_hand(model, x, y, V)) < 1e-12
    snapshot(model).assert_same(before)


# -------------------------------------------------------------- what users do meanwhile
@pytest.mark.parametrize("operator", MAKERS)
@pytest.mark.parametrize("how", ["assigned", "load_state_dict"])
def test_replaced_parameters_are_noticed(operator: str, how: str) -> None:
    model = _seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    op = MAKERS[operator](cl.Risk(model, CE, _data(3)))
    V = columns(op.shape[1], 1)
    op @ V
    if how == "assigned":
        model[0].weight = nn.Parameter(2 * model[0].weight.detach())
    else:
        model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="replaced"):
        op @ V


def test_hooks_on_gradients_do_not_change_curvature() -> None:
    model = _seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    x, y = _data(3)
    V = columns(31, 2)
    expected = _by_hand(model, x, y, V)
    calls = []
    model[0].weight.register_hook(lambda g: 2 * g)
    model[0].bias.register_post_accumulate_grad_hook(calls.append)
    before = snapshot(model)
    risk = cl.Risk(model, CE, (x, y))
    assert error(cl.hessian(risk) @ V, expected) < 1e-12
    assert not calls
    snapshot(model).assert_same(before)
    model[0].weight.grad = None
    F.cross_entropy(model(x), y).backward()
    assert len(calls) == 1  # and they work afterwards


def test_inputs_made_in_inference_mode() -> None:
    model = _seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    x, y = _data(3)
    V = columns(31, 2)
    expected = _by_hand(model, x, y, V)
    with torch.inference_mode():
        frozen = x.clone()
    try:
        out = cl.hessian(cl.Risk(model, CE, (frozen, y))) @ V
    except (RuntimeError, ValueError) as reason:
        assert "clone" in str(reason)  # noqa: PT017
    else:
        assert error(out, expected) < 1e-12


def test_lazy_modules_that_were_never_called() -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"lazy|once|[Cc]all"):
        cl.Risk(nn.Sequential(nn.LazyLinear(3)), CE, _data(3))


def test_other_threads_may_compute_at_the_same_time() -> None:
    """Two operators of two models, from two threads."""
    from concurrent.futures import ThreadPoolExecutor

    models = [
        _seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
        for _ in range(2)
    ]
    x, y = _data(3)
    ops = [cl.hessian(cl.Risk(m, CE, (x, y))) for m in models]
    V = columns(ops[0].shape[1], 2)
    expected = cl.hessian(cl.Risk(_seeded(lambda: models[0]), CE, (x, y))) @ V

    def switches() -> list[bool]:
        fast = torch.backends.mha.get_fastpath_enabled()
        return [torch.backends.cuda.flash_sdp_enabled(), fast]

    before = switches()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda op: [op @ V for _ in range(20)], ops))
    assert all(error(out, expected) < 1e-12 for outs in results for out in outs)
    assert switches() == before  # PyTorch's, which are of the process
