"""Optimizers: what a step costs, and how soon they are where a tuned AdamW ends.

    python benchmarks/optimizers.py [--parts cost loss] [--tasks NAMES] [--models NAMES]
                                    [--methods NAMES] [--seeds 3] [--rounds 7] [--data FOLDER]

``cost`` is described in ``optimizer_costs.py``, ``loss`` in ``optimizer_losses.py``, and its tasks
in ``optimizer_tasks.py``. Rows of parts, tasks, models and methods that are not run are kept, and
written after each of them. ``--data`` or ``CURVLIB_DATA`` names a folder with tinyshakespeare.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import common
import optimizer_costs
import optimizer_losses
import torch
from optimizer_losses import METHODS
from optimizer_tasks import TASKS

Rows = list[dict[str, Any]]


def kept(old: Rows, new: Rows) -> Rows:
    """Old rows that are not replaced, and the new ones, in order."""

    def key(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["part"], row.get("task") or row["model"], row["method"]

    replaced = {key(row) for row in new}
    rows = [row for row in old if key(row) not in replaced] + new
    order = [*optimizer_costs.CONTENDERS, *METHODS]
    places = [*optimizer_costs.MODELS, *TASKS]
    return sorted(rows, key=lambda r: (key(r)[0], places.index(key(r)[1]), order.index(key(r)[2])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", default=["cost", "loss"], choices=["cost", "loss"])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--models", nargs="*", default=list(optimizer_costs.MODELS))
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=os.environ.get("CURVLIB_DATA"))
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = common.RESULTS / "optimizers.json"

    def read() -> Rows:
        return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []

    settings = {
        "rounds": args.rounds,
        "threads": args.threads,
        "pytorch_optimizer": common.version("pytorch_optimizer"),
    }

    def take(new: Rows) -> None:
        if not args.no_save:
            common.save("optimizers", kept(read(), new), settings)

    if "cost" in args.parts:
        for model in args.models:
            new = optimizer_costs.cost(model, args.methods, args.rounds)
            take(new)
            print(common.table(new, optimizer_costs.COLUMNS))
            print(optimizer_costs.summary(new), flush=True)
    if "loss" in args.parts:
        names = [n for n in args.methods or METHODS if n in METHODS]
        for name in args.tasks:
            known = [r for r in read() if r["part"] == "loss" and r["task"] == name]
            task = TASKS[name](None if args.data is None else Path(args.data))
            new = []
            for row in optimizer_losses.compare(task, names, args.seeds, known):
                take([row])
                new.append(row)
                print(optimizer_losses.show([row]).splitlines()[-1], flush=True)
            print(optimizer_losses.show(new), flush=True)


if __name__ == "__main__":
    main()
