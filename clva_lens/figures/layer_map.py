"""A heat map with a row for each layer: what the logit lens and patching draw."""

from collections.abc import Sequence

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes

from clva_lens.figures.base import SMALL, Drawing, plain, printed_width, verbatim
from clva_lens.ground.errors import FigureError
from clva_lens.ground.files import Row

# Inches: the least and the largest width of a cell, all beside the cells, and a letter; and how
# many letters of a cell's text are worth writing: a number has five.
_LEAST, _LARGEST, _BESIDE, _LETTER, _FEWEST = 0.45, 0.62, 1.6, 0.062, 5


def column_names(names: Sequence[str] | None, width: int, what: str) -> list[str]:
    """Return the name of each column; None numbers them.

    Raises:
        FigureError: if there is another number of names.
    """
    if names is None:
        return [str(column) for column in range(width)]
    if len(names) != width:
        raise FigureError(f"there are {len(names)} {what}, but {width} columns. Pass one each.")
    return [plain(name, 16) for name in names]


def layer_map(
    array: np.ndarray,
    columns: Sequence[str],
    layers: Sequence[int],
    written: np.ndarray,
    rows: Sequence[Row],
    label: str,
) -> tuple[Drawing, Axes]:
    """Return a heat map [layer, column] around 0, with ``written`` in the cells if it fits."""
    count, width = array.shape
    page = printed_width(width * _LEAST + _BESIDE)
    wide = min(_LARGEST, (page - _BESIDE) / width)
    fits = int(wide / _LETTER)
    fig = Drawing(page, max(1.4, count * 0.2) + 1.0, rows)
    ax = fig.add_subplot()
    top = float(np.abs(array).max()) or 1.0
    sns.heatmap(
        array,
        ax=ax,
        cmap="vlag",
        vmin=-top,
        vmax=top,
        annot=np.vectorize(lambda text: plain(text, fits))(written) if fits >= _FEWEST else None,
        fmt="",
        annot_kws={"fontsize": SMALL},
        cbar_kws={"label": "\n".join(plain(line) for line in label.split("\n")), "pad": 0.02},
    )
    ax.set_ylabel("layer (index, 0-based)")
    shown = list(range(0, count, 1 if count <= 16 else 4))
    ax.set_yticks([row + 0.5 for row in shown], [str(layers[row]) for row in shown])
    named = list(range(0, width, 1 if width <= 32 else 8))
    ax.set_xticks([at + 0.5 for at in named], [columns[at] for at in named])
    longest = max(len(name) for name in columns)
    ax.tick_params(axis="x", length=2, rotation=0 if longest * width < 60 else 90)
    ax.tick_params(axis="y", length=2, rotation=0)
    verbatim(*ax.texts, *ax.get_xticklabels())
    return fig, ax
