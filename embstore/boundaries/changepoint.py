"""Method `auto`: penalised change-point detection on unit vectors, with no idea of the segments' size.

1. Places where the means before and after differ, at any of several scales, are candidates (`stream.gains`).
2. Optimal partitioning chooses among them (`partition.Partition`): each cut must save more of the squared distances to
   the segments' means than chance can, in the dimensions that the vectors really have (`stream.due`).
3. Which of these changes are changes of speaker, and not of recording or keyword, is chosen from all of them
   (`levels.choose`).

Memory: a block of vectors and what lies around it, the sum of each segment, and for every position its score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.boundaries import exact
from embstore.boundaries.chain import Chain, Cut
from embstore.boundaries.levels import GRID, SHORT, Inside, choose
from embstore.boundaries.partition import Partition, Place, Segment
from embstore.boundaries.result import Boundary, Result, Windows
from embstore.boundaries.stream import (
    SMALLEST,
    Floats,
    Stretch,
    contrast,
    dimensions,
    due,
    foreign,
    gains,
    noise,
    peaks,
    stretches,
    sums_before,
)

BETA = 1.5
"""How much a cut must save, in units of what chance can; see `levels.SHORT` for short segments."""
LEAST = 3
"""Files that a segment has at least."""
_SCALES = 6
_NEAR = 2
_ENOUGH = 500


@dataclass(slots=True)
class Candidates:
    """Places of one block that may be cut, and the sums up to them."""

    stretch: Stretch
    spread: float
    penalty: float
    """What a cut must save at least, if long segments lie on both sides."""
    places: list[Place]
    strengths: list[float]
    """The largest of the gains at several scales, for each place."""
    saved: list[Floats]
    """The gains at each scale, for all rows of the block."""
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

    `total`: rows that all windows have together. `beta`: larger finds fewer boundaries. `num_speakers`: if given, the
    best partition into so many segments, and no penalty. `least`: files that a segment has at least. A boundary's
    confidence is `1 - threshold / gain`, the threshold being what it had to save.
    Raises ValueError for vectors that are not finite or positions that don't rise.
    """
    if beta <= 0 or least < 1 or (num_speakers is not None and num_speakers < 1):
        raise ValueError(f"beta {beta}, least {least} and num_speakers {num_speakers} must be positive")
    if num_speakers is not None:
        return _known(windows, total, num_speakers, least, trace)
    seen = _Seen()
    segments = list(_partition(_candidates(windows, total, beta, least, seen), least))
    result = seen.result({"beta": beta, "least": least, "num_speakers": None})
    if len(result.positions) != total:
        result.notes.append(f"{total} rows were announced and {len(result.positions)} came")
    if not segments:
        return result
    choice = choose(seen.chain(segments), seen.inside, len(result.positions), beta)
    result.notes.extend(choice.notes)
    cuts = choice.chain.cuts(choice.short)
    _add_boundaries(result, cuts)
    if trace:
        result.trace.extend(_explained(result.positions, cuts, choice.gone, choice.within))
    return result


@dataclass(slots=True)
class _Seen:
    """What is kept of every position, of every block, and of the run."""

    positions: list[NDArray[np.int64]] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    inside: Inside = field(default_factory=Inside)
    ends: list[int] = field(default_factory=list)
    noises: list[float] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)
    foreign: int = 0
    candidates: int = 0

    def add(self, block: Candidates) -> None:
        stretch = block.stretch
        self.positions.append(stretch.positions)
        self.scores.append(contrast(stretch))
        self.inside.rows.append(np.arange(stretch.begin, stretch.end)[::GRID])
        self.inside.gains.append(np.stack([saved[::GRID] / block.spread for saved in block.saved]).astype(np.float32))
        self.ends.append(stretch.end)
        self.noises.append(block.spread)
        self.penalties.append(block.penalty)
        self.foreign += block.foreign
        self.candidates += len(block.places)

    def chain(self, segments: list[Segment]) -> Chain:
        """The segments with the noise around each."""
        rows = np.array([segment.begin.row for segment in segments], dtype=np.int64)
        block = np.searchsorted(self.ends, rows, side="right")
        sums = np.stack([segment.end.total - segment.begin.total for segment in segments])
        counts = np.array([segment.count for segment in segments], dtype=np.float64)
        return Chain(rows, counts, sums, np.array(self.noises)[block], np.array(self.penalties)[block])

    def result(self, parameters: dict[str, Any]) -> Result:
        positions = np.concatenate([np.empty(0, np.int64), *self.positions])
        scores = np.concatenate([np.empty(0, np.float32), *self.scores])
        found = {"noise": float(np.median(self.noises)) if self.noises else None, "candidates": self.candidates}
        notes = [f"{self.foreign} files resemble none of their neighbours and were left out"] if self.foreign else []
        return Result([], positions, scores, "auto", {**parameters, **found}, notes)


