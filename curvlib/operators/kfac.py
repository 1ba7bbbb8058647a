r"""K-FAC and EK-FAC: Kronecker-factored curvature of a risk, by layers.

For each layer with weight (and bias) :math:`W \in \mathbb{R}^{O \times I}` and per-example
gradients :math:`G_n = \sum_t g_{nt} a_{nt}^\top`, the block of the Fisher matrix is approximated by

K-FAC
    :math:`L \otimes R`, with the second moments of gradients and of inputs (Martens and Grosse,
    "Optimizing neural networks with Kronecker-factored approximate curvature", 2015; for
    convolutions Grosse and Martens, 2016; with weight sharing Eschenhagen et al., 2023), and
EK-FAC
    :math:`(Q_L \otimes Q_R) \,\mathrm{diag}(\Lambda)\, (Q_L \otimes Q_R)^\top` with the same
    eigenvectors and :math:`\Lambda = \mathbb{E} (Q_L^\top G Q_R)^{\circ 2}`, the best diagonal in
    that basis in the Frobenius norm (George et al., 2018).

Scale: the operator approximates ``curvlib.fisher(risk, kind)``, hence ``curvlib.ggn(risk)``, of the
same risk, mean (or sum) over loss terms included. The trace of EK-FAC is that of the Fisher matrix
exactly; a single example with a single row makes both exact.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlib.core.files import read_record, write_record
from curvlib.core.kronecker import Kronecker
from curvlib.core.kronecker_blocks import KroneckerBlock
from curvlib.core.linear_cross_entropy import needs_logits
from curvlib.core.ranks.group import together
from curvlib.core.ranks.spread_blocks import SpreadBlock
from curvlib.core.risk import Risk
from curvlib.core.run import Progress
from curvlib.core.space import ParamSelection, ParamSpace
from curvlib.operators.coverage import Coverage, coverage_of
from curvlib.operators.factors.files import (
    loaded_blocks,
    loaded_space,
    saved_blocks,
    saved_space,
)
from curvlib.operators.factors.fit import Fit, fitted
from curvlib.operators.factors.in_step import SteppedFit
from curvlib.operators.factors.prefix import prefix_batches
from curvlib.operators.factors.state import FitSettings, FitState
from curvlib.operators.factors.targets import require_kind
from curvlib.operators.layers.factored import factored_layers
from curvlib.operators.layers.parameters import whole_parameters
from curvlib.operators.layers.row_masks import Mask

_SHARING = ("expand", "reduce")
_REST = ("exclude", "diagonal")
_GATES = ("joint", "separate")


class KFAC(Kronecker):
    """A fitted K-FAC or EK-FAC operator: see :func:`kfac`.

    It answers for any damping, and for the eigenvalues of either method, without fitting again.

    Attributes:
        corrected: Whether its eigenvalues are those of EK-FAC.
        settings: What it was fitted with.
        fitted_on: Digest of the risk that it was fitted on.
    """

    def __init__(
        self,
        blocks: Sequence[KroneckerBlock | SpreadBlock],
        space: ParamSpace,
        *,
        eigenvalues: tuple[Sequence[Tensor], Sequence[Tensor] | None],
        corrected: bool,
        coverage: Coverage,
        settings: dict[str, Any],
        fitted_on: str,
    ) -> None:
        chosen = eigenvalues[1] if corrected else eigenvalues[0]
        if chosen is None:
            raise RuntimeError(
                "there are no corrected eigenvalues, which take a second pass over the data; fit "
                "again with kfac(..., eigen_corrected=True)"
            )
        super().__init__(
            [replace(b, eigenvalues=v) for b, v in zip(blocks, chosen, strict=True)],
            space.total,
            space=space,
            name="EK-FAC" if corrected else "K-FAC",
        )
        self.corrected = corrected
        self.settings = settings
        self.fitted_on = fitted_on
        self._eigenvalues = eigenvalues
        self._coverage = coverage

    def coverage(self) -> Coverage:
        """Which parameters are covered, by type of module, and why the others are not."""
        return self._coverage

    def kronecker(self) -> KFAC:
        """The operator with the eigenvalues of K-FAC."""
        return self._switched(corrected=False)

    def eigen_corrected(self) -> KFAC:
        """The operator with the eigenvalues of EK-FAC.

        Raises:
            RuntimeError: If it was fitted without.
        """
        return self._switched(corrected=True)

    def _switched(self, *, corrected: bool) -> KFAC:
        if corrected == self.corrected:
            return self
        assert self.space is not None
        return KFAC(
            list(self.blocks_of.values()),
            self.space,
            eigenvalues=self._eigenvalues,
            corrected=corrected,
            coverage=self._coverage,
            settings=self.settings,
            fitted_on=self.fitted_on,
        )

    # ------------------------------------------------------------- saving, loading
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the operator to one safetensors file, both eigenvalues included.

        Where it is spread over ranks, all of them call this; it is the file of one process.

        Raises:
            OSError: If the file cannot be written.
        """
        assert self.space is not None
        content: dict[str, Any] = {
            "blocks": saved_blocks(list(self.blocks_of.values()), *self._eigenvalues),
            **saved_space(self.space),
            "corrected": self.corrected,
            "settings": self.settings,
            "fitted_on": self.fitted_on,
            "coverage": {name: getattr(self._coverage, name) for name in vars(self._coverage)},
        }
        group = None if self.spread is None else self.spread.group
        write_record(path, "KFAC", content, group)
        return Path(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        risk: Risk | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> KFAC:
        """Reads an operator that :meth:`save` wrote.

        Args:
            path: The file.
            risk: Checks that the operator is one of this risk: of the same parameters with the
                same values, loss and data. If its parameters are sharded, each rank reads what it
                holds of the operator.
            device: Where tensors go that were not on the CPU when they were written.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, holds something else, or is of another risk.
        """
        spread = None if risk is None else risk.space.spread
        with together(None if spread is None else spread.group, f"reading {str(path)!r}"):
            kind, content = read_record(path, device, stored=spread is not None)
            if kind != "KFAC":
                raise ValueError(f"{str(path)!r} holds a {kind}, expected a KFAC operator")
            space = loaded_space(content, device)
            if risk is not None:
                _require_alike(space, risk)
            if risk is not None and spread is not None:
                space = replace(risk.space, dtype=space.dtype)
            blocks, first, second = loaded_blocks(content["blocks"], space)
        out = cls(
            blocks,
            space,
            eigenvalues=(first, second),
            corrected=content["corrected"],
            coverage=Coverage(**content["coverage"]),
            settings=content["settings"],
            fitted_on=content["fitted_on"],
        )
        if risk is not None:
            out.require_fits(risk)
        return out

    def require_fits(self, risk: Risk) -> None:
        """Raises ValueError unless the operator was fitted on a risk."""
        assert self.space is not None
        _require_alike(self.space, risk)
        if risk.fingerprint() != self.fitted_on:
            raise ValueError(
                f"the {self.name} operator was fitted on another risk: parameters, buffers, loss "
                "or data have other values; fit one with curvlib.kfac(risk), or load it without "
                "risk="
            )


def _require_alike(space: ParamSpace, risk: Risk) -> None:
    mine, others = (
        dict(zip(each.names, each.shapes, strict=True))
        for each in (space.whole(), risk.space.whole())
    )
    if mine != others:
        differ = sorted(n for n in mine.keys() | others.keys() if mine.get(n) != others.get(n))
        raise ValueError(
            f"the operator is of another model: parameters {differ[:6]} differ in name or shape; "
            "fit one with curvlib.kfac(risk)"
        )


def kfac(
    risk: Risk,
    *,
    eigen_corrected: bool = True,
    fisher: str = "type2",
    samples: int = 1,
    seed: int = 0,
    sharing: str = "expand",
    params: ParamSelection = None,
    mask: Mask | None = None,
    rest: str = "exclude",
    dense_norms: bool = False,
    max_side: int = 8192,
    gates: str = "joint",
    prefix: float | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
) -> KFAC:
    """Fits K-FAC and EK-FAC to a risk, in one pass over the data for each, or one for both.

    Covered are the weights and biases of ``Linear``, ``Conv1d``, ``Conv2d``, ``Conv3d`` (groups,
    dilation, every padding), ``Embedding``, ``LayerNorm``, ``RMSNorm``, ``GroupNorm``,
    ``BatchNorm`` (in eval mode) and Hugging Face's ``Conv1D``; of ``LSTM``, ``GRU``, ``RNN`` and
    their cells, through their gates, and of the projections of ``MultiheadAttention``, which are
    run again step by step (:mod:`curvlib.operators.layers.hidden_maps`). Weights that are shared,
    and modules that are called several times, count with the sum of all uses. What is not covered
    is listed with its reason: see :meth:`KFAC.coverage`.

    Args:
        risk: Model, loss, data and parameters. Examples must be independent, which is checked.
            Parameters may be sharded: then each rank holds rows of the operator
            (:mod:`curvlib.core.ranks.spread_blocks`).
        eigen_corrected: Whether to fit corrected eigenvalues, too, in a second pass.
        fisher: ``"type2"``, exact: a backward pass for each of an example's outputs. ``"mc"``: one
            for each of the ``samples``, with targets drawn from the model's own predictions (for
            language models). ``"empirical"``: one, at the true targets; where targets are flattened
            over tokens, the example is the sequence still, not the token.
        samples: Sampled targets of each loss term, for ``"mc"``.
        seed: Of the samples. Targets depend on what an example holds, not on batches or order.
        sharing: How the factors of layers with several rows for each example (tokens, places) are
            made: ``"expand"`` takes rows as independent; ``"reduce"`` sums gradients and averages
            inputs first. Corrected eigenvalues are exact in either.
        params: Parameters, if not all of the risk's.
        mask: Function of a batch that returns which rows count for the factors (padding does not),
            a bool tensor like an attention mask ``[N, T]``.
        rest: What uncovered parameters get: ``"exclude"`` leaves the operator zero there, and its
            relative damping raises; ``"diagonal"`` gives them the Fisher matrix's diagonal.
        dense_norms: Whether blocks of normalization layers are dense, ``[2d, 2d]``, and exact;
            otherwise diagonal.
        max_side: Layers' sides that are longer (vocabularies) have a diagonal factor.
        gates: ``"joint"``: the gates of a recurrent weight have one left factor, ``[4H, 4H]`` for
            an LSTM, the K-FAC of the concatenated weight; ``"separate"``: one each, ``[H, H]``, as
            if gates were uncorrelated, with eigendecompositions that are 16 times cheaper.
        prefix: One pass instead of two: factors, and so the eigenvectors, are those of the first
            batches, of this fraction (float) or number (int) of all; corrected eigenvalues are of
            all data. The data should be in random order. What gets no gradient in the prefix is
            uncovered.
        dtype: Type of the operator: float32 or float64. Default: that of the parameters' vectors.
            Eigendecompositions are in float64.
        progress: Whether to show a bar, or a function: see :data:`curvlib.core.run.Progress`.
        checkpoint: A file to save to, and to continue from where it exists.
        save_every: Seconds between saves.

    Returns:
        The operator, with EK-FAC's eigenvalues if they were fitted.

    Raises:
        TypeError: If an argument is of another type, or the loss owns the head.
        ValueError: If an argument is unknown, no parameter is covered, or examples depend on each
            other.
        FloatingPointError: If inputs of a layer or gradients at its output are not finite; names
            the layer.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(2, 3).double()
        >>> x, y = torch.ones(1, 2).double(), torch.tensor([1])
        >>> risk = cl.Risk(model, torch.nn.CrossEntropyLoss(), (x, y))
        >>> K = kfac(risk)
        >>> bool(torch.allclose(K.to_dense(), cl.ggn(risk).to_dense()))
        True
        >>> K.coverage().percent
        100.0
    """
    if not isinstance(risk, Risk):
        raise TypeError(f"kfac takes a Risk, got {type(risk).__name__}")
    require_kind(risk.loss, fisher, samples)
    if risk.loss.linear is not None:
        raise needs_logits("K-FAC")
    if sharing not in _SHARING:
        raise ValueError(f"sharing= is one of {', '.join(map(repr, _SHARING))}, got {sharing!r}")
    if rest not in _REST:
        raise ValueError(f"rest= is one of {', '.join(map(repr, _REST))}, got {rest!r}")
    if gates not in _GATES:
        raise ValueError(f"gates= is one of {', '.join(map(repr, _GATES))}, got {gates!r}")
    if dtype not in (None, torch.float32, torch.float64):
        raise TypeError(f"dtype= is torch.float32 or torch.float64, got {dtype}")
    if prefix is not None and not eigen_corrected:
        raise ValueError(
            "prefix= leaves all data to the corrected eigenvalues; with eigen_corrected=False fit "
            "to fewer batches instead, kfac(risk.on(batches), ...)"
        )
    if params is not None:
        risk = risk.restrict(params)
    layers, uncovered = factored_layers(
        whole_parameters(risk), dense_norms=dense_norms, max_side=max_side, gates=gates
    )
    _require_some(bool(layers), uncovered)
    settings = FitSettings(
        fisher,
        samples,
        seed,
        sharing,
        eigen_corrected,
        rest,
        dtype or risk.space.dtype,
        gates,
        prefix_batches(risk, prefix),
    )
    kind = Fit if risk.space.spread is None else SteppedFit
    fit = kind(risk, layers, uncovered, settings, mask, safe=checkpoint is not None)
    state = fitted(fit, checkpoint=checkpoint, save_every=save_every, progress=progress)
    _require_some(bool(fit.layers(state)), state.uncovered)
    return _operator(fit, state)


def _operator(fit: Fit, state: FitState) -> KFAC:
    blocks = fit.blocks(state)
    others = fit.rest_blocks(state)
    shared = [block.eigenvalues for block in others]
    corrected = [state.sums[block.name] for block in blocks if block.name in state.sums]
    first = [block.eigenvalues for block in blocks] + shared
    settings = {name: str(value) for name, value in vars(fit.settings).items()}
    return KFAC(
        [*blocks, *others],
        replace(fit.risk.space, dtype=fit.settings.dtype),
        eigenvalues=(first, [*corrected, *shared] if fit.settings.eigen_corrected else None),
        corrected=fit.settings.eigen_corrected,
        coverage=coverage_of(
            fit.risk.model,
            fit.held.params,
            state.uncovered,
            diagonal=fit.settings.rest == "diagonal",
        ),
        settings=settings,
        fitted_on=fit.risk.fingerprint(),
    )


def _require_some(some: bool, uncovered: dict[str, str]) -> None:
    if not some:
        why = "; ".join(f"{name!r}: {reason}" for name, reason in uncovered.items())
        raise ValueError(
            f"no parameter has Kronecker-factored curvature ({why}); select those of Linear, "
            "convolution, Embedding, recurrent, attention or normalization layers with params=, or "
            "use a diagonal operator"
        )
