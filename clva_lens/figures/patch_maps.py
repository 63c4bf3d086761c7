"""Signed values of image tokens on the patch grid, one panel a layer."""

import math
from collections.abc import Sequence

import numpy as np
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from numpy.typing import ArrayLike

from clva_lens.figures.base import (
    PAGE,
    SMALL,
    Drawing,
    Example,
    figure,
    layer_numbers,
    numbers,
    plain,
    printed_width,
)

_COLUMNS = 6
# What fits a page; of more layers, evenly spaced ones are drawn.
MOST_MAPS = 12


@figure(
    "patch_maps",
    example=Example({"maps": np.arange(-8.0, 12.0).reshape(5, 2, 2), "layers": [0, 1, 2, 3, 7]}),
)
def patch_maps(
    maps: ArrayLike,
    *,
    layers: Sequence[int] | None = None,
    label: str = "logit(yes) − logit(no)",
    sums: bool = True,
) -> Drawing:
    """Return maps over the patches; all share one colour scale, which diverges around 0.

    Args:
        maps: [layer, row, column], of either sign.
        layers: the 0-based number of each layer, where they are not 0, 1, 2, …
        label: what the values are, with their unit, at the colour bar.
        sums: whether each map's sum is written under it, where adding up means something.

    Raises:
        FigureError: if the data is empty, nan or of another shape.
    """
    array = numbers("maps", maps, ("layer", "row", "column"))
    numbered = layer_numbers(layers, len(array))
    rows = [
        {"layer": numbered[layer], "row": row, "column": column, "value": float(value)}
        for (layer, row, column), value in np.ndenumerate(array)
    ]
    across = min(_COLUMNS, len(array))
    down = math.ceil(len(array) / across)
    panel = (PAGE - 0.9) / _COLUMNS
    fig = Drawing(printed_width(across * panel + 0.9), down * (panel + 0.35) + 0.2, rows)
    axes = fig.subplots(down, across, squeeze=False)
    top = float(np.abs(array).max()) or 1.0
    colours = sns.color_palette("vlag", as_cmap=True)
    for place, ax in enumerate(axes.flat):
        if place >= len(array):
            ax.set_axis_off()
            continue
        ax.imshow(array[place], cmap=colours, vmin=-top, vmax=top, interpolation="nearest")
        ax.set_title(f"layer {numbered[place]}", fontsize=SMALL, pad=3)
        if sums:
            total = f"sum {array[place].sum():+.2f}".replace("-", "−")
            ax.set_xlabel(total, fontsize=SMALL, labelpad=1.5)
        ax.set_xticks([])
        ax.set_yticks([])
    scale = ScalarMappable(Normalize(-top, top), cmap=colours)
    bar = fig.colorbar(scale, ax=list(axes.flat), shrink=0.8, pad=0.02)
    bar.set_label(plain(label), fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL, length=2)
    return fig
