r"""K-FAC and E-KFAC: natural gradients with Kronecker-factored Fisher matrices, layer by layer.

Every ``factor_interval`` steps hooks note the inputs of layers, and the gradients at their outputs
that the user's own backward pass brings: no pass is added (``fisher="mc"`` adds one for sampled
labels). Every ``inverse_interval`` steps the averaged factors are decomposed. In between, a step
costs four small matrix products for each layer, and there are no hooks on the model. Formulas:
:mod:`curvlib.optim.rules.kfac`; scale: :mod:`curvlib.operators.layers.recorded`.

Sharded parameters (FSDP2). Hooks see whole activations of a rank's own batch in FSDP2's own passes,
so sums are those of data-parallel replicas: with :math:`F = \sum_l G (O^2 + I^2)` over layers, a
rank sends :math:`2 s F (R - 1) / R` bytes in a step with factors. Factors are whole on every rank:
averages and eigenvectors :math:`2 s F` (E-KFAC's eigenvalues :math:`s P` more), and :math:`2 s F`
for the sums of such a step. Momentum is of slices. The products of a step are divided among ranks
by layers (:mod:`curvlib.optim.layer_shares`); inverse eigenvalues are :math:`s P / R`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from curvlib.core.loss import read_loss
from curvlib.operators.coverage import Coverage
from curvlib.operators.layers.recorded import Recorded
from curvlib.operators.layers.recorder import LayerRecorder
from curvlib.optim import arguments
from curvlib.optim.gradients import Gradients, finite
from curvlib.optim.inner_steps import RULES, inner_steps
from curvlib.optim.layer_curvature import LayerCurvature, advanced
from curvlib.optim.layer_sums import add_pass, batch_curvature, zero_sums
from curvlib.optim.layer_watch import LayerWatch, none_seen
from curvlib.optim.natural import Inverse, Member, inner_products, natural_gradients, step_along
from curvlib.optim.persistence import restored
from curvlib.optim.rules.kfac import kl_scale
from curvlib.optim.shell import CurvatureOptimizer

_FISHERS = ("empirical", "mc")
_SHARING = ("expand", "reduce")
_GATES = ("joint", "separate")
_FORMS = ("exact", "factored")


class _Known(NamedTuple):
    """What a step changes at its end."""

    layers: dict[str, LayerCurvature]
    inverses: dict[str, Inverse]
    decomposed_at: int | None
    failed: int


def _inner(group: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters of the inner optimizer."""
    lr = float(group["lr"]) * float(group["inner_scale"])
    return {**group, "lr": lr, "betas": group["inner_betas"], "eps": group["inner_eps"]}


