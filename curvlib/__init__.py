"""curvlib: matrix-free curvature of neural networks, put to use."""

from curvlib.core.interop import (
    from_cupy,
    from_dlpack,
    from_scipy,
    to_cupy,
    to_dlpack,
    to_scipy,
)
from curvlib.core.operator import LinearOperator
from curvlib.core.result import Result
from curvlib.core.risk import Risk
from curvlib.core.space import ParamSpace
from curvlib.estimators.density import Density, density
from curvlib.estimators.eigenpairs import Eigenpairs, eigenpairs
from curvlib.operators.fisher import fisher
from curvlib.operators.function import hessian_of
from curvlib.operators.ggn import ggn
from curvlib.operators.gradients import gradients
from curvlib.operators.hessian import hessian
from curvlib.operators.jacobian import jacobian, ntk

__version__ = "0.1.0"

__all__ = [
    "Density",
    "Eigenpairs",
    "LinearOperator",
    "ParamSpace",
    "Result",
    "Risk",
    "density",
    "eigenpairs",
    "fisher",
    "from_cupy",
    "from_dlpack",
    "from_scipy",
    "ggn",
    "gradients",
    "hessian",
    "hessian_of",
    "jacobian",
    "ntk",
    "to_cupy",
    "to_dlpack",
    "to_scipy",
]
