"""A run that is stopped at any moment goes on where it was, and ends with the same numbers."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.programs import Program

ROOT = Path(__file__).parents[2]
TARGET = """
import os, time
import torch
import curvlib as cl

class Slow(torch.nn.Linear):
    def forward(self, x):
        time.sleep(float(os.environ["NAP"]))
        return super().forward(x).tanh()

def risk():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(30, 20, generator=draw) * torch.logspace(0, -2, 20)
    y = torch.randn(30, 3, generator=draw)
    batches = list(zip(x.split(10), y.split(10)))
    return cl.Risk(Slow(20, 3), torch.nn.MSELoss(), cl_data(batches))

class cl_data:
    '''Read anew at every pass, so that products take their time.'''
    def __init__(self, batches):
        self.batches = batches
    def __iter__(self):
        return iter(self.batches)
    def __len__(self):
        return len(self.batches)

def other():
    risk_ = risk()
    return cl.Risk(risk_.model, torch.nn.L1Loss(), risk_.data)
"""
SETTINGS = ["--k", "4", "--steps", "20", "--probes", "2", "--no-check", "--save-every", "0.01"]
LIMIT = 120.0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    (folder / "mine.py").write_text(TARGET)
    return folder


def words(*arguments, target="mine.py:risk"):
    return ["-m", "curvlib", "spectrum", target, *SETTINGS, *arguments]


def start(place, *arguments, target="mine.py:risk", nap="0"):
    return Program(*words(*arguments, target=target), cwd=place, NAP=nap)


def interpreter(place, *arguments, nap, stderr):
    """As :func:`start`, in a process that began with Python itself."""
    return subprocess.Popen(
        [sys.executable, *words(*arguments)],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NAP": nap, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def measured(folder):
    """All numbers but those of the clock and the command."""
    found = json.loads((folder / "spectrum.json").read_text())
    arrays = [(folder / f"{n}.safetensors").read_bytes() for n in ("eigenpairs", "density")]
    return {k: v for k, v in found.items() if k not in ("seconds", "resumed", "command")}, arrays


@pytest.fixture(scope="module")
def undisturbed(place):
    process = interpreter(place, "--out", "undisturbed", nap="0", stderr=subprocess.PIPE)
    _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert error == ""  # no bar where there is no terminal
    return measured(place / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["eigenpairs", "density"])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_resumed(place, undisturbed, stage, stop):
    out = f"{stage}-{stop.name}"
    checkpoint = place / out / "checkpoints" / f"{stage}.safetensors"
    process = start(place, "--out", out, nap="0.02")
    process.until(checkpoint.exists)
    code, _, error = process.stop(stop)
    if stop == signal.SIGINT:
        assert code == 130
        assert "stopped: by Ctrl-C; go on with: curvlib spectrum mine.py:risk" in error
        assert error.rstrip().endswith("--resume")
        assert "Traceback" not in error
    else:
        assert code == -signal.SIGKILL
    assert not (place / out / "spectrum.json").exists()

    code, _, error = start(place, "--out", out, "--resume").finish()
    assert code == 0, error
    assert measured(place / out) == undisturbed
    assert json.loads((place / out / "spectrum.json").read_text())["resumed"]
    assert not (place / out / "checkpoints").exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_problem_is_refused_and_kept(place):
    checkpoint = place / "kept" / "checkpoints" / "eigenpairs.safetensors"
    process = start(place, "--out", "kept", nap="0.02")
    process.until(checkpoint.exists)
    process.stop(signal.SIGINT)
    before = checkpoint.read_bytes()
    for target, options, message in (
        ("mine.py:other", [], "is of another problem"),
        ("mine.py:risk", ["--seed", "3"], "is of another problem"),
        ("mine.py:risk", ["--k", "5"], "k was 4 and is now 5"),
    ):
        again = start(place, "--out", "kept", "--resume", *options, target=target)
        code, _, error = again.finish()
        assert code == 2
        assert len(error.splitlines()) == 1
        assert message in error
    assert checkpoint.read_bytes() == before


def test_resume_without_anything_to_resume_is_a_fresh_run(place, undisturbed):
    code, _, error = start(place, "--out", "fresh", "--resume").finish()
    assert code == 0, error
    assert measured(place / "fresh") == undisturbed
    assert not json.loads((place / "fresh" / "spectrum.json").read_text())["resumed"]


def test_a_terminal_sees_progress_with_the_time_left(place):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = interpreter(place, "--out", "terminal", nap="0.01", stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # what Linux says when the other side has closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    for bar in ("eigenpairs of Hessian", "density of Hessian"):
        assert re.search(rf"{bar}: +\d+%.*\[\d\d:\d\d<\d\d:\d\d", shown.decode())
