"""Channels and heads that are physically removed, against models with zeros in their place."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlib.core.space import ParamSpace
from curvlib.core.structured import Diagonal
from curvlib.pruning.dependencies import Graph, StructuredGroups, structured_groups
from curvlib.pruning.group_scores import group_saliencies
from curvlib.pruning.structured import prune_structured

pytest.importorskip("torch_pruning", reason="optional: pip install 'curvlib[structured]'")
pytestmark = pytest.mark.oracle

F64 = torch.float64


class ConvNet(nn.Module):
    """Convolutions with batch normalization, a residual sum, and optionally groups."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 4, 3, padding=1)
        self.inner_norm = nn.BatchNorm2d(4)
        self.outer = nn.Conv2d(4, 6, 1)
        self.grouped = nn.Conv2d(6, 8, 3, padding=1, groups=groups)
        self.head = nn.Linear(8 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.stem(x)))
        h = h + self.outer(F.gelu(self.inner_norm(self.inner(h))))
        return self.head(F.max_pool2d(torch.sigmoid(self.grouped(h)), 2).flatten(1))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 1)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.slope = nn.PReLU(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.norm = nn.InstanceNorm2d(4, affine=True)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.up(self.slope(self.depth(self.first(x))))))


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.num_heads = kind, 4
        if kind == "separate":
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        else:
            self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        if self.kind == "unbind":
            qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, 2).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
        else:
            parts = (
                (self.q(x), self.k(x), self.v(x))
                if self.kind == "separate"
                else self.qkv(x).chunk(3, dim=-1)
            )
            q, k, v = (a.reshape(n, t, self.num_heads, -1).transpose(1, 2) for a in parts)
        if self.kind == "chunk":
            mixed = (q @ k.transpose(-2, -1) / 2**0.5).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(n, t, -1))


class Transformer(nn.Module):
    def __init__(self, kind: str = "separate") -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = Attention(kind)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.3), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


def _seeded(make: type[nn.Module], *arguments: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(*arguments).double()
        for p in model.parameters():
            p.data = torch.randn_like(p)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2.0)
    return model


