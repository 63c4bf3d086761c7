"""Decorrelated reading: an attention function for training that plants where pictures are read.

Text rows may read their own picture in chosen layers only. Elsewhere they find, in its place, the
keys and values of *another* picture of the batch: the same statistics, no information. So no
circuit can form there, and at inference the plain model sees a familiar signal that it has learned
to ignore. In the reading layers each (picture, layer) is replaced too with a probability, the *vote
noise*, which makes every single layer untrustworthy and so spreads the reading over all of them.

The control model reads plainly, but a share of its pictures cannot be seen by text rows after the
first reading layer. It learns to do without the later layers, whose maps are taught all the same.

An *early* reader reads its own picture in the first layers, in all rows, and another one after
them: the picture is needed early and says nothing late.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from clva_lens.toy.packing import VISUAL, Packed

READING_LAYERS = (4, 5, 6, 7, 8)
POINTING_HEADS = 4  # the first four heads are taught where to look


@dataclass
class Reader:
    """The attention function with its plan for the batch at hand.

    ``swap_probability`` is the vote noise of each reading layer; None lets every row of every layer
    read its own picture (the control model), but for the share ``blind`` of the pictures, which
    text rows cannot see after the first reading layer. ``early`` lets every row read its own
    picture in as many first layers, and another one after them, whatever ``swap_probability`` is.
    ``pointing_losses`` collects, per reading layer, −log of the attention of the first heads on
    the patches of the object in question.
    """

    packed: Packed | None = None
    swap_probability: tuple[float, ...] | None = None
    generator: torch.Generator | None = None
    point: bool = False
    blind: float = 0.0
    early: int | None = None

    def __post_init__(self) -> None:
        """Start with nothing collected."""
        self.pointing_losses: list[Tensor] = []

    def begin(self, packed: Packed) -> None:
        """Take the batch to be read and forget the last one's losses."""
        self.packed, self.pointing_losses = packed, []
        self.hidden = torch.zeros(len(packed.ids), dtype=torch.bool)
        if self.blind:
            self.hidden = torch.rand(len(packed.ids), generator=self.generator) < self.blind

    def __call__(
        self,
        module: nn.Module,
        query: Float[Tensor, "batch head sequence width"],
        key: Float[Tensor, "batch head sequence width"],
        value: Float[Tensor, "batch head sequence width"],
        attention_mask: object,
        **_: object,
    ) -> tuple[Float[Tensor, "batch sequence head width"], None]:
        """Attend: prefix rows causally, text rows to the prefix and their own branch."""
        packed = self.packed
        assert packed is not None, "call begin() with the batch first"
        batch = query.shape[0]
        layer: Any = module.layer_idx
        system = len(packed.prefix)
        image = slice(system, system + VISUAL)
        start = system + VISUAL
        prefix = scaled_dot_product_attention(
            query[:, :, :start], key[:, :, :start], value[:, :, :start], is_causal=True
        )
        rows = query[:, :, start:]
        if self.point and layer in READING_LAYERS:
            self.pointing_losses.append(
                _pointing_loss(rows, key[:, :, image], packed.object_patches)
            )
        if self.early is not None:
            own = torch.full((batch, rows.shape[2]), layer < self.early)
        elif self.swap_probability is None:
            own = torch.ones(batch, rows.shape[2], dtype=torch.bool)
            if layer > READING_LAYERS[0]:
                own &= ~self.hidden[:, None]
        elif layer in READING_LAYERS:
            noise = self.swap_probability[READING_LAYERS.index(layer)]
            swapped = torch.rand(batch, generator=self.generator) < noise
            own = packed.answering & ~swapped[:, None]
        else:
            own = torch.zeros(batch, rows.shape[2], dtype=torch.bool)
        keys, values, mask = [key], [value], self._mask(own, system)
        swaps = self.early is not None or self.swap_probability is not None
        if swaps and not own.all():
            shift = int(torch.randint(1, batch, (), generator=self.generator))
            keys.append(key[:, :, image].roll(shift, 0))
            values.append(value[:, :, image].roll(shift, 0))
            other = (~own)[:, None, :, None].expand(-1, -1, -1, VISUAL)
            mask = torch.cat([mask, other], dim=3)
        text = scaled_dot_product_attention(
            rows, torch.cat(keys, dim=2), torch.cat(values, dim=2), attn_mask=mask
        )
        return torch.cat([prefix, text], dim=2).transpose(1, 2), None

    def _mask(
        self, own: Bool[Tensor, "batch rows"], system: int
    ) -> Bool[Tensor, "batch 1 rows sequence"]:
        assert self.packed is not None
        batch, rows = own.shape
        first = torch.ones(batch, rows, system, dtype=torch.bool)
        image = own[:, :, None].expand(-1, -1, VISUAL)
        return torch.cat([first, image, self.packed.visible], dim=2)[:, None]


def _pointing_loss(
    rows: Float[Tensor, "batch head rows width"],
    image_keys: Float[Tensor, "batch head visual width"],
    patches: Bool[Tensor, "batch rows visual"],
) -> Float[Tensor, ""]:
    """Return −log of the taught heads' mean attention on the object, among the image keys."""
    taught = patches.any(dim=2)
    scores = rows[:, :POINTING_HEADS] @ image_keys[:, :POINTING_HEADS].mT * rows.shape[-1] ** -0.5
    pattern = scores.softmax(dim=3).mean(dim=1)[taught]
    return -(pattern * patches[taught]).sum(dim=1).clamp_min(1e-6).log().mean()
