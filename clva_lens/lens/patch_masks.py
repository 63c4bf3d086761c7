"""Objects as patches: annotations become pixel masks, and pixel masks the patches a model has.

A mask goes through the model's own image processor, so it is scaled, cropped and padded as the
picture is, whatever the processor does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from clva_lens.ground.errors import BenchmarkError, ParameterError, PromptError
from clva_lens.ground.parameters import check_arguments
from clva_lens.lens.load import LensModel
from clva_lens.models.pieces import Piece
from clva_lens.models.prompt import Prompt, VisualTokens

COVERED = 0.25
"""The share of a patch that an object has to cover."""


def pixel_mask(
    size: tuple[int, int],
    *,
    polygons: Sequence[Sequence[float | int]] = (),
    box: Sequence[float | int] | None = None,
    counts: Sequence[int] | str | bytes | None = None,
) -> Bool[np.ndarray, "height width"]:
    """Return an object's pixels in a picture of ``size`` (height, width).

    One of: ``polygons`` [x, y, x, y, …] in pixels, which are joined, or a ``box`` (x, y, width,
    height), both with the pixels that COCO's own tool (pycocotools) gives them; or ``counts``,
    COCO's run lengths: of pixels outside, inside, outside and so on, column by column; as numbers,
    or compressed into a text.

    Raises:
        BenchmarkError: if none or several are given, or one does not fit the picture.
    """
    height, width = size
    if bool(polygons) + (box is not None) + (counts is not None) != 1:
        raise BenchmarkError(
            "an object is given by polygons=, box= or counts=, one of them. Pass one."
        )
    if counts is not None:
        counts = _unpacked(counts) if isinstance(counts, str | bytes) else counts
        if sum(counts) != height * width or min(counts, default=0) < 0:
            raise BenchmarkError(
                f"the run lengths add up to {sum(counts)} pixels, but the picture has "
                f"{height} × {width}. Pass size as (height, width) of the annotated picture."
            )
        inside = np.arange(len(counts)) % 2 == 1
        return np.repeat(inside, counts).reshape(width, height).T
    if box is not None:
        x, y, wide, high = box
        polygons = [[x, y, x, y + high, x + wide, y + high, x + wide, y]]
    found = np.zeros(size, dtype=bool)
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise BenchmarkError(
                f"a polygon has {len(polygon)} numbers, but 3 or more points (x, y) are needed. "
                "Pass [x, y, x, y, x, y, ...]."
            )
        found |= _filled(np.array(polygon, dtype=np.float64).reshape(-1, 2), size)
    return found


def _unpacked(text: str | bytes) -> list[int]:
    """Return the run lengths in COCO's compressed text.

    A number is written in fives of bits, the lowest first, each with a sixth bit if more follow, in
    the characters from "0" on; its last five have the sign. From the fourth number on, it is the
    difference to the number two before.
    """
    counts: list[int] = []
    value = shift = 0
    for code in text.encode() if isinstance(text, str) else text:
        if not 0 <= code - 48 < 64:
            raise BenchmarkError(
                f"the run lengths have the character {chr(code)!r}, which compressed ones never "
                "do. Pass the counts of an annotation as they are."
            )
        value |= (code - 48 & 31) << shift
        shift += 5
        if code - 48 & 32:
            continue
        if code - 48 & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def _filled(
    corners: Float[np.ndarray, "corner 2"], size: tuple[int, int]
) -> Bool[np.ndarray, "height width"]:
    """Return the pixels inside a polygon, exactly those that COCO's own tool gives.

    Its boundary is walked in fifths of a pixel. Where the walk crosses the middle of a column of
    pixels, inside becomes outside or the reverse, from the next row downward; pixels are counted
    down the columns, one column after another.
    """
    height, width = size
    x, y = _walk((5 * corners + 0.5).astype(np.int64))
    crossed = np.flatnonzero(np.diff(x))
    # The middle of column c lies between the fifths 5c + 2 and 5c + 3.
    left = np.minimum(x[crossed], x[crossed + 1])
    crossed, left = crossed[left % 5 == 2], left[left % 5 == 2]
    column, upper = left // 5, np.minimum(y[crossed], y[crossed + 1])
    row = np.ceil(np.clip((upper + 0.5) / 5 - 0.5, 0, height)).astype(np.int64)
    inside = (column >= 0) & (column < width)
    turns = (column * height + row)[inside]
    # A turn below the last row is one before the first row of the next column.
    count = np.bincount(turns, minlength=height * width + 1)[: height * width]
    return (np.cumsum(count) % 2 == 1).reshape(width, height).T


def _walk(
    corners: Int[np.ndarray, "corner 2"],
) -> tuple[Int[np.ndarray, " point"], Int[np.ndarray, " point"]]:
    """Return x and y of the points along a closed polygon, a step apart along each longer axis.

    Each edge is walked from its first corner to its second, but its points are computed from the
    end with the smaller coordinate, which decides how halves are rounded.
    """
    ends = np.roll(corners, -1, axis=0)
    span = np.abs(ends - corners)
    flat = span[:, 0] >= span[:, 1]
    steps = span.max(axis=1)
    along = np.where(flat, 0, 1)
    edges = np.arange(len(corners))
    flip = corners[edges, along] > ends[edges, along]
    start, end = (np.where(flip[:, None], *pair) for pair in ((ends, corners), (corners, ends)))
    rise = end[edges, 1 - along] - start[edges, 1 - along]
    slope = rise / np.maximum(steps, 1)
    edge = np.repeat(edges, steps + 1)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    step = np.where(flip[edge], steps[edge] - step, step)
    main = start[edge, along[edge]] + step
    other = (start[edge, 1 - along[edge]] + slope[edge] * step + 0.5).astype(np.int64)
    return np.where(flat[edge], main, other), np.where(flat[edge], other, main)


def coco_mask(
    annotation: Mapping[str, Any], size: tuple[int, int]
) -> Bool[np.ndarray, "height width"]:
    """Return the pixels of one of COCO's instances, in a picture of ``size`` (height, width).

    Its ``segmentation`` is polygons, or run lengths (of a crowd, for example), compressed or not.

    Raises:
        BenchmarkError: if it has no segmentation, or one that does not fit the picture.
    """
    shape = annotation.get("segmentation")
    if not shape:
        raise BenchmarkError(
            "the annotation has no segmentation, so its pixels are not known. Pass another one, or "
            "take pixel_mask(size, box=annotation['bbox'])."
        )
    if not isinstance(shape, Mapping):
        return pixel_mask(size, polygons=shape)
    if tuple(shape.get("size", size)) != tuple(size):
        raise BenchmarkError(
            f"the run lengths are of a picture of {shape['size']}, but size is {list(size)}. Pass "
            "size as (height, width) of the annotated picture."
        )
    return pixel_mask(size, counts=shape["counts"])


def patch_mask(
    model: LensModel,
    mask: Bool[np.ndarray, "height width"],
    site: str | None = None,
    *,
    prompt: Prompt | None = None,
    picture: int | None = None,
) -> Bool[Tensor, " visual"]:
    """Return the image tokens of which an object covers a quarter or more.

    ``mask`` has the object's pixels in the picture as it is before the processor; ``site`` is the
    attention site whose image tokens are meant, None the family's own. ``prompt`` is one about the
    picture, which is needed where the image tokens depend on it; of several pictures, ``picture``
    is the number. The mask must have the picture's size. Tokens of tiles and of the thumbnail are
    marked alike, those that end rows never. What the processor crops away is on no patch; what it
    pads, in whatever colour, is no object.

    ``model``: what ``cl.load`` returned.

    Raises:
        PromptError: if it is unknown where the site's image tokens lie.
        ParameterError: if the prompt has several pictures, and none is named, or an argument is
            none of these.
        BenchmarkError: if the mask has another size than the prompt's picture; or, where no piece
            is known, if the processor does not make one picture of one picture, changes its colours
            although asked for raw ones, or does more than scale, crop, turn and pad it with a
            colour (repeats its edge, for example).

    >>> pixels = np.zeros((64, 64), dtype=bool)
    >>> pixels[:16, :16] = True
    >>> int(cl.patch_mask(model, pixels, prompt=prompt).sum())
    4
    """
    check_arguments(patch_mask, model=model, mask=mask, prompt=prompt)
    if mask.ndim != 2:
        raise ParameterError(
            f"mask must be [height, width], but has {mask.ndim} axes. Pass one object's pixels."
        )
    site = model.site.name if site is None else site
    if prompt is None:
        rows, columns = model.family.grid(model.hf_model, site)
    else:
        _check_size(mask, prompt, picture)
        tokens = prompt.tokens_at(site)
        if not isinstance(tokens.pieces, str):
            return _on_pieces(mask, tokens, tokens.picture(picture))
        if tokens.reason:
            raise PromptError(tokens.reason)
        rows, columns = tokens.shape
    x, y = (np.linspace(0, 1, size, dtype=np.float32) for size in mask.shape[::-1])
    painted = [mask.astype(np.float32), (x[None] + y[:, None]) / 2, np.ones_like(mask, np.float32)]
    thing, ramp, whole = _followed(model, np.stack(painted, axis=2))
    if not 0.8 < float(whole.max()) < 1.2:
        raise BenchmarkError(
            "the image processor changes colours although do_normalize and do_rescale are off, so "
            "an object cannot be followed through it. Make the mask of image tokens yourself."
        )
    _check_even(ramp, whole, 1 / max(1, min(mask.shape) - 1))
    share = ((thing + whole) / 2).clamp(0, 1)
    high, wide = share.shape[0] // rows, share.shape[1] // columns
    share = share[: rows * high, : columns * wide].reshape(rows, high, columns, wide)
    return (share.mean(dim=(1, 3)) >= COVERED).flatten()


def _on_pieces(
    mask: Bool[np.ndarray, "height width"], tokens: VisualTokens, picture: int
) -> Bool[Tensor, " visual"]:
    found = torch.zeros(tokens.spans.visual_count, dtype=torch.bool)
    for piece in tokens.pieces:
        assert isinstance(piece, Piece)
        if piece.picture == picture:
            found[piece.tokens] = piece.covered(mask) >= COVERED
    return found


def _check_size(
    mask: Bool[np.ndarray, "height width"], prompt: Prompt, picture: int | None
) -> None:
    """Raise BenchmarkError unless a mask has the size of a prompt's pictures, where it has them."""
    shown = prompt.images if picture is None else prompt.photos[picture : picture + 1]
    other = next((one.size for one in shown if one.size != mask.shape[::-1]), None)
    if other is not None:
        raise BenchmarkError(
            f"the mask has {mask.shape[0]} × {mask.shape[1]} pixels (height × width), but the "
            f"prompt's picture has {other[1]} × {other[0]}. Make the mask in the size of the "
            "picture as it is before the processor, upright; of a batch, pass prompt.row(index)."
        )


