"""What work in Python costs as models get deeper: seconds of narrow models of many layers.

    python benchmarks/depth.py [--blocks 25 100] [--rounds 3]

Blocks are those of a transformer without attention (two normalizations, six linear layers), of
width 8, so that next to nothing is arithmetic. Each use is timed by turns on models of both depths,
in seconds of the processor; ``growth`` is 4 where work is linear in the layers and 16 where it is
their square, for depths of which one is four times the other. ``gradients`` is in backward passes
of PyTorch on the same model.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

import curvlib as cl
from curvlib.influence.influence import Influence

LOSS = nn.CrossEntropyLoss()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.out(torch.tanh(self.q(y) * self.k(y) + self.v(y)))
        return x + self.narrow(torch.tanh(self.wide(self.norm2(x))))


def uses(blocks: int, folder: Path) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(8) for _ in range(blocks)), nn.Linear(8, 3))
    data = torch.randn(8, 8), torch.randint(3, (8,))
    risk = cl.Risk(model, LOSS, data)
    K = cl.kfac(risk, progress=False)
    inf = Influence.of(risk, K, progress=False)
    H, v = cl.hessian(risk), torch.randn(risk.space.size)
    params = list(model.parameters())
    optimizer = cl.optim.KFAC(model, lr=1e-4, damping=0.1, factor_interval=1, inverse_interval=1)
    return {
        "gradient of PyTorch": lambda: torch.autograd.grad(LOSS(model(data[0]), data[1]), params),
        "Risk": lambda: cl.Risk(model, LOSS, data),
        "check": risk.check,
        "Hessian product": lambda: H @ v,
        "K-FAC fit": lambda: cl.kfac(risk, progress=False),
        "save": lambda: K.save(folder / f"{blocks}"),
        "scores": lambda: inf.scores(data),
        "magnitude pruning": lambda: cl.prune(
            model, risk, 0.5, method="magnitude", layer_maximum=0.9, progress=False
        ),
        "blocks of the Hessian": H.blocks,
        "KFAC step": lambda: optimizer.step(lambda: LOSS(model(data[0]), data[1])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", nargs=2, type=int, default=[25, 100])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    taken: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        every = {blocks: uses(blocks, Path(folder)) for blocks in args.blocks}
        for turn in range(args.rounds + 1):  # the first warms up
            for blocks, calls in every.items():
                for name, call in calls.items():
                    gc.collect()
                    gc.disable()  # a full collection would count for whoever meets it
                    start = time.process_time()
                    call()
                    if turn:
                        taken.setdefault((name, blocks), []).append(time.process_time() - start)
                    gc.enable()
    few, many = args.blocks
    seconds = {key: statistics.median(values) for key, values in taken.items()}
    floor = seconds["gradient of PyTorch", many]
    rows = [
        {
            "use": name,
            "few s": seconds[name, few],
            "many s": seconds[name, many],
            "growth": seconds[name, many] / seconds[name, few],
            "gradients": seconds[name, many] / floor,
        }
        for name in every[few]
    ]
    columns = {"use": "", "few s": ".4f", "many s": ".4f", "growth": ".1f", "gradients": ".1f"}
    print(common.table(rows, columns))
    print("wrote", common.save("depth", rows, vars(args)))


if __name__ == "__main__":
    main()
