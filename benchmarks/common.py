"""What the benchmarks share: problems, contenders' clocks, memory, and rows of results.

Times are medians over interleaved rounds: in each round every contender runs once, so that a slow
moment of the machine hits all of them. Ratios are to one gradient measured in the same rounds.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "curvlib",
    "torch",
    "curvlinops-for-pytorch",
    "backpack-for-pytorch",
    "kronfluence",
    "pytorch_optimizer",
)


# --------------------------------------------------------------------------- problems
class Block(nn.Module):
    """A pre-norm transformer block with native affine LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, c))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A small language model; outputs ``[N * T, V]``, so that every library can take them."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.embed(tokens) + self.position)
        return self.head(self.norm(x)).flatten(0, 1)


@dataclass(frozen=True)
class Problem:
    """A classification problem: one batch in memory, mean cross-entropy."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.params)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def double(self) -> Problem:
        """The same numbers in float64."""
        import copy

        x = self.x.double() if self.x.is_floating_point() else self.x
        return Problem(self.name, copy.deepcopy(self.model).double(), x, self.y)


def _mlp() -> Problem:
    sizes = (784, 1024, 640, 10)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return Problem("mlp", nn.Sequential(*layers[:-1]), torch.randn(128, 784), _labels(128))


def _conv() -> Problem:
    layers: list[nn.Module] = []
    for a, b, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1), (128, 192, 2)):
        layers += [nn.Conv2d(a, b, 3, padding=1, stride=stride), nn.BatchNorm2d(b), nn.GELU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10))
    return Problem("conv", model.eval(), torch.randn(32, 3, 32, 32), _labels(32))


def _gpt() -> Problem:
    model = GPT(vocabulary=65, length=64, width=128, heads=4, depth=4)
    tokens = torch.randint(65, (8, 65))
    with torch.no_grad():  # as after some training: affine parameters have moved
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(0.2 * torch.randn_like(module.weight))
                module.bias.add_(0.2 * torch.randn_like(module.bias))
    return Problem("gpt", model, tokens[:, :-1], tokens[:, 1:].flatten())


def _digits() -> Problem:
    """A trained network small enough for its whole spectrum."""
    from sklearn.datasets import load_digits

    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return Problem("digits", model, x, y)


def _labels(count: int) -> Tensor:
    return torch.randint(10, (count,))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp": _mlp,
    "conv": _conv,
    "gpt": _gpt,
    "digits": _digits,
}


def problem(name: str) -> Problem:
    """A fresh problem; always the same numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PROBLEMS[name]()


def vectors(size: int, count: int) -> Tensor:
    """Columns ``[size, count]`` of unit norm, column-contiguous."""
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(1))
    return (rows / rows.norm(dim=1, keepdim=True)).T


def split(flat: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
    parts = torch.split(flat, [p.numel() for p in params])
    return [part.view_as(p) for part, p in zip(parts, params, strict=True)]


def join(parts: Any) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parts])


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, in the Frobenius norm, in float64."""
    return float((found.double() - exact).norm() / exact.norm())


def curvlinops_operator(p: Problem, kind: str) -> Any:
    """The Hessian or GGN of curvlinops, which has to be installed."""
    import curvlinops

    classes = {
        "hessian": curvlinops.HessianLinearOperator,
        "ggn": curvlinops.GGNLinearOperator,
    }
    return classes[kind](
        p.model,
        nn.CrossEntropyLoss(),
        p.params,
        [(p.x, p.y)],
        check_deterministic=False,
        num_data=p.x.shape[0],
    )


class Streamed:
    """Data that a library cannot know to be in memory: every product computes it anew."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


# ----------------------------------------------------------------------------- clocks
@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles over rounds."""

    median: float
    low: float
    high: float


def race(
    contenders: dict[str, Callable[[], Any]], *, rounds: int, least: float
) -> dict[str, Timing]:
    """Times contenders in interleaved rounds.

    Args:
        contenders: Functions by name; each is called once before, to warm up.
        rounds: How often each is timed.
        least: Seconds that one timing should last at least; short calls are repeated.
    """
    repeats: dict[str, int] = {}
    for name, call in contenders.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(least / max(time.perf_counter() - start, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        order = list(contenders)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                contenders[name]()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and convolutions."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # its hooks do not work inside function transforms
    with counter:
        call()
    return int(counter.get_total_flops())


class _NoModules:
    """Stands in for the tracker of modules, by which operations would be told apart."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *reason: object) -> None: ...


def math_attention(call: Callable[[], Any]) -> Callable[[], Any]:
    """The attention kernel that has second derivatives, which peers leave to their users."""

    def arranged() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return call()

    return arranged


# ----------------------------------------------------------------------------- memory
def peak_memory(call: Callable[[], Any]) -> int | None:
    """Bytes by which this process grows at most while ``call`` runs (Linux), else ``None``."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0)
    except OSError:
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(field)


# ---------------------------------------------------------------------------- results
def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "curvlib":
            import curvlib

            return getattr(curvlib, "__version__", "source")
        return None


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def measured(
    options: Any,
    kinds: Iterable[str],
    measure: Callable[[str, str, int, int], list[dict[str, Any]]],
    columns: dict[str, str],
) -> list[dict[str, Any]]:
    """Rows of all problems, kinds and numbers of vectors, with a table of each as it comes."""
    rows = []
    for name, kind, count in itertools.product(options.problems, kinds, options.columns):
        part = measure(name, kind, count, options.rounds)
        rows += part
        title = f"{name} ({part[0]['parameters']:,} parameters), {kind}, K = {count}"
        print(f"\n{title}\n{table(part, columns)}", flush=True)
    return rows


def save(name: str, rows: list[dict[str, Any]], settings: dict[str, Any]) -> Path:
    """Writes rows with the machine, versions and date, one row a line."""
    head = {
        "benchmark": name,
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "machine": machine(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in PACKAGES},
        "settings": settings,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    body = json.dumps(head, indent=2)[:-2]
    path.write_text(f'{body},\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    return path


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """A plain table; ``columns`` maps keys to format specifications."""
    head = list(columns)
    cells = [[_cell(row.get(key), spec) for key, spec in columns.items()] for row in rows]
    widths = [max(len(c) for c in column) for column in zip(head, *cells, strict=True)]
    lines = ["  ".join(h.ljust(w) for h, w in zip(head, widths, strict=True))]
    lines.append("  ".join("-" * w for w in widths))
    lines += [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    ]
    return "\n".join(lines)


def _cell(value: Any, spec: str) -> str:
    if value is None:
        return "-"
    return format(value, spec) if not isinstance(value, str) else value


if __name__ == "__main__":
    sys.stdout.write(json.dumps(machine()) + "\n")
