"""Where each head's attention goes, in numbers: the paper's Fig. 1 with both of its quantities."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import seaborn as sns
from numpy.typing import ArrayLike

from clva_lens.figures.base import PAGE, Drawing, Example, figure, layer_numbers, numbers
from clva_lens.ground.errors import FigureError

# Up to this many layers and heads, the value is written into each cell.
_WRITTEN = 12
_TITLES = ("to image tokens", "to system and text tokens")

_IMAGE = np.array([[0.1, 0.5, 0.9], [0.3, 0.2, 0.4]])
_GIVEN = {"image": _IMAGE, "elsewhere": 1 - _IMAGE, "layers": [3, 7]}


def _recorded(record: Any) -> Drawing:
    """Draw the arrays ``masses``: image, elsewhere, layers."""
    kept = record.arrays("masses")
    return attention_masses(kept["image"], kept["elsewhere"], layers=kept["layers"].tolist())


@figure("attention_masses", of_record=_recorded, example=Example(_GIVEN, arrays={"masses": _GIVEN}))
def attention_masses(
    image: ArrayLike, elsewhere: ArrayLike, *, layers: Sequence[int] | None = None
) -> Drawing:
    """Return two matrices of layers and heads: the attention to the image, and to words.

    Args:
        image: Eq. 1, [layer, head], fractions of attention in [0, 1].
        elsewhere: the attention to system and text tokens, likewise.
        layers: the 0-based number of each layer, where they are not 0, 1, 2, …

    **Departs from the paper**, whose Fig. 1 writes the second number into 1,024 cells of the first:
    here it has a panel of its own, and both stand in the table beside the figure.

    Raises:
        FigureError: if the data is empty, nan or of other shapes.
    """
    both = [
        numbers(name, values, ("layer", "head"))
        for name, values in (("image", image), ("elsewhere", elsewhere))
    ]
    if both[0].shape != both[1].shape:
        raise FigureError(
            f"image has shape {both[0].shape} and elsewhere {both[1].shape}. Pass the same heads."
        )
    count, heads = both[0].shape
    names = layer_numbers(layers, count)
    rows = [
        {"layer": names[layer], "head": head, "image": float(one), "elsewhere": float(other)}
        for (layer, head), one, other in zip(
            np.ndindex(count, heads), both[0].flat, both[1].flat, strict=True
        )
    ]
    fig = Drawing(PAGE, min(3.6, 0.22 * count + 1.1), rows)
    panels = fig.subplots(1, 2, sharey=True)
    written = count <= _WRITTEN and heads <= _WRITTEN
    for ax, values, title in zip(panels, both, _TITLES, strict=True):
        sns.heatmap(
            values,
            ax=ax,
            cmap="cividis",
            vmin=0,
            vmax=1,
            annot=np.vectorize(_short)(values) if written else None,
            fmt="",
            annot_kws={"fontsize": 7},
            cbar=ax is panels[-1],
            cbar_kws={"label": "fraction of attention", "pad": 0.02},
        )
        ax.set_title(title)
        ax.set_xlabel("head (index, 0-based)")
        _number(ax.xaxis, list(range(heads)))
    panels[0].set_ylabel("layer (index, 0-based)")
    _number(panels[0].yaxis, names)
    for ax in panels:
        ax.tick_params(length=2, rotation=0)
    return fig


def _short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def _number(axis: Any, numbered: list[int]) -> None:
    ticks = list(range(0, len(numbered), 1 if len(numbered) <= 12 else 4))
    axis.set_ticks([tick + 0.5 for tick in ticks], [str(numbered[tick]) for tick in ticks])
