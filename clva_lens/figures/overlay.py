"""Drawing on a picture: a heat map over it, and the outlines of masks."""

from collections.abc import Iterable

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator

from clva_lens.figures.base import SKY, SMALL, VERMILION, Drawing

# Outline: (colour, line style, words in the legend).
OUTLINES = {
    "positive": (VERMILION, "-", "positive anchor"),
    "negative": (SKY, (0, (2.2, 1.2)), "negative anchor"),
    "objects": ("#FFFFFF", "-", "asked object"),
}
_COLOURS = "inferno"
# Opacity of the heat where the map is 0 and where it is largest: the picture stays visible where
# there is little attention, and the colours are those of the bar where there is much.
_FAINTEST, _STRONGEST = 0.3, 0.85


def overlay(ax: Axes, image: np.ndarray, values: np.ndarray, top: float) -> None:
    """Draw a map (0 to ``top``) over the grey picture, each cell as a block of pixels."""
    height, width = image.shape[:2]
    size = max(height, len(values)), max(width, values.shape[1])
    share = _enlarge(values / top, size)[..., None]
    heat = mpl.colormaps[_COLOURS](share[..., 0])[..., :3]
    # The luma weights of ITU-R BT.601.
    grey = _enlarge(image @ np.array([0.299, 0.587, 0.114]), size)[..., None]
    opacity = _FAINTEST + (_STRONGEST - _FAINTEST) * share
    mixed = opacity * heat + (1 - opacity) * grey
    ax.imshow(mixed.clip(0, 1), extent=(0, width, height, 0), interpolation="nearest")


def _enlarge(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return ``values`` at a larger size, each pixel that of the cell it lies in."""
    row = np.arange(size[0]) * values.shape[0] // size[0]
    column = np.arange(size[1]) * values.shape[1] // size[1]
    return values[row][:, column]


def outline(
    ax: Axes,
    chosen: np.ndarray,
    shape: tuple[float, ...],
    name: str,
    wide: float,
    origin: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Draw the border of a mask along the edges of its cells.

    The mask lies over ``shape`` (height, width), from ``origin`` (left, top) on.
    """
    padded = np.pad(chosen, 1)
    across = np.argwhere(padded[:-1, 1:-1] != padded[1:, 1:-1])
    along = np.argwhere(padded[1:-1, :-1] != padded[1:-1, 1:])
    segments = [((c, r), (c + 1, r)) for r, c in across] + [((c, r), (c, r + 1)) for r, c in along]
    if not segments:
        return
    size = np.array([shape[1] / chosen.shape[1], shape[0] / chosen.shape[0]])
    colour, dashes, _ = OUTLINES[name]
    ends = list(np.array(segments) * size + origin)
    lines = LineCollection(ends, colors=colour, linewidths=wide, linestyles=[dashes])
    lines.set_capstyle("projecting")
    if dashes == "-":
        lines.set_path_effects(_halo(wide))
    ax.add_collection(lines, autolim=False)


def outline_handles(names: Iterable[str]) -> list[Line2D]:
    """Return what a legend shows for these outlines."""
    handles = []
    for name in names:
        colour, dashes, word = OUTLINES[name]
        line = Line2D([], [], color=colour, linestyle=dashes, linewidth=1.6, label=word)
        if dashes == "-":
            line.set_path_effects(_halo(1.6))
        handles.append(line)
    return handles


def _halo(wide: float) -> list:
    # A thin dark border keeps the line visible on any picture.
    return [Stroke(linewidth=wide * 1.6, foreground="black"), Normal()]


def heat_bar(fig: Drawing, ax: Axes, top: float, label: str) -> None:
    """Draw the colour bar from 0 to ``top`` into ``ax``."""
    bar = fig.colorbar(ScalarMappable(Normalize(0, top), cmap=_COLOURS), cax=ax)
    bar.ax.tick_params(labelsize=SMALL, length=2, pad=1.5)
    bar.set_label(label, fontsize=SMALL, labelpad=2)
    bar.locator = MaxNLocator(4)
    bar.update_ticks()
