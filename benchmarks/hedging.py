"""Deep hedging: Heston paths, an LSTM that holds shares, and the risk of what is left.

The task of ``examples/kfac_lstm_hedging.py``, which is a script of its own, in functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

DAYS, SPOT, COST, AVERSION = 30, 100.0, 0.002, 1.0


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


def risk(shares: Tensor, prices: Tensor) -> Tensor:
    """Mean-variance risk of the hedged short call at its end, without its premium."""
    trades = torch.diff(shares, dim=1, prepend=torch.zeros(len(shares), 1))
    gains = (shares * prices.diff(dim=1)).sum(1)
    costs = COST * ((trades.abs() * prices[:, :-1]).sum(1) + shares[:, -1] * prices[:, -1])
    result = gains - costs - (prices[:, -1] - SPOT).clamp(min=0.0)
    return 0.5 * AVERSION * result.var() - result.mean()
