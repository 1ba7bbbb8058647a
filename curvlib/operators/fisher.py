r"""Fisher information matrices of a risk: type-2, Monte-Carlo and empirical.

The loss terms are read as negative log-likelihoods of targets given outputs (categorical for
cross-entropy and NLL, Gaussian of variance 1/2 for MSE, Bernoulli for BCE-with-logits), with
scores :math:`s = \nabla_f \ell` and Jacobians :math:`J` of the outputs:

type-2
    :math:`\frac1W \sum_t a_t J_t^T \, \mathbb{E}_{y \sim p(\cdot | f_t)}[s s^T] \, J_t`, the exact
    expectation over the model's own predictions. It equals the GGN for these losses.
Monte-Carlo
    The same with the mean over ``samples`` drawn targets; unbiased.
empirical
    :math:`\frac1W \sum_n g_n g_n^T` with the gradient :math:`g_n` of the summed (and weighted)
    loss terms of example ``n`` at its true targets. It is not the Fisher matrix at all away from a
    perfect model (Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation",
    2019), and is named so that nobody mistakes it.

Martens, "New insights and perspectives on the natural gradient method", 2020, section 9, compares
them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.chunked_logits import Logits
from curvlib.core.operator import LinearOperator
from curvlib.core.random import generator_of
from curvlib.core.risk import Risk
from curvlib.operators.gauss_newton import gauss_newton
from curvlib.operators.head_curvature import (
    ChunkCurvature,
    empirical_chunks,
    expected_chunks,
    sampled_chunks,
)
from curvlib.operators.hessian import MEMORY
from curvlib.operators.labels import SampledLabels, terms_before
from curvlib.operators.loss_hessian import (
    Curvature,
    class_axis,
    expected_hessian,
    term_weights,
)

_KINDS = ("type2", "mc", "empirical")


def fisher(
    risk: Risk, kind: str, *, samples: int = 1, seed: int = 0, memory: int = MEMORY
) -> LinearOperator:
    """A Fisher information matrix of a risk, of the kind that is named.

    Args:
        risk: Model, loss, data and parameters.
        kind: ``"type2"`` (exact expectation), ``"mc"`` (sampled targets), or ``"empirical"`` (true
            targets, one rank-one term per example). An example is an entry of the output's first
            axis.
        samples: Sampled targets for each loss term, for ``"mc"``.
        seed: Of the samples. Targets are drawn in the order of the data, so that the way it is
            split into batches, or over the ranks of a process group, does not change the operator.
        memory: Bytes that kept graphs, and graphs of columns done at once, may take.

    Returns:
        A positive semi-definite operator ``[P, P]``, of the risk's mean (or sum) over loss terms.

    Raises:
        ValueError: If ``kind`` is unknown, ``samples`` is not positive, or the loss is no
            likelihood that curvlib knows (``"type2"`` and ``"mc"``).

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(2, 3)
        >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 2, 0])
        >>> risk = cl.Risk(model, torch.nn.CrossEntropyLoss(), (x, y))
        >>> F, G = cl.fisher(risk, "type2"), cl.ggn(risk)
        >>> bool(torch.allclose(F.to_dense(), G.to_dense()))
        True
    """
    if kind not in _KINDS:
        raise ValueError(f"kind= is one of {', '.join(map(repr, _KINDS))}, got {kind!r}")
    if samples < 1:
        raise ValueError(f"samples= needs at least one sampled target, got {samples}")
    if kind != "empirical" and not risk.loss.known:
        raise ValueError(
            f"the loss {risk.loss.describe()} is no likelihood that curvlib knows, so there is no "
            f"{kind} Fisher; use cross-entropy, NLL, MSE or BCE-with-logits, curvlib.ggn, or "
            "kind='empirical'"
        )
    curvature: Callable[[Batch, Tensor], Curvature]
    head: Callable[[Batch, Logits], ChunkCurvature]
    before: Callable[[Risk], None] | None = None
    if kind == "empirical":
        name, curvature, head = "empirical Fisher", _empirical, empirical_chunks
    elif kind == "type2":
        name, curvature, head = "type-2 Fisher", _type2, expected_chunks
    else:
        sampled = _MonteCarlo(samples, seed)
        before = sampled.prepare
        name, curvature, head = "Monte-Carlo Fisher", sampled, sampled.chunks
    return gauss_newton(
        risk,
        curvature,
        head=head,
        before=before,
        name=name,
        psd=True,
        memory=memory,
        identity=f"{samples}|{seed}" if kind == "mc" else "",
        rebuild=lambda other: fisher(other, kind, samples=samples, seed=seed, memory=memory),
    )


def _type2(batch: Batch, output: Tensor) -> Curvature:
    return expected_hessian(batch.risk.loss, output, batch.target)


def _empirical(batch: Batch, output: Tensor) -> Curvature:
    leaf = output.detach().requires_grad_()
    value = batch.total(leaf)
    if not value.requires_grad:
        return torch.zeros_like
    (score,) = torch.autograd.grad(value, leaf)
    # one example: the output's first axis, but for the output of a single example
    single = output.ndim == 0 or (batch.risk.loss.categorical and output.ndim == 1)
    rows = score.reshape(1 if single else score.shape[0], -1)

    def product(columns: Tensor) -> Tensor:
        flat = columns.reshape(columns.shape[0], *rows.shape)
        return (rows * (flat * rows).sum(-1, keepdim=True)).reshape(columns.shape)

    return product


class _MonteCarlo:
    """Draws targets batch after batch: each pass over the data draws the same.

    In a process group, a rank passes over the numbers of the ranks before it.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self.labels = SampledLabels(samples, generator_of(None, seed))
        self.samples = samples
        self._start: Tensor | None = None  # state of the generator at the shard's first batch

    def prepare(self, risk: Risk) -> None:
        """Called before each pass."""
        if self._start is None:
            self.labels.skip(terms_before(risk))
            self._start = self.labels.generator.get_state()
        self.labels.generator.set_state(self._start)

    def chunks(self, batch: Batch, logits: Logits) -> ChunkCurvature:
        """The same for a loss that owns the head."""
        return sampled_chunks(batch, logits, self.labels)

    def __call__(self, batch: Batch, output: Tensor) -> Curvature:
        loss = batch.risk.loss
        readable = loss.readable(output, batch.target)
        scores = self.labels.scores(loss, readable)
        weight = term_weights(loss, readable, batch.target) / self.samples
        if not loss.categorical:  # entries of the target are independent given the output
            diagonal = scores.square().sum(0) * weight
            return lambda columns: columns * diagonal
        axis = class_axis(output) + 1

        def product(columns: Tensor) -> Tensor:
            out = torch.zeros_like(columns, dtype=scores.dtype)
            for score in scores:
                out += score * (columns * score).sum(axis, keepdim=True)
            return out * weight

        return product
