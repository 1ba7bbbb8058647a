"""States of sharded models and optimizers through ``torch.distributed.checkpoint``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn


def written_or_read(model: nn.Module, opt: Any, path: Path, *, writes: bool) -> None:
    """Writes the states of both, or reads them; ranks call it together."""
    state = {"model": model.state_dict(), "opt": opt.state_dict()}
    with warnings.catch_warnings():  # that nothing is initialized, in one process
        warnings.simplefilter("ignore")
        if writes:
            dcp.save(state, checkpoint_id=path)
        else:
            dcp.load(state, checkpoint_id=path)
            model.load_state_dict(state["model"])
            opt.load_state_dict(state["opt"])
