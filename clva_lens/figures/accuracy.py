"""Methods side by side: every accuracy stands beside its yes-ratio and its AUC."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from clva_lens.figures.base import (
    MARKERS,
    PAGE,
    PALETTE,
    SMALL,
    Drawing,
    Example,
    embolden,
    figure,
    plain,
    verbatim,
)
from clva_lens.ground.errors import FigureError

_PANELS = {
    "accuracy": "accuracy ↑ (fraction right)",
    "yes_ratio": "yes-ratio (fraction of answers)",
    "auc": "AUC of the margin ↑ (probability)",
}
_MATCHED = "bias_matched_accuracy"


_ROWS = [
    {"split": split, "method": method, "metric": metric, "value": 0.5, "low": 0.4, "high": 0.6}
    for split in ("random", "adversarial")
    for method in ("greedy", "clva")
    for metric in _PANELS
]


@figure("method_comparison", example=Example({"rows": _ROWS}))
def method_comparison(
    rows: Sequence[Mapping[str, Any]], *, label_yes_ratio: float | None = 0.5
) -> Drawing:
    """Return accuracy, yes-ratio and AUC of each method in each split, as dots with intervals.

    A row has ``split``, ``method``, ``metric``, ``value``, and ``low`` and ``high`` (None for no
    interval). Each method of each split needs all of accuracy, yes_ratio and auc; an auc without
    margins is nan and written as such. A row ``bias_matched_accuracy`` (optional) is drawn as a
    hollow diamond: the accuracy of the baseline at that method's yes-ratio.

    Args:
        rows: the values, fractions in [0, 1]; splits and methods are drawn in the order they come.
        label_yes_ratio: share of yes-labels, a line in the yes-ratio panel; None for none.

    Raises:
        FigureError: if there are no rows, one lacks a key or is given twice, a metric is missing,
            a value is nan (but for auc) or outside its interval, or there are > 7 methods.
    """
    table = _table(rows)
    splits = list(dict.fromkeys(split for split, _, _ in table))
    methods = list(dict.fromkeys(method for _, method, _ in table))
    if len(methods) > len(PALETTE):
        raise FigureError(f"{len(methods)} methods are more than {len(PALETTE)}. Draw fewer.")
    height = 1.2 + 0.17 * len(methods) * len(splits) + 0.2 * len(splits)
    fig = Drawing(PAGE, height, [dict(row) for row in rows])
    panels = fig.subplots(1, 3, sharey=True)
    step = 0.7 / len(methods)
    for ax, (metric, label) in zip(panels, _PANELS.items(), strict=True):
        for place, split in enumerate(splits):
            for number, method in enumerate(methods):
                y = place + (number - (len(methods) - 1) / 2) * step
                _dot(ax, y, table.get((split, method, metric)), number)
                if metric == "accuracy" and (split, method, _MATCHED) in table:
                    value = table[split, method, _MATCHED][0]
                    ax.plot([value], [y], "D", ms=5.5, mfc="none", mec="0.35", mew=0.9)
        ax.set_xlabel(label)
        ax.grid(axis="x", color="0.9", lw=0.6)
        ax.set_axisbelow(True)
        for edge in np.arange(0.5, len(splits) - 1):
            ax.axhline(edge, color="0.85", lw=0.6)
    if label_yes_ratio is not None:
        panels[1].axvline(label_yes_ratio, color="0.3", lw=0.8, ls=":")
    panels[0].set_yticks(range(len(splits)), [plain(split, 24) for split in splits])
    panels[0].set_ylim(len(splits) - 0.5, -0.5)
    verbatim(*panels[0].get_yticklabels())
    _legend(fig, methods, label_yes_ratio, any(key[2] == _MATCHED for key in table))
    return fig


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], tuple]:
    table: dict[tuple[str, str, str], tuple] = {}
    for row in rows:
        absent = {"split", "method", "metric", "value"} - set(row)
        if absent:
            raise FigureError(
                f"a row has no {', '.join(sorted(absent))}. Add the key to {dict(row)}."
            )
        key = (row["split"], row["method"], row["metric"])
        if key in table:
            raise FigureError(f"{' / '.join(key)} is given twice. Pass one row each.")
        if row["metric"] not in (*_PANELS, _MATCHED):
            raise FigureError(
                f"there is no panel for the metric '{row['metric']}'. Pass {', '.join(_PANELS)} or "
                f"{_MATCHED}."
            )
        value, low, high = row["value"], row.get("low"), row.get("high")
        if math.isnan(value) and row["metric"] != "auc":
            raise FigureError(f"{' / '.join(key)} is nan. Leave the method out of the figure.")
        if low is not None and high is not None and (value < low or value > high):
            raise FigureError(f"{' / '.join(key)}: {value} is outside [{low}, {high}]. Check it.")
        table[key] = (value, low, high)
    if not table:
        raise FigureError("there are 0 rows to draw. Pass one row a split, method and metric.")
    for split, method in dict.fromkeys((split, method) for split, method, _ in table):
        for metric in _PANELS:
            if (split, method, metric) not in table:
                raise FigureError(
                    f"{split} / {method} has no {metric}. Pass accuracy, yes_ratio and auc "
                    "together: one without the others misleads."
                )
    return table


def _dot(ax: Any, y: float, entry: tuple | None, number: int) -> None:
    if entry is None:
        return
    value, low, high = entry
    if math.isnan(value):
        ax.text(
            0.02,
            y,
            "no margins",
            transform=ax.get_yaxis_transform(),
            fontsize=SMALL,
            va="center",
            color="0.35",
        )
        return
    if low is not None and high is not None:
        ax.plot([low, high], [y, y], color=PALETTE[number], lw=1.2, solid_capstyle="butt")
    ax.plot([value], [y], MARKERS[number], color=PALETTE[number], ms=3.8)


def _legend(fig: Drawing, methods: list[str], yes_ratio: float | None, matched: bool) -> None:
    handles = [
        Line2D([], [], color=PALETTE[n], marker=MARKERS[n], ms=3.8, lw=1.2, label=plain(name, 28))
        for n, name in enumerate(methods)
    ]
    if matched:
        handles.append(
            Line2D(
                [],
                [],
                ls="none",
                marker="D",
                ms=5.5,
                mfc="none",
                mec="0.35",
                label="baseline at the method's yes-ratio",
            )
        )
    if yes_ratio is not None:
        handles.append(Line2D([], [], color="0.3", lw=0.8, ls=":", label="yes-ratio of the labels"))
    legend = fig.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    embolden(legend.get_texts(), "CLVA")
    verbatim(*legend.get_texts())
