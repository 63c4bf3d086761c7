"""What each head adds to a logit: a signed matrix of layers and heads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from clva_lens.figures.base import (
    Drawing,
    Example,
    figure,
    layer_numbers,
    mask,
    numbers,
    plain,
    printed_width,
)
from clva_lens.figures.heads import BESIDE, LARGEST, LEAST, SYMBOLS, number_heads

_PARTS = np.array([[-0.3, 0.1, 0.5], [-0.1, -0.2, 0.0]])


@figure(
    "head_attribution",
    example=Example({"values": _PARTS, "sensitive": _PARTS > 0.4, "insensitive": _PARTS < -0.2}),
)
def head_attribution(
    values: ArrayLike,
    sensitive: ArrayLike | None = None,
    insensitive: ArrayLike | None = None,
    *,
    layers: Sequence[int] | None = None,
    label: str = "logit(yes) − logit(no)",
) -> Drawing:
    """Return the matrix of the heads' parts of a logit, with both classes of heads marked.

    Args:
        values: [layer, head], in logits, of either sign; colours diverge around 0.
        sensitive: bool [layer, head], Eq. 2 of arXiv:2603.25088v1; None marks no head.
        insensitive: bool [layer, head], Eq. 3; None marks no head.
        layers: the 0-based number of each layer, where they are not 0, 1, 2, …
        label: whose parts they are.

    Raises:
        FigureError: if the data is empty, nan or of another shape.
    """
    array = numbers("values", values, ("layer", "head"))
    given = {"sensitive": sensitive, "insensitive": insensitive}
    classes = {name: mask(name, v, array.shape) for name, v in given.items() if v is not None}
    count, heads = array.shape
    numbered = layer_numbers(layers, count)
    rows = [
        {"layer": numbered[row], "head": head, "logits": float(value)}
        | {name: bool(chosen[row, head]) for name, chosen in classes.items()}
        for (row, head), value in np.ndenumerate(array)
    ]
    width = printed_width(heads * LEAST + BESIDE)
    cell = min(LARGEST, (width - BESIDE) / heads)
    fig = Drawing(width, max(1.6, count * cell) + 0.85, rows)
    ax = fig.add_subplot()
    top = float(np.abs(array).max()) or 1.0
    bar = {"label": f"part of {plain(label)}\n(logits)", "shrink": 0.9, "pad": 0.02}
    sns.heatmap(array, ax=ax, cmap="vlag", vmin=-top, vmax=top, square=True, cbar_kws=bar)
    handles = []
    for name, chosen in classes.items():
        at_layer, at_head = np.nonzero(chosen)
        shape: dict[str, Any] = {
            "marker": SYMBOLS[name],
            "ls": "none",
            "mfc": "white",
            "mec": "black",
        }
        ax.plot(at_head + 0.5, at_layer + 0.5, ms=cell * 72 * 0.3, mew=0.5, **shape)
        words = f"{name} ({int(chosen.sum())} of {chosen.size} heads)"
        handles.append(Line2D([], [], ms=5, label=words, **shape))
    number_heads(ax, heads, numbered)
    if handles:
        fig.legend(handles=handles, loc="outside lower center", ncols=2)
    return fig
