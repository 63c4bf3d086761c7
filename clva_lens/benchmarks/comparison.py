"""Two methods on the same samples: what changed, how surely, and could a threshold do it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from clva_lens.benchmarks.base import Score, require_same_ids
from clva_lens.benchmarks.metrics import (
    METRICS,
    Metric,
    Outcomes,
    bias_matched_to,
    why_no_threshold,
)
from clva_lens.benchmarks.statistics import Bootstrap, Interval, cluster_index, mcnemar
from clva_lens.ground.drawn import SelfDrawn, drawing
from clva_lens.ground.errors import BenchmarkError
from clva_lens.ground.parameters import check_arguments
from clva_lens.ground.registry import Registry


class RowKind(NamedTuple):
    """How rows of one kind are compared; a row names its kind, "yes/no" if it does not.

    Attributes:
        columns: a run from its rows; its ``correct`` is 1 where a row is right, else 0.
        metrics: what is compared, functions of such a run.
        same: keys of a row that must agree between the two.
        threshold: whether answers lie on either side of a margin, so that a shift of the threshold
            is a control; then ``columns`` gives ``Outcomes``.
    """

    columns: Callable[[Sequence[dict[str, Any]]], Any]
    metrics: Mapping[str, Metric]
    same: tuple[str, ...]
    threshold: bool = False


ROW_KINDS = Registry[RowKind]("kind of rows")
YES_NO = "yes/no"
COMPARED = ("accuracy", "f1", "auc", "yes_ratio")
ROW_KINDS.register(
    YES_NO,
    RowKind(
        Outcomes.from_rows,
        {name: METRICS[name] for name in COMPARED},
        ("label", "group", "parser"),
        threshold=True,
    ),
)


class MetricPair(NamedTuple):
    """A metric of methods A and B, and the paired interval of B − A."""

    a: float
    b: float
    difference: Interval


@dataclass(frozen=True, repr=False)
class Comparison(SelfDrawn):
    """What method B changes against method A on the same samples.

    For yes/no questions ``metrics`` holds accuracy, f1, auc and yes_ratio, which belong together: a
    gain in accuracy with a moved yes-ratio and the same AUC is a shift of the threshold, not better
    sight. For captions it holds those of CHAIR.

    Attributes:
        kind: what was compared, a name in ``ROW_KINDS``.
        fixed: answers wrong under A and right under B; ``broken`` is the reverse. A caption is
            right if it has no hallucination.
        p_value: exact McNemar test of fixed against broken; it ignores groups.
        bias_matched_accuracy: accuracy of A with its threshold moved to B's number of yeses.
            Answers of A that are neither yes nor no stay so (``unread`` counts them), and yeses
            are counted over the others: what B makes readable, no threshold does.
        beyond_bias: accuracy of B minus that, with its interval (the threshold held fixed).
        no_threshold: why the last two are undefined, and None: A has no threshold to move, such as
            sampled answers. None if they are defined, and for captions.
        unread: how many answers of A are neither yes nor no; 0 for captions.
    """

    kind: str
    metrics: dict[str, MetricPair]
    n: int
    groups: int
    fixed: int
    broken: int
    p_value: float
    bias_matched_accuracy: float | None
    beyond_bias: Interval | None
    no_threshold: str | None
    unread: int

    def draw(self, name: str = "B", against: str = "A") -> Any:
        """Return what B changes, with intervals, as a matplotlib figure.

        ``name`` is what B is called in it, ``against`` what A is.
        """
        changes = {metric: pair.difference for metric, pair in self.metrics.items()}
        if self.beyond_bias is not None:
            changes["beyond_bias"] = self.beyond_bias
        same = {"benchmark": self.kind, "method": name}
        rows = [
            {**same, "metric": metric, "change": one.estimate, "low": one.low, "high": one.high}
            for metric, one in changes.items()
            if math.isfinite(one.estimate)
        ]
        return drawing("differences")(rows, [row["metric"] for row in rows], baseline=against)

    def __repr__(self) -> str:
        """Return a small table."""
        first = next(iter(self.metrics.values())).difference
        lines = [
            f"B against A on {self.n} samples of {self.groups} groups",
            f"  {'':<10}{'A':>9}{'B':>9}{'B - A':>9}   {first.confidence:.0%} interval",
        ]
        for name, (a, b, change) in self.metrics.items():
            ends = f"[{change.low:+.4f}, {change.high:+.4f}]"
            if change.undefined:
                ends += f", undefined in {change.undefined} of {change.resamples} resamples"
            lines.append(f"  {name:<10}{a:>9.4f}{b:>9.4f}{change.estimate:>+9.4f}   {ends}")
        lines.append(f"  fixed {self.fixed}, broken {self.broken}, McNemar p = {self.p_value:.3g}")
        if not ROW_KINDS.get(self.kind).threshold:
            return "\n".join(lines)
        gain = self.beyond_bias
        if gain is None:
            lines.append(
                "  bias-matched accuracy of A, and B beyond it: undefined, because A has no "
                f"threshold to move: {self.no_threshold}"
            )
        else:
            kept = (
                f"\n    ({self.unread} answers of A are neither yes nor no and stay so)"
                if self.unread
                else ""
            )
            lines.append(
                f"  bias-matched accuracy of A {self.bias_matched_accuracy:.4f}, B beyond it "
                f"{gain.estimate:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]{kept}"
            )
        return "\n".join(lines)


def compare(
    score_a: Score,
    score_b: Score,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Return the comparison of two scores of one benchmark, their rows paired by sample id.

    Rows without a group are groups of their own.

    Args:
        score_a: of what is compared with.
        score_b: of what is judged.
        resamples: how many draws an interval is of.
        confidence: of the intervals, between 0 and 1.
        seed: of the draws.

    Raises:
        BenchmarkError: if the ids, the labels or the parsers of the two scores differ, their rows
            are of two kinds, or there are fewer than two groups.

    >>> reports = cl.evaluate(
    ...     model, "pope/toy/random", methods=[None, "knockout"], limit=8, progress=False
    ... )
    >>> len(cl.compare(*(report.score for report in reports)).metrics) > 3
    True
    """
    check_arguments(compare, score_a=score_a, score_b=score_b)
    kind = _kind(score_a, score_b)
    how = ROW_KINDS.get(kind)
    rows_a, rows_b = _paired_rows(score_a, score_b, how.same)
    a, b = how.columns(rows_a), how.columns(rows_b)
    index = _clusters(rows_a)
    tasks: list[tuple[Metric, Any, Any]] = [(metric, a, b) for metric in how.metrics.values()]
    no_threshold = why_no_threshold(a) if how.threshold else None
    shifted = bias_matched_to(a, b) if how.threshold and no_threshold is None else None
    if shifted is not None:
        tasks.append((METRICS["accuracy"], shifted, b))
    intervals = Bootstrap(index, resamples, confidence, seed).intervals(tasks)
    one = np.ones((1, len(rows_a)))
    right_a, right_b = a.correct > 0, b.correct > 0
    fixed, broken = int((~right_a & right_b).sum()), int((right_a & ~right_b).sum())
    return Comparison(
        kind=kind,
        metrics={
            name: MetricPair(float(metric(a, one)[0]), float(metric(b, one)[0]), interval)
            for (name, metric), interval in zip(how.metrics.items(), intervals, strict=False)
        },
        n=len(rows_a),
        groups=int(index.max()) + 1,
        fixed=fixed,
        broken=broken,
        p_value=mcnemar(fixed, broken),
        bias_matched_accuracy=None if shifted is None else float(shifted.correct.mean()),
        beyond_bias=None if shifted is None else intervals[-1],
        no_threshold=no_threshold,
        unread=sum(row["prediction"] == "other" for row in rows_a) if how.threshold else 0,
    )


