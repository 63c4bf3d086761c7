"""CLVA as the paper's own code does it, for the benchmark: eager attention, rewritten afterwards.

Every layer forms its whole pattern; the anchors are read from two of them, and in the layers after
these the pattern's text rows are multiplied by 1 + α Z_pos − β Z_neg and normalised again
(Eqs. 1–11 of arXiv:2603.25088v1). The decoder only, without padding, at the paper's setting.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import eager_mask

from clva_lens.models.family import find_site
from clva_lens.science.anchors import (
    anchor_mask,
    default_positive_layer,
    reanchor_weights,
    saliency_map,
)
from clva_lens.science.heads import classify_heads

NAME = "paper_eager"


class _Rewrite:
    """One run: the last prompt's image positions, its heads, and the latest row's weights."""

    def __init__(self, model: PreTrainedModel, image: Bool[Tensor, " position"]) -> None:
        site = find_site(model, "decoder")
        self.layers = {
            id(module): layer for module, layer in zip(site.modules, site.layers, strict=True)
        }
        self.positive = default_positive_layer(site.depth)
        self.image = image.nonzero()[:, 0]
        self.start, self.text = int(self.image[0]), int(self.image[-1]) + 1
        self.heads: dict[int, Tensor] = {}
        self.masks: dict[int, Tensor] = {}

    def __call__(self, module: nn.Module, pattern: Tensor) -> Tensor:
        layer = self.layers[id(module)]
        first = self.text if pattern.shape[2] > 1 else 0
        looks = slice(self.start, self.text)
        if layer in (0, self.positive):
            if pattern.shape[2] > 1:
                mass = pattern[:, :, first:, looks].float().sum(dim=3).mean(dim=2)
                classes = classify_heads(mass[:, None])
                chosen = classes.sensitive if layer else classes.insensitive
                self.heads[layer] = chosen[:, 0]
            seen = saliency_map(pattern[:, :, -1, looks].float(), self.heads[layer])
            self.masks[layer] = anchor_mask(seen, 2.0)
        elif layer > self.positive:
            weights = reanchor_weights(self.masks[self.positive], self.masks[0], 14.0, 0.9)
            pattern[:, :, first:, looks] *= weights[:, None, None].to(pattern.dtype)
            rows = pattern[:, :, first:]
            pattern[:, :, first:] = rows / rows.sum(dim=3, keepdim=True)
        return pattern


_RUNNING: list[_Rewrite] = []


@contextmanager
def rewriting(model: PreTrainedModel, image: Bool[Tensor, " position"]) -> Iterator[None]:
    """Run CLVA as the paper does inside the block; ``image`` marks the image tokens.

    The model must have been switched to the attention kernel "paper_eager".
    """
    _RUNNING.append(_Rewrite(model, image))
    try:
        yield
    finally:
        _RUNNING.pop()


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    pattern = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    pattern = _RUNNING[-1](module, pattern)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, eager_mask)
