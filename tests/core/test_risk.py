"""Risks: kinds of data, normalization whatever the batching, and what is refused."""

from __future__ import annotations

import copy
import itertools
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import curvlib as cl
from tests.cases import build
from tests.problems import Counting, columns, error, risk_of

F64 = torch.float64


def _model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _batch(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, dtype=F64, generator=g), torch.randint(3, (n,), generator=g)


CE = nn.CrossEntropyLoss()


# --------------------------------------------------------------------- kinds of data
def _kinds() -> dict[str, Any]:
    x, y = _batch()

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(zip(x, y, strict=True))

    class OnlyItems:
        def __getitem__(self, i: int) -> Any:
            if i >= 2:
                raise IndexError(i)
            return (x[:2], y[:2]) if i == 0 else (x[2:], y[2:])

    return {
        "one batch": (x, y),
        "one batch in a list": [x, y],
        "list of batches": [(x[:1], y[:1]), (x[1:], y[1:])],
        "tuple of batches": ((x[:1], y[:1]), (x[1:], y[1:])),
        "list of lists": [[x[:2], y[:2]], [x[2:], y[2:]]],
        "two batches of two": [(x[:3], y[:3]), (x[3:], y[3:])],
        "loader": DataLoader(TensorDataset(x, y), batch_size=4),
        "loader of a stream": DataLoader(Stream(), batch_size=4),
        "counting": Counting([(x[:1], y[:1]), (x[1:], y[1:])]),
        "items": OnlyItems(),
    }


@pytest.mark.parametrize("kind", _kinds())
def test_all_kinds_of_data_are_the_same_risk(kind: str) -> None:
    x, y = _batch()
    model = _model()
    risk = cl.Risk(model, CE, _kinds()[kind])
    expected = F.cross_entropy(model(x), y).detach()
    for _ in range(2):
        assert error(risk.value(), expected) < 1e-14
    assert risk.weight() == 6
    assert error(risk.gradient(), cl.Risk(model, CE, (x, y)).gradient()) < 1e-14


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_mappings_go_to_the_model_by_name(kind: type) -> None:
    x, y = _batch()
    model = _model()
    batch = kind({"input": x})
    risk = cl.Risk(model, lambda out, b: F.cross_entropy(out, y), batch)
    assert error(risk.value(), F.cross_entropy(model(x), y).detach()) < 1e-14


def test_any_batch_with_forward() -> None:
    x, y = _batch()
    model = _model()
    expected = F.cross_entropy(model(x), y).detach()
    whole = cl.Risk(
        model,
        CE,
        [{"a": {"b": x[:2]}, "y": y[:2]}, {"a": {"b": x[2:]}, "y": y[2:]}],
        forward=lambda m, b: m(b["a"]["b"]),
        target=lambda b: b["y"],
    )
    assert error(whole.value(), expected) < 1e-14
    triple = cl.Risk(
        model,
        CE,
        [(x[:2], None, y[:2]), (x[2:], None, y[2:])],
        forward=lambda m, b: m(b[0]),
        target=lambda b: b[2],
    )
    assert error(triple.value(), expected) < 1e-14
    bare = cl.Risk(  # physics-informed and the like: no target at all
        model,
        lambda out, batch: out.square().mean(),
        x,
        forward=lambda m, b: m(b),
    )
    assert error(bare.value(), model(x).square().mean().detach()) < 1e-14


def test_values_are_scalars_of_the_vectors_type() -> None:
    x, y = _batch()
    single = cl.Risk(_model().float(), CE, (x.float(), y))
    assert single.value().dtype == torch.float32
    assert single.gradient().dtype == torch.float32
    half = cl.Risk(_model().bfloat16(), CE, (x.bfloat16(), y))
    assert half.value().dtype == torch.float32
    assert half.gradient().shape == (31,)


def test_restrict_and_on() -> None:
    x, y = _batch()
    model = _model()
    risk = cl.Risk(model, CE, (x, y))
    part = risk.restrict("2.*")
    assert part.space.names == ("2.weight", "2.bias")
    assert error(part.gradient(), risk.gradient()[16:]) < 1e-14
    other = part.on((x[:2], y[:2]))
    assert other.space == part.space
    assert error(other.value(), F.cross_entropy(model(x[:2]), y[:2]).detach()) < 1e-14


