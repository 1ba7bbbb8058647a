r"""The largest stable learning rate for each batch size, by several laws side by side.

With :math:`\lambda_1` the largest curvature, :math:`b` the effective batch and momentum
:math:`\beta` (0 for SGD):

===================  ====================================================================
``deterministic``    :math:`2 (1 + \beta) / \lambda_1`: the full batch
``batch_sharpness``  :math:`2 (1 + \beta) / \lambda'(B)`: no batch expands its own sharpest
                     direction, on average (:mod:`curvlib.rates.batch_sharpness`)
``isotropic``        the same with the random-matrix prediction for isotropic noise
``mean_square``      :math:`2 (1 + \beta) / (\lambda_1 + c \operatorname{tr}(H) / b)`,
                     :math:`c = (1 + \beta) / (1 - \beta)`: mean-square stability with
                     Gaussian inputs (:mod:`curvlib.rates.laws`)
``second_moment``    the same with the noise that the examples have along the top
                     eigenvector, :math:`E \|(H_i - H) v_1\|^2 / \lambda_1` for the trace
``linear``           the idealized rule through the same knee:
                     ``deterministic`` :math:`\cdot \min(1, b / b^*)`
``square_root``      likewise: ``deterministic`` :math:`\cdot \min(1, \sqrt{b / b^*})`
===================  ====================================================================

For adaptive methods all of it is of the preconditioned curvature :math:`P^{-1/2} H P^{-1/2}`, and
the moving average of the gradient divides learning rates by :math:`1 - \beta_1`. For a damped
second-order method, :math:`P = |H| + \delta I` (on the span of the top eigenvectors, and
:math:`\delta I` on the rest).

The *knee*, or critical batch size :math:`b^*`, is where ``second_moment`` (or ``mean_square``,
where that is the law in use) gives half of ``deterministic``: below it larger batches buy larger
steps, above they do not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.core.minibatch import require_batch_size
from curvlib.core.result import Result, axes_or_new, unframed
from curvlib.core.risk import Risk
from curvlib.core.run import Progress
from curvlib.rates.arguments import require_kind, require_risk
from curvlib.rates.example_curvature import ExampleCurvature, beside, example_curvature
from curvlib.rates.laws import stable_rate
from curvlib.rates.methods import Method, damped_preconditioner, read_method
from curvlib.rates.preconditioned import Preconditioner

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Laws by name, in the order of tables.
LAWS = (
    "deterministic",
    "batch_sharpness",
    "isotropic",
    "mean_square",
    "second_moment",
    "linear",
    "square_root",
)
#: Their colours (Okabe and Ito, and grey), which no cycle of a style gives twice.
COLORS = dict(
    zip(
        LAWS,
        ("0.35", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"),
        strict=True,
    )
)


@dataclass(frozen=True, eq=False, repr=False)
class MaxLearningRate(Result):
    r"""Predicted largest learning rates.

    Attributes:
        value: By the law in use, ``[n]``, float64.
        stderr: Its standard error, from that of the noise, ``[n]``.
        law: The law in use: ``"second_moment"`` unless told otherwise.
        laws: All laws, by name, each ``[n]``.
        batch_sizes: ``[n]``, int64.
        sharpness: :math:`\lambda_1` behind each, ``[n]``: one value, except for an adaptive
            method whose preconditioner follows the batch size.
        noise: :math:`E \|(H_i - H) v_1\|^2 / \lambda_1` behind each, ``[n]``.
        trace: :math:`\operatorname{tr} H` behind each, ``[n]``.
        knee: The critical batch size (of the middle one of the batch sizes, where the
            preconditioner follows the batch size).
        knee_low: Lower end of its 95 % interval.
        knee_high: Upper end.
        optimizer: What it is for, in words.
        momentum: :math:`\beta`.
        examples: :math:`N`.
        products: Columns multiplied by matrices of all examples.
        settings: The settings, by name.
    """

    value: Tensor
    stderr: Tensor
    law: str
    laws: dict[str, Tensor]
    batch_sizes: Tensor
    sharpness: Tensor
    noise: Tensor
    trace: Tensor
    knee: float
    knee_low: float
    knee_high: float
    optimizer: str
    momentum: float
    examples: int
    products: int
    settings: dict[str, Any]

    def table(self) -> str:
        """The laws as lines of text, one for each batch size."""
        head = ["batch", *(f"{name}{'*' if name == self.law else ''}" for name in self.laws)]
        lines = ["  ".join(f"{word:>16}" if i else f"{word:>7}" for i, word in enumerate(head))]
        for i, size in enumerate(self.batch_sizes.tolist()):
            cells = [f"{float(rates[i]):16.4g}" for rates in self.laws.values()]
            lines.append("  ".join([f"{size:7d}", *cells]))
        lines.append(
            f"{self.optimizer}, * in use; critical batch size {self.knee:.3g} "
            f"(95 %: {self.knee_low:.3g} to {self.knee_high:.3g})"
        )
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The laws against the batch size, on logarithmic axes, with the knee.

        Args:
            ax: Where to draw; a new figure when omitted.

        Raises:
            ImportError: If matplotlib is absent.
        """
        ax = axes_or_new(ax)
        sizes = self.batch_sizes.tolist()
        for name, rates in self.laws.items():
            used = name == self.law
            ax.plot(
                sizes,
                rates.tolist(),
                color=COLORS[name],
                label=name.replace("_", " ") + (" (in use)" if used else ""),
                lw=2.2 if used else 1.2,
                ls="-" if used else "--" if name in ("linear", "square_root") else "-.",
                marker="o" if used else None,
                ms=4,
                zorder=3 if used else 2,
            )
        ax.axvspan(self.knee_low, self.knee_high, color="0.85", zorder=0)
        ax.axvline(self.knee, color="0.5", lw=1.0, label="critical batch size", zorder=1)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("batch size")
        ax.set_ylabel("largest stable learning rate")
        ax.set_title(self.optimizer, fontsize="medium")
        return unframed(ax)


