"""Small networks that between them use every construct curvature can trip over.

All have at most about 200 parameters, smooth activations unless said otherwise, and affine
parameters away from their initial ones and zeros, so that no term of a derivative vanishes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint


def mlp(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


def log_probabilities(body: nn.Module) -> nn.Module:
    return nn.Sequential(body, nn.LogSoftmax(dim=1))


def normalized(norm: nn.Module) -> nn.Module:
    """A normalization of 4 features between two linear layers."""
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 3))


def convolution(norm: nn.Module) -> nn.Module:
    """A normalization of 4 channels after a convolution; inputs ``[N, 1, 4, 4]``."""
    head = nn.Linear(4, 3)
    conv = nn.Conv2d(1, 4, 3, padding=1)
    return nn.Sequential(conv, norm, nn.GELU(), nn.AvgPool2d(4), nn.Flatten(), head)


def kinked() -> nn.Module:
    """ReLU in place and max-pooling: no second derivative of their own, kinks all the same."""
    conv = nn.Conv2d(1, 3, 3, padding=1)
    return nn.Sequential(
        conv, nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )


def convolutions() -> nn.Module:
    """Grouped, depthwise, strided, dilated and transposed convolutions, and one of 1 x 1."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.SiLU(),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False),
        nn.Softplus(),
        nn.Conv2d(4, 2, 1, stride=2),
        nn.Tanh(),
        nn.ConvTranspose2d(2, 2, 2, stride=2, groups=2),
        nn.Mish(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` or a bare ``F.scaled_dot_product_attention``, then a mean."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(4, 12)
        else:
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            n, t, _ = x.shape
            q, k, v = self.qkv(x).view(n, t, 3, 2, 2).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            mixed = mixed.transpose(1, 2).reshape(n, t, 4)
        else:
            mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(torch.tanh(mixed).mean(1))


class EncoderLayer(nn.Module):
    """``nn.TransformerEncoderLayer`` (which has a fused path of its own in eval mode)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            4, 2, dim_feedforward=5, dropout=0.0, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Recurrent(nn.Module):
    """A recurrent network that is read out at its last step."""

    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(cell.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Bag(nn.Module):
    """An embedding, one row of which no example uses, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)).sum(1))


class Twice(nn.Module):
    """One linear layer that is called twice, and a bilinear product of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.shared(x))
        return self.head(first * self.shared(first))


class Scalars(nn.Module):
    """Zero-dimensional parameters: a temperature, and one that the loss does not touch."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.body = nn.Linear(3, 3)
        self.unused = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x)) / self.temperature


class Untouched(nn.Module):
    """Parameters without effect: a whole layer, one whose output is dropped; and linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.idle = nn.Linear(2, 2)
        self.dropped = nn.Linear(3, 3)
        self.offset = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.dropped(x)
        return torch.sin(self.first(x)) + self.offset


class Checkpointed(nn.Module):
    """Activations are recomputed in the backward pass (``plain`` is the same function)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(checkpoint(self.body, x, use_reentrant=False))

    def plain(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))


class WeightNormed(nn.Module):
    """torch's own weight normalization, whose second derivative is wrong, and its definition."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = weight_norm(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.layer(x))

    def plain(self, x: Tensor) -> Tensor:
        g = self.layer.parametrizations.weight.original0
        v = self.layer.parametrizations.weight.original1
        weight = g * v / v.square().sum(1, keepdim=True).sqrt()
        return torch.sin(F.linear(x, weight, self.layer.bias))


class Block(nn.Module):
    """A pre-norm transformer block with native affine LayerNorm and fused causal attention."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, c))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A language model with tied embeddings; ``[N, T]`` tokens to ``[N, T, V]`` logits."""

    def __init__(
        self, vocabulary: int, length: int, width: int, heads: int, hidden: int, depth: int = 1
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


@dataclass
class ModelOutput:
    """What a Hugging Face model returns, in short."""

    logits: Tensor
    loss: Tensor | None = None


class HuggingFaceLike(nn.Module):
    """Takes ``**batch`` and returns an object with logits and its own mean loss."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT(vocabulary=5, length=4, width=4, heads=2, hidden=3)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> ModelOutput:
        logits = self.gpt(input_ids)
        if attention_mask is not None:
            logits = logits * attention_mask[..., None]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return ModelOutput(logits, loss)


def shake(model: nn.Module) -> nn.Module:
    """Moves affine parameters and running statistics off their initial ones and zeros."""
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__:
                for p in module.parameters(recurse=False):
                    p.add_(0.3 * torch.randn_like(p))
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model
