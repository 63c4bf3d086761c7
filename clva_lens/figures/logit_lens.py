"""What each layer would say at each position: the logit lens as a heat map."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from clva_lens.figures.base import Drawing, Example, figure, layer_numbers, numbers, plain
from clva_lens.figures.layer_map import column_names, layer_map
from clva_lens.ground.errors import FigureError


@figure(
    "logit_lens",
    example=Example(
        {"values": [[-0.3, 0.1, 0.5], [-0.1, -0.2, 0.0]], "words": [["yes", "a", "no"]] * 2}
    ),
)
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
    names = column_names(positions, width, "positions")
    written = np.full(array.shape, "", dtype=object)
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
    fig, ax = layer_map(array, names, numbered, written, rows, label)
    ax.set_xlabel("position (index in the prompt: token)")
    return fig
