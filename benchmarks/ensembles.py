"""Many small MLPs trained at once, each on its own subset: the ground truth of influence scores.

The weights of ``b`` models are stacked ``[b, out, in]``, so that a step of all is three batched
matrix products. Gradients are PyTorch's; subsets, orders and initial weights are each model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlib.influence.horizon import training_damping


@dataclass(frozen=True)
class Task:
    """Data and recipe of one kind of model."""

    name: str
    sizes: tuple[int, ...]
    train: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    lr: float
    epochs: int
    decay: float = 1e-3
    momentum: float = 0.9
    batch: int = 64
    drop_last: bool = False
    split: int = 0

    @property
    def classes(self) -> bool:
        return not self.train[1].is_floating_point()

    @property
    def steps(self) -> int:
        """Optimizer steps of the recipe on all examples."""
        return self.epochs * len(self.starts(len(self.train[0])))

    def starts(self, count: int) -> range:
        """Where the batches of an epoch of so many examples begin."""
        return range(0, count - count % self.batch if self.drop_last else count, self.batch)

    @property
    def damping(self) -> float:
        """Absolute damping that goes with the recipe on all examples."""
        return training_damping(
            self.lr, self.steps, momentum=self.momentum, weight_decay=self.decay
        )

    def loss(self) -> nn.Module:
        return nn.CrossEntropyLoss() if self.classes else nn.MSELoss()

    def each(self, output: Tensor, target: Tensor) -> Tensor:
        """Losses of single examples, from outputs ``[..., C]``."""
        if self.classes:
            flat = F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="none")
            return flat.view(target.shape)
        return (output - target).square().sum(-1)


def diabetes(split: int = 0) -> Task:
    """scikit-learn's diabetes, 353 training examples and 88 queries."""
    from sklearn.datasets import load_diabetes

    x, y = _shuffled(load_diabetes(return_X_y=True), split)
    x, y = _standardized(x.float(), 353), _standardized(y.float()[:, None], 353)
    train, query = (x[:353], y[:353]), (x[353:441], y[353:441])
    return Task("diabetes", (10, 128, 128, 1), train, query, 0.03, 20, batch=128, split=split)


def digits(split: int = 0) -> Task:
    """scikit-learn's digits, 1,437 training examples and 100 queries."""
    from sklearn.datasets import load_digits

    x, y = _shuffled(load_digits(return_X_y=True), split)
    x = _standardized(x.float(), 1437)
    train, query = (x[:1437], y[:1437]), (x[1437:1537], y[1437:1537])
    return Task("digits", (64, 128, 128, 10), train, query, 0.05, 15, split=split)


def fitted_digits(split: int = 0) -> Task:
    """Digits, trained until they fit: batches of 32 with momentum, pixels between 0 and 1."""
    from sklearn.datasets import load_digits

    x, y = _shuffled(load_digits(return_X_y=True), split)
    x = x.float() / 16
    train, query = (x[:1437], y[:1437]), (x[1437:1537], y[1437:1537])
    sizes = (64, 128, 128, 10)
    name = "fitted digits"
    return Task(name, sizes, train, query, 0.05, 15, batch=32, drop_last=True, split=split)


def _shuffled(data: Sequence[Any], split: int) -> list[Tensor]:
    """Inputs and targets in an order of their own."""
    x, y = (torch.as_tensor(part) for part in data)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
    return [x[order], y[order]]


def _standardized(x: Tensor, train: int) -> Tensor:
    """With mean 0 and standard deviation 1 on the training examples; constants stay."""
    scale = x[:train].std(0, unbiased=False)
    return (x - x[:train].mean(0)) / torch.where(scale > 0, scale, torch.ones_like(scale))


def initial(task: Task, seed: int) -> list[Tensor]:
    """Weights and biases as ``nn.Linear`` makes them, from a seed of their own."""
    random = torch.Generator().manual_seed(seed)
    out = []
    for a, b in zip(task.sizes, task.sizes[1:], strict=False):
        bound = a**-0.5
        out.append((2 * torch.rand(b, a, generator=random) - 1) * bound)
        out.append((2 * torch.rand(b, generator=random) - 1) * bound)
    return out


def forward(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """Outputs ``[b, n, C]`` of stacked models for inputs ``[b, n, I]``."""
    for i in range(0, len(weights), 2):
        x = torch.baddbmm(weights[i + 1][:, None], x, weights[i].mT)
        if i + 2 < len(weights):
            x = x.relu()
    return x


def trained(
    task: Task, keep: Tensor, seeds: Sequence[int], steps: int | None = None
) -> list[Tensor]:
    """Stacked weights of models trained on the kept examples ``[b, N]``; all keep as many.

    ``steps`` ends the run early.
    """
    x, y = task.train
    start = [initial(task, seed) for seed in seeds]
    weights = [torch.stack(parts).requires_grad_() for parts in zip(*start, strict=True)]
    kept = torch.stack([row.nonzero()[:, 0] for row in keep])
    count = kept.shape[1]
    orders = [torch.Generator().manual_seed(seed + 1) for seed in seeds]
    speed = [torch.zeros_like(w) for w in weights]
    done = 0
    for _ in range(task.epochs):
        order = torch.stack([torch.randperm(count, generator=g) for g in orders])
        order = kept.gather(1, order)
        for begin in task.starts(count):
            if done == steps:
                return [w.detach() for w in weights]
            done += 1
            index = order[:, begin : begin + task.batch]
            losses = task.each(forward(weights, x[index]), y[index])
            gradients = torch.autograd.grad(losses.mean(1).sum(), weights)
            with torch.no_grad():
                for w, v, g in zip(weights, speed, gradients, strict=True):
                    v.mul_(task.momentum).add_(g).add_(w, alpha=task.decay)
                    w.sub_(v, alpha=task.lr)
    return [w.detach() for w in weights]


def query_losses(task: Task, weights: Sequence[Tensor]) -> Tensor:
    """Losses of stacked models on the queries, ``[b, Q]``, float64."""
    x, y = task.query
    b = len(weights[0])
    with torch.no_grad():
        output = forward(weights, x.expand(b, *x.shape))
        return task.each(output, y.expand(b, *y.shape)).double()


def model(task: Task, seed: int, steps: int | None = None) -> nn.Sequential:
    """One model that was trained on everything by the same recipe, as a module."""
    every = torch.ones(1, len(task.train[0]), dtype=torch.bool)
    weights = trained(task, every, [seed], steps)
    layers: list[nn.Module] = []
    for i in range(0, len(weights), 2):
        layer = nn.Linear(weights[i].shape[2], weights[i].shape[1])
        with torch.no_grad():
            layer.weight.copy_(weights[i][0])
            layer.bias.copy_(weights[i + 1][0])
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def checkpoints(task: Task, seed: int, count: int = 3) -> list[nn.Sequential]:
    """The model in the middle of each of ``count`` equal parts of its run."""
    return [model(task, seed, round(task.steps * (i + 0.5) / count)) for i in range(count)]
