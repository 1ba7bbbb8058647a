"""Symmetric matrices with a prescribed spectrum, and operators that count their products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvlib.core.digest import digest
from curvlib.core.operator import LinearOperator

F64 = torch.float64


def matrix(values: Sequence[float] | Tensor, seed: int = 0) -> Tensor:
    """A dense symmetric float64 matrix with these eigenvalues and random eigenvectors."""
    spectrum = torch.as_tensor(values, dtype=F64)
    n = spectrum.numel()
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64)).Q
    A = (Q * spectrum) @ Q.T
    return 0.5 * (A + A.T)


class Counted:
    """A dense symmetric matrix as an operator that counts columns and block products."""

    def __init__(self, A: Tensor, *, psd: bool = False, name: str = "matrix") -> None:
        self.columns: list[int] = []
        self.fail_at: int | None = None
        self.broken = float("nan")
        self.stop_after: int | None = None  # block products, before an error
        self.error: type[Exception] = RuntimeError
        self.A = A

        def matmat(V: Tensor) -> Tensor:
            assert V.T.is_contiguous(), "blocks are column-contiguous"
            assert torch.isfinite(V).all()
            if len(self.columns) == self.stop_after:
                raise self.error
            before = sum(self.columns)
            self.columns.append(V.shape[1])
            out = A @ V
            if self.fail_at is not None and before < self.fail_at <= before + V.shape[1]:
                out[0, 0] = self.broken
            return out

        self.op = LinearOperator(
            matmat,
            (A.shape[0], A.shape[1]),
            dtype=A.dtype,
            device=A.device,
            symmetric=True,
            psd=psd,
            name=name,
            identity=lambda: digest([A]),
        )

    @property
    def products(self) -> int:
        return sum(self.columns)


def network_like(n: int = 400) -> Tensor:
    """Ten outliers, a bulk around zero: what Hessians of classifiers look like."""
    bulk = torch.randn(n - 10, generator=torch.Generator().manual_seed(7), dtype=F64)
    return torch.cat([torch.linspace(2.0, 10.0, 10, dtype=F64), 0.1 * bulk])


def half_tiny(n: int = 120) -> Tensor:
    """Positive semi-definite, half of the spectrum at 1e-6, ten outliers."""
    rest = torch.linspace(0.01, 0.5, n - n // 2 - 10, dtype=F64)
    outliers = torch.linspace(1.0, 10.0, 10, dtype=F64)
    return torch.cat([torch.full((n // 2,), 1e-6, dtype=F64), rest, outliers])
