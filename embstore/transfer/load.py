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
from embstore.transfer.reading import Reader, Spot, Tell
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
    work = _Import(database, reader, found, options, begin)
    counts, refused = work.survey(_there(found, model_id))
    outcome = Outcome(found.dataset, found.model.name, refused=refused.count, spots=refused.spots)
    started(found, counts, model_id is None)
    if options.dry_run:
        outcome.counts = counts
    else:
        work.bring_in(counts, outcome, parameters or {})
    outcome.seconds = time.monotonic() - start
    return outcome


def _there(found: Origin, model_id: int | None) -> Place | None:
    """Where the vectors go, if both the dataset and the model are there already."""
    if found.there is None or model_id is None:
        return None
    return Place(found.there.dataset_id, model_id, found.model.dim, found.dataset)


@dataclass(frozen=True)
class _Import:
    """A table on its way in, of which it is known where it belongs."""

    database: Database
    reader: Reader
    found: Origin
    options: Options
    begin: Begin

    def survey(self, there: Place | None) -> tuple[Counts, _Refused]:
        """Read all of the table and see whether it may come in: what will become of its rows, and which may not."""
        counts, names, refused = Counts(), Names(), _Refused(self.options.skip_bad)
        reader = self.reader
        with self.begin("checking", reader.rows) as tick:
            for part in self._parts(refused):
                names.add(part)
                if there is None:
                    counts.imported += len(part)
                else:
                    with self.database.begin() as connection:
                        counts.add(compare(connection, there, part, reader.where, replace=self.options.replace))
                tick(len(part))
            refused.require_none()
            if reader.rows not in (None, counts.all + refused.count) and not self.options.skip_bad:
                raise UsageError(
                    f"the file says that it has {plural(reader.rows or 0, 'vector')}, and holds {counts.all:,}: it is"
                    " not whole, and nothing was imported; add --skip-bad to import what there is"
                )
            names.require_different(reader, self._parts())
        if not counts.all:
            raise UsageError("none of its rows may come in: nothing was imported")
        return counts, refused

    def bring_in(self, expected: Counts, outcome: Outcome, parameters: dict[str, Any]) -> None:
        """Bring in what the survey `expected`, and note in `outcome` and in the history how that ended."""
        with self.database.begin() as connection:
            place = _make_place(connection, self.found)
            run = catalog.start_run(connection, "import", place.dataset_id, place.model_id, parameters)
        status = "failed"
        try:
            if expected.imported or expected.replaced:
                self._take_all(place, expected, outcome.counts)
            else:
                outcome.counts = expected
            status = "done"
        except KeyboardInterrupt:
            status = "interrupted"
            outcome.interrupted = True
        finally:
            # If the database is what ended it, that error is the one to show.
            with suppress(DatabaseError), self.database.begin() as connection:
                catalog.end_run(connection, run, place.dataset_id, status, outcome.as_dict())

    def _take_all(self, place: Place, expected: Counts, counts: Counts) -> None:
        """Bring in part after part, and count them."""
        with self.database.begin() as connection:
            is_empty = not connection.execute(text(_ANY), {"dataset_id": place.dataset_id}).scalar_one()
        with self.begin("importing", expected.all) as tick, ahead(self._parts()) as parts:
            for part in parts:
                work = partial(
                    take_in,
                    place=place,
                    part=part,
                    where=self.reader.where,
                    replace=self.options.replace,
                    alone=counts.imported if is_empty else None,
                )
                counts.add(self.database.patiently(work))
                tick(len(part))
        if counts.all != expected.all:
            raise UsageError("the file has changed since it was checked: type the command again")

    def _parts(self, tell: Tell = lambda _spot: None) -> Generator[Part]:
        """The table, read anew; whoever was told of bad rows the first time need not hear of them again."""
        yield from Checked(self.reader, self.found.under, tell).parts()


def _make_place(connection: Connection, found: Origin) -> Place:
    model_id = catalog.ensure_model(connection, found.model)
    dataset = catalog.ensure_dataset(connection, found.dataset, found.media, found.root)
    return Place(dataset.dataset_id, model_id, found.model.dim, dataset.name)
