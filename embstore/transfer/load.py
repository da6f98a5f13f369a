"""A table of embeddings into the database.

It is read twice: first to find out whether all of it may come in, then to bring it in, part by part, each in one
transaction. What was interrupted is brought to its end by the same command: rows that are there are left as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sqlalchemy import Connection, text

from embstore import catalog
from embstore.ahead import ahead
from embstore.db.engine import Database
from embstore.errors import DatabaseError, UsageError
from embstore.transfer import origin
from embstore.transfer.checked import Checked, Names, Part
from embstore.transfer.incoming import Counts, Place, compare, take_in
from embstore.transfer.origin import Origin, Wanted
from embstore.transfer.reading import Reader, Spot
from embstore.words import plural

Begin = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""Shows progress: told what is done and with how many rows, if that is known; then how many more are done."""

_ANY = "SELECT EXISTS (SELECT FROM embstore.item WHERE dataset_id = :dataset_id)"
_MANY = 20
"""So many bad rows are enough to refuse a table."""
_NAMED = 10


def silent(_words: str, _rows: int | None) -> AbstractContextManager[Callable[[int], None]]:
    """Show no progress."""
    return nullcontext(lambda _more: None)


@dataclass
class Outcome:
    """What became of a table."""

    dataset: str
    model: str
    counts: Counts = field(default_factory=Counts)
    refused: int = 0
    """Rows that were left out."""
    spots: list[Spot] = field(default_factory=list)
    """The first of them."""
    interrupted: bool = False
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON and for the table of runs."""
        return {
            "imported": self.counts.imported,
            "replaced": self.counts.replaced,
            "there": self.counts.there,
            "refused": self.refused,
        }


class _Refused:
    """Hears of the rows that may not come in."""

    def __init__(self, skip: bool) -> None:
        self._skip = skip
        self.count = 0
        self.spots: list[Spot] = []

    def __call__(self, spot: Spot) -> None:
        self.count += 1
        if len(self.spots) < _NAMED:
            self.spots.append(spot)
        if self.count == _MANY and not self._skip:
            self.require_none()

    def require_none(self) -> None:
        """Raise UsageError if there was any, unless they are to be skipped."""
        if not self.count or self._skip:
            return
        least = "at least " if self.count == _MANY else ""
        more = f" (and {least}{self.count - 1} more)" if self.count > 1 else ""
        raise UsageError(
            f"{self.spots[0]}{more}; nothing was imported: mend it, or add --skip-bad to leave such rows out"
        )


@dataclass(frozen=True)
class Options:
    """What is done about rows that do not simply come in."""

    replace: bool = False
    """Take the file's vector where the database has another one."""
    skip_bad: bool = False
    """Leave out rows that may not come in, instead of refusing them all."""
    dry_run: bool = False


def import_embeddings(
    database: Database,
    reader: Reader,
    wanted: Wanted,
    options: Options,
    *,
    begin: Begin = silent,
    started: Callable[[Origin, Counts, bool], None] = lambda _origin, _counts, _is_new: None,
    parameters: dict[str, Any] | None = None,
) -> Outcome:
    """Import what was opened; `started` is told what is about to be done, and whether the model is new.

    Raises UsageError and ModelError if the table may not come in: nothing was changed then.
    """
    start = time.monotonic()
    with database.begin() as connection:
        found = origin.find(connection, reader, wanted)
        model_id = catalog.stored_model(connection, found.model.name, found.model.fingerprint())
    there = _there(found, model_id)
    outcome = Outcome(found.dataset, found.model.name)
    refused = _Refused(options.skip_bad)
    counts = _survey(database, reader, found, there, options, refused, begin)
    outcome.refused, outcome.spots = refused.count, refused.spots
    started(found, counts, model_id is None)
    if options.dry_run:
        outcome.counts = counts
    else:
        _bring_in(database, reader, found, counts, options, outcome, begin, parameters or {})
    outcome.seconds = time.monotonic() - start
    return outcome


def _there(found: Origin, model_id: int | None) -> Place | None:
    """Where the vectors go, if both the dataset and the model are there already."""
    if found.there is None or model_id is None:
        return None
    return Place(found.there.dataset_id, model_id, found.model.dim, found.dataset)


def _survey(
    database: Database,
    reader: Reader,
    found: Origin,
    there: Place | None,
    options: Options,
    refused: _Refused,
    begin: Begin,
) -> Counts:
    """Read all of the table and see whether it may come in; what will become of its rows."""
    counts, names = Counts(), Names()
    with begin("checking", reader.rows) as tick:
        for part in Checked(reader, found.under, refused).parts():
            names.add(part)
            if there is None:
                counts.imported += len(part)
            else:
                with database.begin() as connection:
                    counts.add(compare(connection, there, part, reader.where, replace=options.replace))
            tick(len(part))
        refused.require_none()
        if reader.rows not in (None, counts.all + refused.count) and not options.skip_bad:
            raise UsageError(
                f"the file says that it has {plural(reader.rows or 0, 'vector')}, and holds {counts.all:,}: it is not"
                " whole, and nothing was imported; add --skip-bad to import what there is"
            )
        names.require_different(reader, Checked(reader, found.under, lambda _spot: None).parts())
    if not counts.all:
        raise UsageError("none of its rows may come in: nothing was imported")
    return counts


def _bring_in(
    database: Database,
    reader: Reader,
    found: Origin,
    expected: Counts,
    options: Options,
    outcome: Outcome,
    begin: Begin,
    parameters: dict[str, Any],
) -> None:
    with database.begin() as connection:
        place = _make_place(connection, found)
        run = catalog.start_run(connection, "import", place.dataset_id, place.model_id, parameters)
    status = "failed"
    try:
        if expected.imported or expected.replaced:
            _take_all(database, reader, found, place, expected, options, outcome.counts, begin)
        else:
            outcome.counts = expected
        status = "done"
    except KeyboardInterrupt:
        status = "interrupted"
        outcome.interrupted = True
    finally:
        # If the database is what ended it, that error is the one to show.
        with suppress(DatabaseError), database.begin() as connection:
            catalog.end_run(connection, run, place.dataset_id, status, outcome.as_dict())


def _take_all(
    database: Database,
    reader: Reader,
    found: Origin,
    place: Place,
    expected: Counts,
    options: Options,
    counts: Counts,
    begin: Begin,
) -> None:
    """Bring in part after part, and count them."""
    with database.begin() as connection:
        is_empty = not connection.execute(text(_ANY), {"dataset_id": place.dataset_id}).scalar_one()
    with begin("importing", expected.all) as tick, ahead(_parts(reader, found)) as parts:
        for part in parts:
            work = partial(
                take_in,
                place=place,
                part=part,
                where=reader.where,
                replace=options.replace,
                alone=counts.imported if is_empty else None,
            )
            counts.add(database.patiently(work))
            tick(len(part))
    if counts.all != expected.all:
        raise UsageError("the file has changed since it was checked: type the command again")


def _parts(reader: Reader, found: Origin) -> Generator[Part]:
    """The parts anew: those who were told of bad rows the first time need not hear of them again."""
    yield from Checked(reader, found.under, lambda _spot: None).parts()


def _make_place(connection: Connection, found: Origin) -> Place:
    model_id = catalog.ensure_model(connection, found.model)
    dataset = catalog.ensure_dataset(connection, found.dataset, found.media, found.root)
    return Place(dataset.dataset_id, model_id, found.model.dim, dataset.name)
