"""Metrics of one run of yes/no answers, and what a shift of its yes/no threshold would buy.

A metric is a function of a run and of ``weights[resample, row]`` that returns one value a resample,
so that a bootstrap is a few matrix products; with all weights 1 it is the plain metric.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from clva_lens.ground.errors import BenchmarkError


@dataclass(frozen=True)
class Outcomes:
    """The columns of a run that metrics are computed from, one entry a row.

    ``predicted_yes`` and ``predicted_no`` are 0 or 1, and both 0 for an answer that is neither; a
    fraction stands for a coin toss. ``margin`` is logit(yes) − logit(no), nan where missing.
    """

    label_yes: np.ndarray
    predicted_yes: np.ndarray
    predicted_no: np.ndarray
    margin: np.ndarray

    @classmethod
    def of(
        cls,
        labels: Sequence[str],
        predictions: Sequence[str],
        margins: Sequence[float | None] | None = None,
    ) -> "Outcomes":
        """Return the columns for labels, parsed predictions and margins in the same order."""
        if not len(labels) == len(predictions) == len(labels if margins is None else margins) > 0:
            raise BenchmarkError(
                f"there are {len(labels)} labels, {len(predictions)} predictions and "
                f"{'no' if margins is None else len(margins)} margins. Pass one of each a sample."
            )
        words = np.asarray(predictions, dtype=str)
        values = [math.nan] * len(labels) if margins is None else margins
        return cls(
            label_yes=_is_yes(labels).astype(float),
            predicted_yes=(words == "yes").astype(float),
            predicted_no=(words == "no").astype(float),
            margin=np.array([math.nan if m is None else m for m in values], dtype=float),
        )

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]]) -> "Outcomes":
        """Return the columns of a score's rows (keys label, prediction and margin)."""
        columns = ([row[key] for row in rows] for key in ("label", "prediction", "margin"))
        return cls.of(*columns)

    @property
    def correct(self) -> np.ndarray:
        """1 where the answer is right, 0 where not; an answer that is neither yes nor no is not."""
        return self.label_yes * self.predicted_yes + (1 - self.label_yes) * self.predicted_no


