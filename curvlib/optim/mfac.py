r"""M-FAC SGD: descent along :math:`F^{-1} g` with the Fisher matrix of the last ``m`` gradients.

For each parameter group, a sliding window holds the gradients ``G`` of its last ``c <= m`` steps,
the present one included, and the direction is

.. math:: u = F^{-1} g, \qquad F = \lambda I + \tfrac1c G^\top G,

from one small system in float64 and two passes over the window
(:mod:`curvlib.operators.windows.gradient_window`). The rule that makes a step of it, with the bound
:math:`g^\top F^{-1} g < m` behind ``trust``, is in :mod:`curvlib.optim.rules.mfac`.

**The gradient is pushed before the solve**, as its authors do. That bounds the direction: along a
gradient that is new to the window the gain is at most :math:`c / \lVert g \rVert^2`, while solved
with the rows before it, it would be :math:`1 / \lambda`. Measured on a digits network (medians of
3 seeds over 7 learning rates, 32 to 128 rows): losses are alike for damping from 0.1 to 10, and at
0.001 with 128 rows that of the second way is 1.9 in place of 0.16.

**Length of steps.** By default directions have the length of the gradient, so that learning rates
are those of SGD. On the same network (10 epochs, 64 rows, damping 1, best of 7 learning rates)
losses were 0.011 for SGD with momentum, 0.007 with norm matching and 0.043 without, where steps
grow as gradients shrink; with learning rates that fall to zero 0.013, 0.007 and 0.002. Without norm
matching, ``trust=1.0`` makes a step at most ``lr`` long in the metric ``F``: the best learning rate
is then the same for 32 to 128 rows and damping 0.1 to 10.

**Count-normalized.** ``F`` averages over the ``c`` rows that there are. Dividing by ``m`` from the
first step on, as its authors' code does, makes first steps up to ``m`` times longer.

**Damping.** By default :math:`\lambda` is a multiple of :math:`\mathrm{tr}(G^\top G) / c^2`, the
mean of the ``c`` eigenvalues that ``c`` rows can have: ``relative="rows"``. It follows the scale of
gradients, and depends neither on the number of parameters nor on the size of the window, as a
fraction of the mean diagonal entry (``relative=True``, which :func:`curvlib.mfac` has) does, whose
good values are :math:`P / c` times larger. Small damping makes steps orthogonal to past gradients.

**What a step costs** beyond the gradient, for ``P`` parameters and windows of ``s`` bytes for each
number: :math:`2 s m P` bytes read, about :math:`30 P` read and written besides, and
:math:`O(m^3)` work. In memory: the window, ``s m P`` bytes (with ``compression=`` the fraction
:math:`\rho`, :math:`(s + 4) \rho m P`), momentum, and two vectors while a step runs (three with
``compression=``, and the residual).

E. Frantar, E. Kurtic and D. Alistarh, *M-FAC: Efficient matrix-free approximations of second-order
information*, NeurIPS 2021; for ``compression=``: I.-V. Modoranu, A. Kalinov, E. Kurtic, E. Frantar
and D. Alistarh, *Error Feedback Can Accurately Compress Preconditioners*, ICML 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvlib.core.ranks.dtensors import is_sharded
from curvlib.core.ranks.spread import Spread
from curvlib.operators.windows.arguments import require_dtype
from curvlib.operators.windows.gradient_window import GradientWindow, Prepared, require_followed
from curvlib.optim.arguments import choice, count, flag, fraction, nonnegative, number, positive
from curvlib.optim.gradients import Gradients
from curvlib.optim.rules import mfac as rule
from curvlib.optim.shell import CurvatureOptimizer


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a step will do to one group; nothing is changed yet. ``None``: it is not finite."""

    index: int
    present: list[int]
    layout: list[int]
    window: GradientWindow
    prepared: Prepared | None


