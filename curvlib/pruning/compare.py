r"""Several methods of pruning at several sparsities, in one call.

.. code-block:: python

    curves = cl.pruning.compare(model, risk, [0.5, 0.8, 0.9], evaluate=test_accuracy)
    print(curves.table())
    curves.plot()
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from curvlib.core.digest import digest
from curvlib.core.result import Result, axes_or_new
from curvlib.core.risk import Risk
from curvlib.core.run import Progress, run
from curvlib.pruning.checks import require_sparsity
from curvlib.pruning.masks import Masks
from curvlib.pruning.methods import METHODS, Method
from curvlib.pruning.notices import each_said_once
from curvlib.pruning.prunable import on_model
from curvlib.pruning.prune import prune

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Methods that are compared by default.
DEFAULT = ("magnitude", "diagonal", "wanda", "obc", "obs")

_STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#E69F00", "D"),
    ("#CC79A7", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
    ("#999999", "*"),
)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """What is left of a model after pruning, by method and sparsity.

    Attributes:
        methods: Their names, ``L`` of them.
        sparsities: ``S`` of them, rising.
        values: What ``evaluate`` says of each pruned model, ``[L, S]``, float64; NaN where a
            method refused (``problems`` says why).
        losses: The risk of each pruned model, ``[L, S]``, float64.
        predicted: Predicted change of the risk, ``[L, S]``, float64; NaN for methods that know no
            loss.
        dense: What ``evaluate`` says of the model as it is.
        dense_loss: Its risk.
        quantity: What the values are.
        problems: Errors of single events, by ``"method at sparsity"``.
    """

    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    values: Tensor
    losses: Tensor
    predicted: Tensor
    dense: float
    dense_loss: float
    quantity: str
    problems: dict[str, str]

    def table(self) -> str:
        """The values as text: a row for each method, a column for each sparsity."""
        wide = max(len("dense"), *(len(name) for name in self.methods))
        head = "".join(f"  {100 * s:>7g}%" for s in self.sparsities)
        lines = [f"{self.quantity} ({self.dense:.5g} before pruning)", f"{'':<{wide}}{head}"]
        for name, row in zip(self.methods, self.values.tolist(), strict=True):
            cells = "".join(f"  {v:>8.4g}" if math.isfinite(v) else f"  {'-':>8}" for v in row)
            lines.append(f"{name:<{wide}}{cells}")
        return "\n".join([*lines, *(f"{k}: {why}" for k, why in self.problems.items())])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the values against the sparsity, on an axis of densities.

        Args:
            ax: Where to; a new figure by default.

        Raises:
            ImportError: If matplotlib is absent.
        """
        ax = axes_or_new(ax)
        kept = [100.0 * (1.0 - s) for s in self.sparsities]
        for i, (name, row) in enumerate(zip(self.methods, self.values.tolist(), strict=True)):
            colour, marker = _STYLES[i % len(_STYLES)]
            wide = 2.0 if name == "obs" else 1.2
            ax.plot(kept, row, color=colour, marker=marker, ms=4.0, lw=wide, label=name)
        ax.axhline(self.dense, color="0.4", lw=0.9, ls="--", label="not pruned")
        ax.set_xscale("log")
        ax.set_xticks(kept, [f"{100.0 * s:g}" for s in self.sparsities])
        ax.set_xticks([], minor=True)
        ax.invert_xaxis()
        ax.set_xlabel("pruned weights (%)")
        ax.set_ylabel(self.quantity)
        ax.grid(color="0.92", lw=0.6)
        ax.set_axisbelow(True)
        ax.legend(frameon=False)
        return ax


@dataclass(frozen=True)
class _State:
    done: int
    values: Tensor
    losses: Tensor
    predicted: Tensor
    problems: dict[str, str]


