"""Inverses as operators; solves that are stopped and go on; errors."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator, as_operator
from curvlib.core.result import Result
from curvlib.core.structured import Diagonal
from curvlib.estimators.inverse import inverse
from curvlib.estimators.solve import Solution, solve
from tests.estimators.spectra import Counted, matrix
from tests.programs import Program

F64 = torch.float64
LINEAR = torch.linspace(0.1, 10.0, 80, dtype=F64)
EXPONENTIAL = torch.logspace(0, -4, 60, dtype=F64)


def columns(n: int, count: int, seed: int = 0) -> Tensor:
    return torch.randn(n, count, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---------------------------------------------------------------------- inverse
def test_inverse_is_an_operator() -> None:
    A = matrix(LINEAR)
    inv = inverse(Counted(A, psd=True).op, damping=0.1, tolerance=1e-12)
    exact = torch.linalg.inv(A + 0.1 * torch.eye(80, dtype=F64))
    assert isinstance(inv, LinearOperator)
    assert torch.allclose(inv.to_dense(), exact, atol=1e-9)
    assert inv.symmetric
    assert inv.psd
    assert inv.method == "cg"
    assert inv.name == "(matrix + 0.1 I)^-1"
    x = columns(80, 2)
    assert torch.allclose(inv.solve(inv @ x), x, atol=1e-9)
    assert torch.allclose(inv.solve(x[:, 0].clone()), A @ x[:, 0] + 0.1 * x[:, 0])
    assert torch.allclose((inv + inv) @ x, 2 * exact @ x, atol=1e-8)
    assert inv.fingerprint() != inverse(A, damping=0.2).fingerprint()
    assert (
        inv.fingerprint()
        == inverse(Counted(A).op, damping=0.1, tolerance=1e-12, method="cg").fingerprint()
    )


def test_inverse_with_nystrom_is_built_once() -> None:
    values = torch.cat([torch.logspace(5, 1, 20, dtype=F64), torch.full((80,), 1e-3, dtype=F64)])
    counted = Counted(matrix(values), psd=True)
    inv = inverse(counted.op, damping=1e-2, preconditioner=25)
    assert counted.columns == [25]
    b = columns(100, 2)
    inv @ b
    inv @ b
    assert counted.columns.count(25) == 1
    assert counted.products <= 25 + 2 * 2 * 10
    with pytest.raises(ValueError, match=r"has a solve without damping only, got damping=0\.5"):
        inv.solve(b, damping=0.5)


# ------------------------------------------------------------------- long runs
def _tail(A: Tensor, path: Path, stop_after: int | None, **how: Any) -> tuple[Counted, Any]:
    counted = Counted(A, psd=True)
    counted.stop_after = stop_after
    return counted, lambda: solve(
        counted.op, columns(len(A), 3), checkpoint=path, save_every=0, progress=False, **how
    )


HOWS: list[dict[str, Any]] = [
    {"method": "cg", "tolerance": 1e-8},
    {"method": "minres", "tolerance": 1e-8},
    {"method": "neumann", "tolerance": 1e-3, "damping": 0.5},
    {"method": "cg", "preconditioner": 5, "damping": 1e-3, "tolerance": 1e-10},
]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_interrupted_anywhere_ends_bitwise_the_same(how: dict[str, Any], tmp_path: Path) -> None:
    A = matrix(torch.logspace(0, -3, 40, dtype=F64))
    undisturbed = solve(Counted(A, psd=True).op, columns(40, 3), **how)
    whole, call = _tail(A, tmp_path / "whole", None, **how)
    call()
    steps = len(whole.columns)
    assert steps > 8
    for stop in (2, steps // 2, steps - 1):
        path = tmp_path / f"{stop}.safetensors"
        _, call = _tail(A, path, stop, **how)
        with pytest.raises(RuntimeError):
            call()
        rest, call = _tail(A, path, None, **how)
        found = call()
        assert torch.equal(found.value, undisturbed.value)
        assert torch.equal(found.residuals, undisturbed.residuals)
        assert torch.equal(found.iterations, undisturbed.iterations)
        assert found.products == undisturbed.products
        if path.exists() and stop > 12:
            assert rest.products < whole.products
    done, call = _tail(A, tmp_path / "whole", 0, **how)
    assert torch.equal(call().value, undisturbed.value)  # no product is made again
    assert done.products == 0


def test_checkpoints_of_other_problems_are_refused(tmp_path: Path) -> None:
    A, b = matrix(LINEAR), columns(80, 2)
    path = tmp_path / "c.safetensors"
    solve(A, b, checkpoint=path)
    with pytest.raises(ValueError, match="is of another problem"):
        solve(A, 2 * b, checkpoint=path)
    with pytest.raises(ValueError, match=r"damping was 0\.0 and is now 1\.0"):
        solve(A, b, damping=1.0, checkpoint=path)
    with pytest.raises(ValueError, match="is of another problem"):
        solve(A, b, x0=b, checkpoint=path)


def test_progress_and_files(tmp_path: Path, rng_untouched: None) -> None:
    A, b = matrix(EXPONENTIAL), columns(60, 2)
    seen: list[tuple[float, float | None, str]] = []
    found = solve(A, b, progress=lambda *a: seen.append(a))
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)
    assert seen[-1][0] == found.products
    assert seen[-1][2].startswith("2/2 converged, residual")
    loaded = Solution.load(found.save(tmp_path / "s.safetensors"))
    assert torch.equal(loaded.value, found.value)
    assert loaded.reasons == found.reasons
    assert isinstance(Result.load(tmp_path / "s.safetensors"), Solution)
    assert "method='minres'" in repr(found)


def test_inputs_are_left_alone() -> None:
    A, b, x0 = matrix(LINEAR), columns(80, 2), columns(80, 2, seed=1)
    kept = b.clone(), x0.clone()
    identity = LinearOperator(lambda V: V, (80, 80), dtype=F64, symmetric=True, psd=True)
    for op in (as_operator(A), identity):
        for method in ("cg", "minres", "neumann"):
            solve(op, b, x0=x0, method=method, damping=0.5)
            assert torch.equal(b, kept[0])
            assert torch.equal(x0, kept[1])


KILLED = """
import sys, time
import torch
from curvlib.core.operator import LinearOperator
from curvlib.estimators.solve import solve
from tests.estimators.spectra import matrix

