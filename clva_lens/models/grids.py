"""Which grid the image tokens of a picture have, from the processor and the configuration alone.

Only what is known is said: resamplers and poolings without a stated factor have no grid. A count
that happens to be a square is no grid. Where on the photo a grid lies, and pictures that are cut
into tiles, are in ``pieces``.
"""

from collections.abc import Mapping
from math import ceil, isqrt
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.ground.errors import PromptError

A_TOKEN_A_PATCH = (
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "janus",
    "paligemma",
    "video_llava",
    "vipllava",
)
"""Model types that make one image token of each patch of a square picture."""

CONVOLVED = {"got_ocr2": 4, "pp_chart2table": 4}
"""Model types whose convolutions make one image token of so many patches a side."""


def picture_grid(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], count: int | None
) -> tuple[int, int]:
    """Return (rows, columns) of the ``count`` image tokens of each sample's one picture.

    From, in this order: the processor's ``image_grid_thw`` (patches by time, height and width)
    and by how many patches a side the tower merges; its ``spatial_shapes`` in patches and
    ``downsample_factor``; its ``image_sizes`` in pixels, with the patch size and
    ``spatial_merge_size``, where rows end in a token of their own (Pixtral); a square picture or
    tile of which each patch becomes a token, or each square of patches (``square_grid``).

    Raises:
        PromptError: if the samples differ, there are several pictures or tiles, or nothing says.
    """
    grid = _from_patches(model, inputs)
    if grid is None:
        grid = _from_shapes(model, inputs)
    if grid is None:
        grid = _from_pixels(model, inputs)
    if grid is None:
        grid = square_grid(model.config)
    if grid is None:
        its = "its image tokens" if count is None else f"its {count} image tokens"
        raise PromptError(
            f"neither the processor nor the configuration of {type(model).__name__} says where "
            f"{its} lie on the picture, so there is no grid. Maps can be read, not drawn."
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
    if sizes is None:
        return None
    merges = merge_sizes(model.config, inputs)
    if merges is None:
        return None
    _, height, width = _only(sizes, "patches")
    return height // merges[0], width // merges[0]


def merge_sizes(config: Any, inputs: Mapping[str, Tensor]) -> list[int] | None:
    """Return by how many patches a side each picture of ``image_grid_thw`` is merged, if known."""
    own, vision = inputs.get("image_merge_sizes"), getattr(config, "vision_config", None)
    if own is not None:
        return own.tolist()
    kernel = _side(getattr(vision, "merge_kernel_size", None))
    merge = getattr(vision, "spatial_merge_size", kernel)
    return None if merge is None else [merge] * len(inputs["image_grid_thw"])


def _from_shapes(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[int, int] | None:
    shapes, factor = inputs.get("spatial_shapes"), getattr(model.config, "downsample_factor", None)
    if shapes is None or factor is None:
        return None
    height, width = shapes[-1].tolist()
    return height // factor, width // factor


def _from_pixels(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[int, int] | None:
    sizes, side = inputs.get("image_sizes"), pixels_of_a_token(model.config)
    if sizes is None or side is None:
        return None
    height, width = _only(sizes, "pixels")
    return height // side, width // side


def pixels_of_a_token(config: Any) -> int | None:
    """Return the side of an image token where pictures keep their size (Pixtral's), in pixels."""
    vision = getattr(config, "vision_config", None)
    merge = getattr(config, "spatial_merge_size", None)
    if merge is None and getattr(vision, "model_type", None) == "pixtral":
        merge = 1
    return None if merge is None else patch_side(config) * merge


def _only(sizes: Tensor, unit: str) -> list[int]:
    """Return the size that all pictures share."""
    different = torch.unique(sizes, dim=0).tolist()
    if len(different) > 1:
        raise PromptError(
            f"the pictures of the batch have different sizes ({different} {unit}), so there is no "
            "common grid. Make a prompt for each."
        )
    return different[0]


def square_grid(config: Any) -> tuple[int, int] | None:
    """Return (rows, columns) of the tokens of one square picture or tile; None if nothing says.

    A side's patches are pooled to √``mm_tokens_per_image``; or shrunk by ``downsample_ratio``,
    ``pixel_shuffle_ratio``, ``scale_factor``, ``downsample_factor`` or ``hidden_stride``, or as a
    model type's convolutions do (``CONVOLVED``); or kept (``A_TOKEN_A_PATCH``).
    """
    vision = getattr(config, "vision_config", None)
    size, patch = _side(getattr(vision, "image_size", None)), patch_side(config)
    if size is None or not patch:
        return None
    patches = size // patch
    pooled = _setting(config, "mm_tokens_per_image")
    if pooled is not None:
        return isqrt(pooled), isqrt(pooled)
    share = _setting(config, "downsample_ratio", "pixel_shuffle_ratio")
    if share is not None:
        return int(patches * share), int(patches * share)
    factor = CONVOLVED.get(config.model_type, _setting(config, "scale_factor", "downsample_factor"))
    if factor is not None:
        return patches // factor, patches // factor
    stride = _setting(config, "hidden_stride")
    if stride is not None:
        return ceil(patches / stride), ceil(patches / stride)
    if config.model_type in A_TOKEN_A_PATCH:
        full = getattr(config, "vision_feature_select_strategy", "default") != "default"
        return None if full else (patches, patches)
    return None


def _setting(config: Any, *names: str) -> Any:
    """Return the first of these settings that the configuration, or its tower's, has."""
    parts = (config, getattr(config, "vision_config", None))
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((one for one in found if one is not None), None)


def _side(size: Any) -> int | None:
    """Return the side of a square, given as one number or two; None if it is none."""
    if isinstance(size, list | tuple):
        return size[0] if len(set(size)) == 1 else None
    return size


def patch_side(config: Any) -> int:
    """Return the side of the tower's patches, in pixels; 0 if they are no squares."""
    return _side(getattr(getattr(config, "vision_config", None), "patch_size", None)) or 0