def test_of_another_model() -> None:
    x, y = _batch()
    risk = cl.Risk(_model(), CE, (x, y), params="2.*")
    twin = copy.deepcopy(risk.model)
    other = risk.of(twin)
    assert other.space == risk.space
    assert error(other.gradient(), risk.gradient()) == 0.0
    with torch.no_grad():
        twin[2].weight.zero_()
    compiled = risk.of(torch.compile(twin, backend="eager"))
    assert error(compiled.value(), F.cross_entropy(twin(x), y).detach()) < 1e-14
    assert error(risk.value(), F.cross_entropy(risk.model(x), y).detach()) < 1e-14


def test_no_pass_at_construction_and_one_for_each_value() -> None:
    x, y = _batch()
    data = Counting([(x[:1], y[:1]), (x[1:], y[1:])])
    risk = cl.Risk(_model(), CE, data)
    risk.restrict("0.*"), risk.on(data), repr(risk)
    assert data.passes == 0
    risk.value()
    assert (data.passes, data.batches) == (1, 2)
    risk.gradient()
    assert (data.passes, data.batches) == (2, 4)


def test_fingerprints_see_parameters_loss_and_data() -> None:
    x, y = _batch()
    model = _model()
    first = cl.Risk(model, CE, (x, y)).fingerprint()
    assert cl.Risk(_model(), nn.CrossEntropyLoss(), (x.clone(), y)).fingerprint() == first
    others = [
        cl.Risk(model, CE, (x + 1, y)),
        cl.Risk(model, CE, (x, (y + 1) % 3)),
        cl.Risk(model, nn.CrossEntropyLoss(label_smoothing=0.1), (x, y)),
        cl.Risk(model, CE, (x, y), params="0.*"),
        cl.Risk(model, CE, (x, y), params="2.*"),
        *(
            cl.Risk(model, nn.CrossEntropyLoss(torch.tensor(w, dtype=F64)), (x, y))
            for w in ([1.0, 2.0, 3.0], [1.0, 3.0, 2.0])
        ),
    ]
    assert len({first, *(r.fingerprint() for r in others)}) == 8
    paired = cl.Risk(model, CE, (x.flip(0), y))  # the same inputs and targets, paired otherwise
    assert paired.fingerprint() != first
    assert cl.Risk(model, CE, [(x[:2], y[:2]), (x[2:], y[2:])]).fingerprint() == first


def test_fingerprints_see_what_a_loader_holds() -> None:
    """Tensors, lists of examples and subsets; of streams nothing but that they are one."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            yield from zip(x, y, strict=True)

    x, y = _batch()
    model = _model()
    Loader, Tensors = torch.utils.data.DataLoader, torch.utils.data.TensorDataset
    Subset = torch.utils.data.Subset
    count = len(x)

    def prints(data: Any) -> str:
        return cl.Risk(model, CE, data).fingerprint()

    def loader(dataset: Any) -> Any:
        return Loader(dataset, batch_size=2)

    whole = Tensors(x, y)
    different = [
        loader(whole),
        loader(Tensors(x + 1.0, y)),
        loader(Subset(whole, range(count - 1))),
        loader(Subset(whole, range(1, count))),
        loader(Subset(Tensors(x + 1.0, y), range(1, count))),
        loader([(x[i] + 2.0, y[i]) for i in range(count)]),
        loader([(x[i], y[i]) for i in reversed(range(count - 2))]),
        loader(Stream()),
    ]
    assert len({prints(data) for data in different}) == len(different)
    assert prints(loader(Tensors(x.clone(), y))) == prints(different[0])
    assert prints(loader([(x[i], y[i]) for i in range(count)])) == prints(different[0])


def test_fingerprints_see_what_is_not_selected() -> None:
    x, y = _batch()
    model = nn.Sequential(nn.BatchNorm1d(3), _model()).double().eval()
    risk = cl.Risk(model, CE, (x, y), params="1.2.*")
    prints = {risk.fingerprint()}
    with torch.no_grad():
        model[1][0].weight[0, 0] += 1.0  # a parameter outside the selection
        prints.add(risk.fingerprint())
        model[0].running_mean[0] += 1.0  # a buffer
        prints.add(risk.fingerprint())
        model[1][2].weight[0, 0] += 1.0
        prints.add(risk.fingerprint())
    model.train()
    prints.add(risk.fingerprint())
    assert len(prints) == 5


# ---------------------------------------------------------------------- normalization
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 7), max_size=4, unique=True), mask=st.integers(0, 254))
def test_masks_and_cuts_do_not_matter(cuts: list[int], mask: int) -> None:
    """Random batch boundaries and masks: torch's mean over the concatenation, each time."""
    x, y = _batch(8)
    y = torch.where(torch.tensor([mask >> i & 1 for i in range(8)]) == 1, -100, y)
    bounds = [0, *sorted(cuts), 8]
    batches = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(bounds)]
    model = _model()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 4.0], dtype=F64))
    cut, whole = cl.Risk(model, loss, batches), cl.Risk(model, loss, [(x, y)])
    expected = F.cross_entropy(model(x), y, weight=loss.weight)
    assert error(cut.value(), expected.detach()) < 1e-13
    theta = list(model.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, theta)])
    assert error(cut.gradient(), gradient) < 1e-12
    V = columns(31, 2)
    assert error(cl.hessian(cut) @ V, cl.hessian(whole) @ V) < 1e-12


