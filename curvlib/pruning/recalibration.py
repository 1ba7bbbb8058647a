r"""Batch-normalization statistics, recomputed after pruning.

The running means and variances of a network were collected for the weights that it had. Pruned, it
has other activations, and until the statistics fit them, much of a one-shot method's loss is that
mismatch and not the missing weights (e.g. Frantar and Alistarh, 2022, arXiv:2208.11580, who reset
them after compression). Nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from curvlib.core.ranks.group import GroupChoice
from curvlib.operators.batch_moments import batch_moments
from curvlib.pruning.masks import unwrapped


def recalibrate(
    model: nn.Module,
    data: Any,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
    group: GroupChoice = None,
) -> tuple[str, ...]:
    """Recomputes the running statistics of batch-normalization layers, in place.

    They become the exact mean and unbiased variance of the layers' inputs over the data, where
    each batch weighs by its number of values and the spread between batches counts
    (``momentum=None`` weighs unequal batches equally and leaves it out): see
    :mod:`curvlib.operators.batch_moments`. Only ``running_mean``, ``running_var`` and
    ``num_batches_tracked`` of batch-normalization layers change; dropout is off, and modes,
    gradients and the random state are left as they were. If anything raises, nothing changed.

    Args:
        model: The model. One without such layers is left alone.
        data: Batches, as a :class:`curvlib.core.risk.Risk` takes them; targets are not looked at.
            Some hundred examples are enough; use training data, not those of a final test.
        forward: Function of ``(model, batch)``, where the model is not called on the first item
            of a pair or by the names of a mapping.
        device: Where batches are moved. Default: the parameters' device.
        group: The processes whose shards make the data, as for :class:`curvlib.Risk`: every rank
            gets the statistics of all of it.

    Returns:
        Names of the layers whose statistics were recomputed.

    Raises:
        TypeError: If ``model`` is no module, or a batch is of an unknown kind.
        ValueError: If there is no batch, or a batch has one value per channel only.
        FloatingPointError: If a layer's inputs are not finite.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(1)
        >>> recalibrate(torch.nn.Sequential(norm), (torch.tensor([[1.0], [3.0]]), None))
        ('0',)
        >>> norm.running_mean.item(), norm.running_var.item()
        (2.0, 2.0)
    """
    model = unwrapped(model)
    layers = {
        name.replace("_orig_mod.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not layers:
        return ()
    found, batches = batch_moments(model, data, layers, forward=forward, device=device, group=group)
    for name, moments in found.items():
        if not bool(torch.isfinite(moments.squares).all()):
            raise FloatingPointError(
                f"the inputs of layer {name!r} are not finite; look for overflow in its weights "
                "or data (risk.check() names the first such layer)"
            )
    for name, moments in found.items():
        layer = layers[name]
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(moments.mean)
        layer.running_var.copy_(moments.variance)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(batches)
    return tuple(found)
