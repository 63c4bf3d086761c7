"""Which heads point at the object: the pointing game by layer and head."""

from collections.abc import Sequence

import numpy as np
import seaborn as sns
from numpy.typing import ArrayLike

from clva_lens.figures.base import PAGE, Drawing, Example, figure, layer_numbers, numbers
from clva_lens.figures.heads import number_heads
from clva_lens.ground.errors import FigureError

_EXAMPLE = {"hits": [[0.0, 0.5], [1.0, 0.2]], "shares": [[0.1, 0.3], [0.8, 0.2]], "chance": 0.1}


@figure("pointing_heads", example=Example(_EXAMPLE))
def pointing_heads(
    hits: ArrayLike,
    shares: ArrayLike,
    *,
    chance: float,
    layers: Sequence[int] | None = None,
    objects: int | None = None,
) -> Drawing:
    """Return two matrices of heads; both colour bars have chance marked, as a line.

    Args:
        hits: [layer, head], the share of objects on which the map has its maximum, in [0, 1].
        shares: [layer, head], the mean fraction of the map on the object, in [0, 1].
        chance: the mean fraction of the area that objects cover, in [0, 1].
        layers: the 0-based number of each layer, where they are not 0, 1, 2, …
        objects: how many objects there are.

    Raises:
        FigureError: if the data is empty, nan or of another shape.
    """
    panels = {"maximum on the object": hits, "share on the object": shares}
    arrays = {name: numbers(name, one, ("layer", "head")) for name, one in panels.items()}
    first = next(iter(arrays.values()))
    if any(one.shape != first.shape for one in arrays.values()):
        raise FigureError("hits and shares have different shapes. Pass those of one game.")
    count, heads = first.shape
    numbered = layer_numbers(layers, count)
    rows = [
        {"layer": numbered[place[0]], "head": place[1], "measure": name, "value": float(value)}
        | {"chance": chance}
        for name, array in arrays.items()
        for place, value in np.ndenumerate(array)
    ]
    cell = min(0.28, (PAGE - 1.9) / 2 / heads)
    fig = Drawing(PAGE, max(1.4, count * cell) + 0.75, rows)
    for ax, (name, array) in zip(fig.subplots(1, 2), arrays.items(), strict=True):
        sns.heatmap(
            array, ax=ax, cmap="cividis", vmin=0, vmax=1, square=True, cbar_kws={"shrink": 0.9}
        )
        ax.collections[0].colorbar.ax.axhline(chance, color="white", lw=1.5)
        ax.set_title(name)
        number_heads(ax, heads, numbered)
    how_many = "" if objects is None else f" of {objects} objects"
    fig.supxlabel(f"share{how_many}; white line: chance ({chance:.0%})", fontsize=7)
    return fig
