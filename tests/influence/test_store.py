"""Matrices of scores on disk: mapped, resumed after kill -9 with the same bits, and full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from curvlib.influence import store
from curvlib.influence.store import Piece, ScoreMatrix, write_scores
from tests.programs import Program

IDENTITY = {"data": "abc", "damping": 0.1}
PIECES, ROWS, QUERIES = 9, 5, 3


def numbers(i):
    draw = torch.Generator().manual_seed(i)
    return torch.randn(ROWS, QUERIES, generator=draw)


def source(place):
    start = 0 if place is None else place["next"]
    for i in range(start, PIECES):
        yield Piece(numbers(i), {"next": i + 1})


EVERY = torch.cat([numbers(i) for i in range(PIECES)]).numpy()


def written(folder, of=source, **named):
    given = {"queries": QUERIES, "identity": IDENTITY, "shard": 10, "progress": False}
    return write_scores(folder, of, **{**given, **named})


def bits(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stopping(after, error):
    """The source, which fails after some pieces."""

    def of(place):
        for count, piece in enumerate(source(place)):
            if count == after:
                raise error
            yield piece

    return of


def test_the_matrix_is_what_came(tmp_path):
    matrix = written(tmp_path / "scores")
    assert matrix.shape == (45, 3)
    assert matrix.complete
    assert np.array_equal(matrix.rows(), EVERY)
    assert np.array_equal(matrix.column(1), EVERY[:, 1])
    for start, stop in ((0, 45), (3, 4), (9, 31), (20, 20), (-7, 99), (40, 12)):
        assert np.array_equal(matrix.rows(start, stop), EVERY[start:stop])
    assert [own.stop - own.start for own in matrix.shards] == [10, 10, 10, 10, 5]
    mapped = matrix.shard(0)
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable
    again = ScoreMatrix.open(tmp_path / "scores")
    assert np.array_equal(again.rows(), EVERY)
    assert again.identity == IDENTITY


def test_float64_keeps_every_bit(tmp_path):
    exact = torch.tensor([[1.0 + 2**-50]], dtype=torch.float64)
    named = {"queries": 1, "dtype": torch.float64}
    matrix = written(tmp_path / "scores", lambda place: iter([Piece(exact, {})]), **named)
    assert matrix.rows().dtype == np.float64
    assert matrix.rows()[0, 0] == 1.0 + 2**-50


def test_a_finished_matrix_is_returned_at_once(tmp_path):
    written(tmp_path / "scores")
    before = bits(tmp_path / "scores")

    def never(place):
        raise AssertionError

    assert written(tmp_path / "scores", never).complete
    assert bits(tmp_path / "scores") == before


def test_nothing_to_score_is_an_empty_matrix(tmp_path):
    matrix = written(tmp_path / "scores", lambda place: iter([]))
    assert matrix.complete
    assert matrix.rows().shape == (0, 3)


@pytest.mark.parametrize("after", range(PIECES))
def test_stopped_after_any_piece_it_goes_on_with_the_same_bits(tmp_path, after):
    folder = tmp_path / "scores"
    written(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        written(folder, stopping(after, KeyboardInterrupt()))
    half = ScoreMatrix.open(folder)
    assert not half.complete
    assert half.shape[0] == after // 2 * 10
    assert np.array_equal(half.rows(), EVERY[: half.shape[0]])
    places = []

    def of(place):
        places.append(place)
        return source(place)

    written(folder, of)
    assert places == [{"next": after // 2 * 2} if after >= 2 else None]
    assert bits(folder) == bits(tmp_path / "whole")


@pytest.mark.parametrize(
    ("at", "call"),
    # every second flush is that of a folder, which some systems refuse
    [("replace", n) for n in range(1, 12)] + [("fsync", n) for n in range(1, 22, 2)],
)
def test_an_error_between_any_two_files_loses_nothing(tmp_path, monkeypatch, at, call):
    """The manifest never lists what is not there, whichever file was last."""
    written(tmp_path / "whole")
    real, seen = getattr(os, at), [0]

    def failing(*given):
        seen[0] += 1
        if seen[0] == call:
            raise PermissionError(errno.EACCES, "denied")
        return real(*given)

    folder = tmp_path / "scores"
    with monkeypatch.context() as patched:
        patched.setattr(os, at, failing)
        with pytest.raises(PermissionError):
            written(folder)
    if (folder / "manifest.json").exists():
        half = ScoreMatrix.open(folder)
        assert not half.complete
        assert np.array_equal(half.rows(), EVERY[: half.shape[0]])
    written(folder)
    assert bits(folder) == bits(tmp_path / "whole")


PROGRAM = """
import sys, time, torch
from curvlib.influence.store import Piece, write_scores

def source(place):
    for i in range(0 if place is None else place["next"], 9):
        time.sleep(0.03)
        draw = torch.Generator().manual_seed(i)
        yield Piece(torch.randn(5, 3, generator=draw), {"next": i + 1})

