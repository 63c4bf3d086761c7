"""Where the model looks, layer by layer, without and with CLVA: the paper's Figs. 2a and 6.

A pretty map is not a cause, so each picture needs the answer under a knock-out (the attention to
the image removed) and shows it beside the maps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from clva_lens.benchmarks.parsers import parse
from clva_lens.figures.base import (
    PAGE,
    SMALL,
    Drawing,
    Example,
    figure,
    mask,
    numbers,
    plain,
    verbatim,
)
from clva_lens.figures.overlay import OUTLINES, heat_bar, outline, outline_handles, overlay
from clva_lens.ground.errors import FigureError
from clva_lens.ground.files import Row

KNOCK_OUT = "knock-out"
# At most this many columns stay legible on a page.
_MOST_LAYERS = 8
# About as many characters of the question and of the answers fit in a line of the page; as many of
# an answer are written, on as many lines as they need.
_QUESTION, _LINE, _ANSWER = 84, 118, 4000
# Inches: a line of a caption, of layer titles, of numbers under a panel, gaps, row labels, colour
# bar, legend.
_WORDS, _TITLE, _NOTE, _GAP, _ROW_LABEL, _BAR = 0.15, 0.16, 0.15, 0.05, 0.2, 0.68
_LEGEND = 0.3


@dataclass(frozen=True, kw_only=True, eq=False)
class SaliencyPicture:
    """One picture with its question, its maps and its answers.

    Attributes:
        image: [height, width, 3], uint8 or fractions in [0, 1].
        before: saliency without a method, [layer, row, column], fractions of attention.
        after: the same under CLVA.
        question: what was asked.
        label: the right answer, "yes" or "no" ("" if there is none).
        answers: text and yes−no margin (None if unknown) by condition in the order they are
            written; one of them is "knock-out".
        positive: bool [row, column], the positive anchor; None draws none.
        negative: bool [row, column], the negative anchor; None draws none.
        objects: bool mask of the asked object at any resolution; None draws none.
    """

    image: Any
    before: Any
    after: Any
    question: str
    label: str
    answers: Mapping[str, tuple[str, float | None]]
    positive: Any = None
    negative: Any = None
    objects: Any = None


_RANDOM = np.random.default_rng(0)
_MAPS = {
    "image": _RANDOM.integers(0, 255, size=(8, 8, 3), dtype=np.uint8),
    "before": _RANDOM.uniform(0, 0.1, size=(1, 2, 2)),
    "after": _RANDOM.uniform(0, 0.1, size=(1, 2, 2)),
    "positive": np.eye(2, dtype=bool),
    "negative": ~np.eye(2, dtype=bool),
    "objects": np.eye(8, dtype=bool),
}
_ASKED = {"question": "Is there a cup in the image?", "label": "no"}
_ANSWERS = {"greedy": ("Yes", 1.25), "CLVA": ("No", -0.5), KNOCK_OUT: ("No", -2.0)}


def _recorded(record: Any, table: str = "questions", site: str = "") -> Drawing:
    """Draw the rows ``questions`` and the arrays ``picture_0`` and so on.

    A row has the question, its label and the answer and margin under each condition.
    """
    pictures = []
    layers: list[int] = []
    for number, row in enumerate(record.rows(table)):
        kept: dict[str, np.ndarray] = record.arrays(f"picture_{number}")
        layers = kept.pop("layers").tolist()
        answers = {
            name.removeprefix("answer "): (text, row[f"margin {name.removeprefix('answer ')}"])
            for name, text in row.items()
            if name.startswith("answer ")
        }
        asked = {"question": row["question"], "label": row["label"], "answers": answers}
        pictures.append(SaliencyPicture(**kept, **asked))
    return saliency_overlays(pictures, layers, site=site)


@figure(
    "saliency_overlays",
    of_record=_recorded,
    example=Example(
        {"pictures": [SaliencyPicture(**_MAPS, **_ASKED, answers=_ANSWERS)], "layers": [4]},
        tables={
            "questions": [
                _ASKED
                | {f"answer {name}": text for name, (text, _) in _ANSWERS.items()}
                | {f"margin {name}": margin for name, (_, margin) in _ANSWERS.items()}
            ]
        },
        arrays={"picture_0": _MAPS | {"layers": [4]}},
    ),
)
def saliency_overlays(
    pictures: Sequence[SaliencyPicture],
    layers: Sequence[int],
    *,
    scale: str = "picture",
    site: str = "",
) -> Drawing:
    """Return the maps over each picture: a row without a method above a row with CLVA.

    The first column is the picture with its anchors outlined, then one column a layer. The number
    under each map is its sum: the attention that is on the image at all. Question and answers
    stand above, on as many lines as they need.

    Args:
        pictures: what to draw, one block each.
        layers: the 0-based layer of each entry of the maps' first axis, at most 8.
        scale: "picture" shares the colours among all maps of a picture, so they can be compared;
            "panel" stretches each map to its own maximum, which shows shape only.
        site: whose layers these are, where a model has several stacks: "decoder", for example.

    Raises:
        FigureError: if there is nothing to draw, shapes do not fit, a value is nan or negative,
            a picture lacks the knock-out, or the scale is unknown.
    """
    if not pictures or not 1 <= len(layers) <= _MOST_LAYERS:
        raise FigureError(
            f"there are {len(pictures)} pictures and {len(layers)} layers. Pass at least 1 picture "
            f"and 1 to {_MOST_LAYERS} layers."
        )
    if scale not in ("picture", "panel"):
        raise FigureError(f"scale='{scale}' is unknown. Pass 'picture' or 'panel'.")
    parts = [_checked(picture, len(layers), number) for number, picture in enumerate(pictures)]
    room = PAGE - 2 * _GAP - _ROW_LABEL - _BAR - (len(layers) + 1) * _GAP
    panel = min(1.05, room / (len(layers) + 2))
    heights = [panel * part["image"].shape[0] / part["image"].shape[1] for part in parts]
    captions = [_caption(picture) for picture in pictures]
    titles = [f"{plain(site, 10)}\nlayer {layer}".strip() for layer in layers]
    heads = [_WORDS * len(lines) + 0.06 + _TITLE * (1 + bool(site)) for lines in captions]
    block_heights = [
        head + 2 * (h + _NOTE) + 2 * _GAP for head, h in zip(heads, heights, strict=True)
    ]
    total = sum(block_heights) + _LEGEND
    fig = Drawing(PAGE, total, _rows(parts, layers), arranged=False)
    top = total
    for lines, part, head, height, block in zip(
        captions, parts, heads, heights, block_heights, strict=True
    ):
        box = _Box(total, top, panel, height)
        _write_caption(fig, lines, box)
        _draw_block(fig, part, titles, head, box, scale)
        top -= block
    _legend(fig, {name for part in parts for name in OUTLINES if part[name] is not None})
    return fig


@dataclass(frozen=True)
class _Box:
    """Where a block lies, in inches from the left and from the top of the figure."""

    total: float
    top: float
    panel: float
    height: float

    def axes(self, fig: Drawing, left: float, down: float, width: float, height: float) -> Axes:
        """Return new axes, ``down`` inches below the top of the block."""
        bottom = self.top - down - height
        ax = fig.add_axes((left / PAGE, bottom / self.total, width / PAGE, height / self.total))
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set(visible=True, linewidth=0.4, color="0.4")
        return ax


def _checked(picture: SaliencyPicture, layers: int, number: int) -> dict[str, Any]:
    """Return the picture's arrays, checked and with the image as fractions."""
    if KNOCK_OUT not in picture.answers:
        raise FigureError(
            f"picture {number} has no '{KNOCK_OUT}' among its answers "
            f"({', '.join(picture.answers)}). Maps are only shown beside the answer "
            "without the attention to the image."
        )
    image = numbers(f"image of picture {number}", picture.image, ("height", "width", "channel"))
    image = image / 255 if np.asarray(picture.image).dtype == np.uint8 else image
    if image.shape[2] != 3 or image.min() < 0 or image.max() > 1:
        raise FigureError(
            f"the image of picture {number} has shape {image.shape} and values in "
            f"[{image.min():g}, {image.max():g}]. Pass RGB as uint8 or as fractions in [0, 1]."
        )
    maps = {}
    for name, values in (("before", picture.before), ("after", picture.after)):
        maps[name] = numbers(f"{name} of picture {number}", values, ("layer", "row", "column"))
    if maps["before"].shape != maps["after"].shape or len(maps["before"]) != layers:
        raise FigureError(
            f"the maps of picture {number} have shapes {maps['before'].shape} and "
            f"{maps['after'].shape} for {layers} layers. "
            "Pass [layer, row, column] with those layers."
        )
    if min(values.min() for values in maps.values()) < 0:
        raise FigureError(f"a map of picture {number} is negative. Pass attention after softmax.")
    grid = maps["before"].shape[1:]
    return {
        "image": image,
        **maps,
        "positive": _optional("positive anchor", picture.positive, grid),
        "negative": _optional("negative anchor", picture.negative, grid),
        "objects": _optional("object mask", picture.objects, None),
    }


