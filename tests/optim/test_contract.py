"""Every optimizer does what users expect of ``torch.optim``: each row through each line."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests import models
from tests.optim import replicas
from tests.optim.cases import OPTIMIZERS, OptimizerCase
from tests.optim.small import (
    F64,
    batches,
    by_backward,
    by_closure,
    by_observe,
    distance,
    equal,
    frozen_copy,
    loss_of,
    net,
    same,
    train,
    trained,
    weights,
)
from tests.ranks import on_ranks

each = pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)


# ------------------------------------------------------------------ ways to take a step
@each
def test_closure_backward_and_observe_take_the_same_steps(
    case: OptimizerCase, rng_untouched: None
) -> None:
    start, closure = weights(net()), trained(case, 5)
    assert distance(closure, start) > 1e-4
    assert same(closure, trained(case, 5, by_backward))
    assert distance(trained(case, 5, by_observe), closure) < case.tolerance


@each
def test_a_plain_backward_is_a_full_step_or_an_error(case: OptimizerCase) -> None:
    def plain(opt: Any, loss: Any) -> None:
        opt.zero_grad()
        loss().backward()
        opt.step()

    if case.needs_loss:
        with pytest.raises(RuntimeError, match="no curvature yet.*opt.backward"):
            trained(case, 1, plain)
    else:
        assert distance(trained(case, 5, plain), trained(case, 5)) < case.tolerance


@each
def test_a_closure_may_call_backward_itself(case: OptimizerCase) -> None:
    def lightning(opt: Any, loss: Any) -> None:
        def closure() -> Tensor:
            opt.zero_grad()
            value = loss()
            opt.backward(value)
            return value.detach()

        opt.step(closure)

    assert same(trained(case, 4, lightning), trained(case, 4))

    def classical(opt: Any, loss: Any) -> None:
        def closure() -> Tensor:
            opt.zero_grad(set_to_none=False)
            value = loss()
            opt.observe(value)
            value.backward()
            return value

        opt.step(closure)

    assert distance(trained(case, 4, classical), trained(case, 4)) < case.tolerance


@each
def test_a_closure_that_only_clears_gradients_called_no_backward(case: OptimizerCase) -> None:
    model = net()
    opt = case.build(model, None)

    def closure(batch: tuple[Tensor, Tensor]) -> Tensor:
        model.zero_grad(set_to_none=False)
        return loss_of(model, batch)

    for batch in batches(4):
        opt.step(lambda batch=batch: closure(batch))
    assert same(weights(model), trained(case, 4))


@each
def test_step_returns_the_loss_without_its_graph(case: OptimizerCase) -> None:
    model, (batch,) = net(), batches(1)
    opt = case.build(model, None)
    expected = loss_of(model, batch)
    loss = opt.step(lambda: loss_of(model, batch))
    assert torch.equal(loss, expected.detach())
    assert loss.grad_fn is None
    opt.zero_grad()
    assert opt.step() is None  # nothing to do
    assert opt.clock.steps == 1


@each
def test_a_step_within_no_grad_still_evaluates_the_closure(case: OptimizerCase) -> None:
    model, data = net(), batches(3)
    opt = case.build(model, None)
    with torch.no_grad():
        train(opt, model, data)
    assert same(weights(model), trained(case, 3))


# ------------------------------------------------------------------------------- groups
@each
def test_groups_have_their_own_learning_rates(case: OptimizerCase) -> None:
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.0}]
    opt = case.build(model, groups)
    before = weights(model)
    after = train(opt, model, batches(4))
    assert all(distance([a], [b]) > 1e-4 for a, b in zip(after[:2], before[:2], strict=True))
    assert same(after[2:], before[2:])


@each
def test_groups_take_every_hyper_parameter_and_named_parameters(case: OptimizerCase) -> None:
    model = net()
    defaults = case.build(net(), None).defaults
    opt = case.build(model, [{"params": list(model.named_parameters()), **defaults}])
    assert {k: opt.param_groups[0][k] for k in defaults} == defaults
    assert same(train(opt, model, batches(4)), trained(case, 4))


@each
def test_a_group_that_is_added_later_is_trained_from_then_on(case: OptimizerCase) -> None:
    model, data = net(), batches(8)
    first, last = model[0].parameters(), model[2].parameters()
    opt = case.build(model, first)
    before = weights(model)
    between = train(opt, model, data[:3])
    assert same(between[2:], before[2:])
    opt.add_param_group({"params": last, "lr": 0.005})
    after = train(opt, model, data[3:4])
    assert all(distance([a], [b]) > 0 for a, b in zip(after, between, strict=True))
    train(opt, model, data[4:])
    assert all(bool(w.isfinite().all()) for w in weights(model))
    assert opt.skipped == 0


# -------------------------------------------------------------------------------- state
@each
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_restored_state_continues_bitwise(case: OptimizerCase, cut: int) -> None:
    model, data = net(), batches(cut + 4)
    opt = case.build(model, None)
    train(opt, model, data[:cut])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    expected = train(opt, model, data[cut:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = net()
    resumed = case.build(other, None)
    resumed.seed = 99  # of an optimizer that was made with another one
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert same(train(resumed, other, data[cut:]), expected)
    assert equal(resumed.state_dict(), opt.state_dict())


@each
def test_a_loaded_state_is_a_copy(case: OptimizerCase) -> None:
    model, data = net(), batches(4)
    opt = case.build(model, None)
    train(opt, model, data[:2])
    state = frozen_copy(opt.state_dict())
    kept = frozen_copy(state)
    opt.load_state_dict(state)
    train(opt, model, data[2:])
    assert equal(state, kept)
    opt.load_state_dict(state)
    given = {t.data_ptr() for t in _tensors(state["state"]) if t.numel()}
    assert given.isdisjoint(t.data_ptr() for t in _tensors(opt.state_dict()["state"]))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [t for v in parts if isinstance(v, (dict, list, tuple, Tensor)) for t in _tensors(v)]


@each
def test_state_in_float32_stays_so_for_bfloat16_parameters(case: OptimizerCase) -> None:
    model, data = net(torch.bfloat16), batches(4, dtype=torch.bfloat16)
    opt = case.build(model, None)
    train(opt, model, data[:2])
    state = frozen_copy(opt.state_dict())
    other = copy.deepcopy(model)
    resumed = case.build(other, None)
    resumed.load_state_dict(state)
    assert equal(resumed.state_dict()["state"], state["state"])
    assert same(train(resumed, other, data[2:]), train(opt, model, data[2:]))
    assert all(bool(w.isfinite().all()) for w in weights(model))


@each
def test_a_deep_copy_of_model_and_optimizer_goes_its_own_way(case: OptimizerCase) -> None:
    model, data = net(), batches(6)
    opt = case.build(model, None)
    torch.optim.lr_scheduler.StepLR(opt, 100)  # puts a wrapper around opt.step
    train(opt, model, data[:2])
    twin_model, twin = copy.deepcopy((model, opt))
    assert same(train(twin, twin_model, data[2:]), train(opt, model, data[2:]))
    assert equal(twin.state_dict()["state"], opt.state_dict()["state"])
    assert twin.clock == opt.clock


@each
def test_runs_repeat(case: OptimizerCase) -> None:
    assert same(trained(case, 6), trained(case, 6))


# --------------------------------------------------------------- frameworks and schedulers
@each
def test_learning_rate_schedulers(case: OptimizerCase) -> None:
    def scheduled(by_hand: bool) -> list[Tensor]:
        model = net()
        opt = case.build(model, None)
        base = opt.param_groups[0]["lr"]
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0 if by_hand else 0.5**t)
        for t, batch in enumerate(batches(5)):
            if by_hand:
                opt.param_groups[0]["lr"] = base * 0.5**t
            opt.step(lambda batch=batch: loss_of(model, batch))
            if not by_hand:
                scheduler.step()
        return weights(model)

    assert same(scheduled(False), scheduled(True))
    model = net()
    opt = case.build(model, None)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(opt, 0.01, total_steps=9, cycle_momentum=False),
        torch.optim.lr_scheduler.ReduceLROnPlateau(opt),
    ]
    for batch in batches(4):
        loss = opt.step(lambda batch=batch: loss_of(model, batch))
        schedulers[0].step()
        schedulers[1].step(loss)
    assert opt.skipped == 0


@each
def test_a_trainer_that_owns_the_loop(case: OptimizerCase) -> None:
    class Trainer:
        """As Hugging Face's: makes its optimizer, calls backward, clips, steps, clears."""

        def __init__(self, model: nn.Module) -> None:
            self.model, self.optimizer = model, self.create_optimizer(model)
            self.scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 1.0)

        def create_optimizer(self, model: nn.Module) -> Any:
            matrices = [p for p in model.parameters() if p.ndim > 1]
            rest = [p for p in model.parameters() if p.ndim <= 1]
            return case.build(model, [{"params": matrices}, {"params": rest}, {"params": []}])

        def compute_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            loss = loss_of(self.model, batch)
            self.optimizer.observe(loss)  # the one line that is added
            return loss

        def train(self, data: list[tuple[Tensor, Tensor]]) -> list[float]:
            losses = []
            for batch in data:
                loss = self.compute_loss(batch)
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
                self.optimizer.step()
                self.scheduler.step()
                self.model.zero_grad()
                losses.append(float(loss.detach()))
            return losses

    model = net()
    losses = Trainer(model).train(batches(1) * 30)
    assert losses[-1] < losses[0]


