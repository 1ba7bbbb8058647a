"""What risks refuse, and in which words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlib as cl
from tests.problems import Counting

F64 = torch.float64


def _model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _batch(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, dtype=F64, generator=g), torch.randint(3, (n,), generator=g)


CE = nn.CrossEntropyLoss()


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ValueError, match=rf"device='{device}' cannot be used here .*leave device="):
        cl.Risk(_model(), CE, _batch(), device=device)


def test_arguments_of_the_wrong_type() -> None:
    x, y = _batch()
    with pytest.raises(TypeError, match=r"model= needs a torch.nn.Module, got function"):
        cl.Risk(lambda x: x, CE, (x, y))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="class CrossEntropyLoss; pass an instance"):
        cl.Risk(_model(), nn.CrossEntropyLoss, (x, y))  # type: ignore[arg-type]
    for name in ("forward", "target", "weight"):
        with pytest.raises(TypeError, match=f"{name}= needs a function, got int"):
            cl.Risk(_model(), CE, (x, y), **{name: 3})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="data= got one tensor; pass"):
        cl.Risk(_model(), CE, x)
    with pytest.raises(TypeError, match=r"data= should be a batch.*got int"):
        cl.Risk(_model(), CE, 3)


def test_iterators_can_be_used_once() -> None:
    x, y = _batch()
    for once in (iter([(x, y)]), ((x, y) for _ in range(2)), zip([x], [y], strict=True)):
        with pytest.raises(TypeError, match=r"can be iterated only once.*list\(data\)"):
            cl.Risk(_model(), CE, once)
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    with pytest.raises(TypeError, match=r"the DataLoader itself instead of iter"):
        cl.Risk(_model(), CE, iter(loader))


def test_an_iterator_in_disguise() -> None:
    """``__iter__`` that hands out the same exhausted iterator again."""
    x, y = _batch()
    inner = iter([(x, y), (x, y)])

    class Disguised:
        def __iter__(self) -> Iterator[Any]:
            return inner

    risk = cl.Risk(_model(), CE, Disguised())
    risk.value()
    with pytest.raises((ValueError, RuntimeError), match=r"once|changed between passes|no batch"):
        risk.value()


def test_data_sets_of_single_examples() -> None:
    with pytest.raises(TypeError, match=r"single examples; pass torch.utils.data.DataLoader"):
        cl.Risk(_model(), CE, TensorDataset(*_batch()))


def test_empty_data() -> None:
    for data in ([], (), DataLoader(TensorDataset(*_batch(3)), batch_size=4, drop_last=True)):
        with pytest.raises(ValueError, match="the data has no batch"):
            cl.Risk(_model(), CE, data).value()
    x, y = _batch()
    with pytest.raises(ValueError, match="no loss term is valid"):
        cl.Risk(_model(), CE, (x[:0], y[:0])).value()


def test_a_loader_whose_length_changes() -> None:
    x, y = _batch()
    data = Counting([(x[:1], y[:1]), (x[1:], y[1:])])
    risk = cl.Risk(_model(), CE, data)
    risk.value()
    data.data.append((x, y))
    with pytest.raises(RuntimeError, match=r"2 batches with 6 examples first, now 3 with 12"):
        risk.gradient()
    data.data = data.data[:1]
    with pytest.raises(RuntimeError, match="the data changed between passes"):
        cl.hessian(risk) @ torch.zeros(31, 1, dtype=F64)


def test_batches_that_are_no_pairs() -> None:
    x, y = _batch()
    for data in ([(x, y, y)], [x, y, y], [x]):
        with pytest.raises(TypeError, match=r"pair \(input, target\) or a mapping.*pass forward="):
            cl.Risk(_model(), CE, data).value()


def test_targets_that_do_not_fit() -> None:
    x, y = _batch()
    with pytest.raises(ValueError, match=r"class indices of shape \[6\], got \[5\]"):
        cl.Risk(_model(), CE, (x, y[:5])).value()
    with pytest.raises(ValueError, match=r"mse of an output of shape \[6, 3\] needs targets"):
        cl.Risk(_model(), nn.MSELoss(), (x, y.double())).value()
    with pytest.raises(TypeError, match=r"cross_entropy needs a target tensor.*target=lambda"):
        cl.Risk(_model(), CE, {"input": x}).value()


def test_losses_that_are_no_differentiable_scalars() -> None:
    x, y = _batch()
    with pytest.raises(ValueError, match=r"should return a scalar, got shape \[6\]"):
        cl.Risk(_model(), lambda o, t: o.sum(1), (x, y)).value()
    with pytest.raises(TypeError, match="should return a scalar tensor, got float"):
        cl.Risk(_model(), lambda o, t: float(o.sum()), (x, y)).value()
    for loss in (lambda o, t: o.detach().mean(), lambda o, t: torch.zeros(())):
        risk = cl.Risk(_model(), loss, (x, y))
        with pytest.raises(ValueError, match="the loss of batch 0 cannot be differentiated"):
            risk.gradient()
        with pytest.raises(ValueError, match="the loss of batch 0 cannot be differentiated"):
            cl.hessian(risk) @ torch.zeros(31, 1, dtype=F64)


def test_weights_that_are_no_numbers_of_terms() -> None:
    x, y = _batch()
    risk = cl.Risk(_model(), lambda o, t: o.mean(), (x, y), weight=lambda b: -1)
    with pytest.raises(ValueError, match=r"weight= returned -1.0 for batch 0"):
        risk.value()
    risk = cl.Risk(_model(), lambda o, t: o.mean(), (x, y), weight=lambda b: float("nan"))
    with pytest.raises(ValueError, match=r"weight= returned nan for batch 0"):
        risk.value()


def test_losses_that_are_nan_are_named_by_batch_and_layer() -> None:
    x, y = _batch()
    bad = x.clone()
    bad[1] = float("nan")
    risk = cl.Risk(_model(), CE, [(x[:2], y[:2]), (bad, y)])
    for attempt in (
        risk.value,
        risk.gradient,
        lambda: cl.hessian(risk) @ torch.zeros(31, 1, dtype=F64),
    ):
        with pytest.raises(FloatingPointError, match="batch 1"):
            attempt()
    model = _model()
    with torch.no_grad():
        model[2].bias[0] = float("inf")
    with pytest.raises(FloatingPointError, match="2"):
        cl.Risk(model, CE, (x, y)).gradient()


def test_parameters_on_several_devices() -> None:
    model = _model()
    model[2].to("meta")
    with pytest.raises(ValueError, match="parameters live on several devices"):
        cl.Risk(model, CE, _batch())


def test_inputs_of_another_type_than_the_parameters() -> None:
    x, y = _batch()
    with pytest.raises(Exception, match=r"dtype|type|Double|Float"):
        cl.Risk(_model(), CE, (x.float(), y)).value()


def test_of_a_model_that_is_no_copy() -> None:
    risk = cl.Risk(_model(), CE, _batch())
    with pytest.raises(ValueError, match=r"a parameter '0.weight' of shape \[4, 3\].*got \[5, 3\]"):
        risk.of(nn.Sequential(nn.Linear(3, 5).double()))
    with pytest.raises(ValueError, match=r"'0.weight' .*got no such parameter; pass a copy"):
        risk.of(nn.Linear(3, 4).double())
