"""How often the host waits for the device in a step: as often as the mathematics needs, exactly.

A step decides by numbers (whether a vector was annihilated, whether a matrix has a Cholesky factor,
whether a gradient is finite), and each time the host waits for the device once. The counts are
those of a simulated device, in every run of the tests, and of CUDA's own report of synchronizing
operations on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlib as cl
from curvlib.core.operator import LinearOperator
from curvlib.estimators import iterations, krylov_state, quadrature, sampling, stopping
from curvlib.estimators.thick_restart import next_state
from curvlib.operators.mfac_operator import MFAC
from curvlib.operators.windows.window import Window
from tests.simulated_device import DEVICE, simulated_device

F64 = torch.float64
N = 100


@dataclass
class Place:
    """A device, how tensors of the CPU come to it, and what counts its host's waits."""

    device: torch.device
    moved: Callable[[Tensor], Tensor]
    counted: Callable[[], Any]

    def waits(self, call: Callable[[], Any]) -> int:
        """Of a call."""
        with self.counted() as counts:
            call()
        return int(sum(counts.values()))


@contextmanager
def _cuda_waits() -> Iterator[dict[str, int]]:
    counts = {"waits": 0}
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    counts["waits"] = sum("synchronizing CUDA operation" in str(w.message) for w in said)


@pytest.fixture(params=["simulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "cuda":
        there = torch.device("cuda", 0)
        yield Place(there, lambda t: t.to(there), _cuda_waits)
        return
    with simulated_device(monkeypatch) as device:
        yield Place(DEVICE, device.to_device, device.counted)


def _operator(place: Place) -> LinearOperator:
    generator = torch.Generator(device="cpu").manual_seed(0)
    Q = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=F64))[0]
    A = place.moved((Q * (0.05 + 0.9 ** torch.arange(N))) @ Q.mT)
    return LinearOperator(lambda V: A @ V, (N, N), dtype=F64, device=place.device, psd=True)


def _generator(place: Place) -> torch.Generator:
    return torch.Generator(device=place.device).manual_seed(1)


# --------------------------------------------------------------------------- Krylov steps
@pytest.mark.parametrize("block", [1, 3])
def test_a_lanczos_step_waits_once_for_each_vector(place: Place, block: int) -> None:
    plan = krylov_state.Plan(
        op=_operator(place), k=3, which="LA", tolerance=1e-9, block=block, check=False,
        warm=False, budget=1000, deflate=None, deflated_norm=0.0,
    )  # fmt: skip
    states = [krylov_state.first_state(plan, 30, None, _generator(place))]
    counts = [place.waits(lambda: states.append(next_state(plan, states[-1]))) for _ in range(6)]
    assert counts == [block + 1] + [block] * 5  # the first one asks for the operator's scale, too
    assert states[-1].phase == "expand"


@pytest.mark.parametrize("full", [True, False])
def test_a_quadrature_step_waits_once_for_each_probe(place: Place, full: bool) -> None:
    op, settings = _operator(place), {"deflate": None, "full": full}
    start = quadrature.first_state(
        op, 9, 2, slots=9 if full else 3, law="rademacher", deflate=None,
        generator=_generator(place),
    )  # fmt: skip
    states = [start]
    counts = [
        place.waits(lambda: states.append(quadrature.next_state(op, states[-1], **settings)))
        for _ in range(5)
    ]
    assert counts == [3, 2, 2, 2, 2]


def test_starts_of_quadratures_do_not_wait(place: Place) -> None:
    op, generator = _operator(place), _generator(place)
    settings = {"slots": 3, "law": "rademacher", "deflate": None, "generator": generator}
    assert place.waits(lambda: quadrature.first_state(op, 4, 3, **settings)) == 0


@pytest.mark.parametrize(
    ("method", "preconditioned", "expected"),
    [
        ("cg", False, 1), ("cg", True, 2), ("minres", False, 1), ("minres", True, 1),
        ("neumann", False, 1), ("neumann", True, 1),
    ],
)  # fmt: skip
def test_an_iteration_of_a_solver_waits_once(
    place: Place, method: str, preconditioned: bool, expected: int
) -> None:
    known = SimpleNamespace(solve=lambda V, damping=0.0: 0.5 * V)
    system = iterations.System(
        _operator(place), 0.1, known if preconditioned else None, 0.5, columns=(0, 1)
    )
    start, step = iterations.METHODS[method]
    work = [start(system, place.moved(torch.ones(2, N, dtype=F64)))]
    for _ in range(3):
        assert place.waits(lambda: work.append(step(system, work[-1]).work)) == expected


# ----------------------------------------------------------------------- independent probes
@pytest.mark.parametrize(
    ("wanted", "expected"), [({}, 1), ({"squares": True}, 1), ({"diagonal": True}, 2)]
)
def test_a_block_of_probes_waits_once(place: Place, wanted: dict[str, bool], expected: int) -> None:
    plan = stopping.plan(
        _operator(place), law="rademacher", limit=100, block=4, tolerance=None, generator=None,
        seed=1, checkpoint=None, save_every=30.0, progress=None,
    )  # fmt: skip
    states = [sampling.first_state(plan, **wanted)]
    for _ in range(3):
        # a diagonal is changed in place, so that its products are checked before
        count = place.waits(lambda: states.append(sampling.next_state(plan, states[-1], None)))
        assert count == expected
    assert states[-1].count == 12


