r"""Results: frozen records that are saved, loaded, printed and plotted.

A result is a frozen dataclass of tensors, numbers, strings and dictionaries of them. It is
declared with ``@dataclass(frozen=True, eq=False, repr=False)``, so that it keeps the short
``repr`` of :class:`Result`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from curvlib.core.files import read_record, write_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

R = TypeVar("R", bound="Result")

#: Marks a field that is not saved: ``field(default=None, metadata=TRANSIENT)``.
TRANSIENT = MappingProxyType({"transient": True})


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What an estimator returns.

    A field with ``metadata=TRANSIENT`` and a default (a module, say) is not saved: it has its
    default after loading.

    Example:
        >>> import tempfile, torch
        >>> @dataclass(frozen=True, eq=False, repr=False)
        ... class Mean(Result):
        ...     value: float
        ...     stderr: float
        ...     samples: torch.Tensor
        >>> mean = Mean(2.0, 0.5, torch.tensor([1.5, 2.5]))
        >>> mean
        Mean(value=2 ± 0.5, samples=[2])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = mean.save(folder + "/mean.safetensors")
        ...     Mean.load(path).samples
        tensor([1.5000, 2.5000])
    """

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the result to one safetensors file, whose header holds the rest as JSON.

        The file appears whole or not at all.

        Args:
            path: The file; its folder must exist.

        Returns:
            The path.

        Raises:
            OSError: If the file cannot be written.
        """
        content = {name: getattr(self, name) for name in _saved(type(self))}
        write_record(path, type(self).__name__, content)
        return Path(path)

    @classmethod
    def load(cls: type[R], path: str | os.PathLike[str]) -> R:
        """Reads a result from a file that :meth:`save` wrote; tensors come back on the CPU.

        ``Result.load`` reads a result of any class, ``Density.load`` insists on a density.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, of another class or of another version.
        """
        kind, content = read_record(path)
        known = [c for c in _family(cls) if c.__name__ == kind]
        if not known:
            raise ValueError(
                f"{str(path)!r} holds a {kind}, expected {cls.__name__}; "
                "Result.load reads any result whose class is imported"
            )
        matching = [c for c in known if set(_saved(c)) == content.keys()]
        target = (matching or known)[0]  # classes of one name are told apart by their fields
        expected = set(_saved(target))
        if content.keys() != expected:
            differ = sorted(content.keys() ^ expected)
            raise ValueError(
                f"{str(path)!r} holds a {kind} of another version of curvlib, "
                f"which differs in {differ}; use the version that wrote it"
            )
        result: R = target(**content)
        return result

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._parts())})"

    def _parts(self) -> Iterator[str]:
        names = [field.name for field in fields(self) if "transient" not in field.metadata]
        for name in names:
            value = getattr(self, name)
            error = "stderr" if name == "value" else f"{name}_stderr"
            if isinstance(value, Tensor) and value.ndim > 0:
                yield f"{name}={list(value.shape)}"
            elif isinstance(value, dict) or name == "stderr" or name.endswith("_stderr"):
                continue
            elif error in names and value is not None:
                yield f"{name}={float(value):.5g} ± {float(getattr(self, error)):.2g}"
            elif isinstance(value, (float, Tensor)):
                yield f"{name}={float(value):.5g}"
            elif value is not None:
                yield f"{name}={value!r}"


def axes_or_new(ax: Axes | None, size: tuple[float, float] = (6.4, 4.0)) -> Axes:
    """The axes to draw on: those given, else the only ones of a new figure.

    Raises:
        ImportError: If matplotlib is absent.
    """
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'curvlib[plot]'") from error
    new: Axes = plt.subplots(figsize=size, layout="constrained")[1]
    return new


def unframed(ax: Axes, **legend: Any) -> Axes:
    """The axes without lines above and to the right, and with a small legend.

    Args:
        ax: The axes.
        legend: Settings of the legend: where it is.
    """
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", **legend)
    return ax


def _saved(cls: type[Result]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls) if "transient" not in field.metadata)


def _family(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _family(child)
