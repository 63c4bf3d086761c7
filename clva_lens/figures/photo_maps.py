"""Maps over a photo, one panel a map: where something looks, or what moves an answer."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from numpy.typing import ArrayLike

from clva_lens.figures.base import (
    COLUMN,
    PAGE,
    VERMILION,
    Drawing,
    Example,
    figure,
    numbers,
    plain,
    printed_width,
    verbatim,
)
from clva_lens.figures.overlay import outline, outline_handles
from clva_lens.ground.errors import FigureError
from clva_lens.ground.files import Row

Scale = Literal["shared", "panel", "p99"]
"""Where colours end: "shared", at the largest value of all; "panel", at each panel's own; "p99", at
the 99th percentile of all values, so that a few attention sinks do not hide the rest."""

Box = tuple[float, float, float, float]

COLUMNS = 4

_ENDS = {
    "shared": "one scale, which ends at the largest value",
    "panel": "each map has its own scale, which ends where it says",
    "p99": "colours end at the 99th percentile; the largest value is {largest:.2g}",
}
# Opacity where a map is 0 and where its colours end: faint values let the photo through.
_FAINTEST, _STRONGEST = 0.25, 0.9
# The luma weights of ITU-R BT.601.
_LUMA = np.array([0.299, 0.587, 0.114])

_EXAMPLE = {
    "photo": np.linspace(0.0, 1.0, 48).reshape(4, 4, 3),
    "maps": np.arange(12.0).reshape(3, 2, 2) ** 2,
    "titles": ["a", "small", "dog"],
    "notes": ["p = .91", "p = .40", "p = .73"],
    "marked": [False, False, True],
}


@figure("photo_maps", example=Example(_EXAMPLE))
def photo_maps(
    photo: ArrayLike,
    maps: ArrayLike,
    *,
    box: Box | None = None,
    titles: Sequence[str] | None = None,
    notes: Sequence[str] | None = None,
    marked: Sequence[bool] | None = None,
    scale: Scale = "p99",
    smooth: bool = False,
    label: str = "attention",
    outlines: Mapping[str, ArrayLike] | None = None,
    columns: int = COLUMNS,
) -> Drawing:
    """Return maps over a grey photo, the more opaque the larger they are; the scale is stated.

    Args:
        photo: [row, column, colour], in [0, 1].
        maps: [panel, row, column]; of either sign, if one value is below 0.
        box: (left, top, right, bottom) of the maps in pixels of the photo; None is all of it.
        titles: what each map is, above it.
        notes: one line under each map.
        marked: which titles are drawn in red.
        scale: where colours end, see ``Scale``; values beyond have the last colour.
        smooth: whether colours run between the middles of cells.
        label: what the values are, with their unit.
        outlines: masks [row, column] of the box, by the names of ``overlay.OUTLINES``.
        columns: how many panels stand side by side.

    Raises:
        FigureError: if the data is empty, nan or of another shape, or the scale is unknown.
    """
    image = numbers("photo", photo, ("row", "column", "colour"))
    array = numbers("maps", maps, ("panel", "row", "column"))
    if scale not in get_args(Scale):
        raise FigureError(f"scale is {scale!r}. Pass 'shared', 'panel' or 'p99'.")
    count = len(array)
    words = [_each(name, given, count) for name, given in (("titles", titles), ("notes", notes))]
    red = [False] * count if marked is None else list(marked)
    tops = _tops(array, scale)
    rows = [_row(*one) for one in np.ndenumerate(array)]
    fig, axes = _panels(image, min(max(1, columns), count), count, words, rows)
    colours = mpl.colormaps["vlag" if array.min() < 0 else "inferno"]
    place = box or (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))
    for at, ax in enumerate(axes):
        draw_map(ax, image, array[at], tops[at], place, colours, smooth=smooth)
        _outline(ax, outlines or {}, place)
        ax.set_title(words[0][at], fontsize=8, pad=3, color=VERMILION if red[at] else "black")
        ends = f"ends at {tops[at]:.2g}" if scale == "panel" else ""
        ax.set_xlabel("\n".join(filter(None, (words[1][at], ends))), fontsize=7, labelpad=2)
        verbatim(ax.title, ax.xaxis.label)
    _bar(fig, axes, colours, tops[0], array, scale, label)
    largest = float(np.abs(array).max())
    ends = _ENDS[scale].format(largest=largest)
    if outlines:
        handles = outline_handles(outlines)
        fig.legend(handles=handles, loc="outside lower center", ncols=3, title=ends)
    else:
        fig.supxlabel(ends, fontsize=7)
    return fig


def _each(name: str, given: Sequence[str] | None, count: int) -> list[str]:
    if given is not None and len(given) != count:
        raise FigureError(f"there are {len(given)} {name}, but {count} maps. Pass one for each.")
    return [""] * count if given is None else [plain(text, 26) for text in given]


def _row(place: tuple[int, ...], value: float) -> Row:
    return {"panel": place[0], "row": place[1], "column": place[2], "value": float(value)}


def _tops(array: np.ndarray, scale: Scale) -> np.ndarray:
    """Return where the colours of each panel end."""
    size = np.abs(array)
    if scale == "panel":
        tops = size.max(axis=(1, 2))
    else:
        one = size.max() if scale == "shared" else np.quantile(size, 0.99)
        tops = np.full(len(array), one)
    return np.where(tops > 0, tops, 1.0)


def _panels(
    image: np.ndarray, across: int, count: int, words: list[list[str]], rows: list[Row]
) -> tuple[Drawing, list[Axes]]:
    down = math.ceil(count / across)
    width = printed_width(across * (PAGE - 0.9) / COLUMNS + 0.9) if across > 1 else COLUMN
    panel = (width - 0.9) / across
    high = panel * image.shape[0] / image.shape[1] + 0.2 + 0.16 * any(words[1])
    fig = Drawing(width, down * min(high, 8.0) + 0.35, rows)
    axes = list(fig.subplots(down, across, squeeze=False).flat)
    for ax in axes[count:]:
        ax.set_axis_off()
    return fig, axes[:count]


def draw_map(
    ax: Axes,
    image: np.ndarray,
    values: np.ndarray,
    top: float,
    box: Box,
    colours: Colormap,
    *,
    smooth: bool,
) -> None:
    """Draw one map over the grey photo; colours end at ``top``."""
    height, width = image.shape[:2]
    ax.imshow(image @ _LUMA, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    share = (values / top).clip(-1, 1)
    heat = colours((share + 1) / 2 if colours.name == "vlag" else share)
    heat[..., 3] = _FAINTEST + (_STRONGEST - _FAINTEST) * np.abs(share)
    left, upper, right, lower = box
    ax.imshow(
        heat,
        extent=(left, right, lower, upper),
        interpolation="bilinear" if smooth else "nearest",
    )
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _outline(ax: Axes, masks: Mapping[str, ArrayLike], box: Box) -> None:
    """Draw the borders of masks whose cells share the box."""
    left, upper, right, lower = box
    size = (lower - upper, right - left)
    for name, mask in masks.items():
        outline(ax, np.asarray(mask, dtype=bool), size, name, 1.1, origin=(left, upper))


def _bar(
    fig: Drawing,
    axes: list[Axes],
    colours: Colormap,
    top: float,
    array: np.ndarray,
    scale: Scale,
    label: str,
) -> None:
    """Draw the colour bar, and say in words where it ends."""
    low = -1.0 if array.min() < 0 else 0.0
    size = 1.0 if scale == "panel" else top
    bar = fig.colorbar(
        ScalarMappable(Normalize(low * size, size), cmap=colours),
        ax=axes,
        pad=0.02,
        fraction=0.05,
        aspect=max(12.0, 22.0 / len(axes)),
        extend="max" if np.abs(array).max() > top and scale == "p99" else "neither",
    )
    bar.ax.tick_params(labelsize=7, length=2)
    share = " / its largest value" if scale == "panel" else ""
    bar.set_label(plain(f"{label}{share}"), fontsize=7)
