"""Intervals and tests for one or two methods that answered the same samples.

A bootstrap here draws *groups* (images) with replacement and weighs each row by the number of times
its group was drawn, because questions about one image are not independent.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, norm

from clva_lens.benchmarks.metrics import METRICS, Metric, Outcomes
from clva_lens.benchmarks.metrics import auc as auc
from clva_lens.benchmarks.metrics import best_threshold_accuracy as best_threshold_accuracy
from clva_lens.benchmarks.metrics import bias_matched as bias_matched
from clva_lens.benchmarks.metrics import bias_matched_accuracy as bias_matched_accuracy
from clva_lens.ground.errors import BenchmarkError, UnknownName

# Of fewer groups (pictures) no interval is shown: a percentile bootstrap of so few is too narrow.
FEWEST = 10
# Resamples are evaluated in blocks of at most this many weights (16 MB as float64).
_BLOCK = 2_000_000


class Interval(NamedTuple):
    """An estimate with its percentile bootstrap interval.

    ``undefined`` counts the resamples where the metric has no value (such as F1 without a predicted
    yes); the quantiles are over the others.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    resamples: int
    seed: int
    undefined: int = 0


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval (low, high) of a proportion of *independent* trials.

    Questions that share an image are not independent: use ``bootstrap_interval`` with groups.

    Raises:
        BenchmarkError: if n is below 1 or successes are not between 0 and n.
    """
    if not 0 <= successes <= n or n < 1:
        raise BenchmarkError(
            f"{successes} successes of {n} trials is no proportion. Pass 0 <= successes <= n."
        )
    z = float(norm.ppf((1 + _checked(confidence)) / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # Rounding must not push the ends beyond what they are exactly at 0 and n successes.
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == n else centre + half


def mcnemar(fixed: int, broken: int) -> float:
    """Return the exact two-sided McNemar p-value for answers fixed and broken by a method.

    It treats answers as independent; the clustered interval of the difference does not.
    """
    if fixed < 0 or broken < 0:
        raise BenchmarkError(f"fixed={fixed} and broken={broken} are counts. Pass 0 or more.")
    return float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise BenchmarkError(f"confidence={confidence} must lie between 0 and 1. Pass 0.95.")
    return confidence


def resample_counts(clusters: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return how often each cluster is drawn: counts[resample, cluster], rows sum to clusters."""
    drawn = rng.integers(0, clusters, size=(resamples, clusters))
    drawn += np.arange(resamples)[:, None] * clusters
    flat = np.bincount(drawn.ravel(), minlength=resamples * clusters)
    return flat.reshape(resamples, clusters).astype(float)


def cluster_index(groups: Sequence[Hashable] | None, rows: int) -> np.ndarray:
    """Return each row's cluster as an integer; without groups every row is a cluster of its own.

    Raises:
        BenchmarkError: if the lengths differ or there are fewer than two clusters.
    """
    names: Sequence[Hashable] = range(rows) if groups is None else groups
    if len(names) != rows:
        raise BenchmarkError(f"there are {rows} rows but {len(names)} groups. Pass one for each.")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    if len(numbers) < 2:
        raise BenchmarkError(
            f"{len(numbers)} group cannot be resampled, at least 2 are needed. Score more images."
        )
    return np.array([numbers[name] for name in names])


@dataclass(frozen=True)
class Bootstrap:
    """One set of resamples; all that is asked of it in one call sees the same draws.

    ``index`` is each row's cluster, see ``cluster_index``.
    """

    index: np.ndarray
    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a confidence outside (0, 1) and less than one resample."""
        _checked(self.confidence)
        if self.resamples < 1:
            raise BenchmarkError(f"resamples={self.resamples} is below 1. Pass 2000.")

    def intervals(self, tasks: Sequence[tuple[Metric, Any, Any]]) -> list[Interval]:
        """Return an interval a task (metric, a, b): of metric(b) − metric(a), or metric(a) alone.

        The latter if b is None.
        """
        rng = np.random.default_rng(self.seed)
        block = max(1, _BLOCK // len(self.index))
        drawn: list[list[np.ndarray]] = [[] for _ in tasks]
        for start in range(0, self.resamples, block):
            size = min(block, self.resamples - start)
            counts = resample_counts(int(self.index.max()) + 1, size, rng)
            weights = counts[:, self.index]
            for values, task in zip(drawn, tasks, strict=True):
                values.append(_difference(*task, weights))
        one = np.ones((1, len(self.index)))
        return [
            self._summary(float(_difference(*task, one)[0]), np.concatenate(values))
            for values, task in zip(drawn, tasks, strict=True)
        ]

    def _summary(self, estimate: float, values: np.ndarray) -> Interval:
        defined = values[~np.isnan(values)]
        tail = (1 - self.confidence) / 2
        ends = np.quantile(defined, [tail, 1 - tail]) if len(defined) else (math.nan, math.nan)
        return Interval(
            estimate=estimate,
            low=float(ends[0]),
            high=float(ends[1]),
            confidence=self.confidence,
            resamples=self.resamples,
            seed=self.seed,
            undefined=self.resamples - len(defined),
        )


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean of the values under each row of weights: a metric of numbers."""
    return weights @ values / weights.sum(axis=1)


def _difference(metric: Metric, a: Any, b: Any, weights: np.ndarray) -> np.ndarray:
    return metric(a, weights) if b is None else metric(b, weights) - metric(a, weights)


def _metric(metric: str | Metric) -> Metric:
    if not isinstance(metric, str):
        return metric
    if metric not in METRICS:
        raise UnknownName(f"no metric '{metric}'. Known: {', '.join(sorted(METRICS))}.")
    return METRICS[metric]


def bootstrap_interval(
    metric: str | Metric,
    run: Outcomes,
    groups: Sequence[Hashable] | None = None,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the interval of one run's metric, resampling groups (images)."""
    index = cluster_index(groups, len(run.label_yes))
    draws = Bootstrap(index, resamples, confidence, seed)
    return draws.intervals([(_metric(metric), run, None)])[0]


def paired_bootstrap(
    metric: str | Metric,
    a: Outcomes,
    b: Outcomes,
    groups: Sequence[Hashable] | None = None,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the interval of metric(b) − metric(a) of two runs on the same rows.

    Each resample draws the same groups for both, so what the two have in common cancels.

    Args:
        metric: a name in ``METRICS``, or a function of (run, weights[resample, row]).
        a: the reference run.
        b: the run compared with it, its rows in the same order.
        groups: the group (image) of each row; None makes every row a group of its own.
        resamples: number of bootstrap resamples.
        confidence: coverage of the percentile interval.
        seed: seed of the draws.

    Raises:
        BenchmarkError: if the runs differ in length or in labels, or there are < 2 groups.
        UnknownName: if there is no such metric.
    """
    if not np.array_equal(a.label_yes, b.label_yes):
        raise BenchmarkError(
            f"the runs have {len(a.label_yes)} and {len(b.label_yes)} rows with different labels. "
            "Bring both into the same order, or use comparison.compare(score_a, score_b)."
        )
    index = cluster_index(groups, len(a.label_yes))
    draws = Bootstrap(index, resamples, confidence, seed)
    return draws.intervals([(_metric(metric), a, b)])[0]
