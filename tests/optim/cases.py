"""The table of optimizers: each row goes through every line of the contract.

``build(model, params)`` makes a fresh optimizer for a model; ``params`` are what a user passes
(parameters or groups of them), by default all of the model's. Learning rates are such that a few
hundred steps on a small problem stay finite. A row for each kind of update that a method has; its
interval, if it has one, is 2 or 3, so that runs are interrupted in the middle of one.

Newton-CG has no row: it evaluates a risk of its own, and has neither closures nor micro-batches,
loss scales, clipping or several groups. What remains (state, schedulers, steps that are skipped,
bad input) is in ``test_newton_cg.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from curvlib.optim.adahessian import AdaHessian
from curvlib.optim.kfac import KFAC
from curvlib.optim.mfac import MFAC
from curvlib.optim.mkor import MKOR
from curvlib.optim.shell import CurvatureOptimizer
from curvlib.optim.sophia import Sophia


@dataclass(frozen=True)
class OptimizerCase:
    """One optimizer, and what its method allows.

    Attributes:
        name: Of the row.
        build: ``build(model, params)``, where ``params`` may be ``None``: all of the model's.
        needs_loss: Whether curvature needs ``opt.backward``, ``opt.observe`` or a closure; without
            it, a plain ``loss.backward(); opt.step()`` is a full step.
        second_order: Whether it takes Hessian products, so that a model without double backward
            is an error.
        tolerance: Relative, in float64, where sums are taken in another order (micro-batches,
            ranks).
        draws_targets: Whether it draws targets for examples: those of several micro-batches on
            several ranks are then other ones than those of the joint batch.
    """

    name: str
    build: Callable[[nn.Module, Any], CurvatureOptimizer]
    needs_loss: bool = True
    second_order: bool = True
    tolerance: float = 1e-10
    draws_targets: bool = False


def given(model: nn.Module, params: Any) -> Any:
    """The parameters that were asked for."""
    return model.parameters() if params is None else params


# ------------------------------------------------------------------------------- rows
OPTIMIZERS: list[OptimizerCase] = [
    OptimizerCase(
        "adahessian",
        lambda model, params: AdaHessian(given(model, params), lr=0.02, interval=2),
    ),
    OptimizerCase(
        "adahessian, paper",
        lambda model, params: AdaHessian(given(model, params), lr=0.02, foreach=True),
    ),
    OptimizerCase(
        "adahessian, diagonal",
        lambda model, params: AdaHessian(
            given(model, params),
            lr=0.01,
            eps=0.1,
            weight_decay=0.01,
            estimand="diagonal",
            interval=3,
            probes=2,
            block_size=2,
        ),
    ),
    OptimizerCase(
        "sophia-g",
        lambda model, params: Sophia(given(model, params), lr=0.01, rho=1.0, interval=3),
        second_order=False,
        draws_targets=True,
    ),
    OptimizerCase(
        "sophia-h",
        lambda model, params: Sophia(
            given(model, params),
            lr=0.01,
            rho=0.5,
            estimator="hutchinson",
            interval=2,
            probes=2,
            correct_bias=True,
        ),
    ),
    OptimizerCase(
        "mfac",
        lambda model, params: MFAC(given(model, params), size=3, weight_decay=0.01),
        needs_loss=False,
        second_order=False,
    ),
    OptimizerCase(
        "mfac, tensors",
        lambda model, params: MFAC(
            given(model, params),
            lr=0.01,
            size=4,
            window="tensor",
            momentum=0.0,
            damping=0.1,
            relative=False,
            norm_matching=False,
            trust=0.5,
        ),
        needs_loss=False,
        second_order=False,
    ),
    OptimizerCase(
        "mfac, compressed",
        lambda model, params: MFAC(given(model, params), size=3, compression=0.3),
        needs_loss=False,
        second_order=False,
    ),
    OptimizerCase(
        "kfac",
        lambda model, params: KFAC(
            model,
            params,
            lr=0.02,
            momentum=0.5,
            weight_decay=0.01,
            factor_interval=2,
            inverse_interval=3,
        ),
        needs_loss=False,
        second_order=False,
        tolerance=1e-9,
    ),
    OptimizerCase(
        "kfac, sampled",
        lambda model, params: KFAC(
            model,
            params,
            lr=0.02,
            fisher="mc",
            loss=nn.CrossEntropyLoss(),
            factor_interval=3,
            inverse_interval=1,
            inner="sgd",
            kl_clip=None,
            damping=0.01,
            damping_form="factored",
        ),
        needs_loss=False,
        second_order=False,
        tolerance=1e-9,
    ),
    OptimizerCase(
        "e-kfac",
        lambda model, params: KFAC(
            model,
            params,
            lr=0.02,
            eigen_corrected=True,
            momentum=0.5,
            relative=True,
            damping=0.1,
            factor_interval=2,
            inverse_interval=4,
        ),
        needs_loss=False,
        second_order=False,
        tolerance=1e-9,
    ),
    OptimizerCase(
        "e-kfac, sampled",
        lambda model, params: KFAC(
            model,
            params,
            lr=0.02,
            eigen_corrected=True,
            fisher="mc",
            loss=nn.CrossEntropyLoss(),
            momentum=0.5,
            factor_interval=1,
            inverse_interval=2,
        ),
        needs_loss=False,
        second_order=False,
        tolerance=1e-9,
    ),
    OptimizerCase(
        "mkor",
        lambda model, params: MKOR(model, params, lr=0.01, eps=1e-6, interval=2, vectors=2),
        needs_loss=False,
        second_order=False,
        tolerance=1e-8,
    ),
    OptimizerCase(
        "mkor, means",
        lambda model, params: MKOR(
            model,
            params,
            lr=0.05,
            inner="sgd",
            statistic="mean",
            interval=3,
            damping=0.1,
            weight_decay=0.01,
        ),
        needs_loss=False,
        second_order=False,
    ),
    OptimizerCase(
        "mkor-h",
        lambda model, params: MKOR(
            model,
            params,
            lr=0.05,
            inner="sgd",
            interval=1,
            hybrid=True,
            cost=1.5,
            block=4,
            every=2,
            patience=1,
            dtype=torch.float64,
        ),
        second_order=False,
    ),
]
