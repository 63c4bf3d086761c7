"""Pictures of random pixels, in the forms in which models take them."""

from typing import Any

import torch
from torch import Tensor

SIDE = 32
"""The side of a square picture, in pixels."""

Inputs = dict[str, Tensor]


def square(config: Any, seed: int) -> Inputs:
    """One square picture."""
    return {"pixel_values": noise(seed, 1, 3, SIDE, SIDE)}


def two_sizes(config: Any, seed: int) -> Inputs:
    """One square picture, and the same for a second tower."""
    side = config.high_res_vision_config.image_size
    return square(config, seed) | {"high_res_pixel_values": noise(seed, 1, 3, side, side)}


def tiles(config: Any, seed: int) -> Inputs:
    """One picture as two tiles."""
    mask = torch.ones(1, 2, SIDE, SIDE, dtype=torch.bool)
    return {"pixel_values": noise(seed, 1, 2, 3, SIDE, SIDE), "pixel_attention_mask": mask}


def flagged_tiles(config: Any, seed: int) -> Inputs:
    """One picture as two tiles, neither of them padding."""
    return {
        "pixel_values": tiles(config, seed)["pixel_values"],
        "pixel_attention_mask": torch.ones(1, 2) > 0,
    }


def sized_tiles(config: Any, seed: int) -> Inputs:
    """One picture of which tiles are cut and unpadded, and its size in pixels."""
    sizes = torch.tensor([[SIDE, 2 * SIDE]])
    return {"pixel_values": noise(seed, 1, 3, 3, SIDE, SIDE), "image_sizes": sizes}


def sized(config: Any, seed: int) -> Inputs:
    """One picture that is no square, and its size in pixels."""
    sizes = torch.tensor([[2 * SIDE, 2 * SIDE]])
    return {"pixel_values": noise(seed, 1, 3, 2 * SIDE, 2 * SIDE), "image_sizes": sizes}


def patches(config: Any, seed: int) -> Inputs:
    """One picture of 8 × 8 patches, flattened."""
    vision = config.vision_config
    names = ("temporal_patch_size", "patch_temporal")
    time = next((getattr(vision, name) for name in names if hasattr(vision, name)), 1)
    return {
        "pixel_values": noise(seed, 64, 3 * time * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }


def square_patches(config: Any, seed: int) -> Inputs:
    """One picture of 8 × 8 patches, not flattened."""
    flat = patches(config, seed)
    side = config.vision_config.patch_size
    return flat | {"pixel_values": flat["pixel_values"].reshape(-1, 3, side, side)}


def merged_patches(config: Any, seed: int) -> Inputs:
    """One picture of 8 × 8 patches, and by how much they are merged."""
    return patches(config, seed) | {"image_merge_sizes": torch.tensor([2])}


def shaped_patches(config: Any, seed: int) -> Inputs:
    """One picture of 8 × 8 patches, flattened, none of them padding."""
    pixels = noise(seed, 1, 64, 3 * config.vision_config.patch_size**2)
    shapes = {"spatial_shapes": torch.tensor([[8, 8]])}
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(1, 64).long(), **shapes}


def placed_patches(config: Any, seed: int) -> Inputs:
    """One picture of 8 × 8 patches, flattened, and the place (x, y) of each."""
    pixels = torch.sigmoid(noise(seed, 1, 64, 3 * config.vision_config.patch_size**2))
    rows = torch.arange(8).repeat_interleave(8)
    places = torch.stack([torch.arange(8).repeat(8), rows], dim=1)
    return {"pixel_values": pixels, "image_position_ids": places[None]}


def raw_patches(config: Any, seed: int) -> Inputs:
    """One picture of 16 patches, flattened."""
    return {"pixel_values": noise(seed, 1, 16, 3 * config.patch_size**2)}


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
