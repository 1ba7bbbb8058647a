"""Masks: the record, and persistence against training by hand with masked tensors."""

from __future__ import annotations

import copy
import gc
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlib.core.result import Result
from curvlib.core.risk import Risk
from curvlib.core.space import ParamSpace
from curvlib.operators.ggn import ggn
from curvlib.operators.hessian import hessian
from curvlib.pruning.masks import Masks, apply, pruned_to_zero, zero_pruned
from curvlib.pruning.persistence import attach, detach, masks_of
from tests.programs import Program

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd nesterov": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.2),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.02),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3, history_size=4),
    "lbfgs wolfe": lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
}


def _net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _data(n: int = 16, seed: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=g)


def _masks(model: nn.Module, share: float = 0.5, seed: int = 1) -> Masks:
    g = torch.Generator().manual_seed(seed)
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    return Masks({n: torch.rand(p.shape, generator=g) > share for n, p in weights.items()})


def _loss(model: nn.Module) -> Tensor:
    x, y = _data()
    return nn.functional.cross_entropy(model(x), y)


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    by_hand: Masks | None = None,
) -> None:
    params = dict(model.named_parameters())
    masked = [] if by_hand is None else [(params[n], m) for n, m in by_hand.keep.items()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(model)
        loss.backward()
        for p, m in masked:
            p.grad.mul_(m)
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        with torch.no_grad():
            for p, m in masked:
                p.mul_(m)
                for value in optimizer.state[p].values():
                    if isinstance(value, Tensor) and value.shape == p.shape:
                        value.mul_(m)


# ------------------------------------------------------------------- the record
def test_flat_and_back() -> None:
    model = _net()
    space = ParamSpace.of(model)
    keep = torch.rand(space.size, generator=torch.Generator().manual_seed(0)) > 0.3
    masks = Masks.of(keep, space)
    assert list(masks.keep) == list(space.names)
    assert torch.equal(masks.flat(space), keep)
    assert masks.kept == int(keep.sum())
    assert masks.sparsity == pytest.approx(1 - keep.double().mean().item())
    weights = space.restrict(["0.weight", "2.weight"])
    part = Masks.of(keep[: weights.size], weights)
    whole = part.flat(space)
    assert whole[space.slice("0.bias")].all()
    assert whole[space.slice("2.bias")].all()
    assert int((~whole).sum()) == part.size - part.kept


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4), st.data())
@settings(max_examples=30, deadline=None)
def test_round_trip_of_any_shapes(shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    space = ParamSpace.from_named({f"p{i}": torch.zeros(s) for i, s in enumerate(shapes)})
    bits = data.draw(st.lists(st.booleans(), min_size=space.size, max_size=space.size))
    keep = torch.tensor(bits)
    masks = Masks.of(keep, space)
    assert masks.flat(space).tolist() == bits
    assert masks.kept == sum(bits)
    assert set(masks.emptied()) == {n for n in space.names if not keep[space.slice(n)].any()}


def test_sparsity_by_parameter_and_layer() -> None:
    keep = {
        "a.weight": torch.tensor([[True, False], [False, False]]),
        "a.bias": torch.tensor([True, True]),
        "scale": torch.tensor(False),
    }
    masks = Masks(keep)
    assert masks.sparsities() == {"a.weight": 0.75, "a.bias": 0.0, "scale": 1.0}
    assert masks.layers() == {"a": 0.5, "scale": 1.0}
    assert masks.emptied() == ("scale",)
    assert repr(masks) == "Masks(3 tensors, 3 of 7 weights kept, sparsity=0.5714)"


def test_files(tmp_path: Path) -> None:
    masks = _masks(_net())
    path = masks.save(tmp_path / "masks.safetensors")
    for again in (Masks.load(path), Result.load(path)):
        assert isinstance(again, Masks)
        assert list(again.keep) == list(masks.keep)
        assert all(torch.equal(again.keep[n], m) for n, m in masks.keep.items())
        assert again.fingerprint() == masks.fingerprint()


def test_fingerprint_is_of_names_and_shapes() -> None:
    model = _net()
    assert _masks(model, seed=1).fingerprint() == _masks(model, seed=2).fingerprint()
    other = Masks({"0.weight": torch.ones(5, 6, dtype=torch.bool)})
    assert other.fingerprint() != _masks(model).fingerprint()
    assert other.fingerprint() != Masks({"0.weight": torch.ones(6, 5).bool()}).fingerprint()


def test_apply_zeros_and_leaves_the_rest() -> None:
    model, masks = _net(), _masks(_net())
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].weight[~masks.keep["0.weight"]] = float("nan")
    apply(model, masks)
    for name, p in model.state_dict().items():
        expected = before[name] * masks.keep[name] if name in masks.keep else before[name]
        assert torch.equal(p, expected)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
