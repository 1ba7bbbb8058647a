"""The page of influence: whole, harmless, and with the numbers of the result."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlib.influence.page import Contents, Page
from curvlib.influence.page_charts import histogram, ticks
from curvlib.influence.page_contents import content, escaped, excerpt, signed
from curvlib.influence.page_png import SIDE, data_address, is_image, pixels
from curvlib.influence.result import SIGN, TopInfluence

VOID = {"meta", "img", "line", "rect", "br"}
EVIL = '</div><script>alert("x")</script> & \x00\x1b\u202e<img src=http://evil>\ud800'


class Parsed(HTMLParser):
    """Elements, their attributes and texts; raises where a tag closes another one."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def having(self, kind: str) -> list[dict[str, str | None]]:
        """Attributes of elements of a class."""
        return [own for _, own in self.elements if kind in (own.get("class") or "").split()]

    @property
    def text(self) -> str:
        return "".join(self.texts)


def ranked(scores: Tensor, k: int, bottom: int, **changes: Any) -> TopInfluence:
    """What a search of all scores ``[Q, N]`` finds, by sorting."""
    high = scores.sort(dim=1, descending=True, stable=True)
    low = scores.sort(dim=1, stable=True)
    out = TopInfluence(
        indices=high.indices[:, :k],
        scores=high.values[:, :k],
        per_layer=None,
        per_token=None,
        token_counts=None,
        bottom_indices=low.indices[:, :bottom],
        bottom_scores=low.values[:, :bottom],
        bottom_per_layer=None,
        bottom_per_token=None,
        bottom_token_counts=None,
        layers=("first", "second"),
        mean=scores.double().mean(1),
        std=scores.double().std(1, correction=0),
        sample=scores[:, torch.randperm(scores.shape[1], generator=seeded())[:1024]],
        sample_keys=torch.arange(min(scores.shape[1], 1024)),
        examples=scores.shape[1],
        rescored=False,
        unit="nats",
        sign=SIGN,
        curvature="EK-FAC",
        damping=0.1,
        relative=True,
        settings={"k": k, "bottom": bottom, "rank": None, "tolerance": None},
    )
    return replace(out, **changes)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded())


def page(top: TopInfluence, path: Path, **settings: Any) -> Parsed:
    assert top.to_html(path / "influence.html", date="today", **settings).name == "influence.html"
    return Parsed((path / "influence.html").read_text(encoding="utf-8"))


# ------------------------------------------------------------------- the whole page
def test_every_proponent_and_opponent_is_there_with_its_score(tmp_path: Path) -> None:
    top = ranked(draw(2, 40), 3, 2)
    found = page(top, tmp_path, train=[f"text of {n}" for n in range(40)], title="My page")
    for q in range(2):
        for indices, scores in (
            (top.indices[q], top.scores[q]),
            (top.bottom_indices[q], top.bottom_scores[q]),
        ):
            for rank, (n, score) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True)):
                assert f"{rank + 1}. example {n}{signed(score)}text of {n}" in found.text
    assert len(found.having("card")) == 2 * (3 + 2)
    assert found.text.count("My page") == 2  # title and heading
    assert "2 queries, 40 training examples" in found.text
    assert "EK-FAC curvature, damping 0.1 (relative)" in found.text
    for fact in (SIGN, "k=3", "curvlib ", f"torch {torch.__version__}", "today"):
        assert fact in found.text


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path) -> None:
    images = torch.rand(40, 3, 8, 8, generator=seeded())
    found = page(ranked(draw(2, 40), 3, 3), tmp_path, train=images, queries=[EVIL, EVIL])
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "video"}
    for _, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            where = attributes.get(name)
            assert where is None or where.startswith(("#", "data:image/png;base64,"))
    style = "".join(found.texts)
    assert not re.search(r"url\(|@import|https?://(?!evil)", style)
    policies = [own.get("content") for _, own in found.elements if "http-equiv" in own]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_all_text_of_users_is_escaped(tmp_path: Path) -> None:
    scores = draw(1, 4)
    tokens = [EVIL, "<b>", '"']
    top = ranked(
        scores,
        2,
        2,
        per_token=torch.tensor([[[1.0, -2.0, 3.0]] * 2]),
        token_counts=torch.full((1, 2), 3),
        per_layer=torch.ones(1, 2, 2),
        layers=(EVIL, "b"),
        curvature=EVIL,
        unit=EVIL,
        sign=EVIL,
        settings={"rank": None, "tolerance": None, EVIL: EVIL},
    )
    plain = page(ranked(scores, 2, 2, per_layer=torch.ones(1, 2, 2)), tmp_path, train=["a"] * 4)
    found = page(
        top,
        tmp_path,
        train=[tokens] * 4,
        queries=[EVIL],
        captions=[EVIL] * 4,
        query_captions=[EVIL],
        title=EVIL,
        provenance={EVIL: EVIL},
    )
    kinds = {tag for tag, _ in found.elements}
    assert kinds == {tag for tag, _ in plain.elements}  # no element that the page does not write
    for hidden in ("\x00", "\x1b", "\u202e"):
        assert hidden not in found.text
    assert found.text.count("alert") > 10