# ----------------------------------------------------- micro-batches, scales, precision
@each
def test_micro_batches_are_one_large_batch(case: OptimizerCase) -> None:
    model = net()
    opt = case.build(model, None)
    for x, y in batches(5):
        opt.zero_grad()
        for part in zip(x.chunk(3), y.chunk(3), strict=True):
            opt.backward(loss_of(model, part) / 3)
        opt.step()
    assert distance(weights(model), trained(case, 5)) < case.tolerance


@each
def test_the_scale_of_a_loss_does_not_matter(case: OptimizerCase) -> None:
    def scaled(exponent: int) -> list[Tensor]:
        model = net(torch.float32)
        opt = case.build(model, None)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent)
        for batch in batches(4, dtype=torch.float32):
            opt.zero_grad()
            loss = loss_of(model, batch)
            opt.backward(scaler.scale(loss), scale=scaler.get_scale())
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(opt)
            scaler.update()
        assert opt.clock.steps == 4
        return weights(model)

    model = net(torch.float32)
    plain = train(case.build(model, None), model, batches(4, dtype=torch.float32))
    for exponent in (3, 16):
        assert distance(scaled(exponent), plain) < 1e-5


@each
def test_an_overflow_that_the_scaler_finds_is_forgotten(case: OptimizerCase) -> None:
    model, data = net(torch.float32), batches(4, dtype=torch.float32)
    opt = case.build(model, None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for n, batch in enumerate([data[0], data[1], data[1], *data[2:]]):
        opt.zero_grad()
        loss = loss_of(model, batch) * (float("inf") if n == 1 else 1.0)
        opt.backward(scaler.scale(loss), scale=scaler.get_scale())
        scaler.step(opt)
        scaler.update()
    other = net(torch.float32)
    expected = train(case.build(other, None), other, data)
    assert opt.clock.steps == 4
    assert distance(weights(model), expected) < 1e-5


@each
def test_bfloat16_autocast(case: OptimizerCase) -> None:
    model, (batch,) = net(torch.float32), batches(1, dtype=torch.float32)
    opt = case.build(model, None)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, batch)

    losses = [float(opt.step(loss)) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert opt.skipped == 0
    assert all(p.dtype == torch.float32 for p in model.parameters())


@each
def test_float16_autocast_with_its_scaler(case: OptimizerCase) -> None:
    model = net(torch.float32)
    opt = case.build(model, None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)  # too large at first
    data, lowered, losses = batches(1, dtype=torch.float32) * 20, 0, []
    for batch in data:
        opt.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, batch)
        before = scaler.get_scale()
        opt.backward(scaler.scale(loss), scale=before)
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        lowered += scaler.get_scale() < before
        losses.append(float(loss.detach()))
    assert lowered > 0
    assert opt.clock.steps == len(data) - lowered  # curvature overflows no sooner than gradients
    assert opt.skipped == 0
    assert losses[-1] < losses[0]


