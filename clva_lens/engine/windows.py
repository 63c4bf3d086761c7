"""Layers with a sliding window, whose cache keeps the last keys only.

While a prompt is read all keys are there, and the layer's mask hides what is out of reach. At a
decoding step the cache hands over as many keys as the window is long. Everything else in clva_lens
counts keys from the beginning of the sequence, so the missing ones are put back, hidden.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def widen(
    key: Float[Tensor, "batch kv_head key width"],
    value: Float[Tensor, "batch kv_head key value_width"],
    mask: Tensor | None,
    end: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return keys, values and mask over all positions up to ``end``, the missing ones hidden.

    The keys are those of the last positions before ``end``, of which the last ``count`` are this
    pass's rows; all are returned as they are if none is missing. A missing key and its value are
    zeros. The mask, of truths or of summands, is [batch, head, row, key] or None, where rows look
    at no later key.
    """
    missing = end - key.shape[2]
    if missing <= 0:
        return key, value, mask
    if mask is None:
        position = torch.arange(key.shape[2], device=key.device)
        row = torch.arange(key.shape[2] - count, key.shape[2], device=key.device)
        mask = (position[None] <= row[:, None])[None, None]
    mask = mask[..., : key.shape[2]]
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return (
        functional.pad(key, (0, 0, missing, 0)),
        functional.pad(value, (0, 0, missing, 0)),
        functional.pad(mask, (missing, 0), value=hidden),
    )
