"""One HTML file that shows proponents and opponents of queries to a person.

The file is whole in itself: it loads nothing, runs nothing (its own security policy forbids both),
and can be sent by mail. See :meth:`curvlib.influence.result.TopInfluence.to_html`.
"""

from __future__ import annotations

import datetime as dt
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.core.files import atomic_write, curvlib_version
from curvlib.influence.page_charts import histogram, histogram_svg, layers_svg, layers_table
from curvlib.influence.page_contents import content, escaped, excerpt, item, signed, tokens_of
from curvlib.influence.page_png import is_image
from curvlib.influence.page_style import STYLE

if TYPE_CHECKING:
    from curvlib.influence.result import TopInfluence

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_UNITS = {
    "inner_product": "Scores are inner products of gradients, of a query and of a training example "
    "(summed losses), in the metric of the damped inverse curvature.",
    "nats": "Scores are the predicted rise of the query's summed loss, in nats, if the training "
    "example is removed and the model trained again.",
    "normalized": "Scores are inner products of gradients in the metric of the damped inverse "
    "curvature, divided by a norm of the training example's gradient.",
}


@dataclass(frozen=True, eq=False)
class Contents:
    """What examples are. Each is a sequence, a mapping or a function of an example's number.

    An item is a string, a list of strings (one for each token that has a score), an image
    (``[H, W]``, ``[C, H, W]`` or ``[H, W, C]``), or numbers; a caption is a string.

    Attributes:
        queries: The queries.
        train: The training examples.
        query_captions: A line on each query: its label, what the model said.
        captions: A line on each training example.
    """

    queries: Any = None
    train: Any = None
    query_captions: Any = None
    captions: Any = None


@dataclass(frozen=True, eq=False)
class Side:
    """Proponents or opponents of one query.

    Attributes:
        name: ``"proponents"`` or ``"opponents"``.
        query: Which query.
        indices: Numbers of the examples, ``[k]``.
        scores: Their scores.
        layers: Parts of layers, ``[k, B]``, or ``None``.
        tokens: Parts of tokens, ``[k, T]``, or ``None``.
        counts: Tokens of each, or ``None``.
    """

    name: str
    query: int
    indices: Tensor
    scores: Tensor
    layers: Tensor | None
    tokens: Tensor | None
    counts: Tensor | None


