"""curvlib: matrix-free curvature of neural networks, put to use."""

from curvlib.core.operator import LinearOperator
from curvlib.core.risk import Risk
from curvlib.core.space import ParamSpace
from curvlib.operators.hessian import hessian

__all__ = ["LinearOperator", "ParamSpace", "Risk", "hessian"]
from curvlib.operators.ggn import ggn
