r"""``nn.MultiheadAttention`` run again, with the outputs of its projections as nodes of a graph.

.. math:: q = W_q x + b_q, \quad k = W_k y + b_k, \quad v = W_v z + b_v, \quad
          \text{out} = W_o\, \mathrm{attention}(q, k, v) + b_o .

The projections are done in the open, and PyTorch's own function does the rest, with identities in
their places: masks, added keys, heads and averaged weights mean what they mean there. Where the
three share one ``in_proj_weight``, each is a block of its own, as those of three linear layers
would be.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlib.operators.layers.hidden_map import HiddenMap, Unrolled

KIND = nn.MultiheadAttention
_ARGUMENTS = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)


def is_attention(module: nn.Module) -> bool:
    """Whether it is an ``nn.MultiheadAttention``."""
    return isinstance(module, KIND)


def maps(module: nn.Module) -> tuple[HiddenMap, ...]:
    """Its four projections, in the order of :func:`run`."""
    assert isinstance(module, nn.MultiheadAttention)
    size = module.embed_dim
    found = []
    weights, biases = _held(module)
    for i, (key, width) in enumerate(zip("qkv", (size, module.kdim, module.vdim), strict=True)):
        joint = len(weights) == 1
        weight = "in_proj_weight" if joint else f"{key}_proj_weight"
        bias = None if biases is None else "in_proj_bias"  # always one for all three
        start = i * size
        found.append(HiddenMap(key, weight, bias, start if joint else 0, start, size, width))
    last: Tensor | None = module.out_proj.bias
    bias = None if last is None else "out_proj.bias"
    return (*found, HiddenMap("out_proj", "out_proj.weight", bias, 0, 0, size, size))


def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Unrolled:
    """Runs a call again: see :func:`curvlib.operators.layers.hidden_maps.unrolled`."""
    assert isinstance(module, nn.MultiheadAttention)
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    batched = given["query"].ndim == 3
    size = module.embed_dim
    weights, joint_bias = _held(module)
    weights = list(weights[0].split(size)) if len(weights) == 1 else weights
    biases = [None] * 3 if joint_bias is None else list(joint_bias.split(size))
    inputs, nodes = [], []
    for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        x = given[name].detach()
        x = x[:, None] if not batched else x.transpose(0, 1) if module.batch_first else x
        inputs.append(x.to(weight.dtype))
        nodes.append(F.linear(inputs[-1], weight, bias).requires_grad_(torch.is_grad_enabled()))
    padding, mask = _alike(given.get("key_padding_mask"), given.get("attn_mask"), nodes[0].dtype)
    eye = torch.eye(size, dtype=nodes[0].dtype, device=nodes[0].device)
    q, k, v = (node if batched else node[:, 0] for node in nodes)
    shown_weights: Tensor | None
    mixed, shown_weights = F.multi_head_attention_forward(
        q,
        k,
        v,
        size,
        module.num_heads,
        None,
        None,
        None if module.bias_k is None else module.bias_k.detach(),
        None if module.bias_v is None else module.bias_v.detach(),
        module.add_zero_attn,
        0.0,
        eye,
        eye.new_zeros(size),
        training=False,
        key_padding_mask=padding,
        need_weights=given.get("need_weights", True),
        attn_mask=mask,
        use_separate_proj_weight=True,
        q_proj_weight=eye,
        k_proj_weight=eye,
        v_proj_weight=eye,
        average_attn_weights=given.get("average_attn_weights", True),
        is_causal=given.get("is_causal", False),
    )
    mixed = mixed if batched else mixed[:, None]
    last: Tensor | None = module.out_proj.bias
    out = F.linear(mixed, module.out_proj.weight.detach(), None if last is None else last.detach())
    shown = out[:, 0] if not batched else out.transpose(0, 1) if module.batch_first else out
    rows: list[Tensor] = [*inputs, mixed]
    return Unrolled(
        maps(module),
        tuple(x.detach().transpose(0, 1) for x in rows),
        (*nodes, out),
        (None,) * 4,
        (shown,) if shown_weights is None else (shown, shown_weights),
        None,
    )


def _held(module: nn.MultiheadAttention) -> tuple[list[Tensor], Tensor | None]:
    """The weight of all three projections, or those of each, and the bias."""
    joint: Tensor | None = module.in_proj_weight
    bias: Tensor | None = module.in_proj_bias
    each = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    weights = list(each) if joint is None else [joint]
    return [weight.detach() for weight in weights], None if bias is None else bias.detach()


def _alike(
    a: Tensor | None, b: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Two masks of one type, as PyTorch would make them, with a warning that it gave already."""
    if a is None or b is None or a.dtype == b.dtype:
        return a, b
    first, second = (
        torch.zeros(m.shape, dtype=dtype, device=m.device).masked_fill_(m, -torch.inf)
        if m.dtype == torch.bool
        else m
        for m in (a, b)
    )
    return first, second
