"""EK-FAC influence on a character transformer: time and memory beside kronfluence.

    python benchmarks/influence_speed.py [--parts time memory ranks] [--widths 128 256]
                                         [--depth 4] [--train 1024] [--queries 32] [--rounds 5]

The model is trained for a moment on tinyshakespeare (in the folder ``CURVLIB_DATA``), else on
sources of the standard library. Scores are about the linear layers of its blocks.

``time``
    Both fit EK-FAC with one sampled target a token, in batches of the same size, and score all
    training examples for all queries: with dense directions of the queries, and of rank 16. The
    two are called by turns, phase by phase. Fits are split into factors with their
    eigendecompositions, and corrected eigenvalues. The floor is one forward and backward pass over
    the training data, with gradients of the same parameters; a fit takes two of these, a scan one.
    "eigenvalues" of curvlib is the whole fit less the factors. kronfluence writes its factors and
    scores to a temporary folder, as it always does. On one thread, seconds are those of the
    processor, which other processes disturb least (waiting for the disk is not counted).
``memory``
    How much a fresh process grows while it looks for the top 10 of N, 4 N, 16 N, 64 N examples,
    at the first width: the median of three processes, since what the allocator keeps differs.
``ranks``
    Spearman correlations of compressed and dense scores over the examples of each query, and the
    certified bound.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlib as cl
from curvlib.influence.influence import Influence
from curvlib.influence.matrix import bounded_scores
from curvlib.influence.ranks import rank_correlation

LENGTH, VOCABULARY = 64, 96
LAYERS = ("blocks.*.qkv", "blocks.*.out", "blocks.*.mlp.0", "blocks.*.mlp.2")
PARAMS = [f"{name}.*" for name in LAYERS]
RANKS = (1, 2, 4, 8, 16, 32)
LOSS = nn.CrossEntropyLoss()


# ----------------------------------------------------------------------------- problem
def corpus() -> Tensor:
    """Characters as numbers below 96: tinyshakespeare, or the standard library."""
    folder = os.environ.get("CURVLIB_DATA")
    file = Path(folder) / "tinyshakespeare.txt" if folder else None
    if file is not None and file.exists():
        text = file.read_text(encoding="utf-8")
    else:
        files = sorted(Path(os.__file__).parent.glob("*.py"))[:80]
        text = "\n".join(f.read_text(encoding="utf-8") for f in files)
    return torch.tensor([min(max(ord(c) - 31, 0), VOCABULARY - 1) for c in text])


@dataclass(frozen=True)
class Problem:
    """A trained model, and windows of text."""

    model: nn.Module
    text: Tensor

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Windows ``start`` to ``stop``, and what follows each character, flat."""
        step = 61  # overlapping where the text is short
        begin = torch.arange(start, stop) * step % (len(self.text) - LENGTH - 1)
        windows = self.text[begin[:, None] + torch.arange(LENGTH + 1)]
        return windows[:, :-1].contiguous(), windows[:, 1:].flatten()

    def batches(self, start: int, stop: int, size: int) -> list[tuple[Tensor, Tensor]]:
        """The same in batches."""
        return [self.batch(i, min(i + size, stop)) for i in range(start, stop, size)]


def problem(width: int, depth: int, steps: int) -> Problem:
    """The same model at every call."""
    text = corpus()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = common.GPT(VOCABULARY, LENGTH, width, heads=4, depth=depth)
        own = Problem(model, text)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for i in range(steps):
            x, y = own.batch(32 * i, 32 * i + 32)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return Problem(model.eval(), text)


class Windows:
    """Batches that are made when they are asked for, so that data take no memory."""

    def __init__(self, own: Problem, stop: int, size: int) -> None:
        self.own, self.stop, self.size = own, stop, size

    def __len__(self) -> int:
        return (self.stop + self.size - 1) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.stop, self.size):
            yield self.own.batch(start, min(start + self.size, self.stop))


# ------------------------------------------------------------------------- contenders
Phases = dict[str, Callable[[], Any]]


def ours(own: Problem, args: argparse.Namespace) -> tuple[Phases, dict[str, Tensor]]:
    """Phases of curvlib, and what they find."""
    risk = cl.Risk(own.model, LOSS, own.batches(0, args.train, args.batch), params=PARAMS)
    query = own.batch(args.train, args.train + args.queries)
    fitted: dict[str, Any] = {}
    found: dict[str, Tensor] = {}

    def fit(corrected: bool) -> None:
        fitted["K"] = cl.kfac(risk, eigen_corrected=corrected, fisher="mc", progress=False)

    def scan(name: str, rank: int | None) -> None:
        inf = Influence.of(risk, fitted["K"], progress=False)
        found[name] = inf.scores(query, rank=rank).scores

    def top() -> None:
        inf = Influence.of(risk, fitted["K"], progress=False)
        inf.top(query, k=10, per_layer=False, per_token=False)

    return {
        "fit: factors": lambda: fit(False),
        "fit": lambda: fit(True),
        "scan": lambda: scan("scan", None),
        "scan, rank 16": lambda: scan("scan, rank 16", 16),
        "top 10": top,
    }, found


