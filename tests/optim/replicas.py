"""One of two processes that train every optimizer on half of each batch.

Arguments: rank, file of the rendezvous, file of the results, root of the repository.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[4])

import traceback
import warnings

import torch
import torch.distributed as dist

from curvlib.optim.adahessian import AdaHessian
from tests.optim.cases import OPTIMIZERS
from tests.optim.small import (
    batches,
    by_backward,
    by_closure,
    by_observe,
    loss_of,
    net,
    train,
    weights,
)

STEPS = 4


def uneven(rank: int) -> list[object]:
    """What happens where ranks do different things."""
    w, rare = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    opt = AdaHessian([w, rare], lr=0.1)
    opt.step(lambda: w.cos().sum() + (rare.cos().sum() if rank else 0.0))  # unused on one rank
    moved = bool((rare != 1).all())
    message = ""
    rare.requires_grad_(bool(rank))
    opt = AdaHessian([w, rare], lr=0.1)
    opt.backward(w.cos().sum(), sync=False)
    try:
        opt.step()
    except RuntimeError as error:
        message = str(error)
    return [moved, message]


def wrapped(data: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """DistributedDataParallel averages gradients, ``observe`` gathers curvature."""
    model = net()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    opt = AdaHessian(model.parameters(), lr=0.02, interval=2)
    return train(opt, parallel, data, by_observe)


def main(rank: int, meeting: str, results: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    data = [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in batches(STEPS)]
    found = {}
    for case in OPTIMIZERS:
        try:
            for drive in (by_closure, by_backward):
                model = net()
                found[case.name, drive.__name__] = train(
                    case.build(model, None), model, data, drive
                )
            model = net()
            opt = case.build(model, None)
            for x, y in data:  # micro-batches, with one exchange for each step
                opt.zero_grad()
                for i, part in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
                    opt.backward(loss_of(model, part) / 2, sync=i == 1)
                opt.step()
            found[case.name, "micro-batches"] = weights(model)
        except Exception:  # noqa: BLE001, PERF203  # the parent shows it
            found[case.name, "error"] = traceback.format_exc()
            break  # the ranks may be out of step
    found["uneven"] = uneven(rank)
    found["ddp"] = wrapped(data)
    torch.save(found, f"{results}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
