"""Loops over examples, on ranks and in one process: functions of ``(rank, size, ...)``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import curvlib as cl
from curvlib.operators.accuracy import accuracy
from curvlib.operators.batch_moments import batch_moments
from curvlib.operators.fisher_diagonal import affordable_fisher, fisher_diagonal
from curvlib.operators.perturbed import perturbed_values
from curvlib.operators.scores.example_values import error_norms, example_losses, gradient_norms
from curvlib.pruning.flops import flops
from tests.distributed.work import F64, net, the_risk, uneven, vectors


def dense_risk(rank: int, size: int, loss: Any = None) -> cl.Risk:
    """The same network on targets of its outputs' shape."""
    g = torch.Generator().manual_seed(5)
    targets = [torch.randn(n, 3, generator=g, dtype=F64).softmax(1) for n in (3, 5, 1, 4, 6)]
    whole = [(x, t) for (x, _), t in zip(uneven(0, 1), targets, strict=True)]
    cuts = {1: [0, 5], 2: [0, 1, 5], 3: [0, 4, 4, 5]}[size]
    return cl.Risk(net(), loss or nn.MSELoss(), whole[cuts[rank] : cuts[rank + 1]])


def rows(rank: int, size: int) -> dict[str, torch.Tensor]:
    risk, dense = the_risk(rank, size), dense_risk(rank, size)
    total = the_risk(rank, size, nn.CrossEntropyLoss(reduction="sum"))
    probabilities = dense_risk(rank, size, nn.CrossEntropyLoss())
    out = {"gradients": torch.cat(list(cl.gradients(risk, block=2)))}
    for name, one, settings in (
        ("some", risk, {"count": 11, "block": 3}),
        ("micro-batches", total, {"count": 9, "micro_batch": 2}),
        ("sampled, masked", risk, {"count": 45, "kind": "mc"}),
        ("sampled, mse", dense, {"count": 25, "kind": "mc"}),
        ("sampled, sum", total, {"count": 15, "kind": "mc", "micro_batch": 3}),
        ("sampled, soft", probabilities, {"count": 11, "kind": "mc"}),
    ):
        out[name] = torch.cat(list(cl.gradient_rows(one, seed=4, **settings)))
    return out


def values(rank: int, size: int) -> dict[str, torch.Tensor]:
    risk, dense = the_risk(rank, size), dense_risk(rank, size)
    V = vectors(risk)
    J = cl.jacobian(risk)
    U = torch.randn(J.shape[0], 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    theta = vectors(risk)[:, 1]
    adjoint = cl.hypergradient(
        lambda t, h: (t.square() * h).sum(),
        lambda t, h: 0.5 * (h * t).square().sum(),
        theta,
        theta + 2.0,
        hessian=cl.ggn(risk),
        damping=0.5,
        tolerance=1e-12,
        progress=False,
    )
    if rank == 0:  # a risk of one process does not wait for others
        alone = cl.Risk(net(), nn.CrossEntropyLoss(), uneven(0, 1), group=False)
        assert len(example_losses(alone)) == 19
        assert cl.mfac(alone, count=3).window.count == 3
        assert accuracy(alone) == accuracy_of_all()
    points = [lambda f=f: {n: f * p.detach() for n, p in risk.params.items()} for f in (0.5, 2.0)]
    return {
        "losses": example_losses(risk),
        "errors": error_norms(risk),
        "norms": gradient_norms(risk, block=2),
        "accuracy": torch.tensor(accuracy(risk)),
        "affordable": torch.tensor([len(affordable_fisher(risk))]),
        **{
            f"diagonal {kind} {name}": fisher_diagonal(one, fisher=kind, seed=3).diagonal()
            for kind in ("type2", "mc", "empirical")
            for name, one in (("ce", risk), ("mse", dense))
        },
        **{
            f"fisher {kind} {name}": cl.fisher(one, kind, samples=2, seed=3) @ V
            for kind in ("mc", "empirical")
            for name, one in (("ce", risk), ("mse", dense))
        },
        "fisher mc again": cl.fisher(risk, "mc").to_dense(block=5),
        "fisher mc block": cl.fisher(risk, "mc", seed=9).blocks()["3"].to_dense(),
        "jacobian": J @ V,
        "jacobian transposed": J.T @ U,
        "ntk": cl.ntk(risk).to_dense(),
        "hypergradient": adjoint.value,
        "Hg": cl.hessian_gradient_product(risk),
        "perturbed": perturbed_values(risk, points),
        "flops": torch.tensor(list(flops(risk).values())),
    }


def accuracy_of_all() -> float:
    """By hand."""
    with torch.no_grad():
        hits = [(net()(x).argmax(1) == y)[y >= 0].double() for x, y in uneven(0, 1)]
    return float(torch.cat(hits).mean())


def windows(rank: int, size: int) -> dict[str, torch.Tensor]:
    risk = the_risk(rank, size)
    v = vectors(risk)[:, 0]
    out = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few rows for the size of the blocks
        for name, settings in {
            "window": {},
            "last rows": {"size": 4, "count": 9},
            "parts": {"parts": "layer", "kind": "mc", "count": 30},
            "micro": {"micro_batch": 2, "count": 8},
            "float32": {"dtype": torch.float32},
            "host": {"storage": "cpu"},
            "small blocks": {"block_size": 4},
            "large blocks": {"block_size": 20},
            "mixed blocks": {"block_size": 20, "kind": "mc", "count": 24},
            "two passes": {"block_size": 6, "kind": "mc", "count": 60, "damping": "auto"},
            "auto": {"block_size": 3, "damping": "auto"},
            "auto, rows": {"block_size": 20, "damping": "auto"},
            "micro blocks": {"block_size": 3, "micro_batch": 2, "count": 8},
        }.items():
            F = cl.mfac(risk, seed=2, **settings)
            out[name] = F.solve(v.to(F.dtype))
            out[f"{name} damping"] = torch.tensor(F.damping)
    F = cl.mfac_window(risk.space, 3)
    opt = torch.optim.SGD(risk.model.parameters(), lr=0.1)
    for _ in range(4):  # a window of a training run's gradients
        g = risk.gradient()
        F.push(g)
        for p, part in zip(risk.params.values(), risk.space.split(F.solve_row()), strict=True):
            p.grad = part
        opt.step()
    out["pushed"] = torch.cat([p.detach().flatten() for p in risk.model.parameters()])
    return out


def normalization(rank: int, size: int) -> dict[str, torch.Tensor]:
    """Statistics of batch normalization, of which one layer is left out."""
    g = torch.Generator().manual_seed(2)
    model = nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2), nn.BatchNorm1d(2)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64))
    data = [batch for batch in uneven(rank, size) if len(batch[0]) > 1]
    layers = {"1": model[1], "4": model[4]}
    found, count = batch_moments(model, data, layers)
    names = cl.pruning.recalibrate(model, data)
    assert names == ("1", "4")
    out = {"count": torch.tensor(count)}
    for name, layer in layers.items():
        out[f"{name} mean"], out[f"{name} variance"] = found[name].mean, found[name].variance
        out[f"{name} running mean"] = layer.running_mean
        out[f"{name} running variance"] = layer.running_var
        out[f"{name} seen"] = layer.num_batches_tracked
    return out


