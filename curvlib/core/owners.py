"""Which modules of a model hold which parameters, found in one walk over the model."""

from __future__ import annotations

from torch import Tensor, nn

#: A module, and the name by which it holds a parameter.
Owner = tuple[nn.Module, str]


class Owners:
    """The modules that hold each parameter of a model.

    Args:
        model: The model, as it is now.

    Example:
        >>> import torch
        >>> tied = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 3))
        >>> tied[1].weight = tied[0].weight
        >>> [(type(module).__name__, key) for module, key in Owners(tied).of(tied[0].weight)]
        [('Embedding', 'weight'), ('Linear', 'weight')]
    """

    def __init__(self, model: nn.Module) -> None:
        self._by_id: dict[int, list[Owner]] = {}
        for module in model.modules():
            for key, param in module._parameters.items():
                if param is not None:
                    self._by_id.setdefault(id(param), []).append((module, key))

    def of(self, param: Tensor) -> list[Owner]:
        """The modules that hold a parameter, in the model's order; each name of it once."""
        return self._by_id.get(id(param), [])
