"""Qwen-VL once more, in float64, from the published tensors by their published names.

Written from the facts of the architecture alone, with no module of transformers or of the package:
one sample at a time, heads in a loop, no cache. ``broken`` leaves one fact out or turns it round,
so that tests can show that it matters.
"""

import math

import torch
from torch import Tensor

FACTS = (
    "log-n",
    "ntk",
    "qkv bias",
    "gate",
    "rotary halves",
    "final norm",
    "head-major",
    "patch positions",
    "pre norm",
    "query positions",
    "key positions",
    "values without positions",
    "post norm",
    "projection",
)


def logits(
    tensors: dict[str, Tensor],
    config: dict,
    ids: list[int],
    pixels: Tensor | None,
    *,
    pads: int = 0,
    prompt: int | None = None,
    broken: str = "",
) -> Tensor:
    """Return [position, vocabulary]. The first ``pads`` ids are padding; ``prompt`` of the ids
    were read at once, the others one by one with a cache (all at once by default)."""
    assert broken in ("", *FACTS)
    t = {name: tensor.double() for name, tensor in tensors.items()}
    stream = t["transformer.wte.weight"][ids].clone()
    if pixels is not None:
        pad = config["visual"]["image_start_id"] + 2
        where = [place for place, one in enumerate(ids) if one == pad]
        seen = torch.cat([picture_tokens(t, config, one, broken) for one in pixels.double()])
        assert len(where) == len(seen)
        stream[where] = seen
    heads, longest = config["num_attention_heads"], config["seq_length"]
    d, count = config["hidden_size"] // heads, len(ids)
    alpha = 1.0
    read = count if prompt is None else prompt
    if broken != "ntk":
        alpha = max(1, 2 ** math.ceil(math.log(read / longest, 2) + 1) - 1)
    base = config["rotary_emb_base"] * alpha ** (d / (d - 2))
    for layer in range(config["num_hidden_layers"]):
        name = f"transformer.h.{layer}"
        x = rms(stream, t[f"{name}.ln_1.weight"])
        joint = x @ t[f"{name}.attn.c_attn.weight"].T
        if broken != "qkv bias":
            joint = joint + t[f"{name}.attn.c_attn.bias"]
        q, k, v = joint.split(config["hidden_size"], dim=1)
        z = torch.zeros_like(q)
        for head in range(heads):
            own = slice(head * d, (head + 1) * d)
            queries = [turn(q[p, own], p, base, broken) for p in range(count)]
            keys = torch.stack([turn(k[p, own], p, base, broken) for p in range(count)])
            for p in range(pads, count):
                stretch = 1.0
                if p + 1 > longest and broken != "log-n":
                    stretch = math.log(p + 1, longest)
                scores = keys[pads : p + 1] @ queries[p] * stretch / math.sqrt(d)
                z[p, own] = scores.softmax(dim=0) @ v[pads : p + 1, own]
        stream = stream + z @ t[f"{name}.attn.c_proj.weight"].T
        x = rms(stream, t[f"{name}.ln_2.weight"])
        one, two = (x @ t[f"{name}.mlp.w{half}.weight"].T for half in (1, 2))
        if broken == "gate":
            one, two = two, one
        inner = one * two / (1 + torch.exp(-two))
        stream = stream + inner @ t[f"{name}.mlp.c_proj.weight"].T
    weight = t["transformer.ln_f.weight"]
    last = stream if broken == "final norm" else rms(stream, weight)
    return last @ t["lm_head.weight"].T


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6)


def turn(x: Tensor, position: int, base: float, broken: str) -> Tensor:
    """Turn the pairs (i, i + d/2) by position · base^(−2i/d)."""
    half = len(x) // 2
    angle = position * base ** (-torch.arange(half, dtype=torch.float64) / half)
    if broken == "rotary halves":  # neighbouring pairs instead
        a, b = x[0::2], x[1::2]
    else:
        a, b = x[:half], x[half:]
    c, s = angle.cos(), angle.sin()
    return torch.cat([a * c - b * s, b * c + a * s])


