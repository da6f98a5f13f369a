"""What a person gets of a run: a picture, a JSON file, and a folder for each segment.

`speaker_boundary_detection_result.json`, version 1:

    version       1
    dataset       name of the dataset
    model         name of the model
    method        auto, cosine or gmm
    parameters    object: what was asked for and what was chosen from the data
    total_items   number of items, with or without a vector
    boundaries    list of {position, score, confidence}: position of the first item of the new speaker
    segments      list of {speaker, begin, end, items}: positions begin to end, without end
    expected      list of positions around which was searched; empty for auto
    notes         list of sentences
    missing       list of files that could not be linked or copied, as they are not there
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.boundaries import folders
from embstore.boundaries.result import Result
from embstore.words import plural

PICTURE = "boundary_detection_visualization.png"
SUMMARY = "speaker_boundary_detection_result.json"
_COLUMNS = 1500
_LINES = 60
_CLOSE_UP = 12


def write(
    folder: Path,
    result: Result,
    total: int,
    files: Iterable[tuple[int, Path]],
    *,
    dataset: str,
    model: str,
    copy: bool = False,
) -> list[Path]:
    """Write everything into `folder`; returns the files that are not there.

    `total`: items in the set. `files`: position and path of every item, in order, read once.
    Raises UsageError, before anything is changed, if embstore did not make the folder or one of those inside.
    """
    folders.claim(folder)
    folders.clear(folder)
    spans = segments(result, total)
    missing: list[Path] = []
    rest = iter(files)
    following = next(rest, None)
    for number, (_, end) in enumerate(spans, start=1):
        inside: list[tuple[int, Path]] = []
        while following is not None and following[0] < end:
            inside.append(following)
            following = next(rest, None)
        missing += folders.fill(folder / folders.name_of(number, len(spans)), inside, copy=copy)
    draw(result, total, folder / PICTURE, title=f"{dataset}, {model}, {result.method}")
    content = summary(result, total, dataset=dataset, model=model) | {"missing": [str(path) for path in missing]}
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (folder / SUMMARY).write_text(text + "\n", encoding="utf-8")
    return missing


def segments(result: Result, total: int) -> list[tuple[int, int]]:
    """First position of each segment and the one after its last; items without a vector lie in the one around them."""
    edges = [0, *(boundary.position for boundary in result.boundaries), total]
    return list(pairwise(edges)) if total else []


def summary(result: Result, total: int, *, dataset: str, model: str) -> dict[str, Any]:
    """The JSON file's content, but for `missing`."""
    spans = segments(result, total)
    return {
        "version": 1,
        "dataset": dataset,
        "model": model,
        "method": result.method,
        "parameters": result.parameters,
        "total_items": total,
        "boundaries": [
            {"position": b.position, "score": round(b.score, 6), "confidence": round(b.confidence, 6)}
            for b in result.boundaries
        ],
        "segments": [
            {"speaker": folders.name_of(number, len(spans)), "begin": begin, "end": end, "items": end - begin}
            for number, (begin, end) in enumerate(spans, start=1)
        ],
        "expected": result.expected,
        "notes": result.notes,
    }


def draw(result: Result, total: int, path: Path, *, title: str) -> None:
    """Draw similarity along positions, boundaries, expected places and the segments' lengths.

    With more segments than lines would be told apart, boundaries become a density, and the surest and the least sure
    stretch are drawn once more from close up.
    """
    from matplotlib.figure import Figure

    crowded = len(result.boundaries) > _LINES
    rows = 4 if crowded else 2
    figure = Figure(figsize=(15, 3.4 * rows), layout="constrained", dpi=110)
    axes = figure.subplots(rows, 1)
    confidences = np.array([b.confidence for b in result.boundaries])
    figure.suptitle(f"{title}: {plural(len(result.boundaries), 'boundary')} in {plural(total, 'item')}")
    _overview(axes[0], result, total, crowded=crowded)
    _lengths(axes[1], result, total)
    if crowded:
        for axis, word, at in (
            (axes[2], "least", int(np.argmin(confidences))),
            (axes[3], "most", int(np.argmax(confidences))),
        ):
            _close_up(axis, result, total, at, word)
    axes[-1].set_xlabel("position")
    figure.savefig(path, format="png")


