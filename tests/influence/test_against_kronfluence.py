"""The same numbers as kronfluence, where both are right: plain layers, equal damping.

Its matrices are means over examples, and curvlib's over loss terms: of sequences of ``T`` tokens,
its corrected eigenvalues are ``T`` times as large, and with them the relative damping. The factors
of K-FAC are means over tokens in both.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlib as cl
from curvlib.influence.influence import Influence
from tests.models import Block
from tests.operators.factored import F64, classes, draw, relative, seeded

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),  # the peer's own
]
CE = nn.CrossEntropyLoss()


class _Transformer(nn.Module):
    """Embedding, one block, and a head of its own: logits ``[N, V, T]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.block = Block(8, 2, 12)
        self.head = nn.Linear(8, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens))).transpose(1, 2)


def _mlp() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    model = seeded(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    train = draw(40, 6), classes(40, below=3)
    return model, train, (draw(5, 6, seed=8), classes(5, below=3, seed=8)), ["*"]


def _transformer() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    tokens, asked = classes(24, 6, below=9), classes(4, 6, below=9, seed=8)
    linear = ["block.qkv.*", "block.out.*", "block.mlp.*", "head.*"]
    pair = tokens, tokens.roll(-1, 1)
    return seeded(_Transformer()), pair, (asked, asked.roll(-1, 1)), linear


def _theirs(
    folder: Path,
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor],
    strategy: str,
    damping: float | None,
) -> Tensor:
    """Pairwise scores of kronfluence, ``[Q, N]``."""
    kronfluence = pytest.importorskip("kronfluence")
    from kronfluence.arguments import FactorArguments, ScoreArguments

    class Task(kronfluence.Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            assert not sample
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task = Task()
    prepared = kronfluence.prepare_model(copy.deepcopy(model), task)
    analyzer = kronfluence.Analyzer(
        "test", prepared, task, cpu=True, output_dir=str(folder), disable_tqdm=True
    )
    factors = FactorArguments(
        strategy=strategy,
        use_empirical_fisher=True,
        activation_covariance_dtype=F64,
        gradient_covariance_dtype=F64,
        per_sample_gradient_dtype=F64,
        lambda_dtype=F64,
    )
    dataset = torch.utils.data.TensorDataset
    analyzer.fit_all_factors(
        "factors", dataset(*train), per_device_batch_size=8, factor_args=factors
    )
    scores = ScoreArguments(
        damping_factor=damping,  # None: 0.1 of the mean
        score_dtype=F64,
        precondition_dtype=F64,
        per_sample_gradient_dtype=F64,
    )
    analyzer.compute_pairwise_scores(
        "scores",
        factors_name="factors",
        query_dataset=dataset(*query),
        train_dataset=dataset(*train),
        per_device_query_batch_size=4,
        per_device_train_batch_size=8,
        score_args=scores,
    )
    found: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
    return found.double()


@pytest.mark.parametrize("strategy", ["ekfac", "kfac", "identity", "diagonal"])
@pytest.mark.parametrize("problem", [_mlp, _transformer])
def test_the_same_numbers(problem: Any, strategy: str, tmp_path: Path) -> None:
    model, train, query, params = problem()
    absolute = 0.02 if strategy == "diagonal" else None  # ours is relative to all layers at once
    theirs = _theirs(tmp_path, model, train, query, strategy, absolute)
    terms = train[1].numel() / len(train[1])  # of each example
    scale = terms if strategy in ("ekfac", "diagonal") else 1.0
    risk = cl.Risk(model, CE, train, params=params)
    fit = None if strategy == "identity" else {"fisher": "empirical"}
    damping = None if absolute is None else absolute / scale
    inf = Influence.of(
        risk, strategy, fit=fit, damping=damping, relative=damping is None, progress=False
    )
    assert relative(inf.scores(query).scores / scale, theirs) < 1e-4
