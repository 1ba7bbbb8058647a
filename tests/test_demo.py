"""The built-in demonstration is the same network each time, and a good one."""

from __future__ import annotations

import sys

import pytest
import torch

from curvlib.demo import HELD_OUT, digits


def test_one_seed_is_one_network(rng_untouched):
    one, two, other = digits(3, epochs=1), digits(3, epochs=1), digits(4, epochs=1)
    assert one.risk().fingerprint() == two.risk().fingerprint()
    assert one.risk().fingerprint() != other.risk().fingerprint()


def test_it_learns_and_is_left_clean():
    demo = digits()
    assert demo.accuracy > 0.95
    assert len(demo.train[0]) + len(demo.test[0]) == 1797
    assert len(demo.test[0]) == HELD_OUT
    assert not demo.model.training
    assert all(p.grad is None for p in demo.model.parameters())
    assert float(demo.train[0].max()) == 1.0
    with torch.no_grad():
        shares = torch.stack(
            [(demo.model(x).argmax(1) == y).float().mean() for x, y in [demo.test]]
        )
    assert float(shares) == pytest.approx(demo.accuracy)


def test_scikit_learn_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'curvlib\[demo\]'"):
        digits()
