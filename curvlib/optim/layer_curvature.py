"""The averaged Kronecker factors of one layer, and their eigenbasis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlib.optim.rules.kfac import averaged, debias, eigenbasis, moved, outer


@dataclass(frozen=True, eq=False)
class LayerCurvature:
    """What is known of one layer.

    Attributes:
        left: Moving average of the left factor, from zero: ``[G, O, O]``, or ``[G, O]``.
        right: Of the right one.
        bias: What both are divided by, ``1 - decay ** updates``.
        left_basis: Eigenvectors, ``None`` for a diagonal factor.
        right_basis: Of the right one.
        left_values: Eigenvalues ``[G, O]``; ``None`` before the first decomposition.
        right_values: ``[G, I]``.
        corrected: Moving average of E-KFAC's eigenvalues in the basis, ``[G, O, I]``.
        corrected_bias: What it is divided by.
    """

    left: Tensor
    right: Tensor
    bias: float
    left_basis: Tensor | None = None
    right_basis: Tensor | None = None
    left_values: Tensor | None = None
    right_values: Tensor | None = None
    corrected: Tensor | None = None
    corrected_bias: float = 0.0

    @property
    def shapes(self) -> tuple[torch.Size, torch.Size]:
        """Shapes of the factors."""
        return self.left.shape, self.right.shape

    def fits(self, shape: tuple[int, int, int]) -> bool:
        """Whether it is of a layer ``(G, O, I)``: one whose bias was not frozen since, say."""
        sides = (tuple(self.left.shape[:2]), tuple(self.right.shape[:2]))
        return sides == (shape[:2], (shape[0], shape[2]))

    @property
    def basis(self) -> tuple[Tensor | None, Tensor | None]:
        """Eigenvectors, left and right."""
        return self.left_basis, self.right_basis

    def sides(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Eigenvalues and eigenvectors, left and right.

        Raises:
            RuntimeError: If there is no decomposition yet.
        """
        if self.left_values is None or self.right_values is None:
            raise RuntimeError("the factors have not been decomposed yet; call decomposed() first")
        return (self.left_values, self.left_basis), (self.right_values, self.right_basis)

    def eigenvalues(self) -> Tensor:
        """``[G, O, I]``: E-KFAC's where there are any.

        Raises:
            RuntimeError: If there is no decomposition yet.
        """
        if self.corrected is not None:
            return self.corrected / self.corrected_bias
        (left, _), (right, _) = self.sides()
        return outer(left, right)

    def decomposed(self, *, corrected: bool) -> LayerCurvature:
        """The same in a new basis, that of the factors as they are now.

        Corrected eigenvalues are moved to it; the first ones are those of K-FAC.
        """
        left_values, left_basis = eigenbasis(self.left / self.bias)
        right_values, right_basis = eigenbasis(self.right / self.bias)
        basis = (left_basis, right_basis)
        values, weight = self.corrected, self.corrected_bias
        if not corrected:
            values, weight = None, 0.0
        elif values is not None:
            values = moved(values, self.basis, basis)
        else:
            values, weight = outer(left_values, right_values) * self.bias, self.bias
        return replace(
            self,
            left_basis=left_basis,
            right_basis=right_basis,
            left_values=left_values,
            right_values=right_values,
            corrected=values,
            corrected_bias=weight,
        )

    def plain(self) -> dict[str, Any]:
        """Its fields, for a state dict."""
        return {k: v for k, v in vars(self).items() if v is not None}


def updated(
    old: LayerCurvature | None, left: Tensor, right: Tensor, squares: Tensor | None, decay: float
) -> LayerCurvature:
    """The averages with the factors, and corrected eigenvalues, of one batch more.

    Args:
        old: The averages so far.
        left: Left factor of the batch.
        right: Right factor.
        squares: Corrected eigenvalues of the batch in the old basis.
        decay: Of the averages.

    Example:
        >>> eye = torch.eye(2)[None]
        >>> once = updated(None, eye, 3 * eye, None, 0.9)
        >>> once.decomposed(corrected=False).eigenvalues()[0, 0].round(decimals=4)
        tensor([3., 3.])
    """
    bias = debias(decay, 1)
    if old is None:
        return LayerCurvature(averaged(None, left, decay), averaged(None, right, decay), bias)
    found = replace(
        old,
        left=averaged(old.left, left, decay),
        right=averaged(old.right, right, decay),
        bias=decay * old.bias + bias,
    )
    if squares is None or old.corrected is None:
        return found
    return replace(
        found,
        corrected=averaged(old.corrected, squares, decay),
        corrected_bias=decay * old.corrected_bias + bias,
    )


def advanced(
    layers: Mapping[str, LayerCurvature],
    batch: Mapping[str, tuple[Tensor, Tensor, Tensor | None]],
    decay: float,
    *,
    decompose: bool,
    corrected: bool,
) -> tuple[dict[str, LayerCurvature], set[str], int]:
    """What is known of all layers with one batch more, whose eigenvalues changed, how many failed.

    Layers whose decomposition does not converge keep their basis, or are left out if they have
    none.

    Args:
        layers: What is known so far.
        batch: Left and right factor, and corrected eigenvalues, of the layers that were called.
        decay: Of the averages.
        decompose: Whether it is time for new bases.
        corrected: Whether eigenvalues are corrected.
    """
    found, changed, failed = dict(layers), set(), 0
    for name, (left, right, squares) in batch.items():
        old = layers.get(name)
        if old is not None and old.shapes != (left.shape, right.shape):
            old = None  # a bias was frozen, or set free
        new = updated(old, left, right, squares, decay)
        fresh = decompose or new.left_values is None
        try:
            found[name] = new.decomposed(corrected=corrected) if fresh else new
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not in the stubs
            failed += 1
            if new.left_values is None:
                found.pop(name, None)
                continue
            found[name] = new
        if fresh or corrected:
            changed.add(name)
    return found, changed, failed