path, method, nap = sys.argv[1], sys.argv[2], float(sys.argv[3])
A = matrix(torch.logspace(0, -3, 40, dtype=torch.float64))

def product(V):
    time.sleep(nap)
    return A @ V

op = LinearOperator(product, (40, 40), dtype=A.dtype, psd=True, identity="A")
b = torch.ones(40, 2, dtype=A.dtype) * torch.tensor([1.0, 2.0])
b[:20, 1] = 0.5
found = solve(op, b, method=method, checkpoint=path, save_every=0, progress=False, tolerance=1e-9)
found.save(path + ".result")
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cg", "minres"])
def test_killed_and_resumed(method: str, tmp_path: Path) -> None:
    def start(name: str, nap: str) -> Program:
        return Program("-c", KILLED, tmp_path / name, method, nap)

    def saved() -> int:
        return path.stat().st_mtime_ns if path.exists() else 0

    path = tmp_path / "killed"
    assert start("whole", "0").finish().code == 0
    for _ in range(3):
        before = saved()
        process = start("killed", "0.01")
        process.until(lambda before=before: saved() > before)
        assert process.stop(signal.SIGKILL).code == -signal.SIGKILL
    assert not (tmp_path / "killed.result").exists()
    assert start("killed", "0").finish().code == 0
    assert (tmp_path / "killed.result").read_bytes() == (tmp_path / "whole.result").read_bytes()


# ---------------------------------------------------------------------- errors
def _misuse(**changes: Any) -> None:
    arguments: dict[str, Any] = {"op": matrix(LINEAR), "b": columns(80, 2)} | changes
    solve(arguments.pop("op"), arguments.pop("b"), **arguments)


