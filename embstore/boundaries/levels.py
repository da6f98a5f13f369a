"""Which of the changes in a set are changes of speaker.

Files that follow each other may have more in common than the speaker: the recording, the day, the keyword by which they
are sorted. Three questions tell such changes from those of speaker:

1. Inside the segments, do means of many files scatter more than those of independent files would? Then cuts must save
   as many times as much (an effective number of samples), and the question is asked again.
2. Do the segments themselves form groups, which would not be there were the segments in another order, and which differ
   by more than the segments within them? Then the groups are the speakers; also where they differ by less, if the
   segments differ by too little to be speakers and come in no order within the groups.
3. Do the segments differ by enough to be speakers at all, against the noise within them?

Where words within a speaker differ as much as speakers do, nothing in the vectors tells the two apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.boundaries.chain import Chain, Cut
from embstore.boundaries.stream import SMALLEST, Floats, dimensions, due
from embstore.words import plural

SHORT = 6.0
"""A cut beside 6 files must save twice what one between long segments must."""
SHORT_GROUP = 1.0
"""The same for groups, in segments."""
GRID = 8
"""Rows from one measurement of the gains to the next."""
FAINT = 0.5
"""Of the noise: if not a tenth of the changes are as large, they are of recording or word. Half the squared distance
of two speakers' means is 0.36 to 1.1 of the noise for one-second words, and 0.6 or more in one pair of neighbours in
ten; 2.4 to 3.6 for sentences. Of two words of one speaker it is 0.3 to 0.4, and 0.44 in one pair of ten."""
MUFFLED = 0.45
"""The same for a quarter of the changes, where the files are known not to be independent of each other."""
_FEW = 10
_GROUP = 3
_ROUNDS = 12
_RISE = 1.25
_PERMUTATIONS = 199
_UNITS = 2000


@dataclass(slots=True)
class Inside:
    """What a cut would save at every eighth row, at several scales, in units of the noise."""

    rows: list[NDArray[np.int64]] = field(default_factory=list)
    gains: list[NDArray[np.float32]] = field(default_factory=list)
    """Each float32 [scales, rows]."""

    def inflation(self, chain: Chain, total: int) -> list[float]:
        """Median gain at each scale that fits into many of the segments; 1 at all scales if files are independent."""
        rows, gains = np.concatenate(self.rows), np.concatenate(self.gains, axis=1)
        edges = np.append(chain.rows, total)
        segment = np.searchsorted(edges, rows, side="right") - 1
        room = np.minimum(rows - edges[segment], edges[segment + 1] - rows)
        medians = []
        for scale, saved in enumerate(gains):
            half = SMALLEST << scale
            fits = room >= half
            if int(fits.sum()) * GRID < max(6 * half, 0.1 * total):
                break
            medians.append(float(np.median(saved[fits])))
        return medians


@dataclass(slots=True)
class Choice:
    """The segments that are taken for speakers', and why."""

    chain: Chain
    short: float = SHORT
    notes: list[str] = field(default_factory=list)
    gone: list[Cut] = field(default_factory=list)
    """Cuts that were not worth it."""
    within: list[int] = field(default_factory=list)
    """Rows of changes that were found within a speaker."""


def choose(found: Chain, inside: Inside, total: int, beta: float) -> Choice:
    """Choose among all the cuts that save enough if files are independent; `beta` is as in `changepoint.detect`."""
    gone: list[Cut] = []
    fine = found.merged(SHORT, gone)
    choice = Choice(fine, gone=gone)
    if len(fine) < 2:
        return choice
    inflation = _look_inside(choice, fine, inside, total)
    if len(choice.chain) > _GROUP and _group(choice, inflation, beta):
        return choice
    if len(choice.chain) > _FEW and (loudness := _loudness(choice.chain, inflation, 0.9)) < FAINT:
        choice.notes.append(
            f"{len(choice.chain) - 1} changes were found, but they are of {loudness:.2f} of the noise within a speaker,"
            f" and below {FAINT} they are taken for changes of recording or word; --num-speakers keeps the strongest"
        )
        choice.within += choice.chain.rows[1:].tolist()
        choice.chain = _whole(choice.chain)
    return choice


