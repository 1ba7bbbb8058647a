r"""Numbers of single examples: losses, error norms (EL2N) and gradient norms (GraNd).

For example ``n`` with summed (and weighted) loss terms :math:`\ell_n`, outputs :math:`f_n` and
predicted probabilities :math:`p_n`,

.. math::  \ell_n, \qquad  \mathrm{EL2N}_n = \|p_n - y_n\|_2, \qquad
           \mathrm{GraNd}_n = \|\nabla \ell_n\|_2 .

Source:
    Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in
    Training", 2021, definitions 2.1 (GraNd) and 2.2 (EL2N). Both are means over the first epochs
    of several runs there: average what these functions return for several models.

In a process group, every rank gets the numbers of all examples, in the order of ranks, of which it
sends those of its shard: :math:`8 N / R` bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.ranks.joined import gathered
from curvlib.core.risk import Risk
from curvlib.operators.batch_examples import example_count, one_example
from curvlib.operators.gradients import shard_gradients
from curvlib.operators.loss_hessian import probabilities


def example_losses(risk: Risk) -> Tensor:
    """The summed loss terms of each example, ``[N]``, float64, on the CPU.

    Raises:
        TypeError: If ``risk`` is no Risk.
        ValueError: If a batch cannot be split into examples.
        FloatingPointError: If a loss is not finite.

    Example:
        >>> import torch, curvlib as cl
        >>> model, x = torch.nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0]])
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (x, x + 3.0))
        >>> example_losses(risk).tolist()
        [9.0, 9.0]
    """
    _require_risk(risk, "example_losses")
    found = _each(risk, lambda batch: _losses(batch).double())
    bad = (~torch.isfinite(found)).nonzero()
    if len(bad):
        raise FloatingPointError(
            f"the loss of example {int(bad[0])} is not finite; check its input, or whether the "
            "parameters have diverged: risk.check() names the layer"
        )
    return found


def error_norms(risk: Risk) -> Tensor:
    """EL2N: the norm of the error of each example's predicted probabilities, ``[N]``, float64.

    For cross-entropy and NLL, errors are those of class probabilities; for BCE-with-logits, of the
    sigmoids; for MSE, of the outputs. Terms with ``ignore_index`` do not count; examples with
    several terms (tokens) have the norm of all of them.

    Raises:
        TypeError: If ``risk`` is no Risk, or its outputs are no tensors.
        ValueError: If the loss is not one of these.

    Example:
        >>> import torch, curvlib as cl
        >>> model, x = torch.nn.Linear(1, 2), torch.ones(1, 1)
        >>> risk = cl.Risk(model, torch.nn.CrossEntropyLoss(), (x, torch.tensor([0])))
        >>> error = model(x).detach().double().softmax(1)[0, 1]
        >>> bool(torch.isclose(error_norms(risk)[0], 2**0.5 * error))
        True
    """
    _require_risk(risk, "error_norms")
    loss = risk.loss
    if not loss.known:
        raise ValueError(
            f"the loss {loss.describe()} has no predicted probabilities that curvlib knows, so "
            "there are no error norms; use cross-entropy, NLL, MSE or BCE-with-logits, or "
            "gradient_norms(risk)"
        )

    def norms(batch: Batch) -> Tensor:
        n = example_count(batch)
        output = loss.readable(batch.output(), batch.target).double()
        return _errors(batch, output).reshape(n, -1).square().sum(1).sqrt()

    return _each(risk, norms)


def gradient_norms(risk: Risk, *, block: int = 64) -> Tensor:
    """GraNd: the norm of the gradient of each example's summed loss terms, ``[N]``, float64.

    Args:
        risk: Model, loss, data and parameters; examples are independent.
        block: Examples at a time: memory is ``block * P`` numbers.

    Raises:
        TypeError: If ``risk`` is no Risk.
        ValueError: If examples depend on each other.

    Example:
        >>> import torch, curvlib as cl
        >>> model, x = torch.nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0]])
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (x, x + 3.0))
        >>> gradient_norms(risk).tolist()  # 2 * 3 * x
        [6.0, 12.0]
    """
    _require_risk(risk, "gradient_norms")

    def norms() -> Tensor:
        rows = shard_gradients(risk, block=block)
        return _column(risk, [torch.linalg.vector_norm(part, dim=1).double() for part in rows])

    return gathered(risk, norms).cpu()


def _each(risk: Risk, numbers: Callable[[Batch], Tensor]) -> Tensor:
    """Numbers of the examples of each batch, of all ranks' data in its order, on the CPU."""

    def own() -> Tensor:
        parts: list[Tensor] = []
        batches = risk.batches(shard=True)
        while True:
            with risk.untouched(), torch.no_grad():
                batch = next(batches, None)
                if batch is None:
                    return _column(risk, parts)
                parts.append(numbers(batch))

    return gathered(risk, own).cpu()


def _column(risk: Risk, parts: list[Tensor]) -> Tensor:
    none = torch.zeros(0, dtype=torch.float64, device=risk.space.device)
    return torch.cat([none, *(part.to(none.device) for part in parts)])


def _losses(batch: Batch) -> Tensor:
    n, loss = example_count(batch), batch.risk.loss
    if loss.known:
        terms = loss.each(batch.output(), batch.target)
        if n and terms.ndim and terms.shape[0] % n == 0:
            return terms.double().reshape(n, -1).sum(1)
    ones = [one_example(batch, i) for i in range(n)]
    return torch.stack([one.total(one.output()).double() for one in ones])


def _errors(batch: Batch, output: Tensor) -> Tensor:
    """Errors of predictions, with the entries of an example one after the other."""
    loss, target = batch.risk.loss, torch.as_tensor(batch.target)
    if loss.kind == "mse":
        return torch.sub(output, target)
    p = output.sigmoid() if loss.kind == "bce_with_logits" else probabilities(loss, output)
    if not loss.categorical or target.is_floating_point():
        return torch.sub(p, target)
    axis = 1 if output.ndim > 1 else 0
    valid = target != loss.ignore_index
    index = target.where(valid, 0).unsqueeze(axis)
    errors = p - torch.zeros_like(p).scatter_(axis, index, 1.0)
    return torch.mul(errors, valid.unsqueeze(axis))


def _require_risk(risk: object, name: str) -> None:
    if not isinstance(risk, Risk):
        raise TypeError(f"{name} takes a Risk, got {type(risk).__name__}")
