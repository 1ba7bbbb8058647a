"""Out of memory: what ran, what it asked for, and which settings take less.

One context, :func:`names_what_fits`, is entered where curvlib's long work begins: a run of an
estimate, a product, a pass over the data. Each that the error passes adds where it was and which
settings it has; the error stays of the type that it was, and the allocator's is its cause.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

#: Settings that take memory, by the names that callers give them, and what takes less.
LESS = {
    "batch": "smaller batches (now {} examples)",
    "rows": "fewer examples at a time (block=, now {})",
    "columns": "fewer columns at a time (now {})",
    "graphs": "memory=0 of the operator, which then keeps no graphs",
    "basis": "a smaller basis= (now {}) or k=",
    "rank": "a lower rank= (now {})",
    "preconditioner": "a preconditioner= of lower rank (now {})",
    "block": "fewer vectors at a time (block=, now {})",
    "reorthogonalize": "reorthogonalize=False, fewer steps= or fewer probes=",
    "sketch": "fewer probes= (now {}), or method='hutchinson', which keeps none",
}
#: How errors begin, or what they say, that have no class of their own; not those that quote one.
_FULL = re.compile(
    r"out of memory in |[^a-z]*(CUDA|HIP|MPS|XPU|Cuda|Hip)\b.{0,20}out of memory"
    r"|.*DefaultCPUAllocator: .*(can't|not enough|cannot)"
)
_ASKED = re.compile(r"allocate ([\d.]+ ?(?:bytes|[KMGTP]i?B))", re.IGNORECASE)
#: Attribute of errors that have been explained: where they were, and which settings there are.
_MARK = "_curvlib_exhausted"


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that memory is out, on whichever device.

    Example:
        >>> is_exhausted(torch.OutOfMemoryError("CUDA out of memory.")), is_exhausted(OSError())
        (True, False)
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _FULL.match(str(error)) is not None


@contextmanager
def names_what_fits(
    place: str | Callable[[], str], settings: Mapping[str, Any] | Callable[[], Mapping[str, Any]]
) -> Iterator[None]:
    """Adds to an error of memory where it was, and which settings take less.

    Args:
        place: What runs, in words.
        settings: Its settings, of which :data:`LESS` knows some.

    Raises:
        MemoryError: If memory is out; torch.OutOfMemoryError on a GPU, RuntimeError where
            PyTorch's CPU allocator raises that.

    Example:
        >>> with names_what_fits("low rank of Hessian", {"rank": 64, "seed": 0}):
        ...     raise MemoryError("unable to allocate 3 GiB")
        Traceback (most recent call last):
        MemoryError: out of memory in low rank of Hessian, which asked for 3 GiB. To make it
        fit: a lower rank= (now 64). `curvlib plan` says which values fit
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error) or _explains_itself(error):
            raise
        where = place if isinstance(place, str) else place()
        own = settings if isinstance(settings, Mapping) else settings()
        places, ways = getattr(error, _MARK, ((), ()))
        places = (where, *(p for p in places if p != where))  # from the outside in
        ways = (*ways, *(way for way in _ways(own) if way not in ways))
        first = (error.__cause__ or error) if hasattr(error, _MARK) else error
        asked = _ASKED.search(str(first))
        wanted = f", which asked for {asked[1]}" if asked else f" ({_short(first)})"
        fits = "; ".join(ways) or "fewer parameters (params= of the risk)"
        told = _kind(error)(
            f"out of memory in {', in '.join(places)}{wanted}. To make it fit: {fits}. "
            "`curvlib plan` says which values fit"
        )
        setattr(told, _MARK, (places, ways))
        raise told from first


def run_names_what_fits(run: F) -> F:
    """Makes a function with ``title=`` and ``settings=`` say which of these would fit."""

    @functools.wraps(run)
    def running(*args: Any, **kwargs: Any) -> Any:
        settings = dict(kwargs.get("settings") or {})
        with names_what_fits(str(kwargs.get("title", "a run")), settings):
            return run(*args, **kwargs)

    return running  # type: ignore[return-value]


@contextmanager
def pass_names_what_fits(
    reading: Callable[[], tuple[int, int] | None], arranged: AbstractContextManager[None]
) -> Iterator[None]:
    """Enters what a pass over the data arranges; errors name the batch, and its examples."""

    def place() -> str:
        at = reading()
        return "a pass over the data" if at is None else f"batch {at[0]} of a pass over the data"

    def settings() -> dict[str, int]:
        at = reading()
        return {} if at is None else {"batch": at[1]}

    with names_what_fits(place, settings), arranged:
        yield


def _explains_itself(error: BaseException) -> bool:
    """Whether curvlib refused the request, and has said what would fit."""
    return not hasattr(error, _MARK) and "what would fit:" in str(error)


def _kind(error: BaseException) -> Callable[[str], BaseException]:
    """Of the error; its class may not take a message, as NumPy's does not."""
    for kind in (torch.OutOfMemoryError, RuntimeError):
        if isinstance(error, kind):
            return kind
    return MemoryError


def _ways(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, words in LESS.items():
        value = settings.get(name)
        if value is True or (type(value) is int and value > 1):
            yield words.format(value)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