def _look_inside(choice: Choice, fine: Chain, inside: Inside, total: int) -> float:
    """Raise what a cut must save until it is what the scatter inside the segments asks for; returns how many times."""
    chain, used = fine, 1.0
    gone: list[Cut] = []
    for _ in range(_ROUNDS):
        needed = _extrapolated(inside.inflation(chain, total))
        if needed <= max(_RISE, 1.1 * used):
            break
        chain, used = chain.scaled(needed / used).merged(SHORT, gone), needed
    if used == 1.0:
        return 1.0
    words = f"means of many files scatter {used:.1f} times as much as those of independent files would"
    if not _is_above(chain, fine, used):
        choice.notes.append(f"{words}, but the segments differ like speakers: they stay as they are")
        return 1.0
    choice.notes.append(
        f"{words}: cuts must save as many times as much, {plural(len(fine), 'segment')} became {len(chain)}"
    )
    choice.chain = chain
    choice.gone += gone
    return used


def _extrapolated(medians: list[float]) -> float:
    """Where the scatter still rises at the largest scale that fits, it would rise on."""
    largest = max([1.0, *medians])
    if len(medians) >= 2 and medians[-1] == largest and largest > _RISE * medians[-2]:
        return largest * largest / medians[-2]
    return largest


def _is_above(chain: Chain, fine: Chain, inflation: float) -> bool:
    """Whether the merged segments differ by more than the fine ones within them; or those are no speakers, if all are
    merged into one."""
    if len(chain) == 1:
        return _loudness(fine, 1.0, 0.75) < MUFFLED
    within = fine.apart()[~np.isin(fine.rows[1:], chain.rows)]
    return not len(within) or bool(np.quantile(chain.apart(inflation), 0.75) > np.median(within))


def _loudness(chain: Chain, inflation: float, quantile: float) -> float:
    """How much the louder ones of the neighbours differ, in units of the noise."""
    return float(np.quantile(chain.apart(inflation) / chain.noise[1:], quantile))


def _group(choice: Choice, inflation: float, beta: float) -> bool:
    """Take groups of segments for the speakers, if there are any that are no segments of one speaker."""
    units = choice.chain
    near, means = units.apart(inflation), units.means
    gone: list[Cut] = []
    groups = _grouped(units, inflation, beta, gone)
    if len(groups) < 2 or len(units) < _GROUP * len(groups) or not _is_ordered(means, np.zeros(len(units))):
        return False
    within = float(np.median(near[~np.isin(units.rows[1:], groups.rows)]))
    between = float(np.quantile(groups.apart(), 0.75))
    words = "the groups are taken for the speakers"
    taken = between > within
    if not taken and _loudness(units, inflation, 0.9) < FAINT:
        taken = not _is_ordered(means, np.searchsorted(groups.rows, units.rows, side="right"))
        words = f"{words}, as the segments differ by too little to be some and come in no order within the groups"
    choice.notes.append(
        f"{len(units) - 1} changes form {len(groups)} groups; half the squared distance is {within:.3f} within groups"
        f" and {between:.3f} between them: {words if taken else 'that does not make the groups speakers'}"
    )
    if taken:
        choice.chain, choice.short = groups, SHORT_GROUP
        choice.within += [cut.row for cut in gone]
    return taken


def _grouped(units: Chain, inflation: float, beta: float, gone: list[Cut]) -> Chain:
    """Segments of segments, by the same rule; the cuts that go are added to `gone`."""
    scatter = max(float(np.median(units.apart(inflation))), 1e-4)
    # A segment's mean is off by the scatter of segments, and by what the noise leaves of it.
    weights = scatter / (scatter + inflation * units.noise / np.maximum(units.weights, 1))
    means = units.means
    least = beta * due(len(units), dimensions(means, trim=1.5)) * scatter
    even = np.full(len(units), scatter)
    chain = Chain(units.rows, weights, weights[:, None] * means, even, np.full(len(units), least))
    return chain.merged(SHORT_GROUP, gone)


def _is_ordered(means: Floats, groups: NDArray[Any]) -> bool:
    """Whether neighbours are more alike than in 199 random orders inside each group (a permutation test).

    `groups`: a number for each of the segments, rising.
    """
    means, groups = means[:_UNITS], groups[:_UNITS]
    some = means - means.mean(axis=0)
    products = some @ some.T
    squares = np.diag(products)
    beside = groups[1:] == groups[:-1]

    def median(order: NDArray[np.int64]) -> float:
        one, other = order[1:][beside], order[:-1][beside]
        return float(np.median(squares[one] + squares[other] - 2 * products[one, other]))

    given = median(np.arange(len(some)))
    random = np.random.default_rng(0)
    orders = (np.lexsort((random.random(len(some)), groups)) for _ in range(_PERMUTATIONS))
    return not any(median(order) <= given for order in orders)


def _whole(chain: Chain) -> Chain:
    """One segment of all."""
    weight, total = chain.weights.sum(keepdims=True), chain.sums.sum(axis=0, keepdims=True)
    return Chain(chain.rows[:1], weight, total, chain.noise[:1], chain.least[:1])
