r"""Generalized Gauss-Newton matrix of a risk.

With outputs :math:`f_n(\theta)`, Jacobians :math:`J_n` and the loss's Hessian :math:`\nabla^2_f
\ell_n` in the outputs,

.. math:: G = \frac1W \sum_n J_n^T \, (\nabla^2_f \ell_n) \, J_n

(Schraudolph, "Fast curvature matrix-vector products", 2002). It equals the Hessian where the model
is linear in its parameters, and the type-2 Fisher for cross-entropy, NLL, MSE and BCE.
"""

from __future__ import annotations

from curvlib.core.operator import LinearOperator
from curvlib.core.risk import Risk
from curvlib.operators.captured.compiled import Compile
from curvlib.operators.gauss_newton import gauss_newton
from curvlib.operators.head_curvature import expected_chunks
from curvlib.operators.hessian import MEMORY
from curvlib.operators.loss_hessian import loss_hessian


def ggn(
    risk: Risk,
    *,
    memory: int = MEMORY,
    compile: Compile = False,  # noqa: A002 (the name that torch uses)
) -> LinearOperator:
    """The generalized Gauss-Newton matrix of a risk with respect to its parameters.

    Args:
        risk: Model, loss, data and parameters. The model's output must be one tensor. The Hessian
            of PyTorch's cross-entropy, NLL (categorical, on log-probabilities), MSE and
            BCE-with-logits is in closed form; any other loss is differentiated twice in the output.
        memory: Bytes that kept graphs, and graphs of columns done at once, may take.
        compile: Whether products run as captured graphs that are proven right on the model: see
            :func:`curvlib.hessian`.

    Returns:
        A symmetric operator ``[P, P]``, positive semi-definite for the known losses, of the risk's
        mean (or sum).

    Raises:
        TypeError: At the product, if the model's output is not one tensor.
        ValueError: If the memory is negative, or ``compile=`` unknown.
        RuntimeError: At the product, if a ``compile=`` that is insisted on does not work.

    Example:
        >>> import torch, curvlib as cl
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> G = cl.ggn(cl.Risk(model, torch.nn.MSELoss(), (x, y)))
        >>> G.to_dense().tolist(), G.psd
        ([[2.0, 4.0], [4.0, 8.0]], True)
    """
    return gauss_newton(
        risk,
        loss_hessian,
        head=expected_chunks,
        name="GGN",
        psd=risk.loss.known,
        memory=memory,
        rebuild=lambda other: ggn(other, memory=memory, compile=compile),
        compile=compile,
    )
