"""One item, two items."""

from __future__ import annotations

import pytest

from embstore.words import many, plural


@pytest.mark.parametrize(
    ("count", "noun", "words"),
    [
        (0, "item", "0 items"),
        (1, "item", "1 item"),
        (2, "item", "2 items"),
        (1, "boundary", "1 boundary"),
        (12_345, "boundary", "12,345 boundaries"),
        (3, "day", "3 days"),
        (2, "search", "2 searches"),
        (2, "index", "2 indexes"),
        (1, "parallel worker", "1 parallel worker"),
        (2, "parallel worker", "2 parallel workers"),
    ],
)
def test_plural(count: int, noun: str, words: str) -> None:
    assert plural(count, noun) == words
    assert many(noun) in plural(5, noun)