write_scores(
    sys.argv[1], source, queries=3, identity={"data": "abc", "damping": 0.1}, shard=10,
    progress=False,
)
"""


def test_kill_9_at_any_moment_goes_on_with_the_same_bits(tmp_path):
    written(tmp_path / "whole")
    folder = tmp_path / "scores"
    shards = 0
    for wanted in (1, 3):
        program = Program("-c", PROGRAM, folder)
        program.until(lambda wanted=wanted: len(list(folder.glob("scores-*.npy"))) >= wanted)
        assert program.stop(signal.SIGKILL).code == -signal.SIGKILL
        half = ScoreMatrix.open(folder)
        assert len(half.shards) >= shards
        shards = len(half.shards)
        assert np.array_equal(half.rows(), EVERY[: half.shape[0]])
    (folder / f".manifest.json.{os.uname().nodename}-999999999.tmp").write_text("left behind")
    assert written(folder).complete
    assert bits(folder) == bits(tmp_path / "whole")


def test_a_shard_that_is_lost_is_written_again(tmp_path):
    folder = tmp_path / "scores"
    matrix = written(folder)
    before = bits(folder)
    (folder / matrix.shards[2].file).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"scores-00000002\.npy' is missing or damaged"):
        matrix.shard(2)
    assert np.array_equal(matrix.rows(0, 20), EVERY[:20])  # the others are read all the same
    assert np.array_equal(written(folder).rows(), EVERY)
    assert bits(folder) == before


class Disk:
    """A disk of a given size, as ``shutil.disk_usage`` and the writing of files see it."""

    def __init__(self, folder, size):
        self.folder, self.size = folder, size

    def used(self):
        return sum(path.stat().st_size for path in self.folder.glob("*.npy"))

    def usage(self, path):
        return shutil._ntuple_diskusage(self.size, self.used(), self.size - self.used())

    def save(self, file, array, **named):
        if self.used() + array.nbytes + 128 > self.size:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        return np.lib.format.write_array(file, array, allow_pickle=False)


def test_a_disk_that_is_too_small_is_told_before_the_scan(tmp_path, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", Disk(tmp_path, 400).usage)

    def never(place):
        raise AssertionError

    with pytest.raises(OSError, match=r"scores need \d+ bytes more .* but 400 are free") as told:
        written(tmp_path / "scores", never, examples=45)
    assert told.value.errno == errno.ENOSPC
    assert f"need {45 * 12 + 5 * 128} bytes" in str(told.value)


@pytest.mark.parametrize(
    ("examples", "needed"), [(None, 10 * 12 + 2 * 128), (45, 25 * 12 + 3 * 128)]
)
def test_a_disk_that_fills_up_corrupts_nothing(tmp_path, monkeypatch, examples, needed):
    folder = tmp_path / "scores"
    written(tmp_path / "whole")
    disk = Disk(folder, 700)  # two shards of 248 bytes
    with monkeypatch.context() as patched:
        patched.setattr(store.np, "save", disk.save)
        with pytest.raises(OSError, match="make room, and the same call goes on") as told:
            written(folder, examples=examples)
    assert told.value.errno == errno.ENOSPC
    assert f"need {needed} bytes more" in str(told.value)
    half = ScoreMatrix.open(folder)
    assert half.shape[0] == 20
    assert np.array_equal(half.rows(), EVERY[: half.shape[0]])
    assert sorted(bits(folder)) == ["manifest.json", *(own.file for own in half.shards)]
    assert written(folder).complete
    assert bits(folder) == bits(tmp_path / "whole")


def test_progress_knows_what_was_done_before(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "scores", stopping(5, KeyboardInterrupt()))
    told = []
    written(tmp_path / "scores", examples=45, progress=lambda *of: told.append(of))
    assert told == [(n, 45, "") for n in (25, 30, 35, 40, 45, 45)]


def test_other_scores_are_refused_and_left_alone(tmp_path):
    folder = tmp_path / "scores"
    written(folder)
    before = bits(folder)
    with pytest.raises(ValueError, match=r"damping was 0\.1 and is now 0\.2"):
        written(folder, identity={**IDENTITY, "damping": 0.2})
    with pytest.raises(ValueError, match="number of queries was 3 and is now 4"):
        written(folder, queries=4)
    with pytest.raises(ValueError, match="queries was None and is now 'other'"):
        written(folder, identity={**IDENTITY, "queries": "other"})
    with pytest.raises(ValueError, match="dtype was 'float32' and is now 'float64'"):
        written(folder, dtype=torch.float64)
    assert bits(folder) == before


def test_bad_input(tmp_path):
    with pytest.raises(TypeError, match=r"dtype= is torch\.float32 or torch\.float64"):
        written(tmp_path / "a", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="shard= is a number of at least 1, got 0"):
        written(tmp_path / "a", shard=0)
    with pytest.raises(ValueError, match=r"expected scores \[n, 4\], got \[5, 3\]"):
        written(tmp_path / "b", queries=4)
    with pytest.raises(FloatingPointError, match="scores after example 0 are not finite"):
        written(tmp_path / "c", lambda place: iter([Piece(torch.full((1, 3), torch.nan), {})]))
    with pytest.raises(FileNotFoundError, match="there is no matrix of scores"):
        ScoreMatrix.open(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        written(tmp_path)
    broken = tmp_path / "d"
    written(broken)
    (broken / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="damaged or not a manifest"):
        ScoreMatrix.open(broken)
    (broken / "manifest.json").write_text(json.dumps({"format": 99, "curvlib": "9.9"}))
    with pytest.raises(ValueError, match=r"format 99 \(curvlib 9\.9\)"):
        written(broken)