@pytest.mark.parametrize("layout", ["rows", "columns", "channels_last", "strided"])
def test_zeros_are_written_bitwise_in_any_layout(dtype: torch.dtype, layout: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 2, 2, generator=g).to(dtype)
    x[0, 0] = float("nan")
    x[1, 1] = -float("inf")
    x[2, 2] = -0.0
    keep = torch.rand(4, 6, 2, 2, generator=g) > 0.4
    if layout == "columns":
        x, keep = x.flatten(1).t(), keep.flatten(1).t()
    elif layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x, keep = x[:, ::2], keep[:, ::2].contiguous()
    before = x.clone()
    copied = pruned_to_zero(keep, x)
    zero_pruned(keep, x)
    for found in (x, copied):
        assert found.dtype == dtype
        assert (found[~keep] == 0).all()
        if not dtype.is_complex:
            assert not torch.signbit(found[~keep]).any()
        assert torch.equal(found[keep].isnan(), before[keep].isnan())
        torch.testing.assert_close(found[keep], before[keep], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("call", ["apply", "attach"])
def test_masks_for_another_model(call: str) -> None:
    run = apply if call == "apply" else attach
    model = _net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"for another model: .*no parameter \['1.weight'\]; it"):
        run(model, Masks({"1.weight": torch.ones(5, 6, dtype=torch.bool)}))
    wrong = Masks({"0.weight": torch.zeros(6, 5, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"another model: the mask of '0.weight' has shape \[6, 5"):
        run(model, wrong)
    with pytest.raises(ValueError, match=r"the space has no parameter|for another model"):
        wrong.flat(ParamSpace.of(nn.Linear(2, 2)))
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_wrong_arguments() -> None:
    space = ParamSpace.of(_net())
    with pytest.raises(ValueError, match="masks hold no tensor"):
        Masks({})
    with pytest.raises(TypeError, match=r"mask of 'w' should be a boolean .*got torch.float32"):
        Masks({"w": torch.ones(2)})
    with pytest.raises(TypeError, match=r"keep= should be a boolean tensor .*got torch.float32"):
        Masks.of(torch.ones(space.size), space)
    with pytest.raises(ValueError, match=r"expected a flat mask \[53\], got \[53, 1\]"):
        Masks.of(torch.ones(space.size, 1, dtype=torch.bool), space)
    with pytest.raises(ValueError, match=r"expected a flat vector of length 53"):
        Masks.of(torch.ones(3, dtype=torch.bool), space)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got function"):
        apply(_net, _masks(_net()))  # type: ignore[arg-type]
    lazy = Masks({"weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"'weight' of a lazy module has no shape yet"):
        apply(nn.LazyLinear(2), lazy)


# ------------------------------------------------------------------ tied tensors
class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).mean(1))


def test_tied_parameters_are_refused_by_name_unless_allowed() -> None:
    model = _Tied()
    keep = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    for name, other in (("embed.weight", "head.weight"), ("head.weight", "embed.weight")):
        with pytest.raises(
            ValueError, match=rf"cannot prune '{name}': it is the same tensor as '{other}'"
        ):
            attach(model, Masks({name: keep}))
    both = Masks({"embed.weight": keep, "head.weight": ~keep})
    with pytest.raises(ValueError, match=r"are one tied tensor, but their masks differ"):
        apply(model, both, allow_tied=True)
    for masks in (Masks({"head.weight": keep}), Masks(dict.fromkeys(both.keep, keep))):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        attached = attach(model, masks, optimizer, allow_tied=True)
        for _ in range(3):
            model(torch.tensor([[0, 1], [2, 3]])).square().sum().backward()
            optimizer.step()
        assert not model.embed.weight[~keep].any()
        assert model.head.weight is model.embed.weight
        attached.remove()


def test_shared_memory_is_refused() -> None:
    model = _net()
    model[2].bias = nn.Parameter(model[0].weight.detach()[1, :3])
    with pytest.raises(ValueError, match=r"'0.weight': it shares memory with '2.bias'"):
        apply(model, Masks({"0.weight": torch.ones(5, 6, dtype=torch.bool)}))
    apply(model, Masks({"2.weight": torch.ones(3, 5, dtype=torch.bool)}))


# ------------------------------------------------------------------- persistence
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "after training"])
def test_training_equals_training_by_hand(name: str, warm: bool) -> None:
    """Also with momentum from before the mask, which would revive weights."""
    ours, theirs = _net(), _net()
    mine = OPTIMIZERS[name](list(ours.parameters()))
    other = OPTIMIZERS[name](list(theirs.parameters()))
    if warm:
        _train(ours, mine, 3)
        if "lbfgs" not in name:  # by hand, its flat history would need what is tested here
            _train(theirs, other, 3)
    masks = _masks(ours)
    attached = attach(ours, masks, mine)
    if not (warm and "lbfgs" in name):
        apply(theirs, masks)
        for p, m in ((p, masks.keep[n]) for n, p in theirs.named_parameters() if n in masks.keep):
            for value in other.state[p].values() if p in other.state else ():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    value.mul_(m)
        _train(theirs, other, 5, by_hand=masks)
    _train(ours, mine, 5)
    params, twins = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for n, p in params.items():
        dead = ~masks.keep[n] if n in masks.keep else torch.zeros_like(p, dtype=torch.bool)
        assert (p.detach()[dead] == 0).all()
        assert (p.grad[dead] == 0).all()
        for value in mine.state[p].values() if p in mine.state else ():
            if isinstance(value, Tensor) and value.shape == p.shape:
                assert (value[dead] == 0).all()
        if not (warm and "lbfgs" in name):
            torch.testing.assert_close(p, twins[n], rtol=1e-13, atol=1e-14)
            assert (p.detach()[~dead] != 0).all()
    flat = torch.cat(
        [
            ~masks.keep[n].reshape(-1)
            if n in masks.keep
            else torch.zeros(p.numel(), dtype=torch.bool)
            for n, p in params.items()
        ]
    )
    if "lbfgs" in name:
        state = mine.state[next(ours.parameters())]
        history = [state["d"], state["prev_flat_grad"], *state["old_dirs"], *state["old_stps"]]
        assert len(history) > 4
        assert all((h[flat] == 0).all() for h in history)
    assert attached.masks.sparsity == masks.sparsity


