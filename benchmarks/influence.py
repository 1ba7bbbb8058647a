"""Do influence scores predict retrained models? LDS, mislabels, removal; beside kronfluence.

    python benchmarks/influence.py [--parts lds mislabel removal] [--tasks diabetes digits ...]
                                   [--masks 100] [--repeats 5] [--seeds 3] [--bank-seed 0]
                                   [--splits 0 1 2]

``lds``
    Models are retrained on 100 random halves of the training data, five times each (the bank, kept
    in ``curvlib-out/``). Each method scores with models that were trained on everything: means over
    single models ("single") and scores averaged over them ("ensemble"), with 95 % bootstrap
    intervals over queries and halves, and the ceiling that noise of retraining leaves. kronfluence,
    if it is installed, has the same models, data and bank.
    "damping of the run" is :func:`curvlib.influence.training_damping`, from learning rate, steps,
    momentum and weight decay alone; "chosen" damping :func:`curvlib.influence.select_damping`, from
    a bank of its own: 20 halves x 2 retrainings with other seeds, for one half of the queries by
    the other. "checkpoints" averages the scores of three models of the run, in the middle of its
    first, second and last third. CG takes 10 iterations. With several splits of the data, each with
    a bank of its own, rows of split "mean" are means over them, with standard errors.

    How the recipes were found says ``docs/decisions/0021``. "fitted digits" is a harder one:
    batches of 32, and pixels divided by 16.
``mislabel``
    10 % of the digits' labels are changed; examples are inspected by self-influence or by loss.
``removal``
    The most influential examples of the mean query are left out, and models retrained.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import ensembles
import torch
from ensembles import Task
from torch import Tensor, nn

import curvlib as cl
from curvlib.influence.bank import RetrainingBank, retraining_bank
from curvlib.influence.influence import Influence
from curvlib.influence.lds import linear_datamodeling_score
from curvlib.influence.mislabel import mislabel_detection
from curvlib.influence.refined import refined
from curvlib.influence.removal import removal_curve
from curvlib.influence.selection import select_damping
from curvlib.operators.scores.example_values import error_norms, example_losses, gradient_norms

TASKS = {
    "diabetes": ensembles.diabetes,
    "digits": ensembles.digits,
    "fitted digits": ensembles.fitted_digits,
}
Method = Callable[[nn.Module, Task], Tensor]


def influence(
    curvature: str | None = None,
    damping: float | None = None,
    *,
    of_run: bool = False,
    fit: dict[str, Any] | None = None,
) -> Method:
    """Scores ``[Q, N]`` of curvlib."""

    def scores(model: nn.Module, task: Task) -> Tensor:
        risk = cl.Risk(model, task.loss(), task.train)
        own = refined(risk, iterations=10) if curvature == "refined" else curvature
        own_damping = task.damping if of_run else damping
        found = Influence.of(
            risk, own, damping=own_damping, relative=not of_run, fit=fit, progress=False
        )
        return found.scores(task.query).scores

    return scores


METHODS: dict[str, Method] = {
    "identity": influence("identity"),
    "diagonal": influence("diagonal"),
    "K-FAC": influence("kfac"),
    "EK-FAC (default)": influence(),
    "EK-FAC, sampled labels": influence(fit={"fisher": "mc"}),
    "EK-FAC + CG": influence("refined"),
    "EK-FAC, damping of the run": influence(of_run=True),
    "EK-FAC + CG, damping of the run": influence("refined", of_run=True),
}

CHECKPOINTED = ("EK-FAC (default)", "EK-FAC, damping of the run")


def kronfluence_methods() -> dict[str, Method]:
    """The peer, at its default damping (1e-8) and at its heuristic (0.1 of the mean)."""
    try:
        import kronfluence  # noqa: F401  # whether it is there
    except ImportError:
        return {}
    from kronfluence_scores import scores

    return {
        "kronfluence EK-FAC (default)": lambda model, task: scores(model, task, 1e-8),
        "kronfluence EK-FAC (heuristic)": lambda model, task: scores(model, task, None),
    }


def bank_of(task: Task, masks: int, repeats: int, seed: int) -> RetrainingBank:
    def train(keep: Tensor, seeds: Sequence[int]) -> Tensor:
        return ensembles.query_losses(task, ensembles.trained(task, keep, seeds))

    folder = Path("curvlib-out") / "influence-banks"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{task.name}-{task.split}-{masks}x{repeats}-{seed}.safetensors".replace(" ", "-")
    return retraining_bank(
        train,
        len(task.train[0]),
        masks=masks,
        repeats=repeats,
        together=25 * repeats,
        seed=seed,
        problem=f"{task.name} {task.split} {task.lr} {task.epochs} {task.momentum} {task.batch}",
        checkpoint=folder / name,
    )


def lds_rows(args: argparse.Namespace, task: Task) -> list[dict[str, Any]]:
    bank = bank_of(task, args.masks, args.repeats, args.bank_seed)
    seeds = range(10_000, 10_000 + args.seeds)
    models = [[ensembles.model(task, seed)] for seed in seeds]
    runs = [ensembles.checkpoints(task, seed) for seed in seeds]
    every = METHODS | kronfluence_methods()
    rows = [_lds_row(task, bank, name, models, method) for name, method in every.items()]
    rows += [
        _lds_row(task, bank, f"{name}, checkpoints", runs, METHODS[name]) for name in CHECKPOINTED
    ]
    for name, groups in (("EK-FAC", models), ("EK-FAC, checkpoints", runs)):
        rows += [_selected_row(args, task, bank, f"{name}, chosen damping", groups)]
    return rows


def mean_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over splits of each task and method, with standard errors."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    out = []
    for (task, method), own in groups.items():
        row = {"part": "lds", "task": task, "split": "mean", "method": method, "splits": len(own)}
        for name in ("single", "ensemble", "ceiling"):
            values = torch.tensor([r[name] for r in own], dtype=torch.float64)
            row[name] = float(values.mean())
            row[f"{name} stderr"] = float(values.std() / len(own) ** 0.5)
        out.append(row)
    return out


def _lds_row(
    task: Task, bank: RetrainingBank, name: str, groups: list[list[nn.Module]], method: Method
) -> dict[str, Any]:
    """Scores of each group of models are averaged; groups count as single ones."""
    start = time.perf_counter()
    every = [torch.stack([method(m, task) for m in group]).mean(0) for group in groups]
    return _row(task, bank, name, every, time.perf_counter() - start)


def _selected_row(
    args: argparse.Namespace,
    task: Task,
    bank: RetrainingBank,
    name: str,
    groups: list[list[nn.Module]],
) -> dict[str, Any]:
    """Damping by a small bank of other seeds, for one half of the queries by the other."""
    small = bank_of(task, 20, 2, args.bank_seed + 1)
    start = time.perf_counter()
    fits = [
        [Influence.of(cl.Risk(m, task.loss(), task.train), progress=False) for m in group]
        for group in groups
    ]
    x, y = task.query
    every = [torch.zeros(len(x), len(task.train[0])) for _ in groups]
    chosen = []
    for judged in (slice(0, len(x) // 2), slice(len(x) // 2, len(x))):
        rest = torch.ones(len(x), dtype=torch.bool)
        rest[judged] = False
        found = select_damping(
            [fit for group in fits for fit in group],
            (x[rest], y[rest]),
            replace(small, losses=small.losses[:, :, rest]),
            resamples=2,
        )
        chosen.append(found.damping)
        for scores, group in zip(every, fits, strict=True):
            own = [fit.damped(found.damping).scores((x[judged], y[judged])).scores for fit in group]
            scores[judged] = torch.stack(own).mean(0)
    return _row(task, bank, name, every, time.perf_counter() - start) | {"chosen": chosen}


def _row(
    task: Task, bank: RetrainingBank, name: str, every: list[Tensor], seconds: float
) -> dict[str, Any]:
    singles = [linear_datamodeling_score(scores, bank) for scores in every]
    ensemble = linear_datamodeling_score(torch.stack(every).mean(0), bank)
    values = [found.value for found in singles]
    row = {
        "part": "lds",
        "task": task.name,
        "split": task.split,
        "method": name,
        "single": sum(values) / len(values),
        "single low": sum(f.low for f in singles) / len(singles),
        "single high": sum(f.high for f in singles) / len(singles),
        "ensemble": ensemble.value,
        "low": ensemble.low,
        "high": ensemble.high,
        "ceiling": ensemble.ceiling,
        "seconds": seconds / len(every),
    }
    print(common.table([row], COLUMNS["lds"]).splitlines()[-1], flush=True)
    return row


def mislabel_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for seed in range(args.seeds):
        task, flipped = _flipped(seed)
        model = ensembles.model(task, seed)
        risk = cl.Risk(model, task.loss(), task.train)
        contenders: dict[str, Callable[[], Tensor]] = {
            "self-influence, EK-FAC": lambda r=risk: Influence.of(r).self_scores().scores,
            "self-influence, K-FAC": lambda r=risk: Influence.of(r, "kfac").self_scores().scores,
            "GraNd": lambda r=risk: gradient_norms(r),
            "EL2N": lambda r=risk: error_norms(r),
            "loss": lambda r=risk: example_losses(r),
        }
        for name, scores in contenders.items():
            found = mislabel_detection(scores(), flipped)
            rows.append(
                {
                    "part": "mislabel",
                    "method": name,
                    "seed": seed,
                    "auc": found.auc,
                    "top 10 %": float(found.found[0]),
                    "top 20 %": float(found.found[1]),
                }
            )
    return rows


def _flipped(seed: int) -> tuple[Task, Tensor]:
    """Fitted digits of which 10 % have another label."""
    task = ensembles.fitted_digits()
    x, y = task.train
    random = torch.Generator().manual_seed(100 + seed)
    flipped = torch.zeros(len(y), dtype=torch.bool)
    flipped[torch.randperm(len(y), generator=random)[: len(y) // 10]] = True
    other = (y + torch.randint(1, 10, y.shape, generator=random)) % 10
    return replace(task, train=(x, torch.where(flipped, other, y))), flipped


def removal_rows(args: argparse.Namespace, task: Task) -> list[dict[str, Any]]:
    """The query is the mean of the ten with the largest loss."""
    model = ensembles.model(task, 10_000)
    hard = (
        example_losses(cl.Risk(model, task.loss(), task.query)).sort(descending=True).indices[:10]
    )
    task = replace(task, query=(task.query[0][hard], task.query[1][hard]))

    def train(keep: Tensor, seeds: Sequence[int]) -> Tensor:
        return ensembles.query_losses(task, ensembles.trained(task, keep, seeds))

    N = len(task.train[0])
    rows = []
    for name in ("identity", "EK-FAC (default)"):
        scores = METHODS[name](model, task).mean(0)
        removed = [N // 50, N // 20, N // 10, N // 5]
        curve = removal_curve(train, scores, removed=removed, repeats=args.repeats)
        for i, count in enumerate(removed):
            rows.append(
                {
                    "part": "removal",
                    "task": task.name,
                    "method": name,
                    "removed": count,
                    "change": float(curve.change[i]),
                    "stderr": float(curve.change_stderr[i]),
                    "random": float(curve.random[i]),
                    "random stderr": float(curve.random_stderr[i]),
                }
            )
    return rows


COLUMNS = {
    "lds": {
        "task": "",
        "split": "",
        "method": "",
        "single": ".3f",
        "single low": ".3f",
        "single high": ".3f",
        "ensemble": ".3f",
        "low": ".3f",
        "high": ".3f",
        "ceiling": ".3f",
        "single stderr": ".3f",
        "ensemble stderr": ".3f",
        "seconds": ".1f",
    },
    "mislabel": {"method": "", "seed": "", "auc": ".3f", "top 10 %": ".3f", "top 20 %": ".3f"},
    "removal": {
        "task": "",
        "method": "",
        "removed": "",
        "change": ".4f",
        "stderr": ".4f",
        "random": ".4f",
        "random stderr": ".4f",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--parts", nargs="+", default=["lds", "mislabel", "removal"], choices=list(COLUMNS))
    add("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    add("--masks", type=int, default=100)
    add("--repeats", type=int, default=5)
    add("--seeds", type=int, default=3)
    add("--bank-seed", type=int, default=0)
    add("--splits", nargs="+", type=int, default=[0])
    add("--threads", type=int, default=torch.get_num_threads())
    add("--no-save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for part in args.parts:
        new: list[dict[str, Any]] = []
        if part == "mislabel":
            new = mislabel_rows(args)
        for name in args.tasks if part != "mislabel" else []:
            for split in args.splits:
                new += (lds_rows if part == "lds" else removal_rows)(args, TASKS[name](split))
        if part == "lds" and len(args.splits) > 1:
            new += mean_rows(new)
        rows += new
        print(common.table(new, COLUMNS[part]), end="\n\n", flush=True)
    if not args.no_save:
        settings = {k: v for k, v in vars(args).items() if k != "no_save"}
        print("wrote", common.save("influence", rows, settings))


if __name__ == "__main__":
    main()