@each
@pytest.mark.parametrize("whole", [True, False])
def test_checkpointed_activations(case: OptimizerCase, whole: bool) -> None:
    class Model(nn.Module):
        def __init__(self, reentrant: bool | None) -> None:
            super().__init__()
            self.body, self.reentrant = net(), reentrant

        def forward(self, x: Tensor) -> Tensor:
            if whole or self.reentrant is None:
                return self.body(x)
            return self.body[2](checkpoint(self.body[:2], x, use_reentrant=self.reentrant))

    def steps(reentrant: bool | None) -> list[Tensor]:
        model = Model(reentrant)
        opt = case.build(model, None)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            if whole and reentrant is not None:
                return F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), y)
            return F.cross_entropy(model(x), y)

        for x, y in batches(4):
            x.requires_grad_(bool(reentrant))
            opt.step(lambda x=x, y=y: loss(x, y))
        return weights(model)

    assert distance(steps(False), steps(None)) < case.tolerance
    message = ""
    try:
        found = steps(True)
    except RuntimeError as error:
        found, message = [], str(error)
    assert found or "use_reentrant=False" in message
    assert all(distance([a], [b]) > 0 for a, b in zip(found, weights(net()), strict=False))


@each
def test_clipped_gradients_are_the_ones_that_are_used(case: OptimizerCase) -> None:
    def clipped(how: Any) -> list[Tensor]:
        model = net()
        opt = case.build(model, None)
        for batch in batches(3):
            opt.zero_grad()
            opt.backward(loss_of(model, batch))
            how(model)
            opt.step()
        return weights(model)

    def by_hand(model: nn.Module) -> None:
        grads = [p.grad for p in model.parameters()]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for g in grads:
            g.mul_(1e-2 / (norm + 1e-6))

    found = clipped(lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-2))
    assert distance(found, clipped(by_hand)) < 1e-9
    assert distance(found, trained(case, 3)) > 1e-6


