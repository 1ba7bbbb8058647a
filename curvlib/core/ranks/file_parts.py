"""Files of tensors that no process has whole: written one after the other, read in parts.

The format is that of :mod:`curvlib.core.files`, safetensors: a reader cannot tell the difference.
A tensor that ranks hold slices of is gathered while it is written, and let go; a rank that needs a
slice of a tensor in a file reads just that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from curvlib.core.ranks.group import Group

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, eq=False)
class Later:
    """A tensor that is made while it is written, by all ranks together.

    Attributes:
        shape: Its shape.
        like: A tensor of its type and device.
        make: Makes it, on every rank.
    """

    shape: tuple[int, ...]
    like: Tensor
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, of which a part is read.

    Attributes:
        path: The file.
        name: Of the tensor in it.
        stored: Its shape there.
        turned: Whether the transpose is meant.
    """

    path: Path
    name: str
    stored: tuple[int, ...]
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.stored[::-1] if self.turned else self.stored

    def narrow(self, axis: int, first: int, last: int, device: torch.device) -> Tensor:
        """The entries from ``first`` to before ``last`` along one axis."""
        from safetensors import safe_open

        if self.turned:
            plain = Stored(self.path, self.name, self.stored)
            return plain.narrow(1 - axis, first, last, device).mT
        where = [slice(None)] * len(self.stored)
        where[axis] = slice(first, last)
        with safe_open(self.path, framework="pt", device="cpu") as file:
            part = file.get_slice(self.name)
            if first == last:  # which the library refuses
                one: Tensor = part[(slice(0, 1),) * len(self.stored)]
                shape = [0 if d == axis else n for d, n in enumerate(self.stored)]
                return one.new_empty(shape, device=device)
            found: Tensor = part[tuple(where)]
            return found.clone().to(device)


class StateParts(Protocol):
    """What of a state is held in parts by some ranks, and how files hold it whole."""

    @property
    def group(self) -> Group:
        """The ranks."""

    def taken(self, state: Any) -> dict[str, Any]:
        """The fields of a state: :class:`Later` is what is in parts."""

    def given(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The converse, from :class:`Stored` tensors."""


def write(
    opened: AbstractContextManager[Path],
    tensors: Mapping[str, Tensor | Later],
    text: str,
    group: Group,
) -> None:
    """Writes a file of tensors that all ranks make together, one after the other.

    Args:
        opened: Gives the path that the first rank writes to.
        tensors: The same names on all ranks.
        text: What else the file holds.
        group: The ranks.

    Raises:
        OSError: If the first rank cannot write; the others raise a RuntimeError.
    """
    order = sorted(tensors, key=lambda name: -_like(tensors[name]).element_size())
    header: dict[str, Any] = {"__metadata__": {"curvlib": text}}
    end = 0
    for name in order:
        like, shape = _like(tensors[name]), list(tensors[name].shape)
        start, end = end, end + math.prod(shape) * like.element_size()
        header[name] = {"dtype": _TYPES[like.dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)

    def made() -> Iterator[Tensor]:
        for tensor in (tensors[name] for name in order):
            yield tensor.make() if isinstance(tensor, Later) else tensor

    stream, failure = made(), None
    if group.first:
        try:
            with opened as path, path.open("wb") as file:
                file.write(len(head).to_bytes(8, "little") + head)
                for value in stream:
                    flat = value.detach().cpu().contiguous().reshape(-1)
                    file.write(flat.view(torch.uint8).numpy().data)
        except OSError as error:  # the others are told at the end
            failure = error
    for _ in stream:  # what all have to make
        pass
    group.require_success(failure, "writing a file")


def _like(tensor: Tensor | Later) -> Tensor:
    return tensor.like if isinstance(tensor, Later) else tensor