Metric = Callable[[Any, np.ndarray], np.ndarray]


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, nan where the whole is 0."""
    return np.divide(part, whole, out=np.full(whole.shape, math.nan), where=whole > 0)


def _accuracy(run: Outcomes, weights: np.ndarray) -> np.ndarray:
    return ratio(weights @ run.correct, weights.sum(axis=1))


def _f1(run: Outcomes, weights: np.ndarray) -> np.ndarray:
    true_yes = weights @ (run.label_yes * run.predicted_yes)
    predicted, labelled = weights @ run.predicted_yes, weights @ run.label_yes
    # Without a predicted yes there is no precision, without a yes-label no recall: no F1 then.
    whole = np.where((predicted > 0) & (labelled > 0), predicted + labelled, 0.0)
    return ratio(2 * true_yes, whole)


def _yes_ratio(run: Outcomes, weights: np.ndarray) -> np.ndarray:
    return ratio(weights @ run.predicted_yes, weights.sum(axis=1))


def _false_positive_rate(run: Outcomes, weights: np.ndarray) -> np.ndarray:
    return ratio(weights @ ((1 - run.label_yes) * run.predicted_yes), weights @ (1 - run.label_yes))


def _auc(run: Outcomes, weights: np.ndarray) -> np.ndarray:
    if np.isnan(run.margin).any():
        return np.full(len(weights), math.nan)
    order = np.argsort(run.margin, kind="stable")
    margin, yes = run.margin[order], run.label_yes[order] > 0
    ordered = weights[:, order]
    below = np.zeros((len(weights), len(order) + 1))
    np.cumsum(ordered * ~yes, axis=1, out=below[:, 1:])
    # The no-rows below each yes-row's margin, and half of those that tie with it.
    first = np.searchsorted(margin, margin[yes], side="left")
    last = np.searchsorted(margin, margin[yes], side="right")
    passed = (below[:, first] + below[:, last]) / 2
    positive = ordered[:, yes]
    wins = np.einsum("ry,ry->r", positive, passed)
    return ratio(wins, positive.sum(axis=1) * below[:, -1])


METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "auc": _auc,
    "yes_ratio": _yes_ratio,
    "false_positive_rate": _false_positive_rate,
}


def _is_yes(labels: ArrayLike) -> np.ndarray:
    array = np.asarray(labels)
    if array.dtype == bool:
        return array
    strange = sorted({str(label) for label in array.tolist()} - {"yes", "no"})
    if strange:
        raise BenchmarkError(f"a label must be yes or no, but '{strange[0]}' was found. Map it.")
    return array == "yes"


def _margins_and_labels(margins: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values, yes = np.asarray(margins, dtype=float), _is_yes(labels)
    if values.shape != yes.shape or values.ndim != 1 or not len(values):
        raise BenchmarkError(
            f"margins have shape {values.shape} but labels {yes.shape}. Pass one of each a sample."
        )
    return values, yes


def auc(margins: ArrayLike, labels: ArrayLike) -> float:
    """Return the probability that a yes-sample has a larger margin than a no-sample.

    Ties count one half (midranks). nan if a margin is nan or None, or one label does not occur.
    Labels are "yes"/"no" or bools.
    """
    values, yes = _margins_and_labels(margins, labels)
    positives = int(yes.sum())
    negatives = len(yes) - positives
    if np.isnan(values).any() or not positives or not negatives:
        return math.nan
    rank_sum = float(rankdata(values)[yes].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def bias_matched(run: Outcomes, yes_count: int) -> Outcomes:
    """Return the run as if it had said yes to its ``yes_count`` largest margins.

    The honest control of Yin et al. (arXiv:2504.10020): what a mere shift of the yes/no threshold
    buys. Rows that tie at the threshold share the remaining yeses as fractions, which is the
    expectation over breaking the tie at random.

    Raises:
        BenchmarkError: if a margin is missing or there are fewer rows than yeses.
    """
    n = len(run.margin)
    if np.isnan(run.margin).any():
        raise BenchmarkError(
            f"{int(np.isnan(run.margin).sum())} of {n} margins are missing, so no threshold can be "
            "shifted. Record logit(yes) - logit(no) for every answer of the baseline."
        )
    if not 0 <= yes_count <= n:
        raise BenchmarkError(f"yes_count={yes_count}, but there are {n} rows. Pass 0 to {n}.")
    if yes_count == 0:
        said_yes = np.zeros(n)
    else:
        threshold = np.sort(run.margin)[n - yes_count]
        above, tied = run.margin > threshold, run.margin == threshold
        said_yes = above + tied * ((yes_count - above.sum()) / tied.sum())
    return Outcomes(run.label_yes, said_yes, 1 - said_yes, run.margin)


def why_no_threshold(run: Outcomes) -> str | None:
    """Return why the run's answers are not those of a threshold on its margins, None if they are.

    They are if each yes has a larger margin than every no. Sampled answers are not, nor are texts
    that a parser reads otherwise than the margin does: there is no threshold to move then. Answers
    that are neither yes nor no do not count, see ``bias_matched_to``.
    """
    read = _read(run)
    answered = int(read.sum())
    if not answered:
        return f"none of its {len(read)} answers is a yes or a no"
    margins, said_yes = run.margin[read], run.predicted_yes[read] > 0
    missing = int(np.isnan(margins).sum())
    if missing:
        return f"it lacks the margins of {missing} of its {answered} yes/no answers"
    contrary = answered - round(best_threshold_accuracy(margins, said_yes) * answered)
    if contrary:
        return (
            f"{contrary} of its {answered} yes/no answers contradict its margins at every threshold"
        )
    return None


def bias_matched_to(run: Outcomes, other: Outcomes) -> Outcomes:
    """Return the run with its threshold moved to the number of yeses of another on the same rows.

    Answers of the run that are neither yes nor no stay as they are, since no threshold makes them
    readable: the yeses are counted, and moved, over the rest. So a run matched to itself is itself,
    exactly. The run must have a threshold, see ``why_no_threshold``.
    """
    read = _read(run)
    unsaid = np.zeros(int(read.sum()))
    threshold = Outcomes(run.label_yes[read], unsaid, unsaid, run.margin[read])
    moved = bias_matched(threshold, int(other.predicted_yes[read].sum()))
    said_yes, said_no = run.predicted_yes.copy(), run.predicted_no.copy()
    said_yes[read], said_no[read] = moved.predicted_yes, moved.predicted_no
    return Outcomes(run.label_yes, said_yes, said_no, run.margin)


def _read(run: Outcomes) -> np.ndarray:
    return run.predicted_yes + run.predicted_no > 0


def bias_matched_accuracy(
    margins: ArrayLike, labels: ArrayLike, target: int | Sequence[str]
) -> float:
    """Return the baseline's accuracy at another method's yes-ratio, see ``bias_matched``.

    ``target`` is the other method's number of yeses, or its predictions.
    """
    values, yes = _margins_and_labels(margins, labels)
    if not isinstance(target, int | np.integer):
        if len(target) != len(yes):
            raise BenchmarkError(
                f"there are {len(yes)} labels but {len(target)} predictions. Pass the predictions "
                "of the other method on the same samples, or their number of yeses."
            )
        target = list(target).count("yes")
    unused = np.zeros(len(yes))
    run = bias_matched(Outcomes(yes.astype(float), unused, unused, values), int(target))
    return float(_accuracy(run, np.ones((1, len(yes))))[0])


def best_threshold_accuracy(margins: ArrayLike, labels: ArrayLike) -> float:
    """Return the largest accuracy that any threshold on the margin reaches on these very samples.

    It is chosen with the labels in hand: an upper bound for threshold shifts, not a result.
    """
    values, yes = _margins_and_labels(margins, labels)
    if np.isnan(values).any():
        raise BenchmarkError("a margin is missing. Record logit(yes) - logit(no) for every answer.")
    order = np.argsort(values, kind="stable")
    # Right answers when the first k rows in the order of the margin are "no" and the rest "yes".
    steps = np.where(yes[order], -1, 1)
    right = np.concatenate([[0], np.cumsum(steps)]) + yes.sum()
    # A cut inside a run of equal margins is no threshold.
    allowed = np.concatenate([[True], np.diff(values[order]) != 0, [True]])
    return float(right[allowed].max() / len(yes))
