"""What each method changes, with intervals: one column a metric, one block a benchmark."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from clva_lens.figures.base import (
    BLUE,
    SMALL,
    VERMILION,
    Drawing,
    Example,
    figure,
    plain,
    printed_width,
    verbatim,
)
from clva_lens.ground.errors import FigureError
from clva_lens.ground.files import Row

# What a metric is called; the arrow says which way is better.
_LABELS = {
    "accuracy": "accuracy ↑",
    "f1": "F1 ↑",
    "yes_ratio": "yes-ratio",
    "auc": "AUC ↑",
    "beyond_bias": "beyond\nsame\nbias ↑",
    "chair_s": "CHAIR_s ↓",
    "chair_i": "CHAIR_i ↓",
    "recall": "recall ↑",
}
# Inches of a metric's panel, of a row, and of all around the rows.
_PANEL, _ROW, _AROUND = 0.48, 0.155, 1.05
# Rows between the blocks of two benchmarks.
_GAP = 0.9
# What reaches further than so many times the upper quartile of all rows is cut at the axis.
_FAR = 2.5

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
    rows: Sequence[Row],
    metrics: Sequence[str],
    baseline: str = "greedy",
    marked: str = "CLVA",
) -> Drawing:
    """Return the change of each metric against a baseline, as dots with 95 % intervals.

    A filled dot has an interval that leaves out 0, an open one has not, a cross has no interval.
    A change that is None beside others of its method is written as undefined. Where a few reach
    many times as far as the others, the axis is the others': a triangle at its end, with the
    number, stands for what lies beyond.

    Args:
        rows: ``benchmark, method, metric, change, low, high``, fractions, as ``measure_methods``
            returns them, in any order; drawn × 100. Benchmarks and methods are drawn in the order
            in which each comes first.
        metrics: which ones, from left to right; benchmarks without the first are left out.
        baseline: what the changes are against, for the label.
        marked: the method whose rows have a colour of their own.

    Raises:
        FigureError: if no row has one of the metrics and a change.
    """
    chosen = _chosen(rows, metrics)
    y = _places(chosen)
    height = _ROW * (max(y.values()) + 2) + _AROUND
    longest = max(len(plain(method, 30)) for _, method in y)
    width = printed_width(0.058 * longest + _PANEL * len(metrics))
    fig = Drawing(width, height, chosen)
    panels = fig.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    drawn = set()
    for ax, metric in zip(panels, metrics, strict=True):
        of_metric = [row for row in chosen if row["metric"] == metric]
        ends = _ends(of_metric)
        for row in of_metric:
            at = y[row["benchmark"], row["method"]]
            drawn |= _dot(ax, row, at, ends, VERMILION if row["method"] == marked else BLUE)
        ax.set_xlim(*ends)
        ax.axvline(0, color="0.3", lw=0.7)
        ax.set_xlabel(_LABELS.get(metric, plain(metric)), fontsize=SMALL)
        ticks = _ticks(ends)
        ax.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", color="0.92", lw=0.5)
        ax.set_axisbelow(True)
    _name(panels[0], y, marked)
    _legend(fig, drawn, f"change against {plain(baseline)} (points; AUC × 100)")
    return fig


def _chosen(rows: Sequence[Row], metrics: Sequence[str]) -> list[Row]:
    """Return the rows of these metrics, of benchmarks with the first and methods with a change."""
    chosen = [r for r in rows if r["metric"] in metrics]
    # A method without any change is the baseline.
    changed = {(r["benchmark"], r["method"]) for r in chosen if r["change"] is not None}
    chosen = [row for row in chosen if (row["benchmark"], row["method"]) in changed]
    # Captions and questions both have a recall, but a block without the first metric is not meant.
    meant = {row["benchmark"] for row in chosen if row["metric"] == metrics[0]} if metrics else ()
    chosen = [row for row in chosen if row["benchmark"] in meant]
    absent = [name for name in metrics if name not in {r["metric"] for r in chosen}]
    if absent or not metrics:
        raise FigureError(
            f"no row has a change of {', '.join(absent) or 'no metric'}. Pass rows of methods with "
            "these metrics."
        )
    return chosen


def _places(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Return the height of each benchmark and method: benchmark after benchmark, with gaps."""
    blocks = list(dict.fromkeys(row["benchmark"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    there = {(row["benchmark"], row["method"]) for row in rows}
    places = [(b, m) for b in blocks for m in methods if (b, m) in there]
    return {place: n + _GAP * blocks.index(place[0]) for n, place in enumerate(places)}


def _reach(row: Row) -> tuple[float, float]:
    """Return the ends of what is drawn of a change, × 100, with 0 inside."""
    values = [100 * row[key] for key in ("change", "low", "high") if row[key] is not None]
    return min(0.0, *values), max(0.0, *values)


def _ends(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the ends of a metric's axis, which the few that reach far do not set."""
    reaches = [_reach(row) for row in rows if row["change"] is not None] or [(-1.0, 1.0)]
    far = [max(-low, high) for low, high in reaches]
    bound = _FAR * float(np.quantile(far, 0.75))
    near = [reach for reach, most in zip(reaches, far, strict=True) if 0 < most <= bound]
    low, high = (min(r[0] for r in near), max(r[1] for r in near)) if near else (-1.0, 1.0)
    if bound == 0:
        low, high = min(r[0] for r in reaches), max(r[1] for r in reaches)
    room = 0.1 * (high - low) or 1.0
    return low - room, high + room


def _ticks(ends: tuple[float, float]) -> list[float]:
    """Return 0 and the largest of 1, 2 and 5 times a power of ten on the longer side."""
    longer = max(ends, key=abs)
    power = 10.0 ** np.floor(np.log10(abs(longer)))
    nice = max(step * power for step in (1, 2, 5) if step * power <= abs(longer))
    return [0.0, float(np.copysign(nice, longer))]


def _dot(ax: Any, row: Row, y: float, ends: tuple[float, float], colour: str) -> set[str]:
    """Draw one change; return which marks it took, for the legend."""
    if row["change"] is None:
        ax.text(
            0.5,
            y,
            "undefined",
            fontsize=SMALL,
            color="0.4",
            ha="center",
            va="center",
            transform=ax.get_yaxis_transform(),
        )
        return set()
    value, (low, high) = 100 * row["change"], _reach(row)
    marks = set()
    if row["low"] is None:
        marks.add("none")
        ax.plot([value], [y], "x", color="0.4", ms=3.5, mew=0.9)
    else:
        low, high = 100 * row["low"], 100 * row["high"]
        sure = low > 0 or high < 0
        marks.add("sure" if sure else "unsure")
        ax.plot([low, high], [y, y], color=colour, lw=1.1, solid_capstyle="butt")
        ax.plot([value], [y], "o", ms=3.6, mec=colour, mew=0.9, mfc=colour if sure else "white")
    for beyond, end, shape in (
        (low < ends[0], ends[0], "<"),
        (high > ends[1], ends[1], ">"),
    ):
        if beyond:
            marks.add("far")
            ax.plot([end], [y], shape, color=colour, ms=4, mew=0, clip_on=False)
    if not ends[0] <= value <= ends[1]:
        side = "left" if value < ends[0] else "right"
        inner = min(max(high if side == "left" else low, ends[0]), ends[1])  # beside the interval
        place, shift = (inner, 4) if side == "left" else (inner, -4)
        written = f"{value:.0f}".replace("-", "−")
        ax.annotate(
            written,
            (place, y),
            (shift, 0),
            textcoords="offset points",
            fontsize=SMALL,
            color=colour,
            ha=side,
            va="center",
        )
    return marks


def _name(first: Any, y: Mapping[tuple[str, str], float], marked: str) -> None:
    """Write the methods beside their rows, and each benchmark above its own."""
    first.set_ylim(max(y.values()) + 0.8, -1.4)
    blocks: dict[str, float] = {}
    for (benchmark, _), at in y.items():
        blocks[benchmark] = min(at, blocks.get(benchmark, at))
    names = [plain(method, 30) for _, method in y] + [plain(block, 30) for block in blocks]
    first.set_yticks([*y.values(), *(top - 0.8 for top in blocks.values())], names)
    labels = first.get_yticklabels()
    for label, (_, method) in zip(labels, y, strict=False):
        if method == marked:
            label.set(color=VERMILION, weight="bold")
    for label in labels[len(y) :]:
        label.set(color="0.35", style="italic")
    verbatim(*labels)


def _legend(fig: Drawing, drawn: set[str], title: str) -> None:
    """Say what is drawn, and what the marks mean that are there."""
    circle: dict[str, Any] = {"marker": "o", "ms": 3.6, "mew": 0.9, "mec": "0.3"}
    shapes: dict[str, tuple[str, dict[str, Any]]] = {
        "sure": ("95 % interval leaves out 0", circle | {"mfc": "0.3"}),
        "unsure": ("95 % interval has 0", circle | {"mfc": "white"}),
        "none": ("no interval", {"marker": "x", "ms": 3.5, "mec": "0.4"}),
        "far": ("beyond the axis", {"marker": "<", "ms": 4, "mew": 0, "mfc": "0.3"}),
    }
    handles = [
        Line2D([], [], ls="none", label=words, **shape)
        for mark, (words, shape) in shapes.items()
        if mark in drawn
    ]
    fig.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2,
        title=title,
        title_fontsize=SMALL,
        handletextpad=0.1,
        columnspacing=1.0,
    )
