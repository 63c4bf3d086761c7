"""How far two sets of numbers order the same things alike: an estimate beside what was measured."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from clva_lens.ground.errors import ParameterError


class RankCorrelation(NamedTuple):
    """Spearman's ρ with its percentile bootstrap interval over the things, and their number."""

    estimate: float
    low: float
    high: float
    things: int


def rank_correlation(
    estimated: ArrayLike,
    measured: ArrayLike,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> RankCorrelation:
    """Return Spearman's rank correlation of two tables of the same things, with an interval.

    Things (heads, edges) are drawn with replacement, and ranked again in each draw. Where all are
    equal on one side there is no order: NaN.

    Raises:
        ParameterError: if the tables differ in shape, or have fewer than 3 things.
    """
    first, second = (np.asarray(one, dtype=float).ravel() for one in (estimated, measured))
    if np.shape(estimated) != np.shape(measured) or len(first) < 3:
        raise ParameterError(
            f"the tables have shapes {np.shape(estimated)} and {np.shape(measured)}, but the same "
            "things, at least 3, are needed. Pass both for the same layers and columns."
        )
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(first), (resamples, len(first)))
    values = _correlations(first[drawn], second[drawn])
    tail = (1 - confidence) / 2
    known = values[np.isfinite(values)]
    ends = np.quantile(known, [tail, 1 - tail]) if len(known) else [np.nan, np.nan]
    own = _correlations(first[None], second[None])[0]
    return RankCorrelation(float(own), float(ends[0]), float(ends[1]), len(first))


def _correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    ranks = [rankdata(one, axis=1) for one in (first, second)]
    a, b = (one - one.mean(axis=1, keepdims=True) for one in ranks)
    spread = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=1) / spread