def test_without_the_masked_state_weights_revive() -> None:
    """What the state's mask is for: gradient masks alone do not hold."""
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _train(model, optimizer, 2)
    masks = _masks(model)
    apply(model, masks)
    _train_gradients_only(model, optimizer, masks)
    dead = ~masks.keep["0.weight"]
    assert (model[0].weight.detach()[dead] != 0).all()


def _train_gradients_only(model: nn.Module, optimizer: torch.optim.Optimizer, masks: Masks) -> None:
    optimizer.zero_grad()
    _loss(model).backward()
    for n, p in model.named_parameters():
        if n in masks.keep:
            p.grad.mul_(masks.keep[n])
    optimizer.step()


def test_muon_mixes_coordinates_and_is_masked_after_each_step() -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    masks = _masks(model)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1)
    attach(model, masks, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        _loss(model).backward()
        optimizer.step()
        for n, p in model.named_parameters():
            assert not p.detach()[~masks.keep[n]].any()
            assert not optimizer.state[p]["momentum_buffer"][~masks.keep[n]].any()


def test_several_optimizers_accumulation_clipping_and_scaling() -> None:
    model = _net()
    masks = _masks(model)
    first = torch.optim.Adam(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    attach(model, masks, [first, second])
    for _ in range(3):
        for _ in range(2):  # gradients accumulate
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x, y = _data()
                loss = nn.functional.cross_entropy(model.float()(x.float()), y)
            scaler.scale(loss).backward()
        for opt in (first, second):
            scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        kept = [
            p.grad[masks.keep[n]] if n in masks.keep else p.grad
            for n, p in model.named_parameters()
        ]
        assert torch.cat([k.reshape(-1) for k in kept]).norm() == pytest.approx(
            min(0.1, norm.item()), rel=1e-4
        )
        for opt in (first, second):
            scaler.step(opt)
            opt.zero_grad()
        scaler.update()
    for n, m in masks.keep.items():
        p = dict(model.named_parameters())[n]
        assert not p.detach()[~m].any()
        assert p.detach()[m].all()


def test_sparse_gradients() -> None:
    embed = nn.Embedding(5, 3, sparse=True)
    keep = torch.rand(5, 3, generator=torch.Generator().manual_seed(2)) > 0.5
    optimizer = torch.optim.SparseAdam(embed.parameters(), lr=0.1)
    embed(torch.tensor([0, 1])).sum().backward()
    attached = attach(embed, Masks({"weight": keep}), optimizer)
    assert torch.equal(embed.weight.grad.to_dense()[:2], keep[:2].float())
    for _ in range(2):
        embed(torch.tensor([0, 1, 1])).sum().backward()
        assert not embed.weight.grad.to_dense()[~keep].any()
        optimizer.step()
        assert not embed.weight.detach()[~keep].any()
    attached.remove()


def test_a_scalar_parameter_keeps_its_count_of_steps() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.Adam(model.parameters())
    attach(model, Masks({"scale": torch.tensor(False)}), optimizer)
    for _ in range(2):
        (model.scale * 3.0).backward()
        optimizer.step()
    assert model.scale.item() == 0.0
    assert float(optimizer.state[model.scale]["step"]) == 2.0


def test_non_finite_gradients_of_pruned_weights_vanish() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(model, Masks({"weight": torch.tensor([[True, False]])}), optimizer)
    (model.weight * torch.tensor([[1.0, float("inf")]])).sum().backward()
    assert model.weight.grad.tolist() == [[1.0, 0.0]]
    optimizer.step()
    assert torch.isfinite(model.weight).all()


def test_double_backward_passes_through_the_hook() -> None:
    model, masks = _net(), _masks(_net())
    attach(model, masks, torch.optim.SGD(model.parameters(), lr=0.1))
    w = model[0].weight
    (g,) = torch.autograd.grad(_loss(model), w, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), w)
    assert h.abs().sum() > 0
    assert not h[~masks.keep["0.weight"]].any()


def test_without_an_optimizer_every_forward_pass_sees_zeros() -> None:
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    _train(model, optimizer, 2)
    masks = _masks(model)
    attached = attach(model, masks)
    seen: list[bool] = []
    model[0].register_forward_pre_hook(
        lambda m, _: seen.append(bool(m.weight.detach()[~masks.keep["0.weight"]].any()))
    )
    optimizer.zero_grad()
    _loss(model).backward()
    assert not model[0].weight.grad[~masks.keep["0.weight"]].any()
    optimizer.step()
    assert model[0].weight.detach()[~masks.keep["0.weight"]].all()  # old momentum, as documented
    first, second = _loss(model), _loss(model)  # two graphs at once
    (first + second).backward()
    assert seen == [False, False, False]
    attached.remove()
    assert not model[0].weight.detach()[~masks.keep["0.weight"]].any()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("given", [True, False], ids=["optimizer", "no optimizer"])
def test_curvature_is_that_of_the_pruned_model(given: bool) -> None:
    """Masks neither stop the operators nor leak into what they replace parameters by."""
    model, plain = _net(), _net()
    masks = _masks(model)
    apply(plain, masks)
    attach(model, masks, torch.optim.SGD(model.parameters(), lr=0.1) if given else None)
    names = [n for n, _ in plain.named_parameters()]
    values = {n: p.detach() + 0.5 for n, p in plain.named_parameters()}
    before = {n: v.clone() for n, v in values.items()}
    x = _data()[0]
    found = torch.func.functional_call(model, values, (x,))
    torch.testing.assert_close(found, torch.func.functional_call(plain, values, (x,)))
    assert all(torch.equal(values[n], before[n]) for n in names)
    products = []
    for m in (model, plain):
        risk = Risk(m, nn.CrossEntropyLoss(), _data())
        v = torch.linspace(-1, 1, risk.space.size, dtype=torch.float64)
        products.append(torch.stack([hessian(risk) @ v, ggn(risk) @ v, risk.gradient()]))
    torch.testing.assert_close(*products, rtol=1e-12, atol=1e-14)
    dead = ~masks.keep["0.weight"].reshape(-1)
    assert products[0][2][: dead.numel()][dead].abs().max() > 0  # curvature sees all coordinates


def test_checkpoints_carry_masks_and_load_strictly_with_and_without() -> None:
    model, masks = _net(), _masks(_net())
    plain = list(model.state_dict())
    attached = attach(model, masks, torch.optim.SGD(model.parameters(), lr=0.1))
    saved = copy.deepcopy(model.state_dict())
    assert [k for k in saved if k not in plain] == ["0.weight_keep", "2.weight_keep"]

    twin = _net(seed=9)
    other = attach(twin, _masks(twin, seed=5), torch.optim.SGD(twin.parameters(), lr=0.1))
    twin.load_state_dict(saved, strict=True)
    assert torch.equal(other.masks.keep["0.weight"], masks.keep["0.weight"])
    _train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), 1)
    assert not twin[0].weight.detach()[~masks.keep["0.weight"]].any()

    attached.remove()
    assert list(model.state_dict()) == plain
    _net(seed=4).load_state_dict(model.state_dict(), strict=True)
    unpruned = _net(seed=7).state_dict()
    other.remove()
    handle = attach(twin, masks, torch.optim.SGD(twin.parameters(), lr=0.1))
    twin.load_state_dict(unpruned, strict=False)  # weights without masks: ours are imposed
    assert not twin[0].weight.detach()[~masks.keep["0.weight"]].any()
    handle.remove()


