"""The table, the figure and the numbers of estimates layer by layer."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from curvlib.estimators.trace import trace
from curvlib.report.figures import layers_figure
from curvlib.report.layers import Layer, Layers, table, write

ROWS = (
    Layer("body.0", 1200, 3.5, 0.25, {"share": 0.875}),
    Layer("head", 40, 0.5, 0.0, {"share": 0.125}),
)


@pytest.fixture
def measured():
    return Layers(
        what="trace",
        heading="trace",
        rows=ROWS,
        total=(4.0, 0.25, (3.5, 4.5)),
        total_heading="trace",
        facts={"Frobenius norm": "2.0 ± 0.1"},
        numbers={"frobenius_norm": 2.0},
        result=trace(torch.eye(3), probes=2),
        method="hutchinson",
        products=64,
        name="Hessian",
        target="mine.py:risk",
        parameters=1240,
        examples=7,
        seconds=1.25,
    )


def test_table(measured):
    lines = table(measured).splitlines()
    assert lines[1].split() == ["layer", "parameters", "trace", "±", "error", "share"]
    assert lines[2].split() == ["body.0", "1,200", "3.5", "2.5e-01", "0.875"]
    assert lines[3].split() == ["head", "40", "0.5", "exact", "0.125"]
    assert len({len(line) for line in lines[1:4]}) == 1, "columns are aligned"
    text = table(measured)
    assert "trace:               4.00 ± 0.25  (95 %: 3.5 to 4.5)" in text
    assert "Frobenius norm:      2.0 ± 0.1" in text
    assert "wall time:           1.2 s\n" in text
    assert "1.2 s (this run)" in table(dataclasses.replace(measured, resumed=True))


def test_without_an_error(measured):
    none = (4.0, math.nan, (-math.inf, math.inf))
    assert "(one probe: no error)" in table(dataclasses.replace(measured, total=none))
    exact = dataclasses.replace(measured, total=(4.0, 0.0, (4.0, 4.0)))
    assert "trace:               4  (exact)" in table(exact)


def test_numbers_are_plain_json(measured, tmp_path):
    one = dataclasses.replace(measured, total=(4.0, math.nan, (-math.inf, math.inf)))
    files = write(one, tmp_path, "the command")
    assert all(path.is_file() for path in files)
    assert [path.name for path in files[:2]] == ["trace.png", "trace.pdf"]
    found = json.loads((tmp_path / "trace.json").read_text())
    assert found["stderr"] is None
    assert found["interval"] == [None, None]
    assert found["trace"] == 4.0
    assert found["frobenius_norm"] == 2.0
    assert found["layers"][0] == {
        "layer": "body.0",
        "parameters": 1200,
        "trace": 3.5,
        "stderr": 0.25,
        "share": 0.875,
    }
    assert found["command"] == "the command"


def _figure(values, errors):
    rows = [
        (f"layer{i}", 10 * i, v, e) for i, (v, e) in enumerate(zip(values, errors, strict=True))
    ]
    figure = layers_figure(rows, label="trace", heading=["mine", "N = 3"], note="exact")
    figure.canvas.draw()
    return figure, figure.axes[0]


def test_the_figure_shows_bars_in_the_order_of_the_model():
    figure, ax = _figure([1.0, -2.0, 3.0], [0.1, 0.2, 0.0])
    assert [bar.get_width() for bar in ax.patches] == [1.0, -2.0, 3.0]
    assert [t.get_text() for t in ax.get_yticklabels()][1] == "layer1  (10)"
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first layer is on top"
    assert ax.get_xscale() == "linear"
    assert ax.get_xlabel() == "trace  (exact)"
    assert figure.legends[0].get_texts()[0].get_text() == "± standard error"
    assert "mine   |   N = 3" in figure.get_suptitle()


def test_small_layers_can_be_read_beside_large_ones():
    _, ax = _figure([100.0, 0.01, -5.0], [1.0, math.nan, 0.1])
    assert ax.get_xscale() == "asinh"
    labels = [t.get_text() for t in ax.get_xticklabels()]
    assert "0" in labels
    assert len(labels) == len(set(labels))


def test_exact_values_have_no_bars_of_errors_and_zeros_can_be_drawn():
    figure, _ = _figure([1.0, 2.0], [0.0, 0.0])
    assert figure.legends == []
    _, ax = _figure([0.0], [0.0])
    assert ax.get_xscale() == "linear"


def test_figures_need_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'curvlib\[plot\]'"):
        layers_figure([("a", 1, 1.0, 0.1)], label="trace", heading=[], note="exact")
