"""Which heads look at the image: the paper's Fig. 1."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from clva_lens.figures.base import (
    SMALL,
    Drawing,
    Example,
    figure,
    layer_numbers,
    mask,
    printed_width,
)
from clva_lens.figures.base import numbers as finite
from clva_lens.ground.errors import FigureError
from clva_lens.ground.files import Row

# The classes are told apart by shape, white with a black edge on any colour of the cell.
SYMBOLS = {"sensitive": "^", "insensitive": "v"}
# Up to this many layers and heads, the value is written into each cell.
_WRITTEN = 12
# Inches: the least and the largest side of a cell with a value, and all beside the cells.
LEAST, LARGEST, BESIDE = 0.26, 0.42, 1.25


_INTENSITY = np.array([[0.1, 0.5, 0.9], [0.3, 0.2, 0.4]])
_GIVEN = {
    "intensity": _INTENSITY,
    "sensitive": _INTENSITY > 0.8,
    "insensitive": _INTENSITY < 0.2,
    "layers": [3, 7],
}


def _recorded(record: Any) -> Drawing:
    """Draw the arrays ``heads``: intensity, sensitive, insensitive, layers."""
    kept = record.arrays("heads")
    marked = kept["sensitive"], kept["insensitive"]
    return head_intensity(kept["intensity"], *marked, layers=kept["layers"].tolist())


@figure("head_intensity", of_record=_recorded, example=Example(_GIVEN, arrays={"heads": _GIVEN}))
def head_intensity(
    intensity: ArrayLike,
    sensitive: ArrayLike | None = None,
    insensitive: ArrayLike | None = None,
    *,
    layers: Sequence[int] | None = None,
    numbers: Literal["image", "elsewhere"] = "image",
) -> Drawing:
    """Return the matrix of visual attention intensity, with both classes of heads marked.

    Args:
        intensity: Eq. 1, [layer, head], fractions of attention in [0, 1].
        sensitive: bool [layer, head], Eq. 2; None marks no head.
        insensitive: bool [layer, head], Eq. 3; None marks no head.
        layers: the 0-based number of each layer, where they are not 0, 1, 2, …
        numbers: what is written into the cells of small models: the intensity, attention to the
            "image"; or that "elsewhere", to system and text, as in the paper's Fig. 1.

    Raises:
        FigureError: if the data or a choice is malformed, or a head is in both classes.
    """
    values = finite("intensity", intensity, ("layer", "head"))
    if numbers not in ("image", "elsewhere"):
        raise FigureError(f"numbers is {numbers!r}. Pass 'image' or 'elsewhere'.")
    given = {"sensitive": sensitive, "insensitive": insensitive}
    classes = {k: mask(k, v, values.shape) for k, v in given.items() if v is not None}
    if len(classes) == 2 and (classes["sensitive"] & classes["insensitive"]).any():
        both = np.argwhere(classes["sensitive"] & classes["insensitive"])[0].tolist()
        raise FigureError(
            f"layer {both[0]} head {both[1]} is in both classes. Pass disjoint masks."
        )
    count, heads = values.shape
    names = layer_numbers(layers, count)
    width = printed_width(heads * LEAST + BESIDE)
    cell = min(LARGEST, (width - BESIDE) / heads)
    fig = Drawing(width, max(1.6, count * cell) + 0.85, _rows(values, classes, names))
    ax = fig.add_subplot()
    written = count <= _WRITTEN and heads <= _WRITTEN
    sns.heatmap(
        values,
        ax=ax,
        cmap="cividis",
        square=True,
        annot=(values if numbers == "image" else 1 - values) if written else None,
        fmt=".2f",
        annot_kws={"fontsize": SMALL, "va": "top"},
        cbar_kws={
            "label": "visual attention intensity Φ\n(fraction of attention)",
            "shrink": 0.9,
            "pad": 0.02,
        },
    )
    _mark(ax, classes, cell * 72 * (0.22 if written else 0.5), 0.25 if written else 0.5)
    number_heads(ax, heads, names)
    if written and numbers == "elsewhere":
        ax.set_title("numbers: attention to system and text", fontsize=8)
    if classes:
        _legend(fig, classes)
    return fig


def _mark(ax: Axes, classes: dict[str, np.ndarray], size: float, height: float) -> None:
    """Put each class's symbol into the cells of its heads, ``height`` below their upper edge."""
    for name, chosen in classes.items():
        at_layer, at_head = np.nonzero(chosen)
        ax.plot(
            at_head + 0.5,
            at_layer + height,
            SYMBOLS[name],
            ms=size,
            mfc="white",
            mec="black",
            mew=0.5,
            ls="none",
        )


def _legend(fig: Drawing, classes: dict[str, np.ndarray]) -> None:
    handles = [
        Line2D(
            [],
            [],
            marker=SYMBOLS[name],
            ls="none",
            mfc="white",
            mec="black",
            ms=5,
            label=f"{name} ({int(chosen.sum())} of {chosen.size} heads)",
        )
        for name, chosen in classes.items()
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=2)


def number_heads(ax: Axes, heads: int, layers: list[int]) -> None:
    """Name and number the axes of a matrix of layers and heads."""
    ax.set_xlabel("head (index, 0-based)")
    ax.set_ylabel("layer (index, 0-based)")
    for axis, numbered in ((ax.xaxis, list(range(heads))), (ax.yaxis, layers)):
        ticks = _ticks(len(numbered))
        axis.set_ticks([tick + 0.5 for tick in ticks], [str(numbered[tick]) for tick in ticks])
    ax.tick_params(length=2, rotation=0)


def _ticks(count: int) -> list[int]:
    return list(range(0, count, 1 if count <= 16 else 4))


def _rows(values: np.ndarray, classes: dict[str, np.ndarray], layers: list[int]) -> list[Row]:
    return [
        {"layer": layers[row], "head": head, "intensity": float(value)}
        | {name: bool(chosen[row, head]) for name, chosen in classes.items()}
        for (row, head), value in np.ndenumerate(values)
    ]
