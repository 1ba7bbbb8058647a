"""What an example is, as HTML: text whose tokens are shaded by their scores, an image, or numbers.

All text comes from data that nobody has vetted. It passes through :func:`escaped` alone: markup
becomes text, characters that would not show become pictures of themselves, and each content is
isolated from the writing direction of the page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.influence.page_png import data_address, is_image

#: Numbers of an example that is neither text nor image, and is shown by these.
NUMBERS = 12
#: Strongest shade of a token, and the weakest that is drawn.
DARKEST, FAINTEST = 0.72, 0.03
_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # they would turn what follows
_PICTURES = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    0x7F: "␡",
    **dict.fromkeys((*range(0x80, 0xA0), *_DIRECTIONS), "\N{REPLACEMENT CHARACTER}"),
}


def item(source: Any, index: int, name: str) -> Any:
    """The content of one example: ``source[index]``, or ``source(index)`` of a function.

    Raises:
        ValueError: If there is none.
    """
    if source is None:
        return None
    if callable(source):
        return source(index)
    try:
        return source[index]
    except (IndexError, KeyError) as error:
        size = f", it has {len(source)}" if hasattr(source, "__len__") else ""
        raise ValueError(
            f"{name}= has nothing for example {index}{size}; pass all examples in the order of the "
            "data, a dictionary of those that are kept, or a function of the number"
        ) from error


def content(value: Any, alt: str, scores: Sequence[float] | None = None) -> str:
    """HTML of an example.

    Args:
        value: A string; a list of strings (tokens); an image (see :func:`data_address`); numbers;
            or ``None``.
        alt: What an image is of, for those who do not see it.
        scores: Of its tokens. A string whose characters are as many has characters as tokens.

    Raises:
        TypeError: If the value is of another type.
    """
    if value is None:
        return '<p class="none">not shown: pass its text or image</p>'
    if isinstance(value, str):
        tokens = list(value) if scores is not None and len(scores) == len(value) else [value]
        return _text(tokens, scores if len(tokens) == len(scores or ()) else None)
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
        return _text(value, scores)
    if is_image(value):
        small = max(torch.as_tensor(value).shape) <= 64
        kind = "pixels" if small else "photo"
        return f'<img class="{kind}" alt="{escaped(alt)}" src="{data_address(value)}">'
    try:
        numbers = torch.as_tensor(value).detach().double().flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"an example is shown as a string, a list of tokens, an image or numbers, got "
            f"{type(value).__name__}"
        ) from error
    shown = ", ".join(f"{v:.4g}".replace("-", "−") for v in numbers[:NUMBERS].tolist())
    more = f", … ({len(numbers)} numbers)" if len(numbers) > NUMBERS else ""
    return f'<p class="numbers">{shown}{more}</p>'


def excerpt(value: Any, length: int = 60) -> str:
    """The beginning of a text in one line, for an index; empty for what is no text."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
        value = "".join(value[: 2 * length])
    if not isinstance(value, str):
        return ""
    line = " ".join(value[: 8 * length].split())
    return escaped(line if len(line) <= length else line[: length - 1] + "…")


def signed(value: float) -> str:
    """A score with its sign, to three digits.

    Example:
        >>> signed(-0.012345), signed(7.0), signed(2.5e6)
        ('−0.0123', '+7', '+2.5e6')
    """
    digits, power, exponent = f"{value:+.3g}".partition("e")
    return f"{digits}{power}{int(exponent) if power else ''}".replace("-", "−")


def escaped(text: str) -> str:
    """Text as HTML: markup, invisible characters and half characters become harmless."""
    whole = text.replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")
    return html.escape(whole.translate(_PICTURES))


def _text(tokens: Sequence[str], scores: Sequence[float] | None) -> str:
    if scores is None:
        return _box(escaped("".join(tokens)))
    largest = max((abs(s) for s in scores if math.isfinite(s)), default=0.0)
    parts: list[str] = []
    plain: list[str] = []  # neighbours without a shade, joined
    for place, token in enumerate(tokens):
        score = scores[place] if place < len(scores) else 0.0
        shade = DARKEST * abs(score) / largest if largest > 0.0 and math.isfinite(score) else 0.0
        if shade < FAINTEST:
            plain.append(token)
            continue
        parts += [escaped("".join(plain)), _shaded(token, score, shade)]
        plain = []
    return _box("".join([*parts, escaped("".join(plain))]))


def _shaded(token: str, score: float, shade: float) -> str:
    kind = "u" if score > 0.0 else "d"
    shown = escaped(token).replace("\n", "↵\n") or "∅"
    return f'<span class="{kind}" style="--a:{shade:.2f}" title="{signed(score)}">{shown}</span>'


def _box(inner: str) -> str:
    """Long texts scroll, also by keyboard."""
    return f'<div class="text" dir="auto" tabindex="0">{inner}</div>'


def tokens_of(parts: Tensor | None, counts: Tensor | None) -> Callable[[int], list[float] | None]:
    """Scores of the tokens of each kept example of a query, from ``[k, T]`` and counts ``[k]``."""

    def scores(rank: int) -> list[float] | None:
        if parts is None or counts is None or int(counts[rank]) < 2:
            return None
        own: list[float] = parts[rank, : int(counts[rank])].tolist()
        return own

    return scores