@pytest.mark.parametrize(
    ("error", "text", "changes"),
    [
        (ValueError, r"expected a square operator, got shape \(2, 3\)", {"op": torch.ones(2, 3)}),
        (ValueError, "expected a symmetric operator", {"op": torch.ones(3, 3).triu()}),
        (TypeError, r"expected a torch.Tensor \[80\] or \[80, K\] for b, got list", {"b": [1.0]}),
        (ValueError, r"expected b of shape \[80\] or \[80, K\], got \[3\]", {"b": torch.ones(3)}),
        (ValueError, r"or \[80, K\], got \[80, 0\]", {"b": torch.ones(80, 0)}),
        (ValueError, r"or \[80, K\], got \[80, 1, 1\]", {"b": torch.ones(80, 1, 1)}),
        (TypeError, r"expected b in torch.float64, got torch.float32", {"b": torch.ones(80)}),
        (
            ValueError,
            "expected b on cpu, got meta",
            {"b": torch.ones(80, dtype=F64, device="meta")},
        ),
        (ValueError, "finite numbers in b", {"b": torch.full((80,), math.inf, dtype=F64)}),
        (
            ValueError,
            r"expected x0= shaped as b, \[80, 2\], got \[80\]",
            {"x0": columns(80, 1)[:, 0]},
        ),
        (TypeError, "for x0, got float", {"x0": 0.0}),
        (TypeError, "expected a number for damping, got str", {"damping": "1"}),
        (ValueError, "expected a finite number for damping, got nan", {"damping": math.nan}),
        (
            ValueError,
            "unknown method='lu'; there are cg, minres, neumann, direct",
            {"method": "lu"},
        ),
        (ValueError, "has no solve of its own; use method='cg' or 'minres'", {"method": "direct"}),
        (ValueError, "expected 0 < tolerance < 1, got 0.0", {"tolerance": 0.0}),
        (ValueError, "expected 0 < tolerance < 1, got 2.0", {"tolerance": 2}),
        (TypeError, "expected a number for tolerance, got str", {"tolerance": "low"}),
        (TypeError, "expected an int for max_products, got float", {"max_products": 10.0}),
        (ValueError, "expected max_products >= 1, got 0", {"max_products": 0}),
        (ValueError, "expected max_products >= 1, got -4", {"max_products": -4}),
        (ValueError, r"expected max_products >= 4 \(an iteration and a meas", {"max_products": 3}),
        (
            ValueError,
            r"expected max_products >= 11 .* 7 before\), got 10",
            {"max_products": 10, "preconditioner": 5, "x0": columns(80, 2)},
        ),
        (ValueError, "belong to method='neumann', got method='minres'", {"terms": 3}),
        (ValueError, "belong to method='neumann', got method='cg'", {"scale": 3.0, "method": "cg"}),
        (ValueError, "expected terms >= 1, got 0", {"terms": 0, "method": "neumann"}),
        (TypeError, "expected an int for terms, got float", {"terms": 2.0, "method": "neumann"}),
        (ValueError, "expected a positive scale=, got -1", {"scale": -1, "method": "neumann"}),
        (
            ValueError,
            "a preconditioned Neumann series needs scale=",
            {"method": "neumann", "preconditioner": 3},
        ),
        (
            ValueError,
            "expected a rank from 1 to 80 for preconditioner=, got 0",
            {"preconditioner": 0},
        ),
        (ValueError, "expected a rank from 1 to 80", {"preconditioner": 81}),
        (
            TypeError,
            r"operator with solve\(columns, damping=...\).*got str",
            {"preconditioner": "m"},
        ),
        (TypeError, "got bool", {"preconditioner": True}),
        (
            TypeError,
            "got LinearOperator",
            {"preconditioner": as_operator(torch.eye(80, dtype=F64))},
        ),
        (
            ValueError,
            r"expected a preconditioner of shape \(80, 80\), got \(3, 3\)",
            {"preconditioner": Diagonal(torch.ones(3, dtype=F64))},
        ),
        (
            ValueError,
            "method='direct' takes no preconditioner=",
            {"op": Diagonal(LINEAR), "preconditioner": 3},
        ),
        (
            ValueError,
            "pass generator= or seed=, not both",
            {"seed": 1, "generator": torch.Generator()},
        ),
        (TypeError, "progress= is True, False, None or a function", {"progress": "yes"}),
    ],
)
def test_misuse(error: type[Exception], text: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=text):
        _misuse(**changes)


