"""Method `auto`: penalised change-point detection on unit vectors, with no idea of the segments' size.

1. Places where the means before and after differ, at any of several scales, are candidates (`stream.gains`).
2. Optimal partitioning chooses among them (`partition.Partition`): each cut must save more of the squared distances to
   the segments' means than a penalty, `beta / 2 * noise * ln(n)` with the noise measured around it (as in BIC:
   Yao 1988, "Estimating the number of change-points via Schwarz' criterion").
3. A set that is sorted by keyword within a speaker has changes on two levels. So it is divided at four times the
   penalty too, and the segments' means are partitioned in the same way. Where either gives far fewer groups, which
   differ by more than the segments within them do, the groups are the speakers.

Memory: three blocks of vectors, the candidates of the unsettled end, and the score of every position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.boundaries import exact
from embstore.boundaries.partition import Partition, Place, Segment, gain
from embstore.boundaries.result import Boundary, Result, Window, Windows
from embstore.boundaries.stream import (
    SMALLEST,
    Floats,
    Stretch,
    contrast,
    foreign,
    gains,
    noise,
    peaks,
    stretches,
    sums_before,
)

BETA = 1.5
"""How much a cut must save, in units of `noise * ln(n) / 2`."""
LEAST = 3
"""Files that a segment has at least."""
_SCALES = 5
_NEAR = 2
_FEWEST = 1000
_FIRM = 4.0
_GROUP = 4
_APART_FIRM = 2.0
_APART_COARSE = 1.0


@dataclass(slots=True)
class Candidates:
    """Places of one block that may be cut, and the sums up to them."""

    stretch: Stretch
    spread: float
    places: list[Place]
    strengths: list[float]
    """The largest of the gains at several scales, for each place."""
    end: Place
    """The end of the block."""
    foreign: int
    """Rows that were left out."""


def detect(
    windows: Windows,
    total: int,
    *,
    beta: float = BETA,
    num_speakers: int | None = None,
    least: int = LEAST,
    trace: bool = False,
) -> Result:
    """Find the boundaries in an ordered set.

    `total`: rows that all windows have together. `beta`: larger finds fewer boundaries; 1 suits segments of 3 to 15
    files. `num_speakers`: if given, the best partition into so many segments, and no penalty. `least`: files that a
    segment has at least. A boundary's confidence is `1 - penalty / gain`.
    Raises ValueError for vectors that are not finite or positions that don't rise.
    """
    if beta <= 0 or least < 1 or (num_speakers is not None and num_speakers < 1):
        raise ValueError(f"beta {beta}, least {least} and num_speakers {num_speakers} must be positive")
    if num_speakers is not None:
        return _known(windows, total, num_speakers, least, trace)
    seen = _Seen()
    fine = _Level(seen.trace if trace else None, "cut")
    firm = _Level(seen.trace if trace else None, "firm cut")
    coarse = _Level(None, "group")
    penalty = 0.5 * beta * float(np.log(max(total, _FEWEST)))
    found = fine.watch(_partition(_beside(_candidates(windows, penalty, least, seen), least, firm), least))
    means = (_as_window(number, segment) for number, segment in enumerate(found))
    for _ in coarse.watch(_partition(_candidates(means, penalty, least, None), least)):
        pass
    return _result(fine, firm, coarse, seen, {"beta": beta, "least": least, "num_speakers": None}, total)


@dataclass(slots=True)
class _Seen:
    """What is kept of every position, and of the run."""

    positions: list[NDArray[np.int64]] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    noises: list[float] = field(default_factory=list)
    foreign: int = 0
    candidates: int = 0
    trace: list[str] = field(default_factory=list)

    def add(self, block: Candidates) -> None:
        self.positions.append(block.stretch.positions)
        self.scores.append(contrast(block.stretch))
        self.noises.append(block.spread)
        self.foreign += block.foreign
        self.candidates += len(block.places)

    def result(self, parameters: dict[str, Any]) -> Result:
        positions = np.concatenate([np.empty(0, np.int64), *self.positions])
        scores = np.concatenate([np.empty(0, np.float32), *self.scores])
        found = {"noise": float(np.median(self.noises)) if self.noises else None, "candidates": self.candidates}
        notes = [f"{self.foreign} files resemble none of their neighbours and were left out"] if self.foreign else []
        return Result([], positions, scores, "auto", {**parameters, **found}, notes, self.trace)


@dataclass(slots=True)
class _Level:
    """The cuts of one level, in order; arrays of numbers only."""

    trace: list[str] | None
    word: str
    rows: list[int] = field(default_factory=list)
    saved: list[float] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    """Half the squared distance of the means on both sides."""
    last: Segment | None = None

    def watch(self, segments: Iterator[Segment]) -> Iterator[Segment]:
        """Note each cut on the way."""
        for segment in segments:
            self.take(segment)
            yield segment

    def take(self, segment: Segment) -> None:
        """Note the cut before the next segment."""
        if self.last is not None:
            self._note(self.last, segment)
        self.last = segment

    def _note(self, left: Segment, right: Segment) -> None:
        place = right.begin
        difference = left.mean - right.mean
        self.rows.append(place.row)
        self.saved.append(gain(left, right))
        self.penalties.append(place.penalty)
        self.apart.append(0.5 * float(difference @ difference))
        if self.trace is not None:
            self.trace.append(
                f"{self.word} at row {place.row}: {left.count} files before and {right.count} after;"
                f" saves {self.saved[-1]:.3f}, must save {place.penalty:.3f}"
            )

    def confidence(self, number: int) -> float:
        """Of one cut."""
        return float(np.clip(1 - self.penalties[number] / max(self.saved[number], 1e-12), 0, 1))


def _as_window(number: int, segment: Segment) -> Window:
    return np.array([number]), segment.mean[None, :].astype(np.float32)


def _candidates(
    windows: Windows, penalty: float, least: int, seen: _Seen | None, *, every: bool = False
) -> Iterator[Candidates]:
    """The candidates of each block; `every` row, if asked for.

    Without `seen`, the rows are means of segments: taken as they are.
    """
    total: Floats | None = None
    count, squares = 0, 0.0
    for stretch in stretches(windows, normalise=seen is not None):
        if total is None:
            total = np.zeros(stretch.rows.shape[1])
        start = Place(stretch.begin, total, count, squares)
        block = _screen(stretch, start, penalty, least, clean=seen is not None, every=every)
        total, count, squares = block.end.total, block.end.count, block.end.squares
        if seen is not None:
            seen.add(block)
        yield block


def _screen(stretch: Stretch, start: Place, penalty: float, least: int, *, clean: bool, every: bool) -> Candidates:
    """The places of a block that a good partition may cut.

    At the largest scale that fits into the shorter side, a cut shows at least a quarter of what it saves in all.
    `penalty` is in units of the noise; 0 asks for all peaks. `clean` leaves foreign rows out of the sums.
    """
    spread = noise(stretch.rows)
    out = foreign(stretch, spread) if clean else np.zeros(stretch.end - stretch.begin, dtype=np.bool_)
    rows = np.where(out[:, None], np.float32(0), stretch.own) if out.any() else stretch.own
    strengths = np.ones(len(rows)) if every else _strengths(stretch, 0.25 * penalty * spread)
    strengths[: max(0, least - stretch.begin)] = 0
    chosen = np.append(np.flatnonzero(strengths), len(rows))
    sums = start.total + sums_before(rows, chosen)
    counts = start.count + np.concatenate([[0], np.cumsum(~out)])
    lengths = start.squares + np.concatenate([[0.0], np.cumsum(np.einsum("ij,ij->i", rows, rows), dtype=np.float64)])
    places = [
        Place(stretch.begin + int(at), total, int(counts[at]), float(lengths[at]), penalty * spread)
        for at, total in zip(chosen, sums, strict=True)
    ]
    end = places.pop()
    return Candidates(stretch, spread, places, strengths[chosen[:-1]].tolist(), end, int(out.sum()))


def _strengths(stretch: Stretch, threshold: float) -> Floats:
    """The gain at each row of the block that is a peak at some scale or near one, 0 at the others."""
    best = np.zeros(stretch.end - stretch.begin)
    for scale, saved in enumerate(gains(stretch, _SCALES)):
        peak = peaks(saved, (SMALLEST << scale) // 2) & (saved > threshold)
        best = np.maximum(best, np.where(peak, saved, 0))
    padded = np.pad(best, _NEAR)
    near = np.lib.stride_tricks.sliding_window_view(padded, 2 * _NEAR + 1).max(axis=1)
    # Where only the strongest are kept, a peak must not be lost to the places beside a stronger one.
    strengths: Floats = np.maximum(best, 0.5 * near)
    return strengths


def _beside(blocks: Iterator[Candidates], least: int, firm: _Level) -> Iterator[Candidates]:
    """Pass the blocks on, and divide the set at a higher penalty on the way."""
    partition: Partition | None = None
    end: Place | None = None
    for block in blocks:
        partition = partition or _beginning(block, least)
        for place in block.places:
            partition.add(replace(place, penalty=_FIRM * place.penalty))
        for segment in partition.settled():
            firm.take(segment)
        yield block
        end = block.end
    if partition is not None and end is not None:
        for segment in partition.finish(end):
            firm.take(segment)


def _beginning(block: Candidates, least: int) -> Partition:
    return Partition(Place(0, np.zeros_like(block.end.total), 0, 0.0), least=least)


def _partition(blocks: Iterator[Candidates], least: int) -> Iterator[Segment]:
    partition: Partition | None = None
    end: Place | None = None
    for block in blocks:
        partition = partition or _beginning(block, least)
        for place in block.places:
            partition.add(place)
        yield from partition.settled()
        end = block.end
    if partition is not None and end is not None:
        yield from partition.finish(end)


def _result(fine: _Level, firm: _Level, coarse: _Level, seen: _Seen, parameters: dict[str, Any], total: int) -> Result:
    result = seen.result(parameters)
    level, rows = fine, fine.rows
    if _are_groups(fine, firm, firm.rows, _APART_FIRM, result.notes):
        level, rows = firm, firm.rows
    else:
        borders = [fine.rows[number - 1] for number in coarse.rows]
        if _are_groups(fine, coarse, borders, _APART_COARSE, result.notes):
            level, rows = coarse, borders
    if len(result.positions) != total:
        result.notes.append(f"{total} rows were announced and {len(result.positions)} came")
    _add_boundaries(result, level, rows)
    return result


def _are_groups(fine: _Level, groups: _Level, borders: list[int], apart: float, notes: list[str]) -> bool:
    """Whether the cuts are changes within a speaker (of keyword, of recording) and the groups of segments the speakers.

    Speakers who are sorted by sex or by source also form groups, but within such groups they differ more than the
    groups' means do. Short segments of speakers who sound alike are lost at a high penalty too, but not most of them.
    `borders`: the rows where groups meet; `apart`: how many times as far as the segments within them the groups must be
    from each other.
    """
    if not borders or len(fine.rows) + 1 < _GROUP * (len(borders) + 1):
        return False
    inside = ~np.isin(fine.rows, borders)
    within = float(np.median(np.array(fine.apart)[inside]))
    # Some speakers who meet are alike, so not the median: of words, none differ as much as most speakers.
    between = float(np.quantile(groups.apart, 0.75))
    taken = between > apart * within
    notes.append(
        f"{len(fine.rows)} changes form {len(borders) + 1} groups; half the squared distance is {within:.3f} within"
        f" groups and {between:.3f} between them: "
        + ("the groups are taken for the speakers" if taken else "that does not make the groups speakers")
    )
    return taken


def _known(windows: Windows, total: int, segments: int, least: int, trace: bool) -> Result:
    """The best partition into a known number of segments."""
    seen = _Seen()
    pool = exact.Pool(segments, least)
    for block in _candidates(windows, 0.0, least, seen, every=total <= exact.OUTRIGHT):
        pool.add(block.places, block.strengths, block.end)
    found, words = pool.solve()
    level = _Level(seen.trace if trace else None, "cut")
    for _ in level.watch(iter(found)):
        pass
    result = seen.result({"beta": None, "least": least, "num_speakers": segments})
    result.notes.append(f"{segments} segments asked for: {words}")
    # No penalty decided: the confidence is against the one that would have been charged without a known number.
    spread = result.parameters["noise"] or 0.0
    level.penalties = [0.5 * BETA * spread * float(np.log(max(total, _FEWEST)))] * len(level.rows)
    _add_boundaries(result, level, level.rows)
    return result


def _add_boundaries(result: Result, level: _Level, rows: list[int]) -> None:
    for number, row in enumerate(rows):
        confidence = level.confidence(number)
        result.boundaries.append(Boundary(int(result.positions[row]), float(result.scores[row]), confidence))
