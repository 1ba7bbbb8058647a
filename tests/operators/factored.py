"""Models for Kronecker-factored operators, and dense matrices to compare them with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlib as cl
from curvlib.core.kronecker import Kronecker
from curvlib.operators.gradients import gradients

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, below: int, seed: int = 0) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64, eval mode and with parameters that a seed gives."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, dtype=F64, generator=generator) / fan**0.5)
    return model


def rotated_block(op: Kronecker, name: str, matrix: Tensor) -> Tensor:
    """A block of a dense matrix ``[P, P]`` in the basis of a block, coordinates in its order."""
    block = op.blocks_of[name]
    places = torch.arange(op.shape[0], dtype=F64)[None]
    order = block.gather(places)[0].long().reshape(-1)
    G, O, width = block.eigenvalues.shape
    part = matrix[order][:, order]
    each = []
    for g in range(G):
        left = torch.eye(O, dtype=F64) if block.left is None else block.left[g].contiguous()
        right = torch.eye(width, dtype=F64) if block.right is None else block.right[g].contiguous()
        each.append(torch.kron(left, right))
    Q = torch.block_diag(*each)
    return Q.T @ part @ Q


def empirical(risk: cl.Risk) -> Tensor:
    """The empirical Fisher matrix, from per-example gradients by autograd."""
    rows = torch.cat(list(gradients(risk)))
    return rows.T @ rows / risk.weight()


#: Dense Fisher matrices, without any of K-FAC's code.
FISHERS: dict[str, Any] = {
    "type2": lambda risk: cl.fisher(risk, "type2").to_dense(),
    "empirical": empirical,
}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def coordinates(risk: cl.Risk, name: str) -> tuple[int, int]:
    where = risk.space.slice(name)
    return where.start, where.stop


class Language(nn.Module):
    """Tokens to logits; one module is called twice, and the head may share the embedding."""

    def __init__(self, *, tied: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4, padding_idx=padding)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        x = x + torch.tanh(self.mix(self.norm(x))).cumsum(1)
        return self.head(self.mix(x)).transpose(1, 2)


class TimeFirst(nn.Module):
    """Transposes examples and time before its linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))


class Experts(nn.Module):
    """Routes each token to one of three experts; one of them sees no token at all."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = (x[..., 0] > 0) == bool(i) if i < 2 else torch.zeros(x.shape[:-1]).bool()
            if bool(chosen.any()):
                out[chosen] = expert(x[chosen])
        return self.head(out.sum(1).tanh())


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2: weights ``[in, out]``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


class OwnRMSNorm(nn.Module):
    """An RMSNorm of the kind that language models bring along (Gemma's: 1 + weight)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


class Twins(nn.Module):
    """Two linear layers that share a weight, but not the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Hidden(nn.Module):
    """Uses the weight of a layer by a function, too, where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.linear(torch.tanh(self.a(x)), self.a.weight))


TOKENS = classes(5, 4, below=7)
IMAGES = draw(4, 4, 5, 5)
LABELS = classes(6, below=3)
SEQUENCES = draw(4, 4, 3)  # as many time steps as examples


def _flat(*layers: nn.Module, out: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(out))


CE = nn.CrossEntropyLoss()
#: Model, loss and data: each in two unequal batches.
PROBLEMS: dict[str, tuple[Any, Any, tuple[Tensor, Tensor]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)),
        CE,
        (draw(6, 4), LABELS),
    ),
    "mse, no bias": (
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(inplace=True), nn.Linear(5, 2)),
        nn.MSELoss(),
        (draw(6, 4), draw(6, 2, seed=1)),
    ),
    "mse of a vector": (
        lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)),
        nn.MSELoss(reduction="sum"),
        (draw(6, 4), draw(6, seed=1)),
    ),
    "bce": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.RMSNorm(3), nn.SiLU(), nn.Linear(3, 2)),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 3.0], dtype=F64)),
        (draw(6, 4), (draw(6, 2, seed=1) > 0).double()),
    ),
    "nll, class weights": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)),
        nn.NLLLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=F64)),
        (draw(6, 4), LABELS),
    ),
    "grouped convolutions": (
        lambda: _flat(
            nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"),
            nn.ReLU(inplace=True),
            nn.GroupNorm(2, 6),
            nn.Conv2d(6, 6, 2, groups=6, dilation=2, bias=False),
            nn.AvgPool2d(3),
            out=3,
        ),
        CE,
        (IMAGES, LABELS[:4]),
    ),
    "1d, strided, same": (
        lambda: _flat(
            nn.Conv1d(3, 4, 3, padding="same", dilation=2), nn.Tanh(), nn.Conv1d(4, 2, 2, 2), out=3
        ),
        CE,
        (draw(4, 3, 4), LABELS[:4]),
    ),
    "3d, batch norm": (
        lambda: _flat(nn.Conv3d(1, 2, 2, padding=(1, 0, 0)), nn.BatchNorm3d(2), nn.Tanh(), out=3),
        CE,
        (draw(4, 1, 2, 3, 2), LABELS[:4]),
    ),
    "language model": (Language, CE, (TOKENS, TOKENS.roll(1, 1))),
    "tied, masked": (
        lambda: Language(tied=True, padding=0),
        nn.CrossEntropyLoss(ignore_index=0),
        (TOKENS, TOKENS.roll(1, 1)),
    ),
    "time first": (TimeFirst, CE, (SEQUENCES, LABELS[:4] % 2)),
    "experts": (Experts, CE, (SEQUENCES, LABELS[:4] % 2)),
    "conv1d of gpt-2": (
        lambda: nn.Sequential(Conv1D(5, 3), nn.Tanh(), OwnRMSNorm(5), nn.Linear(5, 2)),
        nn.MSELoss(),
        (SEQUENCES, draw(4, 4, 2)),
    ),
    "shared weight": (Twins, nn.MSELoss(), (draw(5, 3), draw(5, 3, seed=1))),
}


def problem(name: str, *, batches: bool = True, **settings: Any) -> cl.Risk:
    make, loss, (x, y) = PROBLEMS[name]
    model = make()
    with torch.no_grad():
        if any(isinstance(m, nn.LazyLinear) for m in model.modules()):
            model.float()(x.float())
    model = seeded(model)
    cut = len(x) - 1
    data = [(x[:cut], y[:cut]), (x[cut:], y[cut:])] if batches else (x, y)
    return cl.Risk(model, loss, data, **settings)
