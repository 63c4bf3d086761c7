"""IMCCD's two parts once more, from its formulas: loops over heads and rows, in float64.

Nothing of clva_lens is used. Positions are moved as they are described: text rows and image keys
are rotated at their new places, and at their old ones for everything else.
"""

import math

import reference
import torch
from torch import Tensor


def _rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding at any positions, fractions too; x: [head, position, width]."""
    half = x.shape[-1] // 2
    speed = torch.tensor([theta ** (-i / half) for i in range(half)]).to(x)
    angle = positions.to(x)[:, None] * speed
    one, other = x[..., :half], x[..., half:]
    return torch.cat(
        [one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()], dim=-1
    )


@torch.no_grad()
def run(
    parts,
    ids: Tensor,
    features: Tensor,
    prompt_length: int,
    compression: float,
    impaired: bool,
    looks: list[Tensor] | None = None,
) -> tuple[Tensor, float]:
    """Return [position, vocabulary] logits of one sample and the nearest score to its mean.

    ``looks`` gets each layer's sums of scores to the image, [head, position].

    ``parts`` are the decoder, the unembedding, and the text configuration. Image tokens have id 5.
    """
    decoder, head_weight, config = parts
    length = len(ids)
    image = [i for i, token in enumerate(ids.tolist()) if token == 5]
    text = list(range(image[-1] + 1, prompt_length))
    generated = list(range(prompt_length, length))
    heads, kinds = config.num_attention_heads, config.num_key_value_heads
    width, theta = config.hidden_size // heads, config.rope_parameters["rope_theta"]
    plain = torch.arange(length, dtype=torch.float64)
    moved = plain.clone()
    moved[image] = image[0] + (plain[image] - image[0]) / compression
    moved[image[-1] + 1 :] -= len(image) * (1 - 1 / compression)
    hidden = decoder.embed_tokens.weight[ids].clone()
    hidden[image] = features
    nearest = math.inf
    for layer in decoder.layers:
        attention = layer.self_attn
        normed = reference._rms_norm(hidden, layer.input_layernorm.weight, config.rms_norm_eps)
        query, key, value = (
            (normed @ one.weight.T).reshape(length, -1, width).transpose(0, 1)
            for one in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        old_q, old_k = _rotated(query, plain, theta), _rotated(key, plain, theta)
        new_q, new_k = _rotated(query, moved, theta), _rotated(key, moved, theta)
        group = heads // kinds
        scores = torch.full((heads, length, length), -math.inf, dtype=torch.float64)
        for h in range(heads):
            for i in range(length):
                row = old_k[h // group] @ old_q[h, i]
                if i > image[-1]:
                    row[image] = new_k[h // group, image] @ new_q[h, i]
                scores[h, i, : i + 1] = row[: i + 1] / math.sqrt(width)
        if looks is not None:
            looks.append(scores[:, :, image].sum(dim=2))
        mixed = torch.zeros(length, heads, width, dtype=torch.float64)
        means = {row: scores[:, text][:, :, image].mean() for row in text}
        means |= {row: scores[:, row, image].mean() for row in generated}
        for h in range(heads):
            seen = value[h // group]
            nothing = seen[image].mean()
            for i in range(length):
                brought = seen.clone()
                if impaired and i in means:
                    above = scores[h, i, image] - means[i]
                    nearest = min(nearest, float(above.abs().min()))
                    for j, over in zip(image, above.tolist(), strict=True):
                        if over > 0:
                            brought[j] = nothing
                mixed[i, h] = scores[h, i].softmax(0) @ brought
        hidden = hidden + mixed.reshape(length, -1) @ attention.o_proj.weight.T
        normed = reference._rms_norm(
            hidden, layer.post_attention_layernorm.weight, config.rms_norm_eps
        )
        gate, up = normed @ layer.mlp.gate_proj.weight.T, normed @ layer.mlp.up_proj.weight.T
        hidden = hidden + (gate * gate.sigmoid() * up) @ layer.mlp.down_proj.weight.T
    normed = reference._rms_norm(hidden, decoder.norm.weight, config.rms_norm_eps)
    return normed @ head_weight.T, nearest
