"""Accuracy: the share of loss terms whose most likely class is the target's.

Not curvature, but what people ask of a classifier after its curvature was used to change it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.risk import Risk
from curvlib.operators.loss_hessian import class_axis


def accuracy(risk: Risk) -> float:
    """The share of a classifier's loss terms that it labels correctly, on the risk's data.

    Terms that the loss ignores (``ignore_index``) do not count, and class weights play no part.
    For binary cross-entropy every entry is a term, and an output above zero says 1.

    Raises:
        ValueError: If the loss is none of cross-entropy, NLL and BCE-with-logits; or no term is
            valid.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Identity()
        >>> model.scale = torch.nn.Parameter(torch.ones(()))
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 0])
        >>> round(accuracy(cl.Risk(model, torch.nn.CrossEntropyLoss(), (x, y))), 3)
        0.667
    """
    if not (risk.loss.categorical or risk.loss.kind == "bce_with_logits"):
        raise ValueError(
            f"accuracy needs a loss over classes, got {risk.loss.describe()}; use risk.value()"
        )
    right, terms = 0, 0
    with risk.untouched(), torch.no_grad():
        for batch in risk.batches():
            hits, valid = _hits(batch)
            right += int(hits.sum())
            terms += int(valid.sum())
    if terms == 0:
        raise ValueError("the data has no valid loss term: every target is ignored")
    return right / terms


def _hits(batch: Batch) -> tuple[Tensor, Tensor]:
    loss = batch.risk.loss
    target = batch.target
    if loss.linear is not None:
        predicted = torch.cat([z.argmax(1) for _, z in batch.output().chunks()])
        valid = target != loss.ignore_index
        return (predicted.reshape(target.shape) == target) & valid, valid
    output = loss.readable(batch.output(), target)
    if not loss.categorical:
        return (output > 0) == (target > 0.5), torch.ones_like(target, dtype=torch.bool)
    axis = class_axis(output)
    if target.is_floating_point():  # probabilities of the classes
        labels = target.argmax(axis)
        valid = torch.ones_like(labels, dtype=torch.bool)
    else:
        labels, valid = target, target != loss.ignore_index
    return (output.argmax(axis) == labels) & valid, valid