def _followed(
    model: LensModel, colours: Float[np.ndarray, "height width 3"]
) -> Float[Tensor, "3 row column"]:
    """Return colours, in [0, 1], as the processor leaves them, from −1 (for 0) to 1.

    Half the difference of a painting and its negative, so 0 where the processor padded, whatever
    its colour. Both keep away from black and white, so that sharpening by resizing is not cut off.
    """
    made = []
    for sign in (1, -1):
        painted = Image.fromarray((128 + sign * 63.5 * (2 * colours - 1)).astype(np.uint8))
        raw = {"do_normalize": False, "do_rescale": False}
        out = model.images(painted, return_tensors="pt", **raw)["pixel_values"]
        if out.ndim != 4 or out.shape[:2] != (1, 3):
            raise BenchmarkError(
                f"the image processor makes {tuple(out.shape)} of a picture, so patches cannot be "
                "told from its pixels. Make the mask of image tokens yourself."
            )
        made.append(out[0].double())
    return (made[0] - made[1]) / 127


def _check_even(
    ramp: Float[Tensor, "row column"], picture: Float[Tensor, "row column"], pixel: float
) -> None:
    """Raise BenchmarkError unless an even ramp is still one where the picture is.

    ``ramp`` is the mean of two, along the axes. ``pixel`` is the step of one from a pixel to the
    next, which resizing may blur, in [0, 1].
    """
    inside = picture > 0.9
    place = inside.nonzero().double()
    place = torch.cat([place, torch.ones(len(place), 1, dtype=place.dtype)], dim=1)
    values = (ramp / picture)[inside][:, None]
    off = float((place @ torch.linalg.lstsq(place, values).solution - values).abs().max()) / 2
    if off > pixel + 0.03:
        raise BenchmarkError(
            f"the image processor moves parts of a picture by at least {off:.0%} of its size "
            "from where even scaling would put them (it may pad with the picture itself, or cut "
            "and rearrange it), so an object cannot be followed. Make the mask of image tokens "
            "yourself."
        )
