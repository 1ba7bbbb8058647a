"""Second derivatives of convolutions, some parts of which do not go through autograd."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvlib.operators.conv_products import convolution_products
from curvlib.operators.live.loss import gradient_and_products

F64 = torch.float64


def stack(*layers: nn.Module) -> nn.Module:
    own = [layer for pair in zip(layers, [nn.Tanh()] * len(layers), strict=True) for layer in pair]
    return nn.Sequential(*own)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: stack(nn.Conv1d(2, 3, 3, 2, 1), nn.Conv1d(3, 2, 2)), (3, 2, 9)),
    "2d": (lambda: stack(nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(3, 2, (2, 1))), (2, 2, 6, 5)),
    "3d": (lambda: stack(nn.Conv3d(1, 2, 2), nn.Conv3d(2, 1, 2, padding=1)), (2, 1, 3, 4, 3)),
    "no bias": (
        lambda: stack(nn.Conv2d(2, 3, 3, bias=False), nn.Conv2d(3, 2, 2, bias=False)),
        (2, 2, 5, 5),
    ),
    "groups": (
        lambda: stack(nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 4, 2, groups=4)),
        (2, 2, 5, 5),
    ),
    "dilation": (lambda: stack(nn.Conv1d(2, 2, 2, dilation=2), nn.Conv1d(2, 2, 3, 2)), (2, 2, 9)),
    "transposed": (
        lambda: stack(
            nn.ConvTranspose2d(2, 3, 3, 2, 1, output_padding=1, groups=1),
            nn.ConvTranspose2d(3, 2, 2, bias=False),
        ),
        (2, 2, 3, 3),
    ),
    "unbatched": (lambda: stack(nn.Conv2d(2, 3, 2), nn.Conv2d(3, 1, 2)), (2, 4, 4)),
    "padded": (
        lambda: stack(
            nn.Conv2d(1, 2, 3, padding="same", padding_mode="circular"),
            nn.Conv2d(2, 1, 2, padding="same"),
        ),
        (2, 1, 4, 3),
    ),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().double(), torch.randn(shape, dtype=F64)


def vectors(params: list[Any], count: int = 2) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=g, dtype=F64) for p in params] for _ in range(count)]


def plain(loss: Tensor, params: list[Any], columns: list[list[Tensor]]) -> list[list[Tensor]]:
    """Double backward by autograd alone."""
    first = torch.autograd.grad(loss, params, create_graph=True)
    return [
        list(torch.autograd.grad(first, params, column, retain_graph=True)) for column in columns
    ]


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # PyTorch's remark on even kernels
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("input_too", [False, True])
def test_products_are_those_of_autograd_alone(name: str, input_too: bool) -> None:
    model, x = made(name)
    params: list[Tensor] = [*model.parameters(), *([x.requires_grad_()] if input_too else [])]
    columns = vectors(params)
    expected = plain(model(x).square().sum(), params, columns)
    found = gradient_and_products(model(x).square().sum(), params, columns)[1]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_products_are_those_of_the_dense_hessian() -> None:
    model, x = made("2d")
    params = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in params]

    def loss(flat: Tensor) -> Tensor:
        parts = [t.view(p.shape) for t, p in zip(flat.split(sizes), params, strict=True)]
        own = dict(zip(names, parts, strict=True))
        return torch.func.functional_call(model, own, (x,)).square().sum()

    H = torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in params]))
    columns = vectors(params, 1)
    (found,) = gradient_and_products(model(x).square().sum(), params, columns)[1]
    whole = H @ torch.cat([v.flatten() for v in columns[0]])
    joined = torch.cat([t.flatten() for t in found if t is not None])
    torch.testing.assert_close(joined, whole, rtol=1e-10, atol=1e-11)


class Convolutions(TorchDispatchMode):
    """Counts convolutions whose kernel is larger than the layers' kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.large = self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.all += 1
            self.large += args[1].shape[-1] > 3
        return func(*args, **(kwargs or {}))


