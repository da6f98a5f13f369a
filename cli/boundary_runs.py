"""What `embstore boundaries` does once its words are understood: runs, reports, files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embstore import catalog
from embstore.boundaries import folders, job, labels, report
from embstore.boundaries.job import Options
from embstore.catalog import Dataset, StoredModel
from embstore.db.engine import Database
from embstore.db.migrate import require_ready
from embstore.progress import Display
from embstore.settings import Settings
from embstore.words import plural

from .main import INTERRUPTED
from .options import opened
from .outcome import SOME_FAILED, Speaker, watch


@dataclass
class Detection:
    """One call of the command."""

    settings: Settings
    options: Options
    output_dir: Path | None
    copy: bool
    say: Speaker
    _reports: list[dict[str, Any]] = field(default_factory=list)
    _failed: bool = False

    def run(self, dataset: str | None, model: str | None) -> int:
        """Detect the boundaries in all that was asked for; returns the exit code."""
        with opened(self.settings) as database:
            require_ready(database)
            with database.begin() as connection:
                pairs = catalog.embedded(connection, dataset, model, writing=True)
            if not pairs:
                self.say.line("there are no vectors to look at: type 'embstore extract PATH' first")
            several = sum(len(datasets) for _, datasets in pairs) > 1
            places = self._claim_folders(pairs, several)
            interrupted = any(not self._detect(database, found, datasets, places) for found, datasets in pairs)
        self.say.json(self._reports)
        if interrupted:
            return INTERRUPTED
        return SOME_FAILED if self._failed else 0

    def _claim_folders(
        self, pairs: list[tuple[StoredModel, list[Dataset]]], several: bool
    ) -> dict[tuple[str, str], Path]:
        """Where the files of each model and dataset go, claimed before hours are spent on finding what to write."""
        if self.output_dir is None:
            return {}
        places = {}
        for found, datasets in pairs:
            for each in datasets:
                place = self.output_dir / _name(each.name, found.name) if several else self.output_dir
                folders.claim(place)
                places[found.name, each.name] = place
        return places

    def _detect(
        self, database: Database, model: StoredModel, datasets: list[Dataset], places: dict[tuple[str, str], Path]
    ) -> bool:
        """All datasets by one model; False if it was interrupted."""
        number = job.count_workers(self.settings, len(datasets))

        def show(pending: int) -> Display:
            crew = f"{plural(pending, 'run')}, {plural(number, 'worker')}"
            self.say.line(f"detecting boundaries by {model.name} and method {self.options.method}: {crew}")
            return watch(pending)

        outcome, runs = job.detect(database, self.settings, datasets, model, self.options, number, show=show)
        self.say.ended(outcome, model=model.name, command="boundaries", unit="run", done="finished")
        if outcome.interrupted:
            return False
        for name, run in runs.items():
            self._report(database, model.name, name, run, places.get((model.name, name)))
        return True

    def _report(self, database: Database, model: str, dataset: str, run: int, place: Path | None) -> None:
        with database.begin() as connection:
            status, error = labels.ended(connection, run)
            summary = labels.summary(connection, run) if status == "done" else None
        if summary is None:
            self._failed = True
            self.say.line(f"run {run} of '{dataset}' {status}: {error}")
            self._reports.append({"model": model, "dataset": dataset, "run": run, "status": status, "error": error})
            return
        self._describe(summary)
        if place is not None:
            missing = _write(database, summary, model, place, copy=self.copy)
            self.say.line(f"  written to {place}" + (f"; {plural(missing, 'file')} not there" if missing else ""))
        self._reports.append({"model": model, "status": status, **summary})

    def _describe(self, summary: dict[str, Any]) -> None:
        self.say.line(
            f"run {summary['run']}: {plural(summary['boundaries'], 'boundary')},"
            f" {plural(summary['segments'], 'segment')} in '{summary['dataset']}'"
            f" ({summary['embedded']:,} of {plural(summary['items'], 'item')} with a vector)"
        )
        for note in summary["notes"]:
            self.say.line(f"  {note}")
        for decision in summary["trace"] if self.options.debug else []:
            self.say.line(f"    {decision}")


def _name(dataset: str, model: str) -> str:
    """A folder's name from names that must lead nowhere else."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in f"{dataset}-{model}")


def _write(database: Database, summary: dict[str, Any], model: str, folder: Path, *, copy: bool) -> int:
    """Write a run's picture, JSON and folders; returns how many files are not there."""
    run = summary["run"]
    with database.begin() as connection:
        result, files = labels.result(connection, run), labels.files(connection, run)
        missing = report.write(
            folder, result, summary["items"], files, dataset=summary["dataset"], model=model, copy=copy
        )
    return len(missing)
