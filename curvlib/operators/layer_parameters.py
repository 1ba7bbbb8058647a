"""A model and some of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

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
