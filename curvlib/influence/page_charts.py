r"""Charts of influence as inline SVG and tables: a histogram with its tails, and bars of layers.

The histogram knows a uniform sample of all scores, and the highest and lowest exactly. So its two
tails are exact counts, and what lies between the last proponent and the last opponent that were
kept is the sample's, scaled to the number of examples that are there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlib.influence.page_contents import escaped, signed

if TYPE_CHECKING:
    from curvlib.influence.result import TopInfluence

#: Bars of a histogram.
BINS = 60
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720.0, 190.0, 52.0, 40.0, 12.0
#: Layers that the small charts name in words.
NAMED = 6


@dataclass(frozen=True, eq=False)
class Histogram:
    """Numbers of examples by score.

    Attributes:
        edges: ``[BINS + 1]``.
        counts: All examples, ``[BINS]``: exact, or scaled up from a sample between the tails.
        high: Proponents that were kept, ``[BINS]``.
        low: Opponents that were kept, ``[BINS]``.
        exact: Whether nothing was scaled.
    """

    edges: Tensor
    counts: Tensor
    high: Tensor
    low: Tensor
    exact: bool


def histogram(top: TopInfluence, query: int, bins: int = BINS) -> Histogram:
    """The histogram of one query's scores: exact tails, and a sample between."""
    kept: dict[int, float] = {}
    for indices, scores in (
        (top.bottom_indices[query], top.bottom_scores[query]),
        (top.indices[query], top.scores[query]),
    ):
        kept |= dict(zip(indices.tolist(), scores.double().tolist(), strict=True))
    held = torch.tensor(list(kept.values()), dtype=torch.float64)
    sample = top.sample[query].double()
    above, below = _ends(top.scores[query]), _ends(top.bottom_scores[query])
    last, first = above[0], below[1]  # of the proponents the lowest, of the opponents the highest
    between = sample[(sample > first) & (sample < last)]
    rest = top.examples - len(kept)
    if not len(between) and rest > 0:  # ties with the last that was kept
        between = sample[(sample >= first) & (sample <= last)]
    everything = torch.cat([held, between])
    low, high = float(everything.min()), float(everything.max())
    if high <= low:
        pad = abs(low) or 1.0
        low, high = low - pad, high + pad
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)

    def counted(values: Tensor) -> Tensor:
        places = ((values - low) / (high - low) * bins).long().clamp(0, bins - 1)
        return torch.bincount(places, minlength=bins).double()

    each = rest / len(between) if rest > 0 and len(between) else 0.0
    return Histogram(
        edges=edges,
        counts=counted(held) + each * counted(between),
        high=counted(top.scores[query].double()),
        low=counted(top.bottom_scores[query].double()),
        exact=rest <= 0 or len(between) == rest,
    )


def _ends(scores: Tensor) -> tuple[float, float]:
    """The lowest and the highest; infinite where there is none."""
    if not len(scores):
        return math.inf, -math.inf
    return float(scores.min()), float(scores.max())


