"""Kernels that take no mask of rows and keys: FlashAttention 2, and FlexAttention with its blocks.

Their own masks are written out for sessions, which look at rows of scores; a bias on keys reaches
the kernel folded into queries and keys (bias.py), so that none is needed.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from clva_lens.engine import bias as folding
from clva_lens.engine.bias import COLUMNS, WIDEST, KeyBias
from clva_lens.engine.kernels import AttentionKernel
from clva_lens.engine.session import AttentionCall
from clva_lens.ground.errors import InterventionError
from clva_lens.models.step import Step

MASKLESS = ("flash_attention_2", "flex_attention")
REMEDY = "Load the model with attn_implementation='sdpa', or 'eager'."


def written_out(mask: Any, step: Step | None, key: Tensor, count: int, window: int | None) -> Any:
    """Return a kernel's own mask as truths [batch, 1, row, key]; None where rows see all before.

    It is None, the keys that are no padding [batch, key], or a ``BlockMask``.
    """
    if mask is None and (window is None or step is None or step.offset + count <= window):
        return None
    if mask is not None and not isinstance(mask, Tensor):
        return _of_blocks(mask, count, key.shape[2])
    keys = key.shape[2]
    place = torch.arange(keys, device=key.device)
    row = torch.arange(count, device=key.device)[:, None] + keys - count
    seen = place[None] <= row
    if window is not None:
        seen = seen & (place[None] > row - window)
    seen = seen[None, None]
    return seen if mask is None else seen & rearrange(mask[:, :keys].bool(), "b k -> b 1 1 k")


def _of_blocks(mask: Any, count: int, keys: int) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    batch = mask.shape[0]
    return create_mask(mask.mask_mod, batch, 1, count, keys, device=mask.kv_indices.device)


def folded(
    kernel: AttentionKernel, call: AttentionCall, key: Tensor, value: Tensor, mask: Any
) -> tuple[Tensor, Tensor | None]:
    """Run a kernel under the bias of a call, with the keys, values and mask that are its own.

    Raises:
        InterventionError: if the bias differs between rows or heads, scores are capped, or heads
            are too wide.
    """
    bias, width = call.bias, call.query.shape[3]
    why = None
    if not isinstance(bias, KeyBias):
        why = "a method's edit differs between rows or heads"
    elif call.softcap is not None:
        why = "the model caps its scores"
    elif width + COLUMNS > WIDEST:
        why = f"heads are {width} wide, and {COLUMNS} more are more than {WIDEST}"
    if why is not None or not isinstance(bias, KeyBias):
        raise InterventionError(
            f"{why}, which cannot be folded into the keys of a kernel without a mask. {REMEDY}"
        )
    out, weights = kernel(
        *folding.fold(_fitting(bias, key), call.query, key, value, call.scaling), mask
    )
    return out[..., : value.shape[3]], weights


def _fitting(bias: KeyBias, key: Tensor) -> KeyBias:
    """Return a bias for the keys that a cache hands over: the last ones, or an empty end too."""
    found, keys = bias.keys.shape[1], key.shape[2]
    if found > keys:
        return KeyBias(bias.keys[:, found - keys :], bias.rows, bias.first)
    if found < keys:
        return KeyBias(functional.pad(bias.keys, (0, keys - found)), bias.rows, bias.first)
    return bias
