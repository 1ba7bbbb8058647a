r"""Curvature along a training run, next to the line at which training becomes unstable.

Full-batch gradient descent sharpens until :math:`\lambda_{\max}(H)` reaches :math:`2 / \eta` and
stays there, at the *edge of stability*; other optimizers have edges of their own
(:mod:`curvlib.rates.stability_bounds`). A :class:`StabilityMonitor` reads, at chosen steps,

* :math:`\lambda_{\max}(H)`, by Lanczos from the last reading's eigenvector :math:`v`: a few
  products;
* trace and Frobenius norm, from the same few random vectors :math:`z`, of which the part along
  :math:`v` is counted exactly, :math:`z_\perp = (I - v v^\top) z`:

  .. math:: \operatorname{tr} H = v^\top H v + E\, z_\perp^\top H z_\perp, \qquad
            \|H\|_F^2 = \|H v\|^2 + E\, \|H z_\perp\|^2 ;

* batch sharpness, the mean :math:`\lambda_{\max}` of random mini-batches, and from the gradients
  :math:`g_j` of the same mini-batches the gradient noise scale
  :math:`\operatorname{tr} \Sigma / \|g\|^2` (McCandlish et al., 2018): for :math:`k` disjoint
  batches, :math:`\frac{B}{k - 1} \sum_j \|g_j - \bar g\|^2` has the mean
  :math:`\operatorname{tr} \Sigma`;
* the sharpness along the last update of the optimizer;
* for adaptive methods the preconditioned sharpness, the largest eigenvalue of
  :math:`P^{-1/2} H P^{-1/2}`.

A reading leaves the model, the optimizer and the random state bitwise as they are.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from curvlib.core.minibatch import require_batch_size
from curvlib.core.operator import LinearOperator
from curvlib.core.random import generator_of
from curvlib.core.ranks.group import together
from curvlib.core.risk import Risk
from curvlib.core.structured import Diagonal
from curvlib.estimators.arguments import require_counts
from curvlib.estimators.frobenius import root_error
from curvlib.operators.hessian import hessian
from curvlib.rates.arguments import first_seed, mean_and_stderr, require_risk
from curvlib.rates.batch_reading import BatchReading, read_batches
from curvlib.rates.preconditioned import preconditioned
from curvlib.rates.spiked import effective_batch
from curvlib.rates.stability_bounds import Edge, edge_of
from curvlib.rates.stability_history import (
    StabilityHistory,
    history_of,
)
from curvlib.rates.stability_table import StabilityReading, existing_rows, write_csv, writer_of
from curvlib.rates.training import (
    WORK,
    diverged,
    group_entries,
    joined_loss,
    require_state,
    require_trained,
    top_of,
    trained_curvature,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND = "StabilityMonitor"


class StabilityMonitor:
    """Watches curvature while an optimizer trains.

    Call :meth:`step` after each ``optimizer.step()``; :meth:`read` takes a reading at once. In a
    process group, all ranks do, with the same parameters and states of the optimizer; the first
    one writes.

    Args:
        risk: Model, loss and the training data, or some thousand examples of it: a mean over
            independent examples.
        optimizer: What trains the model: SGD, Adam, AdamW, AdaHessian, RMSprop or Adagrad.
        every: Steps from one reading to the next.
        batch_size: What is trained with; all of the risk's examples when omitted.
        draws: Mini-batches for batch sharpness and the noise scale; 0 leaves both out.
        probes: Random vectors for trace and Frobenius norm.
        tolerance: Of eigenpairs, relative to the norm; an eigenvalue's error is of its square.
        path: A CSV file, written whole at each reading.
        resume: Whether an existing file is continued: its rows before the step at which this run
            goes on are kept. Without, an existing file is an error.
        tensorboard: A folder, or a ``SummaryWriter``.
        generator: Where examples and random vectors come from, or
        seed: their seed. With neither, the seed is 0.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument does not fit, the optimizer is unknown, or the file exists.
        OSError: If the file cannot be written.
        ImportError: If TensorBoard is asked for and absent.

    Example:
        >>> import torch, curvlib as cl
        >>> x, y = torch.randn(32, 3), torch.randn(32, 1)
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (x, y))
        >>> monitor = StabilityMonitor(risk, optimizer, every=5)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     loss = risk.loss.function(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        ...     _ = monitor.step(loss)
        >>> monitor.history["step"].tolist(), monitor.history["edge"].tolist()
        ([5.0, 10.0], [20.0, 20.0])
    """

    def __init__(
        self,
        risk: Risk,
        optimizer: Optimizer,
        *,
        every: int = 100,
        batch_size: int | None = None,
        draws: int = 4,
        probes: int = 4,
        tolerance: float = 1e-2,
        path: str | os.PathLike[str] | None = None,
        resume: bool = False,
        tensorboard: Any = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> None:
        require_trained(risk, optimizer)
        edge = edge_of(optimizer)
        self._count = require_risk(risk)
        self._batch = self._count if batch_size is None else batch_size
        require_batch_size(self._batch, self._count)
        require_counts(every=(every, 1), draws=(draws, 0), probes=(probes, 2))
        if not 0.0 < tolerance < 1.0:
            raise ValueError(f"expected 0 < tolerance < 1 (of the norm), got {tolerance}")
        self.risk, self.optimizer = risk, optimizer
        self._method, self._adaptive = edge.method, edge.adaptive
        self._settings: dict[str, Any] = {
            "every": every,
            "batch_size": self._batch,
            "draws": draws,
            "probes": probes,
            "tolerance": tolerance,
            "examples": self._count,
            "size": risk.space.size,
            "method": edge.method,
        }
        self._base = first_seed(generator, seed)
        self._calls = 0
        self._rows: list[StabilityReading] = []
        self._vector: Tensor | None = None
        self._preconditioned: Tensor | None = None
        self._before: Tensor | None = None
        self._update: Tensor | None = None
        self._edges: list[Edge] = []
        self._path = None if path is None else Path(path)
        self._first = risk.group is None or risk.group.first
        with together(risk.group, "opening its table"):
            self._old = existing_rows(self._path, resume) if self._first else []
            self._writer = writer_of(tensorboard) if self._first else None
        self._handles = [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._compare),
        ]

    # ------------------------------------------------------------------- reading
    @property
    def history(self) -> StabilityHistory:
        """All readings so far."""
        return history_of(self._rows, self._method, self._adaptive, dict(self._settings))

    @property
    def cost(self) -> float:
        """What all readings took, in training steps (gradients of ``batch_size`` examples)."""
        return sum(row.cost for row in self._rows)

    def step(self, loss: Tensor | float | None = None) -> StabilityReading | None:
        """To be called after each ``optimizer.step()``; a reading, if one is due.

        Args:
            loss: The loss, to be recorded. In a process group, each rank passes that of its part;
                their mean is recorded.

        Raises:
            TypeError: If the loss is no number.
            FloatingPointError: If the parameters have diverged.
        """
        self._calls += 1
        if self._calls % int(self._settings["every"]):
            return None
        return self.read(loss)

    def read(self, loss: Tensor | float | None = None) -> StabilityReading:
        """Takes a reading now, and writes it.

        Raises:
            TypeError: If the loss is no number.
            FloatingPointError: If the parameters have diverged.
        """
        value = joined_loss(self.risk, loss)
        where = diverged(self.risk)
        if where is not None:
            kept = "" if self._path is None else f" (they are in {str(self._path)!r})"
            raise FloatingPointError(
                f"training has diverged: parameter {where!r} has entries that are NaN or infinite "
                f"at step {self._calls}; the {len(self._rows)} readings before stand{kept}. Lower "
                "the learning rate"
            )
        row = self._measure(value)
        self._rows = [r for r in self._rows if r.step < row.step] + [row]
        with together(self.risk.group, "writing its table"):
            if self._path is not None and self._first:
                first = self._rows[0].step
                write_csv(self._path, [r for r in self._old if r.step < first] + self._rows)
        if self._writer is not None:
            for name, number in asdict(row).items():
                if name != "step" and math.isfinite(number):
                    self._writer.add_scalar(f"curvlib/{name}", number, row.step)
        return row

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws sharpness and its edge: see :meth:`StabilityHistory.plot`."""
        return self.history.plot(ax)

    def close(self) -> None:
        """Lets go of the optimizer."""
        for handle in self._handles:
            handle.remove()

    # --------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Everything to continue bitwise: numbers, strings, tensors and lists of them."""
        return {
            "kind": KIND,
            "settings": dict(self._settings),
            "calls": self._calls,
            "base": self._base,
            "vector": None if self._vector is None else self._vector.clone(),
            "preconditioned": (
                None if self._preconditioned is None else self._preconditioned.clone()
            ),
            "update": None if self._update is None else self._update.clone(),
            "rows": [asdict(row) for row in self._rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what :meth:`state_dict` gave.

        Raises:
            TypeError: If it is no dictionary.
            ValueError: If it is of something else, or of other settings.
        """
        require_state(state, self._settings, KIND)
        self._calls, self._base = int(state["calls"]), int(state["base"])
        held = (state["vector"], state["preconditioned"], state["update"])
        copies = [None if t is None else t.clone() for t in held]
        self._vector, self._preconditioned, self._update = copies
        self._rows = [StabilityReading(**row) for row in state["rows"]]

    # ------------------------------------------------------------------- private
    def _measure(self, loss: float | None) -> StabilityReading:
        s, n = self._settings, self._count
        seed = self._base + 1009 * self._calls
        edge = self._edge()
        H = hessian(self.risk)
        top = top_of(
            H, self._vector, examples=n, kind="hessian", seed=seed, tolerance=s["tolerance"]
        )
        self._vector = top.vector
        update = self._update
        columns = self._columns(top.vector, update, seed)
        images = H.matmat(columns)
        products = top.products + columns.shape[1]
        work = top.work + n * WORK["hessian"] * columns.shape[1]
        z, Hz = columns[:, : s["probes"]].mT.double(), images[:, : s["probes"]].mT.double()
        trace, trace_error = mean_and_stderr(torch.linalg.vecdot(z, Hz).cpu())
        square, square_error = mean_and_stderr(Hz.square().sum(1).cpu())
        trace, square = trace + top.value, square + top.value**2 + top.residual**2
        frobenius, frobenius_error = root_error(square, square_error)
        along = math.nan
        if update is not None:
            u = columns[:, -1].double()
            along = float(u @ images[:, -1].double()) / float(u @ u)
        noise, batch_products, batch_work = self._batches(top.value, seed)
        sharpness, more_products, more_work = self._sharpness(edge, top.value, H, seed)
        over_batch = trace / effective_batch(self._batch, n)
        plain = not edge.adaptive
        return StabilityReading(
            step=self._calls,
            loss=math.nan if loss is None else loss,
            lr=edge.lr,
            momentum=edge.momentum,
            lambda_max=top.value,
            lambda_max_residual=top.residual,
            trace=trace,
            trace_stderr=trace_error,
            frobenius=frobenius,
            frobenius_stderr=frobenius_error,
            **noise,
            update_sharpness=along,
            sharpness=sharpness,
            edge=edge.value,
            gradient_descent_edge=2.0 / edge.lr if edge.lr > 0.0 else math.inf,
            trace_over_batch=over_batch,
            mean_square_sharpness=sharpness + edge.noise_factor * over_batch if plain else math.nan,
            products=products + batch_products + more_products,
            cost=(work + batch_work + more_work) / self._batch,
        )

    def _columns(self, top: Tensor, update: Tensor | None, seed: int) -> Tensor:
        """Random signs without their part along the top eigenvector, and the update."""
        random = generator_of(None, seed + 1)
        size, k = self.risk.space.size, self._settings["probes"]
        signs = torch.randint(2, (k, size), generator=random).to(top).mul_(2.0).sub_(1.0)
        signs -= (signs @ top)[:, None] * top
        if update is None:
            return signs.mT
        rows = torch.cat([signs, (update / torch.linalg.vector_norm(update)).to(signs)[None]])
        return rows.mT

    def _batches(self, full: float, seed: int) -> tuple[dict[str, float], int, float]:
        if self._batch == self._count:
            return asdict(BatchReading(full, 0.0)), 0, 0.0
        found, products, work = read_batches(
            self.risk,
            self._batch,
            self._settings["draws"],
            self._count,
            start=self._vector,
            tolerance=max(self._settings["tolerance"], 1e-2),
            seed=seed + 2,
        )
        return asdict(found), products, work

    def _sharpness(
        self, edge: Edge, full: float, H: LinearOperator, seed: int
    ) -> tuple[float, int, float]:
        """The curvature that the edge is for; products and work."""
        groups = self.optimizer.param_groups
        decays = [float(g.get("weight_decay", 0.0)) if edge.coupled else 0.0 for g in groups]
        rates = [float(g["lr"]) for g in groups]
        if not all(rate > 0.0 for rate in rates):
            return math.nan, 0, 0.0  # a warm-up that has not begun
        if edge.adaptive:
            if any(not self.optimizer.state.get(p) for p in self.risk.params.values()):
                return math.nan, 0, 0.0  # no step yet, or no gradient
            spread = group_entries(self.risk, self.optimizer, decays)
            if spread is not None:
                H = H + Diagonal(spread.to(H.dtype))
            elif decays[0]:
                H = H.shift(decays[0])
            op = preconditioned(H, self.optimizer, self.risk)
        elif any(decays) or len(set(rates)) > 1:
            ratios = [rate / rates[0] for rate in rates]
            op = trained_curvature(self.risk, self.optimizer, "hessian", ratios)
        else:
            return full, 0, 0.0
        top = top_of(
            op,
            self._preconditioned,
            examples=self._count,
            kind="hessian",
            seed=seed + 1000,
            tolerance=self._settings["tolerance"],
        )
        self._preconditioned = top.vector
        return top.value, top.products, top.work

    # --------------------------------------------------------------------- hooks
    def _remember(self, *_: Any) -> None:
        due = (self._calls + 1) % int(self._settings["every"]) == 0
        self._before = self._point() if due else None
        self._edges = [edge_of(self.optimizer)]

    def _compare(self, *_: Any) -> None:
        self._edges.append(edge_of(self.optimizer))
        if self._before is not None:
            update = self._point() - self._before
            self._update = update if bool((update != 0.0).any()) else None
            self._before = None

    def _edge(self) -> Edge:
        """The edge in the last step: a LanczosLearner's rates are in the groups only then."""
        now = edge_of(self.optimizer)
        during = [edge for edge in self._edges if edge != now]
        return during[0] if during else now

    def _point(self) -> Tensor:
        return self.risk.space.join([p.detach() for p in self.risk.params.values()])
