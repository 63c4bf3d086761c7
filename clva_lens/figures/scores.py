"""The scores of one run, each with its interval."""

from collections.abc import Mapping, Sequence
from typing import Any

from clva_lens.figures.base import BLUE, COLUMN, Drawing, Example, figure, plain, verbatim
from clva_lens.ground.errors import FigureError

_ROWS = [
    {"metric": "accuracy", "value": 0.8, "low": 0.7, "high": 0.9},
    {"metric": "auc", "value": 0.9, "low": None, "high": None},
]


@figure("scores", example=Example({"rows": _ROWS, "title": "pope/toy"}))
def scores(rows: Sequence[Mapping[str, Any]], *, title: str = "") -> Drawing:
    """Return one line a metric: a dot at its value, and its 95 % interval.

    Args:
        rows: ``metric, value, low, high``; fractions in [0, 1]; None as low and high draws none.
        title: what was run.

    Raises:
        FigureError: if there are no rows.
    """
    if not rows:
        raise FigureError("there are 0 metrics to draw. Pass one row a metric.")
    fig = Drawing(COLUMN, 0.24 * len(rows) + 0.75, rows)
    ax = fig.add_subplot()
    for y, row in enumerate(rows):
        if row["low"] is not None:
            ax.plot([row["low"], row["high"]], [y, y], color=BLUE, lw=1.4, solid_capstyle="butt")
        ax.plot([row["value"]], [y], "o", color=BLUE, ms=4)
    ax.set_yticks(range(len(rows)), [plain(row["metric"], 24) for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(-0.02, 1.02)
    ax.grid(axis="x", color="0.92", lw=0.5)
    ax.set_axisbelow(True)
    ax.set_xlabel("value, with 95 % interval")
    ax.set_title(plain(title, 48), fontsize=8)
    verbatim(ax.title, *ax.get_yticklabels())
    return fig
