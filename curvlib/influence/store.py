r"""Matrices of scores on disk: shards that can be mapped into memory, and one manifest.

The scores of ``N`` training examples and ``Q`` queries may be larger than memory. A folder holds
them as ``scores-00000000.npy, ...``, rows ``[n, Q]`` in the order of the data (any program that
reads NumPy's format can map them), and ``manifest.json``: what the scores are of (digests of data,
model, queries and curvature, settings), which shards are finished, and where the scan goes on.

Every file appears whole or not at all, and a shard is listed only once it is on the disk. So a
scan that is stopped at any moment, by ``kill -9`` or a disk that is full, leaves a folder with
which the same call goes on, and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlib.core.files import atomic_write, curvlib_version, remove_leftovers
from curvlib.core.run import Progress, run

#: Version of the layout of a folder.
FORMAT = 1
MANIFEST = "manifest.json"
_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
_HEADER = 128  # bytes before the numbers of a shard, as a rule
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


@dataclass(frozen=True, eq=False)
class Piece:
    """Scores of the next examples.

    Attributes:
        rows: ``[n, Q]``.
        place: Where a scan goes on after them: numbers and strings by name, as JSON keeps them.
    """

    rows: Tensor
    place: Mapping[str, Any]


@dataclass(frozen=True)
class Shard:
    """One file of a matrix.

    Attributes:
        file: Its name.
        start: The first example.
        stop: The last one, plus one.
        bytes: Its size.
        place: Where a scan goes on after it; empty for the last one.
    """

    file: str
    start: int
    stop: int
    bytes: int
    place: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class ScoreMatrix:
    """A matrix of scores in a folder, ``[N, Q]``; what of it is finished.

    Attributes:
        folder: Where it is.
        queries: ``Q``.
        dtype: ``"float32"`` or ``"float64"``.
        identity: What the scores are of.
        shards: The finished shards, in order.
        complete: Whether all examples are scored.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     matrix = write_scores(
        ...         folder,
        ...         lambda place: iter([Piece(torch.ones(3, 2), {})]),
        ...         queries=2,
        ...         identity={"data": "three ones"},
        ...     )
        ...     matrix.shape, matrix.rows(1, 3).tolist()
        ((3, 2), [[1.0, 1.0], [1.0, 1.0]])
    """

    folder: Path
    queries: int
    dtype: str
    identity: Mapping[str, Any]
    shards: tuple[Shard, ...]
    complete: bool

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ScoreMatrix:
        """Reads the manifest of a folder; rows are read when they are asked for.

        Raises:
            FileNotFoundError: If there is no manifest.
            ValueError: If it is damaged, or of another version.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"there is no matrix of scores in {str(folder)!r}: no {path}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(
                    f"{str(path)!r} has format {content['format']} (curvlib "
                    f"{content['curvlib']}), this curvlib reads format {FORMAT}; use the version "
                    "that wrote it"
                )
            return cls(
                folder=Path(folder),
                queries=content["queries"],
                dtype=content["dtype"],
                identity=content["identity"],
                shards=tuple(Shard(**own) for own in content["shards"]),
                complete=content["complete"],
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r} is damaged or not a manifest of scores ({error})"
            ) from error

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, Q)``; of what is finished, as long as it is not complete."""
        return (self.shards[-1].stop if self.shards else 0), self.queries

    def shard(self, index: int) -> np.ndarray[Any, Any]:
        """The rows ``[n, Q]`` of one shard, mapped into memory, read-only.

        Raises:
            ValueError: If the file is missing or damaged.
        """
        own = self.shards[index]
        path = self.folder / own.file
        if not self._whole(own):
            raise ValueError(
                f"the shard {str(path)!r} is missing or damaged; the call that wrote the scores "
                "writes it again"
            )
        rows: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return rows

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """Rows of examples ``start`` to ``stop``, read into memory, ``[n, Q]``."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        parts = [
            self.shard(i)[max(start - own.start, 0) : stop - own.start]
            for i, own in enumerate(self.shards)
            if own.start < stop and start < own.stop
        ]
        return np.concatenate([np.empty((0, self.queries), self.dtype), *parts])

    def column(self, query: int) -> np.ndarray[Any, Any]:
        """The scores of all examples for one query, ``[N]``."""
        parts = [self.shard(i)[:, query] for i in range(len(self.shards))]
        return np.concatenate([np.empty(0, self.dtype), *parts])

    def _whole(self, own: Shard) -> bool:
        """Whether a shard's file is there and as long as it should be."""
        path = self.folder / own.file
        return path.is_file() and path.stat().st_size == own.bytes

    def _written(self) -> ScoreMatrix:
        """Itself, after its manifest has been written."""
        content = {
            "format": FORMAT,
            "curvlib": curvlib_version(),
            "queries": self.queries,
            "dtype": self.dtype,
            "examples": self.shape[0],
            "complete": self.complete,
            "identity": dict(self.identity),
            "shards": [{**vars(own), "place": dict(own.place)} for own in self.shards],
        }
        with atomic_write(self.folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return self


@dataclass(frozen=True, eq=False)
class _State:
    """What is on the disk, and rows that are not yet."""

    matrix: ScoreMatrix
    rows: tuple[Tensor, ...]


def write_scores(
    folder: str | os.PathLike[str],
    source: Callable[[Mapping[str, Any] | None], Iterator[Piece]],
    *,
    queries: int,
    identity: Mapping[str, Any],
    examples: int | None = None,
    dtype: torch.dtype = torch.float32,
    shard: int = 4096,
    progress: Progress = None,
) -> ScoreMatrix:
    """Writes scores to a folder, or goes on with what was written there.

    Args:
        folder: Where; it is made if its parent exists.
        source: Returns an iterator over the scores, from the start (``None``), or from where a
            piece said that a scan goes on. Pieces must not depend on where it began.
        queries: ``Q``.
        identity: What the scores are of: digests and settings, as JSON keeps them. A folder with
            another one is refused.
        examples: How many there are, if that is known: for the disk space and the time left.
        dtype: torch.float32 or torch.float64.
        shard: Examples of a shard, at least: what is lost at most when the scan is killed. Pieces
            are not divided, so that a shard may have more.
        progress: Whether to show a bar: see :data:`curvlib.core.run.Progress`.

    Raises:
        ValueError: If the folder holds other scores, or pieces have another number of queries.
        TypeError: If ``dtype`` is another.
        OSError: If the folder cannot be written to, or the disk has not as much space as is needed
            (before the scan where that is known): finished shards stay valid, and the message says
            how many bytes are needed.
    """
    if dtype not in _DTYPES:
        raise TypeError(f"dtype= is torch.float32 or torch.float64, got {dtype}")
    for name, value in (("queries", queries), ("shard", shard)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}= is a number of at least 1, got {value!r}")
    kind = _DTYPES[dtype]
    row = queries * kind.itemsize
    with _full_disk_told(Path(folder), 4096):
        begun = _begun(Path(folder), queries, kind.name, dict(identity))
    if begun.complete:
        return begun

    def space(start: int, stop: int) -> int:
        """Bytes that are needed from an example on, or up to another where no end is known."""
        stop = stop if examples is None else max(examples, stop)
        return (stop - start) * row + (1 + (stop - start) // shard) * _HEADER

    if examples is not None:
        _require_space(begun.folder, space(begun.shape[0], examples))
    pieces = source(begun.shards[-1].place if begun.shards else None)

    def stored(state: _State, place: Mapping[str, Any], *, complete: bool) -> _State:
        start = state.matrix.shape[0]
        with _full_disk_told(begun.folder, space(start, start + sum(map(len, state.rows)))):
            matrix = replace(state.matrix, complete=complete)
            return _State(_with_shard(matrix, state.rows, place), ())

    def step(state: _State) -> _State:
        piece = next(pieces, None)
        if piece is None:
            return stored(state, {}, complete=True)
        _check_piece(piece, queries, state.matrix.shape[0])
        rows = (*state.rows, piece.rows.detach().to("cpu", dtype))
        state = _State(state.matrix, rows)
        if sum(map(len, rows)) < shard:
            return state
        return stored(state, piece.place, complete=False)

    last = run(
        lambda: _State(begun, ()),
        step,
        state_type=_State,
        done=lambda state: state.matrix.complete,
        report=lambda state: (state.matrix.shape[0] + sum(map(len, state.rows)), examples, ""),
        title="scores",
        progress=progress,
    )
    return last.matrix


def _begun(folder: Path, queries: int, dtype: str, identity: dict[str, Any]) -> ScoreMatrix:
    """What a folder holds of these scores: whole shards, up to the first that is not."""
    folder.mkdir(exist_ok=True)
    identity = json.loads(json.dumps(identity))  # as it will be read
    if not (folder / MANIFEST).exists():
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if others:
            raise ValueError(
                f"the folder {str(folder)!r} holds something else ({sorted(others)[0]!r}); pass a "
                "new one"
            )
        return ScoreMatrix(folder, queries, dtype, identity, (), False)._written()
    found = ScoreMatrix.open(folder)
    old = {"number of queries": found.queries, "dtype": found.dtype, **found.identity}
    new = {"number of queries": queries, "dtype": dtype, **identity}
    changes = [
        f"{name} was {old.get(name)!r} and is now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if changes:
        raise ValueError(
            f"the folder {str(folder)!r} holds other scores: {'; '.join(changes)}. Pass another "
            "folder, or delete it if it is not needed"
        )
    for path in (folder / MANIFEST, *(folder / own.file for own in found.shards)):
        remove_leftovers(path)
    whole = [found._whole(own) for own in found.shards]
    if all(whole):
        return found
    kept = found.shards[: whole.index(False)]
    return replace(found, shards=kept, complete=False)._written()


def _with_shard(
    matrix: ScoreMatrix, rows: Sequence[Tensor], place: Mapping[str, Any]
) -> ScoreMatrix:
    """A matrix with one shard more, which is written first, then listed."""
    if not rows:
        return matrix._written()
    start = matrix.shape[0]
    stop = start + sum(map(len, rows))
    path = matrix.folder / f"scores-{len(matrix.shards):08d}.npy"
    remove_leftovers(path)
    array = torch.cat(list(rows)).numpy()
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    own = Shard(path.name, start, stop, path.stat().st_size, dict(place))
    return replace(matrix, shards=(*matrix.shards, own))._written()


def _check_piece(piece: Piece, queries: int, start: int) -> None:
    if piece.rows.ndim != 2 or piece.rows.shape[1] != queries:
        raise ValueError(f"expected scores [n, {queries}], got {list(piece.rows.shape)}")
    if not bool(torch.isfinite(piece.rows).all()):
        raise FloatingPointError(
            f"scores after example {start} are not finite: directions or gradients overflow"
        )


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, _no_space(folder, needed, free))


@contextlib.contextmanager
def _full_disk_told(folder: Path, needed: int) -> Iterator[None]:
    """Says how much space is needed when a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
        raise OSError(errno.ENOSPC, _no_space(folder, needed, free)) from error


def _no_space(folder: Path, needed: int, free: int) -> str:
    return (
        f"scores need {needed} bytes more in {str(folder)!r}, but {free} are free. What is there "
        "stays valid: make room, and the same call goes on"
    )
