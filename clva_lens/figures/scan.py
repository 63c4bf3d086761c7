"""One page about one prompt: heads, the photo, curves by layer, knock-outs, and the findings."""

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from clva_lens.figures.base import (
    BLUE,
    GREEN,
    PAGE,
    VERMILION,
    Arranged,
    Drawing,
    Example,
    figure,
    layer_numbers,
    numbers,
    plain,
    verbatim,
)
from clva_lens.figures.photo_maps import Box, draw_map

_EXAMPLE = {
    "intensity": np.arange(8.0).reshape(4, 2) / 8,
    "photo": np.full((4, 4, 3), 0.5),
    "saliency": [[0.1, 0.2], [0.3, 0.4]],
    "box": (0.0, 0.0, 4.0, 4.0),
    "peak": 3,
    "toward_positive": [0.0, 0.5, 0.6, 0.2],
    "toward_negative": [1.0, 0.2, 0.1, 0.0],
    "knock_outs": [(0, 1, 0.9), (2, 3, 0.2)],
    "probability": 0.95,
    "drawn": 0.9,
    "answer": "yes",
    "sentences": ["layer 3 looks most at the image: 0.80 (0.50 where the picture is blank)"],
}


@figure("scan", example=Example(_EXAMPLE))
def scan(
    intensity: ArrayLike,
    *,
    photo: ArrayLike,
    saliency: ArrayLike,
    box: Box,
    peak: int,
    toward_positive: ArrayLike,
    toward_negative: ArrayLike,
    knock_outs: Sequence[tuple[int, int, float]],
    probability: float,
    drawn: float,
    answer: str,
    sentences: Sequence[str],
    layers: Sequence[int] | None = None,
) -> Drawing:
    """Return the page.

    Args:
        intensity: [layer, head], Eq. 1, fractions of attention.
        photo: [row, column, colour], in [0, 1].
        saliency: [row, column] over the box, of the layer ``peak``.
        box: (left, top, right, bottom) of the map in pixels of the photo.
        peak: the layer whose map is drawn.
        toward_positive: [layer], Eq. 6, Pearson r; NaN is left out.
        toward_negative: [layer], likewise.
        knock_outs: first layer, last layer, probability without their attention to the image.
        probability: of the answer's first token.
        drawn: the least without that of as many heads drawn at random, in as many draws.
        answer: that token.
        sentences: the findings, written below.
        layers: the 0-based number of each layer, where they are not 0, 1, 2, …

    Raises:
        FigureError: if the data is empty, nan or of another shape.
    """
    mass = numbers("intensity", intensity, ("layer", "head"))
    numbered = layer_numbers(layers, len(mass))
    lines = [line for one in sentences for line in _wrapped(one)]
    rows = [
        {"layer": numbered[layer], "head": head, "intensity": float(value)}
        for (layer, head), value in np.ndenumerate(mass)
    ]
    below = 0.15 * len(lines) + 0.15
    fig = Drawing(PAGE, 4.6 + below, rows)
    text_top = below / (4.6 + below)
    fig.set_layout_engine(Arranged(rect=(0, text_top, 1, 1 - text_top)))
    grid = fig.subplots(2, 2)
    _heads(grid[0, 0], mass, numbered)
    _photo(grid[0, 1], photo, saliency, box, peak)
    curves = {"to the positive anchor": toward_positive, "to the negative anchor": toward_negative}
    _curves(grid[1, 0], numbered, mass, curves)
    lines_at = {"nothing hidden": probability, "as many random heads": drawn}
    _bars(grid[1, 1], knock_outs, lines_at, plain(answer, 16))
    verbatim(fig.text(0.01, text_top * 0.98, "\n".join(lines), fontsize=7, va="top"))
    return fig


def _wrapped(sentence: str) -> list[str]:
    return textwrap.wrap(f"• {plain(sentence, 240)}", 128, subsequent_indent="   ")


def _heads(ax: Axes, mass: np.ndarray, layers: list[int]) -> None:
    sns.heatmap(mass, ax=ax, cmap="cividis", vmin=0, vmax=1, cbar_kws={"pad": 0.02})
    shown = range(0, len(layers), 1 if len(layers) <= 16 else 4)
    ax.set_yticks([row + 0.5 for row in shown], [str(layers[row]) for row in shown], rotation=0)
    across = range(0, mass.shape[1], 1 if mass.shape[1] <= 16 else 4)
    ax.set_xticks([at + 0.5 for at in across], [str(at) for at in across])
    ax.set_title("attention to the image, by head")
    ax.set_xlabel("head (index, 0-based)")
    ax.set_ylabel("layer (index, 0-based)")


def _photo(ax: Axes, photo: ArrayLike, saliency: ArrayLike, box: Box, peak: int) -> None:
    image = numbers("photo", photo, ("row", "column", "colour"))
    values = numbers("saliency", saliency, ("row", "column"))
    top = float(np.quantile(values, 0.99)) or 1.0
    draw_map(ax, image, values, top, box, mpl.colormaps["inferno"], smooth=False)
    ax.set_title(f"where layer {peak} looks")
    ax.set_xlabel(f"colours end at {top:.2g}, the 99th percentile", fontsize=7)


def _curves(ax: Axes, layers: list[int], mass: np.ndarray, curves: dict[str, ArrayLike]) -> None:
    ax.plot(layers, mass.mean(axis=1), color=BLUE, marker="o", ms=2.5, label="on the image")
    for (name, curve), colour in zip(curves.items(), (VERMILION, GREEN), strict=True):
        ax.plot(layers, np.asarray(curve, dtype=float), color=colour, lw=1.0, label=name)
    ax.axhline(0, color="0.7", lw=0.6)
    ax.set_ylim(-1.05, 1.05)
    ax.set_xlabel("layer (index, 0-based)")
    ax.set_ylabel("attention (fraction); r")
    ax.legend(loc="lower right", fontsize=7)


def _bars(
    ax: Axes,
    knock_outs: Sequence[tuple[int, int, float]],
    lines: dict[str, float],
    answer: str,
) -> None:
    names = [f"{first}–{last}" for first, last, _ in knock_outs]
    ax.bar(names, [left for _, _, left in knock_outs], color=BLUE, width=0.6)
    for (name, at), style, colour in zip(lines.items(), ("--", ":"), ("black", "0.4"), strict=True):
        ax.axhline(at, color=colour, lw=1.0, ls=style, label=name)
    ax.set_ylim(0, 1.28)
    ax.set_yticks([0.0, 0.5, 1.0])
    ax.set_xlabel("layers that the image is hidden from")
    verbatim(ax.set_ylabel(f"probability of “{answer}”"))
    ax.legend(loc="upper center", fontsize=7, ncols=2, columnspacing=1.0)
