r"""What makes curvature meaningless: found, named, and the way out.

:func:`check` takes a risk apart before hours are spent on it. It evaluates the risk's gradient
twice over the data (three times the work of a gradient at most, with the products on one batch)
and reports

- passes that differ: dropout, shuffling or augmenting loaders, other randomness;
- modules whose training mode couples examples (BatchNorm) or draws (dropout);
- a loss that is not the mean, or sum, that it is taken for;
- a Hessian product that is not symmetric, or not the derivative of the gradient, as PyTorch's
  faulty second derivatives (or a custom autograd function) make it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from curvlib.core.data import tensors
from curvlib.core.digest import digest
from curvlib.core.random import generator_of

if TYPE_CHECKING:
    from curvlib.core.batch import Batch
    from curvlib.core.risk import Risk

_DROPOUT = (nn.modules.dropout._DropoutNd, nn.RReLU)
_COUPLING = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and what to do about it.

    Attributes:
        kind: ``"dropout"``, ``"batch statistics"``, ``"data"``, ``"randomness"``, ``"reduction"``,
            ``"symmetry"`` or ``"derivative"``.
        message: What was found.
        remedy: What to do.
    """

    kind: str
    message: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """What :meth:`curvlib.Risk.check` found.

    Attributes:
        findings: All that is wrong.
        asymmetry: Relative difference of ``u'Hv`` and ``v'Hu`` on the first batch.
        derivative_error: Relative difference of ``Hv`` to a central difference of the gradient on
            the first batch (in float32 that itself is right to about 1e-2 only).
    """

    findings: tuple[Finding, ...]
    asymmetry: float
    derivative_error: float

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        """One paragraph for each finding."""
        numbers = (
            f"asymmetry of the Hessian product {self.asymmetry:.1e}, "
            f"error to finite differences {self.derivative_error:.1e}"
        )
        if self.ok:
            return f"nothing wrong found ({numbers})"
        lines = [f"- {f.kind}: {f.message}\n  What to do: {f.remedy}" for f in self.findings]
        return "\n".join([f"{len(self.findings)} found ({numbers}):", *lines])


def check(risk: Risk, *, seed: int = 0) -> Report:
    """Looks for what makes the curvature of a risk meaningless.

    Args:
        risk: The risk; it and its model are left as they are.
        seed: Of the random vectors.

    Returns:
        A report, which prints as text; ``report.ok`` tells whether nothing was found.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (torch.ones(3, 2), torch.zeros(3, 2)))
        >>> [finding.kind for finding in risk.check().findings]
        ['dropout']
    """
    if risk.group is not None:
        return _joined_check(risk, seed)
    findings = [*_modes(risk), *_repeatable(risk), *_normalization(risk)]
    random = any(f.kind in ("dropout", "randomness") for f in findings)
    asymmetry, error = _second_derivative(risk, seed)
    precision = max(torch.finfo(d).eps for d in risk.space.dtypes)
    if not asymmetry <= 1e3 * precision**0.75:
        findings.append(
            Finding(
                "symmetry",
                f"u'Hv and v'Hu differ by {asymmetry:.1e} relatively on the first batch",
                "the model is random (see above), or an operation's second derivative is wrong: "
                "look for custom autograd functions, in-place operations and fused kernels",
            )
        )
    if not random and not error <= 30.0 * precision ** (1 / 3):
        findings.append(
            Finding(
                "derivative",
                f"Hv differs by {error:.1e} relatively from central differences of the gradient "
                "on the first batch",
                "the gradient has jumps near this point (fine for networks of ReLUs with few "
                "examples), or an operation's second derivative is wrong: repeat in float64 "
                "(model.double()); hessian(risk, method='finite_difference') needs none",
            )
        )
    return Report(tuple(findings), asymmetry, error)


