r"""Pruning a model: scores, selection and update, round after round.

.. code-block:: python

    result = cl.prune(model, risk, 0.9)  # a pruned copy: result.model
    result.measured, result.predicted  # change of the loss
    result.plot()

The default, ``method="obs"``, is optimal brain surgery on Fisher blocks: for every block of
weights, the order in which they go when each is the cheapest and the others adapt (greedy), one
threshold over all blocks, and the exact minimum of each block's quadratic for what is left
(joint). The curvature is computed anew in each of 16 rounds, between which the densities fall
geometrically (Frantar, Kurtic, Alistarh, "M-FAC", 2021, section 4; Hassibi and Stork 1993).
"""

from __future__ import annotations

import copy
import math
import os
from typing import Any

from torch import Tensor, nn

from curvlib.core.digest import digest
from curvlib.core.risk import Risk
from curvlib.core.run import Progress, run
from curvlib.core.space import ParamSelection, ParamSpace
from curvlib.pruning.masks import Masks
from curvlib.pruning.methods import Method, method_of
from curvlib.pruning.notices import each_said_once
from curvlib.pruning.patterns import Pattern
from curvlib.pruning.persistence import detach, masks_of
from curvlib.pruning.prunable import on_model, prunable
from curvlib.pruning.result import PruneResult
from curvlib.pruning.rounds import Plan, PruneState, next_state, plan_of, write


def prune(
    model: nn.Module,
    risk: Risk,
    sparsity: float | None = None,
    *,
    method: str | Method = "obs",
    params: ParamSelection = None,
    pattern: Pattern | None = None,
    keep: Masks | None = None,
    layer_maximum: float | None = None,
    apply: bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 30.0,
    progress: Progress = None,
    **settings: Any,
) -> PruneResult:
    """Prunes weights of a model.

    Weights that are zero already count as weights like others: an update may move them. What was
    pruned before stays pruned through ``keep=``, or through masks that are attached to the model.

    Args:
        model: The model of the risk, or another with the same parameters, such as a copy that was
            trained on. It is left as it was, unless ``apply``.
        risk: Loss and data: what the curvature is of, and what the loss is measured on.
        sparsity: Share of the weights that is pruned, in [0, 1), over all that may be pruned;
            exactly so, to the nearest weight. (With ``scope="flops"`` a share of multiply-adds.)
            May be left out where ``pattern=`` or ``scope=`` says how much.
        method: A name of :data:`curvlib.pruning.METHODS`, or a :class:`curvlib.pruning.Method`.
        params: Which parameters may be pruned, as in :class:`curvlib.Risk`. Default: those of the
            risk with two or more dimensions, without embeddings.
        pattern: ``"2:4"`` and the like, along the inputs of each weight (of shape
            ``[out, in, ...]``); with a sparsity above what that reaches, more is pruned then.
        keep: Masks of an earlier event: what is pruned stays pruned. Default: those that are
            attached to the model, if any.
        layer_maximum: The largest sparsity of any parameter; others are pruned more instead.
        apply: Whether to write the result into the model itself.
        seed: Of everything random: examples, sampled labels and probes.
        checkpoint: File to continue from, and to save to, round by round.
        save_every: Seconds between saves.
        progress: Whether to show a bar, or a function to call instead.
        **settings: Fields of :class:`curvlib.pruning.Method` to change, such as ``scope=``,
            ``update=``, ``recompute=``, ``block_size=``, ``rows=``, ``damping=``.

    Returns:
        Masks, weights, the pruned model, predicted and measured change of the loss.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the sparsity is out of reach, a layer would be emptied, a parameter is
            tied, masks or model are others than the risk's, or settings do not go together. What
            can be known before data is read is said before. A model is never half pruned.

    Example:
        >>> import torch, curvlib as cl
        >>> from curvlib.demo import digits
        >>> demo = digits(epochs=1)
        >>> result = cl.prune(demo.model, demo.risk(), 0.5, recompute=1, progress=False)
        >>> result.sparsity, sorted(result.keep)
        (0.5, ['0.weight', '3.weight', '7.weight'])
        >>> result.measured < 0.1
        True
    """
    chosen = method_of(method, settings)
    name = method if isinstance(method, str) else "own method"
    own = on_model(risk, model)
    part = prunable(own, params)
    masks = masks_of(own.model) if keep is None else keep
    twin = copy.deepcopy(own.model)
    detach(twin)  # of masks that the model may carry
    copied = part.of(twin)
    plan = plan_of(
        copied,
        chosen,
        sparsity,
        pattern=pattern,
        layer_maximum=layer_maximum,
        seed=seed,
        keep=masks,
    )
    if keep is None:  # a model with masks attached sees zeros there
        write(plan, plan.first_state().weights)
    before = float(copied.value())
    said: set[str] = set()

    def step(state: PruneState) -> PruneState:
        with each_said_once(said):
            return next_state(plan, state)

    last = run(
        plan.first_state,
        step,
        state_type=PruneState,
        done=lambda state: state.round == plan.rounds,
        report=lambda state: (state.round, plan.rounds, ""),
        title=f"pruning ({name})",
        checkpoint=checkpoint,
        problem=own.fingerprint,
        settings=plan.settings(sparsity) | {"keep": digest([plan.keep])},
        device=plan.space.device,
        save_every=save_every,
        progress=progress,
        group=own.group,
    )
    write(plan, last.weights)
    result = PruneResult(
        sparsity=int((~last.keep).sum()) / plan.space.size,
        before=before,
        after=float(copied.value()),
        predicted=float(last.predicted.sum()) if chosen.predicts else math.nan,
        keep=_named(last.keep, plan.space),
        weights={n: p.detach().clone() for n, p in copied.params.items()},
        layers=_layers(last, plan),
        method=name,
        settings=plan.settings(sparsity),
        model=twin,
    )
    if not apply:
        return result
    result.apply_to(model)
    return result.of(model)


def _named(flat: Tensor, space: ParamSpace) -> dict[str, Tensor]:
    return {n: part.clone() for n, part in zip(space.names, space.split(flat), strict=True)}


def _layers(state: PruneState, plan: Plan) -> dict[str, dict[str, float]]:
    out = {}
    for name, size in zip(plan.space.names, plan.space.sizes, strict=True):
        where = plan.space.slice(name)
        kept, predicted = state.keep[where].sum(), float(state.predicted[where].sum())
        known = plan.method.predicts
        out[name] = {
            "size": size,
            "kept": int(kept),
            "predicted": predicted if known else math.nan,
        }
    return out