def test_no_valid_term_at_all() -> None:
    x, y = _batch()
    risk = cl.Risk(_model(), CE, [(x, torch.full_like(y, -100))] * 2)
    for attempt in (
        risk.value,
        risk.gradient,
        lambda: cl.hessian(risk) @ torch.zeros(31, 1).double(),
    ):
        with pytest.raises(ValueError, match="no loss term is valid: every target is ignored"):
            attempt()


def test_unknown_losses_are_verified_to_be_means() -> None:
    x, y = _batch()
    target = F.one_hot(y, 3).double()
    batches = [(x[:2], target[:2]), (x[2:], target[2:])]
    summed = lambda out, t: (out - t).abs().sum()  # noqa: E731
    risk = cl.Risk(_model(), summed, batches)
    with pytest.raises(ValueError, match=r"is not a mean over examples.*reduction='sum'.*weight="):
        risk.value()
    with pytest.raises(ValueError, match="is not a mean over examples"):
        risk.gradient()
    model = _model()
    settled = cl.Risk(model, summed, batches, reduction="sum")
    assert error(settled.value(), (model(x) - target).abs().sum().detach()) < 1e-14
    masked = lambda out, t: F.cross_entropy(out, t.masked_fill(t == 2, -100))  # noqa: E731
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    with pytest.raises(ValueError, match="weight=lambda batch"):
        cl.Risk(_model(), masked, batches).value()
    right = cl.Risk(model, masked, batches, weight=lambda b: (b[1] != 2).sum())
    assert error(right.value(), masked(model(x), y).detach()) < 1e-14


def test_one_batch_needs_no_verification() -> None:
    x, y = _batch()
    model = _model()
    risk = cl.Risk(model, lambda out, t: out.square().sum(), (x, y))
    assert error(risk.value(), model(x).square().sum().detach()) < 1e-14


def test_mappings_with_unknown_losses_need_a_weight() -> None:
    case = build("hf own loss")
    settings = {k: v for k, v in case.settings.items() if k != "weight"}
    risk = cl.Risk(case.model, case.loss, case.data, **settings)
    with (
        pytest.warns(UserWarning, match="MATH"),
        pytest.raises(
            ValueError, match=r"pass weight=lambda batch: <number of loss terms>.*reduction='sum'"
        ),
    ):
        risk.value()
    cl.Risk(case.model, case.loss, case.data[0], **settings)  # one batch: nothing to weigh


@pytest.mark.filterwarnings("ignore:curvlib. .*:UserWarning")
def test_values_of_several_forward_passes_agree() -> None:
    for name in ("hf own loss", "hf target"):
        case = build(name)
        risk = risk_of(case)
        assert risk.value() == risk.value()


def test_repr_is_short_and_says_what_it_is() -> None:
    x, y = _batch()
    text = repr(cl.Risk(_model(), CE, (x, y)))
    assert text == (
        "Risk(Sequential, cross_entropy (mean), 31 parameters in 4 tensors, "
        "data: a tuple of 2 (Tensor))"
    )
