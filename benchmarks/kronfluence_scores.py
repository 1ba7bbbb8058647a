"""Scores of kronfluence for the tasks of ``benchmarks/influence.py``."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ensembles import Task
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task as Interface
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Summed(Interface):
    """Losses as its documentation asks for: sums over the batch, sampled targets."""

    def __init__(self, classes: bool) -> None:
        super().__init__()
        self.classes = classes

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The summed loss, at the data's targets or at sampled ones."""
        x, y = batch
        output = model(x)
        if self.classes:
            if sample:
                with torch.no_grad():
                    y = torch.multinomial(output.softmax(-1), 1).flatten()
            return F.cross_entropy(output, y, reduction="sum")
        if sample:  # (o - y)^2 is the likelihood of a Gaussian of variance 1/2
            y = (output + 0.5**0.5 * torch.randn_like(output)).detach()
        return F.mse_loss(output, y, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The queries' loss."""
        return self.compute_train_loss(batch, model)


def scores(model: nn.Module, task: Task, damping: float | None) -> Tensor:
    """``[Q, N]``, with a fit of EK-FAC at its default settings."""
    interface = Summed(task.classes)
    train, query = TensorDataset(*task.train), TensorDataset(*task.query)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        prepared = prepare_model(copy.deepcopy(model), interface)
        analyzer = Analyzer(
            "benchmark",
            prepared,
            interface,
            cpu=True,
            output_dir=str(Path(folder)),
            disable_tqdm=True,
        )
        analyzer.fit_all_factors(
            "factors",
            train,
            per_device_batch_size=256,
            factor_args=FactorArguments(strategy="ekfac"),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query,
            train,
            per_device_query_batch_size=len(query),
            per_device_train_batch_size=256,
            score_args=ScoreArguments(damping_factor=damping),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"].float()
