"""Intervals of what tables print: means over sets and sums over tasks, resampled by picture.

Sets of one source share their pictures, so they are resampled together; sources are resampled each
by itself. Two methods see the same draws, so differences between them are paired.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from clva_lens.benchmarks.metrics import Metric, ratio
from clva_lens.benchmarks.statistics import resample_counts

RESAMPLES = 1000
FEW = 10
"""Fewer pictures than that make no interval."""
_BLOCK = 2_000_000


class Piece(NamedTuple):
    """One metric of one run; pieces of a stratum share pictures, by the names of their groups."""

    stratum: str
    groups: Sequence[Hashable]
    metric: Metric
    columns: Any


class Estimate(NamedTuple):
    """A number with the ends of its 95 % interval; None where it is undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None


def resampled(pieces: Sequence[Piece], seed: int = 0) -> np.ndarray:
    """Return values[1 + resample, piece]; the first row is of the data as they are.

    Rows after the first are nan where a stratum has fewer than ``FEW`` pictures.
    """
    found = np.full((1 + RESAMPLES, len(pieces)), math.nan)
    for number, stratum in enumerate(dict.fromkeys(piece.stratum for piece in pieces)):
        inside = [place for place, piece in enumerate(pieces) if piece.stratum == stratum]
        names = dict.fromkeys(name for place in inside for name in pieces[place].groups)
        place_of = {name: at for at, name in enumerate(names)}
        rng = np.random.default_rng([seed, number])
        index = {at: np.array([place_of[name] for name in pieces[at].groups]) for at in inside}
        longest = max(len(one) for one in index.values())
        each = max(1, _BLOCK // longest)
        for start in range(0, 1 + RESAMPLES, each):
            size = min(each, 1 + RESAMPLES - start)
            counts = resample_counts(len(names), size, rng)
            if start == 0:
                counts[0] = 1.0
            for at in inside:
                weights = counts[:, index[at]]
                values = pieces[at].metric(pieces[at].columns, weights)
                values[weights.sum(axis=1) == 0] = math.nan
                found[start : start + size, at] = values
        if len(names) < FEW:
            found[1:, inside] = math.nan
    return found


def estimate(values: np.ndarray) -> Estimate:
    """Return the first of ``values[1 + resample]`` with the quantiles of the others."""
    first, drawn = float(values[0]), values[1:][~np.isnan(values[1:])]
    if math.isnan(first):
        return Estimate(None)
    if not len(drawn):
        return Estimate(first)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(first, float(low), float(high))


class Task(NamedTuple):
    """The columns of one task of MME: what was right, and whether both of a picture were."""

    right: np.ndarray
    both: np.ndarray
    paired: np.ndarray


def task_columns(rows: Sequence[dict[str, Any]]) -> Task:
    """Return the columns of the rows of one task."""
    pictures: dict[str, list[bool]] = {}
    for row in rows:
        pictures.setdefault(row["group"], []).append(bool(row["right"]))
    pairs = [pictures[row["group"]] for row in rows]
    columns = (
        [row["right"] for row in rows],
        [len(one) == 2 and all(one) for one in pairs],
        [len(one) == 2 for one in pairs],
    )
    return Task(*(np.array(one, dtype=float) for one in columns))


def task_score(run: Task, weights: np.ndarray) -> np.ndarray:
    """Return MME's score of a task: 100 · accuracy + 100 · accuracy of both, up to 200."""
    accuracy = ratio(weights @ run.right, weights.sum(axis=1))
    return 100 * accuracy + 100 * ratio(weights @ run.both, weights @ run.paired)
