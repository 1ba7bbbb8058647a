"""What a step costs: forward, backward and step, beside SGD, AdamW and pytorch_optimizer.

A contender runs whole cycles of its interval (10 steps, or 100 for K-FAC), on a model of its own,
and the time is that of one step on average. All take the same steps on the same batch with a
learning rate of nearly zero, so that the work is the same in all rounds. ``work`` is in
floating-point operations of matrix products and convolutions in a cycle, in multiples of SGD's
(decompositions, and what is done entry by entry, are not counted); M-FAC's floor is the time of
SGD's step and of reading the window twice at the bandwidth of a copy. ``memory`` is the growth of
a fresh process while it takes steps, gradients and activations included.

pytorch_optimizer has its users call ``loss.backward(create_graph=True)``; here they do so only in
steps that take curvature, and set gradients to ``None`` after each step, which is what it can do
at best.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import common
import torch
import torch.nn.functional as F
from optimizer_tasks import attention, digits_images, digits_network
from torch import Tensor, nn

from curvlib.optim.adahessian import AdaHessian
from curvlib.optim.kfac import KFAC
from curvlib.optim.mfac import MFAC
from curvlib.optim.mkor import MKOR
from curvlib.optim.sophia import Sophia

LR = 1e-9


# ------------------------------------------------------------------------------ models
def _digits() -> common.Problem:
    x, y = digits_images()
    return common.Problem("digits conv", digits_network(), x[:128, None], y[:128])


def _mlp() -> common.Problem:
    sizes = (784, 768, 512, 10)  # 1.0 million parameters
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    x, y = torch.randn(128, 784), torch.randint(10, (128,))
    return common.Problem("mlp 1M", nn.Sequential(*layers[:-1]), x, y)


def _transformer() -> common.Problem:
    tokens = torch.randint(65, (8, 65))
    model = common.GPT(vocabulary=65, length=64, width=128, heads=4, depth=2)
    return common.Problem("transformer", model, tokens[:, :-1], tokens[:, 1:].flatten())


MODELS = {"digits conv": _digits, "mlp 1M": _mlp, "transformer": _transformer}


def problem(name: str) -> common.Problem:
    """Always the same numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]()


# -------------------------------------------------------------------------- contenders
@dataclass(frozen=True)
class Contender:
    """An optimizer, and how many steps a cycle of it has.

    Attributes:
        second_order: The interval of steps that need ``backward(create_graph=True)`` (peers).
        target: The most that a step may cost, in steps of SGD.
        models: Those it is timed on; all if empty.
    """

    build: Callable[[nn.Module], torch.optim.Optimizer]
    cycle: int = 10
    second_order: int = 0
    target: float | None = None
    models: tuple[str, ...] = ()


def peer(name: str) -> Callable[..., torch.optim.Optimizer]:
    import pytorch_optimizer

    return getattr(pytorch_optimizer, name)


CE = nn.CrossEntropyLoss()
CONTENDERS: dict[str, Contender] = {
    "SGD": Contender(lambda m: torch.optim.SGD(m.parameters(), LR, momentum=0.9)),
    "AdamW": Contender(lambda m: torch.optim.AdamW(m.parameters(), LR)),
    "AdaHessian": Contender(lambda m: AdaHessian(m.parameters(), LR), target=3.0),
    "AdaHessian, 10": Contender(lambda m: AdaHessian(m.parameters(), LR, interval=10), target=1.15),
    "Sophia-G, 10": Contender(lambda m: Sophia(m.parameters(), LR), target=1.2),
    "Sophia-H, 10": Contender(lambda m: Sophia(m.parameters(), LR, estimator="hutchinson")),
    "K-FAC, 10/100": Contender(lambda m: KFAC(m, lr=LR, loss=CE), cycle=100, target=1.5),
    "E-KFAC, 10/100": Contender(lambda m: KFAC(m, lr=LR, loss=CE, eigen_corrected=True), cycle=100),
    "MKOR, 10": Contender(lambda m: MKOR(m, lr=LR)),
    "M-FAC, 128": Contender(lambda m: MFAC(m.parameters(), LR), models=("mlp 1M",)),
    "pytorch_optimizer AdaHessian": Contender(
        lambda m: peer("AdaHessian")(m.parameters(), lr=LR), second_order=1
    ),
    "pytorch_optimizer AdaHessian, 10": Contender(
        lambda m: peer("AdaHessian")(m.parameters(), lr=LR, update_period=10), second_order=10
    ),
    "pytorch_optimizer SophiaH, 10": Contender(
        lambda m: peer("SophiaH")(m.parameters(), lr=LR), second_order=10
    ),
}


class Stepper:
    """Steps of one contender on a copy of a model."""

    def __init__(self, contender: Contender, given: common.Problem) -> None:
        self.contender, self.x, self.y = contender, given.x, given.y
        self.model = copy.deepcopy(given.model)
        self.opt = contender.build(self.model)
        self.taken = 0

    def step(self) -> None:
        self.opt.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.y)
        every = self.contender.second_order
        if every:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of the cycle that this makes
                loss.backward(create_graph=self.taken % every == 0)
        else:
            backward: Any = getattr(self.opt, "backward", Tensor.backward)
            backward(loss)
        self.opt.step()
        self.opt.zero_grad()
        self.taken += 1

    def cycle(self) -> None:
        for _ in range(self.contender.cycle):
            self.step()


