"""Curves over layers, one panel a quantity, one colour a model or condition."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from matplotlib.lines import Line2D

from clva_lens.figures.base import MARKERS, PAGE, PALETTE, SMALL, Drawing, Example, figure, plain
from clva_lens.ground.errors import FigureError

_MOST_LEGEND_COLUMNS, _LABEL_WIDTH = 3, 30
# Runs of models that learned nothing, and their colour and marker.
_NULL, _GREY = "untrained", ("0.5", "")


_ROWS = [
    {"quantity": "r", "run": run, "layer": layer, "value": 0.5, "low": 0.4, "high": 0.6}
    for run, layer in (("greedy", 0), ("greedy", 1), ("chance", None))
]


def _recorded(record: Any, table: str, marked: int | None = None) -> Drawing:
    return layer_curves(record.rows(table), marked=marked)


@figure(
    "layer_curves",
    of_record=_recorded,
    example=Example(
        {"rows": _ROWS, "marked": 1},
        tables={"curves": _ROWS},
        options={"table": "curves", "marked": 1},
    ),
)
def layer_curves(rows: Sequence[Mapping[str, Any]], *, marked: int | None = None) -> Drawing:
    """Return a panel for each quantity, with a curve and a band for each run.

    Args:
        rows: ``quantity, run, layer, value`` and ``low, high`` (None draws no band), in the order
            that panels and legends shall have. A row whose ``layer`` is None is a level, drawn as a
            dotted line: chance, for example. Runs whose names begin with "untrained" are grey.
        marked: a layer with a vertical line: that of the positive anchor.

    Raises:
        FigureError: if there are no rows, or more runs than colours.
    """
    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    runs = list(dict.fromkeys(row["run"] for row in rows if row["layer"] is not None))
    trained = [run for run in runs if not run.startswith(_NULL)]
    if not runs or len(trained) > len(PALETTE):
        raise FigureError(f"there are {len(trained)} runs. Pass 1 to {len(PALETTE)}.")
    look = {run: (PALETTE[n], MARKERS[n]) for n, run in enumerate(trained)}
    across = min(2, len(quantities))
    down = -(-len(quantities) // across)
    fig = Drawing(PAGE, 1.75 * down + 0.45, rows)
    panels = fig.subplots(down, across, sharex=True, squeeze=False)
    for place, ax in enumerate(panels.flat):
        if place >= len(quantities):
            ax.set_axis_off()
            continue
        chosen = [row for row in rows if row["quantity"] == quantities[place]]
        for run in runs:
            _draw(ax, [row for row in chosen if row["run"] == run], *look.get(run, _GREY))
        for row in (row for row in chosen if row["layer"] is None):
            ax.axhline(row["value"], color="0.3", lw=0.8, ls=":")
        if marked is not None:
            ax.axvline(marked, color="0.8", lw=0.8, zorder=0)
        ax.tick_params(labelbottom=True)
        ax.set_ylabel(fill(plain(quantities[place]), _LABEL_WIDTH), fontsize=SMALL)
        ax.set_xlabel("layer (index, 0-based)")
    handles = [
        Line2D([], [], color=colour, marker=marker, ms=3, lw=1.2, label=plain(run, 40))
        for run, (colour, marker) in ((run, look.get(run, _GREY)) for run in runs)
    ]
    if any(row["layer"] is None for row in rows):
        name = next(row["run"] for row in rows if row["layer"] is None)
        handles.append(Line2D([], [], color="0.3", lw=0.8, ls=":", label=plain(name)))
    columns = min(len(handles), _MOST_LEGEND_COLUMNS)
    fig.legend(handles=handles, loc="outside lower center", ncols=columns)
    return fig


def _draw(ax: Any, rows: Sequence[Mapping[str, Any]], colour: str, marker: str) -> None:
    curve = [row for row in rows if row["layer"] is not None]
    if not curve:
        return
    layers = [row["layer"] for row in curve]
    ax.plot(
        layers,
        [row["value"] for row in curve],
        color=colour,
        marker=marker,
        ms=2.6,
        lw=1.2,
    )
    if all(row.get("low") is not None for row in curve):
        low, high = ([row[end] for row in curve] for end in ("low", "high"))
        ax.fill_between(layers, low, high, color=colour, alpha=0.18, lw=0)
