"""``torchrun -m curvlib.cli``: the numbers of one process, files and words of the first rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.problems import error
from tests.ranks import ROOT

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


def launched(folder: Path, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "mine.py").write_text(TARGET)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, "-m", "curvlib.cli"] if ranks > 1 else ["-m", "curvlib.cli"]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )


def test_a_spectrum_on_two_processes_is_that_of_one(tmp_path: Path) -> None:
    settings = ("--k", "3", "--steps", "8", "--seed", "1")
    one = launched(tmp_path, 1, "spectrum", "mine.py:risk", "--out", "one", *settings)
    assert one.returncode == 0, one.stderr
    two = launched(tmp_path, 2, "spectrum", "mine.py:risk", "--out", "two", *settings)
    assert two.returncode == 0, two.stderr
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    assert two.stdout.count("wrote two/spectrum.json") == 1
    assert two.stdout.count("mine.py:risk: Risk(") == 1
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
    own = launched(tmp_path, 2, "trace", "mine.py:own_shards", "--out", "own", "--products", "26")
    assert own.returncode == 0, own.stderr
    whole = launched(tmp_path, 1, "trace", "mine.py:risk", "--out", "whole", "--products", "26")
    assert whole.returncode == 0, whole.stderr
    totals = [json.loads((tmp_path / f / "trace.json").read_text()) for f in ("own", "whole")]
    assert totals[0]["examples"] == totals[1]["examples"] == 21
    assert abs(totals[0]["trace"] / totals[1]["trace"] - 1.0) < 1e-9
    bad = launched(tmp_path, 2, "trace", "mine.py:missing")
    assert bad.returncode != 0
    assert "(rank 0)" in bad.stderr
    assert "no_such_module" in bad.stderr
