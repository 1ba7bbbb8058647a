"""curvlib: matrix-free curvature of neural networks, put to use."""

from curvlib import influence, optim, pruning, rates
from curvlib.core.block_diagonal import BlockDiagonal
from curvlib.core.cupy_arrays import from_cupy, to_cupy
from curvlib.core.interop import from_dlpack, from_scipy, to_dlpack, to_scipy
from curvlib.core.kronecker import Kronecker
from curvlib.core.linear_cross_entropy import LinearCrossEntropy
from curvlib.core.operator import LinearOperator
from curvlib.core.partition import Partition
from curvlib.core.plan import Plan
from curvlib.core.ranks.shards import shard
from curvlib.core.result import Result
from curvlib.core.risk import Risk
from curvlib.core.space import ParamSpace
from curvlib.core.structured import Diagonal, LowRankPlusShift
from curvlib.estimators.density import Density, density
from curvlib.estimators.diagonal import DiagonalEstimate, diagonal
from curvlib.estimators.eigenpairs import Eigenpairs, eigenpairs
from curvlib.estimators.frobenius import FrobeniusNorm, frobenius_norm
from curvlib.estimators.functions import FunctionTrace, effective_dimension, logdet, trace_of
from curvlib.estimators.inverse import inverse
from curvlib.estimators.iterations import NegativeCurvatureError
from curvlib.estimators.joint import Estimate, estimate
from curvlib.estimators.low_rank import LowRank, low_rank
from curvlib.estimators.norms import (
    CosineSimilarity,
    SpectralNorm,
    cosine_similarity,
    spectral_norm,
)
from curvlib.estimators.sharpness import DirectionalSharpness, directional_sharpness
from curvlib.estimators.solve import Solution, solve
from curvlib.estimators.trace import Trace, trace
from curvlib.implicit.hypergradient import Hypergradient, hypergradient
from curvlib.operators.block_mfac import BlockMFAC
from curvlib.operators.coverage import Coverage
from curvlib.operators.fisher import fisher
from curvlib.operators.function import hessian_of
from curvlib.operators.ggn import ggn
from curvlib.operators.gradients import gradients
from curvlib.operators.hessian import hessian
from curvlib.operators.hessian_gradient import hessian_gradient_product
from curvlib.operators.jacobian import jacobian, ntk
from curvlib.operators.kfac import KFAC, kfac
from curvlib.operators.mfac import MFAC, mfac, mfac_window
from curvlib.operators.rows import gradient_rows
from curvlib.planning import planned
from curvlib.pruning.prune import prune
from curvlib.pruning.result import PruneResult

__version__ = "0.1.0"

__all__ = [
    "KFAC",
    "MFAC",
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
    "Kronecker",
    "LinearCrossEntropy",
    "LinearOperator",
    "LowRank",
    "LowRankPlusShift",
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