def _joined_check(risk: Risk, seed: int) -> Report:
    """Each rank looks at its own shard; all have what any of them found."""
    group = risk.group
    assert group is not None
    own = Report((), 0.0, 0.0)
    with group.together("a check of its shard"):
        alone = risk.alone()
        if next(iter(alone.stream.data), None) is not None:
            own = check(alone, seed=seed)
    every = group.values(
        [[[f.kind, f.message, f.remedy] for f in own.findings], own.asymmetry, own.derivative_error]
    )
    found = {tuple(finding): None for findings, _, _ in every for finding in findings}
    return Report(
        tuple(Finding(*finding) for finding in found),
        max(asymmetry for _, asymmetry, _ in every),
        max(error for _, _, error in every),
    )


def _modes(risk: Risk) -> Iterator[Finding]:
    drops, couples = [], []
    for name, m in risk.model.named_modules():
        if not m.training:
            continue
        p = getattr(m, "p", None) if isinstance(m, _DROPOUT) else getattr(m, "dropout", 0.0)
        if isinstance(m, nn.RReLU) or (isinstance(p, float) and p > 0.0):
            drops.append(name or type(m).__name__)
        if isinstance(m, _COUPLING):
            couples.append(name or type(m).__name__)
    if drops:
        yield Finding(
            "dropout",
            f"in training mode, these modules draw at random: {', '.join(drops)}; the curvature is "
            "that of one draw of their masks",
            "model.eval(), or set their probability to 0",
        )
    if couples:
        yield Finding(
            "batch statistics",
            f"in training mode, these modules normalize by batch: {', '.join(couples)}; the "
            "risk then depends on how the data is split into batches",
            "model.eval(), unless the curvature of the training-mode loss is what you want",
        )


def _repeatable(risk: Risk) -> Iterator[Finding]:
    with risk.untouched():  # within one state of torch's generator, so that draws go on
        first, a = _pass(risk)
        second, b = _pass(risk.on(risk.data))  # another risk, which draws anew
    if sorted(first) != sorted(second):
        yield Finding(
            "data",
            "two passes over the data saw different examples or batches: a shuffling loader, "
            "random augmentation, or a random subset",
            "use DataLoader(..., shuffle=False) without augmentation, or list(loader) to fix one "
            "draw of it",
        )
    elif first != second:
        yield Finding(
            "data",
            "two passes over the data saw the same batches in different order: products agree "
            "only up to rounding, and resumed runs are not bitwise the same",
            "use DataLoader(..., shuffle=False), or list(loader)",
        )
    elif not torch.equal(a, b):
        gap = float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a))
        known = any(f.kind == "dropout" for f in _modes(risk))
        precision = max(torch.finfo(d).eps for d in risk.space.dtypes)
        if not known and gap > 100.0 * precision:
            yield Finding(
                "randomness",
                f"two gradients of the same data differ by {gap:.1e} relatively: the model draws "
                "random numbers or changes its own state",
                "model.eval(), and look for torch.rand, functional dropout, or buffers that "
                "forward() changes",
            )


def _pass(risk: Risk) -> tuple[list[str], Tensor]:
    seen = []
    total = risk.space.empty().zero_()
    for batch in risk.batches():
        seen.append(digest(list(tensors(batch.data))))
        risk.space.write(batch.gradient(), total, add=True)
    return seen, total


def _normalization(risk: Risk) -> Iterator[Finding]:
    """Recomputes one batch from its halves, for losses whose terms curvlib does not know."""
    from curvlib.core.batch import misread_mean

    with risk.untouched(), torch.no_grad():
        batch = next(iter(risk.batches()))
        if risk.loss.known or risk.loss.reduction == "sum" or not isinstance(batch.target, Tensor):
            return
        output = batch.output()
        value = risk.loss.total(output, batch.target, float(batch.examples))
        wrong = misread_mean(batch, output, value)
    if wrong is not None and risk.take_weight is None:
        message, _, remedy = wrong.partition("; ")
        yield Finding("reduction", message, remedy)