def max_learning_rate(
    risk: Risk,
    batch_sizes: Sequence[int],
    optimizer: str | torch.optim.Optimizer = "sgd",
    *,
    momentum: float | None = None,
    state: torch.optim.Optimizer | Tensor | None = None,
    damping: float | None = None,
    eps: float = 1e-8,
    law: str = "second_moment",
    kind: str = "hessian",
    curvature: ExampleCurvature | None = None,
    directions: int = 8,
    resamples: int = 512,
    examples: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
) -> MaxLearningRate:
    r"""The largest stable learning rate for each batch size, with the critical batch size.

    What it says holds at these parameters, for as long as the curvature stays: learning rates near
    the largest one change it (progressive sharpening, edge of stability). Early in training, half
    of it is a fair start.

    Args:
        risk: Model, loss, data and parameters: a mean over independent examples.
        batch_sizes: Each from 1 to ``N``.
        optimizer: ``"sgd"``, ``"momentum"``, ``"adam"`` or ``"damped"``; or a torch optimizer,
            whose momentum and state are read. Weight decay is left out.
        momentum: :math:`\beta` of ``"momentum"`` (0.9 when omitted), or :math:`\beta_1` of
            ``"adam"``.
        state: For ``"adam"``: an optimizer that has taken steps, or the preconditioner's diagonal
            ``[P]``. It is held fixed over batch sizes. When omitted, the preconditioner is the one
            that Adam would settle at for each batch size, from gradients of single examples, which
            costs per-example products for each batch size.
        damping: :math:`\delta` of ``"damped"``, absolute.
        eps: Of Adam's preconditioner, where ``state`` is omitted.
        law: Which law is in use for ``value`` and the knee: ``"second_moment"``,
            ``"mean_square"`` or ``"batch_sharpness"``.
        kind: ``"hessian"`` or ``"ggn"``.
        curvature: What :func:`example_curvature` returned, to spare its cost; for ``"sgd"`` and
            ``"momentum"``.
        directions: Top eigenvectors: see :func:`example_curvature`.
        resamples: Of batch sharpness.
        examples: Take per-example products of so many examples only.
        generator: Where random vectors come from, or
        seed: their seed. With neither, the seed is 0.
        checkpoint: A file to save to, and to continue from where it exists. There are several
            beside it, with words added to its name.
        save_every: Seconds between saves.
        progress: Whether to show bars: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a batch size or the optimizer does not fit, or another argument.
        RuntimeError: If the largest eigenvalue is not positive.
        FloatingPointError: If the loss or its curvature is not finite.

    Example:
        >>> import torch, curvlib as cl
        >>> x = torch.randn(256, 3).double()
        >>> risk = cl.Risk(torch.nn.Linear(3, 1).double(), torch.nn.MSELoss(), (x, x[:, :1]))
        >>> rates = max_learning_rate(risk, [1, 4, 256])
        >>> bool(torch.isclose(rates.value[-1], 2 / rates.sharpness[-1]))
        True
        >>> rates.value[0] < rates.value[1] < rates.value[2]
        tensor(True)
    """
    count = require_risk(risk)
    sizes = [require_batch_size(size, count) for size in batch_sizes]
    if not sizes:
        raise ValueError("expected at least one batch size, got none")
    require_kind(kind)
    if law not in ("second_moment", "mean_square", "batch_sharpness"):
        raise ValueError(
            f"law= is 'second_moment', 'mean_square' or 'batch_sharpness', got {law!r}"
        )
    method = read_method(risk, optimizer, momentum=momentum, state=state, damping=damping, eps=eps)
    if curvature is not None and method.name not in ("sgd", "momentum"):
        raise ValueError(
            f"curvature= is for 'sgd' and 'momentum'; {method.name!r} needs the curvature that its "
            "preconditioner gives"
        )
    options: dict[str, Any] = {
        "directions": directions,
        "kind": kind,
        "examples": examples,
        "generator": generator,
        "seed": seed,
        "save_every": save_every,
        "progress": progress,
    }

    def known_for(P: Preconditioner | None, word: str = "") -> ExampleCurvature:
        path = beside(checkpoint, word) if checkpoint is not None and word else checkpoint
        return example_curvature(risk, preconditioner=P, checkpoint=path, **options)

    products = 0
    known: dict[int, ExampleCurvature] = {}
    if method.follows_batch:
        for size in sorted(set(sizes)):
            P = method.preconditioner_for(size)
            known[size] = known_for(P, f"batch-{size}")
            products += known[size].products
    else:
        one = curvature
        if one is None:
            P = method.preconditioner
            if method.name == "damped":
                plain = known_for(None, "undamped")
                products += plain.products
                P = damped_preconditioner(plain, method.damping)
            one = known_for(P)
            products += one.products
        known = dict.fromkeys(sizes, one)
    rows = [_laws(known[size], size, method, resamples, seed) for size in sizes]
    knee, low, high = _knee(known, sizes, method, law)
    table = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in LAWS}
    noises = [known[size].noise() for size in sizes]
    tops = torch.tensor([known[size].top for size in sizes], dtype=torch.float64)
    return MaxLearningRate(
        value=table[law],
        stderr=torch.tensor([row[f"{law} stderr"] for row in rows], dtype=torch.float64),
        law=law,
        laws=table,
        batch_sizes=torch.tensor(sizes),
        sharpness=tops,
        noise=torch.tensor([value for value, _ in noises], dtype=torch.float64) / tops,
        trace=torch.tensor([known[size].trace for size in sizes], dtype=torch.float64),
        knee=knee,
        knee_low=low,
        knee_high=high,
        optimizer=method.description,
        momentum=method.momentum,
        examples=count,
        products=products,
        settings={
            "kind": kind,
            "directions": directions,
            "resamples": resamples,
            "examples": examples,
            "damping": method.damping,
            "seed": (seed or 0) if generator is None else "generator",
        },
    )


