"""Numbers with the nouns that they count."""

from __future__ import annotations


def plural(count: int, noun: str) -> str:
    """`1 item`, `1,200 items`, `2 boundaries`; of several words the last one counts: `3 parallel workers`."""
    return f"{count:,} {noun if count == 1 else many(noun)}"


def many(noun: str) -> str:
    """`items`, `boundaries`, `searches`; for the regular ones alone."""
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"
