"""Small operators with prescribed spectra, and operators that fail or take their time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlib.core.operator import LinearOperator
from curvlib.core.result import Result
from tests.programs import Program


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with the eigenvalues ``values`` and random eigenvectors, float64."""
    draw = torch.Generator().manual_seed(seed)
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64)).Q
    A = (Q * values.double()) @ Q.mT
    return 0.5 * (A + A.mT)


def operator(A: Tensor, *, psd: bool = False, name: str = "A") -> LinearOperator:
    """A matrix as an operator that is known to be symmetric."""
    return LinearOperator(
        lambda V: A @ V,
        (A.shape[0], A.shape[1]),
        dtype=A.dtype,
        symmetric=True,
        psd=psd,
        name=name,
        identity=name,
    )


def columnwise(A: Tensor, *, psd: bool = False) -> LinearOperator:
    """As :func:`operator`, with products that do not depend on the other columns' presence."""
    op = operator(A, psd=psd)
    op._product = lambda V: torch.stack([A @ v.contiguous() for v in V.mT]).mT
    return op


def failing(A: Tensor, at: int, *, psd: bool = False) -> LinearOperator:
    """As :func:`operator`, but the ``at``-th column multiplied comes out with a NaN."""
    op = operator(A, psd=psd)
    seen = [0]

    def product(V: Tensor) -> Tensor:
        out = A @ V
        first = seen[0]
        seen[0] += V.shape[1]
        if first < at <= seen[0]:
            out[0, at - first - 1] = torch.nan
        return out

    op._product = product
    return op


def slow(A: Tensor, *, psd: bool = False) -> LinearOperator:
    """As :func:`operator`, but each block product takes a while."""
    op = operator(A, psd=psd)

    def product(V: Tensor) -> Tensor:
        time.sleep(float(os.environ.get("NAP", "0")))
        return A @ V

    op._product = product
    return op


def same(a: Result, b: Result) -> None:
    """Asserts that two results are bitwise the same."""
    assert type(a) is type(b)
    for name, value in vars(a).items():
        _same(value, getattr(b, name), name)


def _same(a: Any, b: Any, name: str) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a.nan_to_num(1e300), b.nan_to_num(1e300)), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            _same(a[key], b[key], f"{name}.{key}")
    else:
        assert a == b or (a != a and b != b), name


def interrupted(
    call: Callable[..., Result], A: Tensor, checkpoint: Path, *, psd: bool = False
) -> None:
    """A run that meets a NaN at any product loses nothing and ends bitwise the same."""
    straight = call(operator(A, psd=psd))
    for at in (1, 7, 11, 16):
        path = checkpoint.with_name(f"{checkpoint.name}{at}")
        with pytest.raises(FloatingPointError, match=f"product {at} with"):
            call(failing(A, at, psd=psd), checkpoint=path, save_every=1e9)
        assert at == 1 or at < 9 or path.exists()
        assert at > 1 or not path.exists()
        done: list[int] = []
        op = operator(A, psd=psd)
        real = op._product
        op._product = lambda V: (done.append(V.shape[1]), real(V))[1]  # noqa: B023
        same(call(op, checkpoint=path), straight)
        if at > 8:
            assert sum(done) < straight.products  # type: ignore[attr-defined]


def killed(expression: str, checkpoint: Path, *, psd: bool) -> Result:
    """``expression`` (of ``op`` and ``path``) after two processes that ran it were killed."""
    script = checkpoint.with_suffix(".py")
    script.write_text(
        "import sys\n"
        "import torch\n"
        "from pathlib import Path\n"
        "from curvlib.estimators.diagonal import diagonal\n"
        "from curvlib.estimators.frobenius import frobenius_norm\n"
        "from curvlib.estimators.joint import estimate\n"
        "from curvlib.estimators.low_rank import low_rank\n"
        "from curvlib.estimators.norms import cosine_similarity, spectral_norm\n"
        "from curvlib.estimators.trace import trace\n"
        "from tests.estimators.small import matrix, slow\n"
        f"op = slow(matrix(0.8 ** torch.arange(90)), psd={psd})\n"
        "path = Path(sys.argv[1])\n"
        "def seen(done, total, note):\n"
        "    print(int(done), flush=True)\n"
        f"result = {expression}\n"
        "result.save(sys.argv[2])\n"
    )
    output = checkpoint.with_suffix(".result")

    program = Program(script, checkpoint, output, NAP="0.2")
    for _ in range(3):
        first = int(program.stdout.readline())
    program.stop(signal.SIGKILL)
    assert checkpoint.exists()
    assert not output.exists()
    ended = Program(script, checkpoint, output, NAP="0").finish()
    assert ended.code == 0, ended.error
    assert int(ended.output.split()[0]) >= first, "it continues where the last save was"
    return Result.load(output)
