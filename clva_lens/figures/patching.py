"""What a patch changes: a matrix of layers and of spans, positions or heads."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from clva_lens.figures.base import Drawing, Example, figure, layer_numbers, numbers, plain
from clva_lens.figures.layer_map import column_names, layer_map


@figure(
    "patching",
    example=Example(
        {
            "values": [[-0.3, 0.1, 0.5], [-0.1, -0.2, 0.0]],
            "columns": ["image", "question", "last"],
            "layers": [3, 7],
        }
    ),
)
def patching(
    values: ArrayLike,
    columns: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    across: str = "patched span",
    label: str = "effect on logit(yes) − logit(no)\n(0: unpatched, 1: source)",
) -> Drawing:
    """Return the matrix of a patched metric; colours diverge around 0.

    Args:
        values: [layer, column], of either sign.
        columns: the name of each column; None numbers them.
        layers: the 0-based number of each layer, where they are not 0, 1, 2, …
        across: what the columns are.
        label: what the values are, with their unit, at the colour bar.

    Raises:
        FigureError: if the data is empty, nan or of another shape.
    """
    array = numbers("values", values, ("layer", "column"))
    count, width = array.shape
    numbered = layer_numbers(layers, count)
    names = column_names(columns, width, "names")
    rows = [
        {"layer": numbered[row], "column": names[column], "value": float(value)}
        for (row, column), value in np.ndenumerate(array)
    ]
    written = np.vectorize(lambda value: f"{round(value, 2) + 0.0:.2f}".replace("-", "−"))(array)
    fig, ax = layer_map(array, names, numbered, written, rows, label)
    ax.set_xlabel(plain(across))
    return fig