@given(st.text())
@settings(deadline=None, max_examples=60)
def test_escaped_text_is_read_back(text: str) -> None:
    found = Parsed(f"<p>{escaped(text)}</p>")
    assert [tag for tag, _ in found.elements] == ["p"]
    visible = "".join(c for c in text if c.isalnum() or c in " <>&\"'\n\t")
    kept = "".join(c for c in found.text if c.isalnum() or c in " <>&\"'\n\t")
    assert kept == visible.replace("\r\n", "\n")


def test_many_queries_have_an_index_and_anchors(tmp_path: Path) -> None:
    count = 120
    found = page(ranked(draw(count, 30), 2, 1), tmp_path, queries=lambda q: f"query text {q}")
    ids = [own["id"] for _, own in found.elements if "id" in own]
    assert len(ids) == len(set(ids))
    links = [own["href"] for tag, own in found.elements if tag == "a"]
    assert {f"#query-{q}" for q in range(count)} < set(links)
    assert all((link or "")[1:] in ids for link in links)
    assert "7 · query text 7" in found.text


def test_one_query_needs_no_index(tmp_path: Path) -> None:
    found = page(ranked(draw(1, 5), 1, 1), tmp_path)
    assert not [tag for tag, _ in found.elements if tag in ("a", "nav")]


def test_without_contents_opponents_layers_and_tokens(tmp_path: Path) -> None:
    found = page(ranked(draw(1, 5), 2, 0), tmp_path)
    assert len(found.having("card")) == 2
    assert "Opponents" not in found.text
    assert "Parts of layers" not in found.text
    assert "Shade of a token" not in found.text


def test_scores_that_are_all_zero(tmp_path: Path) -> None:
    found = page(ranked(torch.zeros(1, 5), 2, 2, per_layer=torch.zeros(1, 2, 2)), tmp_path)
    assert "5 scores: mean +0, standard deviation 0." in found.text


