"""Figures show what they claim: values, outliers, and what was measured."""

from __future__ import annotations

import sys

import matplotlib as mpl
import pytest
import torch

from curvlib.estimators.density import density
from curvlib.estimators.eigenpairs import eigenpairs
from curvlib.report.figures import save_figure, spectrum_figure, with_error


@pytest.fixture(scope="module")
def estimates():
    bulk = torch.linspace(-0.01, 0.05, 195, dtype=torch.float64)
    A = torch.diag(torch.cat([bulk, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double()]))
    pairs = eigenpairs(A, 5)
    return pairs, density(A, steps=20, probes=3, deflate=pairs)


@pytest.fixture(scope="module")
def figure(estimates):
    return spectrum_figure(*estimates, title="a matrix", examples=1234)


def text_of(figure):
    texts = [t.get_text() for ax in figure.axes for t in ax.get_legend().get_texts()]
    return "\n".join([figure.get_suptitle(), *texts])


def test_it_says_what_was_measured(figure, estimates):
    said = text_of(figure)
    trace = with_error(estimates[1].trace, estimates[1].trace_stderr)
    for part in ("a matrix", "N = 1,234 examples", f"trace {trace}", "P = 200", "3 probes × 20"):
        assert part in said


def test_the_density_is_on_a_log_axis_and_outliers_are_marked(figure):
    left = figure.axes[0]
    assert left.get_yscale() == "log"
    marks = [line for line in left.lines if line.get_marker() == "v"]
    assert len(marks) == 1
    assert sorted(marks[0].get_xdata()) == pytest.approx([1, 2, 3, 4, 5])
    low, high = left.get_xlim()
    assert low < -0.01
    assert high > 5.0


def test_each_eigenvalue_has_its_stem(figure):
    right = figure.axes[1]
    stems = [path for c in right.collections for path in c.get_paths()]
    lines = [path.vertices for path in stems if float(path.vertices[0, 1]) == 0.0]
    assert sorted(float(line[1, 1]) for line in lines) == pytest.approx([1, 2, 3, 4, 5], abs=1e-6)


def test_nothing_overlaps_the_legends(figure):
    """Markers under a legend could not be read."""
    figure.canvas.draw()
    for ax in figure.axes:
        box = ax.get_legend().get_window_extent()
        for line in ax.lines:
            if line.get_marker() in ("o", "v"):
                points = line.get_transform().transform(line.get_xydata())
                assert not any(box.contains(*point) for point in points)


def test_drawing_changes_no_settings(estimates):
    before = dict(mpl.rcParams)
    spectrum_figure(*estimates)
    assert dict(mpl.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not mpl.pyplot.get_fignums()


def test_files_are_the_same_again(figure, tmp_path):
    first = save_figure(figure, tmp_path / "one")
    second = save_figure(figure, tmp_path / "two")
    assert [path.name for path in first] == ["one.png", "one.pdf"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_a_folder_that_does_not_exist(figure, tmp_path):
    with pytest.raises(FileNotFoundError, match="create it first"):
        save_figure(figure, tmp_path / "absent" / "figure")


def test_matplotlib_is_asked_for(estimates, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'curvlib\[plot\]'"):
        spectrum_figure(*estimates)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3456, 0.234, "12.35 ± 0.23"),
        (12.3456, 1.9, "12.3 ± 1.9"),
        (12345.6, 234.0, "12346 ± 2.3e+02"),
        (1e-3, 2e-5, "0.001000 ± 2e-05"),
        (2.0, 0.0, "2.000000 ± 0"),
        (2.5, float("nan"), "2.5"),
    ],
)
def test_numbers_with_errors(value, error, text):
    assert with_error(value, error) == text


def test_nodes_that_are_known_exactly_are_no_spikes_on_the_symmetric_log_axis():
    """Lanczos finds this outlier to rounding; it is drawn as wide as asked, with its mass."""
    A = torch.diag(torch.tensor([0.001] * 50 + [1.0], dtype=torch.float64))
    result = density(A, steps=10, probes=2)
    for resolution in (0.05, 0.2):
        grid, per_decade, _ = result.on_symlog(4000, linear=1e-4, resolution=resolution)
        peak = float(per_decade[(grid - 1.0).abs().argmin()])
        mass, _ = result.mass(0.5, 2.0)
        assert peak == pytest.approx(mass / (resolution * (2 * torch.pi) ** 0.5), rel=0.01)
    with pytest.raises(ValueError, match="expected a positive resolution=, got 0"):
        result.on_symlog(resolution=0.0)
