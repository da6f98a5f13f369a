"""Rows to people and programs: an aligned table, CSV, JSON, or one JSON object a line."""

from __future__ import annotations

import csv
import json
import math
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, TextIO

FORMATS = ("table", "csv", "json", "jsonl")

_GAP = "  "
_NARROWEST = 8
"""Columns of a terminal: no column is cut to less."""


@dataclass(frozen=True, slots=True)
class Vector:
    """A vector as pgvector writes it: `[1,2,3]`."""

    text: str

    def brief(self) -> str:
        """Its first values, and how many there are."""
        values = self.text.strip("[]").split(",")
        if len(values) <= 3:
            return f"[{', '.join(f'{float(v):.4g}' for v in values)}]"
        return f"[{', '.join(f'{float(v):.4g}' for v in values[:3])}, … {len(values)}]"


def write_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]], form: str, out: TextIO) -> int:
    """Write rows in one of FORMATS; returns their number. All but the table are written as the rows come."""
    return _WRITERS[form](columns, rows, out)


def write_json(value: Any, out: TextIO) -> None:
    """Write one JSON value for a program or a person."""
    out.write(json.dumps(value, ensure_ascii=False, indent=2, default=_to_json) + "\n")


def write_pairs(pairs: Mapping[str, str], out: TextIO) -> None:
    """Write names and values below each other, aligned."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        out.write(f"{name:<{width}}{_GAP}{value}\n")


def _write_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], out: TextIO) -> int:
    values = [list(row) for row in rows]
    cells = [[_cell(value) for value in row] for row in values]
    right = [_is_numeric(row[place] for row in values) for place in range(len(columns))]
    widths = [max([_width(name), *(_width(row[place]) for row in cells)]) for place, name in enumerate(columns)]
    if out.isatty():
        widths = _fit(widths, shutil.get_terminal_size().columns)
    rule = ["-" * width for width in widths]
    for line in ([_cell(name) for name in columns], rule, *cells):
        padded = (_pad(cell, width, at_right) for cell, width, at_right in zip(line, widths, right, strict=True))
        out.write(_GAP.join(padded).rstrip() + "\n")
    return len(values)


def _write_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]], out: TextIO) -> int:
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    count = 0
    for row in rows:
        writer.writerow([_to_csv(value) for value in row])
        count += 1
    return count


def _write_jsonl(columns: Sequence[str], rows: Iterable[Sequence[Any]], out: TextIO) -> int:
    count = 0
    for line in _json_lines(columns, rows):
        out.write(line + "\n")
        count += 1
    return count


def _write_json(columns: Sequence[str], rows: Iterable[Sequence[Any]], out: TextIO) -> int:
    count = 0
    out.write("[")
    for line in _json_lines(columns, rows):
        out.write(",\n " + line if count else "\n " + line)
        count += 1
    out.write("\n]\n" if count else "]\n")
    return count


_WRITERS: dict[str, Callable[[Sequence[str], Iterable[Sequence[Any]], TextIO], int]] = {
    "table": _write_table,
    "csv": _write_csv,
    "json": _write_json,
    "jsonl": _write_jsonl,
}


def _json_lines(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    names = _distinct(columns)
    encode = json.JSONEncoder(ensure_ascii=False, default=_to_json).encode
    for row in rows:
        values = {name: _finite(value) for name, value in zip(names, row, strict=True)}
        yield encode(values)


def _distinct(columns: Sequence[str]) -> list[str]:
    """Names that can all be keys of one object: `a`, `a_2`."""
    names: list[str] = []
    for column in columns:
        name, number = column, 1
        while name in names:
            number += 1
            name = f"{column}_{number}"
        names.append(name)
    return names


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; as PostgreSQL's own JSON does, name them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return [_finite(part) for part in value] if isinstance(value, list) else value


def _to_json(value: Any) -> Any:
    if isinstance(value, Vector):
        return json.loads(value.text)
    if isinstance(value, Decimal):
        if not value.is_finite():
            return str(value)
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return _text(value)


def _to_csv(value: Any) -> Any:
    if type(value) is str or type(value) is int:  # nearly all are
        return value
    if isinstance(value, Vector):
        return value.text
    if isinstance(value, float):
        return repr(value)
    return "" if value is None else _text(value)


def _text(value: Any) -> str:
    """What tables and CSV have in common."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, memoryview | bytes):
        return "\\x" + bytes(value).hex()
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=_to_json)
    return str(value)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Vector):
        return value.brief()
    if isinstance(value, float):
        return f"{value:.9g}" if abs(value) < 1e9 else repr(value)
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds")
    return _printable(_text(value))


def _printable(text: str) -> str:
    """Line breaks and control characters of a file name would break the table, or command the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_numeric(values: Iterable[Any]) -> bool:
    there = [value for value in values if value is not None]
    return bool(there) and all(isinstance(v, int | float | Decimal) and not isinstance(v, bool) for v in there)


def _width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    if text.isascii():
        return len(text)
    return sum(_character_width(character) for character in text)


def _character_width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fit(widths: Sequence[int], terminal: int) -> list[int]:
    """Cut the widest columns until a row fits, or all are as narrow as may be."""
    fitted = list(widths)
    while sum(fitted) + len(_GAP) * (len(fitted) - 1) > terminal:
        widest = max(fitted, default=0)
        if widest <= _NARROWEST:
            break
        fitted[fitted.index(widest)] -= 1
    return fitted


def _pad(text: str, width: int, at_right: bool) -> str:
    if _width(text) > width:
        text = _cut(text, width)
    space = " " * (width - _width(text))
    return space + text if at_right else text + space


def _cut(text: str, width: int) -> str:
    kept, taken = [], 1
    for character in text:
        taken += _character_width(character)
        if taken > width:
            break
        kept.append(character)
    return "".join(kept) + "…"
