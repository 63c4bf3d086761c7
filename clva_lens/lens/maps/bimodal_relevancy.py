"""Gradient × attention relevancy through a Q-Former: by all rules of the paper.

Chefer, Gur and Wolf, arXiv:2103.15679, Eqs. 5 to 11. The Q-Former's positions s are its queries and
the question's tokens, p are the patches that the queries read. With Ā of Eq. 5, the mean over the
heads of what of gradient × attention is above 0, and from R^ss = I, R^sp = 0, layer by layer

    self-attention of s    R^ss ← R^ss + Ā R^ss,  R^sp ← R^sp + Ā R^sp          (Eqs. 6, 7)
    queries read patches   R^sp ← R^sp + (R̄^ss)ᵀ Ā R̄^pp                          (Eq. 10)
    with R̂ = R − I and S its sums of rows,  R̄ = R̂ / S + I                       (Eqs. 8, 9)

Eq. 11 adds nothing to R^ss, since patches never read queries (R^ps = 0). The decoder reads what the
queries put out as its image tokens, whose R^dp begins as the queries' R^sp; by Eq. 7 the last text
row has r R^sp in the end, with the row r that ``relevancy`` carries. Without a Q-Former there is no
cross-attention, and the map is ``relevancy``'s.

**Departs from the paper:** a decoder behind a Q-Former is not among its models. The patches are
outputs of the vision tower, each as it is (R̄^pp = I); what the tower mixes is not followed. A row
of R̂ without anything is left 0 in R̄.
"""

from dataclasses import dataclass
from threading import get_ident
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.engine.session import AttentionCall, as_additive, raw_scores
from clva_lens.ground.errors import InterventionError
from clva_lens.lens.maps.base import MapFormula, Reading, register_map
from clva_lens.lens.maps.passes import Entry, Patterns, slopes
from clva_lens.lens.maps.relevancy import (
    Relevancy,
    from_the_top,
    outputs,
    values_of_heads,
    weighed,
)
from clva_lens.methods.target import shape_of
from clva_lens.models.belonging import hook_after
from clva_lens.models.family import find_family
from clva_lens.models.instructblip import InstructBlip


class Questioning(Entry):
    """Has the Q-Former begin at what enters its first layer, so that gradients end there."""

    site = "qformer"


@register_map
@dataclass(frozen=True, kw_only=True)
class BiModalRelevancy(MapFormula):
    """Gradient × attention relevancy, through a Q-Former to the patches."""

    name: ClassVar[str] = "bi-modal-relevancy"
    paper: ClassVar[str] = "arXiv:2103.15679, Eqs. 5-11"
    on_patches: ClassVar[bool] = True

    def over(self, reading: Reading) -> Float[Tensor, "batch visual"]:
        """Return the map, from one pass and one backward."""
        own = shape_of(reading.model)
        if own.site == "decoder":
            return Relevancy().over(reading)
        reading.need_all_layers(self.name)
        across, decoder, within = Patterns(own), Patterns(reading.shape), SelfAttention(reading)
        try:
            wanted = reading.run(Questioning(), across, decoder, gradients=True)
        finally:
            within.remove()
        parts = [outputs(decoder), outputs(across), within.outputs()]
        several = iter(slopes(wanted, [one for part in parts for one in part]))
        top, read, asked = ([next(several) for _ in part] for part in parts)
        row = decoder.on_image(from_the_top(decoder, top))
        found = _to_patches(across, read[::-1], within, asked)[:, : row.shape[1]]
        return (row[:, None].to(found) @ found)[:, 0]


class SelfAttention:
    """Keeps of the Q-Former's self-attention what its patterns can be formed from again."""

    def __init__(self, reading: Reading) -> None:
        """Watch all layers, until ``remove``."""
        family: Any = find_family(reading.model)
        assert isinstance(family, InstructBlip)
        self.modules = family.asking(reading.model)
        self._thread = get_ident()  # others may call the model meanwhile
        self._kept: dict[Any, tuple[Tensor, Tensor | None, Tensor]] = {}
        self._hooks = [hook_after(module, self._keep) for module in self.modules]

    def _keep(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if get_ident() != self._thread:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        self._kept[module] = (hidden, kwargs.get("attention_mask"), output[0])

    def remove(self) -> None:
        """Watch no more."""
        for hook in self._hooks:
            hook.remove()

    def outputs(self) -> list[Float[Tensor, "batch row width"]]:
        """Return what the heads of each layer put out, side by side, from the first layer on."""
        if len(self._kept) < len(self.modules):
            raise InterventionError(
                "a layer of the Q-Former did not run. Pass a prompt with its photo."
            )
        return [self._kept[module][2] for module in self.modules]

    def weighed(
        self, layer: int, slope: Float[Tensor, "batch row width"]
    ) -> Float[Tensor, "batch row row"]:
        """Return Ā of a layer."""
        module: Any = self.modules[layer]
        hidden, mask, _ = self._kept[module]
        size = (-1, module.attention_head_size)
        heads = (module.query, module.key, module.value)
        query, key, value = (of(hidden).unflatten(-1, size).transpose(1, 2) for of in heads)
        scores = raw_scores(query, key, module.scaling)
        scores = scores if mask is None else scores + as_additive(mask)
        return weighed(scores.softmax(dim=-1), slope.unflatten(-1, size), value.float())


def _to_patches(
    across: Patterns, read: list[Tensor | None], within: SelfAttention, asked: list[Tensor | None]
) -> Float[Tensor, "batch position visual"]:
    """Return R^sp, of the patches, given the slopes of both kinds of attention by layer."""
    cross = dict(zip(across.layers, read, strict=True))
    first = within.outputs()[0]
    batch, count, call = len(first), first.shape[1], across.calls[across.layers[0]]
    own = torch.eye(count, device=first.device).repeat(batch, 1, 1)
    patches = torch.zeros(batch, count, call.key.shape[2], device=first.device)
    for layer, slope in enumerate(asked):
        if slope is not None:
            more = within.weighed(layer, slope)
            own, patches = own + more @ own, patches + more @ patches
        steep = cross.get(layer)
        if steep is not None:
            more = torch.zeros_like(patches)
            more[:, : steep.shape[1]] = _weighed(across.calls[layer], steep)
            patches = patches + normalised(own).mT @ more
    places = call.step.visual.to(first.device)
    return patches.gather(2, places[:, None].expand(-1, count, -1))


def _weighed(
    call: AttentionCall, slope: Float[Tensor, "batch row head width"]
) -> Float[Tensor, "batch row key"]:
    return weighed(call.rows(0, slope.shape[1]), slope, values_of_heads(call))


def normalised(own: Float[Tensor, "batch row row"]) -> Float[Tensor, "batch row row"]:
    """Return R̄ (Eqs. 8, 9): what R has beside I, each row divided by its sum."""
    eye = torch.eye(own.shape[-1], device=own.device)
    beside = own - eye
    total = beside.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, beside / total, 0.0) + eye
