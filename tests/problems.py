"""From rows of the table to risks, other batchings of the same data, and what must not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import curvlib as cl
from tests.cases import CASES, Case, build
from tests.oracles import dense


def risk_of(case: Case, **changes: Any) -> cl.Risk:
    """The risk as a user writes it."""
    return cl.Risk(case.model, case.loss, case.data, **(case.settings | changes))


@dataclass(frozen=True)
class Operator:
    """A row of the table of operators: how to make it, and which problems it is for."""

    make: Callable[..., cl.LinearOperator]
    oracle: str
    psd: bool
    applies: Callable[[str, Case], bool] = lambda name, case: True


def _tensor_outputs(name: str, case: Case) -> bool:
    return name != "hf own loss"


def _splittable(name: str, case: Case) -> bool:
    """Whether the loss of one example can be told from outputs and targets."""
    return not (name.startswith("hf") and case.truth.kind == "other")


def _known(name: str, case: Case) -> bool:
    return case.truth.kind != "other"


OPERATORS: dict[str, Operator] = {
    "hessian": Operator(cl.hessian, "hessian", False),
    "ggn": Operator(cl.ggn, "ggn", True, _tensor_outputs),
    "type2": Operator(lambda r: cl.fisher(r, kind="type2"), "type2", True, _known),
    "empirical": Operator(lambda r: cl.fisher(r, kind="empirical"), "empirical", True, _splittable),
}
_BUILT = {name: build(name) for name in CASES}  # only read
ROWS = [
    (operator, name)
    for operator, row in OPERATORS.items()
    for name, case in _BUILT.items()
    if row.applies(name, case)
]
_OTHER = {name for name, case in _BUILT.items() if case.truth.kind == "other"}


def psd_is_promised(operator: str, name: str) -> bool:
    """A GGN is positive semi-definite only for a convex loss, which curvlib cannot know."""
    return OPERATORS[operator].psd and not (operator == "ggn" and name in _OTHER)


def oracle(operator: str, name: str, rounded: torch.dtype | None = None) -> Tensor:
    return dense(OPERATORS[operator].oracle, name, rounded)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    norm = float(expected.norm())
    return float((found.to(expected.dtype) - expected).norm()) / (norm if norm > 0 else 1.0)


def columns(rows: int, count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, count, dtype=torch.float64, generator=generator).to(dtype)


# ------------------------------------------------------------------------- batchings
def joined(case: Case) -> Any:
    """All examples as one batch of the same kind."""
    if isinstance(case.data[0], dict):
        return {key: torch.cat([b[key] for b in case.data]) for key in case.data[0]}
    return tuple(torch.cat(parts) for parts in zip(*case.data, strict=True))


def rebatched(case: Case, sizes: list[int]) -> Case:
    """The same examples in batches of other sizes."""
    whole = joined(case)
    if isinstance(whole, dict):
        split = {key: torch.split(value, sizes) for key, value in whole.items()}
        data: list[Any] = [
            {key: value[i] for key, value in split.items()} for i in range(len(sizes))
        ]
    else:
        data = list(zip(*(torch.split(part, sizes) for part in whole), strict=True))
    return replace(case, data=data)


class Rows(Dataset[Any]):
    """A map-style data set of the examples of a joined batch."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole

    def __len__(self) -> int:
        values = self.whole.values() if isinstance(self.whole, dict) else self.whole
        return len(next(iter(values)))

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.whole, dict):
            return {key: value[index] for key, value in self.whole.items()}
        return tuple(part[index] for part in self.whole)


def loader(case: Case, batch_size: int = 3) -> DataLoader[Any]:
    return DataLoader(Rows(joined(case)), batch_size=batch_size)


class Counting:
    """An iterable that counts how often it was gone through, and how far."""

    def __init__(self, data: list[Any]) -> None:
        self.data = data
        self.passes = 0
        self.batches = 0

    def __iter__(self) -> Any:
        self.passes += 1
        for batch in self.data:
            self.batches += 1
            yield batch

    def __len__(self) -> int:
        return len(self.data)


# -------------------------------------------------------------- nothing may change
@dataclass
class Snapshot:
    """Everything of a model and of the process that a computation may not change, bit by bit."""

    entries: dict[str, Any]

    def assert_same(self, other: Snapshot) -> None:
        assert self.entries.keys() == other.entries.keys()
        for key, value in self.entries.items():
            again = other.entries[key]
            if isinstance(value, Tensor):
                assert isinstance(again, Tensor), key
                assert value.dtype == again.dtype, key
                assert torch.equal(value, again), key
            else:
                assert value == again, key


def snapshot(model: nn.Module) -> Snapshot:
    entries: dict[str, Any] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        entries[f"{name} value"] = p.detach().clone()
        entries[f"{name} object"] = (id(p), p.data_ptr(), p._version, p.requires_grad, p.is_leaf)
        entries[f"{name} grad"] = None if p.grad is None else p.grad.clone()
        entries[f"{name} grad object"] = id(p.grad)
        entries[f"{name} hooks"] = len(p._backward_hooks or ())
    for name, b in model.named_buffers():
        entries[f"{name} value"] = b.clone()
        entries[f"{name} object"] = (id(b), b.data_ptr(), b._version, b.requires_grad)
    for name, m in model.named_modules():
        hooks = [k for k in vars(m) if "hooks" in k]
        entries[f"{name} hooks"] = {k: len(getattr(m, k) or ()) for k in hooks}
        entries[f"{name} keys"] = sorted(vars(m)), sorted(m._parameters), sorted(m._modules)
        entries[f"{name} training"] = m.training
    entries["random state"] = torch.get_rng_state()
    entries["modes"] = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )
    return Snapshot(entries)
