"""How much of a model an operator covers, and what it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from curvlib.core.ranks.dtensors import plain_type
from curvlib.core.result import Result


@dataclass(frozen=True, eq=False, repr=False)
class Coverage(Result):
    """Which parameters have Kronecker-factored curvature.

    Attributes:
        percent: Percentage of parameters (of their entries) in a factored block.
        covered: Names of the parameters in blocks.
        uncovered: Why each of the others is in none, by name.
        diagonal: Whether these have a diagonal instead.
        by_type: Entries that are covered, and all entries, by the type of the module.
    """

    percent: float
    covered: tuple[str, ...]
    uncovered: dict[str, str]
    diagonal: bool
    by_type: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        lines = [f"{self.percent:.1f} % of the parameters are covered"]
        for kind, (some, every) in self.by_type.items():
            lines.append(f"  {kind}: {some:,} of {every:,} ({100.0 * some / every:.1f} %)")
        instead = " (diagonal instead)" if self.diagonal else ""
        for name, reason in self.uncovered.items():
            lines.append(f"  not {name}{instead}: {reason}")
        return "\n".join(lines)


def coverage_of(
    model: nn.Module,
    params: Mapping[str, Tensor],
    uncovered: Mapping[str, str],
    *,
    diagonal: bool = False,
) -> Coverage:
    """The coverage of some parameters of a model, all but ``uncovered``."""
    by_type: dict[str, tuple[int, int]] = {}
    kinds = {
        id(held): plain_type(module).__name__
        for module in reversed(list(model.modules()))
        for held in module._parameters.values()
    }
    for name, param in params.items():
        some, every = by_type.get(kinds[id(param)], (0, 0))
        own = 0 if name in uncovered else param.numel()
        by_type[kinds[id(param)]] = (some + own, every + param.numel())
    total = sum(every for _, every in by_type.values())
    return Coverage(
        percent=100.0 * sum(some for some, _ in by_type.values()) / max(1, total),
        covered=tuple(name for name, p in params.items() if name not in uncovered and p.numel()),
        uncovered=dict(uncovered),
        diagonal=diagonal,
        by_type=by_type,
    )
