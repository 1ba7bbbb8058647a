"""Texts as a language model sees them: token ids, what their tokens look like, whose loss counts.

A text's *pieces* are the strings of its tokens; those of one text joined are the text (as far as it
was kept), so that a page can shade them. Characters that a tokenizer leaves out, such as spaces
between words, belong to the piece that follows, and the second token of a character that was taken
apart is an empty piece. Special tokens that the tokenizer adds are pieces of their own names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: A text, or a prompt and its completion.
Text = str | tuple[str, str]
#: Label of a token whose loss does not count.
IGNORED = -100


@dataclass(frozen=True)
class TokenizedText:
    """One text.

    Attributes:
        text: The text, prompt and completion together.
        ids: Token ids.
        pieces: What the tokens look like.
        counted: Whether the loss of predicting a token counts. That of the first never does, since
            nothing predicts it.
        special: Whether a token was added by the tokenizer.
        cut: Whether tokens were left out at the end.
    """

    text: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    counted: tuple[bool, ...]
    special: tuple[bool, ...]
    cut: bool

    def __len__(self) -> int:
        return len(self.ids)


def tokenized(
    tokenizer: Callable[..., Any], texts: Sequence[Text], longest: int | None = None
) -> list[TokenizedText]:
    """Texts by a fast tokenizer of Hugging Face, or one that answers in the same way.

    Of a text, the loss of all tokens counts, those that the tokenizer adds included; of a
    ``(prompt, completion)``, that of the completion's alone. The two are tokenized as one text: a
    token with characters of both is the completion's.

    Args:
        tokenizer: Called with a list of texts, ``return_offsets_mapping`` and
            ``return_special_tokens_mask``.
        texts: The texts.
        longest: How many tokens of a text are kept, at most.

    Raises:
        TypeError: If a text is neither a string nor two, or the tokenizer gives no offsets.
        ValueError: If there is no text, or no token of one counts.
    """
    whole = [_joined(i, text) for i, text in enumerate(texts)]
    if not whole:
        raise ValueError("expected at least one text, got none")
    if not getattr(tokenizer, "is_fast", True):
        raise TypeError(
            f"{type(tokenizer).__name__} does not tell which characters a token is of; use a fast "
            "tokenizer (AutoTokenizer.from_pretrained(name, use_fast=True))"
        )
    found = tokenizer(
        [text for text, _ in whole],
        add_special_tokens=True,
        padding=False,
        truncation=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,
    )
    for name in ("input_ids", "offset_mapping"):
        if name not in found:
            raise TypeError(f"expected {name!r} from the tokenizer, got {sorted(found.keys())}")
    ids, offsets = found["input_ids"], found["offset_mapping"]
    special = dict(found).get("special_tokens_mask") or [[0] * len(own) for own in ids]
    out = []
    for i, (text, start) in enumerate(whole):
        own = [bool(s) for s in special[i]]
        out.append(_text(tokenizer, text, start, ids[i], offsets[i], own, longest))
        if not any(out[-1].counted[1:]):
            what = "completion" if start is not None else "text"
            at = "" if longest is None else f" within {longest} tokens"
            raise ValueError(
                f"text {i} ({text[:40]!r}) has no token whose loss counts{at}: its {what} needs at "
                "least one token after another; leave it out, or shorten the prompt"
            )
    return out


def text_batches(
    texts: Sequence[TokenizedText], batch_size: int, *, width: int | None, padding: int
) -> list[dict[str, Tensor]]:
    """Batches of texts in their order, padded on the right.

    Args:
        texts: The texts.
        batch_size: How many are in a batch.
        width: Tokens that all are padded to; ``None`` pads to the longest of each batch.
        padding: Id of the padding. It is masked, so any will do.

    Returns:
        Batches with ``input_ids`` and ``attention_mask``, int64 ``[n, T]``, and ``labels``, which
        are -100 where the loss does not count.
    """
    batches = []
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        size = max(len(text) for text in part) if width is None else width
        ids = torch.full((len(part), size), padding)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORED)
        for i, text in enumerate(part):
            own = torch.tensor(text.ids)
            ids[i, : len(text)] = own
            mask[i, : len(text)] = 1
            labels[i, : len(text)] = own.where(torch.tensor(text.counted), IGNORED)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


# ----------------------------------------------------------------------- private
def _joined(index: int, text: Text) -> tuple[str, int | None]:
    """A text, and where its completion begins."""
    if isinstance(text, str):
        return text, None
    parts: Any = text
    if isinstance(parts, (tuple, list)) and [isinstance(t, str) for t in parts] == [True, True]:
        return parts[0] + parts[1], len(parts[0])
    kind = type(text).__name__
    raise TypeError(f"text {index} is a {kind}; expected a str, or a (prompt, completion) of two")


def _text(
    tokenizer: Any,
    text: str,
    start: int | None,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    special: Sequence[bool],
    longest: int | None,
) -> TokenizedText:
    count = len(ids) if longest is None else min(longest, len(ids))
    pieces, end, last = [], 0, None
    for i in range(count):
        if special[i]:
            pieces.append(_name(tokenizer, ids[i]))
            continue
        stop = max(end, int(offsets[i][1]))
        pieces.append(text[end:stop])
        end, last = stop, i
    if last is not None and count == len(ids):
        pieces[last] += text[end:]
    counted = [start is None] * count
    if start is not None:
        counted = [not special[i] and int(offsets[i][1]) > start for i in range(count)]
    return TokenizedText(
        text=text,
        ids=tuple(int(own) for own in ids[:count]),
        pieces=tuple(pieces),
        counted=tuple(counted),
        special=tuple(special[:count]),
        cut=count < len(ids),
    )


def _name(tokenizer: Any, token: int) -> str:
    found = getattr(tokenizer, "convert_ids_to_tokens", str)(token)
    return str(found)
