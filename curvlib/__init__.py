"""curvlib: matrix-free curvature of neural networks, put to use."""

from curvlib.core.operator import LinearOperator
from curvlib.core.risk import Risk
from curvlib.core.space import ParamSpace
from curvlib.operators.fisher import fisher
from curvlib.operators.function import hessian_of
from curvlib.operators.ggn import ggn
from curvlib.operators.gradients import gradients
from curvlib.operators.hessian import hessian
from curvlib.operators.jacobian import jacobian, ntk

__all__ = [
    "LinearOperator",
    "ParamSpace",
    "Risk",
    "fisher",
    "ggn",
    "gradients",
    "hessian",
    "hessian_of",
    "jacobian",
    "ntk",
]
