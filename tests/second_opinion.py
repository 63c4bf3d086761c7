"""ONLY once more, from its formulas: loops over heads and keys, in float64, one row at a time.

Nothing of clva_lens is used. What the model itself does comes from reference.py: patterns, and what
its layers put out. ``model`` has a decoder of Llama's parts.
"""

import math
import statistics
from typing import Any, NamedTuple

import reference
import torch
from torch import Tensor


class Opinion(NamedTuple):
    """l′ of a row, which heads are left, and how near a decision was to falling otherwise."""

    logits: Tensor
    heads: list[int]
    nearest: float


@torch.no_grad()
def second(
    parts: tuple[Any, Tensor, Any],
    found: reference.Result,
    row: int,
    *,
    normed: bool = True,
    added: str = "resid_pre",
    layer: int = 0,
) -> Opinion:
    """Return l′ of one row of a pass: ``parts`` are decoder, unembedding, text configuration."""
    decoder, head_weight, config = parts
    first, last = decoder.layers[layer], decoder.layers[-1]
    read, heads, nearest = _read(first, config, found, row, layer)
    o = reference._linear(read, first.self_attn.o_proj)
    if normed:
        o = norm(o, last.input_layernorm, config)
    entering, leaving = found.streams[-2][row], found.streams[-1][row]
    extra = entering
    if added == "attn_out":
        extra = torch.cat(
            [
                found.patterns[-1][h, row] @ _values(last, config, found.streams[-2], h)
                for h in range(config.num_attention_heads)
            ]
        )
        extra = reference._linear(extra, last.self_attn.o_proj)
    x = o + extra / 5
    inner = norm(x, last.post_attention_layernorm, config)
    gate, up = last.mlp.gate_proj.weight @ inner, last.mlp.up_proj.weight @ inner
    y = x + last.mlp.down_proj.weight @ (gate / (1 + torch.exp(-gate)) * up)
    both = norm(y, decoder.norm, config) + norm(leaving, decoder.norm, config) / 2
    return Opinion(head_weight @ both, heads, nearest)


def decide(
    own: Tensor, other: Tensor, support: float, contrast: float, gamma: float
) -> tuple[Tensor, float]:
    """Return the decided logits before the cut-off, and the distance of the distributions."""
    pairs = zip(own.softmax(0).tolist(), other.softmax(0).tolist(), strict=True)
    apart = sum(abs(p - q) for p, q in pairs)
    if apart < gamma:
        return own + support * other, apart
    return own + contrast * (own - other), apart


def norm(x: Tensor, layer: Any, config: Any) -> Tensor:
    return x / math.sqrt(float((x * x).mean()) + config.rms_norm_eps) * layer.weight


def _values(layer: Any, config: Any, stream: Tensor, head: int) -> Tensor:
    """Return the values of a query head: [position, width]."""
    width = config.hidden_size // config.num_attention_heads
    group = head // (config.num_attention_heads // config.num_key_value_heads)
    rows = [norm(x, layer.input_layernorm, config) for x in stream]
    made = reference._linear(torch.stack(rows), layer.self_attn.v_proj)
    return made[:, group * width : (group + 1) * width]


def _read(
    layer: Any, config: Any, found: reference.Result, row: int, index: int
) -> tuple[Tensor, list[int], float]:
    """Return what the heads that are left read, concatenated; which they are; the nearest miss."""
    image = found.image
    text = [key for key in range(1, row + 1) if key not in image]
    ratios, kept, nearest = [], [], math.inf
    for pattern in found.patterns[index]:
        weights, entropy = pattern[row].tolist(), {}
        for name, span in (("text", text), ("image", image)):
            values = [weights[key] for key in span]
            limit = statistics.fmean(values) + statistics.stdev(values)
            nearest = min([nearest, *(abs(w / limit - 1) for w in values if limit > 0)])
            for key in span:
                weights[key] = 0.0 if weights[key] > limit else weights[key]
            total = sum(weights[key] for key in span)
            if total == 0:
                entropy[name] = 0.0 if name == "text" else math.inf
                continue
            shares = [weights[key] / total for key in span]
            entropy[name] = -sum(p * math.log(p + 1e-6) for p in shares)
        ratios.append(entropy["text"] / entropy["image"])
        kept.append(weights)
    mean = statistics.fmean(ratios)
    if len(set(ratios)) > 1:
        nearest = min([nearest, *(abs(ratio - mean) for ratio in ratios)])
    heads = [h for h, ratio in enumerate(ratios) if ratio >= mean]
    read = []
    for h, weights in enumerate(kept):
        values = _values(layer, config, found.streams[index], h)
        whole = torch.tensor(weights, dtype=values.dtype) @ values
        read.append(whole if h in heads else torch.zeros_like(whole))
    return torch.cat(read), heads, nearest