def histogram_svg(found: Histogram, label: str, unit: str) -> str:
    """The histogram, its counts on a logarithmic axis.

    Args:
        found: The counts.
        label: What it shows, for those who do not see it.
        unit: Words below the axis.
    """
    largest = max(float(found.counts.max()), 1.0)
    decades = math.floor(math.log10(largest))
    floor = math.log10(0.6)  # below one example
    span = max(math.log10(largest), 0.5) - floor
    plot, bottom = _HEIGHT - _BOTTOM - _TOP, _HEIGHT - _BOTTOM
    low, high = float(found.edges[0]), float(found.edges[-1])

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - 10.0)

    def tall(count: float) -> float:
        return plot * max(math.log10(max(count, 1.0)) - floor, 0.0) / span

    size = f'viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}"'
    parts = [f'<svg class="histogram" {size} role="img" aria-label="{escaped(label)}">']
    for power in range(decades + 1):
        y = bottom - tall(10.0**power)
        parts.append(
            f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - 10:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" text-anchor="end" x="{_LEFT - 6:g}" y="{y + 4:.1f}">'
            f"{10**power:,}</text>"
        )
    wide = (_WIDTH - _LEFT - 10.0) / len(found.counts)
    for kind, counts in (("all", found.counts), ("up", found.high), ("down", found.low)):
        for place, count in enumerate(counts.tolist()):
            if count > 0.0:
                left, height = x(float(found.edges[place])), tall(count)
                parts.append(
                    f'<rect class="{kind}" x="{left + 0.5:.1f}" y="{bottom - height:.1f}" '
                    f'width="{wide - 1:.1f}" height="{height:.1f}"/>'
                )
    parts += [
        f'<line class="axis" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{bottom:g}" '
        f'y2="{bottom + 4:g}"/><text class="tick" text-anchor="middle" x="{x(value):.1f}" '
        f'y="{bottom + 16:g}">{signed(value) if value else "0"}</text>'
        for value in ticks(low, high)
    ]
    parts.append(
        f'<line class="axis" x1="{_LEFT:g}" x2="{_WIDTH - 10:g}" y1="{bottom:g}" y2="{bottom:g}"/>'
        f'<text class="tick" text-anchor="middle" x="{(_LEFT + _WIDTH) / 2:g}" '
        f'y="{_HEIGHT - 6:g}">score ({escaped(unit)})</text>'
        f'<text class="tick" text-anchor="middle" transform="rotate(-90)" '
        f'x="{-(_TOP + plot / 2):g}" y="10">examples</text></svg>'
    )
    return "".join(parts)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers within a range.

    Example:
        >>> ticks(-1.3, 2.2)
        [-1.0, 0.0, 1.0, 2.0]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1.0, 2.0, 5.0, 10.0) if s * power >= rough)
    start = math.ceil(low / step - 1e-9)
    return [i * step for i in range(start, math.floor(high / step + 1e-9) + 1)]


def layers_table(layers: Sequence[str], high: Tensor | None, low: Tensor | None) -> str:
    """Sums of the parts of each layer over the proponents and over the opponents.

    Args:
        layers: Names, ``B``.
        high: Parts of proponents, ``[k, B]``.
        low: Parts of opponents, ``[k, B]``.
    """
    sides = [part.double().sum(0) for part in (high, low) if part is not None and len(part)]
    if not sides:
        return ""
    largest = max(float(side.abs().max()) for side in sides) or 1.0
    rows = []
    for place, name in enumerate(layers):
        cells = "".join(_bar(float(side[place]), largest) for side in sides)
        rows.append(f'<tr><th scope="row">{escaped(name)}</th>{cells}</tr>')
    names = [n for n, part in (("proponents", high), ("opponents", low)) if part is not None]
    heads = "".join(f'<th scope="col" colspan="2">{name}</th>' for name in names[: len(sides)])
    return (
        '<div class="scroll" tabindex="0"><table class="layers"><thead><tr><th scope="col">layer'
        f"</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _bar(value: float, largest: float) -> str:
    share = 50.0 * min(abs(value) / largest, 1.0)
    left = 50.0 if value >= 0.0 else 50.0 - share
    kind = "up" if value >= 0.0 else "down"
    return (
        f'<td class="number">{signed(value)}</td><td class="track"><span class="{kind}" '
        f'style="margin-left:{left:.1f}%;width:{share:.1f}%"></span></td>'
    )


def layers_svg(layers: Sequence[str], parts: Tensor) -> str:
    """A small chart for one example: a bar for each layer, up or down, in the model's order.

    Args:
        layers: Names, ``B``.
        parts: Its parts, ``[B]``.
    """
    values = parts.double().tolist()
    largest = max((abs(v) for v in values), default=0.0) or 1.0
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:NAMED]
    said = ", ".join(f"{layers[i]} {signed(values[i])}" for i in order)
    more = f", and {len(values) - NAMED} smaller" if len(values) > NAMED else ""
    step = max(3.0, min(10.0, 240.0 / max(1, len(values))))
    width = step * len(values)
    bars = []
    for place, value in enumerate(values):
        height = 14.0 * abs(value) / largest
        y = 15.0 - height if value >= 0.0 else 15.0
        bars.append(
            f'<rect class="{"up" if value >= 0.0 else "down"}" x="{place * step:.4g}" '
            f'y="{y:.3g}" width="{step - 1:.3g}" height="{height:.3g}"/>'
        )
    text = escaped(f"parts of layers: {said}{more}")
    return (
        f'<svg class="parts" viewBox="0 0 {width:g} 30" width="{width:g}" height="30" role="img" '
        f'aria-label="{text}"><title>{text}</title>{"".join(bars)}'
        f'<line class="axis" x1="0" x2="{width:g}" y1="15" y2="15"/></svg>'
    )
