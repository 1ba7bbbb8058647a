"""One Hessian on many processes: the same script for one process and for any number of them.

    python examples/spectrum_torchrun.py
    torchrun --nproc-per-node 2 examples/spectrum_torchrun.py

Each process holds a shard of the data; every product is added up over them once, so that all
processes have the same numbers, bit for bit, and the first one prints and writes. A run that was
stopped goes on with any number of processes.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

import curvlib as cl
from curvlib.demo import digits

if "RANK" in os.environ:  # started by torchrun; on GPUs the backend would be "nccl"
    dist.init_process_group("gloo")
first = not dist.is_initialized() or dist.get_rank() == 0

demo = digits()  # the same weights everywhere: curvlib refuses ranks that differ
shard = cl.shard(demo.train)  # contiguous and without repeats; in one process, everything
risk = cl.Risk(demo.model, torch.nn.CrossEntropyLoss(), shard)
folder = Path("curvlib-out/torchrun")
folder.mkdir(parents=True, exist_ok=True)

H = cl.hessian(risk)
top = cl.eigenpairs(H, k=5, checkpoint=folder / "eigenpairs.ckpt")
spectrum = cl.density(H, steps=32, probes=2, deflate=top, checkpoint=folder / "density.ckpt")
rate = cl.trace(H, max_products=64)

if first:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    print(f"{ranks} processes, {len(shard[0])} of {len(demo.train[0])} examples on the first")
    print(top, spectrum, rate, sep="\n")
    top.save(folder / "eigenpairs.safetensors")
if dist.is_initialized():
    dist.destroy_process_group()
