"""The look of all figures, their registry, and how a figure becomes files.

Drawing never touches the user's matplotlib: no pyplot figure, no backend, settings only inside a
context that starts from matplotlib's own defaults, so the same data always gives the same bytes.
"""

import csv
import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
from matplotlib import style as mpl_style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike

from clva_lens.ground.errors import FigureError
from clva_lens.ground.files import Row
from clva_lens.ground.registry import Registry

# Okabe and Ito's palette (jfly.uni-koeln.de/color), told apart with every common colour blindness.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
ORANGE, PURPLE, SKY, BLACK = "#E69F00", "#CC79A7", "#56B4E9", "#000000"
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MARKERS = ("o", "s", "^", "v", "P", "X", "*")

# Widths in inches: one column and the full text width of a two-column page. A figure has one of
# them, so that it is printed as large as it is drawn, and its type as large as it says.
COLUMN, PAGE = 3.35, 6.9

ON_SCREEN = 110
"""Pixels an inch of what notebooks show; files have more."""
# The smallest type, in points.
SMALL = 7.0

_SETTINGS: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.hashsalt": "clva_lens",
}

P = ParamSpec("P")


class Arranged(ConstrainedLayoutEngine):
    """matplotlib's arrangement, with places rounded to 12 digits.

    Its solver orders what it solves by addresses in memory, so that the last bit of a place is
    another one in another run. A line that lies between two of the numbers that a PDF prints is
    then printed as either.
    """

    def execute(self, fig: Figure) -> None:
        """Arrange the axes of ``fig``."""
        super().execute(fig)
        for axes in fig.axes:
            place = axes.get_position(original=True).get_points().round(12)
            move: Any = axes._set_position  # pyright: ignore[reportAttributeAccessIssue]
            move(Bbox(place), which="original")


class Drawing(Figure):
    """A figure that keeps the rows it draws, so that the table saved beside it is the drawn one."""

    def __init__(
        self,
        width: float,
        height: float,
        rows: Sequence[Mapping[str, Any]],
        *,
        arranged: bool = True,
    ) -> None:
        """Make an empty figure of a size in inches, on a canvas of its own.

        ``arranged`` lets matplotlib arrange the axes; a figure that places them itself says False.
        """
        super().__init__(figsize=(width, height), layout=Arranged() if arranged else None)
        FigureCanvasAgg(self)
        self.rows = list(rows)

    def _repr_png_(self) -> bytes:
        """Return the picture, so that a notebook shows it."""
        picture = io.BytesIO()
        with look():
            self.savefig(picture, format="png", dpi=ON_SCREEN)
        return picture.getvalue()


