"""The Python API: a thin face over the same functions that the commands call.

A `Store` holds settings and no more; connections are made when they are needed. So it may be pickled, and used in a
forked child, in a spawned one and in several threads: each process has connections of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psycopg2
from numpy.typing import ArrayLike, NDArray
from sqlalchemy import Connection

from embstore import averages, catalog, centroids, query, recipes, reports, vectors
from embstore import search as searching
from embstore.averages import Average, Centroids
from embstore.boundaries import job, labels
from embstore.boundaries.job import Method
from embstore.boundaries.labels import Boundaries
from embstore.catalog import Dataset, StoredModel
from embstore.db.cancel import cancellable
from embstore.db.engine import Database
from embstore.db.migrate import require_ready
from embstore.errors import UsageError
from embstore.extract import devices, run, tuning, works
from embstore.extract.works import Wanted
from embstore.lookup import Embedder, Kind
from embstore.progress import Display, SilentDisplay, display
from embstore.reports import DatasetSummary, Progress
from embstore.search import TIMEOUT, Of, Results
from embstore.settings import Settings, load
from embstore.sources import open_source
from embstore.supervise import Outcome, check_connections
from embstore.transfer import export, parquet
from embstore.transfer.table import FIELDS, Field
from embstore.vectors import Order, Vectors


def connect(
    database: str | Settings | None = None,
    *,
    home: str | Path | None = None,
    max_connections: int | None = None,
    progress: bool = True,
) -> Store:
    """A store in the database of this address, or as the environment and `.env` say, or on the embedded server.

    database         `postgresql://user:password@host:5432/name`, or Settings; None: as the command line does it
    home             folder of the embedded server
    max_connections  of all processes together; as DB_MAX_CONNECTIONS
    progress         show how far work is, on stderr

    Raises UsageError for a malformed setting, DatabaseError if there is no database, or none that is ready.
    """
    if isinstance(database, Settings):
        if home is not None or max_connections is not None:
            raise UsageError("connect() takes settings, or an address with home and max_connections; not both")
        settings = database
    else:
        settings = load(database_url=database, home=home, db_max_connections=max_connections)
    store = Store(settings, progress=progress)
    try:
        require_ready(store.database)
    except BaseException:
        store.close()
        raise
    return store


class Store:
    """Datasets, their vectors, and what is computed from them. `embstore.connect` makes one."""

    def __init__(self, settings: Settings, *, progress: bool = True) -> None:
        self.settings = settings
        self.progress = progress
        self.database = Database(settings, pool_size=settings.db_max_connections)
        self._embedder: tuple[dict[str, str], Embedder] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "progress": self.progress}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"<embstore.Store at {self.database}>"

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close this process's connections. The next call opens new ones."""
        self.database.close()

    # Jobs: registered, resumable, done by worker processes

    def extract(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        dataset: str | None = None,
        model: str | None = None,
        media: str | None = None,
        options: Mapping[str, str] | None = None,
        workers: int | None = None,
        gpus: str | None = None,
        tune: Mapping[str, int] | None = None,
        speaker_from: str = "parent",
        root: str | os.PathLike[str] | None = None,
    ) -> dict[str, Outcome]:
        """Register what `path` holds and embed what is pending, as `embstore extract` does; without it, go on.

        Returns how it ended, by model: `outcome.tally.done`, `.failed`, `.statuses`. Items that failed raise nothing.
        Ctrl+C finishes what is on the devices, writes it, and then raises KeyboardInterrupt.
        Raises UsageError, ModelError, DatabaseError and WorkerError.
        """
        settings = self._for_job(workers)
        name = model or settings.embedding_model
        wanted = Wanted(name, media, recipes.with_whole_paths(options or {}))
        plan = devices.plan(settings.embedding_workers, gpus, tuning.parse(f"{k}={v}" for k, v in (tune or {}).items()))
        check_connections(settings, len(plan.devices))
        if path is not None:
            source_of = partial(
                open_source, Path(path), speaker_from=speaker_from, root=None if root is None else Path(root)
            )
            found = [works.register(self.database, source_of, dataset, wanted)[0]]
        else:
            found = works.open_works(self.database, dataset, wanted, named=model is not None)
        parameters = {"path": None if path is None else str(path), "devices": list(plan.devices), "from": "python"}
        outcomes = {}
        for recipe, datasets in found:
            outcomes[recipe.name] = _finished(
                run.extract(self.database, settings, recipe, datasets, plan, show=self._show, parameters=parameters)
            )
        return outcomes

    def compute_centroids(
        self,
        dataset: str | None = None,
        model: str | None = None,
        *,
        average: Average = "mean",
        min_utterances: int = 1,
        recompute: bool = False,
        workers: int | None = None,
    ) -> dict[str, Outcome]:
        """Average each speaker's vectors into one, where that is not up to date; `centroids` reads them.

        Returns how it ended, by model. Raises as `extract` does.
        """
        settings = self._for_job(workers)
        options = centroids.Options(average, min_utterances, recompute=recompute)
        number = centroids.count_workers(settings, asked=workers)
        with self.database.begin() as connection:
            pairs = catalog.embedded(connection, dataset, model, writing=True)
        parameters = {"average": average, "min_utterances": min_utterances, "recompute": recompute, "from": "python"}
        outcomes = {}
        for found, datasets in pairs:
            outcomes[found.name] = _finished(
                centroids.compute(
                    self.database,
                    settings,
                    found,
                    datasets,
                    options,
                    number,
                    show=lambda pending, _workers: self._show(pending),
                    parameters=parameters,
                )
            )
        return outcomes

    def detect_boundaries(
        self,
        dataset: str | None = None,
        model: str | None = None,
        *,
        method: Method = "auto",
        num_speakers: int | None = None,
        penalty: float | None = None,
        segment_size: int = 1000,
        boundary_window: int = 10,
        gmm_components: int = 2,
        workers: int | None = None,
    ) -> list[Boundaries]:
        """Find where the speaker changes in ordered sets, a run for each dataset; `boundaries` reads one again.

        Raises EmbstoreError if a run failed, and else as `extract` does.
        """
        settings = self._for_job(workers)
        options = job.Options(method, segment_size, boundary_window, gmm_components, num_speakers, penalty)
        with self.database.begin() as connection:
            pairs = catalog.embedded(connection, dataset, model, writing=True)
        found = []
        for stored, datasets in pairs:
            number = job.count_workers(settings, len(datasets))
            outcome, runs = job.detect(self.database, settings, datasets, stored, options, number, show=self._show)
            _finished(outcome)
            found += [self.boundaries(run=number) for number in runs.values()]
        return found

    # Reading

    def vectors(
        self,
        dataset: str | None = None,
        model: str | None = None,
        *,
        ids: ArrayLike | None = None,
        order_by: Order = "position",
    ) -> Vectors:
        """All vectors of a dataset by a model, in the order of the dataset: ids [n] and float32 [n, dim].

        dataset, model  may be left out where there is but one
        ids             only those of these items, in this order; each needs to have one
        order_by        `position`, or `item_id`
        Raises UsageError and ModelError.
        """
        with self._pair(dataset, model, order_by) as (connection, stored, of):
            scope = of.dataset_id, stored.model_id
            if ids is not None:
                given = np.asarray(ids, dtype=np.int64)
                return Vectors(given, vectors.of_each(connection, *scope, stored.dim, given))
            return cancellable(connection, lambda: vectors.of_dataset(connection, *scope, stored.dim, by=order_by))

    def chunks(
        self,
        dataset: str | None = None,
        model: str | None = None,
        *,
        size: int | None = None,
        order_by: Order = "position",
    ) -> Iterator[Vectors]:
        """The same in pieces, those of `size` items at a time (None: about 20 MB), all of one state of the database.

        One transaction is open until the last piece, or until the iterator is closed: read on, or break off.
        """
        if size is not None and size < 1:
            raise UsageError(f"chunks of {size} items cannot be made: size is 1 or more")
        with self._pair(dataset, model, order_by) as (connection, stored, of):
            pages = vectors.ordered(connection, of.dataset_id, stored.model_id, stored.dim, size=size, by=order_by)
            for page in pages:
                yield Vectors(page.item_ids, page.vectors)

    def arrow(self, dataset: str | None = None, model: str | None = None) -> Any:
        """All vectors of a dataset, and what is known of their items, as a `pyarrow.Table`; in the dataset's order.

        Columns: item_id, position, path, start, duration, speaker, embedding (a fixed-size list of float32).
        Raises UsageError without pyarrow.
        """
        fields = [Field("item_id", "int"), *FIELDS["embeddings"]]
        with self._pair(dataset, model) as (connection, stored, of):
            return parquet.to_arrow(export.embedding_batches(connection, of, stored), fields, stored.dim)

    def centroids(self, dataset: str | None = None, model: str | None = None) -> Centroids:
        """The speakers' centroids that there are: `speakers, vectors, num_utterances, stale`; see `compute_centroids`.

        Raises UsageError and ModelError.
        """
        with self._pair(dataset, model) as (connection, stored, of):
            return averages.read(connection, of.dataset_id, stored.model_id, stored.dim)

    def boundaries(self, dataset: str | None = None, model: str | None = None, *, run: int | None = None) -> Boundaries:
        """What a boundary run found: the one of that number, or the newest that is finished; see `detect_boundaries`.

        Raises UsageError for none, EmbstoreError for a run that failed.
        """
        with self.database.reading() as connection:
            if run is None:
                dataset_id = None if dataset is None else catalog.get_dataset(connection, dataset).dataset_id
                model_id = None if model is None else catalog.get_model(connection, model).model_id
                run = labels.newest(connection, dataset_id, model_id)
            return labels.read(connection, run)

    def search(
        self,
        what: str | Path | Sequence[float] | NDArray[Any],
        *,
        model: str | None = None,
        k: int = 10,
        of: Of = "utterances",
        dataset: str | None = None,
        speaker: str | None = None,
        where: str | None = None,
        exact: bool = False,
        kind: Kind | None = None,
        query_dataset: str | None = None,
        options: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT,
    ) -> Results:
        """The `k` nearest to a file, an item, a speaker, a `.npy` or an array [dim]: see `embstore.search.search`.

        `options` are those of the model that embeds a file; it stays loaded for the next one.
        """
        given = recipes.with_whole_paths(options or {})
        if self._embedder is None or self._embedder[0] != given:
            self._embedder = given, Embedder(given)
        return searching.search(
            self.database,
            what,
            model=model,
            prefer_model=self.settings.embedding_model,
            k=k,
            of=of,
            dataset=dataset,
            speaker=speaker,
            where=where,
            exact=exact,
            kind=kind,
            query_dataset=query_dataset,
            embedder=self._embedder[1],
            timeout=timeout,
        )

    def sql(self, statement: str, parameters: query.Parameters | None = None, *, write: bool = False) -> query.Rows:
        """The rows of one SQL statement, which may change nothing unless `write` is given.

        `parameters` take the places of `%s`, or of `%(name)s`, and are bound; a percent sign is then written `%%`.
        The views are found without a prefix. Vectors are better read by `vectors`. Raises UsageError, DatabaseError.
        """
        query.check(statement)
        with self.database.begin() as connection:
            try:
                return cancellable(connection, lambda: query.run(connection, statement, parameters, write=write).read())
            except psycopg2.Error as error:
                raise query.explained(error, connection, to_write="say write=True") from error
            finally:
                if not write:
                    with suppress(psycopg2.Error):
                        query.allow_writing(connection)

    def datasets(self) -> list[DatasetSummary]:
        """All datasets that one may see, by name."""
        with self.database.reading() as connection:
            return reports.datasets(connection)

    def status(self) -> list[Progress]:
        """How far each dataset is with each model: `done + failed + skipped + pending + running = registered`."""
        with self.database.reading() as connection:
            return reports.progress(connection)

    @contextmanager
    def _pair(
        self, dataset: str | None, model: str | None, order_by: str = "position"
    ) -> Iterator[tuple[Connection, StoredModel, Dataset]]:
        """A dataset and a model, and a transaction in which to read of them."""
        if order_by not in vectors.ORDERS:
            raise UsageError(f"vectors cannot be ordered by '{order_by}': there are {' and '.join(vectors.ORDERS)}")
        with self.database.reading() as connection:
            yield connection, *catalog.one_pair(connection, dataset, model)

    def _for_job(self, workers: int | None) -> Settings:
        """The settings of a job; no connection that lies idle here is to count beside those of its workers."""
        if multiprocessing.current_process().daemon:
            raise UsageError(
                "a process that is itself a worker, such as one of a DataLoader, starts no workers: do this where the"
                " workers are started from"
            )
        self.database.close()
        return replace(self.settings, embedding_workers=workers or self.settings.embedding_workers)

    def _show(self, pending: int) -> Display:
        return display(pending, sys.stderr) if self.progress else SilentDisplay()


def _finished(outcome: Outcome) -> Outcome:
    """How a job ended. Raises KeyboardInterrupt if somebody has ended it, once all that was begun is written."""
    if outcome.interrupted:
        raise KeyboardInterrupt
    return outcome
