"""The public names, as a list that nothing changes by accident."""

from __future__ import annotations

import subprocess
import sys

import curvlib as cl

NAMES = [
    "BlockDiagonal",
    "BlockMFAC",
    "CosineSimilarity",
    "Coverage",
    "Density",
    "Diagonal",
    "DiagonalEstimate",
    "DirectionalSharpness",
    "Eigenpairs",
    "Estimate",
    "FrobeniusNorm",
    "FunctionTrace",
    "Hypergradient",
    "KFAC",
    "Kronecker",
    "LinearCrossEntropy",
    "LinearOperator",
    "LowRank",
    "LowRankPlusShift",
    "MFAC",
    "NegativeCurvatureError",
    "ParamSpace",
    "Partition",
    "Plan",
    "PruneResult",
    "Result",
    "Risk",
    "Solution",
    "SpectralNorm",
    "Trace",
    "cosine_similarity",
    "density",
    "diagonal",
    "directional_sharpness",
    "effective_dimension",
    "eigenpairs",
    "estimate",
    "fisher",
    "frobenius_norm",
    "from_cupy",
    "from_dlpack",
    "from_scipy",
    "ggn",
    "gradient_rows",
    "gradients",
    "hessian",
    "hessian_gradient_product",
    "hessian_of",
    "hypergradient",
    "influence",
    "inverse",
    "jacobian",
    "kfac",
    "logdet",
    "low_rank",
    "mfac",
    "mfac_window",
    "ntk",
    "optim",
    "planned",
    "prune",
    "pruning",
    "rates",
    "shard",
    "solve",
    "spectral_norm",
    "to_cupy",
    "to_dlpack",
    "to_scipy",
    "trace",
    "trace_of",
]
OPTIONAL = [
    "backpack",
    "cupy",
    "curvlinops",
    "lightning",
    "matplotlib",
    "pandas",
    "sklearn",
    "torch_pruning",
    "transformers",
]


def test_names_are_these():
    assert sorted(cl.__all__) == NAMES


def test_names_exist_and_say_what_they_are():
    for name in NAMES:
        assert (getattr(cl, name).__doc__ or "").strip(), f"{name} has no docstring"


def test_import_changes_nothing_and_loads_nothing_optional():
    """Rules 1 and 9: no settings, no seeds, no filters; optional parts load at the call."""
    program = f"""
import sys, warnings
import torch, scipy.sparse.linalg  # SciPy itself adds a filter
before = (torch.get_rng_state().tolist(), torch.get_default_dtype(), warnings.filters[:],
          torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads())
import curvlib, curvlib.cli, curvlib.demo
after = (torch.get_rng_state().tolist(), torch.get_default_dtype(), warnings.filters[:],
         torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads())
assert before == after, "an import changed something global"
loaded = [name for name in {OPTIONAL} if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
