"""K-FAC's optimizer through gates and attention: its steps from the operator's own factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from curvlib.operators.kfac import kfac
from curvlib.optim.kfac import KFAC
from tests.operators.test_recurrent import CE, PROBLEMS, inside, packed, problem

NAMES = [*PROBLEMS, "packed"]


def first_step(name: str, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Change of the parameters in one step, the gradient, and the risk of the batch before it."""
    risk = packed() if name == "packed" else problem(name)
    batch = risk.in_memory[0]
    risk = risk.on([batch])
    params = [risk.params[n] for n in risk.space.names]
    before = risk.space.join([p.detach().clone() for p in params])
    gradient = risk.gradient()
    operator = kfac(risk, fisher="empirical", eigen_corrected=False, **_own(options))
    opt = KFAC(risk.model, momentum=0.0, kl_clip=None, loss=CE, **options)
    opt.step(lambda: CE(risk.model(*batch[:-1]), batch[-1]))
    change = risk.space.join([p.detach() for p in params]) - before
    assert set(opt.coverage().covered) == inside(risk)
    return change, gradient, operator


def _own(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in ("gates", "sharing") if key in options}


@pytest.mark.parametrize("gates", ["joint", "separate"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_solves_with_the_operators_factors(name: str, gates: str) -> None:
    """In float64, with the factors of the same batch, by code that shares no averages."""
    change, gradient, K = first_step(name, gates=gates, lr=0.3, damping=1e-2)
    where = torch.zeros(len(gradient), dtype=torch.bool)
    for block in K.blocks_of.values():
        for start, stop in block.ranges:
            where[start:stop] = True
    damped = K.to_dense() + 1e-2 * torch.eye(len(gradient), dtype=torch.float64)
    expected = -0.3 * torch.linalg.solve(damped, gradient)
    gap = float((change - expected)[where].norm())
    assert gap <= 1e-8 * float(expected[where].norm())


def test_much_damping_gives_the_gradient() -> None:
    change, gradient, _ = first_step(
        "attention, widths", lr=1e9, damping=1e9, inner="sgd", inner_scale=1e-9
    )
    assert torch.allclose(change, -gradient, rtol=1e-6, atol=1e-12)
