"""In which order a picture's image tokens lie, for pictures that are cut, merged or given rows.

Each rule reads what the processor gives beside the pixels, and says which tokens cover which part
of what the vision tower is given. Where that part lies on the photo is measured (``pieces``).
"""

from collections.abc import Mapping
from math import ceil, sqrt
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from clva_lens.ground.errors import PromptError
from clva_lens.models.grids import CONVOLVED, merge_sizes, patch_side, pixels_of_a_token
from clva_lens.models.paintings import Canvas

ROWS_END = {"hunyuan_vl": 1}
"""Model types with ``image_grid_thw`` whose rows end in an image token that is no patch, and how
many image tokens stand before and after a picture."""


class Laid(NamedTuple):
    """Image tokens that cover a rectangle of a canvas, row by row.

    ``tokens`` are their places among the image tokens. ``cell`` is (left, top, width, height): the
    first cell, in units of the canvas. ``thumbnail``: True if the same is seen again in pieces
    that are larger; None if that has to be seen from where they lie.
    """

    canvas: Canvas
    rows: int
    columns: int
    tokens: Int[Tensor, " token"]
    cell: tuple[float | int, float | int, float | int, float | int]
    thumbnail: bool | None = None


def laid_out(
    config: Any, inputs: Mapping[str, Tensor], seen: Tensor, grid: tuple[int, int] | str
) -> tuple[list[Laid], int]:
    """Return the pieces of one prompt's pictures, and how many image tokens they account for.

    ``seen`` has the pixels of the inputs, with the values of a ``Canvas`` in place of colours
    (``painted``). ``grid`` is that of a frame, where all frames have the same, or a sentence that
    says why there is none.

    Raises:
        PromptError: if no rule knows.
    """
    if "image_grid_thw" in inputs:
        return _merged(config, inputs, seen)
    if "spatial_shapes" in inputs:
        return _shaped(config, inputs, seen)
    if "image_sizes" in inputs and hasattr(config, "image_grid_pinpoints"):
        return _any_resolution(config, inputs, seen)
    if "image_sizes" in inputs and pixels_of_a_token(config) is not None:
        return _own_sizes(config, inputs, seen)
    if isinstance(grid, str):
        raise PromptError(grid)
    return _frames(config, seen, grid)


def _merged(config: Any, inputs: Mapping[str, Tensor], seen: Tensor) -> tuple[list[Laid], int]:
    """Flattened patches (Qwen2-VL and many others): squares of patches become one token."""
    found, patch, token = [], 0, 0
    merges = merge_sizes(config, inputs)
    if merges is None:
        raise PromptError(
            f"a '{config.model_type}' does not say how many patches become one image token."
        )
    ends = ROWS_END.get(config.model_type)
    for (time, high, wide), merge in zip(inputs["image_grid_thw"].tolist(), merges, strict=True):
        rows, columns = high // merge, wide // merge
        canvas = _in_order(seen[patch : patch + high * wide], high, wide, merge)
        patch += time * high * wide
        places = torch.arange(rows * columns)
        if ends is None:
            taken = rows * columns
        else:
            places = places + places // columns + ends
            taken = rows * (columns + 1) + 2 * ends
        found.append(Laid(canvas, rows, columns, token + places, (0, 0, merge, merge)))
        token += taken
    return found, token


def _in_order(patches: Float[Tensor, "patch 4"], high: int, wide: int, merge: int) -> Canvas:
    """Return patches row by row: they come so, or one square that is merged after the other.

    On the photo, a row is one: the better of both has patches that are level in each row.
    """
    flat = rearrange(patches, "(high wide) value -> value high wide", high=high)
    squares = rearrange(
        patches,
        "(row column y x) value -> value (row y) (column x)",
        row=high // merge,
        y=merge,
        x=merge,
    )

    def uneven(canvas: Canvas) -> float:
        return float((canvas[2] - canvas[2].mean(dim=1, keepdim=True)).abs().sum())

    return min(flat, squares, key=uneven)


def _shaped(config: Any, inputs: Mapping[str, Tensor], seen: Tensor) -> tuple[list[Laid], int]:
    """Patches of tiles of several sizes, each padded to the most patches (LFM2-VL)."""
    found, token, factor = [], 0, config.downsample_factor
    for patches, (high, wide) in zip(seen, inputs["spatial_shapes"].tolist(), strict=True):
        rows, columns = high // factor, wide // factor
        canvas = rearrange(
            patches[: high * wide], "(high wide) value -> value high wide", high=high
        )
        places = token + torch.arange(rows * columns)
        found.append(Laid(canvas, rows, columns, places, (0, 0, factor, factor)))
        token += rows * columns
    return found, token


