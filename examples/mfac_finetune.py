"""Fine-tuning with M-FAC: directions from the inverse Fisher matrix of the last 64 gradients.

A network learns digits that lie on their side, and is then fine-tuned on 400 upright ones with SGD
with momentum, AdamW and M-FAC in three forms: with directions as long as gradients (the default),
with the length of the natural gradient (at most one in the Fisher metric), and with a window that
stores 5 % of each gradient. All get the same grid size of learning rates, the same batches, and a
rate that falls to zero. The best rate is the one with the lowest median loss on digits that are
held out for that; the table and curves show losses at that rate and accuracy on a third part.
Run: python examples/mfac_finetune.py
"""

import time
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from curvlib.optim.mfac import MFAC

torch.set_num_threads(1)  # for so small a network more are slower
SEEDS, EPOCHS, BATCH = 5, 12, 25

pixels, digits = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
pixels = pixels.float() / 16
order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
old, tuning, held, test = order.split([600, 400, 300, 497])

OPTIMIZERS = {
    "SGD, momentum": (
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
        [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0],
    ),
    "AdamW": (
        lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.0),
        [1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1],
    ),
    "M-FAC": (
        lambda p, lr: MFAC(p, lr, size=64),
        [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0],
    ),
    "M-FAC, natural length": (
        lambda p, lr: MFAC(p, lr, size=64, norm_matching=False, trust=1.0),
        [1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1],
    ),
    "M-FAC, 5 % of entries": (
        lambda p, lr: MFAC(p, lr, size=64, compression=0.05),
        [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0],
    ),
}


def pretrained(seed):
    """A network that has learnt digits turned by 90 degrees."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 24), nn.Tanh())
    model.append(nn.Linear(24, 10))
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.0 if p.ndim == 1 else p.shape[1] ** -0.5
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    turned = pixels[old].view(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)
    opt = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(150):
        opt.zero_grad()
        F.cross_entropy(model(turned), digits[old]).backward()
        opt.step()
    return model.state_dict()


def fine_tuned(weights, build, lr, seed):
    """Training losses by epoch, the loss on held-out digits, and the accuracy on the test part."""
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 24), nn.Tanh())
    model.append(nn.Linear(24, 10))
    model.load_state_dict(weights)
    opt = build(model.parameters(), lr)
    total = EPOCHS * len(tuning) // BATCH
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 - t / total)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(EPOCHS):
        for batch in tuning[torch.randperm(len(tuning), generator=generator)].split(BATCH):
            opt.zero_grad()
            F.cross_entropy(model(pixels[batch]), digits[batch]).backward()
            opt.step()
            scheduler.step()
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(pixels[tuning]), digits[tuning])))
    with torch.no_grad():
        chosen_by = float(F.cross_entropy(model(pixels[held]), digits[held]))
        accuracy = float((model(pixels[test]).argmax(1) == digits[test]).float().mean())
    return losses, chosen_by, accuracy


starts = [pretrained(seed) for seed in range(SEEDS)]
figure, (left, right) = plt.subplots(1, 2, figsize=(10.0, 4.2), layout="constrained")
print(f"{'':24}{'best lr':>8}{'training loss':>26}{'held out':>10}{'test':>8}{'ms/step':>9}")
for i, (name, (build, rates)) in enumerate(OPTIMIZERS.items()):
    begun = time.perf_counter()
    runs = [[fine_tuned(starts[s], build, lr, s) for s in range(SEEDS)] for lr in rates]
    spent = (time.perf_counter() - begun) / (len(rates) * SEEDS * EPOCHS * len(tuning) / BATCH)
    held_out = np.array([[run[1] for run in each] for each in runs])
    held_out[~np.isfinite(held_out)] = np.inf
    best = int(np.median(held_out, 1).argmin())
    losses = np.array([run[0] for run in runs[best]])
    final, accuracy = losses[:, -1], np.median([run[2] for run in runs[best]])
    ranged = f"{np.median(final):.4f} ({final.min():.4f}-{final.max():.4f})"
    print(
        f"{name:24}{rates[best]:8g}{ranged:>26}{np.median(held_out[best]):10.3f}"
        f"{100 * accuracy:7.1f}%{1e3 * spent:9.2f}"
    )
    epochs = np.arange(1, EPOCHS + 1)
    style = {"color": f"C{i}", "ls": "-" if i < 3 else "--" if i == 3 else ":"}
    left.plot(epochs, np.median(losses, 0), label=f"{name}, lr {rates[best]:g}", **style)
    left.fill_between(epochs, losses.min(0), losses.max(0), alpha=0.12, color=f"C{i}", lw=0)
    right.plot(rates, np.median(held_out, 1), marker=".", label=name, **style)
left.set(yscale="log", xlabel="epoch", ylabel="training loss (median and range of 5 seeds)")
left.set_title("Fine-tuning on 400 upright digits, best rate of 7", size=10)
right.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="loss on held-out digits")
right.set_ylim(top=3.0)
right.set_yticks([0.3, 0.5, 1.0, 2.0, 3.0], ["0.3", "0.5", "1", "2", "3"], minor=False)
right.yaxis.set_minor_locator(mpl.ticker.NullLocator())
right.set_title("How much the learning rate matters", size=10)
left.legend(frameon=False, fontsize=8)
for ax in (left, right):
    ax.grid(color="0.92", lw=0.6)

folder = Path("curvlib-out")
folder.mkdir(exist_ok=True)
figure.savefig(folder / "mfac_finetune.png", dpi=200)
print(f"wrote {folder / 'mfac_finetune.png'}")