# --------------------------------------------------------------------- odd parameters
@each
def test_frozen_parameters_stay_and_thaw(case: OptimizerCase) -> None:
    model, data = net(), batches(12)
    model[0].requires_grad_(False)
    opt = case.build(model, None)
    before = weights(model)
    after = train(opt, model, data[:3])
    assert same(after[:2], before[:2])
    assert all(distance([a], [b]) > 0 for a, b in zip(after[2:], before[2:], strict=True))
    model[0].requires_grad_(True)
    thawed = train(opt, model, data[3:])
    assert all(distance([a], [b]) > 0 for a, b in zip(thawed[:2], before[:2], strict=True))
    assert opt.skipped == 0


@each
@pytest.mark.parametrize("set_to_none", [True, False])
def test_unused_and_0d_parameters(case: OptimizerCase, set_to_none: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.Scalars().double()
    (batch,) = batches(1)
    opt = case.build(model, None)
    temperature, losses = float(model.temperature.detach()), []
    for _ in range(40):
        opt.zero_grad(set_to_none=set_to_none)
        loss = loss_of(model, batch)
        opt.backward(loss)
        opt.step()
        losses.append(float(loss.detach()))
    assert float(model.unused.detach()) == 2.0
    assert model.unused not in opt.state
    assert float(model.temperature.detach()) != temperature
    assert losses[-1] < losses[0]
    assert opt.clock.steps == 40


@each
def test_tied_parameters_are_one(case: OptimizerCase) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.Twice().double()
    (batch,) = batches(1)
    opt = case.build(model, None)
    assert sum(len(group["params"]) for group in opt.param_groups) == 4
    losses = [float(opt.step(lambda: loss_of(model, batch))) for _ in range(20)]
    assert losses[-1] < losses[0]


@each
def test_sparse_gradients_are_those_of_dense_ones(case: OptimizerCase) -> None:
    def tokens(sparse: bool) -> tuple[list[Tensor], int]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            embed = nn.Embedding(7, 3, sparse=sparse)
            model = nn.Sequential(embed, nn.Flatten(), nn.Tanh(), nn.Linear(6, 3)).double()
        opt = case.build(model, None)
        g = torch.Generator().manual_seed(1)
        for _ in range(4):
            x = torch.randint(5, (6, 2), generator=g)
            y = torch.randint(3, (6,), generator=g)
            opt.zero_grad()
            for half in (slice(3), slice(3, 6)):
                opt.backward(loss_of(model, (x[half], y[half])) / 2)
            opt.step()
        return weights(model), opt.clock.steps

    (found, steps), (expected, _) = tokens(True), tokens(False)
    assert steps == 4
    assert distance(found, expected) < case.tolerance


@each
def test_zero_grad_to_zeros_changes_nothing(case: OptimizerCase) -> None:
    def zeroed(opt: Any, loss: Any) -> None:
        opt.zero_grad(set_to_none=False)
        opt.backward(loss())
        opt.step()

    assert same(trained(case, 5, zeroed), trained(case, 5))


@each
def test_a_loss_that_is_observed_twice_counts_once(case: OptimizerCase) -> None:
    def repeated(opt: Any, loss: Any) -> None:
        opt.zero_grad()
        value = loss()
        opt.observe(value)
        opt.observe(value)
        opt.backward(value)
        opt.step()

    assert distance(trained(case, 5, repeated), trained(case, 5)) < case.tolerance


@each
def test_other_passes_leave_no_trace(case: OptimizerCase) -> None:
    model, data = net(), batches(5)
    opt = case.build(model, None)
    for batch in data:
        opt.zero_grad()
        loss = loss_of(model, batch)
        model(3.0 * batch[0])  # with a graph that is never used
        opt.backward(loss)
        model.eval()
        with torch.no_grad():
            model(batch[0])
        model.train()
        opt.step()
        opt.zero_grad()
        opt.step()  # there are no gradients
    assert opt.clock.steps == 5
    assert same(weights(model), trained(case, 5, by_backward))


@each
def test_a_model_that_is_frozen_wholly_rests(case: OptimizerCase) -> None:
    model, data = net(), batches(6)
    model.requires_grad_(False)
    opt = case.build(model, None)
    opt.step()
    assert opt.clock.steps == 0
    model.requires_grad_(True)
    opt.step()  # without gradients
    train(opt, model, data[:3])
    before = weights(model)
    model.requires_grad_(False)
    opt.step()
    assert same(weights(model), before)
    model.requires_grad_(True)
    train(opt, model, data[3:])
    assert all(distance([a], [b]) > 0 for a, b in zip(weights(model), before, strict=True))
    assert opt.clock.steps == 6


@each
def test_zero_grad_forgets_gathered_curvature(case: OptimizerCase) -> None:
    model, data = net(), batches(4)
    opt = case.build(model, None)
    for batch in data:
        opt.backward(loss_of(model, data[0]) * 3.0)  # never used
        by_backward(opt, lambda batch=batch: loss_of(model, batch))
    assert distance(weights(model), trained(case, 4)) < case.tolerance


@each
def test_maximize_is_minimize_of_the_negative(case: OptimizerCase) -> None:
    def climbed(maximize: bool) -> list[Tensor]:
        model = net()
        opt = case.build(model, [{"params": model.parameters(), "maximize": maximize}])
        sign = -1.0 if maximize else 1.0
        for batch in batches(5):
            opt.step(lambda batch=batch: sign * loss_of(model, batch))
        return weights(model)

    assert distance(climbed(True), climbed(False)) < case.tolerance


# --------------------------------------------------------------- what must not go wrong
@each
@pytest.mark.parametrize("at", [0, 1, 3])
def test_steps_with_non_finite_gradients_are_skipped(case: OptimizerCase, at: int) -> None:
    model, data = net(), batches(6)
    opt = case.build(model, None)
    train(opt, model, data[:at])
    before, state, clock = weights(model), frozen_copy(opt.state_dict()), opt.clock
    for bad in (float("inf"), float("nan")):
        opt.step(lambda bad=bad: loss_of(model, data[at]) * bad)
    assert same(weights(model), before)
    assert opt.skipped == 2
    assert opt.clock == clock
    state["curvlib"]["skipped"] = 2
    assert equal(opt.state_dict(), state)
    assert same(train(opt, model, data[at:]), trained(case, 6))


@each
def test_steps_with_non_finite_curvature_are_skipped(case: OptimizerCase) -> None:
    if not case.second_order:
        pytest.skip("its curvature is made of gradients")
    model, data = net(), batches(4)
    kink = nn.Parameter(torch.zeros((), dtype=F64))
    model.register_parameter("kink", kink)
    opt = case.build(model, None)
    before = weights(model)
    opt.step(lambda: loss_of(model, data[0]) + kink.abs() ** 1.5)  # gradient 0, curvature infinite
    assert (opt.skipped, opt.clock.steps, len(opt.state)) == (1, 0, 0)
    assert same(weights(model), before)


@each
def test_steps_leave_nothing_behind(case: OptimizerCase) -> None:
    model, (batch,) = net(), batches(1)
    opt = case.build(model, None)

    def tensors() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        counts = []
        for n in range(72):  # twice a multiple of all intervals
            drive = (by_closure, by_backward, by_observe)[n % 3]
            drive(opt, lambda: loss_of(model, batch))
            if n in (35, 71):
                opt.zero_grad()
                counts.append(tensors())
    finally:
        gc.enable()
    assert counts[1] <= counts[0]
    assert opt.clock.steps == 72


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_are_one(size: int) -> None:
    """One test for all rows, for parallel runs of tests would start processes for each."""
    found = on_ranks("tests.optim.replicas:equal", size)
    wrong = []
    for case in OPTIMIZERS:
        expected = trained(case, replicas.STEPS)
        for drive in ("by_closure", "by_backward", "micro-batches"):
            mine, *others = (ranks[case.name, drive] for ranks in found)
            if not all(same(mine, other) for other in others):
                wrong.append((case.name, drive, "ranks differ"))
            far = distance(mine, expected)
            exact = not (case.draws_targets and drive == "micro-batches")
            if exact and not far < case.tolerance:
                wrong.append((case.name, drive, f"{far:.1e} from one process"))
        if case.name == "adahessian":  # with DistributedDataParallel
            assert all(same(ranks["ddp", ""], found[0]["ddp", ""]) for ranks in found[1:])
            assert distance(found[0]["ddp", ""], expected) < 1e-10
    assert not wrong


@pytest.mark.parametrize("size", [2, 3])
def test_parts_may_be_unequal(size: int) -> None:
    """Losses are then weighted, so that their mean over ranks is the loss of the joint batch."""
    expected = replicas.unequal(0, 1)
    found = on_ranks("tests.optim.replicas:unequal", size)
    for case in OPTIMIZERS:
        mine, *others = (ranks[case.name] for ranks in found)
        assert all(same(mine, other) for other in others), case.name
        assert distance(mine, expected[case.name]) < 1e-12, case.name


@pytest.mark.parametrize("size", [2, 3])
def test_newton_steps_on_shards(size: int) -> None:
    expected = replicas.newton(0, 1)
    found = on_ranks("tests.optim.replicas:newton", size)
    for name, value in expected.items():
        assert float((found[0][name] - value).abs().max()) < 1e-12, name
        assert all(torch.equal(other[name], found[0][name]) for other in found[1:]), name


def test_ranks_may_use_different_parameters_but_gather_alike() -> None:
    for moved, message in on_ranks("tests.optim.replicas:different", 2):
        assert moved
        assert "ranks gathered different curvature" in message
        assert "same number of backward" in message


# ---------------------------------------------------------------------------- bad input
@each
def test_bad_hyper_parameters(case: OptimizerCase) -> None:
    model = net()
    defaults = case.build(model, None).defaults
    numbers = [k for k, v in defaults.items() if isinstance(v, float)]
    assert "lr" in numbers
    for key in numbers:
        for bad in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{key}= "):
                case.build(net(), [{"params": net().parameters(), key: bad}])
        with pytest.raises(TypeError, match=f"{key}= "):
            case.build(net(), [{"params": net().parameters(), key: "fast"}])
    pairs = [k for k, v in defaults.items() if isinstance(v, tuple)]
    for key in pairs:
        with pytest.raises(ValueError, match=f"{key}"):
            case.build(net(), [{"params": net().parameters(), key: (0.9, 1.0)}])
    with pytest.raises(TypeError, match="maximize= is True or False, got str"):
        case.build(net(), [{"params": net().parameters(), "maximize": "yes"}])
    opt = case.build(net(), None)
    with pytest.raises(ValueError, match="lr= "):
        opt.add_param_group({"params": nn.Linear(2, 2).parameters(), "lr": -1.0})
    assert len(opt.param_groups) == 1


@each
def test_bad_parameters(case: OptimizerCase) -> None:
    model = net()
    for empty in ([], iter(()), [{"params": []}]):
        with pytest.raises(ValueError, match="got no parameters; pass model.parameters"):
            case.build(model, empty)
    p = model[0].weight
    with pytest.raises(ValueError, match="in the optimizer already; list each one once"):
        case.build(model, [p, p])
    with pytest.raises(ValueError, match="in the optimizer already; list each one once"):
        case.build(model, [{"params": [p]}, {"params": [model[0].bias, p]}])
    opt = case.build(model, [p])
    with pytest.raises(ValueError, match="parameter 0 of the group is in the optimizer already"):
        opt.add_param_group({"params": p})
    for other in (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="real floating-point tensors, but parameter 1"):
            case.build(model, [p, other])


@each
def test_bad_losses(case: OptimizerCase) -> None:
    model, (batch,) = net(), batches(1)
    opt = case.build(model, None)
    before = frozen_copy(opt.state_dict())
    closures = [
        (lambda: None, TypeError, "what the closure returns should be.*lack a return"),
        (lambda: 1.0, TypeError, "what the closure returns should be.*got float"),
        (lambda: model(batch[0]), ValueError, r"should be a scalar, got shape \[12, 3\]"),
        (lambda: loss_of(model, batch).detach(), ValueError, "closure returns has no graph"),
        (lambda: torch.tensor(3), TypeError, "real floating-point scalar, got torch.int64"),
    ]
    for closure, error, text in closures:
        with pytest.raises(error, match=text):
            opt.step(closure)
    for method in (opt.backward, opt.observe):
        with pytest.raises(ValueError, match="the loss has no graph"):
            method(torch.tensor(1.0))
        for scale in (0.0, float("inf"), -1.0):
            with pytest.raises(ValueError, match="scale= is a positive number"):
                method(loss_of(model, batch), scale=scale)
    loss = loss_of(model, batch)
    loss.backward()
    with pytest.raises(RuntimeError, match="freed before.*opt.backward"):
        opt.backward(loss)
    loss = loss_of(model, batch)
    opt.backward(loss)
    with pytest.raises(RuntimeError, match="freed before.*opt.backward"):
        opt.backward(loss)
    opt.zero_grad()
    assert equal(opt.state_dict(), before)
    assert same(train(opt, model, batches(3)), trained(case, 3))


@each
def test_models_without_double_backward(case: OptimizerCase) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 12)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.inner(x).view(2, 1, -1, 12).split(4, dim=3)
            return self.head(F.scaled_dot_product_attention(q, k, v)).flatten(0, 2)

    def one_step() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Attention()
        opt = case.build(model, None)
        return opt, lambda: loss_of(model, batches(1, dtype=torch.float32)[0])

    opt, loss = one_step()
    if case.second_order:
        with pytest.raises(RuntimeError, match="scaled_dot_product.*no double backward.*MATH"):
            opt.step(loss)
        assert opt.clock.steps == 0
    else:
        opt.step(loss)
        assert opt.clock.steps == 1
    opt, loss = one_step()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        opt.step(loss)
    assert opt.clock.steps == 1


