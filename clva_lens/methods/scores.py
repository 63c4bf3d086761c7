"""Biases that depend on the scores they are added to, and layers named for a deep model."""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from clva_lens.engine.session import AttentionCall


def score_bias(
    call: AttentionCall,
    rows: Bool[Tensor, "batch query"],
    change: Callable[[Tensor], Float[Tensor, "batch head row key"]],
) -> Float[Tensor, "batch head query key"] | None:
    """Return the bias that adds ``change(l)`` to the scores l = q·k/√d of ``rows``; float32.

    l is what the model forms, without the mask and without what other methods add, so that edits
    of scores at one layer add up in any order. Only the rows in question are formed, in pieces.
    The bias itself is of all rows, since the kernel takes one mask: 4·B·H·Q·K bytes (60 MiB for 32
    heads and a prompt of 700 tokens) for one layer at a time, and about three times that while it
    is joined with the mask; a decoding step has one row. None if no row is edited.
    """
    batch, heads, count, _ = call.query.shape
    wanted = rows.any(dim=0).nonzero()
    if len(wanted) == 0:
        return None
    size = (batch, heads, count, call.key.shape[2])
    bias = torch.zeros(size, dtype=torch.float32, device=call.query.device)
    for start, stop in call.row_pieces(int(wanted[0]), int(wanted[-1]) + 1):
        chosen = rearrange(rows[:, start:stop], "b q -> b 1 q 1")
        bias[:, :, start:stop] = change(call.products(start, stop)).where(chosen, 0.0)
    return bias


def single_row_score_bias(
    call: AttentionCall, change: Callable[[Tensor], Float[Tensor, "batch head row key"]]
) -> Float[Tensor, "batch head 1 key"]:
    """Return the bias of ``score_bias`` for a pass's only row, which is edited."""
    return change(call.products(0, 1))


def span_keys(
    call: AttentionCall, span: Bool[Tensor, "batch position"]
) -> Bool[Tensor, "batch key"]:
    """Return a span as a mask of the kernel's keys, of which a static cache has more."""
    more = call.key.shape[2] - span.shape[1]
    return functional.pad(span, (0, more)) if more else span


def released_layer(layer: int, depth: int) -> int:
    """Return a layer boundary that was released for 32 layers, in a stack of ``depth`` layers.

    It stays where it is in stacks of 32 layers and more (the releases hard-code it), and lies at
    the same fraction of the depth in smaller ones.

    >>> released_layer(9, 40), released_layer(9, 12), released_layer(15, 12)
    (9, 3, 6)
    """
    return layer if depth >= 32 else round(layer * depth / 32)