@dataclass(frozen=True, eq=False)
class Page:
    """The page of a result.

    Attributes:
        top: The result.
        contents: What its examples are.
        title: The heading.
        shown: Proponents and opponents of each query that are shown whole; others are listed.
        provenance: More lines for the table at the end, by name.
        date: When it was made; now when omitted.

    Example:
        >>> import curvlib as cl
        >>> model, x = torch.nn.Linear(1, 1), torch.ones(3, 1)
        >>> risk = cl.Risk(model, torch.nn.MSELoss(), (x, x))
        >>> from curvlib.influence.influence import Influence
        >>> top = Influence.of(risk, "identity", progress=False).top((x[:1], x[:1]), k=1)
        >>> "the first" in Page(top, Contents(train=["the first", "the second", "..."])).html()
        True
    """

    top: TopInfluence
    contents: Contents
    title: str = "Influence"
    shown: int = 10
    provenance: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None

    def html(self) -> str:
        """The whole page.

        Raises:
            TypeError: If the content of an example is none that can be shown.
            ValueError: If one is missing, or ``shown`` is not positive.
        """
        if type(self.shown) is not int or self.shown < 1:
            raise ValueError(f"shown= is a number of at least 1, got {self.shown!r}")
        count = len(self.top.indices)
        sections = "".join(self._query(q) for q in range(count))
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escaped(self.title)}</title><style>{STYLE}</style></head>\n<body>"
            f'<header id="start">{self._header(count)}</header>\n{self._index(count)}\n'
            f"<main>{sections}</main>\n<footer>{self._provenance()}</footer></body></html>\n"
        )

    def _header(self, count: int) -> str:
        top = self.top
        kind = "relative" if top.relative else "absolute"
        facts = f"{_many(count, 'query', 'queries')}, {_many(top.examples, 'training example')}"
        colours = (
            '<span class="upper">Blue</span> is positive, a proponent: without it, the loss on the '
            'query would be higher. <span class="downer">Orange</span> is negative, an opponent: '
            "without it, the loss would be lower."
        )
        legend = ""
        if top.per_layer is not None:
            legend = (
                '<p class="legend"><span>Small bars: parts of the score by layer, first to last, '
                "positive upwards (point at them for names and numbers)</span></p>"
            )
        if top.per_token is not None and top.per_token.shape[2] > 1:
            legend += (
                '<p class="legend"><span>Shade of a token: its part of the score <span '
                'class="downer">−</span><span class="ramp" role="img" aria-label="from orange, '
                'negative, to blue, positive"></span><span class="upper">+</span> (deepest: the '
                "largest part within that example; point at a token for its number)</span></p>"
            )
        return (
            f"<h1>{escaped(self.title)}</h1><p>{facts}; {escaped(top.curvature)} curvature, "
            f"damping {top.damping:g} ({kind}).</p>"
            f"<p>{colours} {_UNITS.get(top.unit, escaped(top.unit))}</p>{legend}"
        )

    def _index(self, count: int) -> str:
        if count < 2:
            return ""
        links = []
        for q in range(count):
            value = item(self.contents.queries, q, "queries")
            words = [self._caption(self.contents.query_captions, q, "query_captions")]
            words.append(excerpt(value))
            image = content(value, f"query {q}") if is_image(value) else ""
            text = " · ".join(w for w in (f"<b>{q}</b>", *words) if w)
            links.append(f'<li><a href="#query-{q}">{image}<span>{text}</span></a></li>')
        return f'<nav aria-label="queries"><h2>Queries</h2><ol>{"".join(links)}</ol></nav>'

    def _query(self, q: int) -> str:
        top = self.top
        sides = (
            Side(
                "proponents",
                q,
                top.indices[q],
                top.scores[q],
                *_rows(q, top.per_layer, top.per_token, top.token_counts),
            ),
            Side(
                "opponents",
                q,
                top.bottom_indices[q],
                top.bottom_scores[q],
                *_rows(q, top.bottom_per_layer, top.bottom_per_token, top.bottom_token_counts),
            ),
        )
        value = item(self.contents.queries, q, "queries")
        caption = self._caption(self.contents.query_captions, q, "query_captions")
        shown = content(value, f"query {q}") if value is not None else ""
        said = f'<p class="caption">{caption}</p>' if caption else ""
        asked = f'<div class="query">{said}{shown}</div>' if said or shown else ""
        back = '<a class="back" href="#start">to the top</a>' if len(top.indices) > 1 else ""
        columns = "".join(self._side(side) for side in sides if len(side.indices))
        return (
            f'<section id="query-{q}" aria-labelledby="title-{q}">{back}<h2 id="title-{q}">Query '
            f'{q}</h2>{asked}<div class="overview">{self._histogram(q)}'
            f'{self._layers(sides)}</div><div class="sides">{columns}</div></section>\n'
        )

    def _histogram(self, q: int) -> str:
        top = self.top
        found = histogram(top, q)
        mean, std = float(top.mean[q]), float(top.std[q])
        best = float(top.scores[q, 0]) if top.scores.shape[1] else mean
        far = f"; the highest is {(best - mean) / std:.3g} of these above" if std > 0.0 else ""
        scores = _many(top.examples, "score")
        text = f"{scores}: mean {signed(mean)}, standard deviation {signed(std)[1:]}{far}."
        how = (
            ""
            if found.exact
            else (f" Grey bars are estimated from a random sample of {top.sample.shape[1]:,}.")
        )
        chart = histogram_svg(found, f"Histogram of {text}", top.unit.replace("_", " "))
        return (
            f"<figure>{chart}<figcaption>{text} In colour: what is listed below, counted exactly."
            f"{how}</figcaption></figure>"
        )

    def _layers(self, sides: tuple[Side, Side]) -> str:
        table = layers_table(self.top.layers, sides[0].layers, sides[1].layers)
        if not table:
            return ""
        counts = " and ".join(f"the {len(s.indices)} {s.name}" for s in sides if len(s.indices))
        caption = f"Parts of layers, summed over {counts}."
        return f"<figure>{table}<figcaption>{caption}</figcaption></figure>"

    def _side(self, side: Side) -> str:
        scores = tokens_of(side.tokens, side.counts)
        largest = float(side.scores.abs().max()) or 1.0
        cards, images = [], False
        for rank in range(min(self.shown, len(side.indices))):
            number = int(side.indices[rank])
            value = item(self.contents.train, number, "train")
            images = images or is_image(value)
            cards.append(self._card(side, rank, value, scores(rank), largest))
        kind = "cards tiles" if images else "cards"
        word = "Proponents" if side.name == "proponents" else "Opponents"
        listed = f'<ol class="{kind}">{"".join(cards)}</ol>'
        return f"<div><h3>{word}</h3>{listed}{self._others(side)}</div>"

    def _card(
        self, side: Side, rank: int, value: Any, tokens: list[float] | None, largest: float
    ) -> str:
        number, score = int(side.indices[rank]), float(side.scores[rank])
        kind, colour = ("up", "upper") if score >= 0.0 else ("down", "downer")
        caption = self._caption(self.contents.captions, number, "captions")
        said = f'<p class="caption">{caption}</p>' if caption else ""
        shown = content(value, f"training example {number}", tokens) if value is not None else ""
        parts = layers_svg(self.top.layers, side.layers[rank]) if side.layers is not None else ""
        return (
            f'<li class="card"><div class="head"><span>{rank + 1}. example {number}</span>'
            f'<b class="score {colour}">{signed(score)}</b></div><div class="meter"><span '
            f'class="{kind}" style="width:{100.0 * abs(score) / largest:.1f}%"></span></div>'
            f"{said}{shown}{parts}</li>"
        )

    def _others(self, side: Side) -> str:
        """The ranks below those that are shown, as a table that opens."""
        first, last = self.shown, len(side.indices)
        if first >= last:
            return ""
        rows = []
        for rank in range(first, last):
            number = int(side.indices[rank])
            words = [self._caption(self.contents.captions, number, "captions")]
            words.append(excerpt(item(self.contents.train, number, "train")))
            rows.append(
                f"<tr><td>{rank + 1}</td><td>{number}</td><td class=number>"
                f"{signed(float(side.scores[rank]))}</td><td>{' · '.join(filter(None, words))}</td>"
                "</tr>"
            )
        return (
            f'<details><summary>ranks {first + 1} to {last}</summary><div class="scroll" '
            'tabindex="0"><table><thead><tr><th scope="col">rank</th><th scope="col">example</th>'
            '<th scope="col" class="number">score</th><th scope="col"></th></tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div></details>"
        )

    def _caption(self, source: Any, index: int, name: str) -> str:
        found = item(source, index, name)
        return "" if found is None else escaped(str(found))

    def _provenance(self) -> str:
        rows = "".join(
            f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(value)}</td></tr>'
            for name, value in self._facts()
        )
        return (
            '<section aria-labelledby="provenance"><h2 id="provenance">Where this comes from</h2>'
            f'<table class="provenance"><tbody>{rows}</tbody></table></section>'
        )

    def _facts(self) -> Iterator[tuple[str, str]]:
        top = self.top
        now = dt.datetime.now(dt.timezone.utc)
        yield from ((str(name), str(value)) for name, value in self.provenance.items())
        yield "curvature", top.curvature
        kind = "of the mean eigenvalue" if top.relative else "absolute"
        yield "damping", f"{top.damping:g} ({kind})"
        yield "unit", top.unit.replace("_", " ")
        yield "sign", top.sign
        yield "training examples", f"{top.examples:,}"
        yield "queries", f"{len(top.indices):,}"
        yield "layers", ", ".join(top.layers)
        if top.settings.get("rank") is not None or top.settings.get("tolerance") is not None:
            how = "found with compressed query gradients"
            again = ", then scored and ranked again without compression" if top.rescored else ""
            yield "scores", how + again
        given = [f"{n}={v!r}" for n, v in sorted(top.settings.items()) if v is not None]
        yield "settings", ", ".join(given)
        software = {"curvlib": curvlib_version(), "torch": torch.__version__}
        software["Python"] = platform.python_version()
        yield "versions", ", ".join(f"{name} {version}" for name, version in software.items())
        yield "date", self.date or f"{now:%Y-%m-%d %H:%M} UTC"

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page; the file appears whole or not at all.

        Raises:
            OSError: If the file cannot be written.
            TypeError: As :meth:`html`, as
            ValueError: this.
        """
        text = self.html()
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return Path(path)


def _rows(q: int, *tensors: Tensor | None) -> Iterator[Tensor | None]:
    return (None if tensor is None else tensor[q] for tensor in tensors)


def _many(count: int, one: str, more: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else more or one + 's'}"
