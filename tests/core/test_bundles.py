"""Which tensors are gathered by one message, and that gathering and summing are adjoint."""

from __future__ import annotations

import pytest
import torch

from curvlib.core.ranks import bundles
from curvlib.core.ranks.bundles import Bundle, bundled, gather
from curvlib.core.ranks.group import Group
from curvlib.core.ranks.slices import Slices

F64 = torch.float64


class Alone(Group):
    """Two ranks that hold the same slices: what one sends is what the other does."""

    def joined(self, block: torch.Tensor) -> torch.Tensor:
        return torch.cat([block] * self.size)

    def own_sum(self, blocks: torch.Tensor) -> torch.Tensor:
        return blocks.view(self.size, -1).sum(0)  # of the slices that both have


def cut(*sizes: int, dtype: torch.dtype = F64) -> list[tuple[int, Slices, torch.Tensor]]:
    return [(i, Slices((n,), 0), torch.zeros(n, dtype=dtype)) for i, n in enumerate(sizes)]


def test_small_tensors_go_together_past_large_ones() -> None:
    assert bundled(cut(80, 8, 80, 8, 40, 40, 8)) == [[0], [1, 3, 6], [2], [4, 5]]
    assert bundled(cut(8, *[1] * 17)) == [[0], list(range(1, 9)), list(range(9, 17)), [17]]
    assert bundled([]) == []


def test_a_bundle_is_of_one_type_and_no_larger_than_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mixed = [*cut(80, 8, 8), *((i + 3, *rest) for i, *rest in cut(8, 8, dtype=torch.float32))]
    assert bundled(mixed) == [[0], [1, 2], [3, 4]]
    monkeypatch.setattr(bundles, "ROOM", 16 * 8)
    assert bundled(cut(80, 2, 2, 2, 2, 2, 2, 2, 2, 2)) == [[0], list(range(1, 9)), [9]]


def test_tensors_that_need_no_derivative_are_left_out_of_sums() -> None:
    group = Alone(None, 0, 2, torch.device("cpu"))  # type: ignore[arg-type]
    slices = (Slices((3, 2), 0), Slices((4,), 0), Slices((2, 4), 1))
    own = [torch.randn(s.local(0, 2), dtype=F64) for s in slices]
    for tensor, needs in zip(own, (True, False, True), strict=True):
        tensor.requires_grad_(needs)
    wholes = gather(Bundle(slices, group), own)
    assert [w.shape for w in wholes] == [s.shape for s in slices]
    assert torch.equal(wholes[1], torch.cat([own[1], own[1]]))
    found = torch.autograd.grad(wholes[0].sum() + wholes[2].square().sum(), (own[0], own[2]))
    # each of the two halves is a use of the slice; the first is padded, the second one entry short
    assert torch.equal(found[0], torch.tensor([[2.0, 2.0], [1.0, 1.0]], dtype=F64))
    assert torch.allclose(found[1], 4 * own[2])
