"""Products of large networks on a GPU, in gradients, beside curvlinops; and ten eigenpairs of 1B.

    python benchmarks/gpu_products.py [--rounds 7] [--columns 1 8] [--parts products eigenpairs]
    python benchmarks/gpu_products.py --small --device cpu    # whether the script runs

A ConvNet of ResNet-50's size and a transformer of GPT-2's, both built here, float32, one batch in
memory. ``ratio`` is time over that of one gradient in the same interleaved rounds, for each column:
targets are 2.5 (Hessian) and 1.6 (GGN) for K = 8. ``error`` is against curvlib's own product in
float64 for one column. Contenders that fail are rows with a note. ``eigenpairs`` are the ten
largest of the GGN of a transformer of a billion parameters, with its time and peak memory.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import torch
from torch import Tensor, nn

import curvlib as cl


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions around a shortcut, normalized by fixed statistics."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.path = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.path(x) + self.shortcut(x)).relu()


def convnet(small: bool, device: str) -> common.Problem:
    """ResNet-50's layers: 25.5M parameters, 224 x 224 images."""
    depths, base, side, batch = ((1, 1, 1, 1), 8, 32, 2) if small else ((3, 4, 6, 3), 64, 224, 32)
    layers: list[nn.Module] = [
        nn.Conv2d(3, base, 7, 2, 3, bias=False),
        nn.BatchNorm2d(base),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = base
    for stage, depth in enumerate(depths):
        width = base * 2**stage
        for i in range(depth):
            layers.append(Bottleneck(inputs, width, 2 if stage and i == 0 else 1))
            inputs = 4 * width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
    x, y = torch.randn(batch, 3, side, side), torch.randint(1000, (batch,))
    return common.Problem("resnet-50 size", model.eval().to(device), x.to(device), y.to(device))


def transformer(small: bool, device: str) -> common.Problem:
    """GPT-2's layers: 124M parameters, and a head that is not tied."""
    size = (97, 16, 32, 2, 2, 2) if small else (50257, 1024, 768, 12, 12, 4)
    vocabulary, length, width, heads, depth, batch = size
    model = common.GPT(vocabulary, length, width, heads, depth)
    tokens = torch.randint(vocabulary, (batch, length + 1))
    x, y = tokens[:, :-1].contiguous().to(device), tokens[:, 1:].flatten().to(device)
    return common.Problem("gpt-2 size", model.to(device), x, y)


def waited(call: Callable[[], Any], device: str) -> Callable[[], None]:
    def done() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return done


def gradient(p: common.Problem) -> Any:
    return torch.autograd.grad(p.loss(), p.params)


def products(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    loss = nn.CrossEntropyLoss()
    for make in (convnet, transformer):
        p = make(args.small, args.device)
        exact = p.double()
        for kind, operator in (("hessian", cl.hessian), ("ggn", cl.ggn)):
            risk = cl.Risk(p.model, loss, (p.x, p.y))
            contenders: dict[str, Any] = {
                "curvlib": operator(risk),
                "curvlib, compiled": operator(risk, compile=True),
            }
            try:
                import curvlinops

                name = {"hessian": "HessianLinearOperator", "ggn": "GGNLinearOperator"}[kind]
                contenders["curvlinops"] = getattr(curvlinops, name)(
                    p.model, loss, p.params, [(p.x, p.y)], check_deterministic=False
                )
            except ImportError:
                print("curvlinops is not installed")
            for count in args.columns:
                V = common.vectors(p.size, count).to(args.device)
                one = cl.Risk(exact.model, loss, (exact.x, exact.y))
                known = operator(one) @ V[:, :1].double()
                calls = {"gradient": waited(partial(gradient, p), args.device)}
                found: dict[str, dict[str, Any]] = {}
                for name, op in contenders.items():
                    call = common.math_attention(partial(op.__matmul__, V))
                    found[name] = {}
                    try:
                        found[name]["error"] = common.error(call()[:, :1], known)
                    except (RuntimeError, torch.OutOfMemoryError) as reason:
                        found[name]["note"] = str(reason)[:100]
                        continue
                    calls[name] = waited(call, args.device)
                times = common.race(calls, rounds=args.rounds, least=0.0)
                for name, row in found.items():
                    if name in times:
                        row["ratio"] = times[name].median / times["gradient"].median / count
                    rows.append({"problem": p.name, "operator": kind, "K": count, "by": name} | row)
                    print(rows[-1], flush=True)
    return rows


def eigenpairs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ten pairs of the GGN of 1B parameters, whose head's logits are made in chunks."""
    size = (97, 16, 32, 2, 2) if args.small else (32000, 512, 2048, 16, 18)
    vocabulary, length, width, heads, depth = size
    model = common.GPT(vocabulary, length, width, heads, depth).to(args.device)
    tokens = torch.randint(vocabulary, (4, length + 1)).to(args.device)

    def hidden(m: Any, batch: Any) -> Tensor:
        return m.norm(m.blocks(m.embed(batch[0]) + m.position))

    risk = cl.Risk(
        model,
        cl.LinearCrossEntropy(model.head, chunk=512),
        (tokens[:, :-1], tokens[:, 1:]),
        forward=hidden,
    )
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    pairs = cl.eigenpairs(cl.ggn(risk), k=10, tolerance=1e-2, max_products=200)
    row: dict[str, Any] = {
        "problem": "ten eigenpairs of the GGN",
        "parameters": risk.space.size,
        "seconds": time.perf_counter() - start,
        "products": pairs.products,
        "converged": int(pairs.converged.sum()),
        "largest": float(pairs.values[0]),
    }
    if args.device == "cuda":
        row["peak memory"] = torch.cuda.max_memory_allocated()
    print(row)
    return [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--columns", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--parts", nargs="+", default=["products", "eigenpairs"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks, nothing is saved")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --small --device cpu tries the script")
    warnings.filterwarnings("ignore", message="curvlib: ")
    torch.manual_seed(0)
    parts = {"products": products, "eigenpairs": eigenpairs}
    rows = [row for part in args.parts for row in parts[part](args)]
    if not args.small:
        settings = vars(args)
        if args.device == "cuda":
            settings["gpu"] = {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        print("wrote", common.save("gpu_products", rows, settings))


if __name__ == "__main__":
    main()
