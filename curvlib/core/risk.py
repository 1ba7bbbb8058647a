r"""The risk: what is measured, and the one place that loops over data.

A :class:`Risk` joins a model, a loss, data and a choice of parameters into the function

.. math:: R(\theta) = \frac{1}{W} \sum_b L_b(\theta), \qquad W = \sum_b W_b,

where :math:`L_b` is the weighted *sum* of the loss terms of batch :math:`b` and :math:`W_b` their
weight (:mod:`curvlib.core.loss`), so that the mean is over loss terms and not over batches:
unequal batches, masks and class weights give the risk of the whole data set exactly. For
``reduction="sum"``, :math:`W = 1`.

Every product of every operator is a sum over batches of the same shape. Operators hand the term
of one batch to :meth:`Risk.accumulate`, which loops, moves data, sums, normalizes and checks.

In an initialized process group the data is this rank's *shard*: :math:`b` runs over the batches of
all ranks, each loops over its own, and the sums are added up once for each pass
(:mod:`curvlib.core.ranks.joined`). Shards may be unequal, or empty. :func:`curvlib.shard` takes a
rank's part of data that all ranks hold.

Parameters may be sharded over the ranks (FSDP2): then vectors in their space are too, and the ranks
go through their batches together (:mod:`curvlib.core.ranks.sharded`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from curvlib.core import forward as passes
from curvlib.core.arguments import usable_device
from curvlib.core.batch import Batch, misread_mean
from curvlib.core.batches import NO_BATCH, Batches
from curvlib.core.data import (
    describe,
    is_mapping,
    is_pair,
)
from curvlib.core.exhausted import pass_names_what_fits
from curvlib.core.fingerprint import fingerprint
from curvlib.core.held_model import HeldModel
from curvlib.core.loss import Loss, read_loss
from curvlib.core.one_pass import known_weight, one_pass, positive
from curvlib.core.ranks import shards
from curvlib.core.ranks.group import Group, GroupChoice, group_of
from curvlib.core.ranks.joined import problem_digest, require_device
from curvlib.core.space import ParamSelection, clean_name

if TYPE_CHECKING:
    from curvlib.core.check import Report

T = TypeVar("T")


class Risk:
    """A loss over data as a function of some parameters of a model.

    Args:
        model: The model. It is left bitwise as it is: parameters, gradients, buffers, mode,
            ``requires_grad`` and hooks. Put it into ``eval()`` mode yourself if that is meant.
            Its parameters may be sharded over the ranks of ``group`` (FSDP2's ``fully_shard``, or
            ``distribute_tensor`` along one axis): ``params`` and :attr:`space` are then this
            rank's slices, and ``space.gather`` makes whole vectors.
        loss: Module or function of ``(output, target)``, returning a scalar. PyTorch's
            cross-entropy, NLL, MSE and BCE-with-logits (modules, functions, ``functools.partial``)
            are normalized exactly; any other is taken to be a mean over examples unless it, or
            ``reduction=``, or ``weight=`` says otherwise, which is verified where batches can be
            split.
        data: One batch in memory, a list of batches, a ``DataLoader``, or anything that can be
            iterated again. A batch is a pair ``(input, target)``, a mapping, or anything that
            ``forward=`` understands.
        forward: Function of ``(model, batch)`` returning the output. Default: ``model(input)``
            for pairs, ``model(**batch)`` for mappings.
        target: Function of ``batch`` returning what the loss gets as its second argument.
            Default: the second item of a pair, else the whole batch.
        weight: Function of ``batch`` returning its number of loss terms (the denominator of its
            mean), for losses that curvlib does not know.
        reduction: ``"mean"`` or ``"sum"``, for losses that do not say it.
        params: Name globs, modules, tensors, or a list of them: see
            :func:`curvlib.core.space.select`.
        device: Where batches are moved. Default: the parameters' device.
        group: The processes whose shards make the data: the default process group where one is
            initialized (and only this process otherwise), ``True`` for the same, but required,
            ``False`` for this process alone, or a ``torch.distributed.ProcessGroup``.

    Raises:
        TypeError: If an argument has the wrong type, or data can be iterated only once.
        ValueError: If parameters, the reduction or the device do not fit, or the group's backend
            cannot send tensors of this device.
        RuntimeError: If a group is required and there is none.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> risk = Risk(model, torch.nn.MSELoss(), (x, y))
        >>> bool(torch.isclose(risk.value(), model.weight.square().mean()))
        True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        target: Callable[[Any], Any] | None = None,
        weight: Callable[[Any], Any] | None = None,
        reduction: str | None = None,
        params: ParamSelection = None,
        device: torch.device | str | None = None,
        group: GroupChoice = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model= needs a torch.nn.Module, got {type(model).__name__}")
        for name, function in (("forward", forward), ("target", target), ("weight", weight)):
            if function is not None and not callable(function):
                raise TypeError(f"{name}= needs a function, got {type(function).__name__}")
        self.model = passes.uncompiled(model)
        self.loss: Loss = read_loss(loss, reduction)
        if self.loss.linear is not None:
            self.loss.linear.require_part_of(self.model)
        self.data = data
        self.take_output = forward
        self.take_target = target
        self.take_weight = weight
        self.group: Group | None = group_of(group)
        self.held = HeldModel(self.model, params, self.group)
        self.params, self.space = self.held.params, self.held.space
        self.places = self.held.places  # of parameters that are sharded
        if self.loss.linear is not None:
            self.require_whole("a loss that owns the head of the model")
        self.device = self.space.device if device is None else usable_device(device)
        self.stream = Batches(self, data)
        self.known_bits: tuple[Any, int] | None = None  # of the parameters, for other ranks
        self.noticed_copies = False  # whether shards were compared
        self.given_reduction = reduction
        self._compiled = passes.has_compiled(model)
        self._noticed = False  # whether the first forward pass was watched for fused kernels
        self._verified: set[int] = set()  # batches whose normalization was verified
        self.misread: str | None = None  # why the normalization is not what it seems
        self.draws = passes.Draws(self.device)
        self.everywhere = False  # whether all data is on every rank, and not a shard
        self.is_part = False  # of a larger selection: then the loss need not use the parameters
        if self.group is not None:
            require_device(self.group, self.space.device)
            shards.notice_padding(data, self.group)

    # ------------------------------------------------------------------- values
    def value(self) -> Tensor:
        """The risk, a scalar of the vectors' dtype."""

        def add(batch: Batch, total: Tensor | None) -> Tensor:
            with torch.no_grad():
                part = batch.total(batch.output()).to(self.space.dtype) * batch.scale
            return part if total is None else total + part

        return self.accumulate(add, rows=False)

    def gradient(self) -> Tensor:
        """The gradient of the risk, ``[P]``; this rank's rows where parameters are sharded."""

        def add(batch: Batch, total: Tensor | None) -> Tensor:
            out = self.space.empty() if total is None else total
            self.space.write(batch.gradient(), out, scale=batch.scale, add=total is not None)
            return out

        return self.accumulate(add, rows=True)

    def weight(self) -> float:
        """Total weight ``W`` of the loss terms (1 for ``reduction="sum"``), in one pass."""
        if self.loss.reduction == "sum":
            return 1.0

        def add(batch: Batch, total: Tensor | None) -> Tensor:
            own = torch.as_tensor(batch.weight, dtype=torch.float64, device=self.device)
            return own if total is None else total + own

        return float(_some(one_pass(self, add, None).total))

    def check(self, *, seed: int = 0) -> Report:
        """Looks for what makes curvature meaningless: see :func:`curvlib.core.check.check`."""
        from curvlib.core.check import check

        return check(self, seed=seed)

    def fingerprint(self) -> str:
        """A digest of what is measured: see :func:`curvlib.core.fingerprint.fingerprint`."""
        return fingerprint(self)

    def signature(self) -> int:
        """64 bits of what has to be alike on all ranks, except for parameters and data."""
        modes = "".join("t" if m.training else "e" for m in self.model.modules())
        shapes = (p.shape for p in self.held.held.values())
        words = [*self.space.names, *shapes, self.space.dtype, modes]
        words += [torch.__version__, self.loss.describe(), self.loss.reduction]
        functions = (self.take_output, self.take_target, self.take_weight, self.loss.function)
        return problem_digest(words, functions)

    # --------------------------------------------------------------- derivation
    def restrict(self, params: ParamSelection) -> Risk:
        """The same risk, random draws included, as a function of other parameters."""
        out = self._with(self.data, params)
        out.draws = self.draws
        return out

    def on(self, data: Any) -> Risk:
        """The same model, loss and parameters on other data, with random draws of its own."""
        return self._with(data, list(self.held.held.values()))

    def of(self, model: nn.Module) -> Risk:
        """The same loss and data for another model, such as a copy, by the parameters' names.

        Raises:
            ValueError: If the model lacks a parameter, or has it in another shape.
        """
        every = passes.uncompiled(model).named_parameters(remove_duplicate=False)
        named = {clean_name(name): p for name, p in every}
        for name, p in self.held.held.items():
            shape = p.shape
            if name not in named or named[name].shape != shape:
                found = list(named[name].shape) if name in named else "no such parameter"
                raise ValueError(
                    f"expected a model with a parameter {name!r} of shape {list(shape)}, got "
                    f"{found}; pass a copy of the risk's model (copy.deepcopy(risk.model))"
                )
        return self._with(self.data, [named[name] for name in self.space.names], model)

    def alone(self) -> Risk:
        """The risk of this rank's shard, which does not communicate; itself in one process."""
        if self.group is None:
            return self
        self.require_whole("this function")
        out = self._with(self.data, list(self.held.held.values()), group=False)
        out.draws = self.draws
        return out

    def _with(
        self,
        data: Any,
        params: ParamSelection,
        model: nn.Module | None = None,
        group: GroupChoice = None,
    ) -> Risk:
        out = Risk(
            self.model if model is None else model,
            self.loss.of(self.model, model),
            data,
            forward=self.take_output,
            target=self.take_target,
            weight=self.take_weight,
            reduction=self.given_reduction,
            params=params,
            device=self.device,
            group=(self.group or False) if group is None else group,
        )
        out._noticed = self._noticed  # what was said once is not said again
        out.noticed_copies = self.noticed_copies
        out.is_part = self.is_part
        return out

    def part(self, names: Iterable[str]) -> Risk:
        """The risk as a function of some of its parameters, which it need not depend on."""
        out = self.restrict([self.held.held[name] for name in names])
        out.is_part = True
        return out

    # --------------------------------------------------------------------- loop
    def accumulate(
        self,
        add: Callable[[Batch, Tensor | None], Tensor],
        given: Tensor | None = None,
        *,
        rows: bool | None = None,
    ) -> Tensor:
        """Sums a function of batches over the data: the mean, or sum, over loss terms.

        This is the only loop over data in curvlib: one pass, one normalized sum, in a process
        group one reduction.

        Args:
            add: Given a batch and the sum so far (``None`` for the first batch), returns the sum
                with the batch's term added: a sum over its loss terms, times ``batch.scale``. It
                may work in place on the sum.
            given: What the pass multiplies, which must be the same on every rank.
            rows: Whether the sum lies in the space of the parameters, ``[P, ...]``: where they
                are sharded, each rank's sum is then complete as it is. ``None`` for a function
                that is not made for that.

        Returns:
            The sum, divided by ``W`` (which is 1 for ``reduction="sum"``).

        Raises:
            ValueError: If there is no batch, no valid loss term, or the normalization is unknown.
            RuntimeError: If the data changed between two passes, or another rank failed.
            FloatingPointError: If the sum is not finite; names the batch and the layer.
        """
        if rows is None:
            self.require_whole("this function")
        known = known_weight(self)
        rows = bool(rows) and self.space.spread is not None
        found = one_pass(self, add, 1.0 if known is None else 1.0 / known, given, rows)
        total = _some(found.total)
        if known is None:
            total.div_(positive(found.weight))
        if rows and found.finite:
            return total
        if rows or (self.places and not bool(torch.isfinite(total).all())):
            raise FloatingPointError(_NOT_FINITE)
        # one read: overflow of the sum alone is told apart by the second
        if not bool(torch.isfinite(total.sum())) and not bool(torch.isfinite(total).all()):
            from curvlib.core.check import non_finite

            raise FloatingPointError(non_finite(self))
        return total

    def summed(
        self, add: Callable[[Batch, Tensor | None], Tensor], given: Tensor | None = None
    ) -> Tensor:
        """The sum of a function of batches as it is, whatever the loss and its weights.

        Args:
            add: As for :meth:`accumulate`, with ``batch.scale == 1``.
            given: What the pass multiplies, which must be the same on every rank.

        Raises:
            ValueError: If there is no batch.
            RuntimeError: If the data changed between two passes, or another rank failed.
        """
        self.require_whole("this function")
        return _some(one_pass(self, add, None, given).total)

    @property
    def in_memory(self) -> Sequence[Any] | None:
        """The batches, where the data is in memory."""
        return self.stream.in_memory

    @property
    def seen(self) -> tuple[int, int]:
        """Batches and examples of this rank's shard; zeros before the first full pass."""
        return self.stream.seen

    def untouched(self, *, first_order: bool = False) -> AbstractContextManager[None]:
        """Entered around a pass: second derivatives exist, and the model is left as it was.

        Args:
            first_order: Whether first derivatives are enough, so that attention may be fused.

        Raises:
            RuntimeError: If a parameter of the model was replaced since the risk was made.
        """
        arranged = self.held.untouched(self.device, first_order=first_order)
        return pass_names_what_fits(lambda: self.stream.reading, arranged)

    def batches(self, scale: float = 1.0, *, shard: bool = False) -> Iterator[Batch]:
        """Batches in order, on the device; the same number of them at every pass.

        Args:
            scale: See :class:`Batch`.
            shard: Whether, in a process group, this rank's batches are meant; there may be none.

        Raises:
            ValueError: If there is none.
            RuntimeError: If the data changed since the first pass, or other ranks' are left out.
        """
        self.require_whole("this function")
        if self.group is not None and not shard:
            raise RuntimeError(
                "this function sees only the data of one process, and the risk belongs to "
                f"{self.group.size}; give one process all data: Risk(..., group=False)"
            )
        yield from self.stream.own(scale)

    def call(self, data: Any, params: Mapping[str, Tensor] | None = None) -> Any:
        """The model's output for one batch, with other values for parameters where given.

        Args:
            data: The batch, as the data gives it.
            params: Tensors by the names of :attr:`space`, instead of the model's own.

        Raises:
            TypeError: If the batch is of an unknown kind and there is no ``forward=``.
        """
        if self.held.regather is None:
            self.require_whole("this function")
        if params is not None:
            return self.held.replaced(params, lambda: self.call(data))
        if self._noticed or passes.is_first_order():
            return self._forward(self.model, data)
        with passes.SpotAttention() as spot:
            output = self._forward(self.model, data)
        self._noticed = True
        passes.tell_what_is_slower(self.model, self.device, spot.seen, compiled=self._compiled)
        return output

    def _forward(self, model: nn.Module, data: Any) -> Any:
        self.require_known(data)
        if self.take_output is not None:
            output = self.take_output(model, data)
        else:
            output = model(**data) if is_mapping(data) else model(data[0])
        return output if self.loss.linear is None else self.loss.linear.logits(output)

    def require_known(self, data: Any) -> None:
        """Raises TypeError if a batch is of an unknown kind and there is no ``forward=``."""
        if self.take_output is None and not is_mapping(data) and not is_pair(data):
            raise TypeError(
                "a batch should be a pair (input, target) or a mapping, got "
                f"{describe(data)}; pass forward=lambda model, batch: ... for other batches"
            )

    def note_normalization(self, batch: Batch, output: Any, value: Tensor) -> None:
        """Verifies once for each batch that an unknown loss is a mean over examples."""
        settled = self.take_weight is not None or self.given_reduction is not None
        if settled or batch.index in self._verified:
            return
        self._verified.add(batch.index)
        self.misread = self.misread or misread_mean(batch, output, value)

    def require_whole(self, what: str) -> None:
        """Raises ValueError if parameters are sharded, for a function that does not follow that."""
        self.held.require_whole(what)

    def __repr__(self) -> str:
        return (
            f"Risk({type(self.model).__name__}, {self.loss.describe()}, {self.space.total} "
            f"parameters in {len(self.space.names)} tensors, data: {describe(self.data)})"
        )


_NOT_FINITE = (
    "the sum over the batches of all ranks is not finite: a loss or a derivative "
    "overflows or is undefined here, or the vectors are not finite; look at the data, the "
    "parameters and the loss, or use a higher precision"
)


def _some(total: Tensor | None) -> Tensor:
    if total is None:  # on no rank
        raise ValueError(NO_BATCH)
    return total