class MFAC(CurvatureOptimizer):
    r"""SGD preconditioned by the inverse Fisher matrix of a sliding window of gradients.

    It needs gradients only: ``loss.backward(); opt.step()`` is a full step, and each step adds one
    row (the gradient of the whole batch, however many micro-batches it came in).

    A parameter whose gradient is ``None`` is left as it is, and counts as zero in the row. A
    parameter that has never had a gradient takes no place in the window; where one gets its first
    gradient later, the window is made wider, for which both are in memory for a moment. A gradient
    that is zero everywhere is not pushed.

    Args:
        params: Parameters, named parameters or groups of them. All settings but the last can
            differ by group; ``size``, ``window``, ``dtype`` and ``compression`` are read when a
            group takes its first step. A group lives on one device.
        lr: Learning rate :math:`\eta`, as that of SGD with momentum; without ``norm_matching``
            about 0.003 to 0.03.
        size: ``m``, how many gradients the window keeps at most.
        damping: :math:`\lambda`, or what it is relative to.
        relative: ``"rows"``: damping is a multiple of the mean of the ``c`` eigenvalues that ``c``
            rows can have; ``True``: of the mean diagonal entry of :math:`\frac1c G^\top G`;
            ``False``: it is absolute.
        momentum: :math:`\mu` of heavy-ball momentum on preconditioned directions.
        weight_decay: Decoupled: parameters shrink by ``1 - lr * weight_decay``.
        norm_matching: Whether directions get the length of the gradient; else they have that of
            :math:`F^{-1} g`.
        trust: :math:`\kappa`: directions are scaled down to :math:`u^\top F u \le \kappa`;
            ``None`` for no bound but the natural one of :math:`F^{-1} g`, which is below the
            number of rows (times that of tensors, for ``"tensor"``).
        window: ``"group"`` for one matrix over all parameters of a group, or ``"tensor"`` for one
            of each parameter, from the same gradients.
        dtype: How the window is stored: float32, float64 or bfloat16; float32 when omitted
            (float64 if a parameter of the group is).
        compression: The fraction of entries of a gradient that is stored, the largest, with error
            feedback: ``0.01``. The direction is then that of the compressed row.
        maximize: Whether to ascend.
        process_group: Replicas of data-parallel training; see
            :class:`~curvlib.optim.shell.CurvatureOptimizer`. Each holds the whole window; of
            sharded parameters (FSDP2), its slices of all rows: then a step sends ``m`` numbers for
            the row, and one for each norm.

    Raises:
        TypeError: If a parameter or a setting is of the wrong type.
        ValueError: If a setting is out of range, or a group has parameters on several devices.
        MemoryError: At the first step, if the window does not fit; the message says what would.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = MFAC(model.parameters(), lr=0.1, size=8)
        >>> inputs = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
        >>> losses = [float(opt.step(lambda: model(inputs).square().mean())) for _ in range(20)]
        >>> losses[-1] < losses[0], opt.windows[0].count
        (True, 8)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        *,
        size: int = 128,
        damping: float = 1.0,
        relative: bool | str = "rows",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        norm_matching: bool = True,
        trust: float | None = None,
        window: str = "group",
        dtype: torch.dtype | None = None,
        compression: float | None = None,
        maximize: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._windows: dict[int, GradientWindow] = {}  # by number of the group
        self._layouts: dict[int, list[int]] = {}  # which of its parameters make up a row
        super().__init__(
            params,
            {
                "lr": lr,
                "size": size,
                "damping": damping,
                "relative": relative,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "norm_matching": norm_matching,
                "trust": trust,
                "window": window,
                "dtype": dtype,
                "compression": compression,
                "maximize": maximize,
            },
            process_group=process_group,
        )

    @property
    def windows(self) -> dict[int, Any]:
        """The window of each group that has taken a step, by its number; for reading only."""
        return {k: held.window for k, held in self._windows.items()}

    # ------------------------------------------------------------------ hooks of the shell
    follows_shards = True

    def _check(self, group: dict[str, Any]) -> None:
        nonnegative(group, "lr", "weight_decay")
        fraction(group, "momentum")
        positive(group, "damping")
        flag(group, "norm_matching")
        count("size", group["size"])
        choice("window", group["window"], ("group", "tensor"))
        if not isinstance(group["relative"], bool) and group["relative"] != "rows":
            raise ValueError(f"relative= is 'rows', True or False, got {group['relative']!r}")
        if group["trust"] is not None:
            positive(group, "trust")
        if group["dtype"] is not None:
            require_dtype(group["dtype"])
        if group["compression"] is not None:
            positive(group, "compression")
            if number(group, "compression") > 1:
                raise ValueError(
                    "compression= is the fraction of entries that is stored, in (0, 1], got "
                    f"{group['compression']}"
                )
        if self.sharding is not None:
            by_tensor = group["window"] == "tensor"
            require_followed(self.sharding.spread(()), by_tensor, group["compression"])
        devices = sorted({str(p.device) for p in group["params"]})
        if len(devices) > 1:
            raise ValueError(
                f"parameters of one group are on {', '.join(devices)}, but a window is on one "
                "device; make a group of those on each"
            )

    def _update(self, gradients: Gradients) -> bool | None:
        found = [self._planned(index, grads) for index, grads in enumerate(gradients)]
        plans = [plan for plan in found if plan is not None]
        if any(plan.prepared is None for plan in plans):
            return False
        moves = [self._direction(plan) for plan in plans]
        for plan, (direction, factor) in zip(plans, moves, strict=True):
            self._apply(plan, direction, factor)
        return True

    def _planned(self, index: int, grads: list[Tensor | None]) -> _Plan | None:
        """What a step would do to a group; ``None`` where no parameter has a gradient."""
        group = self.param_groups[index]
        params = group["params"]
        present = [i for i, g in enumerate(grads) if g is not None and params[i].numel()]
        if not present:
            return None
        layout = list(self._layouts.get(index, []))
        new = [i for i in present if i not in layout]
        lengths = [self.own(params[i]).numel() for i in new]
        layout += new
        spread = self._spread(index, layout)
        window = self._windows.get(index)
        if window is None:
            window = self._made(group, lengths, spread)
        elif new:
            window = window.widened(lengths, spread)
        prepared = window.prepared(window.row([grads[i] for i in layout]))
        return _Plan(index, present, layout, window, prepared)

    def _spread(self, index: int, layout: list[int]) -> Spread | None:
        """How rows of a group lie over ranks."""
        if self.sharding is None:
            return None
        return self.sharding.spread(self._numbers(index, layout))

    def _numbers(self, index: int, layout: list[int]) -> list[int]:
        before = sum(len(group["params"]) for group in self.param_groups[:index])
        return [before + i for i in layout]

    def _made(
        self, group: dict[str, Any], lengths: list[int], spread: Spread | None
    ) -> GradientWindow:
        params, dtype = group["params"], group["dtype"]
        if dtype is None:
            double = any(p.dtype == torch.float64 for p in params)
            dtype = torch.float64 if double else torch.float32
        return GradientWindow(
            lengths,
            group["size"],
            dtype=dtype,
            device=params[0].device,
            by_tensor=group["window"] == "tensor",
            compression=group["compression"],
            spread=spread,
        )

    def _direction(self, plan: _Plan) -> tuple[Tensor | None, float]:
        """Pushes the row; the direction ``[P]`` (``None`` for zero) and its factor."""
        self._windows[plan.index] = window = plan.window
        self._layouts[plan.index] = plan.layout
        if plan.prepared is None or plan.prepared.zero:
            return None, 1.0
        window.push(plan.prepared)
        group = self.param_groups[plan.index]
        damping, relative = number(group, "damping"), group["relative"]
        direction = window.direction(damping, relative)
        wanted, trust = 1.0, group["trust"]
        if group["norm_matching"]:
            own, length = window.lengths_of(direction)
            wanted = own / length if length > 0 else 1.0
        factor = rule.factor(
            wanted,
            quadratic=0.0 if trust is None else window.quadratic(damping, relative),
            trust=None if trust is None else number(group, "trust"),
        )
        return direction, factor

    def _apply(self, plan: _Plan, direction: Tensor | None, factor: float) -> None:
        group = self.param_groups[plan.index]
        if direction is None:
            zeros = sum(plan.window.lengths)
            direction = torch.zeros(
                zeros, dtype=plan.window.vector_dtype, device=plan.window.window.device
            )
        parts = dict(zip(plan.layout, direction.split(list(plan.window.lengths)), strict=True))
        members = [group["params"][i] for i in plan.present]
        params = [self.own(p) for p in members]
        directions = [parts[i].view(p.shape) for i, p in zip(plan.present, params, strict=True)]
        momentum, momenta = number(group, "momentum"), []
        if momentum:
            for p, own in zip(members, params, strict=True):
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = rule.init(own)
            momenta = [self.state[p]["momentum"] for p in members]
        rule.update(
            params,
            directions,
            momenta,
            lr=number(group, "lr"),
            momentum=momentum,
            weight_decay=number(group, "weight_decay"),
            factor=factor,
        )

    # --------------------------------------------------------------------------- state
    def _extra_state(self) -> dict[str, Any]:
        held = [
            {"group": k, "layout": list(self._layouts[k]), "window": self._shared(k)}
            for k in sorted(self._windows)
        ]
        return {"windows": held}

    def _shared(self, index: int) -> dict[str, Any]:
        """The state of a window, as one of whole rows; slices of them are ``DTensor``."""
        held, layout = self._windows[index], self._layouts[index]
        state = held.state_dict()
        if self.sharding is None or self.sharding.group is None:
            return state
        params = [self.param_groups[index]["params"][i] for i in layout]
        lengths, (rows,) = [p.numel() for p in params], state["window"]["rows"]
        blocks = [
            self.sharding.shared(n, part.view(len(part), *self.own(p).shape), 1)
            for n, p, part in zip(
                self._numbers(index, layout), params, rows.split(held.lengths, 1), strict=True
            )
        ]
        whole = {"length": sum(lengths), "parts": [sum(lengths)], "rows": blocks}
        return state | {"lengths": lengths, "window": state["window"] | whole}

    def _owned(self, index: int, layout: list[int], state: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of such a state."""
        rows = state["window"].get("rows")
        if rows is None:  # they are compressed
            return state
        if self.sharding is None or self.sharding.group is None:
            whole = {"rows": [block.flatten(1) for block in rows]}
            return state | {"window": state["window"] | whole}
        params = self.param_groups[index]["params"]
        if not is_sharded(rows[0]):
            rows = torch.cat([block.flatten(1) for block in rows], 1).split(state["lengths"], 1)
            shapes = [params[i].shape for i in layout]
            rows = [block.view(len(block), *s) for block, s in zip(rows, shapes, strict=True)]
        numbers = self._numbers(index, layout)
        own = [self.sharding.owned(n, b, 1) for n, b in zip(numbers, rows, strict=True)]
        lengths = [block.shape[1:].numel() for block in own]
        mine = {"length": sum(lengths), "parts": [sum(lengths)]}
        mine["rows"] = [block.flatten(1) for block in own]
        return state | {"lengths": lengths, "window": state["window"] | mine}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        windows, layouts = {}, {}
        for held in state["windows"]:
            k = held["group"]
            layouts[k] = list(held["layout"])
            device = self.param_groups[k]["params"][0].device
            own, spread = self._owned(k, layouts[k], held["window"]), self._spread(k, layouts[k])
            windows[k] = GradientWindow.from_state(own, device, spread)
        self._windows, self._layouts = windows, layouts
