"""``torchrun -m curvlib.cli``: the numbers of one process, files and words of the first rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.problems import error
from tests.programs import ROOT, Ended, Program

TARGET = """
import torch
import curvlib as cl

def risk():
    g = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x = torch.randn(21, 3, generator=g)
    return cl.Risk(model.double(), torch.nn.CrossEntropyLoss(), (x.double(), (x[:, 0] > 0).long()))

def own_shards():
    whole = risk()
    return whole.on(cl.shard(whole.data))

def missing():
    import no_such_module
"""

#: The command, and which threads the process has then.
THEN = """
import pathlib, sys
from curvlib.cli import main

code = main(sys.argv[1:])
print("threads:", *(p.read_text().strip() for p in pathlib.Path("/proc/self/task").glob("*/comm")))
sys.exit(code)
"""


def torchrun(folder: Path, *arguments: str) -> Ended:
    """What two processes of the launcher say together."""
    (folder / "mine.py").write_text(TARGET)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "curvlib.cli", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def launched(folder: Path, size: int, *arguments: str) -> list[Ended]:
    """What each of so many processes says, started as a launcher would, and its threads."""
    (folder / "mine.py").write_text(TARGET)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = ["-c", THEN, *arguments]
    programs = [
        Program(*words, cwd=folder, RANK=str(i), LOCAL_RANK=str(i), MPLBACKEND="Agg", **told)
        for i in range(size)
    ]
    return [program.finish() for program in programs]


def test_a_spectrum_on_two_processes_is_that_of_one(tmp_path: Path) -> None:
    settings = ("--k", "3", "--steps", "8", "--seed", "1")
    (one,) = launched(tmp_path, 1, "spectrum", "mine.py:risk", "--out", "one", *settings)
    assert one.code == 0, one.error
    two = torchrun(tmp_path, "spectrum", "mine.py:risk", "--out", "two", *settings)
    assert two.code == 0, two.error
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    assert two.output.count("wrote two/spectrum.json") == 1
    assert two.output.count("mine.py:risk: Risk(") == 1
    known = json.loads((tmp_path / "one" / "spectrum.json").read_text())
    found = json.loads((tmp_path / "two" / "spectrum.json").read_text())
    assert found["examples"] == known["examples"] == 21
    for name in (n for n in names if n.endswith(".safetensors")):
        old, new = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        assert old.keys() == new.keys()
        for key in ("values", "nodes", "weights"):
            if key in old:
                assert error(new[key], old[key]) < 1e-9, (name, key)


@pytest.mark.slow
def test_shards_of_the_target_stay_and_errors_name_their_rank(tmp_path: Path) -> None:
    for size, target, out in ((2, "mine.py:own_shards", "own"), (1, "mine.py:risk", "whole")):
        for ended in launched(tmp_path, size, "trace", target, "--out", out, "--products", "26"):
            assert ended.code == 0, ended.error
            if Path("/proc/self/task").exists():  # a thread that is left may abort at the very end
                assert "gloo" not in ended.output.partition("threads:")[2]
    totals = [json.loads((tmp_path / f / "trace.json").read_text()) for f in ("own", "whole")]
    assert totals[0]["examples"] == totals[1]["examples"] == 21
    assert abs(totals[0]["trace"] / totals[1]["trace"] - 1.0) < 1e-9
    for rank, ended in enumerate(launched(tmp_path, 2, "trace", "mine.py:missing")):
        assert ended.code != 0
        assert f"(rank {rank})" in ended.error
        assert "no_such_module" in ended.error