def test_a_loaded_optimizer_is_masked() -> None:
    model = _net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    _train(model, optimizer, 2)
    old = copy.deepcopy(optimizer.state_dict())
    masks = _masks(model)
    attach(model, masks, optimizer)
    optimizer.load_state_dict(old)
    dead = ~masks.keep["0.weight"]
    assert not optimizer.state[model[0].weight]["exp_avg"][dead].any()
    assert optimizer.state[model[0].bias]["exp_avg"].all()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("given", [True, False], ids=["optimizer", "no optimizer"])
def test_copies_carry_masks_and_attach_again(how: str, given: bool) -> None:
    model, masks = _net(), _masks(_net())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    attach(model, masks, optimizer if given else None)
    _loss(model).backward()
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    carried = masks_of(twin)
    assert carried is not None
    assert all(torch.equal(m, masks.keep[n]) for n, m in carried.keep.items())
    assert torch.equal(twin(_data()[0]), model(_data()[0]))
    fresh = torch.optim.Adam(twin.parameters(), lr=0.1)
    again = attach(twin, carried, fresh)
    _train(twin, fresh, 2)
    assert not twin[0].weight.detach()[~masks.keep["0.weight"]].any()
    again.remove()
    assert masks_of(twin) is None
    assert list(twin.state_dict()) == list(_net().state_dict())
    assert masks_of(model) is not None
    assert not twin._forward_pre_hooks
    assert not twin._load_state_dict_post_hooks


