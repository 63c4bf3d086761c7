"""What each method changes, with intervals: one column a metric, one block a benchmark."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clva_lens.figures.base import BLUE, PAGE, Drawing, Example, figure, plain, verbatim
from clva_lens.ground.errors import FigureError

_LABELS = {
    "accuracy": "accuracy\n(points)",
    "f1": "F1\n(points)",
    "yes_ratio": "yes-ratio\n(points)",
    "auc": "AUC\n(× 100)",
    "beyond_bias": "accuracy beyond\nthe same bias (points)",
    "chair_s": "CHAIR_s\n(points)",
    "chair_i": "CHAIR_i\n(points)",
    "recall": "recall\n(points)",
}


_METRICS = ["accuracy", "auc"]
_ROWS = [
    {"benchmark": "pope/toy", "method": "clva", "metric": metric, "change": 0.1}
    | {"low": low, "high": 0.2}
    for metric, low in zip(_METRICS, (0.05, None), strict=True)
]


def _recorded(record: Any, table: str, metrics: Sequence[str], **options: str) -> Drawing:
    """Draw the changes in a table of ``measure_methods``."""
    rows = [row for row in record.rows(table) if np.isfinite(row["change"] or 0.0)]
    return differences(rows, metrics, **options)


@figure(
    "differences",
    of_record=_recorded,
    example=Example(
        {"rows": _ROWS, "metrics": _METRICS},
        tables={"methods": _ROWS},
        options={"table": "methods", "metrics": _METRICS},
    ),
)
def differences(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], baseline: str = "greedy"
) -> Drawing:
    """Return the change of each metric against a baseline, as dots with 95 % intervals.

    A filled dot has an interval that leaves out 0, an open one has not, a cross has no interval.
    A change that is None beside others of its method is written as undefined.

    Args:
        rows: ``benchmark, method, metric, change, low, high``, fractions, as ``measure_methods``
            returns them; drawn × 100.
        metrics: which ones, from left to right; benchmarks without the first are left out.
        baseline: what the changes are against, for the label.

    Raises:
        FigureError: if no row has one of the metrics and a change.
    """
    chosen = [r for r in rows if r["metric"] in metrics]
    # A method without any change is the baseline.
    changed = {(r["benchmark"], r["method"]) for r in chosen if r["change"] is not None}
    chosen = [row for row in chosen if (row["benchmark"], row["method"]) in changed]
    # Captions and questions both have a recall, but a block without the first metric is not meant.
    meant = {row["benchmark"] for row in chosen if row["metric"] == metrics[0]}
    chosen = [row for row in chosen if row["benchmark"] in meant]
    absent = [name for name in metrics if name not in {r["metric"] for r in chosen}]
    if absent or not metrics:
        raise FigureError(
            f"no row has a change of {', '.join(absent) or 'no metric'}. Pass rows of methods with "
            "these metrics."
        )
    places = list(dict.fromkeys((row["benchmark"], row["method"]) for row in chosen))
    blocks = list(dict.fromkeys(benchmark for benchmark, _ in places))
    y = {place: n + 0.9 * blocks.index(place[0]) for n, place in enumerate(places)}
    fig = Drawing(PAGE, 0.155 * (max(y.values()) + 2) + 0.75, chosen)
    panels = fig.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for ax, metric in zip(panels, metrics, strict=True):
        for row in (row for row in chosen if row["metric"] == metric):
            _dot(ax, row, y[row["benchmark"], row["method"]])
        ax.axvline(0, color="0.3", lw=0.7)
        ax.set_xlabel(_LABELS.get(metric, plain(metric)))
        ax.grid(axis="x", color="0.92", lw=0.5)
        ax.set_axisbelow(True)
    first = panels[0]
    first.set_ylim(max(y.values()) + 0.8, -1.0)
    first.set_yticks(list(y.values()), [plain(method, 30) for _, method in places])
    for block in blocks:
        top = min(at for (benchmark, _), at in y.items() if benchmark == block)
        first.text(
            0.0,
            top - 0.62,
            plain(block),
            fontsize=6.5,
            color="0.35",
            transform=first.get_yaxis_transform(),
        )
    verbatim(*first.get_yticklabels())
    fig.supxlabel(f"change against {plain(baseline)}, with 95 % intervals", fontsize=8)
    return fig


def _dot(ax: Any, row: Mapping[str, Any], y: float) -> None:
    if row["change"] is None:
        ax.text(0.0, y, "undefined", fontsize=6, color="0.4", ha="center", va="center")
        return
    value = 100 * row["change"]
    if row["low"] is None:
        ax.plot([value], [y], "x", color="0.4", ms=3.5, mew=0.9)
        return
    low, high = 100 * row["low"], 100 * row["high"]
    sure = low > 0 or high < 0
    ax.plot([low, high], [y, y], color=BLUE, lw=1.1, solid_capstyle="butt")
    ax.plot([value], [y], "o", ms=3.6, mec=BLUE, mew=0.9, mfc=BLUE if sure else "white")
