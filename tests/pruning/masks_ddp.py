"""One of two processes that train a masked model under DDP: rank and port as arguments."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from curvlib.core.digest import digest
from curvlib.pruning.masks import Masks, apply
from curvlib.pruning.persistence import attach


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def main(rank: int, port: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(16, 6, generator=g, dtype=torch.float64)
    y = torch.randint(3, (16,), generator=g)
    keep = {f"{i}.weight": torch.rand(s, generator=g) > 0.5 for i, s in ((0, (5, 6)), (2, (3, 5)))}
    masks = Masks(keep)
    for case in ("attached first", "attached to the wrapper", "bucket views"):
        model, whole = net(), net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        reference = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        if case == "attached first":
            attach(model, masks, optimizer)
        views = case == "bucket views"
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=views)
        if case != "attached first":
            attach(parallel, masks, optimizer)
        apply(whole, masks)
        mine = slice(8 * rank, 8 * rank + 8)
        for _ in range(5):
            optimizer.zero_grad()
            with parallel.no_sync():  # half of the gradient accumulates locally
                (0.5 * nn.functional.cross_entropy(parallel(x[mine]), y[mine])).backward()
            (0.5 * nn.functional.cross_entropy(parallel(x[mine]), y[mine])).backward()
            for name, p in model.named_parameters():
                if name in keep:
                    assert not p.grad[~keep[name]].any(), name
            optimizer.step()
            reference.zero_grad()
            nn.functional.cross_entropy(whole(x), y).backward()
            for name, p in whole.named_parameters():
                if name in keep:
                    p.grad.mul_(keep[name])
            reference.step()
        for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
            if name in keep:
                assert not p.detach()[~keep[name]].any(), name
        print("weights", digest(list(model.parameters())))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
