"""Which layers point at the object: hits and shares by layer, against chance."""

from collections.abc import Sequence

from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike

from clva_lens.figures.base import (
    BLUE,
    COLUMN,
    VERMILION,
    Drawing,
    Example,
    figure,
    layer_numbers,
    numbers,
)
from clva_lens.ground.errors import FigureError


@figure(
    "pointing",
    example=Example(
        {
            "hits": [0.1, 0.5, 0.9],
            "shares": [0.3, 0.2, 0.4],
            "chance": 0.1,
            "hit_intervals": [[0.0, 0.2], [0.4, 0.6], [0.8, 1.0]],
            "layers": [0, 3, 7],
        }
    ),
)
def pointing(
    hits: ArrayLike,
    shares: ArrayLike,
    *,
    chance: float,
    hit_intervals: ArrayLike | None = None,
    share_intervals: ArrayLike | None = None,
    layers: Sequence[int] | None = None,
    objects: int | None = None,
) -> Drawing:
    """Return the pointing game by layer, with chance as a dashed line.

    Args:
        hits: [layer], the share of objects on which the map has its maximum, in [0, 1].
        shares: [layer], the mean fraction of the map on the object, in [0, 1].
        chance: the mean fraction of the area that objects cover, in [0, 1].
        hit_intervals: [layer, 2], low and high; None draws none.
        share_intervals: [layer, 2], low and high; None draws none.
        layers: the 0-based number of each layer, where they are not 0, 1, 2, …
        objects: how many objects there are, for the axis.

    Raises:
        FigureError: if the data is empty, nan or of another shape.
    """
    first = numbers("hits", hits, ("layer",))
    second = numbers("shares", shares, ("layer",))
    numbered = layer_numbers(layers, len(first))
    series = (
        ("maximum on the object", first, hit_intervals, BLUE, "o"),
        ("share on the object", second, share_intervals, VERMILION, "s"),
    )
    rows, lines = [], []
    for name, values, ends, colour, marker in series:
        if len(values) != len(first):
            raise FigureError(f"there are {len(first)} hits, but {len(values)} shares.")
        band = None if ends is None else numbers("intervals", ends, ("layer", "end"))
        if band is not None and band.shape != (len(values), 2):
            raise FigureError(f"intervals are {band.shape}, but {(len(values), 2)} are needed.")
        lines.append((name, values, band, colour, marker))
        for at, value in enumerate(values):
            low, high = (None, None) if band is None else map(float, band[at])
            rows.append(
                {"layer": numbered[at], "measure": name, "value": float(value), "chance": chance}
                | {"low": low, "high": high}
            )
    fig = Drawing(COLUMN, 2.3, rows)
    ax = fig.add_subplot()
    for name, values, band, colour, marker in lines:
        ax.plot(numbered, values, color=colour, marker=marker, ms=3.5, label=name)
        if band is not None:
            ax.fill_between(numbered, band[:, 0], band[:, 1], color=colour, alpha=0.2, lw=0)
    ax.axhline(chance, color="black", ls="--", lw=0.8, label=f"chance ({chance:.0%})")
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xticks(numbered[:: 1 if len(numbered) <= 16 else 4])
    ax.set_xlabel("layer (index, 0-based)")
    count = "" if objects is None else f" ({objects})"
    ax.set_ylabel(f"objects{count} / map (%)")
    fig.legend(loc="outside lower center", ncols=2)
    return fig
