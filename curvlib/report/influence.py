"""What a search of influence leaves in a folder: a page, numbers, and the command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from curvlib.core.risk import Risk
from curvlib.influence.page import Contents, Page
from curvlib.influence.result import TopInfluence
from curvlib.operators.scores.example_contents import example_contents
from curvlib.report.files import number, write_command, write_numbers

#: Queries and examples of each that the terminal shows.
SHOWN = 5


@dataclass(frozen=True)
class Search:
    """What was found, and of what.

    Attributes:
        top: Proponents and opponents.
        contents: What the page shows of the examples.
        target: What the user pointed at.
        queries: Where the queries come from.
        parameters: ``P``, of those that scores are about.
        shown: Proponents and opponents of each query that the page shows whole.
        seconds: Wall time of this run.
        resumed: Whether the run began earlier, which ``seconds`` does not count.
    """

    top: TopInfluence
    contents: Contents
    target: str
    queries: str
    parameters: int
    shown: int
    seconds: float
    resumed: bool = False


def own_contents(
    top: TopInfluence, risk: Risk, queries: Risk, given: Mapping[str, Any]
) -> Contents:
    """What the page shows: what the user gave, and for the rest what the data itself holds.

    Args:
        top: Proponents and opponents.
        risk: The training data's.
        queries: The queries'.
        given: Contents by the names of :class:`Contents`.
    """
    kept = {*top.indices.flatten().tolist(), *top.bottom_indices.flatten().tolist()}
    found: dict[str, Any] = dict(given)
    for name, captions, source, wanted in (
        ("queries", "query_captions", queries, range(len(top.indices))),
        ("train", "captions", risk, kept),
    ):
        if name in given and captions in given:
            continue
        if len(top.indices) == 1 and source is queries and top.settings["query_reduction"]:
            continue  # one query of many examples
        held = example_contents(source, wanted)
        found.setdefault(name, {n: own.input for n, own in held.items()})
        found.setdefault(captions, {n: own.caption for n, own in held.items()})
    return Contents(**found)


def table(search: Search) -> str:
    """The numbers as text, for a terminal."""
    top = search.top
    kind = "relative" if top.relative else "absolute"
    facts = {
        "curvature": f"{top.curvature}, damping {top.damping:g} ({kind})",
        "unit": top.unit.replace("_", " "),
        "training examples": f"{top.examples:,}",
        "wall time": f"{search.seconds:.1f} s{' (this run)' if search.resumed else ''}",
    }
    lines = ["", *(f"{name + ':':<21}{text}" for name, text in facts.items()), ""]
    lines.append(f"{'query':<8}{'proponents':<44}opponents")
    for q in range(min(len(top.indices), SHOWN)):
        high = _pairs(top.indices[q], top.scores[q])
        lines.append(f"{q:<8}{high:<44}{_pairs(top.bottom_indices[q], top.bottom_scores[q])}")
    if len(top.indices) > SHOWN:
        lines.append(f"... and {len(top.indices) - SHOWN} queries more")
    return "\n".join([*lines, ""])


def _pairs(indices: Tensor, scores: Tensor) -> str:
    pairs = zip(indices[:3].tolist(), scores[:3].tolist(), strict=True)
    return ", ".join(f"{n} ({score:+.3g})" for n, score in pairs)


def write(search: Search, folder: str | os.PathLike[str], command: str) -> list[Path]:
    """Writes everything into a folder; each file appears whole or not at all.

    Args:
        search: What was found.
        folder: An existing folder. Files of an earlier run are replaced.
        command: The command that made it.

    Returns:
        The files: ``influence.html``, ``influence.json``, ``influence.safetensors`` (the result,
        with the parts of layers and tokens) and ``command.txt``.

    Raises:
        OSError: If a file cannot be written.
        TypeError: If the content of an example is none that can be shown, or
        ValueError: if one is missing; the rest is written by then.
    """
    folder = Path(folder)
    files = [
        write_numbers(folder / "influence.json", _document(search), command),
        search.top.save(folder / "influence.safetensors"),
        write_command(folder, command),
    ]
    provenance = {
        "command": command,
        "training data": search.target,
        "queries from": search.queries,
        "parameters": f"{search.parameters:,}",
        "wall time": f"{search.seconds:.1f} s{' (the last run)' if search.resumed else ''}",
    }
    page = Page(
        search.top,
        search.contents,
        title=f"Influence: {search.target}",
        shown=search.shown,
        provenance=provenance,
    )
    return [page.write(folder / "influence.html"), *files]


def _document(search: Search) -> dict[str, Any]:
    top = search.top
    return {
        "target": search.target,
        "queries_from": search.queries,
        "parameters": search.parameters,
        "examples": top.examples,
        "curvature": top.curvature,
        "damping": top.damping,
        "relative": top.relative,
        "unit": top.unit,
        "sign": top.sign,
        "layers": list(top.layers),
        "rescored": top.rescored,
        "settings": top.settings,
        "queries": [
            {
                "query": q,
                "mean": number(top.mean[q]),
                "std": number(top.std[q]),
                "proponents": _rows(top.indices[q], top.scores[q]),
                "opponents": _rows(top.bottom_indices[q], top.bottom_scores[q]),
            }
            for q in range(len(top.indices))
        ],
        "seconds": round(search.seconds, 3),
        "resumed": search.resumed,
    }


def _rows(indices: Tensor, scores: Tensor) -> list[dict[str, Any]]:
    return [
        {"example": n, "score": number(score)}
        for n, score in zip(indices.tolist(), scores.tolist(), strict=True)
    ]