def _second_derivative(risk: Risk, seed: int) -> tuple[float, float]:
    space, params = risk.space, list(risk.params.values())
    generator = generator_of(None, seed)
    u, v = (
        torch.randn(space.size, generator=generator, dtype=torch.float64).to(
            space.device, space.dtype
        )
        for _ in range(2)
    )
    with risk.untouched():
        batch = next(iter(risk.batches()))
        g = batch.gradient(create_graph=True)
        used = [(i, x) for i, x in enumerate(g) if x is not None and x.requires_grad]

        def product(vector: Tensor) -> Tensor:
            if not used:
                return torch.zeros_like(vector)
            parts = space.split(vector)
            cotangents = [parts[i].to(x.dtype) for i, x in used]
            outputs = [x for _, x in used]
            found = torch.autograd.grad(
                outputs, params, cotangents, retain_graph=True, allow_unused=True
            )
            return space.join(found)

        Hu, Hv = product(u), product(v)
        difference = central_difference(batch, v)
    scale = float(torch.linalg.vector_norm(Hv) * torch.linalg.vector_norm(u))
    asymmetry = abs(float(u @ Hv) - float(v @ Hu)) / scale if scale else 0.0
    gap = float(torch.linalg.vector_norm(difference - Hv))
    norm = float(torch.linalg.vector_norm(Hv))
    return asymmetry, gap / norm if norm else gap


def central_difference(batch: Batch, vector: Tensor) -> Tensor:
    r"""One batch's :math:`(g(\theta + hv) - g(\theta - hv)) / 2h`, with ``h`` scaled by norms.

    ``h = eps^(1/3) (1 + |theta|) / |v|`` balances rounding and truncation.
    """
    space = batch.risk.space
    center = {n: p.detach() for n, p in batch.risk.params.items()}
    norm = space.norm(vector)
    if norm == 0.0:
        return torch.zeros_like(vector)
    precision = max(torch.finfo(d).eps for d in space.dtypes)
    length = 1.0 + space.norm(space.join(list(center.values())))
    h = precision ** (1.0 / 3.0) * length / norm
    ends = []
    for step in (h, -h):
        moved = {
            n: (p + (step * part).to(p.dtype)).requires_grad_()
            for (n, p), part in zip(center.items(), space.split(vector), strict=True)
        }
        ends.append(space.join(batch.gradient(params=moved)))
    difference: Tensor = (ends[0] - ends[1]) / (2.0 * h)
    return difference


def non_finite(risk: Risk) -> str:
    """Names the batch and the layer where numbers stop being finite, on all ranks alike."""
    found = _non_finite(risk)
    if risk.group is not None:
        every = enumerate(risk.group.texts(found))
        found = next((f"{text} (on rank {rank})" for rank, text in every if text), "")
    return found or (
        "the product is not finite, though losses and gradients are: the vectors are not finite or "
        "too large, or a second derivative does not exist here (a root or a norm at zero); check "
        "the vectors with torch.isfinite, and risk.check()"
    )


def _non_finite(risk: Risk) -> str:
    with risk.untouched():
        for batch in risk.batches(shard=True):
            with _watch(risk.model) as layers:
                output = batch.output()
            value = batch.total(output)
            where = f"batch {batch.index}"
            if not all(bool(torch.isfinite(t).all()) for t in tensors(batch.data) if _real(t)):
                return f"the data of {where} is not finite; remove or mend its examples"
            if layers:
                return (
                    f"the output of layer {layers[0]!r} is not finite at {where}; "
                    "look at its parameters and inputs, or use a higher precision"
                )
            if not bool(torch.isfinite(value)):
                return (
                    f"the loss of {where} is {value.item()}; "
                    "look at its outputs and targets, or use a higher precision"
                )
            for name, g in zip(risk.space.names, batch.gradient(), strict=True):
                if g is not None and not bool(torch.isfinite(g).all()):
                    return (
                        f"the gradient of parameter {name!r} is not finite at {where}; the loss "
                        "has an infinite slope there (a root or a logarithm at zero), or overflows"
                    )
    return ""


def _real(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


@contextmanager
def _watch(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of layers whose outputs are not finite, in order."""
    found: list[str] = []

    def watcher(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not all(bool(torch.isfinite(t).all()) for t in tensors(output) if _real(t)):
                found.append(name)

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    handles = [m.register_forward_hook(watcher(n or type(m).__name__)) for n, m in leaves]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
