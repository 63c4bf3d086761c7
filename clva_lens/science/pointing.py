"""The pointing game: does a saliency map look at the object (Zhang et al., arXiv:1608.00507)?"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.ground.errors import BenchmarkError


class Pointing(NamedTuple):
    """How maps fall on objects.

    ``hit``: whether the maximum lies on the object (the first, of several equal ones). ``share``:
    which fraction of the map's sum does, in [0, 1]. ``chance``: the object's fraction of the area,
    which is what both are expected to be for a map that knows nothing.
    """

    hit: Bool[Tensor, "*sample_axes"]
    share: Float[Tensor, "*sample_axes"]
    chance: Float[Tensor, "*sample"]


def pointing(
    saliency: Float[Tensor, "*sample_axes visual"], mask: Bool[Tensor, "*sample visual"]
) -> Pointing:
    """Return how each map falls on its object's patches.

    ``mask`` [visual] is of one object, [sample, visual] of one for each first entry of
    ``saliency``, which may have more axes in between (layer, head).

    Raises:
        BenchmarkError: if the sizes differ, an object covers no patch, or a map is negative,
            not finite or empty.
    """
    leading = mask.ndim - 1
    if (
        leading > 1
        or mask.shape[:-1] != saliency.shape[:leading]
        or (mask.shape[-1] != saliency.shape[-1])
    ):
        raise BenchmarkError(
            f"the maps are {tuple(saliency.shape)} and the masks {tuple(mask.shape)}. Pass maps "
            "[sample, ..., visual] with masks [sample, visual], or maps [..., visual] with one "
            "mask [visual]."
        )
    empty = ~mask.any(dim=-1)
    if empty.any():
        raise BenchmarkError(
            f"{int(empty.sum())} of {empty.numel()} objects cover no patch, so no map can point at "
            "them. Leave them out: they are absent, cropped away, or smaller than a quarter of a "
            "patch."
        )
    total = saliency.sum(dim=-1)
    if not (saliency.isfinite().all() and (saliency >= 0).all() and (total > 0).all()):
        raise BenchmarkError(
            "a saliency map is negative, nan, infinite or all 0, so it has no shares. Pass "
            "attention, or another map that is not negative."
        )
    between = (1,) * (saliency.ndim - 1 - leading)
    on = mask.to(saliency.device).reshape(*mask.shape[:-1], *between, mask.shape[-1])
    on = on.expand(saliency.shape)
    hit = on.gather(-1, saliency.argmax(dim=-1, keepdim=True))[..., 0]
    share = torch.where(on, saliency, 0).sum(dim=-1) / total
    return Pointing(hit, share, mask.to(saliency.dtype).mean(dim=-1))