def compare(
    model: nn.Module,
    risk: Risk,
    sparsities: Sequence[float],
    methods: Sequence[str] | Mapping[str, Method] = DEFAULT,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    quantity: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
    **settings: Any,
) -> Comparison:
    """Prunes copies of a model by several methods to several sparsities.

    Args:
        model: The model of the risk; it is left as it was.
        risk: Loss and data.
        sparsities: Each is reached from the model as it is.
        methods: Names of :data:`curvlib.pruning.METHODS`, or methods by names of one's own.
        evaluate: Function of a pruned model, such as its accuracy on a test set. Default: the
            loss on the risk's data.
        quantity: What that is, for tables and figures.
        checkpoint: File to continue from, and to save to, event by event.
        save_every: Seconds between saves.
        progress: Whether to show a bar, or a function to call instead.
        **settings: As for :func:`curvlib.prune`, the same for all: ``params=``, ``pattern=``,
            ``layer_maximum=``, ``keep=``, ``seed=``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is no method or no sparsity, or a method or sparsity is none. What a
            single event refuses is noted in the result, and the others go on; if all are refused,
            this says why.

    Example:
        >>> import curvlib as cl
        >>> from curvlib.demo import digits
        >>> demo = digits(epochs=1)
        >>> curves = compare(
        ...     demo.model, demo.risk(), [0.5, 0.8], ["magnitude", "wanda"], progress=False
        ... )
        >>> curves.values.shape, curves.quantity
        (torch.Size([2, 2]), 'loss')
    """
    table = _methods(methods)
    levels = _levels(sparsities)
    for name in ("sparsity", "method", "apply"):
        if name in settings:
            raise TypeError(f"compare sets {name}= itself: it prunes copies, by several methods")
    names = tuple(table)
    said: set[str] = set()
    empty = torch.full((len(names), len(levels)), math.nan, dtype=torch.float64)

    def step(state: _State) -> _State:
        i, j = divmod(state.done, len(levels))
        values, losses, predicted = (
            t.clone() for t in (state.values, state.losses, state.predicted)
        )
        problems = dict(state.problems)
        try:
            with each_said_once(said):
                found = prune(
                    model, risk, levels[j], method=table[names[i]], progress=False, **settings
                )
        except (ValueError, RuntimeError, FloatingPointError) as error:
            problems[f"{names[i]} at {levels[j]:g}"] = str(error)
        else:
            assert found.model is not None
            losses[i, j], predicted[i, j] = found.after, found.predicted
            values[i, j] = found.after if evaluate is None else float(evaluate(found.model))
        return _State(state.done + 1, values, losses, predicted, problems)

    own = on_model(risk, model)
    with each_said_once(said):
        loss = float(own.value())
    last = run(
        lambda: _State(0, empty, empty, empty, {}),
        step,
        state_type=_State,
        done=lambda state: state.done == empty.numel(),
        report=lambda state: (state.done, empty.numel(), ""),
        title="comparison of pruning methods",
        checkpoint=checkpoint,
        problem=own.fingerprint,
        settings={
            "methods": {name: way.plain() for name, way in table.items()},
            "sparsities": levels,
            **{name: _plain(value) for name, value in settings.items()},
        },
        save_every=save_every,
        progress=progress,
        group=own.group,
    )
    if len(last.problems) == empty.numel():
        if len(set(last.problems.values())) == 1:
            raise ValueError(f"all events are refused: {next(iter(last.problems.values()))}")
        raise ValueError("; ".join(f"{where}: {why}" for where, why in last.problems.items()))
    return Comparison(
        methods=names,
        sparsities=tuple(levels),
        values=last.values,
        losses=last.losses,
        predicted=last.predicted,
        dense=loss if evaluate is None else float(evaluate(own.model)),
        dense_loss=loss,
        quantity=quantity or ("loss" if evaluate is None else "value"),
        problems=last.problems,
    )


def _levels(sparsities: Sequence[float]) -> list[float]:
    if isinstance(sparsities, (str, float, int)):
        raise TypeError(f"sparsities= is a list of numbers, got {sparsities!r}")
    levels = sorted({require_sparsity("each of sparsities=", s) for s in sparsities})
    if not levels:
        raise ValueError("sparsities= holds none; pass at least one, such as [0.5, 0.9]")
    return levels


def _plain(value: Any) -> str:
    """What identifies a setting in a checkpoint."""
    if isinstance(value, Masks):
        return digest([value.keep[name] for name in sorted(value.keep)])
    return repr(value)


def _methods(methods: Sequence[str] | Mapping[str, Method]) -> dict[str, Method]:
    if isinstance(methods, str):
        raise TypeError(f"methods= is a list of names, got the text {methods!r}; use [{methods!r}]")
    if not isinstance(methods, Mapping):
        unknown = [name for name in methods if name not in METHODS]
        if unknown:
            raise ValueError(f"methods= holds {unknown}; there are {', '.join(METHODS)}")
        methods = {name: METHODS[name] for name in methods}
    for name, method in methods.items():
        if not isinstance(method, Method):
            raise TypeError(
                f"methods= holds {type(method).__name__} as {name!r}, expected a "
                "curvlib.pruning.Method"
            )
    if not methods:
        raise ValueError(f"methods= holds none; there are {', '.join(METHODS)}")
    return dict(methods)