class Fussy(nn.Module):
    """A loss that fails at a target, or is infinite at another."""

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if bool((target == 1).any()):
            raise ValueError("a target is 1")
        return output.square().sum(-1).mean()


def failures(rank: int, size: int) -> dict[str, str]:
    """What each rank says if one fails in the middle of its shard."""
    x = torch.ones(4, 4, dtype=F64)
    y = torch.tensor([0, 0, 0, int(rank == size - 1)])
    data = [(x, torch.zeros(4, dtype=torch.int64)), (x, y)]
    if rank == 0:
        data = data[:1]
    risk = cl.Risk(net(), Fussy(), data)
    calls = {
        "gradients": lambda: list(cl.gradients(risk)),
        "rows": lambda: list(cl.gradient_rows(risk, 8 * size - 4)),
        "blocks": lambda: cl.mfac(risk, block_size=3),
        "norms": lambda: gradient_norms(risk),
        "moments": lambda: cl.rates.gradient_moments(risk),
    }
    return {name: said(call) for name, call in calls.items()}


def said(call: Callable[[], Any]) -> str:
    """The error of a call."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 (the test looks at it)
        return f"{type(error).__name__}: {error}"
    return "nothing"


def nothing(rank: int, size: int) -> dict[str, str]:
    """What each rank says of data without a batch, and of a loss that is none on one rank."""
    risk = cl.Risk(net(), nn.CrossEntropyLoss(), [])
    norm = nn.BatchNorm1d(4).double()
    whole = cl.Risk(net(), nn.CrossEntropyLoss(), uneven(rank, size))
    opt = torch.optim.SGD(whole.model.parameters(), lr=0.1)
    learner = cl.rates.LanczosLearner(whole, opt, batch_size=4, steps=4)
    calls = {
        "flops": lambda: flops(risk),
        "moments": lambda: batch_moments(norm, [], {"": norm}),
        "accuracy": lambda: accuracy(risk),
        "gradients": lambda: torch.cat([risk.space.empty()[None], *cl.gradients(risk)]),
        "rows": lambda: list(cl.gradient_rows(risk, 1)),
        "loss": lambda: learner.step("low" if rank == 1 else 0.5),
    }
    return {name: said(call) for name, call in calls.items()}