class KFAC(CurvatureOptimizer):
    r"""K-FAC (Martens and Grosse, 2015) and E-KFAC (George et al., 2018), with momentum.

    Covered are the layers of :func:`curvlib.kfac`: Linear, Conv1d, Conv2d, Conv3d, Embedding,
    normalization layers, LSTM, GRU, RNN and their cells (through their gates), MultiheadAttention
    (its projections). Other parameters, and those of layers that have not been called yet, get a
    first-order step: :meth:`coverage` says which, and why.

    Args:
        model: The model, not compiled.
        params: Parameters, named parameters or groups, in which ``lr``, ``momentum``, ``damping``,
            ``weight_decay``, ``kl_clip``, ``inner_scale``, ``inner_betas``, ``inner_eps`` and
            ``maximize`` may differ (a layer's damping is that of its weight's group). Default:
            all of the model's; frozen ones stay as they are until they are set free.
        lr: Learning rate.
        momentum: Of preconditioned gradients, and of the inner SGD.
        damping: :math:`\lambda`, above 0 unless all factors have full rank.
        relative: Whether it is a fraction of the layer's mean eigenvalue.
        damping_form: ``"exact"``: :math:`F + \lambda I`, in four matrix products for each layer
            and step; or ``"factored"``: each factor has its share (Martens and Grosse, section
            6.3), in two products, and damping is stronger.
        eigen_corrected: Whether eigenvalues are E-KFAC's. Then, and with ``sharing="reduce"``,
            examples must lie along the first axis of the model's input. Layers whose rows are
            arranged otherwise than along the first or second axis then have no factors.
        fisher: ``"empirical"``: squares of the gradients of the loss itself; or ``"mc"``: of
            labels that are drawn from the model's own predictions, whose expectation is the
            Fisher matrix proper (an additional backward pass in steps with factors).
        loss: The loss that is minimized: cross-entropy, NLL, MSE or BCE-with-logits without
            weights. ``"mc"`` draws from it; with ``"empirical"`` it says how many terms the mean
            has where that is not the number of examples (tokens, pixels), and that it is a sum.
        output: Function of what the model returns, to the tensor that the loss reads.
        sharing: ``"expand"`` or ``"reduce"``: see :func:`curvlib.kfac`.
        factor_interval: Steps from one update of the factors to the next.
        inverse_interval: Steps from one eigendecomposition to the next, at updates of factors.
        factor_decay: Of the moving averages of the factors.
        kl_clip: :math:`\kappa`, the largest :math:`\eta^2 V^\top (F + \lambda) V` of a group's
            step (without momentum); ``None`` for no limit. Where it binds, it is the learning rate
            and ``lr`` hardly matters: raise it with ``lr`` (:math:`0.03\,\eta^2` has served with
            ``damping=0.003``), and tune ``damping`` along.
        weight_decay: Decoupled: each step subtracts ``lr * weight_decay * parameter``.
        inner: Rule of parameters without factors: ``"adamw"`` or ``"sgd"``.
        inner_scale: Their learning rate as a multiple of ``lr``, so that schedules act on both.
            Default: 0.01 for AdamW, 1 for SGD.
        inner_betas: Of the inner AdamW, and
        inner_eps: so is this.
        dense_norms: Whether factors of normalization layers are dense, not diagonal.
        gates: Whether the gates of LSTM, GRU and RNN have one left factor, ``"joint"``, or one
            each, ``"separate"``, which is cheaper.
        max_side: Layers' sides that are longer (vocabularies) have a diagonal factor.
        maximize: Whether the loss is maximized.
        seed: Of the sampled labels, which depend on the seed, the step and the example alone.
        process_group: Replicas of data-parallel training; the default group if
            ``torch.distributed`` is initialized. Where parameters are sharded, the ranks of their
            mesh.

    Attributes:
        layers: What is known of each layer, by name.
        failed: Eigendecompositions that did not converge: such a layer keeps its old basis.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If the model is compiled, a parameter is not the model's, there is no sampled
            Fisher of the loss, or an argument is out of range.

    With ``GradScaler``, call ``opt.backward(scaler.scale(loss), scale=scaler.get_scale())``: from a
    plain ``backward`` the scale is not known.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [-2.0]])
        >>> opt = KFAC(model, lr=0.5, momentum=0.0, kl_clip=None, factor_interval=1)
        >>> losses = [opt.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(40)]
        >>> bool(losses[-1] < 0.01 * losses[0])
        True
        >>> opt.coverage().percent
        100.0
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        damping: float = 1e-3,
        *,
        relative: bool = False,
        damping_form: str = "exact",
        eigen_corrected: bool = False,
        fisher: str = "empirical",
        loss: Callable[[Any, Any], Tensor] | None = None,
        output: Callable[[Any], Any] | None = None,
        sharing: str = "expand",
        factor_interval: int = 10,
        inverse_interval: int = 100,
        factor_decay: float = 0.95,
        kl_clip: float | None = 1e-3,
        weight_decay: float = 0.0,
        inner: str = "adamw",
        inner_scale: float | None = None,
        inner_betas: tuple[float, float] = (0.9, 0.999),
        inner_eps: float = 1e-8,
        dense_norms: bool = False,
        gates: str = "joint",
        max_side: int = 8192,
        maximize: bool = False,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"KFAC takes the model first, got {type(model).__name__}; pass KFAC(model), or "
                "KFAC(model, params)"
            )
        own = {"relative": relative, "eigen_corrected": eigen_corrected, "dense_norms": dense_norms}
        arguments.flag(own, *own)
        arguments.fraction({"factor_decay": factor_decay}, "factor_decay")
        self.model = model
        self.relative = relative
        self.eigen_corrected = eigen_corrected
        self.damping_form = arguments.choice("damping_form", damping_form, _FORMS)
        if eigen_corrected and damping_form == "factored":
            raise ValueError(
                "eigen_corrected=True needs damping_form='exact': corrected eigenvalues are no "
                "product of two factors' eigenvalues"
            )
        self.fisher = arguments.choice("fisher", fisher, _FISHERS)
        self.sharing = arguments.choice("sharing", sharing, _SHARING)
        self.inner = arguments.choice("inner", inner, RULES)
        self.factor_interval = arguments.count("factor_interval", factor_interval)
        self.inverse_interval = arguments.count("inverse_interval", inverse_interval)
        self.factor_decay = float(factor_decay)
        self.max_side = arguments.count("max_side", max_side)
        self.dense_norms = dense_norms
        self.gates = arguments.choice("gates", gates, _GATES)
        self.loss = None if loss is None else read_loss(loss)
        self.output = output
        self.layers: dict[str, LayerCurvature] = {}
        self.decomposed_at: int | None = None
        self.failed = 0
        self._inverses: dict[str, Inverse] = {}
        self._scale = 1.0
        self._left_out: dict[str, str] = {}
        self._watch = self._watching()
        params = model.parameters() if params is None else params
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "weight_decay": weight_decay,
            "kl_clip": kl_clip,
            "inner_scale": {"adamw": 0.01, "sgd": 1.0}[inner]
            if inner_scale is None
            else inner_scale,
            "inner_betas": inner_betas,
            "inner_eps": inner_eps,
            "maximize": maximize,
        }
        super().__init__(params, defaults, seed=seed, process_group=process_group)

    # ------------------------------------------------------------------------ recording
    @property
    def recorder(self) -> LayerRecorder:
        """What records the layers, of the parameters that required gradients when it was made."""
        return self._watch.recorder

    def close(self) -> None:
        """Takes the hooks off the model. The next step puts them on again."""
        self.recorder.close()

    def coverage(self) -> Coverage:
        """Which parameters have factors; and why the others get the inner optimizer's step."""
        idle = "its module was not called when factors were last updated, or got no gradient"
        known = self._watch.layers if self.clock.curvature_updates else ()
        why = dict.fromkeys(known, idle) | self._left_out
        return self._watch.coverage({n: why[n] for n in known if n not in self.layers})

    def take(self, found: Recorded) -> None:
        """Adds what a pass showed to the pending sums."""
        layers = self.recorder.layers
        bases = self.layers if self.eigen_corrected else {}
        if not self.pending:
            self.pending = zero_sums(layers, self.recorder.dtype, bases, found.terms.device)
        sampled, reduce = self.fisher == "mc", self.sharing == "reduce"
        scale = 1.0 if sampled else self._scale
        self._left_out |= add_pass(
            layers, found, self.pending, sampled=sampled, reduce=reduce, scale=scale, bases=bases
        )

    def _watching(self) -> LayerWatch:
        return LayerWatch(
            self.model,
            self.take,
            loss=self.loss,
            sampled=self.fisher == "mc",
            output=self.output,
            dense_norms=self.dense_norms,
            max_side=self.max_side,
            gates=self.gates,
            apart="all" if self.eigen_corrected or self.sharing == "reduce" else "scales",
        )

    # ---------------------------------------------------------------------------- shell
    follows_shards, differentiates = True, False

    def _shard(self) -> None:
        super()._shard()
        if self.sharding is not None:
            self.sharding.include(self.model)

    def _check(self, group: dict[str, Any]) -> None:
        arguments.nonnegative(
            group, "lr", "damping", "weight_decay", "inner_scale", "inner_eps", "momentum"
        )
        arguments.fraction(group, "momentum")
        arguments.fractions(group, "inner_betas")
        if group["kl_clip"] is not None:
            arguments.positive(group, "kl_clip")

    def _due(self) -> bool:
        return bool(self._watch.layers) and self.clock.due(self.factor_interval)

    def _observe(self, loss: Tensor, scale: float) -> None:
        del loss  # its backward pass meets the hooks
        self._watch.hand_over()  # what came before has the scale of before
        self._scale = scale

    def _missing(self) -> None:
        raise none_seen("KFAC")

    def _prepare(self) -> None:
        self._scale = 1.0
        params = [p for _, p, _ in self.parameters() if p.requires_grad]
        draw = self.clock.curvature_updates
        due = self.clock.due(self.factor_interval)
        self._watch.follow(params, on=due, seed=self.seed, draw=draw, sharding=self.sharding)

    def _collect(self) -> None:
        self._watch.hand_over()

    def _forget(self) -> None:
        self._watch.forget()

    # --------------------------------------------------------------------------- update
    def _update(self, gradients: Gradients) -> bool | None:
        known = self._advanced()
        if known is None:
            return False
        members = {
            id(p): Member(p, g, group)
            for group, grads in zip(self.param_groups, gradients, strict=True)
            for p, g in zip(group["params"], grads, strict=True)
            if g is not None
        }
        recorder = self.recorder
        natural = natural_gradients(
            [(layer, self._watch.places[layer.name]) for layer in recorder.layers],
            recorder.params,
            members,
            known.layers,
            known.inverses,
            relative=self.relative,
            factored=self.damping_form == "factored",
            dtype=recorder.dtype,
            sharding=self.sharding,
        )
        along = inner_products(natural, members, self.sharding)
        if not all(map(math.isfinite, along.values())):
            return False
        left = {key: m.gradient for key, m in members.items() if key not in natural}
        rest = [
            part
            for group in self.param_groups
            for part in inner_steps(self.inner, _inner(group), left, self.state, self.own)
        ]
        self.layers, self._inverses, self.decomposed_at, self.failed = known
        for group in self.param_groups:
            params = [p for p in group["params"] if id(p) in natural]
            each = [along[id(p)] for p in params]
            clip = kl_scale(each, float(group["lr"]), group["kl_clip"])
            directions = [natural[id(p)] for p in params]
            step_along(params, directions, self.state, group, clip, self.own)
        for p, change, state in rest:
            self.own(p).add_(change)
            self.state[p].update(state)
        return None

    def _advanced(self) -> _Known | None:
        """What is known with what is pending; ``None`` if that is not finite."""
        known = _Known(self.layers, dict(self._inverses), self.decomposed_at, self.failed)
        if not self.pending:
            return known
        last, now = self.decomposed_at, self.clock.steps
        again = last is None or now - last >= self.inverse_interval
        batch = batch_curvature(
            self.recorder.layers,
            self.pending,
            sampled=self.fisher == "mc",
            sum_of_terms=self.loss is not None and self.loss.reduction == "sum",
            ranks=self.replicas,
        )
        if not finite(t for own in batch.values() for t in own):
            return None
        corrected, decay = self.eigen_corrected, self.factor_decay
        layers, changed, failed = advanced(
            self.layers, batch, decay, decompose=again, corrected=corrected
        )
        inverses = {name: own for name, own in self._inverses.items() if name not in changed}
        return _Known(layers, inverses, now if again else last, self.failed + failed)

    # ---------------------------------------------------------------------------- state
    def _extra_state(self) -> dict[str, Any]:
        layers = {name: own.plain() for name, own in self.layers.items()}
        return {"layers": layers, "decomposed_at": self.decomposed_at, "failed": self.failed}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        device = next(p.device for _, p, _ in self.parameters())
        layers = {
            name: LayerCurvature(**restored(own, device)) for name, own in state["layers"].items()
        }
        known = self._watch.layers.keys()
        if not known >= layers.keys():
            raise ValueError(
                f"the state has factors of layers {sorted(layers.keys() - known)}, which the model "
                "has not; load a state of the same model"
            )
        self.layers, self.decomposed_at = layers, state["decomposed_at"]
        self.failed = state["failed"]
        self._inverses = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "_watch" in state:  # of a copy, not of a state dict
            state = {**state, "_watch": self._watching()}
        super().__setstate__(state)
