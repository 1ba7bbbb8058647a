"""What the commands' tests share: a folder with a target in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The present folder, with the ``TARGET`` of the test's module as ``mine.py``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text(request.module.TARGET)
    yield tmp_path
    sys.modules.pop("curvlib_target_mine", None)
