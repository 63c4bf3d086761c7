"""What a patch changes: a matrix of layers and of spans, positions or heads."""

from collections.abc import Sequence

import numpy as np
import seaborn as sns
from numpy.typing import ArrayLike

from clva_lens.errors import FigureError
from clva_lens.figures.base import PAGE, Drawing, figure, layer_numbers, numbers, plain, verbatim


@figure("patching")
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
    names = [str(i) for i in range(width)] if columns is None else [plain(c, 16) for c in columns]
    if len(names) != width:
        raise FigureError(f"there are {len(names)} names, but {width} columns. Pass one each.")
    rows = [
        {"layer": numbered[row], "column": names[column], "value": float(value)}
        for (row, column), value in np.ndenumerate(array)
    ]
    wide = min(0.62, (PAGE - 1.8) / width)
    fig = Drawing(max(3.35, width * wide + 1.8), max(1.4, count * 0.2) + 1.0, rows)
    ax = fig.add_subplot()
    top = float(np.abs(array).max()) or 1.0
    bar = {"label": "\n".join(plain(line) for line in label.split("\n")), "pad": 0.02}
    written = np.vectorize(lambda value: f"{round(value, 2) + 0.0:.2f}".replace("-", "−"))(array)
    sns.heatmap(
        array,
        ax=ax,
        cmap="vlag",
        vmin=-top,
        vmax=top,
        annot=written if wide > 0.3 else None,
        fmt="",
        annot_kws={"fontsize": 5},
        cbar_kws=bar,
    )
    ax.set_xlabel(plain(across))
    ax.set_ylabel("layer (index, 0-based)")
    shown = list(range(0, count, 1 if count <= 16 else 4))
    ax.set_yticks([row + 0.5 for row in shown], [str(numbered[row]) for row in shown])
    named = list(range(0, width, 1 if width <= 32 else 8))
    ax.set_xticks([at + 0.5 for at in named], [names[at] for at in named])
    longest = max(len(name) for name in names)
    ax.tick_params(axis="x", length=2, rotation=0 if longest * width < 60 else 90)
    ax.tick_params(axis="y", length=2, rotation=0)
    verbatim(*ax.get_xticklabels())
    return fig
