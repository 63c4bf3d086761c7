"""Where image tokens lie on the picture, from what the processor and the configuration say of it.

Only what is known is said: tiles, crops, resamplers and poolings without a stated factor have no
grid. A count that happens to be a square is no grid.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.ground.errors import PromptError


def picture_grid(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], count: int | None
) -> tuple[int, int]:
    """Return (rows, columns) of the ``count`` image tokens of each sample's one picture.

    From, in this order: the processor's ``image_grid_thw`` (patches by time, height and width)
    and the tower's ``spatial_merge_size``; its ``image_sizes`` in pixels, with the patch size and
    ``spatial_merge_size``, where rows end in a token of their own (Pixtral); a square picture of
    which ``side × side`` patches become one token each, or one for each square of them
    (``mm_tokens_per_image``, ``downsample_ratio``, ``scale_factor``, ``pixel_unshuffle``).

    Raises:
        PromptError: if the samples differ, there are several pictures or tiles, or nothing says.
    """
    grid = _from_patches(model, inputs)
    if grid is None:
        grid = _from_pixels(model, inputs)
    if grid is None:
        grid = _from_square(model)
    if grid is None:
        raise PromptError(
            f"neither the processor nor the configuration of {type(model).__name__} says where its "
            f"{count} image tokens lie on the picture, so there is no grid. Maps can be read, not "
            "drawn."
        )
    if count is not None and grid[0] * grid[1] != count:
        raise PromptError(
            f"the prompt has {count} image tokens, but one picture of {type(model).__name__} has a "
            f"grid of {grid[0]} × {grid[1]} (it was cut into tiles, or there are several pictures, "
            "or tokens that end rows), so they lie on no single grid. Maps can be read, not drawn."
        )
    return grid


def _from_patches(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[int, int] | None:
    sizes = inputs.get("image_grid_thw")
    vision = getattr(model.config, "vision_config", None)
    merge = getattr(vision, "spatial_merge_size", None)
    if sizes is None or merge is None:
        return None
    _, height, width = _only(sizes, "patches")
    return height // merge, width // merge


def _from_pixels(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[int, int] | None:
    sizes, vision = inputs.get("image_sizes"), getattr(model.config, "vision_config", None)
    merge = getattr(model.config, "spatial_merge_size", None)
    if merge is None and getattr(vision, "model_type", None) == "pixtral":
        merge = 1
    if sizes is None or merge is None:
        return None
    side = _patch(vision) * merge
    height, width = _only(sizes, "pixels")
    return height // side, width // side


def _only(sizes: Tensor, unit: str) -> list[int]:
    """Return the size that all pictures share."""
    different = torch.unique(sizes, dim=0).tolist()
    if len(different) > 1:
        raise PromptError(
            f"the pictures of the batch have different sizes ({different} {unit}), so there is no "
            "common grid. Make a prompt for each."
        )
    return different[0]


def _from_square(model: PreTrainedModel) -> tuple[int, int] | None:
    config, vision = model.config, getattr(model.config, "vision_config", None)
    size, patch = _side(getattr(vision, "image_size", None)), _patch(vision)
    if size is None or not patch:
        return None
    patches = size // patch
    pooled = getattr(config, "mm_tokens_per_image", None)
    if pooled is not None:
        return isqrt(pooled), isqrt(pooled)
    ratio = getattr(config, "downsample_ratio", None)
    if ratio is not None:
        side = int(patches * ratio)
        return side, side
    factor = getattr(config, "scale_factor", None)
    if factor is not None:
        return patches // factor, patches // factor
    if getattr(config, "projection_dim", None) is not None and config.model_type == "paligemma":
        return patches, patches
    return None


def _side(size: Any) -> int | None:
    """Return the side of a square, given as one number or two; None if it is none."""
    if isinstance(size, list | tuple):
        return size[0] if len(set(size)) == 1 else None
    return size


def _patch(vision: Any) -> int:
    return _side(getattr(vision, "patch_size", None)) or 0