@dataclass(frozen=True)
class Example:
    """Data of a figure, small and made up: what the laws of all figures are held against.

    ``arguments`` are those of the figure. Where it is drawn of records too, ``tables`` and
    ``arrays`` are what such a record keeps, by name, and ``options`` how it is drawn from them.
    """

    arguments: Mapping[str, Any]
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    arrays: Mapping[str, Mapping[str, ArrayLike]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Registered:
    """A figure: how it is drawn from arrays and rows, from a record if it can be, and an example.

    ``of_record(record, **options)`` is given what has ``rows(name)``, ``arrays(name)`` and
    ``metrics``, a record or a draft; its options are JSON.
    """

    draw: Callable[..., Drawing]
    example: Example
    of_record: Callable[..., Drawing] | None = None


FIGURES = Registry[Registered]("figure")

# Names that figures have in records, where they are not those that they are registered under.
STORED = {"drift": "drift_curves", "saliency": "saliency_overlays"}


@contextmanager
def look() -> Iterator[None]:
    """Set matplotlib's defaults and this module's settings inside the block, then restore."""
    with mpl_style.context(_SETTINGS, after_reset=True):
        yield


def figure(
    name: str, *, example: Example | None = None, of_record: Callable[..., Drawing] | None = None
) -> Callable[[Callable[P, Drawing]], Callable[P, Drawing]]:
    """Return a decorator that registers a drawing function and runs it inside ``look``.

    Raises:
        FigureError: if ``example`` is none, or does not say what a record keeps for ``of_record``.
    """
    if not isinstance(example, Example):
        raise FigureError(
            f"the figure '{name}' has {example!r} for an example, so no law can be held against "
            "it. Pass example=Example({...}) with the arguments of a small drawing."
        )
    if of_record is not None and not (example.tables or example.arrays):
        raise FigureError(
            f"the figure '{name}' is drawn of records, but its example keeps neither tables nor "
            "arrays. Pass what a record keeps as Example(..., tables=, arrays=, options=)."
        )

    def decorate(draw: Callable[P, Drawing]) -> Callable[P, Drawing]:
        @functools.wraps(draw)
        def styled(*args: P.args, **kwargs: P.kwargs) -> Drawing:
            with look():
                return draw(*args, **kwargs)

        FIGURES.register(name, Registered(styled, example, of_record))
        return styled

    return decorate


def drawing_of_record(name: str) -> Callable[..., Drawing]:
    """Return what draws a figure of a record, by the name it has there.

    Raises:
        UnknownName: if no figure has that name.
        FigureError: if the figure is drawn of arrays only.
    """
    name = STORED.get(name, name)
    found = FIGURES.get(name).of_record
    if found is None:
        raise FigureError(
            f"the figure '{name}' is drawn of arrays, and does not say what it takes from a "
            "record. Call it with arrays, or register it with @figure(..., of_record=)."
        )
    return found


def save(
    fig: Figure,
    folder: str | Path,
    name: str,
    data: Sequence[Mapping[str, Any]] | Any | None,
    provenance: Mapping[str, Any],
) -> list[Path]:
    """Write ``name`` as .pdf, .png and .csv into ``folder`` and return the three paths.

    The same figure, data and provenance give the same bytes: no dates are written.

    Args:
        fig: what a function of this room returned.
        folder: made if it is not there.
        name: the file name without an extension.
        data: rows of the table to write, a DataFrame, or None for the rows the drawing keeps.
        provenance: where the numbers come from (record id, commit, ...), JSON-compatible; written
            into the metadata of both pictures (PDF Subject, PNG Description).

    Raises:
        FigureError: if the name is not plain, there are no rows, or provenance is not JSON.
    """
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise FigureError(
            f"'{name}' is no plain file name. Use letters, digits, '_', '-', '+' and '.' only."
        )
    try:
        origin = json.dumps(dict(provenance), sort_keys=True)
    except TypeError as error:
        raise FigureError(f"provenance is not JSON: {error}. Pass strings and numbers.") from error
    table = _table(_rows(fig, data))
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = [target / f"{name}.{ending}" for ending in ("pdf", "png", "csv")]
    metadata: dict[str, Any] = {
        "pdf": {"Title": name, "Subject": origin, "Creator": "clva_lens", "CreationDate": None},
        "png": {"Title": name, "Description": origin, "Software": "clva_lens"},
    }
    with look():
        for path, kind in zip(paths, ("pdf", "png"), strict=False):
            fig.savefig(path, format=kind, metadata=metadata[kind])
    paths[-1].write_text(table, encoding="utf-8", newline="")
    return paths


def _rows(fig: Figure, data: Any) -> list[Mapping[str, Any]]:
    if data is None:
        data = fig.rows if isinstance(fig, Drawing) else []
    elif hasattr(data, "to_dict"):
        data = data.to_dict("records")
    rows = list(data)
    if not rows:
        raise FigureError("there are 0 rows of drawn data to save. Pass the rows as data=.")
    return rows


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def numbers(name: str, values: ArrayLike, axes: Sequence[str]) -> np.ndarray:
    """Return ``values`` as a float array with these axes.

    Raises:
        FigureError: if it has other axes, is empty, or holds nan or infinity.
    """
    array = np.asarray(values, dtype=float)
    wanted = f"[{', '.join(axes)}]"
    if array.ndim != len(axes):
        raise FigureError(
            f"{name} has shape {array.shape}, but {wanted} is needed. Select or stack the axes."
        )
    if not array.size:
        raise FigureError(f"{name} is empty: its shape is {array.shape}. Pass data for {wanted}.")
    strange = int((~np.isfinite(array)).sum())
    if strange:
        raise FigureError(
            f"{strange} of {array.size} values of {name} are nan or infinite. Leave those samples "
            "out, and report how many they are."
        )
    return array


def printed_width(needed: float) -> float:
    """Return the width of a figure that needs so many inches: a column if that is enough."""
    return COLUMN if needed <= COLUMN else PAGE


def evenly(count: int, most: int) -> list[int]:
    """Return up to ``most`` of the places 0 to ``count`` − 1, the ends included, evenly spaced."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(most, count))})


def layer_numbers(layers: Sequence[int] | None, count: int) -> list[int]:
    """Return the 0-based number of each of ``count`` layers; None numbers them from 0.

    Raises:
        FigureError: if there is another number of them.
    """
    numbered = list(range(count) if layers is None else layers)
    if len(numbered) != count:
        raise FigureError(
            f"layers names {len(numbered)} layers, but the data has {count}. Pass one number each."
        )
    return numbered


def mask(name: str, values: ArrayLike, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return ``values`` as a bool array, of ``shape`` if one is given and else with two axes.

    Raises:
        FigureError: if it is not bool or has another shape.
    """
    array = np.asarray(values)
    if array.dtype != bool:
        raise FigureError(
            f"{name} holds {array.dtype}, but a mask is bool. Pass values > threshold."
        )
    if array.shape != shape if shape is not None else array.ndim != 2 or not array.size:
        wanted = "[row, column]" if shape is None else str(shape)
        raise FigureError(f"{name} has shape {array.shape}, but {wanted} is needed. Reshape it.")
    return array


def plain(text: object, longest: int = 80) -> str:
    """Return ``text`` on one line, at most ``longest`` characters, in characters the font has.

    Answers come from models and may hold anything; what cannot be drawn becomes "?".
    """
    line = " ".join(str(text).split())
    line = line if len(line) <= longest else line[: longest - 1].rstrip() + "…"
    font = get_font(findfont("DejaVu Sans"))
    return "".join(c if font.get_char_index(ord(c)) else "?" for c in line)


def verbatim(*texts: Text) -> None:
    """Keep dollar signs in these texts from being read as mathematics."""
    for text in texts:
        text.set_parse_math(False)


def embolden(texts: Iterable[Text], word: str) -> None:
    """Set the texts that are ``word`` in bold: the method that a figure is about."""
    for text in texts:
        if text.get_text() == word:
            text.set_fontweight("bold")
