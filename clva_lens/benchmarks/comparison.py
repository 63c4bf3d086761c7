"""Two methods on the same samples: what changed, how surely, and could a threshold do it."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clva_lens.benchmarks.base import Score, require_same_ids
from clva_lens.benchmarks.metrics import METRICS, Metric, Outcomes, bias_matched
from clva_lens.benchmarks.statistics import Bootstrap, Interval, cluster_index, mcnemar
from clva_lens.errors import BenchmarkError

COMPARED = ("accuracy", "f1", "auc", "yes_ratio")


class MetricPair(NamedTuple):
    """A metric of methods A and B, and the paired interval of B − A."""

    a: float
    b: float
    difference: Interval


@dataclass(frozen=True, repr=False)
class Comparison:
    """What method B changes against method A on the same samples.

    ``metrics`` holds accuracy, f1, auc and yes_ratio, which belong together: a gain in accuracy
    with a moved yes-ratio and the same AUC is a shift of the threshold, not better sight.

    Attributes:
        fixed: answers wrong under A and right under B; ``broken`` is the reverse.
        p_value: exact McNemar test of fixed against broken; it ignores groups.
        bias_matched_accuracy: accuracy of A with its threshold moved to B's number of yeses.
        beyond_bias: accuracy of B minus that, with its interval (the threshold held fixed); the
            last two are nan and None if A lacks a margin.
    """

    metrics: dict[str, MetricPair]
    n: int
    groups: int
    fixed: int
    broken: int
    p_value: float
    bias_matched_accuracy: float
    beyond_bias: Interval | None

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
        if self.beyond_bias is None:
            lines.append("  bias-matched accuracy of A: unknown, A lacks margins")
        else:
            gain = self.beyond_bias
            lines.append(
                f"  bias-matched accuracy of A {self.bias_matched_accuracy:.4f}, B beyond it "
                f"{gain.estimate:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
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

    Raises:
        BenchmarkError: if the ids, the labels or the parsers of the two scores differ, or there
            are fewer than two groups.
    """
    rows_a, rows_b = _paired_rows(score_a, score_b)
    a, b = Outcomes.from_rows(rows_a), Outcomes.from_rows(rows_b)
    groups = [("group", row["group"]) if row["group"] else ("id", row["id"]) for row in rows_a]
    index = cluster_index(groups, len(rows_a))
    tasks: list[tuple[Metric, Outcomes, Outcomes]] = [(METRICS[name], a, b) for name in COMPARED]
    shifted = None if np.isnan(a.margin).any() else bias_matched(a, int(b.predicted_yes.sum()))
    if shifted is not None:
        tasks.append((METRICS["accuracy"], shifted, b))
    intervals = Bootstrap(index, resamples, confidence, seed).intervals(tasks)
    one = np.ones((1, len(rows_a)))
    right_a, right_b = a.correct > 0, b.correct > 0
    fixed, broken = int((~right_a & right_b).sum()), int((right_a & ~right_b).sum())
    return Comparison(
        metrics={
            name: MetricPair(
                float(METRICS[name](a, one)[0]), float(METRICS[name](b, one)[0]), interval
            )
            for name, interval in zip(COMPARED, intervals, strict=False)
        },
        n=len(rows_a),
        groups=int(index.max()) + 1,
        fixed=fixed,
        broken=broken,
        p_value=mcnemar(fixed, broken),
        bias_matched_accuracy=math.nan if shifted is None else float(shifted.correct.mean()),
        beyond_bias=None if shifted is None else intervals[-1],
    )


def _paired_rows(score_a: Score, score_b: Score) -> tuple[list[dict], list[dict]]:
    require_same_ids(
        "rows of A",
        [row["id"] for row in score_a.rows],
        "rows of B",
        [r["id"] for r in score_b.rows],
    )
    by_id = {row["id"]: row for row in score_b.rows}
    pairs = [(row, by_id[row["id"]]) for row in score_a.rows]
    for key in ("label", "group", "parser"):
        for row_a, row_b in pairs:
            if row_a.get(key) != row_b.get(key):
                raise BenchmarkError(
                    f"the {key} of '{row_a['id']}' is '{row_a.get(key)}' in A but "
                    f"'{row_b.get(key)}' in B. Score both on the same samples with one parser."
                )
    return score_a.rows, [row_b for _, row_b in pairs]
