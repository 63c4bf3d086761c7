"""InstructBLIP once more, from the equations alone, for one sample at a time, in float64.

Nothing of clva_lens is used. The Q-Former's weights are run through a hand-written forward loop
that forms every cross-attention pattern in full and rewrites it *after* the softmax (Eqs. 10-11
with the anchors of Eqs. 1-4 and 8-9, at the place that Eq. 14 names). The keys are CLS, then the
patches; V is the patches; rows are the queries, which have no last one: maps are their mean. What
they read goes on into the hand-written decoder of reference.py. The vision tower is not under
test, its own code runs it. Padding does not exist here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import reference
import torch
from torch import Tensor

PATCHES = 16
QUERIES = 8


class Result(NamedTuple):
    """Both sites' results: ``patterns`` are [head, query, key] per layer of the site."""

    qformer: reference.Result
    decoder: reference.Result

    @property
    def logits(self) -> Tensor:
        return self.decoder.logits

    @property
    def margin(self) -> float:
        return min(self.qformer.margin, self.decoder.margin)


@torch.no_grad()
def run(
    model: torch.nn.Module,
    inputs: Mapping[str, Tensor],
    item: int,
    qformer: Sequence[reference.Edit] = (),
    decoder: Sequence[reference.Edit] = (),
    answer: Tensor | None = None,
    feed: Callable[..., Tensor] | None = None,
) -> Result:
    """Run one sample of a batch with edits at both sites; ``answer`` are generated tokens."""
    ids, pixels, _ = reference.rows_of(inputs, item)
    text = inputs["qformer_input_ids"][item][inputs["qformer_attention_mask"][item].bool()]
    features, seen = read_picture(model, pixels, text, qformer)
    language = SimpleNamespace(
        model=SimpleNamespace(language_model=model.language_model.model),
        lm_head=model.language_model.lm_head,
        config=model.config,
    )
    length = len(ids)
    if answer is not None:
        ids = torch.cat([ids, answer])
    return Result(seen, reference.run(language, ids, pixels, decoder, length, features, feed))


def single(inputs: Mapping[str, Tensor], item: int) -> dict[str, Tensor]:
    """Return one sample of a batch as a batch of one, without its padding."""
    keep = inputs["attention_mask"][item].bool()
    alone = {name: value[item : item + 1] for name, value in inputs.items()}
    for name in ("input_ids", "attention_mask"):
        alone[name] = alone[name][:, keep]
    if "qformer_input_ids" in inputs:
        keep = inputs["qformer_attention_mask"][item].bool()
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            alone[name] = alone[name][:, keep]
    return alone


def read_picture(
    model: torch.nn.Module, pixels: Tensor, text: Tensor, edits: Sequence[reference.Edit]
) -> tuple[Tensor, reference.Result]:
    """Return the features of one picture for the decoder, and the edited patterns."""
    qformer, heads = model.qformer, model.config.qformer_config.num_attention_heads
    kind = model.query_tokens.dtype
    picture = model.vision_model(pixels[None].to(kind)).last_hidden_state[0]
    assert len(picture) == 1 + PATCHES
    words = qformer.embeddings
    read = words.word_embeddings.weight[text] + words.position_embeddings.weight[: len(text)]
    hidden = _norm(torch.cat([model.query_tokens[0], read]), words.layernorm)

    rows = list(range(QUERIES))
    result = reference.Result(torch.empty(0), [], list(range(1, 1 + PATCHES)), rows)
    state = [_Queries(edit) if isinstance(edit, reference.Clva) else None for edit in edits]
    for index, layer in enumerate(qformer.encoder.layer):
        block = layer.attention
        pattern = _scores(block.attention, hidden, hidden, heads).softmax(dim=2)
        hidden = _mix(block, pattern, hidden, hidden)
        asked, read = hidden[:QUERIES], hidden[QUERIES:]
        if index % 2 == 0:
            block = layer.crossattention
            scores = _scores(block.attention, asked, picture, heads)
            pattern = scores.softmax(dim=2)
            for edit, its in zip(edits, state, strict=True):
                if isinstance(edit, reference.Rescore):
                    assert len(edits) == 1  # the others rewrite patterns
                    pattern = edit.rescore(scores, scores, pattern, index, result, []).softmax(2)
                else:
                    pattern = _rewrite(pattern, edit, its, index, result)
            result.patterns.append(pattern)
            asked = _mix(block, pattern, picture, asked)
        asked = _feed(layer.intermediate_query, layer.output_query, asked)
        read = _feed(layer.intermediate, layer.output, read)
        hidden = torch.cat([asked, read])
    for its in state:
        if its is not None:
            result.margin = min(result.margin, its.margin)
            result.masks.append(its.anchors)
    projection = model.language_projection
    return hidden[:QUERIES] @ projection.weight.T + projection.bias, result


