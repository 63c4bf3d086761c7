"""What each layer would say at each position: the logit lens as a heat map."""

from collections.abc import Sequence

import numpy as np
import seaborn as sns
from numpy.typing import ArrayLike

from clva_lens.errors import FigureError
from clva_lens.figures.base import PAGE, Drawing, figure, layer_numbers, numbers, plain, verbatim


@figure("logit_lens")
def logit_lens(
    values: ArrayLike,
    words: Sequence[Sequence[str]] | None = None,
    *,
    positions: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    label: str = "logit(yes) − logit(no)",
) -> Drawing:
    """Return the heat map of a logit lens; colours diverge around 0.

    Args:
        values: [layer, position], in logits (nats) or probabilities.
        words: the likeliest token of each cell, written into it; None writes none.
        positions: the name of each position; None numbers them.
        layers: the 0-based number of each layer, where they are not 0, 1, 2, …
        label: what the values are, at the colour bar.

    Raises:
        FigureError: if the data is empty, nan or of another shape.
    """
    array = numbers("values", values, ("layer", "position"))
    count, width = array.shape
    numbered = layer_numbers(layers, count)
    names = (
        [str(i) for i in range(width)] if positions is None else [plain(p, 16) for p in positions]
    )
    if len(names) != width:
        raise FigureError(f"there are {len(names)} positions, but {width} columns. Pass one each.")
    written = None
    if words is not None:
        written = np.array([[plain(word, 7) for word in row] for row in words], dtype=object)
        if written.shape != array.shape:
            raise FigureError(
                f"words has shape {written.shape}, but {array.shape} is needed. Pass one a cell."
            )
    rows = [
        {"layer": numbered[row], "position": names[column], "value": float(value)}
        | ({} if words is None else {"word": words[row][column]})
        for (row, column), value in np.ndenumerate(array)
    ]
    wide = min(0.62, (PAGE - 1.8) / width)
    fig = Drawing(max(3.35, width * wide + 1.8), max(1.4, count * 0.2) + 1.0, rows)
    ax = fig.add_subplot()
    top = float(np.abs(array).max()) or 1.0
    sns.heatmap(
        array,
        ax=ax,
        cmap="vlag",
        vmin=-top,
        vmax=top,
        annot=written if wide > 0.3 else None,
        fmt="",
        annot_kws={"fontsize": 5},
        cbar_kws={"label": plain(label), "pad": 0.02},
    )
    ax.set_xlabel("position (index in the prompt: token)")
    ax.set_ylabel("layer (index, 0-based)")
    shown = list(range(0, count, 1 if count <= 16 else 4))
    ax.set_yticks([row + 0.5 for row in shown], [str(numbered[row]) for row in shown])
    ax.set_xticks([column + 0.5 for column in range(width)], names)
    ax.tick_params(axis="x", length=2, rotation=90)
    ax.tick_params(axis="y", length=2, rotation=0)
    verbatim(*ax.texts, *ax.get_xticklabels())
    return fig
