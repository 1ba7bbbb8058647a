"""Spectra of one's own model, loss and data, in the three shapes that users have.

Also a TARGET of the command line:
    curvlib spectrum examples/spectrum_own_model.py:classifier
Run: python examples/spectrum_own_model.py
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvlib as cl


def classifier() -> cl.Risk:
    """Pairs from a DataLoader, and a loss that PyTorch ships."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=draw)
    y = (x[:, :3].sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 2))
    # 200 examples in batches of 64: the last one is smaller, and counts for what it is.
    return cl.Risk(model, nn.CrossEntropyLoss(), DataLoader(TensorDataset(x, y), batch_size=64))


class TinyLanguageModel(nn.Module):
    """Called and returning as Hugging Face models are: keywords in, an object with .loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.mix = nn.GRU(16, 16, batch_first=True)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, _ = self.mix(self.embed(input_ids))
        logits = hidden @ self.embed.weight.T  # tied weights count once
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def language_model() -> cl.Risk:
    """Dictionaries with unequal masks, and a model that returns its own loss."""
    draw = torch.Generator().manual_seed(0)
    batches = []
    for length in (8, 12, 5):
        ids = torch.randint(32, (4, length), generator=draw)
        labels = torch.where(torch.rand(ids.shape, generator=draw) < 0.3, -100, ids)
        batches.append({"input_ids": ids, "labels": labels})
    return cl.Risk(
        TinyLanguageModel(),
        loss=lambda output, batch: output["loss"],
        data=batches,
        weight=lambda batch: (batch["labels"][:, 1:] != -100).sum(),  # terms of its mean
    )


def regression() -> cl.Risk:
    """One batch in memory, and a loss of one's own that sums."""
    x = torch.linspace(-1, 1, 50)[:, None]
    model = nn.Sequential(nn.Linear(1, 20), nn.Softplus(), nn.Linear(20, 1))
    return cl.Risk(
        model,
        lambda output, target: (output - target).abs().pow(1.5).sum(),
        (x, x.sin()),
        reduction="sum",
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    for make in (classifier, language_model, regression):
        risk = make()
        report = risk.check()
        H, G = cl.hessian(risk), cl.ggn(risk)
        both = cl.eigenpairs(H, k=4, which="BE", seed=0)
        spectrum = cl.density(H, steps=20, probes=4, seed=0)
        print(f"{make.__name__}: {risk.space.size} parameters, risk {float(risk.value()):.4f}")
        print(f"  checks:       {'passed' if report.ok else report}")
        print(f"  both ends:    {[round(v, 4) for v in both.values.tolist()]}")
        print(f"  top of GGN:   {float(cl.eigenpairs(G, k=1, seed=0).values[0]):.4f}")
        print(f"  trace:        {float(spectrum.trace):.3f} ± {float(spectrum.trace_stderr):.3f}")
