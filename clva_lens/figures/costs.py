"""What cases cost against a baseline: ratios with their quartiles."""

from collections.abc import Mapping, Sequence
from typing import Any

from clva_lens.figures.base import BLUE, PAGE, SMALL, Drawing, Example, figure, plain
from clva_lens.ground.errors import FigureError

_RATIO = {"case": "clva", "over": "greedy", "ratio": 1.1, "low": 1.0, "high": 1.2}
_ROWS = [_RATIO | {"model": model} for model in ("llava", "instructblip")]


def _recorded(record: Any, table: str) -> Drawing:
    return costs(record.rows(table))


@figure(
    "costs",
    of_record=_recorded,
    example=Example({"rows": _ROWS}, tables={"times": _ROWS}, options={"table": "times"}),
)
def costs(rows: Sequence[Mapping[str, Any]]) -> Drawing:
    """Return a dot for each ratio, with quartiles, in blocks by model.

    Args:
        rows: ``model, case, over, ratio, low, high``, as the bench writes them.

    Raises:
        FigureError: if there are no rows.
    """
    if not rows:
        raise FigureError("there are 0 rows to draw. Pass the rows of a bench.")
    models = list(dict.fromkeys(row["model"] for row in rows))
    at = [n + 1.2 * models.index(row["model"]) for n, row in enumerate(rows)]
    fig = Drawing(PAGE, 0.17 * (at[-1] + 2) + 0.6, rows)
    ax = fig.add_subplot()
    for y, row in zip(at, rows, strict=True):
        ax.plot([row["low"], row["high"]], [y, y], color=BLUE, lw=1.2, solid_capstyle="butt")
        ax.plot([row["ratio"]], [y], "o", color=BLUE, ms=3.4)
        ax.annotate(
            f"{row['ratio']:.2f}",
            (row["high"], y),
            (4, -2),
            textcoords="offset points",
            fontsize=SMALL,
        )
    for model in models:
        top = min(y for y, row in zip(at, rows, strict=True) if row["model"] == model)
        ax.text(
            0,
            top - 0.75,
            plain(model),
            fontsize=SMALL,
            color="0.35",
            transform=ax.get_yaxis_transform(),
        )
    ax.axvline(1, color="0.3", lw=0.7)
    ax.set_yticks(at, [plain(f"{row['case']} / {row['over']}", 60) for row in rows])
    ax.set_ylim(at[-1] + 0.8, -1.4)
    ax.margins(x=0.08)
    ax.set_xlabel("ratio, median over rounds and its quartiles (1: costs nothing)")
    ax.grid(axis="x", color="0.92", lw=0.5)
    ax.set_axisbelow(True)
    return fig
