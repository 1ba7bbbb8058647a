"""Passes of batches of ranks that have to go through them together: alike on all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from curvlib.core.batch import Batch
from curvlib.core.data import tensors
from curvlib.core.ranks.in_step import Agreement
from curvlib.core.risk import Risk
from curvlib.operators.batch_examples import one_example
from curvlib.operators.factors.targets import Direction
from curvlib.operators.layers.uses import Pass, Watcher


def stepped_passes(
    watcher: Watcher, batch: Batch, agreed: Agreement
) -> Iterator[tuple[Pass, bool]]:
    """As :meth:`.Watcher.passes`, as many on each rank, and whether a pass is of its own data.

    Raises:
        RuntimeError: If another rank has failed.
        Exception: This rank's own failure.
    """
    n = agreed.attempt(lambda: watcher.examples(batch)) or 1
    kept = agreed.attempt(lambda: watcher.kept(batch))
    alone, most = agreed.most(watcher.alone, n)
    if not alone:
        found = watcher.run(batch, kept)
        (unknown,) = agreed.most(n > 1 and watcher.unverified(found, n))
        same: bool | None = True
        if unknown:
            single = watcher.last_alone(found, n)
            same = agreed.attempt(lambda: watcher.verified(found, single))
        (alone,) = agreed.most(not same)
        if not alone:
            yield found, not batch.lent
            return
    watcher.alone = True
    for i in range(int(most)):
        one = agreed.attempt(partial(one_example, batch, min(i, n - 1))) or batch
        kept = agreed.attempt(partial(watcher.kept, one))
        agreed.most()
        yield watcher.run(one, kept), i < n and not batch.lent


def stepped_rows(
    risk: Risk,
    params: Mapping[str, Tensor],
    one: Pass,
    cotangents: Sequence[Tensor],
    agreed: Agreement,
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Gradients of a pass's examples by parameters that no layer's rows give, each example alone.

    Each rank has the parameters whole meanwhile.

    Args:
        risk: The risk, within a pass.
        params: The parameters, as the model has them, by name.
        one: The pass.
        cotangents: At its output: as many on each rank.
        agreed: The ranks.

    Yields:
        Number of the example and of the cotangent, and the gradients that are not zero.
    """
    leaves = {name: risk.held.whole(p).clone().requires_grad_() for name, p in params.items()}
    n = one.examples
    (most,) = agreed.most(n)
    for i in range(int(most)):
        place = min(i, n - 1)
        with risk.held.with_whole(leaves):
            output = one_example(one.batch, place).output() if n > 1 else one.batch.output()
            target = next(tensors(output))
            for k, cotangent in enumerate(cotangents):
                own = cotangent.unflatten(0, (n, -1))[place] if n > 1 else cotangent
                found: Sequence[Tensor | None] = torch.autograd.grad(
                    [target],
                    list(leaves.values()),
                    [own.reshape(target.shape)],
                    retain_graph=True,
                    allow_unused=True,
                )
                if i < n:
                    pairs = zip(leaves, found, strict=True)
                    yield i, k, {name: g.detach() for name, g in pairs if g is not None}


def at_output(direction: Direction | None, one: Pass) -> Tensor:
    """The cotangent at the output of a direction; zeros where there is none."""
    output = next(tensors(one.output))
    if direction is None:
        return torch.zeros_like(output)
    tensor, cotangent = direction
    if cotangent is not None:
        return cotangent
    return torch.autograd.grad(tensor, output, retain_graph=True)[0]