def test_no_convolution_is_as_large_as_the_image_and_none_is_needless() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = stack(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)).double()
        x = torch.randn(2, 2, 8, 8, dtype=F64)
    params = list(model.parameters())
    columns = vectors(params, 1)
    with Convolutions() as usual:
        plain(model(x).square().sum(), params, columns)
    with Convolutions() as ours:
        gradient_and_products(model(x).square().sum(), params, columns)
    assert (usual.large, ours.large) == (1, 0)
    # forward 2; then at both outputs 1 and 2, at the inner input 1
    assert (usual.all, ours.all) == (8, 6)


def changed(name: str) -> tuple[Callable[[], Tensor], list[Any]]:
    """Weights that are not the convolution's own, once and as they are."""
    model, x = made("2d")
    first, second = model[0], model[2]
    if name == "frozen weight":
        second.weight.requires_grad_(False)
    elif name == "frozen bias":
        first.bias.requires_grad_(False)
    elif name == "hook":
        second.weight.register_hook(lambda g: 2.0 * g)
    elif name == "weight norm":
        nn.utils.parametrizations.weight_norm(second)
    elif name == "twice":
        model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), first)
        x = x.new_ones(1, 2, 11, 11).cumsum(-1)
    elif name == "elsewhere, too":
        weight = second.weight
        return lambda: model(x).square().sum() * weight.exp().sum(), list(model.parameters())
    params = [p for p in model.parameters() if p.requires_grad]
    return lambda: model(x).square().sum(), params


@pytest.mark.parametrize(
    "name", ["frozen weight", "frozen bias", "hook", "weight norm", "twice", "elsewhere, too"]
)
def test_other_weights_are_left_to_autograd(name: str) -> None:
    loss, params = changed(name)
    columns = vectors(params)
    expected = plain(loss(), params, columns)
    found = gradient_and_products(loss(), params, columns)[1]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_some_parameters_of_a_model() -> None:
    model, x = made("2d")
    for chosen in ([2], [0], [1, 2], [3]):
        params = [list(model.parameters())[i] for i in chosen]
        columns = vectors(params)
        expected = plain(model(x).square().sum(), params, columns)
        found = gradient_and_products(model(x).square().sum(), params, columns)[1]
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_the_graph_can_be_used_again_without_hooks() -> None:
    model, x = made("2d")
    params = list(model.parameters())
    columns, loss = vectors(params), model(x).square().sum()
    first = torch.autograd.grad(loss, params, create_graph=True)
    expected = torch.autograd.grad(first, params, columns[0], retain_graph=True)
    with convolution_products(params, first) as rest:
        for _ in range(2):
            rest.clear()
            own = torch.autograd.grad(first, params, columns[0], retain_graph=True)
            assert set(rest) == {2}
            torch.testing.assert_close(own[2] + rest[2], expected[2])
    rest.clear()
    torch.testing.assert_close(torch.autograd.grad(first, params, columns[0]), expected)
    assert rest == {}


def test_half_precision_and_autocast() -> None:
    model, x = made("2d")
    model, x = model.float(), x.float()
    params = list(model.parameters())
    columns = [[v.float() for v in column] for column in vectors(params, 1)]

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().square().sum()

    expected = plain(loss(), params, columns)
    found = gradient_and_products(loss(), params, columns)[1]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    model, x = model.bfloat16(), x.bfloat16()
    params = list(model.parameters())
    columns = [[v.bfloat16() for v in column] for column in columns]
    expected = plain(model(x).square().sum(), params, columns)
    found = gradient_and_products(model(x).square().sum(), params, columns)[1]
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-1)


def test_graphs_are_freed_without_the_garbage_collector() -> None:
    model, x = made("2d")
    params = list(model.parameters())
    columns = vectors(params, 1)
    activations: list[weakref.ref[Tensor]] = []
    model[0].register_forward_hook(lambda _, __, out: activations.append(weakref.ref(out)))
    gc.disable()
    try:
        gradient_and_products(F.softplus(model(x)).sum(), params, columns)
        assert [own() for own in activations] == [None]
    finally:
        gc.enable()
