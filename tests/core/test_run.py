"""The resumable loop: what is saved when, and that nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlib.core import run as run_module
from curvlib.core.files import read_record, write_record
from curvlib.core.run import run
from tests.programs import Program

TOTAL = 6


@dataclass(frozen=True)
class Walk:
    """A random walk: each step depends on the generator's state."""

    count: int
    position: Tensor
    generator: Tensor


def _init() -> Walk:
    return Walk(0, torch.zeros(3), torch.Generator().manual_seed(1).get_state())


def _step(state: Walk) -> Walk:
    generator = torch.Generator()
    generator.set_state(state.generator)
    move = torch.randn(3, generator=generator)
    return Walk(state.count + 1, state.position + move, generator.get_state())


def _walk(
    checkpoint: Path | None = None,
    step: Callable[[Walk], Walk] = _step,
    total: int = TOTAL,
    init: Callable[[], Walk] = _init,
    **changes: Any,
) -> Walk:
    options: dict[str, Any] = {
        "state_type": Walk,
        "done": lambda s: s.count >= total,
        "report": lambda s: (s.count, total, f"at {s.count}"),
        "title": "walk",
        "checkpoint": checkpoint,
        "problem": lambda: "problem A",
        "settings": {"seed": 1, "length": 3},
        "save_every": 0.0,
        "progress": False,
    }
    return run(init, step, **(options | changes))


def _saved(path: Path) -> int:
    return read_record(path)[1]["state"]["count"]


# ---------------------------------------------------------------------- resuming
def test_what_a_failed_run_left_in_part_is_removed(tmp_path: Path) -> None:
    """Of processes that save alone: see :mod:`curvlib.core.ranks.spread_files`."""
    for content in ({"rows": {"files": ["c.1-0of2", "c.1-1of2"]}}, {}):
        write_record(tmp_path / "c.stopped", "checkpoint", content)
        (tmp_path / "c.1-0of2").touch()
        assert _walk(tmp_path / "c").count == TOTAL
        assert not (tmp_path / "c.stopped").exists()
    (tmp_path / "c.stopped").write_bytes(b"torn")
    _walk(tmp_path / "c")
    assert not (tmp_path / "c.stopped").exists()


@pytest.mark.parametrize("stop", range(1, TOTAL + 1))
def test_an_error_loses_nothing_and_the_run_continues_bitwise(tmp_path: Path, stop: int) -> None:
    path = tmp_path / "c"

    def failing(state: Walk) -> Walk:
        if state.count + 1 == stop:
            raise FloatingPointError("product is not finite")
        return _step(state)

    # save_every is long: it is the error that saves.
    with pytest.raises(FloatingPointError, match="product is not finite"):
        _walk(path, failing, save_every=1e9)
    if stop > 1:
        assert _saved(path) == stop - 1
    calls: list[int] = []

    def counted(state: Walk) -> Walk:
        calls.append(state.count)
        return _step(state)

    resumed, straight = _walk(path, counted), _walk()
    assert calls == list(range(stop - 1, TOTAL))
    assert torch.equal(resumed.position, straight.position)
    assert torch.equal(resumed.generator, straight.generator)


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    first = _walk(tmp_path / "c")

    def never(*_: object) -> Walk:
        raise AssertionError("the run is finished")

    again = _walk(tmp_path / "c", never, init=never)
    assert torch.equal(first.position, again.position)
    longer = _walk(tmp_path / "c", total=TOTAL + 2)  # the total is no setting: it may grow
    assert longer.count == TOTAL + 2


def test_saves_are_spaced_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    real = run_module.write_record
    clock = [0.0]

    def write(path: Any, kind: str, content: dict[str, Any]) -> None:
        written.append(content["state"]["count"])
        clock[0] += 1.0  # a save takes a second
        real(path, kind, content)

    def step(state: Walk) -> Walk:
        clock[0] += 10.0
        return _step(state)

    monkeypatch.setattr(run_module, "write_record", write)
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clock[0])
    _walk(tmp_path / "a", step, total=12, save_every=25.0)
    # After 30 s; then not before 1 s / 3 % = 33 s have passed: 40 s; and at the end.
    assert written == [3, 7, 11, 12]
    written.clear()
    _walk(tmp_path / "b", step, total=4, save_every=0.0)
    assert written == [1, 2, 3, 4]


def test_kill_9_at_any_moment_resumes_bitwise(tmp_path: Path) -> None:
    script = tmp_path / "walk.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from test_run import _walk, _step\n"
        "def step(state):\n"
        "    time.sleep(0.003)\n"
        "    print(state.count, flush=True)\n"
        "    return _step(state)\n"
        "_walk(Path(sys.argv[1]), step, total=10**6)\n"
    )
    path = tmp_path / "c"
    starts = []
    for _ in range(3):
        program = Program(script, path)
        starts.append(int(program.stdout.readline()))
        for _ in range(10):
            program.stdout.readline()
        program.stop(signal.SIGKILL)
    assert starts[0] == 0 < starts[1] < starts[2], "each start continues the one before"
    total = _saved(path) + 10
    assert torch.equal(_walk(path, total=total).position, _walk(total=total).position)
    assert list(tmp_path.glob(".c*.tmp")) == []


