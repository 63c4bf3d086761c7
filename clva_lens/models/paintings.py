"""Which part of a photo the vision tower is given where: measured, whatever the processor does.

What a processor does to a photo (scale, crop, pad, cut into tiles, put into patches) is not
repeated here. It is given paintings of the photo's size whose grey says where a pixel was; where
these greys come out, the photo's pixels do. Colours may be normalised on the way, because black and
white paintings go too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from clva_lens.ground.errors import PromptError

Canvas = Float[Tensor, "4 _high _wide"]
"""What the tower is given, as a rectangle of pixels or patches: how much of each is photo, and this
times its x, its y and its photo's number, all in [0, 1]."""

ERROR = 1 / 1000
"""How far from a whole pixel an edge may come out that is one, as a share of its photo's side."""
PHOTO = 0.98
"""How much of a pixel of a canvas must be photo, for its greys to be read."""
UNEVEN = 0.03
"""How far off, as a share of the photo, a pixel may be from where even scaling would put it, beyond
the step to the next pixel, which resizing may blur."""
TILT = 0.1
"""How much a ramp also rises across: rows that round their greys alike would be off alike."""
LEAST = 4
"""Rows and columns that a scale is measured from, where there are that many."""
RIM = 2
"""Rows and columns at each side that are left out where there are many: resizing has no neighbours
to mix them with."""


class Fitted(NamedTuple):
    """Where a canvas lies on a photo: its left and top, and the size of its pixels, on the photo.

    ``picture`` is the photo's number, ``size`` its width and height.
    """

    picture: int
    size: tuple[int, int]
    left: float
    top: float
    wide: float
    high: float

    def box(
        self, cell: tuple[float | int, ...], rows: int, columns: int
    ) -> tuple[float, float, float, float]:
        """Return the box of a grid whose first cell is (left, top, width, height) on the canvas."""
        left, top = self.left + cell[0] * self.wide, self.top + cell[1] * self.high
        right = left + columns * cell[2] * self.wide
        bottom = top + rows * cell[3] * self.high
        edges = zip((left, top, right, bottom), self.size * 2, strict=True)
        left, top, right, bottom = (_whole(edge, side * ERROR) for edge, side in edges)
        return left, top, right, bottom


def _whole(edge: float, error: float) -> float:
    whole = float(round(edge))
    return whole if abs(edge - whole) < error else round(edge, 3)