def changed_answers(score_a: Score, score_b: Score) -> tuple[list[str], list[str]]:
    """Return the ids that B fixed, wrong under A and right under B, and those that it broke.

    Raises:
        BenchmarkError: if the scores cannot be compared (``compare``).
    """
    how = ROW_KINDS.get(_kind(score_a, score_b))
    rows_a, rows_b = _paired_rows(score_a, score_b, how.same)
    right_a, right_b = (how.columns(rows).correct > 0 for rows in (rows_a, rows_b))
    ids = [row["id"] for row in rows_a]
    fixed = [ids[place] for place in np.flatnonzero(~right_a & right_b)]
    return fixed, [ids[place] for place in np.flatnonzero(right_a & ~right_b)]


def metric_intervals(score: Score, confidence: float = 0.95) -> dict[str, Interval]:
    """Return the metrics that runs of this kind are compared by, each with its interval.

    Raises:
        BenchmarkError: if the rows are of several kinds or none, or of fewer than two groups.
    """
    how = ROW_KINDS.get(_kind(score, score))
    run = how.columns(score.rows)
    tasks: list[tuple[Metric, Any, Any]] = [(metric, run, None) for metric in how.metrics.values()]
    found = Bootstrap(_clusters(score.rows), confidence=confidence).intervals(tasks)
    return dict(zip(how.metrics, found, strict=True))


def _clusters(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    groups = [("group", row["group"]) if row["group"] else ("id", row["id"]) for row in rows]
    return cluster_index(groups, len(rows))


def _kind(score_a: Score, score_b: Score) -> str:
    kinds = {row.get("kind", YES_NO) for score in (score_a, score_b) for row in score.rows}
    if len(kinds) != 1:
        found = ", ".join(sorted(kinds)) or "none"
        raise BenchmarkError(
            f"the rows must be of one kind, but are: {found}. Compare scores of one benchmark."
        )
    kind = kinds.pop()
    if kind == YES_NO:
        for name, score in (("A", score_a), ("B", score_b)):
            first = score.rows[0]
            absent = [key for key in ("label", "prediction", "margin") if key not in first]
            if absent or first["label"] not in ("yes", "no"):
                raise BenchmarkError(
                    f"the rows of {name} are no yes/no questions ({', '.join(absent) or 'label'}). "
                    "Compare scores of a yes/no benchmark."
                )
    return kind


def _paired_rows(
    score_a: Score, score_b: Score, same: Sequence[str]
) -> tuple[list[dict], list[dict]]:
    require_same_ids(
        "rows of A",
        [row["id"] for row in score_a.rows],
        "rows of B",
        [r["id"] for r in score_b.rows],
    )
    by_id = {row["id"]: row for row in score_b.rows}
    pairs = [(row, by_id[row["id"]]) for row in score_a.rows]
    for key in same:
        for row_a, row_b in pairs:
            if row_a.get(key) != row_b.get(key):
                raise BenchmarkError(
                    f"the {key} of '{row_a['id']}' is '{row_a.get(key)}' in A but "
                    f"'{row_b.get(key)}' in B. Score both on the same samples and settings."
                )
    return score_a.rows, [row_b for _, row_b in pairs]
