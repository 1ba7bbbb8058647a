"""Runs of several processes: passes of each over its own data, joined at their ends.

After each pass all ranks have the same state, which the first one writes to the checkpoint that was
named: any number of ranks goes on from it, one included. Within a pass each rank has a state of its
own, in a file beside the checkpoint, from which the same number of ranks goes on. Ranks that have
to go through their data in step (sharded parameters) do an unfinished pass again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from curvlib.core.ranks.file_parts import StateParts
from curvlib.core.ranks.group import Group
from curvlib.core.ranks.watch import telling, watching
from curvlib.core.run import Progress, Report, run

S = TypeVar("S")


@dataclass(frozen=True)
class RankPass(Generic[S]):
    """A rank's own part of a pass.

    Attributes:
        what: What it is, for the message of the other ranks if it fails.
        begun: From the state before the pass, that of the rank's own part.
        step: Maps a state of the part to the next one.
        passed: Whether a state is at the end of the part.
        joined: From the state before and the rank's own at its end, that after the pass, which is
            the same on all ranks.
        report: What is done of the part.
        settings: What else the part depends on, beside what the run does.
        stepped: Whether ranks go through their parts in step: a failure is then told at once.
    """

    what: str
    begun: Callable[[S], S]
    step: Callable[[S], S]
    passed: Callable[[S], bool]
    joined: Callable[[S, S], S]
    report: Callable[[S], Report]
    settings: Callable[[S], Mapping[str, Any]]
    stepped: bool = False


def run_passes(
    group: Group,
    init: Callable[[], S],
    one: RankPass[S],
    *,
    state_type: type[S],
    done: Callable[[S], bool],
    title: str,
    checkpoint: str | os.PathLike[str] | None,
    problem: Callable[[], str],
    settings: Mapping[str, Any],
    device: torch.device | str = "cpu",
    save_every: float,
    progress: Progress,
    parts: StateParts | None = None,
) -> S:
    """Passes from ``init()``, or from a checkpoint, until ``done``: see :func:`.run`.

    Args:
        group: The ranks.
        init: Makes the first state.
        one: A rank's part of a pass.
        state_type: See :func:`.run`, as are
        done: this,
        title: this,
        checkpoint: this,
        problem: this, which all ranks call together,
        settings: this,
        device: this,
        save_every: this,
        progress: this, of the first rank's part, and
        parts: this.

    Raises:
        RuntimeError: If another rank fails.
    """
    same, beside = "", None
    if checkpoint is not None:
        same, path = problem(), Path(checkpoint)
        beside = path.with_name(f"{path.name}.rank{group.rank}of{group.size}")

    def told(state: S) -> S:
        with telling(group):
            return one.step(state)

    def one_pass(state: S) -> S:
        stepped = one.stepped
        with watching(group, torch.device(device)) if stepped else group.together(one.what):
            own = run(
                lambda: one.begun(state),
                told if stepped else one.step,
                state_type=state_type,
                done=one.passed,
                report=one.report,
                title=title,
                checkpoint=None if stepped else beside,
                problem=lambda: same,
                settings={**settings, **one.settings(state)},
                device=device,
                save_every=save_every,
                progress=progress if group.first else False,
            )
        out = one.joined(state, own)
        group.wait()
        if beside is not None:
            beside.unlink(missing_ok=True)
        return out

    return run(
        init,
        one_pass,
        state_type=state_type,
        done=done,
        report=lambda _: (0.0, None, ""),
        title=title,
        checkpoint=checkpoint,
        problem=lambda: same,
        settings=settings,
        device=device,
        save_every=0.0,
        progress=False,
        group=group,
        parts=parts,
    )
