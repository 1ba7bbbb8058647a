r"""The metric in which the error of scores is least, in the eigenbasis of the curvature.

Gradients of training examples have about the second moment :math:`\Lambda` there, which is the
product of its marginals where gradients are as K-FAC takes them to be; then

.. math:: E \langle E,\, G \rangle^2
          = \bigl\| \operatorname{diag}(l)^{1/2} E \operatorname{diag}(r)^{1/2} \bigr\|_F^2 .
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

#: Eigenvalues of a metric are no smaller than this, relative to their mean.
_FLOOR = 1e-4


@dataclass(frozen=True, eq=False)
class Metric:
    """Roots of the second moments of gradients along eigenvectors.

    Attributes:
        left: ``[G, O, 1]``.
        right: The same of the other side, ``[G, 1, I]``.
    """

    left: Tensor
    right: Tensor

    def weighted(self, D: Tensor) -> Tensor:
        """Matrices ``[Q, G, O, I]`` in the metric."""
        return D * (self.left * self.right).to(D.dtype)

    def unweighted(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Factors ``[G, O, R]`` and ``[G, R, I]`` of weighted matrices as those of matrices."""
        return left / self.left.to(left.dtype), right / self.right.to(right.dtype)


def metric_of(eigenvalues: Tensor) -> Metric | None:
    """The metric of eigenvalues ``[G, O, I]``: the product of their marginals.

    ``None`` where there is no curvature.

    Example:
        >>> import torch
        >>> values = torch.tensor([[[2.0, 4.0], [3.0, 6.0]]])
        >>> metric = metric_of(values)
        >>> bool(torch.allclose(metric.weighted(torch.ones(1, 1, 2, 2))[0] ** 2, values, rtol=0.01))
        True
    """
    mean = eigenvalues.mean((1, 2), keepdim=True)
    if not bool((mean > 0).all()):
        return None
    left = eigenvalues.mean(2, keepdim=True) + _FLOOR * mean
    right = eigenvalues.mean(1, keepdim=True) / mean + _FLOOR
    return Metric(left.sqrt(), right.sqrt())