def _own_sizes(config: Any, inputs: Mapping[str, Tensor], seen: Tensor) -> tuple[list[Laid], int]:
    """Pictures of their own sizes, each padded to the largest (Pixtral)."""
    found, token, side = [], 0, pixels_of_a_token(config)
    assert side is not None
    for frame, (high, wide) in zip(seen, inputs["image_sizes"].tolist(), strict=True):
        rows, columns = high // side, wide // side
        places = token + torch.arange(rows * columns)
        found.append(Laid(frame[:, :high, :wide], rows, columns, places, (0, 0, side, side)))
        token += rows * columns
    return found, token


def _frames(config: Any, seen: Tensor, grid: tuple[int, int]) -> tuple[list[Laid], int]:
    """Squares of one size, one after the other: whole pictures, or tiles and a thumbnail."""
    rows, columns = grid
    side, patch = seen.shape[-1], patch_side(config)
    # What is left of a side that the patches do not divide, no patch sees.
    cell = side / columns if not patch else ceil(side // patch / columns) * patch
    # Kernels of 3 × 3 at steps of 2 are centred on the first of the two patches of a step.
    ahead = -patch * (CONVOLVED.get(config.model_type, 1) - 1) / 2
    found = [
        Laid(
            frame,
            rows,
            columns,
            number * rows * columns + torch.arange(rows * columns),
            (ahead, ahead, cell, cell),
        )
        for number, frame in enumerate(seen)
    ]
    return found, len(seen) * rows * columns


def _any_resolution(
    config: Any, inputs: Mapping[str, Tensor], seen: Tensor
) -> tuple[list[Laid], int]:
    """A thumbnail, then tiles as one mosaic without its padding, whose rows end (LLaVA-NeXT)."""
    found, token = [], 0
    seen = seen if seen.ndim == 5 else seen[:, None]
    pixels, patch = config.vision_config.image_size, patch_side(config)
    side = pixels // patch
    alone = _only_one(inputs, len(seen))
    for frames, size in zip(seen, inputs["image_sizes"].tolist(), strict=True):
        places = token + torch.arange(side * side)
        height, width = select_best_resolution(size, config.image_grid_pinpoints)
        down, across = height // pixels, width // pixels
        cut = alone and down * across > 0 and len(frames) > 1
        found.append(Laid(frames[0], side, side, places, (0, 0, patch, patch), cut))
        token += side * side
        if not cut:
            token += 1
            continue
        mosaic = rearrange(
            frames[1 : 1 + down * across], "(y x) value h w -> value (y h) (x w)", y=down
        )
        top, left = _padding(size, down * side, across * side)
        rows, columns = down * side - 2 * top, across * side - 2 * left
        step_y, step_x = pixels / side, pixels / side
        most = getattr(config, "vision_aspect_ratio", "")
        if most.startswith("anyres_max_"):
            shrink = sqrt(rows * columns / (int(most.removeprefix("anyres_max_")) * side**2))
            if shrink > 1.1:
                step_y, step_x = rows * step_y, columns * step_x
                rows, columns = int(rows // shrink), int(columns // shrink)
                step_y, step_x = step_y / rows, step_x / columns
        places = torch.arange(rows * columns)
        places = token + places + places // columns
        cell = (left * pixels / side, top * pixels / side, step_x, step_y)
        if len(places):  # of a narrow strip, nothing is left without the padding
            found.append(Laid(mosaic, rows, columns, places, cell, False))
        token += rows * (columns + 1)
    return found, token


def _only_one(inputs: Mapping[str, Tensor], pictures: int) -> bool:
    """Return whether pictures are cut: LLaVA-OneVision does not where there are several."""
    counts = inputs.get("batch_num_images")
    return counts is None or pictures == 1


def _padding(size: list[int], rows: int, columns: int) -> tuple[int, int]:
    """Return how many rows and columns of tokens are taken off at each end of a padded mosaic."""
    height, width = size
    if width / height > columns / rows:
        return (rows - int(round(height * columns / width, 7))) // 2, 0
    return 0, (columns - int(round(width * rows / height, 7))) // 2
