"""Optimizers for PyTorch that are fed by curvature."""

from curvlib.optim.adahessian import AdaHessian
from curvlib.optim.kfac import KFAC
from curvlib.optim.mfac import MFAC
from curvlib.optim.mkor import MKOR
from curvlib.optim.newton_cg import NewtonCG, NewtonStep
from curvlib.optim.shell import CurvatureOptimizer
from curvlib.optim.sophia import Sophia

__all__ = [
    "KFAC",
    "MFAC",
    "MKOR",
    "AdaHessian",
    "CurvatureOptimizer",
    "NewtonCG",
    "NewtonStep",
    "Sophia",
]
