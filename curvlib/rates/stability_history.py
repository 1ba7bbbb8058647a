"""What a :class:`curvlib.rates.monitor.StabilityMonitor` has read: by column, and as a figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.core.result import Result, axes_or_new, unframed
from curvlib.rates.stability_table import COLUMNS, StabilityReading

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class StabilityHistory(Result):
    """All readings of a run, by column.

    Attributes:
        columns: Numbers ``[n]`` by the names of :class:`StabilityReading`, float64.
        method: The optimizer's name.
        adaptive: Whether ``sharpness`` is preconditioned.
        settings: The settings, by name.
    """

    columns: dict[str, Tensor]
    method: str
    adaptive: bool
    settings: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.columns:
            raise ValueError(f"there is no column {name!r}; there are {', '.join(self.columns)}")
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns["step"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws sharpness along training, with its edge of stability.

        Args:
            ax: Where to draw; a new figure when omitted.

        Raises:
            ValueError: If there is no reading.
            ImportError: If matplotlib is absent.
        """
        if not len(self):
            raise ValueError("there is no reading to draw yet; call monitor.step() or .read()")
        ax = axes_or_new(ax)
        steps = self["step"].tolist()

        def draw(name: str, label: str, **style: Any) -> None:
            values = self[name]
            if bool((torch.isfinite(values) & (values > 0.0)).any()):
                ax.plot(steps, values.tolist(), label=label, **style)

        if self.adaptive:
            draw("sharpness", "preconditioned sharpness", color="#0072B2", marker="o", ms=2.5)
        else:
            self._draw_batches(draw)
            draw("lambda_max", r"$\lambda_{\max}$ of all data", color="#0072B2", marker="o", ms=2.5)
        draw("edge", self._edge_label(), color="0.15", ls="--", lw=1.3)
        if not self.adaptive and bool((self["momentum"] > 0.0).any()):
            draw("gradient_descent_edge", r"$2 / \eta$", color="0.5", ls=":", lw=1.3)
        shown = self["sharpness" if self.adaptive else "lambda_max"]
        shown = torch.cat([shown, self["edge"]])
        shown = shown[torch.isfinite(shown) & (shown > 0.0)]
        if shown.numel() and float(shown.max()) > 30.0 * float(shown.min()):
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=0.0)
        ax.set_xlabel("training step")
        ax.set_ylabel("curvature")
        # The legend is above the axes, where no line can lie under it.
        return unframed(
            ax,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=2,
            borderaxespad=0.1,
            handlelength=1.6,
            columnspacing=1.0,
        )

    def _draw_batches(self, draw: Any) -> None:
        if self.settings["batch_size"] >= self.settings["examples"]:
            return
        size = self.settings["batch_size"]
        draw("batch_sharpness", f"batch sharpness, B = {size}", color="#E69F00", lw=1.1)
        draw("mean_square_sharpness", "with noise tr(H) / B", color="#009E73", lw=1.1)

    def _edge_label(self) -> str:
        if self.adaptive and self.method in ("Adam", "AdamW", "AdaHessian"):
            return r"edge $(2 + 2\beta_1) / ((1 - \beta_1)\,\eta)$"
        if bool((self["momentum"] > 0.0).any()):
            return r"edge $2 (1 + \mu) / \eta$"
        return r"edge $2 / \eta$"


def history_of(
    rows: list[StabilityReading], method: str, adaptive: bool, settings: dict[str, Any]
) -> StabilityHistory:
    """Readings as columns."""
    columns = {
        name: torch.tensor([float(getattr(row, name)) for row in rows], dtype=torch.float64)
        for name in COLUMNS
    }
    return StabilityHistory(columns, method, adaptive, settings)
