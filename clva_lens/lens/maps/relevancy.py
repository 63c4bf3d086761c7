"""Gradient × attention relevancy: attention that the answer depends on, added up over the layers.

Chefer, Gur and Wolf, arXiv:2103.15679, Eqs. 5 and 6, for self-attention alone, which is all that a
decoder has that reads picture and text in one row of tokens (LLaVA and its like). With A_l the
pattern of layer l, y the logit that is explained, and E_h the mean over heads,

    Ā_l = E_h[(∂y/∂A_l ⊙ A_l)⁺]
    R   ← I,  then  R ← R + Ā_l R  from the first layer to the last

and the map is R[last text row, image tokens], at least 0, in logits. R is the product
(I + Ā_L) ⋯ (I + Ā_1), so one row of it is r ← r + r Ā_l from the last layer down: only that row is
carried, and one layer's pattern is formed at a time, some rows of it at once. Its gradient needs no
pattern that autograd keeps: what the heads put out is z = A v, so ∂y/∂A = (∂y/∂z) vᵀ.

**Departs from the paper:** their rules for cross-attention (Eqs. 8 to 11) are not taken: a picture
that a Q-Former reads is passed on as ``cl.image_map`` says. ``bi-modal-relevancy`` takes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from einops import einsum
from jaxtyping import Float
from torch import Tensor

from clva_lens.engine.session import AttentionCall
from clva_lens.lens.maps.base import MapFormula, Reading, register_map
from clva_lens.lens.maps.passes import Entry, Patterns, carried, slopes


@register_map
@dataclass(frozen=True, kw_only=True)
class Relevancy(MapFormula):
    """Gradient × attention relevancy."""

    name: ClassVar[str] = "relevancy"
    paper: ClassVar[str] = "arXiv:2103.15679, Eqs. 5-6"

    def over(self, reading: Reading) -> Float[Tensor, "batch visual"]:
        """Return the map, from one pass and one backward."""
        reading.need_all_layers(self.name)
        patterns = Patterns(reading.shape)
        wanted = reading.run(Entry(), patterns, gradients=True)
        return patterns.on_image(from_the_top(patterns, slopes(wanted, outputs(patterns))))


def outputs(patterns: Patterns) -> list[Float[Tensor, "batch row head width"]]:
    """Return what the heads of all layers put out, from the last layer to the first."""
    return [call.z for call in patterns.from_the_top() if call.z is not None]


def from_the_top(
    patterns: Patterns, steep: Sequence[Float[Tensor, "batch row head width"] | None]
) -> Float[Tensor, "batch row"]:
    """Return R's row of the last text row, given the slopes of what ``outputs`` returns."""
    row = patterns.last_row()
    for call, slope in zip(patterns.from_the_top(), steep, strict=True):
        if slope is not None:  # None: no answer depends on what these heads put out
            row = row.to(call.query.device)
            row = row + _through(call, slope, row)
    return row.to(patterns.last_row().device)


def weighed(
    pattern: Float[Tensor, "batch head row key"],
    slope: Float[Tensor, "batch row head width"],
    value: Float[Tensor, "batch head key width"],
) -> Float[Tensor, "batch row key"]:
    """Return Ā (Eq. 5): the mean over the heads of what of gradient × attention is above 0."""
    steep = einsum(slope.float(), value, "b row h w, b h key w -> b h row key")
    return (steep * pattern).clamp(min=0).mean(dim=1)


def values_of_heads(
    call: AttentionCall, count: int | None = None
) -> Float[Tensor, "batch head key width"]:
    """Return the values of a layer's first ``count`` keys, of each query head its own."""
    assert call.value is not None
    groups = call.query.shape[1] // call.value.shape[1]
    return call.value.float().repeat_interleave(groups, dim=1)[:, :, :count]


def _through(
    call: AttentionCall,
    slope: Float[Tensor, "batch row head width"],
    row: Float[Tensor, "batch row"],
) -> Float[Tensor, "batch row"]:
    """Return r Ā_l."""
    value = values_of_heads(call, row.shape[1])

    def weigh(
        rows: Float[Tensor, "batch head piece key"], start: int, stop: int
    ) -> Float[Tensor, "batch piece key"]:
        return weighed(rows, slope[:, start:stop], value)

    return carried(call, row, weigh)
