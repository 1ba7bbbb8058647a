"""Preconditioned gradients of queries, as directions that training examples are multiplied by.

The protocol of directions and its dense body are in :mod:`curvlib.operators.query_directions`,
since the scan over data knows it; the low-rank body is in ``compression.py``.
"""

from __future__ import annotations

from curvlib.operators.query_directions import BlockDirections, DenseDirections

__all__ = ["BlockDirections", "DenseDirections"]
