"""A metric over two strengths: the α × β surface as a heat map."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.patches import Rectangle

from clva_lens.figures.base import SMALL, Drawing, Example, figure, plain, printed_width
from clva_lens.ground.errors import FigureError

_GRID = [{"alpha": a, "beta": b, "change": a - b} for a in (0, 14) for b in (0.0, 0.9)]
_OPTIONS: dict[str, Any] = {
    "across": "alpha",
    "down": "beta",
    "value": "change",
    "label": "change (points)",
}


def _recorded(record: Any, table: str, **options: Any) -> Drawing:
    return surface(record.rows(table), **options)


@figure(
    "surface",
    of_record=_recorded,
    example=Example(
        {"rows": _GRID, **_OPTIONS}, tables={"grid": _GRID}, options={"table": "grid", **_OPTIONS}
    ),
)
def surface(
    rows: Sequence[Mapping[str, Any]],
    across: str,
    down: str,
    value: str,
    label: str = "",
    marked: Sequence[float] | None = None,
    mark: str = "CLVA's defaults",
) -> Drawing:
    """Return a heat map of one value over a grid of two parameters, with the values written in.

    Args:
        rows: one for each pair of parameters, with the keys ``across``, ``down`` and ``value``;
            colours diverge around 0.
        across: the parameter from left to right.
        down: the parameter from top to bottom.
        value: what is drawn.
        label: what it is, with its unit, above the grid.
        marked: a pair (across, down) whose cell is framed; None, or one that is not there, frames
            none.
        mark: what the frame says.

    Raises:
        FigureError: if a pair is missing or given twice.
    """
    columns = sorted({row[across] for row in rows})
    lines = sorted({row[down] for row in rows})
    table = {(row[down], row[across]): row[value] for row in rows}
    if not rows or len(table) != len(rows) or len(table) != len(columns) * len(lines):
        raise FigureError(
            f"{len(rows)} rows do not fill a grid of {len(lines)} × {len(columns)}. Pass one row "
            f"for each pair of {across} and {down}."
        )
    array = np.array([[table[line, column] for column in columns] for line in lines], dtype=float)
    fig = Drawing(printed_width(0.34 * len(columns) + 1.2), 0.3 * len(lines) + 1.1, rows)
    ax = fig.add_subplot()
    top = float(np.abs(array).max()) or 1.0
    sns.heatmap(
        array,
        ax=ax,
        cmap="vlag",
        vmin=-top,
        vmax=top,
        annot=np.vectorize(lambda x: f"{x + 0.0:+.1f}".replace("-", "−"))(array),
        fmt="",
        annot_kws={"fontsize": SMALL},
        xticklabels=[f"{one:g}" for one in columns],
        yticklabels=[f"{one:g}" for one in lines],
        cbar_kws={"pad": 0.02},
    )
    ax.set_title("\n".join(map(plain, (label or value).split("\n"))))
    ax.set_xlabel(plain(across))
    ax.set_ylabel(plain(down))
    ax.tick_params(length=2, rotation=0)
    if marked is not None and marked[0] in columns and marked[1] in lines:
        corner = columns.index(marked[0]), lines.index(marked[1])
        frame = Rectangle(corner, 1, 1, fill=False, ec="black", lw=1.4, clip_on=False, label=mark)
        ax.add_patch(frame)
        fig.legend(handles=[frame], loc="outside lower center")
    return fig