def theirs(
    own: Problem, args: argparse.Namespace, folder: Path
) -> tuple[Phases, dict[str, Tensor]]:
    """Phases of kronfluence, and what they find."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    names = [
        name
        for name, module in own.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    ]

    class Summed(Task):
        """Summed losses, as its documentation asks for."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0])
            target = batch[1].flatten()
            if sample:
                with torch.no_grad():
                    target = torch.multinomial(logits.softmax(-1), 1).flatten()
            return F.cross_entropy(logits, target, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

    def dataset(start: int, stop: int) -> Any:
        x, y = own.batch(start, stop)
        return TensorDataset(x, y.view(len(x), -1))

    task = Summed()
    model = prepare_model(copy.deepcopy(own.model), task)
    analyzer = Analyzer("speed", model, task, cpu=True, output_dir=str(folder), disable_tqdm=True)
    train, query = dataset(0, args.train), dataset(args.train, args.train + args.queries)
    settings = FactorArguments(strategy="ekfac")
    common_ = {"per_device_batch_size": args.batch, "overwrite_output_dir": True}
    found: dict[str, Tensor] = {}

    def factors() -> None:
        analyzer.fit_covariance_matrices("f", train, factor_args=settings, **common_)
        analyzer.perform_eigendecomposition("f", settings, overwrite_output_dir=True)

    def eigenvalues() -> None:
        analyzer.fit_lambda_matrices("f", train, factor_args=settings, **common_)

    def scan(name: str, rank: int | None) -> None:
        analyzer.compute_pairwise_scores(
            name.replace(" ", ""),
            "f",
            query,
            train,
            per_device_query_batch_size=args.queries,
            per_device_train_batch_size=args.batch,
            score_args=ScoreArguments(damping_factor=None, query_gradient_low_rank=rank),
            overwrite_output_dir=True,
        )
        found[name] = analyzer.load_pairwise_scores(name.replace(" ", ""))["all_modules"].float()

    return {
        "fit: factors": factors,
        "fit: eigenvalues": eigenvalues,
        "scan": lambda: scan("scan", None),
        "scan, rank 16": lambda: scan("scan, rank 16", 16),
    }, found


def floor(own: Problem, args: argparse.Namespace) -> Callable[[], None]:
    """A forward and backward pass over the training data."""
    params = [
        p for n, p in own.model.named_parameters() if n.startswith("blocks.") and "norm" not in n
    ]
    data = own.batches(0, args.train, args.batch)

    def call() -> None:
        for x, y in data:
            torch.autograd.grad(F.cross_entropy(own.model(x), y, reduction="sum"), params)

    return call


# ------------------------------------------------------------------------------- parts
def time_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of each phase, for each width."""
    return [{"width": width} | row for width in args.widths for row in _time_rows(args, width)]


def _time_rows(args: argparse.Namespace, width: int) -> list[dict[str, Any]]:
    own = problem(width, args.depth, args.steps)
    with tempfile.TemporaryDirectory() as name:
        mine, my_scores = ours(own, args)
        peers: Phases = {}
        their_scores: dict[str, Tensor] = {}
        try:
            peers, their_scores = theirs(own, args, Path(name))
        except ImportError:
            print("kronfluence is not installed (pip install kronfluence): curvlib alone")
        contenders: Phases = {"floor": floor(own, args)}
        for phase in ("fit: factors", "fit: eigenvalues", "fit", "scan", "scan, rank 16", "top 10"):
            for library, phases in (("curvlib", mine), ("kronfluence", peers)):
                if phase in phases:
                    contenders[f"{library}|{phase}"] = phases[phase]
        seconds = {name: [] for name in contenders}
        for turn in range(args.rounds + 1):  # the first warms up
            for name, call in contenders.items():  # phases need those before
                taken = _seconds(call)
                if turn:
                    seconds[name].append(taken)
    times = {name: statistics.median(taken) for name, taken in seconds.items()}
    both = {"curvlib": {}, "kronfluence": {}}
    for name, taken in times.items():
        if name != "floor":
            library, phase = name.split("|")
            both[library][phase] = taken
    mine_, peer = both["curvlib"], both["kronfluence"]
    mine_["fit: eigenvalues"] = mine_["fit"] - mine_["fit: factors"]
    if peer:
        peer["fit"] = peer["fit: factors"] + peer["fit: eigenvalues"]
    rows = []
    for phase in ("fit: factors", "fit: eigenvalues", "fit", "scan", "scan, rank 16", "top 10"):
        theirs_ = peer.get(phase)
        row = {
            "part": "time",
            "phase": phase,
            "curvlib s": mine_[phase],
            "kronfluence s": theirs_,
            "speedup": None if theirs_ is None else theirs_ / mine_[phase],
            "curvlib / floor": mine_[phase] / times["floor"],
            "floor s": times["floor"],
        }
        rows.append(row)
    if peer:
        agree = rank_correlation(my_scores["scan"], their_scores["scan"])
        rows.append(
            {
                "part": "time",
                "phase": "scores of both: Spearman of each query, mean",
                "value": float(agree.mean()),
            }
        )
        low = rank_correlation(their_scores["scan, rank 16"], their_scores["scan"])
        rows.append(
            {
                "part": "time",
                "phase": "kronfluence rank 16 to its dense: Spearman, lowest",
                "value": float(low.min()),
            }
        )
    return rows


def rank_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compressed scores beside dense ones, for each width."""
    return [{"width": width} | row for width in args.widths for row in _rank_rows(args, width)]


def _rank_rows(args: argparse.Namespace, width: int) -> list[dict[str, Any]]:
    own = problem(width, args.depth, args.steps)
    risk = cl.Risk(own.model, LOSS, own.batches(0, args.train, args.batch), params=PARAMS)
    query = own.batch(args.train, args.train + args.queries)
    inf = Influence.of(risk, cl.kfac(risk, fisher="mc", progress=False), progress=False)
    dense = inf.scores(query).scores
    rows = []
    for rank in RANKS:
        low = bounded_scores(inf, query, rank=rank)
        same = rank_correlation(low.scores, dense)
        error = (low.scores - dense).abs()
        slack = 1e-5 * dense.abs().amax(1, keepdim=True)  # rounding of float32
        rows.append(
            {
                "part": "ranks",
                "rank": rank,
                "Spearman, mean": float(same.mean()),
                "Spearman, lowest": float(same.min()),
                "bound / error, median": float((low.bounds / error.clamp(min=1e-30)).median()),
                "bound violated": int((error > low.bounds + slack).sum()),
                "of": error.numel(),
            }
        )
    return rows


def memory_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Growth of fresh processes."""
    rows = []
    for factor in (1, 4, 16, 64):
        count = factor * args.train
        command = [sys.executable, __file__, "--grow", str(count)]
        command += ["--widths", str(args.widths[0])]
        for name in ("depth", "train", "queries", "batch", "threads"):
            command += [f"--{name}", str(getattr(args, name))]
        grown = []
        for _ in range(3):
            out = subprocess.run(command, check=True, capture_output=True, text=True)
            grown.append(int(out.stdout.split()[-1]) / 1e6)
        rows.append(
            {
                "width": args.widths[0],
                "part": "memory",
                "examples": count,
                "grows by MB": statistics.median(grown),
                "lowest": min(grown),
                "highest": max(grown),
            }
        )
    return rows


def grow(args: argparse.Namespace) -> None:
    """Prints the bytes by which this process grows while it looks for the top 10."""
    own = problem(args.widths[0], args.depth, steps=0)
    fitted = cl.Risk(own.model, LOSS, own.batches(0, 64, args.batch), params=PARAMS)
    inf = Influence.of(fitted, cl.kfac(fitted, fisher="mc", progress=False), progress=False)
    query = own.batch(args.grow, args.grow + args.queries)
    inf.top(query, k=10, per_layer=False, per_token=False)  # what is made once is not counted
    data = Windows(own, args.grow, args.batch)
    found = common.peak_memory(
        lambda: inf.top(query, k=10, train=data, per_layer=False, per_token=False)
    )
    print(-1 if found is None else found)


def _seconds(call: Callable[[], Any]) -> float:
    import time

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


PARTS: dict[str, tuple[Callable[[argparse.Namespace], list[dict[str, Any]]], dict[str, str]]] = {
    "time": (
        time_rows,
        {
            "width": "",
            "phase": "",
            "curvlib s": ".2f",
            "kronfluence s": ".2f",
            "speedup": ".2f",
            "curvlib / floor": ".2f",
            "value": ".4f",
        },
    ),
    "memory": (
        memory_rows,
        {"width": "", "examples": "", "grows by MB": ".1f", "lowest": ".1f", "highest": ".1f"},
    ),
    "ranks": (
        rank_rows,
        {
            "width": "",
            "rank": "",
            "Spearman, mean": ".4f",
            "Spearman, lowest": ".4f",
            "bound / error, median": ".1f",
            "bound violated": "",
            "of": "",
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    add("--widths", type=int, nargs="+", default=[128, 256])
    add("--depth", type=int, default=4)
    add("--train", type=int, default=1024)
    add("--queries", type=int, default=32)
    add("--batch", type=int, default=64)
    add("--steps", type=int, default=150, help="of training")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--no-save", action="store_true")
    add("--grow", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.grow:
        grow(args)
        return
    rows: list[dict[str, Any]] = []
    for part in args.parts:
        function, columns = PARTS[part]
        new = function(args)
        rows += new
        print(common.table(new, columns), end="\n\n", flush=True)
    if not args.no_save:
        settings = {k: v for k, v in vars(args).items() if k not in ("no_save", "grow")}
        settings |= {
            "length": LENGTH,
            "text": "tinyshakespeare" if os.environ.get("CURVLIB_DATA") else "standard library",
        }
        settings |= {"kronfluence": common.version("kronfluence")}
        print("wrote", common.save("influence_speed", rows, settings))


if __name__ == "__main__":
    main()