def chosen(model: str, names: list[str] | None) -> dict[str, Contender]:
    found = {k: c for k, c in CONTENDERS.items() if not c.models or model in c.models}
    if names:
        found = {k: c for k, c in found.items() if k in names or k in ("SGD", "AdamW")}
    try:
        import pytorch_optimizer  # noqa: F401  # only whether it is there
    except ImportError:
        print("pytorch_optimizer is not installed: its rows are left out")
        return {k: c for k, c in found.items() if not c.second_order}
    return found


# -------------------------------------------------------------------------------- cost
def cost(model: str, names: list[str] | None, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model."""
    given = problem(model)
    with attention():
        steppers = {k: Stepper(c, given) for k, c in chosen(model, names).items()}
        for one in steppers.values():
            while one.taken < (130 if isinstance(one.opt, MFAC) else 1):  # a full window
                one.step()
        calls: dict[str, Callable[[], Any]] = {k: one.cycle for k, one in steppers.items()}
        source = torch.zeros(2**27)
        target = torch.empty_like(source)
        calls["copy"] = lambda: target.copy_(source)
        times = common.race(calls, rounds=rounds, least=0.0)
        work = {k: flops(CONTENDERS[k], given) for k in steppers}
    bandwidth = 2 * source.nbytes / times.pop("copy").median
    each = {k: t.median / steppers[k].contender.cycle for k, t in times.items()}
    rows = []
    for name, one in steppers.items():
        spread = [t / one.contender.cycle for t in (times[name].low, times[name].high)]
        row = {
            "part": "cost",
            "model": model,
            "parameters": given.size,
            "method": name,
            "ms": round(1e3 * each[name], 3),
            "quartiles": [round(1e3 * t, 3) for t in spread],
            "to SGD": round(each[name] / each["SGD"], 3),
            "to AdamW": round(each[name] / each["AdamW"], 3),
            "target": one.contender.target,
            "work": round(work[name] / work["SGD"], 3),
            "state MB": round(state_bytes(one.opt) / 1e6, 2),
            "memory MB": memory(model, name),
        }
        if isinstance(one.opt, MFAC):
            floor = 2 * 4 * 128 * given.size / bandwidth + each["SGD"]
            row |= {
                "GB/s": round(bandwidth / 1e9, 2),
                "floor ms": round(1e3 * floor, 3),
                "to floor": round(each[name] / floor, 3),
                "floor target": 1.5,
            }
        rows.append(row)
        print(common.table([row], COLUMNS).splitlines()[-1], flush=True)
    return rows


COLUMNS = {
    "model": "",
    "method": "",
    "ms": ".2f",
    "to SGD": ".2f",
    "to AdamW": ".2f",
    "target": ".2f",
    "work": ".2f",
    "to floor": ".2f",
    "state MB": ".1f",
    "memory MB": ".1f",
}


def flops(contender: Contender, given: common.Problem) -> float:
    """Of a step, on average over a cycle that begins with curvature."""
    if contender.cycle == 100:  # ten steps have all kinds of matrix products
        contender = replace(contender, cycle=10)
    return common.flops(Stepper(contender, given).cycle) / contender.cycle


def state_bytes(opt: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""
    seen: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            seen[value.data_ptr()] = value.nbytes
        elif isinstance(value, dict):
            for part in value.values():
                walk(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                walk(part)

    walk(opt.state_dict())
    return sum(seen.values())


def memory(model: str, name: str) -> float | None:
    """Megabytes by which a fresh process grows over model and batch while it takes steps."""
    done = subprocess.run(
        [sys.executable, __file__, model, name],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # freed tensors are given back
    )
    grown = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    return None if grown is None else round(grown / 1e6, 1)


def _memory_here(model: str, name: str) -> None:
    torch.set_num_threads(1)
    contender = CONTENDERS[name]
    small = common.Problem("", nn.Linear(4, 3), torch.randn(5, 4), torch.randint(3, (5,)))
    with attention():
        Stepper(contender, small).step()  # libraries are loaded
        given = problem(model)
        with torch.no_grad():
            given.model(given.x)  # buffers of kernels exist
        stepper = Stepper(contender, given)

        def call() -> None:
            for _ in range(3):
                stepper.step()

        print(json.dumps(common.peak_memory(call)))


def summary(rows: list[dict[str, Any]]) -> str:
    """What is asked of them, and what they do."""
    lines = []
    for row in rows:
        goal, found = row.get("floor target") or row["target"], row.get("to floor", row["to SGD"])
        if goal is not None:
            lines.append(f"{row['model']:12} {row['method']:16} {found:.2f} of at most {goal}")
    ours = {(r["model"], r["method"]): r for r in rows}
    for (model, name), theirs in ours.items():
        own = name.removeprefix("pytorch_optimizer ").replace("SophiaH", "Sophia-H")
        if own != name and (model, own) in ours:
            mine = ours[model, own]
            ratios = [mine[k] / theirs[k] for k in ("ms", "state MB", "memory MB") if theirs[k]]
            shown = " ".join(f"{r:.2f}" for r in ratios)
            lines.append(f"{model:12} {own}: time, state, memory beside the peer's: {shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    _memory_here(sys.argv[1], sys.argv[2])
