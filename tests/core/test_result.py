"""Files and results: round trips, atomic writes, and what each error says."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from curvlib.core import files
from curvlib.core.files import atomic_write, read_record, remove_leftovers, write_record
from curvlib.core.result import TRANSIENT, Result, axes_or_new
from tests.programs import Program


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(Result):
    value: float
    stderr: float
    trace: float
    trace_stderr: float
    columns: Tensor
    flags: Tensor
    products: int
    name: str
    note: str | None
    settings: dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Other(Result):
    value: float


def _estimate() -> Estimate:
    columns = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).T
    settings = {"seed": 1, "pair": (1, [2.5, None]), "inner": {"t": torch.arange(3)}}
    return Estimate(
        value=0.1 + 0.2,
        stderr=math.nan,
        trace=-math.inf,
        trace_stderr=1e-300,
        columns=columns,
        flags=torch.tensor([True, False]),
        products=7,
        name="Hessian «H»",
        note=None,
        settings=settings,
    )


@dataclass(frozen=True, eq=False, repr=False)
class WithModel(Result):
    value: float
    model: torch.nn.Module | None = field(default=None, metadata=TRANSIENT)


# ------------------------------------------------------------------- round trips
def test_transient_fields_are_not_saved(tmp_path: Path) -> None:
    before = WithModel(2.0, torch.nn.Linear(1, 1))
    assert repr(before) == "WithModel(value=2)"
    after = WithModel.load(before.save(tmp_path / "m.safetensors"))
    assert (after.value, after.model) == (2.0, None)


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    before = _estimate()
    path = before.save(tmp_path / "e.safetensors")
    after = Estimate.load(path)
    assert type(after) is Estimate
    assert after.value == 0.1 + 0.2
    assert math.isnan(after.stderr)
    assert after.trace == -math.inf
    assert after.trace_stderr == 1e-300
    assert torch.equal(after.columns, before.columns)
    assert after.columns.stride() == before.columns.stride()
    assert after.flags.dtype == torch.bool
    assert torch.equal(after.flags, before.flags)
    assert (after.products, after.name, after.note) == (7, "Hessian «H»", None)
    assert after.settings["pair"] == (1, [2.5, None])
    assert torch.equal(after.settings["inner"]["t"], torch.arange(3))
    assert list(tmp_path.iterdir()) == [path]


def test_result_load_finds_the_class(tmp_path: Path) -> None:
    path = Other(2.0).save(tmp_path / "o.safetensors")
    assert type(Result.load(path)) is Other


def test_the_file_is_plain_safetensors_with_json(tmp_path: Path) -> None:
    path = _estimate().save(tmp_path / "e.safetensors")
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    document = json.loads(header["__metadata__"]["curvlib"])
    assert document["class"] == "Estimate"
    assert document["format"] == files.FORMAT_VERSION
    assert document["curvlib"] == files.curvlib_version()
    assert header["columns"]["shape"] == [3, 5]  # rows, as they lie in memory


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.text().filter(lambda k: not k.startswith("!")), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_every_plain_value_comes_back(value: Any) -> None:
    tensors: dict[str, Tensor] = {}
    encoded = json.loads(json.dumps(files._encode(value, "value", tensors, set()), allow_nan=False))
    assert repr(files._decode(encoded, tensors.get)) == repr(value)  # repr: nan equals nan


def test_parts_of_tensors_are_read_alone(tmp_path: Path) -> None:
    path, cpu = tmp_path / "numbers.safetensors", torch.device("cpu")
    content = {
        "rows": torch.arange(24.0).reshape(2, 3, 4),
        "columns": torch.arange(6.0).view(3, 2).mT,
    }
    files.write_record(path, "Numbers", content)
    _, found = files.read_record(path, stored=True)
    for name, whole in content.items():
        assert found[name].shape == whole.shape
        for axis in range(whole.ndim):
            for first, last in ((0, 1), (1, 2), (0, whole.shape[axis]), (1, 1)):
                part = found[name].narrow(axis, first, last, cpu)
                assert torch.equal(part, whole.narrow(axis, first, last - first))


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    content = {
        "all": base,
        "again": base,
        "part": base[1:],
        "empty": base[:0],
        "number": base[0, 1],
    }
    write_record(tmp_path / "r", "kind", content)
    kind, back = read_record(tmp_path / "r")
    assert kind == "kind"
    for name, tensor in content.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].shape == tensor.shape


def test_repr_is_short_and_has_errors() -> None:
    assert repr(Other(1 / 3)) == "Other(value=0.33333)"
    text = repr(_estimate())
    assert text == (
        "Estimate(value=0.3 ± nan, trace=-inf ± 1e-300, columns=[5, 3], flags=[2], products=7, "
        "name='Hessian «H»')"
    )


# ---------------------------------------------------------------- atomic writing
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half of the n")
            assert path.read_text() == "old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    script = (
        "import os, sys\nfrom curvlib.core.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as t:\n    t.write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    assert Program("-c", script, path).finish().code == -9
    assert len(list(tmp_path.iterdir())) == 1
    mine = tmp_path / f".f.{files.socket.gethostname()}-{os.getpid()}.tmp"
    mine.write_text("of a living process")
    remove_leftovers(path)
    assert list(tmp_path.iterdir()) == [mine]


# ------------------------------------------------------------------------ errors
def test_unwritable_places_are_named(tmp_path: Path) -> None:
    result = Other(1.0)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing.*; create it first"):
        result.save(tmp_path / "missing" / "o")
    with pytest.raises(IsADirectoryError, match="expected the path of a file, got the folder"):
        result.save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        result.save(tmp_path / "file" / "o")


def test_a_folder_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"is not writable \(Permission denied\); choose an"):
        Other(1.0).save(tmp_path / "o")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Other.load(tmp_path / "nothing")
    path = Other(1.0).save(tmp_path / "o")
    with pytest.raises(ValueError, match=r"holds a Other, expected Estimate; Result.load reads"):
        Estimate.load(path)
    damaged = tmp_path / "damaged"
    for content in (b"", b"no safetensors at all", _estimate().save(path).read_bytes()[:-3]):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
            Estimate.load(damaged)
    save_file({"x": torch.zeros(1)}, damaged)
    with pytest.raises(ValueError, match="is a safetensors file, but none of curvlib's"):
        Estimate.load(damaged)


def test_other_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "o"
    write_record(path, "Other", {"value": 1.0, "more": 2.0})
    with pytest.raises(
        ValueError, match=r"another version of curvlib, which differs in \['more'\]"
    ):
        Other.load(path)
    with monkeypatch.context() as patch:
        patch.setattr(files, "FORMAT_VERSION", 99)
        Other(1.0).save(path)
    with pytest.raises(
        ValueError, match=r"has format 99 .*this curvlib reads format 1; use the ve"
    ):
        Other.load(path)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot write x of type set: files hold tensors, numbers"):
        write_record(tmp_path / "r", "kind", {"x": {1}})
    with pytest.raises(TypeError, match="x has the key '!tensor'; keys must be strings without"):
        write_record(tmp_path / "r", "kind", {"x": {"!tensor": 1}})
    assert not list(tmp_path.iterdir())


def test_plots_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install 'curvlib\[plot\]'"):
        axes_or_new(None)


def test_classes_of_one_name_are_told_apart_by_their_fields(tmp_path: Path) -> None:
    def declare(field: str) -> Any:
        made = type("Twin", (Result,), {"__annotations__": {field: float}})
        return dataclass(frozen=True, eq=False, repr=False)(made)

    first, second = declare("one"), declare("two")
    for kind, name in ((first, "one"), (second, "two")):
        assert type(Result.load(kind(1.5).save(tmp_path / name))) is kind