def test_ranks_below_those_shown_are_listed(tmp_path: Path) -> None:
    top = ranked(draw(1, 30), 9, 4)
    found = page(top, tmp_path, shown=4, train=[f"line\n{n}" for n in range(30)])
    assert len(found.having("card")) == 8
    assert "ranks 5 to 9" in found.text
    assert "ranks 5 to 4" not in found.text
    n, score = int(top.indices[0, 6]), signed(float(top.scores[0, 6]))
    assert f"7{n}{score}line {n}" in found.text


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    top = ranked(draw(2, 30), 3, 3)
    pages = [Page(top, Contents(), date="now").html() for _ in range(2)]
    assert pages[0] == pages[1]
    assert "UTC" in Page(top, Contents()).html()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"train": ["only one"]}, ValueError, r"train= has nothing for example \d+, it has 1"),
        ({"queries": {}}, ValueError, "queries= has nothing for example 0, it has 0; pass all"),
        ({"captions": [""]}, ValueError, r"captions= has nothing for example \d+"),
        (
            {"train": lambda n: object()},
            TypeError,
            "a list of tokens, an image or numbers, got obj",
        ),
        ({"shown": 0}, ValueError, "shown= is a number of at least 1, got 0"),
    ],
)
def test_contents_that_are_none(
    tmp_path: Path, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ranked(draw(1, 20), 5, 5).to_html(tmp_path / "page.html", **given)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------- texts
def shades(found: Parsed) -> list[tuple[str, float, str]]:
    out = []
    for tag, own in found.elements:
        if tag == "span" and (own.get("style") or "").startswith("--a:"):
            shade = float((own["style"] or "")[4:])
            out.append((own["class"] or "", shade, own["title"] or ""))
    return out


def test_tokens_are_shaded_by_sign_and_size() -> None:
    found = Parsed(content(["one ", "two ", "three ", "four"], "", [2.0, -1.0, 0.01, 0.0]))
    assert shades(found) == [("u", 0.72, "+2"), ("d", 0.36, "−1")]
    assert found.text == "one two three four"


def test_characters_are_the_tokens_of_a_string_with_as_many_scores() -> None:
    assert len(shades(Parsed(content("abc", "", [1.0, 1.0, -1.0])))) == 3
    assert not shades(Parsed(content("abc", "", [1.0, -1.0])))
    assert not shades(Parsed(content("abc", "")))


def test_tokens_without_a_score_and_lines() -> None:
    found = Parsed(content(["a", "\n", "", "tail"], "", [1.0, -1.0, 1.0]))
    assert found.text == "a↵\n∅tail"
    assert not shades(Parsed(content(["a", "b"], "", [0.0, float("nan")])))


def test_padding_is_not_shaded(tmp_path: Path) -> None:
    top = ranked(
        draw(1, 3),
        1,
        1,
        per_token=torch.tensor([[[1.0, 2.0, 9.0]]]),
        token_counts=torch.tensor([[2]]),
        bottom_per_token=torch.tensor([[[-1.0, 0.5, 0.25]]]),
        bottom_token_counts=torch.tensor([[3]]),
    )
    found = page(top, tmp_path, train=[["a", "b"], ["a", "b"], ["a", "b"]])
    assert [shade[2] for shade in shades(found)] == ["+1", "+2", "−1", "+0.5"]
    assert "Shade of a token" in found.text


def test_excerpts_are_one_line() -> None:
    assert excerpt("a\n  b <c>") == "a b &lt;c&gt;"
    assert excerpt(["to", "kens"]) == "tokens"
    assert excerpt("x" * 100) == "x" * 59 + "…"
    assert excerpt(torch.ones(3)) == ""


def test_numbers() -> None:
    assert Parsed(content(torch.tensor([0.5, -2.0]), "")).text == "0.5, −2"
    assert Parsed(content(3, "")).text == "3"
    assert Parsed(content(list(range(20)), "")).text.endswith("11, … (20 numbers)")


# ------------------------------------------------------------------- images
def decoded(address: str) -> np.ndarray[Any, Any]:
    """The pixels, 0 to 255, as another reader of PNG sees them."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    return np.rint(255.0 * np.asarray(matplotlib.image.imread(io.BytesIO(data), format="png")))


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (5, 7, 1), (3, 5, 7), (5, 7, 3)])
def test_images_are_read_back(shape: tuple[int, ...]) -> None:
    image = torch.randint(0, 256, shape, generator=seeded(), dtype=torch.uint8)
    expected = image.movedim(0, 2) if shape[0] in (1, 3) else image
    found = decoded(data_address(image))
    assert np.array_equal(found, expected.squeeze(-1).numpy() if 1 in shape else expected.numpy())
    assert np.array_equal(decoded(data_address(image.numpy())), found)


def test_ranges_of_floating_point_images() -> None:
    assert pixels(torch.tensor([[0.0, 0.5]]))[..., 0].tolist() == [[0, 128]]
    assert pixels(torch.tensor([[-1.0, 1.0]]))[..., 0].tolist() == [[0, 255]]
    assert pixels(torch.tensor([[5.0, 5.0]]))[..., 0].tolist() == [[0, 0]]
    odd = torch.tensor([[float("nan"), 1.0, float("inf")]])
    assert pixels(odd)[..., 0].tolist() == [[128, 255, 255]]


def test_large_images_are_averaged_down() -> None:
    image = torch.zeros(2 * SIDE, 2 * SIDE)
    image[::2] = 1.0
    small = pixels(image)
    assert small.shape == (SIDE, SIDE, 1)
    assert small.unique().tolist() == [128]


def test_what_is_no_image() -> None:
    assert is_image(torch.ones(2, 2))
    for value in (torch.ones(4), torch.ones(1, 4), torch.ones(2, 4, 4), "text", [[1.0]]):
        assert not is_image(value)
    with pytest.raises(ValueError, match=r"expected an image of shape .* got \[2, 4, 4\]"):
        data_address(torch.ones(2, 4, 4))


def test_images_have_words(tmp_path: Path) -> None:
    top = ranked(draw(1, 6), 2, 2)
    found = page(top, tmp_path, train=torch.rand(6, 8, 8, generator=seeded()))
    words = [own["alt"] for tag, own in found.elements if tag == "img"]
    both = [*top.indices[0].tolist(), *top.bottom_indices[0].tolist()]
    assert words == [f"training example {n}" for n in both]


# ------------------------------------------------------------------- charts
@pytest.mark.parametrize(
    ("count", "k", "bottom"), [(600, 20, 10), (8, 8, 8), (9, 5, 0), (50, 1, 3)]
)
def test_a_histogram_that_knows_all_scores_is_exact(count: int, k: int, bottom: int) -> None:
    scores = draw(2, count).double() ** 3
    found = histogram(ranked(scores, k, bottom), 1)
    expected, edges = np.histogram(scores[1].numpy(), bins=60)
    assert found.exact
    assert np.allclose(found.edges.numpy(), edges)
    assert np.array_equal(found.counts.numpy(), expected)
    assert found.high.sum() == k
    assert found.low.sum() == bottom


def test_a_histogram_from_a_sample_has_exact_tails() -> None:
    scores = draw(1, 20_000).double()
    top = ranked(scores, 50, 50)
    found = histogram(top, 0)
    expected, edges = np.histogram(scores[0].numpy(), bins=60)
    assert not found.exact
    assert np.allclose(found.edges.numpy(), edges)
    assert float(found.counts.sum()) == pytest.approx(20_000)
    inside = (edges[:-1] > float(top.bottom_scores[0, -1])) & (edges[1:] < float(top.scores[0, -1]))
    first, last = inside.argmax(), len(inside) - inside[::-1].argmax()
    assert np.array_equal(found.counts.numpy()[last + 1 :], expected[last + 1 :])
    assert np.array_equal(found.counts.numpy()[: first - 1], expected[: first - 1])
    # between them, each count is within six standard errors of a sample of 1,024
    share = expected / 20_000
    error = 20_000 * np.sqrt(share * (1 - share) / 1024) + 20_000 / 1024
    assert (np.abs(found.counts.numpy() - expected) < 6 * error).all()


def test_ties_are_counted() -> None:
    found = histogram(ranked(torch.zeros(1, 40), 3, 3), 0)
    assert float(found.counts.sum()) == 40.0
    assert float(found.counts.max()) == 40.0


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width)
    slack = 1e-6 * width
    assert 2 <= len(found) <= 8
    assert all(low - slack <= tick <= low + width + slack for tick in found)


def test_bars_of_layers_are_sums_over_what_is_kept(tmp_path: Path) -> None:
    parts = draw(1, 3, 2)
    top = ranked(draw(1, 9), 3, 2, per_layer=parts, bottom_per_layer=-parts[:, :2])
    found = page(top, tmp_path)
    for i, name in enumerate(top.layers):
        high = signed(float(parts[0, :, i].double().sum()))
        low = signed(float(-parts[0, :2, i].double().sum()))
        assert f"{name}{high}{low}" in found.text
    labels = [own["aria-label"] or "" for own in found.having("parts")]
    assert len(labels) == 5
    assert f"second {signed(float(parts[0, 0, 1]))}" in labels[0]
    assert "summed over the 3 proponents and the 2 opponents" in found.text


def test_many_layers_are_told_in_short(tmp_path: Path) -> None:
    layers = tuple(f"block.{i}" for i in range(100))
    top = ranked(draw(1, 5), 1, 0, per_layer=draw(1, 1, 100), layers=layers)
    found = page(top, tmp_path)
    label = found.having("parts")[0]["aria-label"] or ""
    assert "Small bars: parts of the score by layer" in found.text
    assert label.endswith("and 94 smaller")


def test_compressed_scores_say_so(tmp_path: Path) -> None:
    rank = {"k": 1, "rank": 4, "tolerance": None}
    found = page(ranked(draw(1, 5), 1, 1, settings=rank, rescored=True), tmp_path)
    assert "found with compressed query gradients, then scored and ranked again" in found.text