def painted(
    photos: Sequence[Image.Image], encode: Callable[[list[Image.Image]], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return a prompt's inputs, and its pixels with a canvas's four values in place of colours.

    The latter are [patch, 4] or [frame, patch, 4] where pictures come as patches, else
    [frame, 4, high, wide], or [picture, frame, 4, high, wide]. ``encode`` makes the inputs.

    Raises:
        PromptError: if there are no pixels, or white ones come out as black ones.
    """
    last = max(1, len(photos) - 1)
    greys: list[Callable[[int, int, int], np.ndarray]] = [
        lambda number, high, wide: np.zeros((high, wide)),
        lambda number, high, wide: np.ones((high, wide)),
        lambda number, high, wide: _ramp(wide, high).T,
        lambda number, high, wide: _ramp(high, wide),
        lambda number, high, wide: np.full((high, wide), number / last),
    ][: 5 if len(photos) > 1 else 4]
    made = []
    for grey in greys:
        shown = [grey(number, one.height, one.width) for number, one in enumerate(photos)]
        levels = [np.ascontiguousarray(255 * one).round().astype(np.uint8) for one in shown]
        made.append(encode([Image.fromarray(one).convert("RGB") for one in levels]))
    black, *others = (_means(inputs) for inputs in made)
    others += [black] * (len(photos) == 1)  # its number is 0
    white, across, down, number = (one - black for one in others)
    across, down = (
        (one - TILT * two) / (1 - TILT) for one, two in ((across, down), (down, across))
    )
    axis = -1 if _in_patches(made[0]) else -3
    seen = torch.stack([white, across, down, number], dim=axis)
    most = float(seen.max())
    if not most > 0:
        raise PromptError(
            "a white picture comes out of the processor as a black one does, so it is unknown "
            "where a picture's pixels go."
        )
    return made[0], seen / most


def _ramp(long: int, across: int) -> np.ndarray:
    """Return a ramp from 0 to 1, [long, across], that is tilted across."""
    tilted = np.linspace(0, 1, long)[:, None] + TILT * np.linspace(0, 1, across)
    return tilted / (1 + TILT)


def _in_patches(inputs: Mapping[str, Tensor]) -> bool:
    return "image_grid_thw" in inputs or "spatial_shapes" in inputs


def _means(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the mean colour of each pixel, or of each patch."""
    name = min((name for name in inputs if name.startswith("pixel_values")), default=None)
    if name is None:
        raise PromptError("the processor gives no pixel_values, so its pictures are not known.")
    pixels = inputs[name].double()
    if "image_grid_thw" in inputs:
        return pixels.flatten(1).mean(dim=-1)
    if _in_patches(inputs):
        return pixels.mean(dim=-1)
    return (pixels if "image_sizes" in inputs or pixels.ndim < 5 else pixels.flatten(0, 1)).mean(-3)


def fitted(canvases: Sequence[Canvas], photos: Sequence[Image.Image]) -> list[Fitted]:
    """Return where each canvas lies on which of the photos.

    Of a canvas that is padding but for a strip, the scale is that of the most enlarged one.

    Raises:
        PromptError: if one is all padding, or its parts are moved unevenly.
    """
    shown = [_seen(one, photos) for one in canvases]
    steps = [_steps(one, photos) for one in shown]
    sure = [one for one in steps if one is not None]
    if not sure:
        raise PromptError("too little of the picture is left by the processor to be found in it.")
    finest = min(sure, key=lambda step: step[0] * step[1])
    return [_fit(one, photos, step or finest) for one, step in zip(shown, steps, strict=True)]


def _trimmed(inside: Bool[Tensor, "high wide"]) -> Bool[Tensor, "high wide"]:
    """Return it without its rim, where it is large."""
    kept = inside.clone()
    for axis in (0, 1):
        lines = inside.any(dim=1 - axis).nonzero()[:, 0]
        if len(lines) >= 8 * RIM:
            kept.index_fill_(axis, torch.cat([lines[:RIM], lines[-RIM:]]), False)
    return kept


class _Seen(NamedTuple):
    """What a canvas shows: which of its pixels are photo, their x and y, in [0, 1], and of which.

    ``lines`` are the middles of columns and of rows that have some, and the mean x and y in each.
    """

    inside: Bool[Tensor, "high wide"]
    values: tuple[Tensor, Tensor]
    lines: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    picture: int


def _seen(canvas: Canvas, photos: Sequence[Image.Image]) -> _Seen:
    inside = _trimmed(canvas[0] > PHOTO)
    if not inside.any():
        raise PromptError(
            "the processor made a tile that is all padding, so where it lies is unknown."
        )
    across, down, number = canvas[1:] / canvas[0].clamp(min=PHOTO)

    def lines(values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        any_photo = inside.any(dim=axis)
        means = (values * inside).sum(dim=axis)[any_photo] / inside.sum(dim=axis)[any_photo]
        return any_photo.nonzero()[:, 0].double() + 0.5, means

    picture = round(float(number[inside].mean()) * max(1, len(photos) - 1))
    return _Seen(inside, (across, down), (lines(across, 0), lines(down, 1)), picture)


def _steps(seen: _Seen, photos: Sequence[Image.Image]) -> tuple[float, float] | None:
    """Return the size of a canvas's pixels on its photo; None if too little of it is seen."""
    steps = []
    for (places, means), long, pixels in zip(
        seen.lines, seen.inside.shape[::-1], photos[seen.picture].size, strict=True
    ):
        if len(places) < min(LEAST, max(2, long // 2)):
            return None
        centred = places - places.mean()
        steps.append(float((centred * means).sum() / centred.square().sum()) * (pixels - 1))
    return steps[0], steps[1]


def _fit(seen: _Seen, photos: Sequence[Image.Image], steps: tuple[float, float]) -> Fitted:
    """Return where a canvas with pixels of a known size lies."""
    size = photos[seen.picture].size
    starts = []
    for axis, step in enumerate(steps):
        places, means = seen.lines[axis]
        # Grey 0 is the middle of the first pixel, grey 1 that of the last.
        start = float(means.mean()) * (size[axis] - 1) + 0.5 - step * float(places.mean())
        starts.append(start)
        every = torch.arange(seen.inside.shape[1 - axis]) + 0.5
        even = (start + step * every - 0.5) / max(1, size[axis] - 1)
        wanted = even[None] if axis == 0 else even[:, None]
        off = float((seen.values[axis] - wanted)[seen.inside].abs().max())
        if off > UNEVEN + (abs(step) + 1) / size[axis]:
            raise PromptError(
                f"the image processor moves parts of a picture by {off:.0%} of its size from where "
                "even scaling would put them (it may pad with the picture itself, or cut and "
                "rearrange it), so it is unknown where image tokens lie on it."
            )
    return Fitted(seen.picture, size, starts[0], starts[1], steps[0], steps[1])