def picture_tokens(t: dict[str, Tensor], config: dict, pixels: Tensor, broken: str = "") -> Tensor:
    """Return one picture's [query, width]."""
    seen, name = config["visual"], "transformer.visual"
    patch, side = seen["patch_size"], seen["image_size"] // seen["patch_size"]
    kernel = t[f"{name}.conv1.weight"].flatten(1)
    cells = [
        kernel
        @ pixels[
            :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch
        ].flatten()
        for row in range(side)
        for column in range(side)
    ]
    x = torch.stack(cells)
    if broken != "patch positions":
        x = x + stretch(t[f"{name}.positional_embedding"], side)
    if broken != "pre norm":
        x = layer_norm(x, t, f"{name}.ln_pre")
    heads, width = seen["heads"], seen["width"]
    d = width // heads
    for layer in range(seen["layers"]):
        block = f"{name}.transformer.resblocks.{layer}"
        joint = linear(layer_norm(x, t, f"{block}.ln_1"), t, f"{block}.attn.in_proj")
        parts = []
        for head in range(heads):
            if broken == "head-major":
                q, k, v = (joint[:, part * width + head * d :][:, :d] for part in range(3))
            else:
                q, k, v = (joint[:, (3 * head + part) * d :][:, :d] for part in range(3))
            parts.append((q @ k.T / math.sqrt(d)).softmax(dim=1) @ v)
        x = x + linear(torch.cat(parts, dim=1), t, f"{block}.attn.out_proj")
        inner = linear(layer_norm(x, t, f"{block}.ln_2"), t, f"{block}.mlp.c_fc")
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        x = x + linear(inner, t, f"{block}.mlp.c_proj")
    return resample(t, x, side, seen["output_dim"], broken)


def resample(t: dict[str, Tensor], x: Tensor, side: int, out: int, broken: str) -> Tensor:
    name = "transformer.visual.attn_pool"
    own = t[f"{name}.pos_embed"]
    values = layer_norm(x @ t[f"{name}.kv_proj.weight"].T, t, f"{name}.ln_kv")
    queries, keys = layer_norm(t[f"{name}.query"], t, f"{name}.ln_q"), values
    if broken != "query positions":
        queries = queries + own
    if broken != "key positions":
        keys = keys + stretch(own, side)
    if broken == "values without positions":
        values = keys
    weights, biases = (t[f"{name}.attn.in_proj_{kind}"].split(out) for kind in ("weight", "bias"))
    q, k, v = (
        part @ weight.T + bias
        for part, weight, bias in zip((queries, keys, values), weights, biases, strict=True)
    )
    looked = []
    for head in range(out // 128):
        one = slice(128 * head, 128 * (head + 1))
        looked.append((q[:, one] @ k[:, one].T / math.sqrt(128)).softmax(dim=1) @ v[:, one])
    made = linear(torch.cat(looked, dim=1), t, f"{name}.attn.out_proj")
    if broken != "post norm":
        made = layer_norm(made, t, "transformer.visual.ln_post")
    square = t["transformer.visual.proj"]
    return made @ (square.T if broken == "projection" else square)


def linear(x: Tensor, t: dict[str, Tensor], name: str) -> Tensor:
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def layer_norm(x: Tensor, t: dict[str, Tensor], name: str) -> Tensor:
    mean = x.mean(dim=1, keepdim=True)
    variance = (x - mean).pow(2).mean(dim=1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * t[f"{name}.weight"] + t[f"{name}.bias"]


def stretch(positions: Tensor, side: int) -> Tensor:
    """Bicubic interpolation to another square grid: cubic convolution with a = −3/4 between cell
    centres, edges repeated, no smoothing when it shrinks."""
    old = math.isqrt(len(positions))
    if old == side:
        return positions
    line = torch.zeros(side, old, dtype=torch.float64)
    for new in range(side):
        centre = (new + 0.5) * old / side - 0.5
        for cell in range(math.floor(centre) - 1, math.floor(centre) + 3):
            line[new, min(max(cell, 0), old - 1)] += cubic(abs(centre - cell))
    square = positions.reshape(old, old, -1)
    return torch.einsum("ri,cj,ijw->rcw", line, line, square).reshape(side * side, -1)


def cubic(x: float, a: float = -0.75) -> float:
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0
