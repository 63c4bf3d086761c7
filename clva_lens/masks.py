"""Objects as patches: annotations become pixel masks, and pixel masks the patches a model has.

A mask goes through the model's own image processor, so it is scaled, cropped and padded as the
picture is, whatever the processor does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image, ImageDraw
from torch import Tensor

from clva_lens.errors import BenchmarkError
from clva_lens.models.lens import LensModel

COVERED = 0.25
"""The share of a patch that an object has to cover."""


def pixel_mask(
    size: tuple[int, int],
    *,
    polygons: Sequence[Sequence[float | int]] = (),
    box: Sequence[float | int] | None = None,
    counts: Sequence[int] | None = None,
) -> Bool[np.ndarray, "height width"]:
    """Return an object's pixels in a picture of ``size`` (height, width).

    One of: ``polygons`` [x, y, x, y, …] in pixels, which are joined; a ``box`` (x, y, width,
    height); or ``counts``, COCO's uncompressed run lengths: of pixels outside, inside, outside and
    so on, column by column.

    Raises:
        BenchmarkError: if none or several are given, or one does not fit the picture.
    """
    height, width = size
    if bool(polygons) + (box is not None) + (counts is not None) != 1:
        raise BenchmarkError(
            "an object is given by polygons=, box= or counts=, one of them. Pass one."
        )
    if counts is not None:
        if sum(counts) != height * width or min(counts) < 0:
            raise BenchmarkError(
                f"the run lengths add up to {sum(counts)} pixels, but the picture has "
                f"{height} × {width}. Pass size as (height, width) of the annotated picture."
            )
        inside = np.arange(len(counts)) % 2 == 1
        return np.repeat(inside, counts).reshape(width, height).T
    if box is not None:
        x, y, wide, high = box
        polygons = [[x, y, x + wide - 1, y, x + wide - 1, y + high - 1, x, y + high - 1]]
    canvas = Image.new("1", (width, height))
    drawing = ImageDraw.Draw(canvas)
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise BenchmarkError(
                f"a polygon has {len(polygon)} numbers, but 3 or more points (x, y) are needed. "
                "Pass [x, y, x, y, x, y, ...]."
            )
        drawing.polygon([float(one) for one in polygon], fill=1)
    return np.array(canvas, dtype=bool)


def coco_mask(
    annotation: Mapping[str, Any], size: tuple[int, int]
) -> Bool[np.ndarray, "height width"]:
    """Return the pixels of one of COCO's instances, in a picture of ``size`` (height, width).

    Raises:
        BenchmarkError: if its run lengths are compressed, or do not fit the picture.
    """
    shape = annotation["segmentation"]
    if not isinstance(shape, Mapping):
        return pixel_mask(size, polygons=shape)
    if not isinstance(shape["counts"], Sequence) or isinstance(shape["counts"], str | bytes):
        raise BenchmarkError(
            "the run lengths are compressed, which is not read here. Decode them with pycocotools."
        )
    return pixel_mask(size, counts=shape["counts"])


def patch_mask(
    model: LensModel, mask: Bool[np.ndarray, "height width"], site: str | None = None
) -> Bool[Tensor, " visual"]:
    """Return the image tokens of which an object covers a quarter or more.

    ``mask`` has the object's pixels in the picture as it is before the processor; ``site`` is the
    attention site whose image tokens are meant, None the family's own. What the processor crops
    away is on no patch; what it pads is no object.

    Raises:
        PromptError: if the site's image tokens lie on no grid.
        BenchmarkError: if the processor does not make one picture of one picture.
    """
    site = model.site.name if site is None else site
    rows, columns = model.family.grid(model.hf_model, site)
    # Red is the object; green and blue, whose difference no padding has, say where the picture is.
    painted = np.zeros((*mask.shape, 3), dtype=np.uint8)
    painted[..., 0], painted[..., 1] = mask * 255, 255
    raw = {"do_normalize": False, "do_rescale": False}
    made = model.images(Image.fromarray(painted), return_tensors="pt", **raw)["pixel_values"]
    if made.ndim != 4 or made.shape[:2] != (1, 3):
        raise BenchmarkError(
            f"the image processor makes {tuple(made.shape)} of a picture, so patches cannot be "
            "told from its pixels. Make the mask of image tokens yourself."
        )
    red, green, blue = made[0].double()
    inside = (green - blue) > 127.5
    share = torch.where(inside, red / 255, 0).clamp(0, 1)
    high, wide = share.shape[0] // rows, share.shape[1] // columns
    share = share[: rows * high, : columns * wide].reshape(rows, high, columns, wide)
    return (share.mean(dim=(1, 3)) >= COVERED).flatten()
