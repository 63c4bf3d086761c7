"""An attention kernel that rewrites patterns after the softmax, for every language model.

It is registered with transformers under a name of its own and knows nothing of clva_lens; the
rewriting itself is that of reference.py and queries.py. One sample at a time, in float64.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import queries
import reference
import torch
from tiny_models import tiny_blip
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

ROUTES: dict[int, Any] = {}


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    for extra in (position_bias, attention_mask):
        if extra is not None:
            scores = scores + extra[..., : scores.shape[-1]]
    pattern = scores.softmax(dim=-1)
    if id(module) in ROUTES:
        pattern = ROUTES[id(module)](pattern[0])[None]
    mixed = torch.einsum("bhqk,bhkd->bqhd", pattern, value)
    return mixed.contiguous(), pattern


AttentionInterface.register("rewriting_in_a_test", _attend)
AttentionMaskInterface.register("rewriting_in_a_test", eager_mask)


@cache
def double(language: str) -> torch.nn.Module:
    model = copy.deepcopy(tiny_blip(language)).double()
    model.set_attn_implementation("rewriting_in_a_test")
    return model


class _Site:
    """The edits of one site of one run, and what its patterns became."""

    def __init__(self, edits: Sequence[reference.Edit], kind: Any, image: list, text: list) -> None:
        self.result = reference.Result(torch.empty(0), [], image, text)
        self.pairs = [(e, kind(e) if isinstance(e, reference.Clva) else None) for e in edits]

    def blind(
        self, edit: reference.KnockOut, pattern: Tensor, index: int, generated: list[int]
    ) -> Tensor | None:
        if index not in reference._later_layers(edit.layers, 5, 12):
            return None
        weights = torch.ones(pattern.shape[1:], dtype=pattern.dtype)
        for row in reference._edited_rows(edit.rows, self.result, generated):
            weights[row, self.result.image] = 0
        return weights

    def at(self, index: int, generated: list[int]) -> Any:
        def rewrite(pattern: Tensor) -> Tensor:
            for edit, its in self.pairs:
                if its is not None:
                    weights = its.weights(pattern, index, 12, self.result, generated)
                else:
                    weights = self.blind(edit, pattern, index, generated)
                if weights is not None:
                    pattern = pattern * weights
                    pattern = pattern / pattern.sum(dim=-1, keepdim=True)
            self.result.patterns.append(pattern)
            return pattern

        return rewrite


class Rewritten(NamedTuple):
    logits: Tensor
    qformer: reference.Result
    decoder: reference.Result


@torch.no_grad()
def run(
    language: str,
    inputs: Mapping[str, Tensor],
    item: int,
    qformer: Sequence[reference.Edit] = (),
    decoder: Sequence[reference.Edit] = (),
    answer: Tensor | None = None,
) -> Rewritten:
    """Run one sample; ``answer`` are generated tokens, each with anchors of its own."""
    model, alone = double(language), queries.single(inputs, item)
    alone["pixel_values"] = alone["pixel_values"].double()
    encoder_decoder = "decoder_input_ids" in alone
    rows = alone["decoder_input_ids" if encoder_decoder else "input_ids"]
    length = rows.shape[1]
    if answer is not None:
        rows = torch.cat([rows, answer[None]], dim=1)
    if encoder_decoder:
        alone["decoder_input_ids"], text = rows, [0]
        modules = [block.layer[1].EncDecAttention for block in model.language_model.decoder.block]
    else:
        alone["input_ids"], alone["attention_mask"] = rows, torch.ones_like(rows)
        text = list(range(queries.QUERIES, length))
        modules = [layer.self_attn for layer in model.language_model.get_decoder().layers]
    image = list(range(queries.QUERIES))  # nothing is before the image
    reading = _Site(
        qformer, queries._Queries, list(range(1, 1 + queries.PATCHES)), list(range(queries.QUERIES))
    )
    answering = _Site(decoder, reference._ClvaState, image, text)
    generated = list(range(length, rows.shape[1]))
    stack = model.qformer.encoder.layer
    for index in range(0, 12, 2):
        ROUTES[id(stack[index].crossattention.attention)] = reading.at(index, [])
    for index, module in enumerate(modules):
        ROUTES[id(module)] = answering.at(index, generated)
    try:
        logits = model(**alone).logits[0]
    finally:
        ROUTES.clear()
    return Rewritten(logits, reading.result, answering.result)
