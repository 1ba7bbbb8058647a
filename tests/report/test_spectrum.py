"""The table and the numbers of a spectrum."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from curvlib.estimators.density import density
from curvlib.estimators.eigenpairs import Eigenpairs, eigenpairs
from curvlib.report.spectrum import Spectrum, table, write

VALUES = torch.tensor([-2.0, -1.0, 0.0, 0.5, 4.0], dtype=torch.float64)


def spectrum_of(A, *, which="LA", probes=2, k=2):
    pairs = eigenpairs(A, k, which=which)
    return Spectrum(
        eigenpairs=pairs,
        density=density(A, steps=5, probes=probes, deflate=pairs),
        name="Hessian",
        target="mine.py:risk",
        parameters=len(A),
        examples=7,
        seconds=1.25,
    )


@pytest.fixture
def measured():
    return spectrum_of(torch.diag(VALUES))


def test_derived_numbers(measured):
    assert measured.stable_step == pytest.approx(0.5)
    assert measured.products == measured.eigenpairs.products + measured.density.products


def test_the_largest_eigenvalue_may_be_the_densitys():
    measured = spectrum_of(torch.diag(VALUES), which="SA")
    assert float(measured.eigenpairs.values.max()) < 0
    assert measured.stable_step == pytest.approx(0.5)


@pytest.mark.parametrize("A", [-torch.eye(4).double(), torch.zeros(4, 4).double()])
def test_no_stable_step_without_positive_eigenvalues(A):
    measured = spectrum_of(A)
    assert measured.stable_step is None
    assert "none: no eigenvalue is positive" in table(measured)


def test_table(measured):
    lines = table(measured).splitlines()
    assert lines[1].split() == ["eigenvalue", "residual"]
    assert lines[2].split()[:2] == ["1", "4"]
    assert lines[3].split()[:2] == ["2", "0.5"]
    assert "not converged" not in table(measured)
    assert any(line.startswith("wall time:") and line.endswith("1.2 s") for line in lines)
    resumed = dataclasses.replace(measured, resumed=True)
    assert "1.2 s (this run)" in table(resumed)


def test_one_probe_has_no_standard_error():
    one = spectrum_of(torch.diag(VALUES), probes=1)
    assert "(one probe: no error)" in table(one)


def test_what_did_not_converge_is_said(measured):
    pairs = {f.name: getattr(measured.eigenpairs, f.name) for f in dataclasses.fields(Eigenpairs)}
    pairs["converged"] = torch.tensor([True, False])
    doubtful = dataclasses.replace(measured, eigenpairs=Eigenpairs(**pairs))
    assert "0.5" in next(line for line in table(doubtful).splitlines() if "not converged" in line)


def test_numbers_are_plain_json(measured, tmp_path):
    one = spectrum_of(torch.diag(VALUES), probes=1)  # whose standard error is NaN
    files = write(one, tmp_path, "the command")
    assert all(path.is_file() for path in files)
    text = (tmp_path / "spectrum.json").read_text()
    assert "NaN" not in text
    found = json.loads(text)
    assert found["trace_stderr"] is None
    assert found["trace"] == one.density.trace
    assert [row["value"] for row in found["eigenvalues"]] == pytest.approx([4.0, 0.5])
    assert (tmp_path / "command.txt").read_text().splitlines()[1] == "the command"


def test_a_folder_that_does_not_exist(measured, tmp_path):
    with pytest.raises(FileNotFoundError, match="create it first"):
        write(measured, tmp_path / "absent", "the command")