def test_a_copy_is_made_plain_by_detach() -> None:
    model, masks = _net(), _masks(_net())
    attach(model, masks)
    twin = copy.deepcopy(model)
    detach(twin)
    assert list(twin.state_dict()) == list(_net().state_dict())
    assert not twin._forward_pre_hooks
    assert type(pickle.loads(pickle.dumps(twin))) is nn.Sequential


def test_remove_leaves_no_hook_and_is_idempotent() -> None:
    model, masks = _net(), _masks(_net())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    attached = attach(model, masks, optimizer)
    attached.remove()
    attached.remove()
    assert repr(attached) == "Attachment(removed)"
    assert not any(p._backward_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    assert not any(m._load_state_dict_post_hooks for m in model.modules())
    for call in (attached.impose, lambda: attached.update(masks), lambda: attached.masks):
        with pytest.raises(RuntimeError, match=r"these masks were removed; attach"):
            call()
    _train(model, optimizer, 1)
    assert model[0].weight.detach()[~masks.keep["0.weight"]].any()  # free again


def test_update_is_the_next_event_of_a_schedule() -> None:
    model = _net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    attached = attach(model, _masks(model, 0.2), optimizer)
    buffer = model[0].weight_keep
    for share in (0.4, 0.6, 0.8):
        masks = _masks(model, share)
        attached.update(masks)
        assert model[0].weight_keep is buffer
        assert (
            not optimizer.state.get(model[0].weight, {})
            .get("exp_avg", torch.zeros(5, 6))[~masks.keep["0.weight"]]
            .any()
        )
        _train(model, optimizer, 2)
        assert not model[0].weight.detach()[~masks.keep["0.weight"]].any()
    with pytest.raises(ValueError, match=r"expected masks of \['0.weight', '2.weight'\] in the"):
        attached.update(Masks({"0.weight": torch.ones(5, 6, dtype=torch.bool)}))


def test_wrong_attachments() -> None:
    model, masks = _net(), _masks(_net())
    stranger = torch.optim.SGD(_net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"does not hold the masked parameters \['0.weight', '2.w"):
        attach(model, masks, stranger)
    half = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"does not hold the masked parameters \['2.weight'\]"):
        attach(model, masks, half)
    with pytest.raises(TypeError, match=r"optimizer= takes a torch.optim.Optimizer.*got int"):
        attach(model, masks, 3)  # type: ignore[arg-type]
    assert list(model.state_dict()) == list(_net().state_dict())
    model[2].requires_grad_(False)
    attached = attach(model, masks, half)  # what is frozen needs no optimizer
    with pytest.raises(RuntimeError, match=r"'0.weight' has a mask attached already; use update"):
        attach(model, masks, half)
    model[0].weight = nn.Parameter(torch.zeros(5, 6, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"'weight' of a Linear was replaced since masks were"):
        _train(model, half, 1)
    attached.remove()
    other = _net()
    other[0].weight_keep = "mine"
    with pytest.raises(RuntimeError, match=r"attribute 'weight_keep' of its own"):
        attach(other, masks)
    third = _net()
    attached = attach(third, masks)
    del third[0].weight_keep
    with pytest.raises(RuntimeError, match=r"mask 'weight_keep' of a Linear is gone"):
        attached.impose()


def test_masks_follow_a_change_of_type() -> None:
    model, masks = _net(), _masks(_net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(model, masks, optimizer)
    model.to(torch.float32)
    assert model[0].weight_keep.dtype == torch.bool
    x, y = _data()
    nn.functional.cross_entropy(model(x.float()), y).backward()
    optimizer.step()
    assert not model[0].weight.detach()[~masks.keep["0.weight"]].any()


@pytest.mark.parametrize("again", ["attach", "update"])
def test_no_memory_grows_over_cycles(again: str) -> None:
    """The growth of pytorch#49332, and one copy of each mask (pytorch#34257)."""
    model = _net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    attached = attach(model, _masks(model), optimizer)
    counts = []
    for cycle in range(12):
        masks = _masks(model, 0.1 + 0.05 * cycle)
        if again == "update":
            attached.update(masks)
        else:
            attached.remove()
            attached = attach(model, masks, optimizer)
        _train(model, optimizer, 2)
        del masks
        if cycle not in (3, 7, 11):  # looking takes a while
            continue
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
        bools = [t for t in tensors if t.dtype == torch.bool and t.shape in ((5, 6), (3, 5))]
        hooks = sum(len(p._backward_hooks or ()) for p in model.parameters())
        hooks += len(optimizer._optimizer_step_post_hooks) + len(model._load_state_dict_post_hooks)
        counts.append((len(tensors), len(bools), hooks))
        del tensors, bools  # they would be what grows
    assert len(counts) == 3
    assert len(set(counts)) == 1, counts
    assert counts[-1][1:] == (2, 4), "one mask for each parameter, one hook for each purpose"
    del attached


def test_a_model_is_freed_with_its_masks() -> None:
    import weakref

    gc.collect()
    gc.disable()
    try:
        model = _net()
        attached = attach(model, _masks(model), torch.optim.SGD(model.parameters(), lr=0.1))
        freed = weakref.ref(model[0])
        del model, attached
        assert freed() is None, "a reference cycle keeps the model until the collector runs"
    finally:
        gc.enable()


# ---------------------------------------------------------- compiled and parallel
@pytest.mark.parametrize("given", [True, False], ids=["optimizer", "no optimizer"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled(given: bool, order: str) -> None:
    _compiled("aot_eager", given, order)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
def test_compiled_by_inductor() -> None:
    import shutil

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    _compiled("inductor", given=True, order="before")


def _compiled(backend: str, given: bool, order: str) -> None:
    torch._dynamo.reset()
    eager, model = _net(), _net()
    masks = _masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    twin = torch.optim.SGD(eager.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    compiled = torch.compile(model, backend=backend)
    if order == "after":
        _train(compiled, optimizer, 2)
        _train(eager, twin, 2)
    attach(model if order == "before" else compiled, masks, optimizer if given else None)
    attach(eager, masks, twin if given else None)
    _train(compiled, optimizer, 4)
    _train(eager, twin, 4)
    x = _data()[0]
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-10, atol=1e-12)
    for n, m in masks.keep.items():
        p = dict(model.named_parameters())[n].detach()
        assert not p[~m].any()
        assert p[m].all()
    torch._dynamo.reset()


SCRIPT = Path(__file__).with_name("masks_ddp.py")


@pytest.mark.slow
def test_distributed_data_parallel() -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    running = [Program(SCRIPT, rank, port) for rank in range(2)]
    ended = [program.finish() for program in running]
    assert [e.code for e in ended] == [0, 0], "\n".join(e.error for e in ended)
    digests = [re.findall(r"weights (\w+)", e.output) for e in ended]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 3
