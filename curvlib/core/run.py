r"""The one loop of long estimates: ``init``, ``step``, ``step``, ... over a frozen state.

The state is a frozen dataclass of tensors, numbers and strings, which holds everything that the
next step depends on, the random generator's state included. So a run that was stopped at any
moment, by Ctrl-C, an error or ``kill -9``, ends bitwise the same when it is started again with
the same ``checkpoint=``.

A step may write into tensors of its state in place, as long as what a step overwrites before
its last product is nothing that the old state needs: an interrupted step is then done again.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from curvlib.core.exhausted import run_names_what_fits
from curvlib.core.files import (
    read_record,
    remove_leftovers,
    require_writable,
    shared_record,
    write_record,
)
from curvlib.core.ranks import spread_files
from curvlib.core.ranks.file_parts import StateParts
from curvlib.core.ranks.group import Group, together
from curvlib.core.ranks.spread import Spread

S = TypeVar("S")


#: ``True`` and ``False`` force and forbid the bar; ``None`` shows it on terminals; a function
#: is called with what is done, the (estimated) total or ``None``, and a note.
Progress = bool | Callable[[float, float | None, str], None] | None
#: What is done, the (estimated) total or ``None``, and a note such as a residual.
Report = tuple[float, float | None, str]

SAVE_SHARE = 0.03  # saves take at most this share of the time between them


@run_names_what_fits
def run(
    init: Callable[[], S],
    step: Callable[[S], S],
    *,
    state_type: type[S],
    done: Callable[[S], bool],
    report: Callable[[S], Report],
    title: str,
    checkpoint: str | os.PathLike[str] | None = None,
    problem: Callable[[], str] = str,
    settings: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    save_every: float = 30.0,
    progress: Progress = None,
    group: Group | None = None,
    spread: Spread | None = None,
    parts: StateParts | None = None,
) -> S:
    """Steps from ``init()``, or from a checkpoint, until ``done``.

    With a checkpoint, the state is saved every ``save_every`` seconds (more rarely where a save
    takes long: saves take at most 3 % of the time), when a step raises, on Ctrl-C, and at the
    end, so that the same call returns at once when it is made again. Ctrl-C waits for the step
    in progress; a second Ctrl-C does not.

    Args:
        init: Makes the first state; not called when there is a checkpoint to continue.
        step: Maps a state to the next one.
        state_type: The class of the state, a frozen dataclass.
        done: Whether a state is the last one.
        report: What is done, out of how much, and a note: what the bar shows.
        title: What the bar calls the run, and the kind of its checkpoints.
        checkpoint: Path of the file to continue from, if it exists, and to save to.
        problem: Returns a digest of the problem; called with a checkpoint only.
        settings: What else the result depends on: a checkpoint of other settings is refused.
        device: Where the state's tensors live that are not on the CPU.
        save_every: Seconds between saves; 0 saves after every step.
        progress: Whether to show a bar, or a function to call instead: see :data:`Progress`.
        group: The processes that make the same steps together, all with the same state. The first
            one shows progress, reads and writes; a Ctrl-C on one stops all after the same step.
        spread: How vectors of the state lie over processes, where they are not whole. Each
            process then saves its own: see :mod:`curvlib.core.ranks.spread_files`. What a step that
            raises leaves is of use where it has raised on all of them.
        parts: What else ranks hold parts of. One file has it whole, gathered while it is written,
            by all ranks together: not where a step raises.

    Returns:
        The last state.

    Raises:
        ValueError: If the checkpoint belongs to another problem or to other settings, or is
            damaged. It is left as it is.
        OSError: If the checkpoint's folder cannot be written to; known before the first step.
        MemoryError: If memory is out, where it is not PyTorch's own error; either names what takes
            less (:mod:`curvlib.core.exhausted`).
        KeyboardInterrupt: On Ctrl-C, after the state has been saved.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Count:
        ...     value: int
        >>> run(
        ...     lambda: Count(0),
        ...     lambda s: Count(s.value + 1),
        ...     state_type=Count,
        ...     done=lambda s: s.value == 3,
        ...     report=lambda s: (s.value, 3, ""),
        ...     title="count",
        ... )
        Count(value=3)
    """
    saver = None
    state = None
    if checkpoint is not None:
        identity = {"kind": title, "problem": problem(), "settings": dict(settings or {})}
        with together(group, "opening its checkpoint"):
            saver = _Saver(Path(checkpoint), identity, save_every, _is_first(group), spread, parts)
        saver.agree()
        state = saver.load(state_type, device, group)
    if state is None:
        state = init()
    if not _is_first(group):
        progress = False
    with _Bar(title, progress, report(state)) as bar, _Interrupts(saver is not None) as interrupts:
        while not done(state):
            try:
                state = step(state)
            except Exception:
                if saver is not None:
                    saver.save(state, together=False)
                raise
            bar.update(report(state))
            if saver is not None:
                saver.changed = True
                saver.steps += 1
                stopped, due = interrupts.count, saver.due()
                if group is not None:
                    agreed = group.most([float(stopped), float(due)])
                    stopped, due = int(agreed[0]), bool(agreed[1])
                if stopped or due:
                    saver.save(state)
                if stopped:
                    raise KeyboardInterrupt(
                        f"stopped; the same call with checkpoint={str(saver.path)!r} continues "
                        "from the last save"
                    )
        if saver is not None:
            saver.save(state)
    return state


def _is_first(group: Group | None) -> bool:
    return group is None or group.first


class _Saver:
    """Where, when and under what identity a run's state is saved."""

    def __init__(
        self,
        path: Path,
        identity: dict[str, Any],
        every: float,
        writes: bool,
        spread: Spread | None,
        parts: StateParts | None,
    ) -> None:
        if not every >= 0:
            raise ValueError(f"save_every= is a number of seconds, at least 0, got {every}")
        if writes:
            require_writable(path)
            remove_leftovers(path)
            spread_files.promote(path)
        self.path = path
        self.identity = identity
        self.every = every
        self.writes = writes
        self.spread = spread
        self.parts = parts
        self.changed = False
        self._last = time.monotonic()
        self._cost = 0.0
        self.steps = 0
        self._tag = ""

    def agree(self) -> None:
        """Has processes agree on names of files that each may have to write alone."""
        if self.spread is not None:
            self._tag = self.spread.group.texts(spread_files.new_tag())[0]

    def load(
        self, state_type: type[S], device: torch.device | str, group: Group | None
    ) -> S | None:
        found = None
        if self.parts is not None:
            if self.parts.group.most([float(self.path.exists())])[0]:
                with self.parts.group.together("reading its checkpoint"):
                    found = read_record(self.path, device, stored=True)
        elif group is None:
            found = read_record(self.path, device) if self.path.exists() else None
        else:
            found = shared_record(self.path, device, group)
        if found is None:
            return None
        kind, content = found
        where = f"the checkpoint {str(self.path)!r}"
        way_out = "pass another path, or delete the file if it is not needed"
        if kind != "checkpoint":
            raise ValueError(f"{str(self.path)!r} holds a {kind}, no checkpoint; {way_out}")
        saved = content["identity"]
        if saved["kind"] != self.identity["kind"]:
            raise ValueError(
                f"{where} is of another estimate ({saved['kind']}, this one is "
                f"{self.identity['kind']}); {way_out}"
            )
        if saved["problem"] != self.identity["problem"]:
            raise ValueError(
                f"{where} is of another problem: the operator (model, loss, data or parameters) "
                f"has changed since it was written; {way_out}"
            )
        old, new = saved["settings"], self.identity["settings"]
        changes = [
            f"{name} was {old.get(name)!r} and is now {new.get(name)!r}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
        if changes:
            raise ValueError(
                f"{where} was made with other settings: {'; '.join(changes)}. "
                f"Use the old settings, or {way_out}"
            )
        expected = {field.name for field in dataclasses.fields(state_type)}  # type: ignore[arg-type]
        if content["state"].keys() != expected:
            raise ValueError(
                f"{where} was written by another version of curvlib; finish it there, or {way_out}"
            )
        return state_type(**self._rows(content, state_type, device))

    def _rows(
        self, content: dict[str, Any], state_type: type[S], device: torch.device | str
    ) -> dict[str, Any]:
        """The fields of a saved state, with the rows of vectors that this process needs."""
        state: dict[str, Any] = content["state"]
        if self.parts is not None:
            return self.parts.given(state)
        if "rows" in content:
            found = spread_files.read_rows(self.path, content["rows"], self.spread, device)
            return spread_files.put_together(state, found)
        if self.spread is None:
            return state
        small, rows = spread_files.taken_apart(state_type(**state))
        own = {name: spread_files.scattered(t, self.spread) for name, t in rows.items()}
        return spread_files.put_together(small, own)

    def due(self) -> bool:
        waited = time.monotonic() - self._last
        return self.every == 0 or waited >= max(self.every, self._cost / SAVE_SHARE)

    def save(self, state: Any, *, together: bool = True) -> None:
        """Saves a state, for which all processes call this, unless not all may come here."""
        alone = self.spread is None and self.parts is None
        if not self.changed or (alone and not self.writes):
            return
        if self.parts is not None and not together:
            return
        start = time.monotonic()
        try:
            if self.parts is not None:
                self._save_parts(state, self.parts)
            elif self.spread is None:
                content = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
                self._write({"state": content})
            elif together:
                self._save_spread(state, self.spread)
            else:
                self._save_own(state, self.spread)
            self.changed = False
        except OSError as error:
            self._warn(error)
        self._last = time.monotonic()
        self._cost = self._last - start

    def _save_parts(self, state: Any, parts: StateParts) -> None:
        content = {"identity": self.identity, "state": parts.taken(state)}
        try:
            write_record(self.path, "checkpoint", content, parts.group)
        except RuntimeError as error:  # the first process could not write
            raise OSError(str(error)) from error

    def _save_spread(self, state: Any, spread: Spread) -> None:
        small, rows = spread_files.taken_apart(state)
        try:
            layout = spread_files.write_rows(self.path, rows, spread)
            with spread.group.together("saving its checkpoint"):
                if self.writes:
                    self._write({"state": small, "rows": layout})
                    spread_files.remove_others(self.path, layout["files"])
        except RuntimeError as error:  # another process could not write
            raise OSError(str(error)) from error

    def _save_own(self, state: Any, spread: Spread) -> None:
        small, rows = spread_files.taken_apart(state)
        tag = f"{self._tag}{self.steps:x}"  # processes at other steps have files of other names
        layout = spread_files.write_own(self.path, rows, spread, tag)
        if self.writes:
            self._write({"state": small, "rows": layout}, spread_files.stopped(self.path))

    def _write(self, content: dict[str, Any], path: Path | None = None) -> None:
        write_record(path or self.path, "checkpoint", {"identity": self.identity, **content})

    def _warn(self, error: Exception) -> None:
        warnings.warn(
            f"could not save the checkpoint {str(self.path)!r}: {error}. The run goes on, "
            "and tries again later",
            RuntimeWarning,
            stacklevel=4,
        )


class _Interrupts:
    """Counts Ctrl-C instead of raising at the first one, while the block runs."""

    def __init__(self, active: bool) -> None:
        self.active = active and threading.current_thread() is threading.main_thread()
        self.count = 0
        self._previous: Any = None

    def __enter__(self) -> _Interrupts:
        if self.active:
            self._previous = signal.getsignal(signal.SIGINT)
            # Handlers that were not installed from Python, or ignore the signal, are left alone.
            self.active = callable(self._previous)
        if self.active:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            self._previous(number, frame)


class _Bar:
    """A progress bar, a function that is told of progress, or nothing."""

    def __init__(self, title: str, progress: Progress, first: Report) -> None:
        if not (progress is None or isinstance(progress, bool) or callable(progress)):
            raise TypeError(
                "progress= is True, False, None or a function of (done, total, note), "
                f"got {type(progress).__name__}"
            )
        self._call = progress if callable(progress) else None
        self._bar: Any = None
        if self._call is None and progress is not False:
            from tqdm import tqdm

            done, total, note = first
            self._bar = tqdm(
                desc=title,
                initial=done,
                total=total,
                postfix=note or None,
                disable=None if progress is None else False,
                dynamic_ncols=True,
            )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, report: Report) -> None:
        done, total, note = report
        if self._call is not None:
            self._call(done, total, note)
        elif self._bar is not None:
            self._bar.total = total
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