def _optional(name: str, values: ArrayLike | None, shape: Any) -> np.ndarray | None:
    return None if values is None else mask(name, values, shape)


def _write_caption(fig: Drawing, lines: Sequence[tuple[str, bool]], box: _Box) -> None:
    for number, (text, asked) in enumerate(lines):
        y = (box.top - 0.05 - number * _WORDS) / box.total
        style: dict[str, Any] = {"fontsize": 8, "weight": "bold"} if asked else {"fontsize": 7.5}
        verbatim(fig.text(_GAP / PAGE, y, text, va="top", **style))


def _draw_block(
    fig: Drawing,
    part: dict[str, Any],
    titles: Sequence[str],
    start: float,
    box: _Box,
    scale: str,
) -> None:
    """Draw the picture and both rows of maps, ``start`` inches below the top of the block."""
    step = box.height + _NOTE + _GAP
    wide = 2 * box.panel
    tall = min(2 * box.height, box.height + step)
    ax = box.axes(fig, _GAP, start, wide, tall)
    extent = (0, part["image"].shape[1], part["image"].shape[0], 0)
    ax.imshow(part["image"], extent=extent, interpolation="nearest")
    for name in OUTLINES:
        if part[name] is not None:
            # In points; on a fine grid a thick line would fill the cell that it surrounds.
            cell = 72 * wide / part["before"].shape[2]
            outline(ax, part[name], part["image"].shape, name, float(np.clip(cell / 6, 0.5, 1.4)))
    most = max(part["before"].max(), part["after"].max())
    for line, (name, word) in enumerate((("before", "greedy"), ("after", "with CLVA"))):
        down = start + line * step
        middle = (box.top - down - box.height / 2) / box.total
        left = _GAP + wide + _GAP
        fig.text(
            (left + _ROW_LABEL / 2) / PAGE,
            middle,
            word,
            rotation=90,
            ha="center",
            va="center",
            fontsize=7.5,
        )
        for column, title in enumerate(titles):
            place = left + _ROW_LABEL + column * (box.panel + _GAP)
            ax = box.axes(fig, place, down, box.panel, box.height)
            values = part[name][column]
            top = most if scale == "picture" else values.max()
            overlay(ax, part["image"], values, float(top) or 1.0)
            if part["objects"] is not None:
                outline(ax, part["objects"], part["image"].shape, "objects", 0.8)
            ax.set_xlabel(f"sum {values.sum():.2f}", fontsize=SMALL, labelpad=1.5)
            if line == 0:
                ax.set_title(title, fontsize=SMALL, pad=3)
    right = _GAP + wide + _GAP + _ROW_LABEL + len(titles) * (box.panel + _GAP)
    ax = box.axes(fig, right + 0.02, start, 0.09, step + box.height)
    if scale == "picture":
        heat_bar(fig, ax, float(most) or 1.0, "saliency\n(fraction of attention)")
    else:
        heat_bar(fig, ax, 1.0, "saliency\n(share of its maximum)")