@each
def test_functions_that_are_differentiable_once(case: OptimizerCase) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2.0 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2.0 * g

    model, ((x, y),) = net(), batches(1)
    opt = case.build(model, None)

    def loss() -> Tensor:
        return F.cross_entropy(Once.apply(model(x)), y)

    if case.second_order:
        with pytest.raises(RuntimeError, match="@once_differentiable.*first derivatives only"):
            opt.step(loss)
        assert opt.clock.steps == 0
    else:
        opt.step(loss)
        assert opt.clock.steps == 1


@each
def test_states_of_others(case: OptimizerCase) -> None:
    model = net()
    opt = case.build(model, None)
    train(opt, model, batches(2))
    before = frozen_copy(opt.state_dict())

    def refused(error: type[Exception], text: str, state: Any) -> None:
        with pytest.raises(error, match=text):
            opt.load_state_dict(state)
        assert equal(opt.state_dict(), before)

    def changed(**own: Any) -> dict[str, Any]:
        state = frozen_copy(before)
        state["curvlib"].update(own)
        return state

    wide = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    deep = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 3)).double()
    refused(TypeError, "takes what state_dict.. returned, got list", [])
    refused(ValueError, "no entry.*curvlib", torch.optim.Adam(model.parameters()).state_dict())
    refused(ValueError, "parameter 0 has shape", case.build(wide, None).state_dict())
    refused(ValueError, "6 parameters, this optimizer 4", case.build(deep, None).state_dict())
    refused(ValueError, "written by curvlib 9.9 in format 99", changed(format=99, version="9.9"))
    refused(ValueError, "is that of Other, expected", changed(method="Other"))
    state = frozen_copy(before)
    state["param_groups"][0]["lr"] = -1.0
    refused(ValueError, "lr= ", state)
