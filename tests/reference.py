"""The decoder and the methods once more, from the equations alone, for one sample at a time.

Nothing of clva_lens is used. The decoder's own weights are run through a hand-written forward loop
(RMSNorm, rotary embedding, grouped queries, SwiGLU) that forms every pattern in full and rewrites
it *after* the softmax, as Eqs. 10-11 of arXiv:2603.25088v1 are printed. Run it on a float64 copy
of the model. Padding does not exist here: batches are taken apart and their padding is cut off.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rewrites import ClearSight, Pai, Rescore, VisFlow
from torch import Tensor


@dataclass(frozen=True)
class Clva:
    alpha: float = 14.0
    beta: float = 0.9
    tau: float = 2.0
    threshold: float = 1.0
    negative_layer: int = 0
    positive_layer: int | None = None
    layers: tuple[int, ...] | None = None
    rows: str = "text"
    refresh: str = "step"
    empty: str = "tail"
    # Explicit heads: those of the positive layer and those of the negative one.
    heads: tuple[Sequence[int], Sequence[int]] | None = None
    # For a control: which image token's factor each one gets.
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class KnockOut:
    layers: tuple[int, ...] | None = None
    rows: str = "text"
    # The heads that lose the image, by layer; None is all of them.
    heads: Mapping[int, Sequence[int]] | None = None


Edit = Clva | KnockOut | ClearSight | Pai | VisFlow


@dataclass
class Result:
    """``logits`` [position, vocabulary]; ``patterns``: per layer [head, query, key], edited.

    ``image``, ``text`` are positions. ``margin`` is the smallest distance of a decision (a head's
    or a token's) from its threshold: if it were as small as rounding, nothing could be compared.
    ``masks`` are the last prompt row's (positive, negative) of each CLVA, ``streams`` what each
    layer puts out [position, width], after what enters the first.
    """

    logits: Tensor
    patterns: list[Tensor]
    image: list[int]
    text: list[int]
    margin: float = math.inf
    masks: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    streams: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def run(
    model: torch.nn.Module,
    ids: Tensor,
    pixels: Tensor,
    edits: Sequence[Edit] = (),
    prompt_length: int | None = None,
    features: Tensor | None = None,
    feed: Callable[[int, Tensor, Tensor, Result], Tensor] | None = None,
) -> Result:
    """Run one sample (``ids`` [position], unpadded); from ``prompt_length`` on, it is generated.

    ``features`` are the image tokens' embeddings, where they are not LLaVA's own. ``feed`` replaces
    what an FFN puts out: it is given the layer, the FFN's input and output, and what is known.
    """
    decoder, config = model.model.language_model, model.config.text_config
    kind = model.lm_head.weight.dtype
    length, prompt_length = len(ids), prompt_length or len(ids)
    image = [i for i, token in enumerate(ids.tolist()) if token == model.config.image_token_index]
    text = list(range(max(image, default=-1) + 1, prompt_length))
    generated = list(range(prompt_length, length))
    result = Result(torch.empty(0), [], image, text)
    state = [_ClvaState(edit) if isinstance(edit, Clva) else None for edit in edits]

    hidden = decoder.embed_tokens.weight[ids].clone()
    hidden[image] = _features(model, pixels.to(kind)) if features is None else features
    result.streams.append(hidden)
    total_layers, heads = len(decoder.layers), config.num_attention_heads
    width = config.hidden_size // heads
    groups = heads // config.num_key_value_heads
    rotate = _rotation(length, width, config.rope_parameters["rope_theta"], kind)
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        normed = _rms_norm(hidden, layer.input_layernorm.weight, config.rms_norm_eps)
        query, key, value = (
            _linear(normed, projection).reshape(length, -1, width).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = _rotary(query, *rotate), _rotary(key, *rotate)
        raw = torch.full((heads, length, length), -math.inf, dtype=kind)
        for head in range(heads):
            for row in range(length):
                scores = key[head // groups, : row + 1] @ query[head, row] / math.sqrt(width)
                raw[head, row, : row + 1] = scores
        scores, factor = raw, torch.ones_like(raw)
        pattern = raw.softmax(dim=2)
        for edit, its in zip(edits, state, strict=True):
            if isinstance(edit, Rescore):
                scores = edit.rescore(scores, raw, pattern, index, result, generated)
            elif isinstance(edit, VisFlow):
                factor = factor * edit.weights(pattern, index, result, generated)
            else:
                weights = (
                    _knock_out_weights(edit, index, total_layers, result, generated, pattern)
                    if its is None
                    else its.weights(pattern, index, total_layers, result, generated)
                )
                factor = factor if weights is None else factor * weights
            pattern = scores.softmax(dim=2) * factor
            pattern = pattern / pattern.sum(dim=2, keepdim=True)
        result.patterns.append(pattern)
        mixed = [pattern[head] @ value[head // groups] for head in range(heads)]
        hidden = hidden + torch.cat(mixed, dim=1) @ attention.o_proj.weight.T
        normed = _rms_norm(hidden, layer.post_attention_layernorm.weight, config.rms_norm_eps)
        gate, up = normed @ layer.mlp.gate_proj.weight.T, normed @ layer.mlp.up_proj.weight.T
        fed = (gate * gate.sigmoid() * up) @ layer.mlp.down_proj.weight.T
        hidden = hidden + (fed if feed is None else feed(index, normed, fed, result))
        result.streams.append(hidden)
    normed = _rms_norm(hidden, decoder.norm.weight, config.rms_norm_eps)
    result.logits = normed @ model.lm_head.weight.T
    for its in state:
        if its is not None:
            result.margin = min(result.margin, its.margin)
            result.masks.append(its.anchors)
    return result


def _edited_rows(rows: str, result: Result, generated: list[int]) -> list[int]:
    return (result.text if rows == "text" else result.text[-1:]) + generated


def _later_layers(layers: Sequence[int] | None, first: int, total: int) -> Sequence[int]:
    return range(first, total) if layers is None else layers


def _knock_out_weights(
    edit: KnockOut,
    index: int,
    total: int,
    result: Result,
    generated: list[int],
    pattern: Tensor,
) -> Tensor | None:
    if index not in _later_layers(edit.layers, total // 2 - 1, total):
        return None
    weights = torch.ones_like(pattern)
    heads = range(len(pattern)) if edit.heads is None else edit.heads.get(index, ())
    for head in heads:
        for row in _edited_rows(edit.rows, result, generated):
            weights[head, row, result.image] = 0
    return weights


class _ClvaState:
    """What one CLVA has read so far: head sets, and one anchor mask per edited row."""

    def __init__(self, edit: Clva) -> None:
        self.edit = edit
        self.margin = math.inf
        self.rows_masks: dict[str, dict[int, Tensor]] = {}
        self.anchors: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def weights(
        self, pattern: Tensor, index: int, total: int, result: Result, generated: list[int]
    ) -> Tensor | None:
        edit = self.edit
        positive = total // 2 - 2 if edit.positive_layer is None else edit.positive_layer
        if index == positive:
            self._read("positive", pattern, result, generated)
        if index == edit.negative_layer:
            self._read("negative", pattern, result, generated)
        first = max(positive, edit.negative_layer) + 1
        if index not in _later_layers(edit.layers, first, total):
            return None
        last = result.text[-1]
        pos, neg = self.rows_masks["positive"], self.rows_masks["negative"]
        self.anchors = (pos[last], neg[last])
        weights = torch.ones(pattern.shape[1:], dtype=pattern.dtype)
        for row in _edited_rows(edit.rows, result, generated):
            source = row if row in generated and edit.refresh == "step" else last
            factor = 1 + edit.alpha * pos[source].to(pattern) - edit.beta * neg[source].to(pattern)
            factor[factor.abs() < 1e-12] = 0
            weights[row, result.image] = factor if edit.order is None else factor[[*edit.order]]
        return weights

    def _read(self, role: str, pattern: Tensor, result: Result, generated: list[int]) -> None:
        image, last = result.image, result.text[-1]
        if self.edit.heads is None:
            phi = pattern[:, result.text][:, :, image].sum(dim=2).mean(dim=1)  # Eq. 1
            chosen = self._choose(role, phi.tolist())
        else:
            chosen = list(self.edit.heads[0 if role == "positive" else 1])
        masks = {}
        for row in [last, *generated]:
            saliency = torch.zeros(len(image), dtype=pattern.dtype)  # Eq. 4
            for head in chosen:
                saliency += pattern[head, row, image] / len(chosen)
            spread = math.sqrt(((saliency - saliency.mean()) ** 2).mean())
            z = (saliency - saliency.mean()) / (spread + 1e-6)  # Eq. 8
            if chosen:
                self.margin = min(self.margin, float((z - self.edit.tau).abs().min()))
            masks[row] = z > self.edit.tau  # Eq. 9
        self.rows_masks[role] = masks

    def _choose(self, role: str, phi: list[float]) -> list[int]:
        """Eqs. 2-3, and the tail where they select nobody."""
        count = len(phi)
        mean = sum(phi) / count
        sigma = math.sqrt(sum((x - mean) ** 2 for x in phi) / count)
        limit = self.edit.threshold * sigma
        sign = 1 if role == "positive" else -1
        chosen = [head for head, x in enumerate(phi) if sign * (x - mean) > limit]
        gaps = [abs(sign * (x - mean) - limit) for x in phi]
        if not chosen and self.edit.empty == "tail":
            share = 1 - 0.5 * (1 + math.erf(self.edit.threshold / math.sqrt(2)))
            size = max(1, math.ceil(share * count))
            ranked = sorted(range(count), key=lambda head: sign * phi[head])
            chosen = sorted(ranked[-size:])
            gaps += [abs(phi[ranked[-size]] - phi[ranked[-size - 1]])]
        self.margin = min(self.margin, *gaps)
        return chosen


def rows_of(inputs: Mapping[str, Tensor], item: int) -> tuple[Tensor, Tensor, slice]:
    """Return one sample of a left-padded batch, unpadded: ids, pixels, and where it was."""
    mask = inputs["attention_mask"][item].bool()
    start = int(mask.nonzero()[0])
    assert bool(mask[start:].all()), "the batch is not padded on the left"
    return inputs["input_ids"][item, start:], inputs["pixel_values"][item], slice(start, None)


def _features(model: torch.nn.Module, pixels: Tensor) -> Tensor:
    """Return the projected image features: the tower is not under test, its own code runs it."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    seen = tower(pixels[None], output_hidden_states=True).hidden_states
    patches = seen[model.config.vision_feature_layer][0, 1:]
    return projector.linear_2(torch.nn.functional.gelu(projector.linear_1(patches)))


def _linear(x: Tensor, projection: torch.nn.Module) -> Tensor:
    bias = 0.0 if projection.bias is None else projection.bias
    return x @ projection.weight.T + bias


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + epsilon) * weight


def _rotation(length: int, width: int, theta: float, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.tensor(
        [[p * theta ** (-2 * i / width) for i in range(width // 2)] for p in range(length)],
        dtype=kind,
    )
    return angle.cos(), angle.sin()


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
