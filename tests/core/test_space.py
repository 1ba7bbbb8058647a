"""Flat vectors and back: selection, order, ties, layout, and each error's text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvlib.core.space import ParamSpace, select


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(0.5))


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


# ------------------------------------------------------------------ the space
def test_order_is_that_of_named_parameters() -> None:
    model = _net()
    space = ParamSpace.of(model)
    named = dict(model.named_parameters())
    assert space.names == tuple(named)
    assert space.shapes == tuple(tuple(p.shape) for p in named.values())
    assert space.sizes == (6, 3, 3, 1)
    assert space.size == 13


def test_join_is_the_row_major_concatenation() -> None:
    model = _net()
    space = ParamSpace.of(model)
    flat = space.join(list(model.parameters()))
    assert torch.equal(flat, nn.utils.parameters_to_vector(model.parameters()).detach())
    assert not flat.requires_grad


def test_tied_parameters_count_once_under_their_first_name() -> None:
    space = ParamSpace.of(Tied())
    assert space.names == ("scale", "embed.weight", "body.weight", "body.bias")
    assert space.size == 1 + 15 + 9 + 3


def test_zero_dimensional_parameters_have_one_entry() -> None:
    space = ParamSpace.of(Tied())
    assert space.shapes[0] == ()
    parts = space.split(torch.arange(28.0))
    assert parts[0].shape == ()
    assert space.split(torch.zeros(28, 4))[0].shape == (4,)


def test_empty_parameters_have_no_entry() -> None:
    named = {"a": torch.zeros(2), "none": torch.zeros(0, 3), "b": torch.zeros(1)}
    space = ParamSpace.from_named(named)
    assert space.size == 3
    assert [tuple(p.shape) for p in space.split(torch.zeros(3, 2))] == [(2, 2), (2, 0, 3), (2, 1)]


def test_slices_and_layers_cover_the_vector() -> None:
    space = ParamSpace.of(Tied())
    assert space.layers() == {
        "scale": ("scale",),
        "embed": ("embed.weight",),
        "body": ("body.weight", "body.bias"),
    }
    covered = [i for name in space.names for i in range(28)[space.slice(name)]]
    assert covered == list(range(28))
    for entry in range(28):
        name, own = space.at(entry)
        assert space.slice(name).start + own == entry < space.slice(name).stop


def test_split_of_a_vector_gives_views() -> None:
    space = ParamSpace.of(_net())
    flat = torch.zeros(13)
    space.split(flat)[1].fill_(2.0)
    assert flat[6:9].eq(2.0).all()
    assert flat.sum() == 6.0


def test_split_of_a_column_contiguous_block_gives_views() -> None:
    space = ParamSpace.of(_net())
    block = torch.zeros(4, 13).T
    space.split(block)[1].fill_(2.0)
    assert block[6:9].eq(2.0).all()


def test_join_makes_column_contiguous_blocks_and_zeros_for_none() -> None:
    space = ParamSpace.of(_net())
    parts = [torch.ones(4, 3, 2), None, torch.ones(4, 1, 3), None]
    block = space.join(parts, columns=4)
    assert block.shape == (13, 4)
    assert block.T.is_contiguous()
    assert block.sum(1).tolist() == [4.0] * 6 + [0.0] * 3 + [4.0] * 3 + [0.0]


@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_scales_and_adds(columns: int | None, dtype: torch.dtype) -> None:
    space = ParamSpace.from_named({"a": torch.zeros(2, 2, dtype=dtype), "b": torch.zeros(3)})
    lead = () if columns is None else (columns,)
    part = torch.arange(4 * (columns or 1), dtype=dtype).reshape(*lead, 2, 2)
    expected = space.join([part, None], columns=columns)
    out = space.empty(columns).fill_(7.0)
    assert out.shape == (7, *lead)
    space.write([part, None], out, scale=0.5)
    assert torch.equal(out, 0.5 * expected)
    assert out[4:].abs().sum() == 0
    out.fill_(7.0)
    space.write([part, None], out, scale=-2.0, add=True)
    assert torch.equal(out, 7.0 - 2.0 * expected)


def test_restrict_keeps_the_order_of_the_space() -> None:
    space = ParamSpace.of(_net())
    part = space.restrict(["2.bias", "0.weight"])
    assert part.names == ("0.weight", "2.bias")
    assert part.size == 7


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float32,), torch.float32),
        ((torch.float64,), torch.float64),
        ((torch.bfloat16,), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
    ],
)
def test_vectors_are_float32_or_float64(
    dtypes: tuple[torch.dtype, ...], expected: torch.dtype
) -> None:
    named = {str(i): torch.zeros(2, dtype=d) for i, d in enumerate(dtypes)}
    space = ParamSpace.from_named(named)
    assert space.dtype == expected
    assert space.dtypes == dtypes
    assert space.join(list(named.values())).dtype == expected


shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, columns=st.one_of(st.none(), st.integers(1, 4)), seed=st.integers(0, 99))
def test_split_and_join_are_inverse(
    shapes: list[tuple[int, ...]], columns: int | None, seed: int
) -> None:
    named = {f"p{i}": torch.zeros(s, dtype=torch.float64) for i, s in enumerate(shapes)}
    space = ParamSpace.from_named(named)
    shape = (space.size,) if columns is None else (space.size, columns)
    flat = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    parts = space.split(flat)
    lead = () if columns is None else (columns,)
    assert [tuple(p.shape) for p in parts] == [(*lead, *s) for s in shapes]
    assert torch.equal(space.join(parts, columns=columns), flat)
    for k in range(columns or 0):  # a column is split as a vector is
        alone = space.split(flat[:, k])
        assert all(torch.equal(p[k], q) for p, q in zip(parts, alone, strict=True))


# ------------------------------------------------------------------- selection
def test_default_selects_what_requires_a_gradient() -> None:
    model = _net()
    model[0].weight.requires_grad_(False)
    assert list(select(model)) == ["0.bias", "2.weight", "2.bias"]
    assert select(model)["0.bias"] is model[0].bias


def test_globs_modules_and_tensors_mix_and_count_once() -> None:
    model = _net()
    named = select(model, [model[2].bias, "2.*", model[0], "0.b*"])
    assert list(named) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_selection_may_be_one_item_or_a_generator() -> None:
    model = _net()
    assert list(select(model, "*.bias")) == ["0.bias", "2.bias"]
    assert list(select(model, model[2])) == ["2.weight", "2.bias"]
    assert list(select(model, model[2].bias)) == ["2.bias"]
    assert list(select(model, (p for p in [model[0].bias]))) == ["0.bias"]


def test_a_tied_parameter_is_found_under_each_of_its_names() -> None:
    model = Tied()
    assert list(select(model, "head.*")) == ["embed.weight"]
    assert list(select(model, model.head)) == ["embed.weight"]
    assert list(select(model, ["head.weight", "embed.weight"])) == ["embed.weight"]


def test_frozen_parameters_are_taken_only_as_tensors() -> None:
    model = _net()
    model[0].weight.requires_grad_(False)
    assert list(select(model, "0.*")) == ["0.bias"]
    assert list(select(model, model[0])) == ["0.bias"]
    assert list(select(model, model[0].weight)) == ["0.weight"]


def test_names_of_a_compiled_module_have_no_prefix() -> None:
    model = _net()
    model[0] = torch.compile(model[0], backend="eager")
    assert ParamSpace.of(model).names == ("0.weight", "0.bias", "2.weight", "2.bias")


# ---------------------------------------------------------------------- errors
def test_no_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter is selected"):
        ParamSpace.of(nn.Tanh())
    with pytest.raises(ValueError, match="no parameter is selected"):
        ParamSpace.of(_net(), [])
    with pytest.raises(ValueError, match="no parameter is selected"):
        ParamSpace.of(_net().requires_grad_(False))


def test_types_that_are_not_real_floating_point() -> None:
    with pytest.raises(TypeError, match=r"'w' has type torch.complex64.*leave it out with params="):
        ParamSpace.from_named({"w": torch.zeros(2, dtype=torch.complex64)})


def test_several_devices() -> None:
    named = {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")}
    with pytest.raises(ValueError, match=r"several devices \(\['cpu', 'meta'\]\).*model.to"):
        ParamSpace.from_named(named)


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16])
def test_float64_does_not_mix(other: torch.dtype) -> None:
    named = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(2, dtype=other)}
    with pytest.raises(TypeError, match=r"parameters mix .*model.double\(\) or model.float\(\)"):
        ParamSpace.from_named(named)


def test_lengths_and_names_that_do_not_fit() -> None:
    space = ParamSpace.of(_net())
    with pytest.raises(ValueError, match=r"flat vector of length 13, got \[12\]"):
        space.split(torch.zeros(12))
    with pytest.raises(ValueError, match=r"flat vector of length 13, got \[2, 13\]"):
        space.split(torch.zeros(2, 13))
    with pytest.raises(ValueError, match=r"no parameter is named '1.weight'; there are"):
        space.slice("1.weight")
    with pytest.raises(ValueError, match="a flat vector of length 13 has no entry 13"):
        space.at(13)
    with pytest.raises(ValueError, match=r"no parameters are named \['nope'\]"):
        space.restrict(["0.bias", "nope"])
    with pytest.raises(ValueError, match="shorter than"):
        space.join([torch.zeros(3, 2)])


def test_selections_that_do_not_fit() -> None:
    model = _net()
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got function"):
        select(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameter of the model; pass the parameter object"):
        select(model, model[0].weight.detach().clone())
    with pytest.raises(ValueError, match="module Linear in params= has parameters that are not"):
        select(model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"'1\.\*' in params= selects nothing; there are \['0.wei"):
        select(model, "1.*")
    with pytest.raises(ValueError, match="module Tanh in params= selects nothing"):
        select(model, model[1])
    with pytest.raises(TypeError, match="globs, modules and tensors, got an item of type int"):
        select(model, [3])  # type: ignore[list-item]
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0\.\*' in params= selects frozen parameters only"):
        select(model, "0.*")
    with pytest.raises(ValueError, match="module Linear in params= selects frozen"):
        select(model, model[0])