def _candidates(
    windows: Windows, total: int, beta: float, least: int, seen: _Seen, *, every: bool = False
) -> Iterator[Candidates]:
    """The candidates of each block; `every` row, if asked for. `beta` 0 asks for all peaks."""
    sums: Floats | None = None
    count, squares = 0, 0.0
    for stretch in stretches(windows):
        if sums is None:
            sums = np.zeros(stretch.rows.shape[1])
        block = _screen(stretch, Place(stretch.begin, sums, count, squares), total, beta, least, every=every)
        sums, count, squares = block.end.total, block.end.count, block.end.squares
        seen.add(block)
        yield block


def _screen(stretch: Stretch, start: Place, total: int, beta: float, least: int, *, every: bool) -> Candidates:
    """The places of a block that a good partition may cut; foreign rows are left out of the sums."""
    spread = noise(stretch.rows)
    dim = dimensions(stretch.own if len(stretch.own) >= _ENOUGH else stretch.rows)
    penalty = beta * due(total, dim) * spread
    out = foreign(stretch, spread)
    rows = np.where(out[:, None], np.float32(0), stretch.own) if out.any() else stretch.own
    saved = gains(stretch, _SCALES)
    strengths = np.ones(len(rows)) if every else _strengths(saved, penalty, spread if beta else 0.0)
    strengths[: max(0, least - stretch.begin)] = 0
    chosen = np.append(np.flatnonzero(strengths), len(rows))
    sums = start.total + sums_before(rows, chosen)
    counts = start.count + np.concatenate([[0], np.cumsum(~out)])
    lengths = start.squares + np.concatenate([[0.0], np.cumsum(np.einsum("ij,ij->i", rows, rows), dtype=np.float64)])
    places = [
        Place(stretch.begin + int(at), before, int(counts[at]), float(lengths[at]), penalty)
        for at, before in zip(chosen, sums, strict=True)
    ]
    end = places.pop()
    return Candidates(stretch, spread, penalty, places, strengths[chosen[:-1]].tolist(), saved, end, int(out.sum()))


def _strengths(scales: list[Floats], penalty: float, spread: float) -> Floats:
    """The gain at each row of a block that is a peak at some scale or near a strong one, 0 at the others.

    At the largest scale that fits into the shorter side, a cut shows at least a quarter of what it saves in all, and
    some noise.
    """
    best = np.zeros(len(scales[0]))
    for scale, saved in enumerate(scales):
        half = SMALLEST << scale
        threshold = 0.25 * penalty * (1 + SHORT / (2 * half)) + 0.6 * spread
        peak = peaks(saved, half // 2) & (saved > threshold)
        best = np.maximum(best, np.where(peak, saved, 0))
    padded = np.pad(np.where(best > penalty, best, 0), _NEAR)
    near = np.lib.stride_tricks.sliding_window_view(padded, 2 * _NEAR + 1).max(axis=1)
    # Where only the strongest are kept, a peak must not be lost to the places beside a stronger one.
    strengths: Floats = np.maximum(best, 0.5 * near)
    return strengths


def _partition(blocks: Iterator[Candidates], least: int) -> Iterator[Segment]:
    partition: Partition | None = None
    end: Place | None = None
    for block in blocks:
        partition = partition or Partition(Place(0, np.zeros_like(block.end.total), 0, 0.0), least=least)
        for place in block.places:
            partition.add(place)
        yield from partition.settled()
        end = block.end
    if partition is not None and end is not None:
        yield from partition.finish(end)


def _known(windows: Windows, total: int, segments: int, least: int, trace: bool) -> Result:
    """The best partition into a known number of segments.

    No threshold decided: the confidence is against the one that there would have been without a known number.
    """
    seen = _Seen()
    pool = exact.Pool(segments, least)
    for block in _candidates(windows, total, 0.0, least, seen, every=total <= exact.OUTRIGHT):
        pool.add(block.places, block.strengths, block.end)
        dim = dimensions(block.stretch.rows)
        seen.penalties[-1] = BETA * due(total, dim) * block.spread
    found, words = pool.solve()
    result = seen.result({"beta": None, "least": least, "num_speakers": segments})
    result.notes.append(f"{segments} segments asked for: {words}")
    cuts = seen.chain(found).cuts(SHORT) if found else []
    _add_boundaries(result, cuts)
    if trace:
        result.trace.extend(_explained(result.positions, cuts, [], []))
    return result


def _add_boundaries(result: Result, cuts: list[Cut]) -> None:
    for cut in cuts:
        confidence = float(np.clip(1 - cut.least / max(cut.saved, 1e-12), 0, 1))
        result.boundaries.append(Boundary(int(result.positions[cut.row]), float(result.scores[cut.row]), confidence))


def _explained(positions: NDArray[np.int64], cuts: list[Cut], gone: list[Cut], within: list[int]) -> list[str]:
    """One line for each place that was considered, in order."""
    lines = [(cut.row, f"cut at {{}}: {_weighed(cut)}") for cut in cuts]
    lines += [(cut.row, f"no cut at {{}}: {_weighed(cut)}") for cut in gone]
    lines += [(row, "no cut at {}: a change within a speaker") for row in within]
    return [line.format(f"position {positions[row]}") for row, line in sorted(lines)]


def _weighed(cut: Cut) -> str:
    sides = f"{cut.before:.4g} before and {cut.after:.4g} after"
    return f"{sides}; saves {cut.saved:.3f}, must save {cut.least:.3f}"
