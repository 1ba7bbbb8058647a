"""The README's Python runs, as it stands there, in one session."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks, "the README shows no Python"
    session = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), session)


def test_the_tour_is_twelve_lines():
    tour = re.search(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL).group(1)
    assert sum(bool(line.strip()) for line in tour.splitlines()) <= 12


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?://|#)([^)]+)\)", README)
    assert links
    missing = [link for link in links if not (ROOT / link.partition("#")[0]).exists()]
    assert not missing
