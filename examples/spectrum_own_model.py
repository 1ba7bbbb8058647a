"""Spectra of one's own model, loss and data, in the shapes that users have.

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


def masked_batches() -> list[dict[str, torch.Tensor]]:
    """Dictionaries of unequal lengths, with 30 % of the labels masked."""
    draw = torch.Generator().manual_seed(0)
    batches = []
    for length in (8, 12, 5):
        ids = torch.randint(32, (4, length), generator=draw)
        labels = torch.where(torch.rand(ids.shape, generator=draw) < 0.3, -100, ids)
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def language_model() -> cl.Risk:
    """A model that returns its own loss: one line, and one more for the terms of its mean."""
    return cl.Risk(
        TinyLanguageModel(),
        loss=lambda output, batch: output["loss"],
        data=masked_batches(),
        weight=lambda batch: (batch["labels"][:, 1:] != -100).sum(),
    )


def language_model_by_logits(model: nn.Module) -> cl.Risk:
    """The same with a loss that curvlib knows, which the GGN and the Fisher matrices need."""
    return cl.Risk(
        model,
        nn.CrossEntropyLoss(),
        data=masked_batches(),
        forward=lambda m, batch: m(**batch)["logits"][:, :-1].mT,
        target=lambda batch: batch["labels"][:, 1:],
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


def describe(name: str, risk: cl.Risk) -> None:
    """Checks a risk and prints its spectra."""
    report = risk.check()
    ends = cl.eigenpairs(cl.hessian(risk), k=4, which="BE", seed=0).values
    top = cl.eigenpairs(cl.ggn(risk), k=1, seed=0).values[0]
    spectrum = cl.density(cl.hessian(risk), steps=20, probes=4, seed=0)
    print(f"{name}: {risk.space.size} parameters, risk {float(risk.value()):.4f}")
    print(f"  checks:       {'passed' if report.ok else report}")
    print(f"  both ends:    {', '.join(f'{value:.4f}' for value in ends.tolist())}")
    print(f"  top of GGN:   {float(top):.4f}")
    print(f"  trace:        {spectrum.trace:.3f} ± {spectrum.trace_stderr:.3f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    describe("classifier", classifier())
    describe("regression", regression())
    own_loss = language_model()
    by_logits = language_model_by_logits(own_loss.model)
    describe("language model", by_logits)

    v = torch.randn(own_loss.space.size)
    assert torch.allclose(cl.hessian(own_loss) @ v, cl.hessian(by_logits) @ v, atol=1e-4)