def _overview(axis: Any, result: Result, total: int, *, crowded: bool) -> None:
    positions, low, mean = envelope(result)
    axis.fill_between(positions, low, mean, color="#9db8d9", linewidth=0, label="down to the lowest")
    axis.plot(positions, mean, color="#1f4e8c", linewidth=0.8, label="similarity, mean")
    floor = float(low.min()) if len(low) else 0.0
    places = [b.position for b in result.boundaries]
    if crowded:
        _density(axis, places, total)
        room = max(1 - floor, 0.01)
        axis.set_ylim(floor - 0.4 * room, 1 + 0.08 * room)
        axis.set_yticks([tick for tick in axis.get_yticks() if floor - 0.05 <= tick <= 1])
    else:
        axis.vlines(places, floor, 1, color="#c2452d", linewidth=1, label="boundary")
    if result.expected:
        step = max(1, len(result.expected) // 300)
        axis.plot(result.expected[::step], [1.03] * len(result.expected[::step]), "v", color="#3c7a3c", markersize=4,
                  linestyle="none", label="expected" + (f" (one in {step})" if step > 1 else ""))  # fmt: skip
    _finish(axis, total, "similarity of left and right")


def _density(axis: Any, places: list[int], total: int) -> None:
    """How many boundaries there are along the set, in the lowest fifth of the picture, with a scale of its own."""
    counts, edges = np.histogram(places, bins=150, range=(0, total))
    most = max(1, int(counts.max()))
    scale = axis.twinx()
    scale.bar(edges[:-1], counts, np.diff(edges), align="edge", color="#c2452d")
    scale.set_ylim(0, 5 * most)
    scale.set_yticks([0, most])
    scale.tick_params(axis="y", labelsize=8, colors="#c2452d")
    axis.bar([0], [0], color="#c2452d", label="boundaries a bar (scale on the right)")


def _lengths(axis: Any, result: Result, total: int) -> None:
    spans = np.array(segments(result, total) or [(0, 0)])
    lengths = spans[:, 1] - spans[:, 0]
    if len(spans) <= 400:
        axis.bar(spans[:, 0], lengths, lengths, align="edge", color="#d9d9d9", edgecolor="#777777", linewidth=0.5,
                 label="items in the segment")  # fmt: skip
        _number(axis, spans, total)
    else:
        axis.plot(spans[:, 0], lengths, ".", color="#555555", markersize=2, alpha=0.5, label="items in the segment")
    axis.axhline(float(np.median(lengths)), color="#1f4e8c", linewidth=0.8, label=f"median {np.median(lengths):,.0f}")
    _finish(axis, total, "items")


def _number(axis: Any, spans: NDArray[np.int64], total: int) -> None:
    """Put the number of each segment that is wide enough into its bar."""
    for number, (begin, end) in enumerate(spans, start=1):
        if end - begin >= total / _LINES:
            axis.annotate(str(number), ((begin + end) / 2, 0), (0, 3), textcoords="offset points", fontsize=7,
                          ha="center", va="bottom")  # fmt: skip


def _close_up(axis: Any, result: Result, total: int, at: int, word: str) -> None:
    places = [b.position for b in result.boundaries]
    first, last = max(0, at - _CLOSE_UP // 2), min(len(places) - 1, at + _CLOSE_UP // 2)
    begin = places[first - 1] if first else 0
    end = places[last + 1] if last + 1 < len(places) else total
    low, high = np.searchsorted(result.positions, [begin, end])
    axis.plot(
        result.positions[low:high], 1 - result.scores[low:high], color="#1f4e8c", linewidth=0.8, label="similarity"
    )
    named = places[at]
    for b in result.boundaries[first : last + 1]:
        axis.axvline(b.position, color="#c2452d", linewidth=1)
        # No label into another one, and the one that it is about in any case.
        if b.position != places[at] and min(abs(b.position - named), abs(b.position - places[at])) < 0.05 * (
            end - begin
        ):
            continue
        named = b.position
        words = f"{b.position}\n{b.confidence:.2f}"
        axis.annotate(words, (b.position, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                      fontsize=7, ha="center", va="bottom")  # fmt: skip
    for place in [e for e in result.expected if begin <= e < end]:
        axis.plot(place, 1.0, "v", color="#3c7a3c", markersize=5)
    axis.margins(x=0)
    axis.set_ylabel("similarity")
    axis.set_title(f"around the {word} sure boundary, at {places[at]:,} (position, confidence)", fontsize=9, pad=24)


def _finish(axis: Any, total: int, label: str) -> None:
    axis.set_xlim(0, max(total, 1))
    axis.set_ylabel(label)
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def envelope(result: Result) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """First position, lowest and mean similarity of each of at most 1,500 columns."""
    if not len(result.positions):
        empty = np.empty(0, np.float32)
        return np.empty(0, np.int64), empty, empty
    starts = np.unique(np.linspace(0, len(result.positions), _COLUMNS, endpoint=False).astype(np.int64))
    similarity = 1 - result.scores
    lows = np.minimum.reduceat(similarity, starts)
    means = np.add.reduceat(similarity, starts, dtype=np.float64) / np.diff([*starts, len(similarity)])
    return result.positions[starts], lows, means.astype(np.float32)