# -------------------------------------------------------------------- interrupts
def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def step(state: Walk) -> Walk:
        if state.count == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return _step(state)

    path = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt, match=r"stopped; the same call with checkpoint='.*c'"):
        _walk(path, step, save_every=1e9)
    assert _saved(path) == 3
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.equal(_walk(path).position, _walk().position)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def step(state: Walk) -> Walk:
        if state.count == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        return _step(state)

    path = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        _walk(path, step)
    assert _saved(path) == 2
    assert torch.equal(_walk(path).position, _walk().position)


def test_without_a_checkpoint_ctrl_c_is_as_ever() -> None:
    def step(state: Walk) -> Walk:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        return state

    with pytest.raises(KeyboardInterrupt):
        _walk(None, step)


def test_runs_in_threads_leave_signals_alone(tmp_path: Path) -> None:
    seen: list[object] = []
    before = signal.getsignal(signal.SIGINT)

    def step(state: Walk) -> Walk:
        seen.append(signal.getsignal(signal.SIGINT))
        return _step(state)

    thread = threading.Thread(target=lambda: _walk(tmp_path / "c", step))
    thread.start()
    thread.join()
    assert seen == [before] * TOTAL


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:

        def step(state: Walk) -> Walk:
            os.kill(os.getpid(), signal.SIGINT)
            return _step(state)

        assert _walk(tmp_path / "c", step).count == TOTAL
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------ errors
def test_checkpoints_of_something_else_are_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "c"
    _walk(path, total=2)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"is of another problem: the operator .* pass another"):
        _walk(path, problem=lambda: "problem B")
    with pytest.raises(
        ValueError, match=r"other settings: length was 3 and is now 4; seed was 1 an"
    ):
        _walk(path, settings={"seed": 2, "length": 4})
    with pytest.raises(ValueError, match=r"of another estimate \(walk, this one is run\)"):
        _walk(path, title="run")

    @dataclass(frozen=True)
    class Shorter:
        count: int

    with pytest.raises(ValueError, match="was written by another version of curvlib"):
        _walk(path, state_type=Shorter)
    assert path.read_bytes() == before


def test_files_that_are_no_checkpoints_are_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "c"
    run_module.write_record(path, "Density", {"x": 1})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"holds a Density, no checkpoint; pass another path"):
        _walk(path)
    assert path.read_bytes() == before
    path.write_text("my notes")
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        _walk(path)
    assert path.read_text() == "my notes"


def test_an_unwritable_folder_is_known_before_work_starts(tmp_path: Path) -> None:
    def never(*_: object) -> Walk:
        raise AssertionError("work has started")

    with pytest.raises(FileNotFoundError, match="there is no folder"):
        _walk(tmp_path / "missing" / "c", never, init=never)
    with pytest.raises(IsADirectoryError, match="expected the path of a file"):
        _walk(tmp_path, never, init=never)
    with pytest.raises(ValueError, match="save_every= is a number of seconds, at least 0, got -1"):
        _walk(tmp_path / "c", never, init=never, save_every=-1.0)


def test_a_save_that_fails_warns_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = run_module.write_record, []

    def write(*args: Any) -> None:
        calls.append(1)
        if len(calls) < TOTAL:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(run_module, "write_record", write)
    with pytest.warns(RuntimeWarning, match=r"could not save the checkpoint .*No space left"):
        result = _walk(tmp_path / "c")
    assert torch.equal(result.position, _walk().position)
    assert _saved(tmp_path / "c") == TOTAL


# ---------------------------------------------------------------------- progress
def test_progress_is_told_to_a_function() -> None:
    seen: list[tuple[float, float | None, str]] = []
    _walk(progress=lambda *report: seen.append(report), total=3)
    assert seen == [(1, 3, "at 1"), (2, 3, "at 2"), (3, 3, "at 3")]


def test_the_bar_shows_what_is_done_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    _walk(progress=True, total=3)
    shown = capsys.readouterr().err
    assert "walk: 100%" in shown
    assert "3/3" in shown
    assert "00:00<00:00" in shown
    assert "at 3" in shown


def test_the_bar_copes_with_a_total_that_comes_and_changes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def report(state: Walk) -> tuple[float, float | None, str]:
        return state.count, None if state.count < 2 else 10.0 / state.count, ""

    _walk(progress=True, total=5, report=report)
    assert "walk" in capsys.readouterr().err


def test_no_bar_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    _walk(progress=None)
    _walk(progress=False)
    assert capsys.readouterr().err == ""
    with pytest.raises(
        TypeError, match=r"progress= is True, False, None or a function of .*got str"
    ):
        _walk(progress="yes")


def test_states_may_be_replaced_in_part() -> None:
    done = _walk(step=lambda s: replace(s, count=s.count + 1))
    assert torch.equal(done.position, torch.zeros(3))


@pytest.mark.gpu
def test_tensors_return_to_the_device(tmp_path: Path) -> None:
    def init() -> Walk:
        return replace(_init(), position=torch.zeros(3, device="cuda"))

    def step(state: Walk) -> Walk:
        return replace(state, count=state.count + 1, position=state.position + 1)

    _walk(tmp_path / "c", step, init=init, total=2, device="cuda")
    again = _walk(tmp_path / "c", step, init=init, total=3, device="cuda")
    assert again.position.device.type == "cuda"
    assert again.generator.device.type == "cpu"
