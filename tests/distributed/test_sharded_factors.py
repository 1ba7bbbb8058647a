"""K-FAC and EK-FAC of processes with sharded parameters are those of one process."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

import curvlib as cl
from curvlib.core.plan import Ranks
from curvlib.operators.factors.plan import fit_phases
from curvlib.operators.layers.shapes import LayerShape
from tests.distributed import sharded_factors_work as work
from tests.problems import error
from tests.ranks import on_ranks

HERE = "tests.distributed.sharded_factors_work:"


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("what", ["operators", "awkward"])
def test_operators_are_those_of_one_process(what: str, size: int) -> None:
    expected = getattr(work, what)(0, 1)
    found = on_ranks(HERE + what, size)
    assert found[0].keys() == expected.keys()
    for name, value in expected.items():
        assert error(found[0][name], value) < (1e-9 if name == "solved" else 1e-11), name
        for other in found[1:]:
            assert torch.equal(other[name], found[0][name]), name
    if what == "operators":
        fisher = cl.ggn(work.a_risk(0, 1, "images", None)).to_dense()
        assert float(found[0]["type2 numbers"][0]) == pytest.approx(float(fisher.trace()))


def test_a_rank_holds_its_slices_and_one_layer_whole() -> None:
    size, item = 2, 8
    sides = [(out, width + 1) for width, out in pairwise(work.WIDTHS)]
    rows = [[-(-n // size), n - -(-n // size)] for n in range(11)]
    layers = sum(out * width for out, width in sides)
    factors = sum(out**2 + width**2 for out, width in sides)
    padded = 2 * 9 * 10  # two sides of 9, which are padded to be cut
    for rank, found in enumerate(on_ranks(HERE + "footprint", size)):
        held = sum(rows[o][rank] * (o + i) + rows[i][rank] * i for o, i in sides)
        assert found["held"] == held
        assert found["total"] == layers
        assert found["largest"][0] <= padded < layers / 2
        assert found["largest"][1] == found["rows"] < 0.6 * layers
        assert found["same"]
        assert found["activations"] == 0
        # of two batches: sums of factors, and of eigenvalues; uneven slices are padded
        sums = 2 * (factors + layers) * item
        assert sums <= found["fit"]["own_sum"] <= 1.3 * sums
        # both are sent once
        assert factors * item <= found["fit"]["shares"] <= 1.3 * factors * item
        assert factors * item <= found["fit"]["joined_at"] <= 1.3 * factors * item
        # parameters forward (and once more, to know the rows), backward; bases in the second pass
        gathered = (2 * 2 * 2 + 2) * layers + 2 * factors
        assert found["fit"]["joined"] <= 1.3 * gathered * item
        # right bases, and rows there and back
        right = sum(width**2 for _, width in sides)
        assert found["solve"] <= 1.3 * (right + 2 * layers) * item
        planned = fit_phases(
            [LayerShape(f"{i}", 1, *side, rows=1) for i, side in enumerate(sides)],
            Ranks(size, sharded=True),
            examples=12,
            batch_size=3,
            itemsize=item,
        )
        own = found["fit"]["joined"] + found["fit"]["own_sum"]
        own += (found["fit"]["shares"] + found["fit"]["joined_at"]) / size
        sent = own * (size - 1) / size
        assert 1.0 < sent / sum(phase.traffic for phase in planned) < 1.3


def test_operators_are_kept_in_the_file_of_one_process(tmp_path: Path) -> None:
    path = str(tmp_path / "operator.safetensors")
    (first, _) = on_ranks(HERE + "saved", 2, path, True)
    assert [file.name for file in tmp_path.iterdir()] == ["operator.safetensors"]
    three = on_ranks(HERE + "saved", 3, path, False)
    one = work.saved(0, 1, path, False)
    assert sum(int(found["held"]) for found in three) == int(one["held"])
    assert max(int(found["held"]) for found in three) < 0.6 * int(one["held"])
    for name in ("products", "kfac", "numbers"):
        for found in (*three, one):
            assert error(found[name], first[name]) < 1e-12, name
    plain = str(tmp_path / "plain.safetensors")
    expected = work.saved(0, 1, plain, True)
    assert error(one["products"], expected["products"]) < 1e-11
    (found, _) = on_ranks(HERE + "saved", 2, plain, False)
    assert error(found["products"], expected["products"]) < 1e-12


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (2, 1)])
def test_fits_go_on_with_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    path = str(tmp_path / "fit.ckpt")
    expected = work.resumed(0, 1, str(tmp_path / "other.ckpt"), None)
    fails_at = {2: 6, 3: 2}[before]  # in the second pass: there are 5, 1, 4 batches at most
    *others, last = on_ranks(HERE + "resumed", before, path, fails_at)
    assert last["error"] == "LookupError: the disk with the images is gone"
    for other in others:
        assert f"rank {before - 1} of {before} failed in its part of a fit" in other["error"]
    if after == 1:
        found = [work.resumed(0, 1, path, None)]
    else:
        found = on_ranks(HERE + "resumed", after, path, None)
    fresh = expected["calls"]
    for own in found:
        assert error(own["value"], expected["value"]) < 1e-11
        assert own["calls"] < fresh  # the first pass is not done again


FAILURES = {
    "data": ("OSError: the disk is gone", "in a pass over its data: OSError: the disk is gone"),
    "forward": ("LookupError: the disk with", "failed in a pass over its data: LookupError: the"),
    "mask": (
        "LookupError: the disk with the images",
        "in its part of a fit: LookupError: the disk",
    ),
    "not finite": ("FloatingPointError: ", "in its part of a fit: FloatingPointError: "),
    "no folder": ("RuntimeError: rank 0 of 2 failed in writing a file: FileNotFoundError", ""),
    "other model": ("ValueError: the operator is of another model: parameters", ""),
}
ALIKE = {
    "factors": "damping of factors needs whole eigenvalues",
    "corrected": "RuntimeError: there are no corrected eigenvalues",
    "gone": "could not save the checkpoint",
    "singular": "is singular: 57 of the 57 eigenvalues of block 'conv' are zero",
    "mean": "needs a positive mean eigenvalue, but that of block 'conv' is 0",
    "logdet": "but 57 of 57 of block 'conv' are not, the least is 0",
    "power": "is infinite: an eigenvalue is zero",
}


def test_a_failure_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    first, last = on_ranks(HERE + "failures", 2, str(tmp_path))
    assert first.keys() == FAILURES.keys() | ALIKE.keys()
    for name, (own, told) in FAILURES.items():
        assert own in last[name], (name, last[name])
        assert told in first[name], (name, first[name])
        assert first[name], name
    for name, text in ALIKE.items():
        assert text in first[name], (name, first[name])
        assert name == "gone" or first[name] == last[name], name
    assert "rank 0 of 2 failed in writing a file" in last["gone"]
