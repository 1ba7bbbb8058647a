"""What every test has: markers that skip themselves, one thread and one seed for steady numbers."""

from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytest
import torch

SEED = int(os.environ.get("CURVLIB_TEST_SEED", "0"))


class Seeded:
    """Global generators begin every module and test alike, doctests too, in whatever order.

    Tests that take numbers of a seed of their own do not read them. Those that do not must pass
    with any: try ``CURVLIB_TEST_SEED=1 make test``.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collectstart(self) -> None:
        seed()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        seed()


def seed() -> None:
    """Seeds what tests may draw from."""
    torch.manual_seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - the generator of those that name none
    random.seed(SEED)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Seeded())
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start background jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C is tested


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def rng_untouched():
    """Fails a test during which anything drew from torch's global generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global random state was touched"
