"""Which heads are visually sensitive and which are insensitive, over one prompt or many."""

from collections.abc import Sequence

import numpy as np
import seaborn as sns
from numpy.typing import ArrayLike

from clva_lens.figures.base import (
    PAGE,
    Drawing,
    Example,
    figure,
    layer_numbers,
    numbers,
    printed_width,
)
from clva_lens.figures.heads import number_heads

_EXAMPLE = {
    "sensitive": [[0.0, 0.5, 1.0], [0.0, 0.0, 1.0]],
    "insensitive": [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
}


@figure("head_classes", example=Example(_EXAMPLE))
def head_classes(
    sensitive: ArrayLike, insensitive: ArrayLike, *, layers: Sequence[int] | None = None
) -> Drawing:
    """Return the matrix of heads: how often each is in a class, sensitive less insensitive.

    Args:
        sensitive: [layer, head], the share of prompts in which a head is (Eq. 2), in [0, 1].
        insensitive: [layer, head], likewise (Eq. 3).
        layers: the 0-based number of each layer, where they are not 0, 1, 2, …

    Raises:
        FigureError: if the data is empty, nan or of another shape.
    """
    more = numbers("sensitive", sensitive, ("layer", "head"))
    less = numbers("insensitive", insensitive, ("layer", "head"))
    count, heads = more.shape
    numbered = layer_numbers(layers, count)
    rows = [
        {"layer": numbered[row], "head": head, "sensitive": float(value)}
        | {"insensitive": float(less[row, head])}
        for (row, head), value in np.ndenumerate(more)
    ]
    cell = min(0.3, (PAGE - 1.4) / heads)
    fig = Drawing(printed_width(heads * cell + 1.4), max(1.4, count * cell) + 0.6, rows)
    ax = fig.add_subplot()
    label = "share of prompts\n← insensitive   sensitive →"
    bar = {"label": label, "shrink": 0.9, "pad": 0.02}
    sns.heatmap(more - less, ax=ax, cmap="vlag", vmin=-1, vmax=1, square=True, cbar_kws=bar)
    number_heads(ax, heads, numbered)
    return fig