class _Queries(reference._ClvaState):
    """The anchors of a Q-Former: one mask for all queries, from the mean of their rows."""

    def _read(
        self, role: str, pattern: Tensor, result: reference.Result, generated: list[int]
    ) -> None:
        patches = pattern[:, :, 1:]
        if self.edit.heads is None:
            phi = [float(head.sum()) / QUERIES for head in patches]  # Eq. 1
            chosen = self._choose(role, phi)  # Eqs. 2-3
        else:
            chosen = list(self.edit.heads[0 if role == "positive" else 1])
        saliency = torch.zeros(PATCHES, dtype=pattern.dtype)
        for head in chosen:  # Eq. 4, over all queries
            for query in range(QUERIES):
                saliency += patches[head, query] / (len(chosen) * QUERIES)
        spread = math.sqrt(((saliency - saliency.mean()) ** 2).mean())
        z = (saliency - saliency.mean()) / (spread + 1e-6)  # Eq. 8
        if chosen:
            self.margin = min(self.margin, float((z - self.edit.tau).abs().min()))
        mask = z > self.edit.tau  # Eq. 9
        self.rows_masks[role] = dict.fromkeys(range(QUERIES), mask)


def _rewrite(
    pattern: Tensor,
    edit: reference.Edit,
    its: "_Queries | None",
    index: int,
    result: reference.Result,
) -> Tensor:
    """Eqs. 10-11: CLS keeps its weight, but the renormalisation is over it too."""
    if its is not None:
        weights = its.weights(pattern, index, 12, result, [])
        if weights is None:
            return pattern
    else:
        layers = edit.layers if edit.layers is not None else (6, 8, 10)
        if index not in layers:
            return pattern
        weights = torch.ones(pattern.shape[1:], dtype=pattern.dtype)
        weights[:, 1:] = 0
    pattern = pattern * weights[None]
    return pattern / pattern.sum(dim=2, keepdim=True)


def _scores(attention: torch.nn.Module, asking: Tensor, asked: Tensor, heads: int) -> Tensor:
    query = _linear(attention.query, asking).reshape(len(asking), heads, -1)
    key = _linear(attention.key, asked).reshape(len(asked), heads, -1)
    return torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])


def _mix(block: torch.nn.Module, pattern: Tensor, asked: Tensor, residual: Tensor) -> Tensor:
    value = _linear(block.attention.value, asked).reshape(len(asked), len(pattern), -1)
    mixed = torch.einsum("hqk,khd->qhd", pattern, value).reshape(pattern.shape[1], -1)
    return _norm(_linear(block.output.dense, mixed) + residual, block.output.LayerNorm)


def _feed(inner: torch.nn.Module, outer: torch.nn.Module, x: Tensor) -> Tensor:
    wide = torch.nn.functional.gelu(_linear(inner.dense, x))
    return _norm(_linear(outer.dense, wide) + x, outer.LayerNorm)


def _linear(layer: torch.nn.Module, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def _norm(x: Tensor, layer: torch.nn.Module) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    spread = torch.sqrt((centred * centred).mean(dim=-1, keepdim=True) + layer.eps)
    return centred / spread * layer.weight + layer.bias
