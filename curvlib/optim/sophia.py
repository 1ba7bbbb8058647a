r"""Sophia: momentum over diagonal curvature, clipped entry by entry.

Every ``interval`` steps the diagonal of the curvature is estimated from the batch's own loss:

``"gauss_newton"`` (Sophia-G)
    one backward pass from targets that the model itself draws: unbiased for the diagonal of the
    GGN, and never negative (:mod:`curvlib.operators.live.fisher`). The likelihood and its
    normalization are read from the graph of the loss, so that nothing but the loss is needed, and
    no batch size is to be set.
``"hutchinson"`` (Sophia-H)
    :math:`z \odot H z` with random signs ``z``: unbiased for the diagonal of the Hessian, for any
    loss with a double backward.

Work in gradients of the loss, in a step with curvature: 2 and 3. Memory: two tensors of the
parameter's shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvlib.operators.live.fisher import sampled_root
from curvlib.optim import arguments
from curvlib.optim.gradients import Gradients
from curvlib.optim.probed import probed_products
from curvlib.optim.rules.sophia import SophiaState, SophiaStep, init, update
from curvlib.optim.shell import CurvatureOptimizer
from curvlib.optim.target_draws import TargetDraws

ESTIMATORS = ("gauss_newton", "hutchinson")


class Sophia(CurvatureOptimizer):
    r"""Sophia (Liu et al., ICLR 2024), with either estimator of the diagonal curvature.

    Args:
        params: Parameters, named parameters or groups, in which ``lr``, ``betas``, ``rho``,
            ``eps``, ``weight_decay`` and ``maximize`` may differ.
        lr: Learning rate: how far an entry moves at most (before decay). The published code's;
            its runs take 3e-4 to 6e-4 for GPT-2.
        betas: Decay of the averages of gradients and of curvature.
        rho: What curvature is multiplied by (gamma in the paper). The larger, the less is clipped;
            the authors tune it so that :attr:`clipped` is 0.5 to 0.9 in the long run.
        eps: Curvature below ``eps / rho`` counts as none.
        weight_decay: Decoupled: each step subtracts ``lr * weight_decay * parameter``.
        estimator: ``"gauss_newton"``, for losses that are linear in cross-entropies
            (``log_softmax``), squared errors or binary cross-entropies with logits; or
            ``"hutchinson"``.
        interval: Steps from one curvature update to the next.
        probes: Random vectors (or sets of targets) of each curvature update.
        correct_bias: Whether both averages are divided by their total weight, that of curvature
            by its number of updates. The paper leaves the bias in: the first some hundred steps
            are those of signed momentum.
        maximize: Whether the loss is maximized.
        seed: Of probes and targets.
        process_group: Replicas of data-parallel training; the default group if
            ``torch.distributed`` is initialized.

    Raises:
        TypeError: If parameters are no real floating-point tensors, or an argument has another
            type.
        ValueError: If there are no parameters, one is there twice, or an argument is out of range.

    Parameters may be sharded (FSDP2): each rank then steps its slices, and a loss whose curvature
    is read comes from the closure, or from a block ``with opt.gathering():``.

    A ``backward`` or ``observe`` that takes Gauss-Newton curvature raises ValueError for losses
    that are no likelihood it knows, and names the operation. Models under ``torch.compile`` need
    ``torch._functorch.config.donated_buffer = False`` for it: their graph is used twice.

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> x, y = torch.randn(8, 2), torch.randint(3, (8,))
        >>> opt = Sophia(model.parameters(), lr=1e-2)
        >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
        >>> 0.0 <= opt.clipped[0] <= 1.0
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        eps: float = 1e-12,
        *,
        weight_decay: float = 0.1,
        estimator: str = "gauss_newton",
        interval: int = 10,
        probes: int = 1,
        correct_bias: bool = False,
        maximize: bool = False,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.estimator = arguments.choice("estimator", estimator, ESTIMATORS)
        self.interval = arguments.count("interval", interval)
        self.probes = arguments.count("probes", probes)
        arguments.flag({"correct_bias": correct_bias}, "correct_bias")
        self.correct_bias = correct_bias
        self._clipped: list[tuple[Tensor | None, int]] = []
        self._draws: list[TargetDraws] = []
        self._verified = False
        defaults = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, seed=seed, process_group=process_group)

    @property
    def clipped(self) -> list[float]:
        """The share of clipped entries in the last step, for each group.

        NaN where nothing was stepped. Reading it waits for the device.
        """
        return [
            math.nan if hits is None else float(hits) / entries for hits, entries in self._clipped
        ]

    # ----------------------------------------------------------------------------- hooks
    follows_shards = True

    def _check(self, group: dict[str, Any]) -> None:
        arguments.nonnegative(group, "lr", "weight_decay")
        arguments.positive(group, "rho", "eps")
        arguments.fractions(group, "betas")

    def _due(self) -> bool:
        return self.clock.due(self.interval)

    def _observe(self, loss: Tensor, scale: float) -> list[Tensor | None] | None:
        if self.estimator == "hutchinson":
            return self._hutchinson(loss, scale)
        self._gauss_newton(loss, scale)
        return None

    def _hutchinson(self, loss: Tensor, scale: float) -> list[Tensor | None]:
        members = self.trainable()
        vectors, gradients, products = probed_products(
            self, loss, scale, self.probes, verify=not self._verified
        )
        self._verified = True
        for n, (i, p, group) in enumerate(members):
            total = torch.zeros_like(p)
            for product, vector in zip(products, vectors, strict=True):
                seen = product[n]
                if seen is not None:
                    total += vector[n] * seen
            sign = -1.0 if group["maximize"] else 1.0
            self._add(f"{i}", total * (sign / (self.probes * self.replicas)))
        return gradients

    def _gauss_newton(self, loss: Tensor, scale: float) -> None:
        members = self.trainable()
        if not self.pending:  # the first micro-batch
            update_number = self.clock.curvature_updates
            self._draws = [TargetDraws(self.seed, update_number, k) for k in range(self.probes)]
        for k, draws in enumerate(self._draws):
            uniform = partial(draws.batch, process_group=self.process_group)
            parts = sampled_root(loss, [p for _, p, _ in members], uniform, scale)
            for (i, p, _), part in zip(members, parts, strict=True):
                root = torch.zeros_like(p) if part is None else part
                self._add(f"{i}.{k}", root / math.sqrt(self.replicas))

    def _estimate(self, number: int) -> Tensor | None:
        """The diagonal's estimate for a parameter, if this step has one."""
        if self.estimator == "hutchinson":
            return self.pending.get(f"{number}")
        roots = [self.pending.get(f"{number}.{k}") for k in range(self.probes)]
        squares = [root.square() for root in roots if root is not None]
        return torch.stack(squares).mean(0) if squares else None

    def _update(self, gradients: Gradients) -> bool:
        number, work = 0, []
        for group, grads in zip(self.param_groups, gradients, strict=True):
            for i, (p, g) in enumerate(zip(group["params"], grads, strict=True), number):
                if g is not None:
                    work.append((p, *self._stepped(i, p, g, group), group))
            number += len(grads)
        if self.pending and not self.finite(step.state.curvature for _, step, _, _ in work):
            return False  # squares overflowed
        for p, step, counts, _ in work:
            self.own(p).add_(step.change)
            self.state[p] = {**vars(step.state), **counts}
        self._clipped = []
        for group in self.param_groups:
            steps = [(p.numel(), step.clipped) for p, step, _, owner in work if owner is group]
            entries = sum(n for n, _ in steps)
            hits = (
                torch.stack([c.to(steps[0][1].device) for _, c in steps]).sum() if entries else None
            )
            if hits is not None and self.sharding is not None:
                hits = self.sharding.sum(hits.double())
            self._clipped.append((hits, entries))
        return True

    def _stepped(
        self, number: int, p: Tensor, gradient: Tensor, group: dict[str, Any]
    ) -> tuple[SophiaStep, dict[str, int]]:
        known = self.state.get(p)
        own = self.own(p)
        state = SophiaState(known["momentum"], known["curvature"]) if known else init(own)
        estimate = self._estimate(number)
        counts = {
            "steps": (known["steps"] if known else 0) + 1,
            "updates": (known["updates"] if known else 0) + (estimate is not None),
        }
        step = update(
            own,
            gradient,
            state,
            estimate,
            lr=float(group["lr"]),
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            rho=float(group["rho"]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            correct_bias=self.correct_bias,
            steps=counts["steps"],
            curvature_updates=counts["updates"],
        )
        return step, counts

    def _extra_state(self) -> dict[str, Any]:
        return {"estimator": self.estimator}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        if state["estimator"] != self.estimator:
            raise ValueError(
                f"the state holds averages of estimator={state['estimator']!r}, and this optimizer "
                f"has {self.estimator!r}"
            )
