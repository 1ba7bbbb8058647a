"""Deep hedging of a short call with an LSTM: K-FAC through its gates, AdamW and SGD, tuned alike.

Paths follow the Heston model. Every day the network sees moneyness, time and volatility, and
answers with how many shares to hold; trading costs 0.2 % of what is traded. It is trained to
minimize a mean-variance risk of the final profit and loss, costs included ("Deep hedging": Buehler,
Gonon, Teichmann and Wood, 2019). Each optimizer gets four learning rates on a log grid with one
seed; with the best it runs again from two other seeds.
Run: python examples/kfac_lstm_hedging.py
"""

import math
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from curvlib.optim.kfac import KFAC

DAYS, SPOT, COST, AVERSION = 30, 100.0, 0.002, 1.0
STEPS, BATCH, EVERY = 150, 256, 10
GRIDS = {
    "K-FAC": [0.01, 0.03, 0.1, 0.3],
    "AdamW": [0.01, 0.03, 0.1, 0.3],
    "SGD, momentum 0.9": [0.03, 0.1, 0.3, 1.0],
}


def heston(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prices and variances ``[count, DAYS + 1]``, by the full-truncation Euler scheme."""
    speed, mean, vol_of_vol, correlation, dt = 2.0, 0.04, 0.6, -0.7, 1.0 / 252.0
    log_price = torch.full((count,), math.log(SPOT))
    variance = torch.full((count,), mean)
    prices, variances = [log_price.exp()], [variance]
    for _ in range(DAYS):
        first, other = torch.randn(2, count, generator=generator).unbind()
        second = correlation * first + math.sqrt(1.0 - correlation**2) * other
        now = variance.clamp(min=0.0)  # full truncation: in the drift and in the diffusion
        log_price = log_price - 0.5 * now * dt + (now * dt).sqrt() * first
        variance = variance + speed * (mean - now) * dt + vol_of_vol * (now * dt).sqrt() * second
        prices.append(log_price.exp())
        variances.append(variance.clamp(min=0.0))
    return torch.stack(prices, 1), torch.stack(variances, 1)


def features(prices: Tensor, variances: Tensor) -> Tensor:
    """What is known on each day, about of unit size, ``[count, DAYS, 3]``."""
    left = torch.linspace(1.0, 1.0 / DAYS, DAYS).expand(len(prices), DAYS)
    moneyness = 10.0 * (prices[:, :-1] / SPOT).log()
    return torch.stack([moneyness, left, 5.0 * variances[:, :-1].sqrt()], -1)


class Hedge(nn.Module):
    """Shares to hold on each day, ``[count, DAYS]``."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.memory = nn.LSTM(3, hidden, batch_first=True)
        self.shares = nn.Linear(hidden, 1)

    def forward(self, known: Tensor) -> Tensor:
        return self.shares(self.memory(known)[0])[..., 0].sigmoid()


def profit(shares: Tensor, prices: Tensor) -> Tensor:
    """Final profit and loss of the hedged short call, without its premium, ``[count]``."""
    trades = torch.diff(shares, dim=1, prepend=torch.zeros(len(shares), 1))
    gains = (shares * prices.diff(dim=1)).sum(1)
    costs = COST * ((trades.abs() * prices[:, :-1]).sum(1) + shares[:, -1] * prices[:, -1])
    return gains - costs - (prices[:, -1] - SPOT).clamp(min=0.0)


def risk(result: Tensor) -> Tensor:
    """Mean-variance risk: about the premium that makes the position as good as none."""
    return 0.5 * AVERSION * result.var() - result.mean()


def black_scholes(prices: Tensor, variances: Tensor) -> Tensor:
    """The textbook hedge ratio, with the volatility of the day."""
    years = torch.arange(DAYS, 0, -1) / 252.0
    deviation = (variances[:, :-1].clamp(min=1e-6) * years).sqrt()
    return torch.special.ndtr((prices[:, :-1] / SPOT).log() / deviation + 0.5 * deviation)


def optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """One of the three; K-FAC averages factors every 2 steps, and decomposes them every 10."""
    if name == "K-FAC":
        more = {"factor_interval": 2, "inverse_interval": 10}
        return KFAC(model, lr=lr, damping=0.1, kl_clip=0.03, **more)
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


class Run(NamedTuple):
    """Held-out risks every few steps, seconds of training, and the model."""

    curve: list[float]
    seconds: float
    model: Hedge


def train(name: str, lr: float, seed: int) -> Run:
    """Trains a new model; batches and first parameters depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Hedge()
    opt, order = optimizer(name, model, lr), torch.Generator().manual_seed(seed)
    curve, seconds = [], 0.0
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                curve.append(float(risk(profit(model(known_test), test[0]))))
        start = time.perf_counter()
        chosen = torch.randint(len(known), (BATCH,), generator=order)
        opt.zero_grad()
        risk(profit(model(known[chosen]), paths[0][chosen])).backward()
        opt.step()
        seconds += time.perf_counter() - start
    return Run(curve, seconds, model)


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    paths, test = heston(8192, generator), heston(8192, generator)
    known, known_test = features(*paths), features(*test)
    unhedged = profit(torch.zeros(len(test[0]), DAYS), test[0])
    textbook = profit(black_scholes(*test), test[0])
    print(f"no hedge {float(risk(unhedged)):.3f}, Black-Scholes hedge {float(risk(textbook)):.3f}")
    print(KFAC(Hedge()).coverage())

    runs: dict[str, list[Run]] = {}
    print(f"\n{'optimizer':18} {'held-out risk by learning rate':44} best: 3 seeds   ms a step")
    for name, grid in GRIDS.items():
        tried = {lr: train(name, lr, seed=0) for lr in grid}
        best = min(grid, key=lambda lr: tried[lr].curve[-1])
        runs[name] = [tried[best], *(train(name, best, seed) for seed in (1, 2))]
        ends = sorted(run.curve[-1] for run in runs[name])
        each = "  ".join(f"{lr:g}: {run.curve[-1]:.3f}" for lr, run in tried.items())
        cost = 1000.0 * min(run.seconds for run in runs[name]) / STEPS
        print(f"{name:18} {each:44} {ends[1]:.3f} ({ends[0]:.3f} to {ends[2]:.3f})  {cost:.0f}")

    target = sorted(run.curve[-1] for run in runs["AdamW"])[1]
    for name, own in runs.items():
        middle = torch.tensor([run.curve for run in own]).median(0).values
        reached = [i * EVERY for i, value in enumerate(middle.tolist()) if value <= target]
        print(
            f"{name}: as good as AdamW at its end after {reached[0] if reached else 'more'} steps"
        )

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    steps = torch.arange(0, STEPS + 1, EVERY)
    for name, own in runs.items():
        curves = torch.tensor([run.curve for run in own])
        (line,) = left.plot(steps, curves.median(0).values, label=name)
        left.fill_between(steps, curves.amin(0), curves.amax(0), alpha=0.2, color=line.get_color())
    left.axhline(float(risk(textbook)), color="black", linestyle=":", label="Black-Scholes hedge")
    left.set(xlabel="step", ylabel="held-out risk ($)", ylim=(3.34, 3.76))
    left.set_title("Median and range of 3 seeds, best learning rates", loc="left")
    left.legend()
    with torch.no_grad():
        hedged = {name: profit(own[0].model(known_test), test[0]) for name, own in runs.items()}
    bins = torch.linspace(-6.0, 0.0, 49).tolist()
    for name, result in hedged.items():
        right.hist(result.tolist(), bins=bins, histtype="step", label=name)
    right.hist(
        textbook.tolist(), bins=bins, histtype="step", color="black", ls=":", label="Black-Scholes"
    )
    right.set(xlabel="final profit and loss without premium ($)", ylabel="paths")
    right.set_title("Held-out paths", loc="left")
    right.legend(loc="upper left")
    folder = Path("curvlib-out")
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "kfac_lstm_hedging.png", dpi=200)
    print(f"wrote {folder / 'kfac_lstm_hedging.png'}")
