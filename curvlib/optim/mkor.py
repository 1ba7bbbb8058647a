r"""MKOR: gradients of layers preconditioned by inverses that rank-one updates keep; and MKOR-H.

In every ``interval`` steps, hooks note what layers get and give, and the inverses of both sides of
each layer are updated (:mod:`curvlib.optim.rules.mkor`), in :math:`O(k d^2)`. In every step,
:math:`L^{-1} G R^{-1}`, scaled to the norm of :math:`G`, goes in place of the gradient to an inner
first-order optimizer (:mod:`curvlib.optim.rules.first_order`). Nothing runs a second time, and any
``loss.backward()`` will do.

*Which vectors.* The paper takes the mean input and the mean gradient of the batch
(``statistic="mean"``), whose outer products are no second moments: all batches have about the same
mean input, so that :math:`R` is the identity but for one direction, and the mean gradient goes to
zero, so that :math:`L` follows noise. ``statistic="signs"`` (the default) takes sums with random
signs, whose outer products are unbiased estimates of the factors of K-FAC, of the same rank and at
the same price (:mod:`curvlib.operators.layers.vectors`), and several of them in each update. On
an autoencoder of digits, means gained nothing over plain SGD where signs halved the steps; over
plain AdamW, means gained somewhat more than half of what signs did.

*MKOR-H* (``hybrid=True``) tries first-order steps now and then, and takes them for good once they
pay more (:mod:`curvlib.optim.rules.hybrid`). The trials have a price: one step in ``every``.

Sharded parameters (FSDP2). Sums over rows are those of data-parallel replicas, and inverses are
whole on every rank, as is the work of their updates; the inner optimizer's state is of slices. The
products of a step are divided among ranks by layers (:mod:`curvlib.optim.layer_shares`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvlib.operators.coverage import Coverage
from curvlib.operators.layers.factored import FactoredLayer
from curvlib.operators.layers.recorded import Recorded
from curvlib.operators.layers.recorder import LayerRecorder
from curvlib.operators.layers.vectors import Signs, row_sums, summable, zero_sums
from curvlib.optim import arguments
from curvlib.optim.gradients import Gradients
from curvlib.optim.inner_steps import RULES, inner_steps
from curvlib.optim.layer_inverses import (
    LayerInverses,
    advanced,
    cost_of_steps,
    directions,
)
from curvlib.optim.layer_watch import LayerWatch, none_seen
from curvlib.optim.persistence import restored
from curvlib.optim.rules.hybrid import HybridState, Trials
from curvlib.optim.rules.hybrid import update as judged
from curvlib.optim.shell import CurvatureOptimizer

_STATISTICS = ("signs", "mean")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class MKOR(CurvatureOptimizer):
    r"""MKOR (Mozaffari et al., NeurIPS 2023) with exact inverses; with ``hybrid``, MKOR-H.

    Args:
        model: The model that trains, not compiled.
        params: Parameters or groups, in which ``lr``, ``momentum``, ``betas``, ``eps``,
            ``weight_decay``, ``decay``, ``damping`` and ``maximize`` may differ (for ``decay`` and
            ``damping``, the group of a layer's weight counts). ``None``: all of the model's.
        lr: Learning rate of the inner optimizer.
        momentum: Of ``inner="sgd"``.
        betas: Of ``inner="adamw"``.
        eps: Of ``inner="adamw"``.
        weight_decay: Decoupled: each step subtracts ``lr * weight_decay * parameter``.
        inner: What takes the preconditioned gradients, and the gradients of parameters without a
            factored layer: ``"sgd"`` or ``"adamw"``.
        interval: Steps from one update of the inverses to the next.
        statistic: ``"signs"``, or ``"mean"`` as in the paper: see the module.
        vectors: Of each update and side, with ``"signs"``.
        decay: Of the moving averages, between 0 and 1, in each update.
        damping: Bound of the averages' eigenvalues from below, relative to their mean, in [0, 1):
            the stabilizer's.
        dtype: What inverses are stored in, ``torch.bfloat16`` for half the memory; ``None``:
            float32, or float64 for such parameters.
        hybrid: Whether to fall back to the inner optimizer when that pays.
        cost: Of a second-order step in first-order steps, for ``hybrid``; ``None``: from the
            layers' shapes and rows.
        block: Steps of a block, of ``hybrid``.
        every: Blocks to a trial of first-order steps, of ``hybrid``.
        patience: Trials in a row that first-order steps must win, of ``hybrid``.
        max_side: Longer sides have no inverse.
        maximize: Whether the loss is maximized.
        seed: Of signs.
        process_group: Replicas of data-parallel training; the default group if
            ``torch.distributed`` is initialized. Where parameters are sharded, the ranks of their
            mesh.

    Attributes:
        inverses: Those of the left and right sides of layers, by name; sides that are too long, or
            are an embedding's indices, have none.

    Raises:
        TypeError: If parameters are no real floating-point tensors, or an argument has another
            type.
        ValueError: If there are no parameters, one is there twice or not of the model, the model
            is compiled, or an argument is out of range.

    Normalization scales and everything else without a factored layer go to the inner optimizer;
    :meth:`coverage` says which and why. With ``hybrid``, losses must be seen: use
    ``opt.step(closure)``, ``opt.backward(loss)`` or ``opt.observe(loss)``.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> opt = MKOR(model, lr=0.1)
        >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
        >>> loss = opt.step(lambda: nn.functional.mse_loss(model(x), y))
        >>> opt.coverage().percent, opt.inverses["weight"].right.diagonal.shape
        (100.0, torch.Size([1, 3]))
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float = 0.01,
        momentum: float = 0.9,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        inner: str = "adamw",
        interval: int = 10,
        statistic: str = "signs",
        vectors: int = 8,
        decay: float = 0.9,
        damping: float = 0.03,
        dtype: torch.dtype | None = None,
        hybrid: bool = False,
        cost: float | None = None,
        block: int = 20,
        every: int = 4,
        patience: int = 3,
        max_side: int = 8192,
        maximize: bool = False,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model= is a torch.nn.Module, got {type(model).__name__}; its layers are watched, "
                "so parameters alone are not enough"
            )
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype= is float32, float64 or bfloat16, got {dtype}")
        arguments.flag({"hybrid": hybrid}, "hybrid")
        if cost is not None and not arguments.number({"cost": cost}, "cost") >= 1:
            raise ValueError(f"cost= is at least 1, got {cost}")
        self.inner = arguments.choice("inner", inner, RULES)
        self.statistic = arguments.choice("statistic", statistic, _STATISTICS)
        self.interval = arguments.count("interval", interval)
        self.vectors = arguments.count("vectors", vectors)
        self.max_side = arguments.count("max_side", max_side)
        self.dtype = dtype
        self.cost = None if cost is None else float(cost)
        blocks = {"block": block, "every": every, "patience": patience}
        self.trials = Trials(**{key: arguments.count(key, n) for key, n in blocks.items()})
        self.hybrid = HybridState() if hybrid else None
        self.model = model
        self.inverses: dict[str, LayerInverses] = {}
        self._scale = 1.0
        self._watch = self._watching()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decay": decay,
            "damping": damping,
            "maximize": maximize,
        }
        params = model.parameters() if params is None else params
        super().__init__(params, defaults, seed=seed, process_group=process_group)

    # -------------------------------------------------------------------------- reports
    @property
    def switched_at(self) -> int | None:
        """After how many steps MKOR-H went over to first-order steps; ``None`` if it has not."""
        return None if self.hybrid is None else self.hybrid.switched_at

    @property
    def signed(self) -> bool:
        """Whether rows have random signs."""
        return self.statistic == "signs"

    @property
    def second_order(self) -> bool:
        """Whether the coming step is preconditioned."""
        return self.hybrid is None or self.hybrid.second_order(self.trials)

    def coverage(self) -> Coverage:
        """Which parameters are preconditioned, and why the others are not."""
        idle = "its module was not called when inverses were last updated, or got no gradient"
        known = self._watch.layers if self.clock.curvature_updates and self.second_order else ()
        return self._watch.coverage({name: idle for name in known if name not in self.inverses})

    def close(self) -> None:
        """Takes the hooks off the model. The next step puts them on again, if it has to."""
        self.recorder.close()

    # ------------------------------------------------------------------------ recording
    @property
    def recorder(self) -> LayerRecorder:
        """What records the layers, of the parameters that required gradients when it was made."""
        return self._watch.recorder

    def take(self, found: Recorded) -> None:
        """Adds sums over the rows of a pass to what is pending."""
        for name, layer in self._watch.layers.items():
            seed = f"{self.seed}|{self.clock.curvature_updates}|{name}"
            signs = Signs(self.vectors, seed) if self.signed else None
            sums = row_sums(layer, found, self.recorder.dtype, signs=signs, scale=self._scale)
            for key, part in sums.items():
                self._add(f"{name}|{key}", part)

    def _watching(self) -> LayerWatch:
        unfit = partial(_unfit, max_side=self.max_side)
        return LayerWatch(self.model, self.take, unfit, max_side=self.max_side)

    # ---------------------------------------------------------------------------- shell
    follows_shards, differentiates = True, False

    def _shard(self) -> None:
        super()._shard()
        if self.sharding is not None:
            self.sharding.include(self.model)

    def _check(self, group: dict[str, Any]) -> None:
        arguments.nonnegative(group, "lr", "eps", "weight_decay")
        arguments.fraction(group, "momentum", "decay", "damping")
        arguments.fractions(group, "betas")
        if not group["decay"] > 0:
            raise ValueError("decay= is above 0, got 0: a term of rank one has no inverse")

    def _due(self) -> bool:
        return self.second_order and self.clock.due(self.interval) and bool(self._watch.layers)

    def _prepare(self) -> None:
        self._scale = 1.0
        params = [p for _, p, _ in self.parameters() if p.requires_grad]
        on = self.second_order and self.clock.due(self.interval)
        self._watch.follow(params, on=on, sharding=self.sharding)

    def _observe(self, loss: Tensor, scale: float) -> None:
        del loss  # its backward pass meets the hooks
        self._watch.hand_over()  # what came before has the scale of before
        self._scale = scale

    def _missing(self) -> None:
        raise none_seen("MKOR")

    def _collect(self) -> None:
        self._watch.hand_over()
        if self.replicas > 1 and self._due():  # ranks may have used other layers
            k = self.vectors if self.signed else 1
            recorder = self.recorder
            for name, layer in self._watch.layers.items():
                zeros = zero_sums(layer, recorder.dtype, k, recorder.space.device)
                for key, zero in zeros.items():
                    self.pending.setdefault(f"{name}|{key}", zero)

    def _forget(self) -> None:
        self._watch.forget()

    def _saw(self, loss: Tensor, scale: float) -> None:
        if self.hybrid is not None and self.switched_at is None:
            sign = -1.0 if self.param_groups[0]["maximize"] else 1.0
            self._add("loss", loss.detach().double() * sign / (scale * self.replicas))

    # --------------------------------------------------------------------------- update
    def _update(self, gradients: Gradients) -> bool:
        loss = self.pending.pop("loss", None)
        if self.hybrid is not None and self.switched_at is None and loss is None:
            raise RuntimeError(
                "hybrid=True compares losses, and has seen none and no curvature yet to judge by "
                "them; use opt.step(lambda: loss), or opt.backward(loss) in place of "
                "loss.backward(), or opt.observe(loss) before it"
            )
        if self._due() and not self.pending and not self.clock.curvature_updates:
            self._missing()
        groups = {id(p): group for _, p, group in self.parameters()}
        layers = [  # a layer's first parameter is its weight if it has one
            (layer, groups[id(self.recorder.params[layer.names[0]])])
            for layer in self._watch.layers.values()
        ]
        inverses = self.inverses
        if self.pending:
            inverses = advanced(
                layers,
                self.inverses,
                self.pending,
                signed=self.signed,
                ranks=self.replicas,
                dtype=self.dtype or self.recorder.dtype,
            )
        given = {
            id(p): g
            for group, grads in zip(self.param_groups, gradients, strict=True)
            for p, g in zip(group["params"], grads, strict=True)
            if g is not None
        }
        along = given
        if self.second_order and self._watch.layers:
            places = [(layer, self._watch.places[layer.name]) for layer, _ in layers]
            along = directions(places, inverses, self.recorder.params, given, self.sharding)
        work = [
            part
            for group in self.param_groups
            for part in inner_steps(self.inner, group, along, self.state, self.own)
        ]
        new = [t for own in inverses.values() for t in own.tensors] if self.pending else []
        if not self.finite([*(change for _, change, _ in work), *new]):
            return False
        for p, change, state in work:
            self.own(p).add_(change.to(p.dtype))
            self.state[p] = state
        self.inverses = inverses
        if self.cost is None and self.pending:
            self.cost = self._cost_of_steps()
        if self.hybrid is not None and loss is not None:
            self.hybrid = judged(self.hybrid, float(loss), self.trials, cost=self.cost or 1.0)
            if self.switched_at is not None:
                self.inverses = {}
        return True

    def _cost_of_steps(self) -> float:
        seen = {n: layer for n, layer in self._watch.layers.items() if f"{n}|rows" in self.pending}
        counts = torch.stack([self.pending[f"{n}|rows"] for n in seen]).tolist() if seen else []
        rows = [(x, count / self.replicas) for x, count in zip(seen.values(), counts, strict=True)]
        return cost_of_steps(rows, interval=self.interval, vectors=self.vectors)

    # ---------------------------------------------------------------------------- state
    def _extra_state(self) -> dict[str, Any]:
        return {
            "inner": self.inner,
            "statistic": self.statistic,
            "cost": self.cost,
            "hybrid": None if self.hybrid is None else self.hybrid.plain(),
            "inverses": {name: own.plain() for name, own in self.inverses.items()},
        }

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        own = {"inner": self.inner, "statistic": self.statistic, "hybrid": self.hybrid is not None}
        kept = {**{k: state[k] for k in own}, "hybrid": state["hybrid"] is not None}
        if own != kept:
            raise ValueError(f"the state is that of MKOR with {kept}, and this one has {own}")
        device = next(p.device for _, p, _ in self.parameters())
        inverses = {
            name: LayerInverses.from_plain(restored(sides, device))
            for name, sides in state["inverses"].items()
        }
        known = self._watch.layers.keys()
        if not known >= inverses.keys():
            raise ValueError(
                f"the state has inverses of layers {sorted(inverses.keys() - known)}, which the "
                "model has not; load a state of the same model"
            )
        self.inverses, self.cost = inverses, state["cost"]
        self.hybrid = None if state["hybrid"] is None else HybridState.from_plain(state["hybrid"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "_watch" in state:  # of a copy, not of a state dict
            state = {**state, "_watch": self._watching()}
        super().__setstate__(state)


def _unfit(layer: FactoredLayer, max_side: int) -> str:
    """Why a layer is not preconditioned, or nothing."""
    reason = summable(layer)
    if not reason and not layer.left_dense and not layer.right_dense:
        return f"its sides are longer than max_side={max_side}"
    return reason