@pytest.mark.parametrize(
    ("error", "text", "changes"),
    [
        (ValueError, "expected a symmetric operator", {"op": torch.ones(3, 3).triu()}),
        (ValueError, "expected 0 < tolerance < 1, got 0.0", {"tolerance": 0.0}),
        (TypeError, "expected a number for damping, got str", {"damping": "1"}),
        (ValueError, "unknown method='lu'", {"method": "lu"}),
        (ValueError, "expected a rank from 1 to 80", {"preconditioner": 81}),
    ],
)
def test_misuse_of_inverse_is_known_at_once(
    error: type[Exception], text: str, changes: dict[str, Any]
) -> None:
    op = changes.pop("op", matrix(LINEAR))
    with pytest.raises(error, match=text):
        inverse(op, **changes)


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_preconditioners_must_be_positive_and_keep_shapes(method: str) -> None:
    A, b = matrix(LINEAR), columns(80, 2)
    with pytest.raises(RuntimeError, match=r"<diagonal: .*> is not positive definite: r.T @ M"):
        solve(A, b, method=method, preconditioner=Diagonal(-LINEAR))
    mixed = Diagonal(torch.cat([torch.ones(40), -0.5 * torch.ones(40)]).double())
    with pytest.raises(RuntimeError, match="is not positive definite"):
        solve(A, b, method=method, preconditioner=mixed)
    with pytest.raises(RuntimeError, match="is singular: 1 of its 80"):
        solve(A, b, method=method, preconditioner=Diagonal(torch.arange(80.0).double()))

    class Flat:
        shape = (80, 80)

        def solve(self, x: Tensor, damping: float) -> Tensor:
            return x[:, 0]

    with pytest.raises(ValueError, match=r"should return the same shape, got \[80\]"):
        solve(A, b, method=method, preconditioner=Flat())


def test_nystrom_preconditioner_needs_positive_eigenvalues() -> None:
    A = matrix(torch.cat([-LINEAR, LINEAR]))
    with pytest.raises(
        RuntimeError, match="needs a positive semi-definite operator, but matrix has"
    ):
        solve(A, columns(160, 1), preconditioner=20, damping=1.0)


@pytest.mark.parametrize("method", ["cg", "minres", "neumann"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_product_that_is_not_finite(method: str, broken: float, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    counted = Counted(matrix(LINEAR), psd=True)
    counted.fail_at, counted.broken = 17, broken
    b = columns(80, 2)
    how: dict[str, Any] = {"method": method, "checkpoint": path, "save_every": 1e6}
    if method == "neumann":
        how |= {"scale": 0.1, "damping": 1.0}
    with pytest.raises(FloatingPointError, match=r"after 16 products .*\(right-hand side 0\)"):
        solve(counted.op, b, **how)
    mended = Counted(counted.A, psd=True)
    found = solve(mended.op, b, **how)
    assert bool(found.converged.all())
    assert mended.products == found.products - 16  # nothing was lost


def test_a_product_that_is_not_finite_elsewhere() -> None:
    counted = Counted(matrix(LINEAR), psd=True)
    counted.fail_at = 3
    with pytest.raises(FloatingPointError, match="the products of the preconditioner with"):
        solve(counted.op, columns(80, 1), preconditioner=5)
    op = LinearOperator(lambda V: V * math.nan, (3, 3), dtype=F64, symmetric=True)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        solve(op, torch.ones(3, dtype=F64), x0=torch.ones(3, dtype=F64))
