"""AdaHessian and Sophia beside AdamW and SGD with momentum, on handwritten digits.

Each optimizer trains the same small convolutional network for six epochs, with five learning rates
a factor of about three apart and two orders of the examples; the best rate is the one with the
lowest final training loss (mean over the orders). A step of AdaHessian takes three gradients
instead of one, a tenth of Sophia's take two: the last column says what that costs. On this
problem AdamW wins. Sophia's rho was chosen among four values beforehand, on the same problem.
Run: python examples/adahessian_digits.py
"""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from curvlib.demo import digits
from curvlib.optim.adahessian import AdaHessian
from curvlib.optim.sophia import Sophia

EPOCHS, BATCH, SEEDS, GOAL = 6, 100, 2, 0.2

torch.set_num_threads(1)  # tensors are too small for more to help
demo = digits(seed=0, epochs=0)  # an untrained network
x, y = demo.train

Build = Callable[[nn.Module, float], torch.optim.Optimizer]
METHODS: dict[str, tuple[Build, list[float], str]] = {
    "SGD, momentum 0.9": (
        lambda m, lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9),
        [0.01, 0.03, 0.1, 0.3, 1.0],
        "0.45",
    ),
    "AdamW": (
        lambda m, lr: torch.optim.AdamW(m.parameters(), lr, weight_decay=0.0),
        [0.003, 0.01, 0.03, 0.1, 0.3],
        "C1",
    ),
    "AdaHessian": (
        lambda m, lr: AdaHessian(m.parameters(), lr),
        [0.01, 0.03, 0.1, 0.3, 1.0],
        "C0",
    ),
    "Sophia-G": (
        lambda m, lr: Sophia(m.parameters(), lr, rho=0.3, weight_decay=0.0, correct_bias=True),
        [0.001, 0.003, 0.01, 0.03, 0.1],
        "C2",
    ),
}


def full_loss(model: nn.Module) -> float:
    """Mean loss on all training images."""
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def train(build: Build, lr: float, seed: int) -> tuple[list[float], float, float]:
    """Training loss three times an epoch, test accuracy (%), and milliseconds of a step."""
    model = copy.deepcopy(demo.model).train()
    optimizer = build(model, lr)
    order = torch.Generator().manual_seed(seed)
    losses, times = [full_loss(model)], []
    for _ in range(EPOCHS):
        for i, batch in enumerate(torch.randperm(len(x), generator=order).split(BATCH)):

            def loss(batch: torch.Tensor = batch) -> torch.Tensor:
                value = F.cross_entropy(model(x[batch]), y[batch])
                if isinstance(optimizer, (torch.optim.SGD, torch.optim.AdamW)):
                    optimizer.zero_grad()
                    value.backward()
                return value  # curvlib's optimizers call backward themselves

            start = time.perf_counter()
            optimizer.step(loss)
            times.append(1e3 * (time.perf_counter() - start))
            if i % 5 == 4:
                losses.append(full_loss(model))
    images, labels = demo.test
    with torch.no_grad():
        correct = float((model(images).argmax(1) == labels).float().mean())
    return losses, 100.0 * correct, mean(times)


def finite(loss: float) -> float:
    """A loss, or infinity where training diverged."""
    return loss if math.isfinite(loss) else math.inf


figure, (left, right) = plt.subplots(1, 2, figsize=(10.0, 4.2), layout="constrained", sharey=True)
print(
    f"{'optimizer':18} {'best lr':>8} {'loss':>8} {'test %':>7} "
    f"{f'steps to {GOAL}':>13} {'ms a step':>10}"
)
for name, (build, rates, color) in METHODS.items():
    runs = {lr: [train(build, lr, seed) for seed in range(SEEDS)] for lr in rates}
    final = {lr: mean(finite(losses[-1]) for losses, _, _ in found) for lr, found in runs.items()}
    best = min(final, key=final.__getitem__)
    curves = [losses for losses, _, _ in runs[best]]
    steps = [5 * i for i in range(len(curves[0]))]
    middle = [mean(at) for at in zip(*curves, strict=True)]
    reached = next((s for s, loss in zip(steps, middle, strict=True) if loss < GOAL), None)
    accuracy = mean(accuracy for _, accuracy, _ in runs[best])
    cost = median(ms for found in runs.values() for _, _, ms in found)
    print(
        f"{name:18} {best:8.3g} {final[best]:8.4f} {accuracy:7.1f} "
        f"{'never' if reached is None else reached:>13} {cost:10.1f}"
    )
    left.plot(steps, middle, color=color, lw=1.8, label=f"{name}, lr = {best:g}")
    lower, upper = map(min, zip(*curves, strict=True)), map(max, zip(*curves, strict=True))
    left.fill_between(steps, list(lower), list(upper), color=color, alpha=0.15, lw=0)
    right.plot(rates, [min(final[lr], 3.0) for lr in rates], "o-", ms=4, color=color, label=name)

left.set_yscale("log")
left.set_xlabel("step (100 images each)")
left.set_ylabel("training loss")
left.set_title("At the best learning rate (mean and range of two orders)", loc="left", size=10)
left.legend(frameon=False, fontsize=8, loc="lower left")
right.set_xscale("log")
right.set_xlabel("learning rate")
right.set_title(f"After {EPOCHS} epochs, by learning rate", loc="left", size=10)
for ax in (left, right):
    ax.grid(color="0.92", lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)

folder = Path("curvlib-out")
folder.mkdir(exist_ok=True)
figure.savefig(folder / "adahessian_digits.png", dpi=200)
print(f"wrote {folder / 'adahessian_digits.png'}")
