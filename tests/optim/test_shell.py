"""The shell's own pieces: clock, checks of arguments, draws, hooks of methods."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlib.optim import arguments
from curvlib.optim.clock import Clock
from curvlib.optim.draws import signs, stream
from curvlib.optim.gradients import accumulate, finite
from curvlib.optim.replicas import average_gradients, size_of, sum_over_ranks
from curvlib.optim.shell import CurvatureOptimizer
from tests.optim.small import F64, batches, by_backward, loss_of, net, same, train, weights


class Descent(CurvatureOptimizer):
    """Plain gradient descent, which needs no curvature."""

    def __init__(self, params: Any, lr: float = 0.1, **settings: Any) -> None:
        super().__init__(params, {"lr": lr}, **settings)
        self.moves = True

    def _update(self, gradients: list[list[Tensor | None]]) -> bool:
        if not self.moves:
            return False
        for group, grads in zip(self.param_groups, gradients, strict=True):
            for p, g in zip(group["params"], grads, strict=True):
                if g is not None:
                    p.sub_(g, alpha=group["lr"])
        return True


class Gathering(Descent):
    """Counts what it is given to observe, and wants it every second step."""

    def _due(self) -> bool:
        return self.clock.due(2)

    def _observe(self, loss: Tensor, scale: float) -> None:
        known = self.pending.get("losses", torch.zeros(()))
        self.pending["losses"] = known + loss.detach() / scale
        if float(loss.detach()) > 1e6:
            raise ArithmeticError("too large")


def test_it_is_sgd_where_the_method_is() -> None:
    model, other, data = net(), net(), batches(4)
    found = train(Descent(model.parameters()), model, data)
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    for batch in data:
        sgd.zero_grad()
        loss_of(other, batch).backward()
        sgd.step()
    assert same(found, weights(other))


def test_a_class_without_a_step_cannot_be_made() -> None:
    class Idle(CurvatureOptimizer):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Idle([nn.Parameter(torch.ones(2))], {"lr": 0.1})


def test_clock_counts_curvature_apart_from_steps() -> None:
    clock = Clock()
    assert clock.due(3)
    due = []
    for _ in range(7):
        now = clock.due(3)
        due.append(now)
        clock = clock.ticked(curvature=now)
    assert due == [True, False, False, True, False, False, True]
    assert (clock.steps, clock.curvature_updates, clock.age) == (7, 3, 1)
    assert Clock().ticked(curvature=False).due(100)


def test_steps_that_a_method_refuses_are_counted() -> None:
    model = net()
    opt = Descent(model.parameters())
    opt.moves = False
    before = weights(model)
    train(opt, model, batches(1))
    assert (opt.skipped, opt.clock.steps) == (1, 0)
    assert same(weights(model), before)


def test_pending_is_gathered_when_due_and_dropped_after_the_step() -> None:
    model, data = net(), batches(4)
    opt = Gathering(model.parameters())
    losses = []
    for n, batch in enumerate(data):
        assert opt.due == (n % 2 == 0)
        loss = loss_of(model, batch)
        opt.zero_grad()
        opt.backward(loss * 4.0, scale=4.0)
        losses.append(opt.pending)
        opt.step()
        assert opt.pending == {}
    assert [bool(found) for found in losses] == [True, False, True, False]
    opt.backward(loss_of(model, data[0]))
    opt.zero_grad()
    assert opt.pending == {}


def test_curvature_that_is_missing_later_leaves_what_there_is() -> None:
    model, data = net(), batches(3)
    opt = Gathering(model.parameters())
    loss_of(model, data[0]).backward()
    with pytest.raises(RuntimeError, match="Gathering has no curvature yet.*opt.observe"):
        opt.step()
    by_backward(opt, lambda: loss_of(model, data[0]))
    for batch in data:
        opt.zero_grad()
        loss_of(model, batch).backward()
        opt.step()
    assert (opt.clock.steps, opt.clock.curvature_updates, opt.due) == (4, 1, True)


def test_non_finite_curvature_skips_the_step() -> None:
    model, data = net(), batches(1)
    opt = Gathering(model.parameters())
    before = weights(model)
    opt.backward(loss_of(model, data[0]))
    opt.pending["losses"] = torch.tensor(float("nan"))
    opt.step()
    assert (opt.skipped, opt.clock, opt.pending) == (1, Clock(), {})
    assert same(weights(model), before)


def test_an_error_while_curvature_is_gathered_leaves_none_of_it() -> None:
    w = nn.Parameter(torch.ones(2))
    opt = Gathering([w])
    opt.observe(w.sum())
    with pytest.raises(ArithmeticError, match="too large"):
        opt.observe(1e7 * w.sum())
    assert opt.pending == {}
    assert opt.keep_graph is False


def test_a_pickled_optimizer_continues() -> None:
    model, data = net(), batches(3)
    opt = Descent(model.parameters(), seed=3)
    train(opt, model, data)
    twin = pickle.loads(pickle.dumps(opt))
    assert (twin.clock, twin.seed, twin.process_group) == (opt.clock, 3, None)
    assert same([p.detach() for p in twin.param_groups[0]["params"]], weights(model))
    twin.step(lambda: twin.param_groups[0]["params"][0].square().sum())
    assert twin.clock.steps == 4


def test_pytorch_complains_of_what_is_no_parameter_itself() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        Descent(w)
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
        Descent([1.0])
    with pytest.raises(ValueError, match="non-leaf"):
        Descent([w * 2])
    with pytest.raises(KeyError, match="params"):
        Descent([{"lr": 0.1}])


def test_seeds_are_whole_numbers() -> None:
    for seed in (1.0, True, "a"):
        with pytest.raises(TypeError, match="seed= is an int"):
            Descent(net().parameters(), seed=seed)


# ------------------------------------------------------------------------------- pieces
def test_draws_depend_on_each_number() -> None:
    like = torch.empty(40, 2, dtype=F64)
    first = signs(like, 0, 1, 2, 3)
    assert torch.equal(first, signs(like, 0, 1, 2, 3))
    assert first.shape == (40, 2)
    assert first.dtype == F64
    assert torch.equal(first.abs(), torch.ones(40, 2, dtype=F64))
    for other in ((1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4), (0, 12, 3)):
        assert not torch.equal(first, signs(like, *other))
    assert signs(torch.empty(()), 0).shape == ()
    a, b = (torch.rand(2, generator=stream(torch.device("cpu"), n)) for n in (1, 2))
    assert not torch.equal(a, b)


def test_signs_are_fair_and_uncorrelated_over_updates() -> None:
    like = torch.empty(64)
    drawn = torch.stack([signs(like, 0, n, 0, 0) for n in range(1000)])
    assert float(drawn.mean().abs()) < 4 / 64000**0.5
    gram = drawn.T @ drawn / 1000 - torch.eye(64)
    assert float(gram.abs().max()) < 5 / 1000**0.5


def test_finite() -> None:
    big = torch.full((1000,), 3e38)  # whose squares and sums overflow
    assert finite([big, None, torch.zeros(0), torch.ones(2, dtype=torch.bfloat16)])
    assert finite([])
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not finite([big, torch.tensor([1.0, bad])])


def test_gradients_are_copied_and_added() -> None:
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    shared = torch.ones(1).expand(2)
    for _ in range(2):
        accumulate([a, b], [shared, None])
        accumulate([b], [shared])
    assert a.grad.tolist() == b.grad.tolist() == [2.0, 2.0]
    a.grad.mul_(0.0)
    assert b.grad.tolist() == [2.0, 2.0]


def test_one_process_has_nothing_to_exchange() -> None:
    w = nn.Parameter(torch.ones(2))
    average_gradients([w], None)
    assert w.grad is None
    assert size_of(None) == 1
    assert sum_over_ranks({"a": w}, None) == {"a": w}


@pytest.mark.parametrize(
    ("check", "error", "text"),
    [
        (lambda: arguments.number({"a": True}, "a"), TypeError, "a= is a number, got bool"),
        (lambda: arguments.number({"a": float("nan")}, "a"), ValueError, "a finite number"),
        (lambda: arguments.nonnegative({"a": -1}, "a"), ValueError, "a= is at least 0, got -1"),
        (lambda: arguments.positive({"a": 0}, "a"), ValueError, "a= is above 0, got 0"),
        (lambda: arguments.fraction({"a": 1.0}, "a"), ValueError, r"a= is in \[0, 1\), got 1.0"),
        (lambda: arguments.fractions({"a": "bc"}, "a"), TypeError, "a tuple of 2 numbers, got str"),
        (lambda: arguments.count("a", 0), ValueError, "a= is at least 1, got 0"),
        (lambda: arguments.count("a", 1.0), TypeError, "a= is a whole number, got float"),
        (lambda: arguments.flag({"a": 1}, "a"), TypeError, "a= is True or False, got int"),
        (lambda: arguments.choice("a", "d", ("b", "c")), ValueError, "one of 'b', 'c', got 'd'"),
    ],
)
def test_bad_arguments(check: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        check()


def test_good_arguments() -> None:
    assert arguments.number({"a": torch.tensor(0.5)}, "a") == 0.5
    assert arguments.count("a", 3) == 3
    assert arguments.choice("a", "c", ("b", "c")) == "c"
