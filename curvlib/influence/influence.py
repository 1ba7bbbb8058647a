r"""Influence functions: which training examples a prediction rests on.

The score of training example ``n`` for query ``q`` is

.. math:: s_{qn} = g_q^\top (H + \lambda I)^{-1} g_n

with the gradients of the *summed* loss terms of each and the curvature ``H`` of the training risk
(Koh and Liang, "Understanding black-box predictions via influence functions", 2017, equation 2;
with EK-FAC: Grosse et al., "Studying large language model generalization with influence
functions", 2023, equation 30). It is positive for proponents.

In nats: at a minimum of :math:`R(\theta) = \frac1W \sum_n L_n(\theta)`, with the total weight ``W``
of the loss terms, leaving out example ``n`` moves the parameters by
:math:`+\frac1W H^{-1} g_n` to first order, and so raises the query's loss by :math:`s_{qn} / W`
(``W = 1`` for losses with ``reduction="sum"``).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.core.digest import digest
from curvlib.core.operator import LinearOperator
from curvlib.core.ranks.group import together
from curvlib.core.risk import Risk
from curvlib.core.run import Progress
from curvlib.core.space import ParamSelection
from curvlib.influence.arguments import (
    numbers,
    opponents,
    require_enough,
    require_normalization,
    require_unit,
)
from curvlib.influence.directions import Directions, direction_parts
from curvlib.influence.kept import top_influence
from curvlib.influence.parts import Part, own_part, scanned
from curvlib.influence.preconditioner import preconditioner, required_damping
from curvlib.influence.queries import Queries, query_risk, risk_on
from curvlib.influence.result import SIGN, InfluenceScores, SelfInfluence, TopInfluence
from curvlib.influence.scan import Scan, inverse
from curvlib.influence.self_scores import self_products
from curvlib.operators.scores.known_examples import known_examples


class Influence:
    """Influence of training examples on queries.

    Args:
        model: The model; left as it is. Put it into ``eval()`` mode.
        loss: Its loss: see :class:`curvlib.Risk`.
        train_data: Batches that can be iterated again, in the same order: not shuffled.
        curvature: ``"ekfac"`` (the default), ``"kfac"``, ``"diagonal"``, ``"identity"``, or an
            operator: a fitted :class:`curvlib.KFAC` of the same model and data, or any with as many
            rows as there are parameters (by its ``solve``, else by conjugate gradients).
        params: Parameters, if not all.
        forward: As of :class:`curvlib.Risk`, as are
        target: this,
        weight: this,
        reduction: this and
        device: this.
        damping: Default: 0.1, relative; for operators with a damping of their own none on top.
        relative: Whether ``damping`` is a fraction of the mean eigenvalue (of each block of a
            K-FAC, of the whole of others) or absolute.
        unit: ``"inner_product"`` or ``"nats"``.
        fit: Settings of :func:`curvlib.kfac` (or ``fisher=``, ``samples=``, ``seed=`` of the
            diagonal). By default, the Fisher matrix is exact (``"type2"``) where an example has at
            most 64 outputs, else sampled (``"mc"``), and parameters outside of layers that have
            Kronecker factors have a diagonal.
        progress: Whether to show bars: see :data:`curvlib.core.run.Progress`.

    Attributes:
        risk: The training data's risk, of the parameters that scores are about. Those that no
            gradient of the training data reaches (a layer that is never called, an expert that
            gets no token) are left out: they change no score.
        preconditioner: The damped inverse curvature.
        unit: The unit of scores.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is unknown, no layer has Kronecker factors, or an operator is of
            another model or other data.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0], [2.0], [-1.0]]).double()
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> loss = torch.nn.MSELoss()
        >>> inf = Influence(model, loss, (x, x), curvature="identity", progress=False)
        >>> top = inf.top((x[:1], x[:1]), k=1)
        >>> top.indices.tolist()  # the largest gradient in the same direction
        [[1]]
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        train_data: Any,
        curvature: str | LinearOperator | None = None,
        *,
        params: ParamSelection = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        target: Callable[[Any], Any] | None = None,
        weight: Callable[[Any], Any] | None = None,
        reduction: str | None = None,
        device: torch.device | str | None = None,
        damping: float | None = None,
        relative: bool = True,
        unit: str = "inner_product",
        fit: Mapping[str, Any] | None = None,
        progress: Progress = None,
    ) -> None:
        risk = Risk(
            model,
            loss,
            train_data,
            forward=forward,
            target=target,
            weight=weight,
            reduction=reduction,
            params=params,
            device=device,
        )
        self._set(risk, curvature, damping, relative, unit, fit, progress)

    @classmethod
    def of(
        cls,
        risk: Risk,
        curvature: str | LinearOperator | None = None,
        *,
        damping: float | None = None,
        relative: bool = True,
        unit: str = "inner_product",
        fit: Mapping[str, Any] | None = None,
        progress: Progress = None,
    ) -> Influence:
        """Influence of the examples of a risk; arguments as of the class.

        Raises:
            TypeError: If ``risk`` is no risk.
            ValueError: As the class.
        """
        if not isinstance(risk, Risk):
            raise TypeError(f"Influence.of takes a Risk, got {type(risk).__name__}")
        out = cls.__new__(cls)
        out._set(risk, curvature, damping, relative, unit, fit, progress)
        return out

    def _set(
        self,
        risk: Risk,
        curvature: str | LinearOperator | None,
        damping: float | None,
        relative: bool,
        unit: str,
        fit: Mapping[str, Any] | None,
        progress: Progress,
    ) -> None:
        if risk.group is None:
            risk.require_whole("influence in one process")
        require_unit(unit, curvature)
        self.risk, self.preconditioner = preconditioner(
            risk, curvature, damping, relative=relative, fit=fit or {}, progress=progress
        )
        self.unit = unit
        self.progress = progress
        self._own: Part | None = None
        self._factor = 1.0 / risk.weight() if unit == "nats" else 1.0

    def __repr__(self) -> str:
        own = self.preconditioner
        kind = "relative" if own.relative else "absolute"
        return f"Influence({own.name}, damping={own.damping:g} {kind}, {self.unit}, {self.risk!r})"

    def damped(self, damping: float, *, relative: bool = True) -> Influence:
        """The same curvature with another damping, without fitting anything again.

        Args:
            damping: See the class; :func:`curvlib.influence.training_damping` for a run's own.
            relative: Whether it is a fraction of the mean eigenvalue.

        Raises:
            TypeError: If ``damping`` is no number.
            ValueError: If it is negative or not finite.
        """
        out = copy.copy(self)
        value = required_damping(damping)
        out.preconditioner = replace(self.preconditioner, damping=value, relative=relative)
        return out

    # ------------------------------------------------------------------- scores
    def scores(
        self,
        query: Any,
        train: Any = None,
        *,
        measurement: Callable[[Any, Any], Tensor] | None = None,
        query_reduction: str | None = None,
        normalize: str | None = None,
        per_layer: bool = False,
        rank: int | None = None,
        tolerance: float | None = None,
    ) -> InfluenceScores:
        """Scores of all training examples, ``[Q, N]``, in memory.

        Args:
            query: Batches of the training data's kind, or a :class:`curvlib.Risk`.
            train: Other examples than the training data: batches, or a risk.
            measurement: What is explained of the queries instead of their loss: a function of
                ``(output, target)`` that returns the *sum* over a batch's examples.
            query_reduction: ``"sum"`` or ``"mean"`` makes one query of all.
            normalize: ``"gradient"`` divides by the norm of the training example's gradient;
                ``"self"`` by the root of its self-influence (RelatIF: Barshan et al., 2020).
            per_layer: Whether to keep the parts of layers, too.
            rank: Rank of compressed directions of queries.
            tolerance: Their relative error: see :func:`curvlib.influence.compression.compressed`.

        Raises:
            TypeError: If an argument is of another type.
            ValueError: If an argument is unknown, queries are of other shapes than the training
                data, or examples depend on each other.
            FloatingPointError: If scores are not finite; names the layer.
        """
        part, risk = self._part(train), query_risk(self.risk, query, measurement)
        queries = Queries(risk, query_reduction, rank, tolerance)
        scan = self._scan(part, self._directions(part, queries), normalize)
        width = 1 + len(scan.directions) if per_layer else 1
        like = part.risk.space.empty().cpu()
        every = part.gathered(
            lambda: scan.every(layers=per_layer),
            lambda: like.new_zeros((0, scan.queries, width)),
        ).transpose(0, 1)
        return InfluenceScores(
            scores=every[..., 0].contiguous(),
            per_layer=every[..., 1:].contiguous() if per_layer else None,
            layers=tuple(scan.directions),
            settings={**queries.settings, "normalize": normalize},
            **self._provenance(normalize),
        )

    def self_scores(self, train: Any = None) -> SelfInfluence:
        r"""Influence of examples on themselves, :math:`g_n^\top (H + \lambda I)^{-1} g_n`, ``[N]``.

        Args:
            train: Other examples than the training data: batches, or a risk.
        """
        found = self._self_scores(self._part(train))
        return SelfInfluence(scores=found, **self._provenance(None))

    def top(
        self,
        query: Any,
        k: int = 50,
        bottom: int | None = None,
        train: Any = None,
        *,
        measurement: Callable[[Any, Any], Tensor] | None = None,
        query_reduction: str | None = None,
        normalize: str | None = None,
        per_layer: bool = True,
        per_token: bool = True,
        rank: int | None = None,
        tolerance: float | None = None,
        rescore: bool = True,
        chosen: Iterable[int] | Tensor | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        save_every: float = 30.0,
    ) -> TopInfluence:
        """The ``k`` strongest proponents and opponents of each query, in one streamed pass.

        Memory is independent of the number of training examples. A second, short pass over the
        examples that are kept gives their layers and tokens.

        Args:
            query: As of :meth:`scores`, as are ``train``, ``measurement``, ``query_reduction``,
                ``normalize``, ``rank`` and ``tolerance``.
            k: Proponents.
            bottom: Opponents; ``k`` when omitted.
            train: See ``query``.
            measurement: See ``query``.
            query_reduction: See ``query``.
            normalize: See ``query``.
            per_layer: Whether to return the parts of layers.
            per_token: Whether to return the parts of training tokens.
            rank: See ``query``.
            tolerance: See ``query``.
            rescore: With compressed directions: whether twice as many are kept by the scan, and
                ranked by uncompressed ones.
            chosen: Numbers of the only examples to scan (a prefilter's).
            checkpoint: A file to save the scan to, and to continue from where it exists.
            save_every: Seconds between saves.

        Raises:
            TypeError: If an argument is of another type.
            ValueError: If ``k`` is not positive or more than there are examples; or as
                :meth:`scores`.
            FloatingPointError: As :meth:`scores`.
        """
        below, only = opponents(k, bottom), numbers(chosen)
        part, risk = self._part(train), query_risk(self.risk, query, measurement)
        queries = Queries(risk, query_reduction, rank, tolerance)
        known = None if part.counts is None else sum(part.counts)
        if part.risk.in_memory is not None and known is None:
            known = known_examples(part.risk)
        require_enough(k, below, known if only is None else len(only))
        directions = self._directions(part, queries)
        again = rescore and queries.compressed
        more = 2 if again else 1
        scan = self._scan(part, directions, normalize, only, keep=(more * k, more * below))
        settings = {"k": k, "bottom": below, "normalize": normalize, "rescore": again}
        settings |= queries.settings
        state = scanned(
            scan,
            part,
            checkpoint=checkpoint,
            problem=lambda: self._problem(risk_on(self.risk, train), queries.risk, only),
            settings=settings | {"unit": self.unit},
            save_every=save_every,
            progress=self.progress,
        )
        require_enough(k, below, state.examples)
        exact = direction_parts(queries.risk, self.preconditioner, reduction=query_reduction)
        return top_influence(
            scan,
            part,
            state,
            exact if again else iter([directions]),
            (k, below),
            rescored=again,
            layers=per_layer,
            tokens=per_token,
            settings=settings,
            provenance=self._provenance(normalize),
        )

    # ------------------------------------------------------------------- private
    def _part(self, train: Any) -> Part:
        """The training examples of this process."""
        if train is not None:
            return own_part(risk_on(self.risk, train))
        if self._own is None:
            self._own = own_part(risk_on(self.risk, None))
        return self._own

    def _directions(self, part: Part, queries: Queries) -> Directions:
        if part.stepped:
            with part.watched():
                return queries.directions(self.risk, self.preconditioner)
        with together(part.group, "the directions of its queries"):
            return queries.directions(self.risk, self.preconditioner)

    def _self_scores(self, part: Part) -> Tensor:
        none = part.risk.space.empty().new_zeros(0)
        found = part.gathered(
            lambda: torch.cat([none, *self_products(part.risk, self.preconditioner)]).cpu(),
            lambda: part.risk.space.empty().new_zeros(0).cpu(),
        )
        return found * self._factor

    def _scan(
        self,
        part: Part,
        directions: Directions,
        normalize: str | None,
        chosen: Tensor | None = None,
        *,
        keep: tuple[int, int] = (1, 0),
    ) -> Scan:
        require_normalization(normalize, self.unit)
        scales = None
        if normalize == "self":
            scales = inverse(self._self_scores(part).clamp(min=0.0).sqrt())
        return Scan(
            part.risk,
            directions,
            k=keep[0],
            bottom=keep[1],
            factor=self._factor,
            scales=scales,
            by_norm=normalize == "gradient",
            chosen=chosen,
            first=part.first,
        )

    def _problem(self, risk: Risk, queries: Risk, chosen: Tensor | None) -> str:
        """What a checkpoint of a scan belongs to."""
        own = [risk.fingerprint(), queries.fingerprint(), self.preconditioner.fingerprint()]
        return "|".join([*own, "" if chosen is None else digest([chosen])])

    def _provenance(self, normalize: str | None) -> dict[str, Any]:
        return {
            "unit": self.unit if normalize is None else "normalized",
            "sign": SIGN,
            "curvature": self.preconditioner.name,
            "damping": self.preconditioner.damping,
            "relative": self.preconditioner.relative,
        }