class Concatenated(nn.Module):
    """Two branches that are concatenated, in an order that is not that of their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 4, 1)
        self.norm = nn.BatchNorm2d(7)
        self.merge = nn.Conv2d(7, 5, 3, padding=1)
        self.head = nn.Conv2d(5 + 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.tanh(self.a(x)), F.relu(self.b(x))
        merged = F.silu(self.merge(self.norm(torch.cat([b, a], dim=1))))
        return self.head(torch.cat([merged, a], dim=1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=9, batch_first=True)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ELU(), nn.Linear(6, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.layer(self.embed(tokens)).mean(1))


class Volume(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 1)),
            nn.Conv3d(1, 5, (1, 3, 3)),
            nn.BatchNorm3d(5),
            nn.Flatten(2),
            nn.Conv1d(5, 4, 2),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 2),
        )


IMAGE = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
HEADS = {"attention.proj": 4}

CASES = {
    "convnet": (ConvNet, (1,), IMAGE, None),
    "grouped": (ConvNet, (2,), IMAGE, None),
    "depthwise": (Depthwise, (), IMAGE.expand(2, 2, 4, 4), None),
    "separate heads": (Transformer, ("separate",), TOKENS, HEADS),
    "chunked heads": (Transformer, ("chunk",), TOKENS, HEADS),
    "concatenated": (Concatenated, (), IMAGE, None),
    "encoder layer": (Encoder, (), TOKENS, None),
    "one and three dimensions": (Volume, (), IMAGE, None),
    "unbound heads": (Transformer, ("unbind",), TOKENS, HEADS),
}


def _random(groups: StructuredGroups) -> Tensor:
    return torch.rand(len(groups.groups), generator=torch.Generator().manual_seed(3))


def _zeroed(model: nn.Module, entries: Tensor) -> nn.Module:
    out = copy.deepcopy(model).eval()
    flat = torch.cat([p.detach().reshape(-1) for p in out.parameters()])
    flat[entries] = 0.0
    start = 0
    for p in out.parameters():
        p.data = flat[start : start + p.numel()].reshape(p.shape)
        start += p.numel()
    return out


# -------------------------------------------------------------------- the groups
def test_coordinates_by_hand() -> None:
    model = _seeded(ConvNet)
    listed = structured_groups(model, IMAGE)
    start = {n: ParamSpace.of(model).slice(n).start for n, _ in model.named_parameters()}
    places = {
        n: torch.arange(start[n], start[n] + p.numel()).reshape(p.shape)
        for n, p in model.named_parameters()
    }
    by_hand: list[set[int]] = []
    for c in range(6):  # the residual stream ties stem and outer; inner and grouped read it
        parts = [places["stem.weight"][c], places["norm.weight"][c], places["norm.bias"][c]]
        parts += [places["outer.weight"][c], places["outer.bias"][c]]
        parts += [places["inner.weight"][:, c], places["grouped.weight"][:, c]]
        by_hand.append({int(i) for part in parts for i in part.reshape(-1)})
    for c in range(4):
        parts = [places[f"inner.{k}"][c] for k in ("weight", "bias")]
        parts += [places[f"inner_norm.{k}"][c] for k in ("weight", "bias")]
        by_hand.append(
            {int(i) for q in (*parts, places["outer.weight"][:, c]) for i in q.reshape(-1)}
        )
    for c in range(8):  # each channel is four inputs of the head
        parts = [places["grouped.weight"][c], places["grouped.bias"][c]]
        parts.append(places["head.weight"][:, 4 * c : 4 * c + 4])
        by_hand.append({int(i) for part in parts for i in part.reshape(-1)})
    found = [set(g.coordinates.tolist()) for g in listed.groups]
    assert sorted(map(sorted, found)) == sorted(map(sorted, by_hand))
    assert listed.skipped == {"head": "they are the model's output"}
    assert all(torch.equal(g.coordinates, g.entries) for g in listed.groups)


def test_heads_by_hand() -> None:
    for kind in ("chunk", "unbind"):
        model = _seeded(Transformer, kind)
        listed = structured_groups(model, TOKENS, heads=HEADS)
        space = ParamSpace.of(model)
        start = {n: space.slice(n).start for n in space.names}
        found = [
            set(g.coordinates.tolist()) for g in listed.groups if g.layer.startswith("attention")
        ]
        expected = []
        for head in range(4):
            channels = [s * 8 + 2 * head + j for s in range(3) for j in range(2)]
            one = {start["attention.qkv.weight"] + 8 * c + i for c in channels for i in range(8)}
            one |= {start["attention.qkv.bias"] + c for c in channels}
            one |= {
                start["attention.proj.weight"] + 8 * o + 2 * head + j
                for o in range(8)
                for j in range(2)
            }
            expected.append(one)
        assert sorted(map(sorted, found)) == sorted(map(sorted, expected))
    assert len(listed.groups) == 4 + 12
    assert set(listed.skipped) == {"head", "mlp.3"}
    assert "LayerNorm" in listed.skipped["mlp.3"]


def test_attention_is_left_alone_without_heads() -> None:
    for kind in ("separate", "chunk"):
        listed = structured_groups(_seeded(Transformer, kind), TOKENS)
        assert {g.layer for g in listed.groups} == {"mlp.0"}
        reasons = [r for n, r in listed.skipped.items() if n.startswith("attention")]
        assert reasons == [
            "they belong to attention: pass heads={'<output projection>': <number of heads>}"
        ]


def test_what_cannot_be_removed_is_named_with_its_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(1, 4, 1)
            self.group_norm = nn.GroupNorm(2, 4)
            self.b = nn.Conv2d(4, 4, 1)
            self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
            self.c = nn.Conv2d(4, 4, 1)
            self.up = nn.ConvTranspose2d(4, 4, 1, groups=2)
            self.d = nn.Conv2d(4, 4, 1)
            self.e = nn.Conv2d(4, 4, 1)
            self.f = nn.Conv2d(4, 4, 1)
            self.e.weight = self.d.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(torch.relu(self.group_norm(self.a(x)))) * self.scale
            x = self.up(torch.relu(self.c(torch.relu(x))))
            return torch.log(self.f(torch.relu(self.e(torch.relu(self.d(torch.relu(x)))))).exp())

    listed = structured_groups(_seeded(Odd), IMAGE)
    assert listed.groups == ()
    assert listed.skipped["a"] == "layer 'group_norm' (GroupNorm) mixes them"
    assert listed.skipped["b"] == "they reach a parameter that belongs to no known layer"
    assert listed.skipped["f"] == "they are the model's output"
    assert "tied parameter" in listed.skipped["d"]
    assert "'up' is a grouped transposed convolution" in listed.skipped["c"]
    with pytest.raises(ValueError, match=r"no channel can be removed: .*'f'"):
        prune_structured(_seeded(Odd), IMAGE, 0.5, _random)


def test_partial_and_frozen_parameters() -> None:
    model = _seeded(ConvNet)
    model.norm.requires_grad_(False)
    space = ParamSpace.of(model)
    listed = structured_groups(model, IMAGE)
    assert listed.space == space
    assert listed.everything.size == space.size + 12
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    selected = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
    for group in listed.groups:
        inside = set(selected[group.coordinates].tolist())
        whole = set(flat[group.entries].tolist())
        assert inside <= whole
        assert len(whole) - len(inside) == (2 if group.layer in ("stem", "outer") else 0)
    result = prune_structured(model, IMAGE, 0.3, _random)
    assert [p.requires_grad for p in result.model.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    small = ParamSpace.of(result.model)
    now = small.join([p for p in result.model.parameters() if p.requires_grad])
    assert torch.equal(selected[result.kept], now)


# ----------------------------------------------------------------- physical removal
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sparsity", [0.25, 0.6])
def test_smaller_model_is_the_zeroed_one(name: str, sparsity: float) -> None:
    make, arguments, example, heads = CASES[name]
    model = _seeded(make, *arguments)
    model.train()
    model.get_submodule(next(n for n, _ in model.named_children())).eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    result = prune_structured(model, example, sparsity, _random, heads=heads)
    assert [m.training for m in model.modules()] == modes
    assert [m.training for m in result.model.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    entries = torch.cat([g.entries for g in result.removed]).unique()
    total = sum(p.numel() for p in model.parameters())
    after = sum(p.numel() for p in result.model.parameters())
    assert result.parameters == (total, after)
    assert after == total - entries.numel()
    g = torch.Generator().manual_seed(7)
    other = (
        torch.randint(7, (3, 5), generator=g)
        if example.dtype == torch.int64
        else torch.randn(3, *example.shape[1:], generator=g, dtype=F64)
    )
    expected = _zeroed(model, entries)(other).detach()
    found = result.model.eval()(other).detach()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert result.difference <= 1e-10 * float(expected.abs().max())
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    small = torch.cat([p.detach().reshape(-1) for p in result.model.parameters()])
    assert torch.equal(flat[result.kept], small)
    result.model(other).sum().backward()  # still trains
    assert "groups removed, parameters" in repr(result)


def test_heads_are_counted_where_the_module_counts_them() -> None:
    model = _seeded(Transformer, "unbind")

    def worst(groups: StructuredGroups) -> Tensor:
        return torch.tensor(
            [0.0 if g.layer.startswith("attention") else 1.0 for g in groups.groups]
        )

    result = prune_structured(model, TOKENS, 3 / 16, worst, heads=HEADS)
    assert result.model.attention.num_heads == 1
    assert result.model.attention.qkv.out_features == 6
    assert model.attention.num_heads == 4


def test_examples_of_any_kind() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
            h = self.a(x if y is None else x + y)
            return {"logits": self.b(h.tanh()), "count": torch.tensor(3)}

    model, x = _seeded(Named), torch.ones(2, 3, dtype=F64)
    whole = structured_groups(model, x)
    assert len(whole.groups) == 6
    for example, forward in (
        ({"x": x, "y": x}, None),
        ((x, x), None),
        ([x], lambda m, e: m(e[0])["logits"]),
    ):
        result = prune_structured(model, example, 0.5, _random, forward=forward)
        assert result.model.a.out_features == 3


def test_masks_that_are_attached_are_not_in_the_smaller_model() -> None:
    from curvlib.pruning.masks import Masks
    from curvlib.pruning.persistence import attach

    model = _seeded(ConvNet)
    attach(model, Masks({"inner.weight": torch.rand(4, 6, 3, 3) > 0.5}))
    result = prune_structured(model, IMAGE, 0.3, _random)
    assert list(result.model.state_dict()) == list(ConvNet().state_dict())
    assert "inner.weight_keep" in model.state_dict()


def test_share_of_parameters_caps_and_the_last_channel() -> None:
    model = _seeded(ConvNet)
    ones = lambda groups: torch.ones(len(groups.groups))  # noqa: E731
    result = prune_structured(model, IMAGE, 0.5, ones, of="parameters")
    before, after = result.parameters
    assert after <= 0.5 * before
    fewer = prune_structured(model, IMAGE, 0.5, _random, of="channels", cap=0.5)
    left = {"inner": fewer.model.inner.out_channels, "grouped": fewer.model.grouped.out_channels}
    assert left == {"inner": 2, "grouped": 4}
    assert fewer.model.stem.out_channels == 3
    assert len(fewer.removed) == 9
    nothing = prune_structured(model, IMAGE, 0.0, _random)
    assert nothing.removed == ()
    assert torch.equal(nothing.model.eval()(IMAGE), copy.deepcopy(model).eval()(IMAGE))
    with pytest.raises(
        ValueError, match=r"sparsity=0.9 of the channels cannot be reached: at most"
    ):
        prune_structured(model, IMAGE, 0.9, _random, cap=0.5)
    with pytest.raises(
        ValueError, match=r"sparsity=0.99 of the parameters cannot be reached: at m"
    ):
        prune_structured(model, IMAGE, 0.99, _random, of="parameters", cap=0.99)


def test_least_saliencies_go_first() -> None:
    model = _seeded(ConvNet)
    scores = torch.randperm(18, generator=torch.Generator().manual_seed(2)).double()
    listed = structured_groups(model, IMAGE)
    result = prune_structured(model, IMAGE, 5 / 18, lambda _: scores, cap=0.99)
    expected = {listed.groups[i].coordinates[0].item() for i in scores.argsort()[:5].tolist()}
    assert {g.coordinates[0].item() for g in result.removed} == expected


# ---------------------------------------------------------------- scores and update
def _fisher(size: int) -> Tensor:
    g = torch.Generator().manual_seed(5)
    rows = torch.randn(40, size, generator=g, dtype=F64)
    return rows.T @ rows / 40 + 0.1 * torch.eye(size, dtype=F64)


def test_saliencies_against_the_minimum_over_survivors() -> None:
    """rho_Q is the least of the quadratic with the group at zero: a solve over the others."""
    model = _seeded(ConvNet)
    listed = structured_groups(model, IMAGE)
    space = listed.space
    w = space.join(list(model.parameters()))
    A = _fisher(space.size)
    inverse = torch.linalg.inv(A)
    found = group_saliencies(listed, w, lambda Q: inverse[Q][:, Q])
    for i in (0, 7, 15):
        Q = listed.groups[i].coordinates
        S = torch.ones(space.size, dtype=torch.bool).index_fill(0, Q, False).nonzero()[:, 0]
        step = torch.zeros(space.size, dtype=F64)
        step[Q] = -w[Q]
        step[S] = -torch.linalg.solve(A[S][:, S], A[S][:, Q] @ step[Q])
        torch.testing.assert_close(found[i], step @ A @ step / 2, rtol=1e-9, atol=0)

    class Operator:
        def inverse_submatrix(self, Q: Tensor) -> Tensor:
            return inverse[Q][:, Q]

    assert torch.equal(group_saliencies(listed, w, Operator()), found)  # type: ignore[arg-type]
    d = torch.rand(space.size, generator=torch.Generator().manual_seed(6), dtype=F64) + 0.1
    plain = group_saliencies(listed, w, Diagonal(d))
    dense = group_saliencies(listed, w, lambda Q: torch.diag(1.0 / d[Q]))
    torch.testing.assert_close(plain, dense, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("damping", [1e-1, 1e-6])
def test_saliencies_of_windows_against_dense_inverses(
    dtype: torch.dtype, parts: bool, damping: float
) -> None:
    """Also in float32 with a condition number of 1e6 and more, where ``[F^-1]_QQ`` is no help."""
    from curvlib.operators.mfac_operator import MFAC
    from curvlib.operators.windows.window import Window

    listed = structured_groups(_seeded(ConvNet), IMAGE)
    P = listed.space.size
    cuts = [P // 3, P - P // 3] if parts else [P]
    rows = torch.randn(30, P, generator=torch.Generator().manual_seed(8), dtype=F64).to(dtype)
    w = torch.randn(P, generator=torch.Generator().manual_seed(9), dtype=F64).to(dtype)
    window = Window(P, 30, dtype=dtype, parts=cuts)
    op = MFAC(window, damping=damping, relative=False)
    op.push(rows)
    found = group_saliencies(listed, w, op)
    A = torch.block_diag(*[g.T @ g / 30 for g in rows.double().split(cuts, dim=1)])
    A += damping * torch.eye(P, dtype=F64)
    for i in (0, 8, 16):
        Q = listed.groups[i].coordinates
        S = torch.ones(P, dtype=torch.bool).index_fill(0, Q, False).nonzero()[:, 0]
        schur = A[Q][:, Q] - A[Q][:, S] @ torch.linalg.solve(A[S][:, S], A[S][:, Q])
        expected = w[Q].double() @ schur @ w[Q].double() / 2
        torch.testing.assert_close(found[i], expected, rtol=1e-9 / damping**0.5, atol=0)


def test_compensation_by_the_joint_update() -> None:
    model = _seeded(ConvNet)
    space = ParamSpace.of(model)
    w = space.join(list(model.parameters()))
    A = _fisher(space.size)
    inverse = torch.linalg.inv(A)
    asked: list[Tensor] = []

    def joint(Q: Tensor) -> Tensor:
        asked.append(Q)
        return w - inverse[:, Q] @ torch.linalg.solve(inverse[Q][:, Q], w[Q])

    result = prune_structured(model, IMAGE, 0.4, _random, update=joint)
    Q = torch.cat([g.coordinates for g in result.removed]).unique()
    assert torch.equal(asked[0], Q)
    new = joint(Q)
    small = torch.cat([p.detach().reshape(-1) for p in result.model.parameters()])
    torch.testing.assert_close(small, new[result.kept], rtol=0, atol=0)
    naive = -w.index_fill(0, result.kept, 0.0)
    better = new.index_fill(0, Q, 0.0) - w
    assert better @ A @ better < 0.9 * (naive @ A @ naive)


# -------------------------------------------------------------------------- errors
def test_wrong_arguments() -> None:
    model = _seeded(ConvNet)
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"sparsity= should lie in \[0, 1\), got"):
            prune_structured(model, IMAGE, sparsity, _random)
    with pytest.raises(ValueError, match=r"cap= should lie strictly between 0 and 1, got 1.0"):
        prune_structured(model, IMAGE, 0.5, _random, cap=1.0)
    with pytest.raises(ValueError, match=r"of= is 'channels' or 'parameters', got 'flops'"):
        prune_structured(model, IMAGE, 0.5, _random, of="flops")
    with pytest.raises(
        ValueError, match=r"scores= should return 18 finite numbers, got shape \[3\]"
    ):
        prune_structured(model, IMAGE, 0.5, lambda _: torch.ones(3))
    with pytest.raises(
        ValueError, match=r"update= should return \d+ finite weights, got shape \[2\]"
    ):
        prune_structured(model, IMAGE, 0.5, _random, update=lambda Q: torch.ones(2))
    with pytest.raises(ValueError, match=r"there is no layer 'x'; layers are \['stem'"):
        structured_groups(model, IMAGE, skip=["x"])
    with pytest.raises(ValueError, match=r"heads=\{'head': 5\} should name the linear.*32 inputs"):
        structured_groups(model, IMAGE, heads={"head": 5})
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got int"):
        structured_groups(3, IMAGE)  # type: ignore[arg-type]
    listed = structured_groups(model, IMAGE, skip="inner")
    assert listed.skipped["inner"] == "skip= keeps the channels of 'inner'"
    w = torch.ones(listed.space.size, dtype=F64)
    with pytest.raises(ValueError, match=r"expected weights \[\d+\], got \[2\]"):
        group_saliencies(listed, w[:2], Diagonal(w))
    with pytest.raises(ValueError, match=r"expected curvature of \d+ parameters, got"):
        group_saliencies(listed, w, Diagonal(w[:4]))
    with pytest.raises(TypeError, match=r"curvature= takes a Diagonal, an operator with inverse_s"):
        group_saliencies(listed, w, 3)  # type: ignore[arg-type]


def test_functions_that_depend_on_removed_channels_otherwise_are_noticed() -> None:
    class Mixing(nn.Module):
        def __init__(self, fixed: bool) -> None:
            super().__init__()
            self.fixed = fixed
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h.reshape(-1, 2, 3).reshape(-1, 6) if self.fixed else h / h.shape[1])

    x = torch.ones(2, 3, dtype=F64)
    with pytest.raises(
        RuntimeError, match=r"output differs from the zeroed one's by .*keep those l"
    ):
        prune_structured(_seeded(Mixing, False), x, 0.5, _random)
    with pytest.raises(RuntimeError, match=r"the smaller model cannot run .*keep those layers"):
        prune_structured(_seeded(Mixing, True), x, 1 / 3, _random)


def test_outputs_that_change_their_shape_are_noticed() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.a(x)
            return self.b(h), h

    model, x = _seeded(Both), torch.ones(2, 3, dtype=F64)
    with pytest.raises(
        RuntimeError, match=r"output has shape \[2, 3\], that of the zeroed one \[2, 6"
    ):
        prune_structured(model, x, 0.5, _random)


def test_a_graph_that_removes_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "remove", lambda *_: None)
    with pytest.raises(
        RuntimeError, match=r"torch-pruning removed other parameters than the groups"
    ):
        prune_structured(_seeded(ConvNet), IMAGE, 0.5, _random)


def test_absent_library_is_named_with_the_line_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'curvlib\[structured\]'"):
        structured_groups(nn.Linear(2, 2), torch.ones(1, 2))