def _laws(
    known: ExampleCurvature, size: int, method: Method, resamples: int, seed: int | None
) -> dict[str, float]:
    """All laws for one batch size, and the standard errors of those that may be in use."""
    top = _positive_top(known)
    b = known.effective_batch(size)
    moment, moment_error = known.noise()
    predicted = known.sharpness(size, resamples=resamples, seed=seed)

    def rate(sharpness: float, noise: float = 0.0) -> float:
        return stable_rate(
            sharpness, max(noise, 0.0), momentum=method.momentum, dampening=method.dampening
        )

    noises = {
        "mean_square": (known.trace / b, known.trace_stderr / b),
        "second_moment": (moment / top / b, moment_error / top / b),
    }
    out = {
        "deterministic": rate(top),
        "batch_sharpness": rate(max(predicted.value, top)),
        "isotropic": rate(known.isotropic(size)),
    }
    out["batch_sharpness stderr"] = out["batch_sharpness"] * predicted.stderr / predicted.value
    for name, (noise, error) in noises.items():
        out[name] = rate(top, noise)
        # the relative change of the rate is that of its denominator
        share = out[name] / out["deterministic"] * method.amplification / top
        out[f"{name} stderr"] = out[name] * error * share
    critical = method.amplification * max(moment, 1e-300) / top**2
    out["linear"] = out["deterministic"] * min(1.0, b / critical)
    out["square_root"] = out["deterministic"] * min(1.0, math.sqrt(b / critical))
    return out


def _knee(
    known: dict[int, ExampleCurvature], sizes: Sequence[int], method: Method, law: str
) -> tuple[float, float, float]:
    """Where the law gives half of the deterministic rate, with its 95 % interval."""
    middle = known[sorted(sizes)[len(sizes) // 2]]
    n, top = middle.examples, _positive_top(middle)
    if law == "mean_square":
        noise, error = middle.trace, middle.trace_stderr
    else:
        moment, spread = middle.noise()
        noise, error = moment / top, spread / top
    out = []
    for value in (noise, noise - 1.96 * error, noise + 1.96 * error):
        b = method.amplification * max(value, 0.0) / top
        # b = B (N - 1) / (N - B)
        out.append(max(1.0, b * n / (n - 1 + b)))
    return out[0], out[1], out[2]


def _positive_top(known: ExampleCurvature) -> float:
    if not known.top > 0.0:
        raise RuntimeError(
            f"the largest eigenvalue of the {known.kind} is {known.top:.3g}: without positive "
            "curvature no learning rate is too large by it; look at other parameters, or use "
            "kind='ggn'"
        )
    return known.top