@pytest.mark.parametrize("length", [64, 67])
def test_drawing_probes_does_not_wait(place: Place, length: int) -> None:
    rows, generator = place.moved(torch.zeros(3, length)), _generator(place)
    for law in ("rademacher", "gaussian", "sphere"):
        cl.estimators.probes.fill_probes(rows, law, generator)  # tables are made once
        assert place.waits(lambda law=law: _fill(rows, law, generator)) == 0


def _fill(rows: Tensor, law: str, generator: torch.Generator) -> None:
    cl.estimators.probes.fill_probes(rows, law, generator)


# ---------------------------------------------------------------------------- windows
def _rows(place: Place, count: int, length: int) -> list[Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(2)
    return [place.moved(row) for row in torch.randn(count, length, generator=generator)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_a_push_does_not_wait(place: Place, dtype: torch.dtype) -> None:
    window = Window(5000, 4, parts=[2000, 3000], dtype=dtype, device=place.device)
    rows = _rows(place, 9, 5000)

    def push() -> None:
        for row in rows:
            window.push(row, check=False)

    assert place.waits(push) == 0
    assert place.waits(lambda: window.push(rows[0])) == 1  # whether it is finite


def test_a_solve_waits_for_its_factor_and_its_accuracy(place: Place) -> None:
    window = Window(5000, 4, device=place.device)
    F, (x, *rows) = MFAC(window, damping=0.1), _rows(place, 5, 5000)
    for row in rows:
        window.push(row, check=False)
    assert place.waits(lambda: F.solve(x)) == 2
    assert place.waits(lambda: F.solve(x)) == 1
    assert place.waits(F.solve_row) == 1
    assert place.waits(lambda: F @ x) == 0


# -------------------------------------------------------------------------- optimizers
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # gradients finite; the row; its factor; its accuracy; lengths of row and direction
        ({}, 5),
        ({"window": "tensor"}, 5),
        ({"dtype": torch.bfloat16, "norm_matching": False}, 4),
        ({"trust": 1.0}, 6),  # the quadratic form
        ({"compression": 0.1}, 6),  # the residual
    ],
)
def test_a_step_of_mfac(place: Place, settings: dict[str, Any], expected: int) -> None:
    shapes = [(40, 30), (30,)]
    params = [nn.Parameter(place.moved(torch.ones(shape))) for shape in shapes]
    opt = cl.optim.MFAC(params, lr=0.1, size=4, **settings)
    for step in range(6):
        for p, shape in zip(params, shapes, strict=True):
            p.grad = place.moved(torch.randn(shape))
        found = place.waits(opt.step)
        assert step == 0 or found == expected


@pytest.mark.parametrize("name", ["AdaHessian", "Sophia"])
def test_a_step_with_curvature_waits_for_gradients_and_for_curvature(
    place: Place, name: str
) -> None:
    params = [nn.Parameter(place.moved(torch.ones(4, 3))), nn.Parameter(place.moved(torch.ones(3)))]
    settings = {"AdaHessian": {}, "Sophia": {"estimator": "hutchinson", "interval": 2}}[name]
    opt = getattr(cl.optim, name)(params, **settings)
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = place.moved(torch.ones(p.shape))
            if opt.due:  # as if a loss had been observed
                key = f"{i}" if name == "Sophia" else f"{i}.0"
                opt.pending[key] = place.moved(torch.ones(p.shape))
        expected = 2 if opt.due else 1
        assert expected == (2 if name == "AdaHessian" or step % 2 == 0 else 1)
        assert place.waits(opt.step) == expected
    assert opt.skipped == 0
    assert opt.clock.curvature_updates == (4 if name == "AdaHessian" else 2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "expected"),
    # gradients finite; and KFAC's clipping, or whether what MKOR made is finite
    [("AdaHessian", 1), ("Sophia", 1), ("KFAC", 2), ("MKOR", 2)],
)
def test_a_step_between_two_readings_of_curvature(name: str, expected: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).cuda()
    settings: dict[str, Any] = {"factor_interval": 5} if name == "KFAC" else {"interval": 5}
    given = model if name in ("KFAC", "MKOR") else model.parameters()
    opt = getattr(cl.optim, name)(given, **settings)
    x, y = torch.randn(20, 6, device="cuda"), torch.randint(3, (20,), device="cuda")
    found = []
    for _ in range(4):
        opt.zero_grad()
        opt.backward(nn.functional.cross_entropy(model(x), y))
        with _cuda_waits() as counts:
            opt.step()
        found.append(counts["waits"])
    assert found[1:] == [expected] * 3
    assert opt.skipped == 0
