"""docs/python.md runs, from its first line to its last."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_page_runs(database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count("```python") >= 9
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(block, names)
    said = capsys.readouterr().out
    for line in ("(36, 256) float32", "annie/01.mp3 annie", "speech statistical 36 36", "36 Counter() 0"):
        assert line in said, said
    assert "no dataset 'speach': did you mean 'speech'?" in said
    assert list(names["frame"].columns) == ["speaker", "n"]
    assert names["centroids"].shape == (6, 256)
