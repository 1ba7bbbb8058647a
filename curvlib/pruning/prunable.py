"""Which parameters may be pruned, that they can be, and which way they lie."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from curvlib.core.risk import Risk
from curvlib.core.space import ParamSelection
from curvlib.operators.layers.inputs import layer_of
from curvlib.pruning.masks import Masks, unwrapped


def on_model(risk: Risk, model: nn.Module) -> Risk:
    """The risk on a model that may be compiled or wrapped, or other than the risk's.

    Raises:
        TypeError: If it is no risk, or no module.
        ValueError: If the model has other parameters.
    """
    if not isinstance(risk, Risk):
        raise TypeError(
            f"expected a curvlib.Risk after the model, got {type(risk).__name__}; make one: "
            "curvlib.Risk(model, loss, data)"
        )
    risk.require_whole("pruning")
    return risk.of(unwrapped(model))


def transposed(risk: Risk) -> frozenset[str]:
    """Weights whose first dimension is that of inputs, as in transposed convolutions.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.ConvTranspose1d(2, 3, 1)
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (torch.ones(1, 2, 4), torch.ones(1, 3, 4)))
        >>> sorted(transposed(risk))
        ['weight']
    """
    found = set()
    for module in risk.model.modules():
        layer = layer_of(module)
        turned = layer is not None and layer.kind == "transposed"
        if turned or isinstance(module, _ConvTransposeNd):
            found.add(id(module._parameters["weight"]))
    return frozenset(name for name, p in risk.params.items() if id(p) in found)


def prunable(risk: Risk, params: ParamSelection = None) -> Risk:
    """The same risk as a function of the weights that may be pruned.

    Args:
        risk: The risk.
        params: Names, modules or tensors, as in :class:`curvlib.Risk`. Default: the risk's
            parameters of two and more dimensions. Embeddings are left out, also where a head
            shares their weight; so are biases, the scales of normalizations, and tables that a
            module with layers inside holds itself (learned positions, class tokens): what such a
            module holds counts only where its name says ``weight``.

    Raises:
        ValueError: If nothing is left, or a parameter is tied, so that pruning it in one place
            prunes it in another.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (torch.ones(1, 2), torch.ones(1, 3)))
        >>> prunable(risk).space.names
        ('0.weight',)
    """
    if params is not None:
        chosen = risk.restrict(params)
    else:
        tables = _tables(risk.model)
        names = [
            name
            for name, p in risk.params.items()
            if p.ndim >= 2 and p.numel() > 0 and id(p) not in tables
        ]
        if not names:
            raise ValueError(
                "the risk has no weight that is pruned by default (two or more dimensions, no "
                f"embedding or table); its parameters are {list(risk.space.names)}: select some by "
                "params="
            )
        chosen = risk.part(names)
    every = torch.ones(chosen.space.size, dtype=torch.bool)
    try:
        Masks.of(every, chosen.space).owners(risk.model)
    except ValueError as error:
        what, _, _ = str(error).partition("; ")
        raise ValueError(f"{what}; leave it out with params=, or untie the two") from error
    return chosen


def _tables(model: nn.Module) -> set[int]:
    """Identities of the parameters that are looked up or added, not multiplied with."""
    found = set()
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            found.add(id(module.weight))
        elif next(module.children(), None) is not None:
            own = module.named_parameters(recurse=False)
            found |= {id(p) for name, p in own if "weight" not in name}
    return found
