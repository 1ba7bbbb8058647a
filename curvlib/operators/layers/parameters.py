"""A model and some of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from curvlib.core.risk import Risk
from curvlib.core.space import ParamSpace


class Parameters(Protocol):
    """A model and some of its parameters: a :class:`~curvlib.core.risk.Risk`, for one."""

    @property
    def model(self) -> nn.Module:
        """The model."""

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The parameters, by name."""

    @property
    def space(self) -> ParamSpace:
        """Their space."""


@dataclass(frozen=True)
class Chosen:
    """A model and its chosen parameters, by name.

    Attributes:
        model: The model.
        params: The parameters, as the model has them.
        space: Their space.
    """

    model: nn.Module
    params: Mapping[str, Tensor]
    space: ParamSpace


def whole_parameters(risk: Risk) -> Chosen:
    """Those of a risk, of the shapes that they have as wholes where they are sharded."""
    return Chosen(risk.model, risk.held.held, risk.space.whole())
