"""Decorrelated reading for the toy InstructBLIP: cross-attention that plants where it looks.

As in reading.py, but what reads here are the Q-Former's query tokens, by cross-attention in every
second layer. Below the reading layers they find another picture of the batch; in the reading layers
each (row, layer) is swapped with a probability, the *vote noise*. The class token always comes from
another picture, so that only patches tell.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import InstructBlipQFormerModel

from clva_lens.toy.reading import POINTING_HEADS

READING_LAYERS = (4, 6, 8, 10)


@dataclass
class CrossReader:
    """The Q-Former's attention function with its plan for the batch at hand.

    Each row is one question about one picture; keys come once a picture. ``swap_probability`` is
    the vote noise of each reading layer. None reads plainly: own patches and class token in every
    layer. ``pointing_losses`` collects, per reading layer, −log of the attention of the first heads
    on the patches of the object in question.
    """

    swap_probability: tuple[float, ...] | None = None
    generator: torch.Generator | None = None
    point: bool = False

    def begin(
        self, picture: Int[Tensor, " rows"], object_patches: Bool[Tensor, "rows visual"]
    ) -> None:
        """Take the rows' pictures and objects, and forget the last batch's losses."""
        self.picture, self.object_patches = picture, object_patches
        self.pointing_losses: list[Tensor] = []

    def __call__(
        self,
        module: nn.Module,
        query: Float[Tensor, "rows head sequence width"],
        key: Float[Tensor, "batch head keys width"],
        value: Float[Tensor, "batch head keys width"],
        attention_mask: Tensor | None,
        **_: object,
    ) -> tuple[Float[Tensor, "rows sequence head width"], None]:
        """Attend: words and queries to one another plainly, queries to pictures as planned."""
        layer: Any = getattr(module, "cross_layer", None)
        if layer is not None:
            if self.point and layer in READING_LAYERS:
                self.pointing_losses.append(self._pointing_loss(query, key))
            seen, whole = self._sources(layer, len(key))
            key = torch.cat([key[whole, :, :1], key[seen, :, 1:]], dim=2)
            value = torch.cat([value[whole, :, :1], value[seen, :, 1:]], dim=2)
            attention_mask = None
        out = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return out.transpose(1, 2), None

    def _sources(self, layer: int, batch: int) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Return the pictures that each row's patches and class token are taken from."""
        own = self.picture
        if self.swap_probability is None:
            return own, own
        shift = torch.randint(1, batch, (2, len(own)), generator=self.generator)
        patches, whole = (own + shift) % batch
        if layer in READING_LAYERS:
            noise = self.swap_probability[READING_LAYERS.index(layer)]
            swapped = torch.rand(len(own), generator=self.generator) < noise
            patches = torch.where(swapped, patches, own)
        return patches, whole

    def _pointing_loss(
        self,
        query: Float[Tensor, "rows head query width"],
        key: Float[Tensor, "batch head keys width"],
    ) -> Float[Tensor, ""]:
        """Return −log of the taught heads' and all queries' mean attention on the object."""
        taught = self.object_patches.any(dim=1)
        patches = key[self.picture[taught], :POINTING_HEADS, 1:]
        scores = query[taught, :POINTING_HEADS] @ patches.mT * query.shape[-1] ** -0.5
        pattern = scores.softmax(dim=3).mean(dim=(1, 2))
        on = (pattern * self.object_patches[taught]).sum(dim=1)
        return -on.clamp_min(1e-6).log().mean()


def mark_layers(qformer: InstructBlipQFormerModel) -> None:
    """Tell every cross-attention of a Q-Former which layer it is in, for ``CrossReader``."""
    layers: Any = qformer.encoder.layer
    for index, layer in enumerate(layers):
        if layer.has_cross_attention:
            layer.crossattention.attention.cross_layer = index