def _caption(picture: SaliencyPicture) -> list[tuple[str, bool]]:
    """Return the lines above a block, and whether each is the question's.

    ✓ and ✗ judge an answer by the strict parser.
    """
    said = []
    for condition, (text, margin) in picture.answers.items():
        known = picture.label in ("yes", "no")
        verdict = (" ✓" if parse(text) == picture.label else " ✗") if known else ""
        number = "" if margin is None else f" ({margin:+.2f})".replace("-", "−")
        answer = plain(text, _ANSWER) or "(empty)"
        said.append(f"{plain(condition, 24)}: {answer}{verdict}{number}")
    label = f"   label: {plain(picture.label, 12)}" if picture.label else ""
    question = plain(picture.question, _ANSWER) + label
    return [
        *((line, True) for line in wrap(question, _QUESTION, break_on_hyphens=False)),
        *((line, False) for line in wrap("  →  ".join(said), _LINE, break_on_hyphens=False)),
    ]


def _legend(fig: Drawing, names: set[str]) -> None:
    handles = outline_handles(name for name in OUTLINES if name in names)
    if handles:
        fig.legend(
            handles=handles, loc="lower left", ncols=3, bbox_to_anchor=(0, 0), borderaxespad=0.3
        )
    fig.text(
        0.995,
        0.08 / fig.get_figheight(),
        "in brackets: logit(yes) − logit(no)",
        ha="right",
        va="bottom",
        fontsize=SMALL,
        color="0.3",
    )


def _rows(parts: list[dict[str, Any]], layers: Sequence[int]) -> list[Row]:
    return [
        {
            "picture": number,
            "run": run,
            "layer": int(layers[place]),
            "row": row,
            "column": column,
            "saliency": float(value),
        }
        for number, part in enumerate(parts)
        for name, run in (("before", "greedy"), ("after", "with CLVA"))
        for (place, row, column), value in np.ndenumerate(part[name])
    ]
