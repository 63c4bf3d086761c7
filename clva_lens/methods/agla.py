"""AGLA, assembly of global and local attention (arXiv:2406.12718; Lackel/AGLA at efa1263).

The second input has the same text and a picture of which only what matters to the question is left:
a second model, which matches pictures and texts, says how much each pixel does, and of the s by
which it finds the two alike, the fraction min(1 − s/2, 1 − 1e-5) of the pixels that matter most
stays. The others are black. Its logits are added, not taken away:

    l + α·l′   for tokens with l ≥ max l + ln β.

α = 2, β = 0.5. A sum is sharper than l alone: of samples, compare with those at temperature 1/(1 +
α). The second model of the release is BLIP's (``BlipMatcher``): the map is the GradCAM of its
matching logit in the cross-attention of layer 6, s its cosine. ``"toy"`` is for the toy world.

**Departs from the release**: its second input is read from the first one's cache from the second
token on, so that l′ = l and a caption is sampled at T = 1/3; here it keeps its own. The map is made
of the picture as the model is given it (there squeezed to a square of 384 pixels) and grown
bicubically, without the blur; the second model reads the words after the picture, cue and all.
Greedy decoding and beams work too. No licence: from the formulas. Two passes for each token, and
one of the second model. α = 0 edits nothing at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.engine.session import Session
from clva_lens.methods.base import Kernel, Method, register_method
from clva_lens.methods.contrast import ContrastRule, ContrastSession
from clva_lens.methods.matching import Matcher, Shown, as_matcher
from clva_lens.methods.target import Target
from clva_lens.models.family import Inputs, find_family


@register_method
@dataclass(frozen=True, kw_only=True)
class AGLA(Method):
    """The model's answer and the one to what matters of the picture, together.

    Args:
        alpha: α, the weight of the second answer, >= 0; 0 edits nothing.
        beta: β of the cut-off, in [0, 1].
        matcher: the second model: a ``Matcher``, or "toy" for toy pictures.

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.AGLA()).texts
    ['no']
    """

    name: ClassVar[str] = "agla"
    paper: ClassVar[str] = "AGLA, arXiv:2406.12718"
    kernel: ClassVar[Kernel] = "none"
    forwards: ClassVar[float | int] = 2
    sites: ClassVar[tuple[str, ...]] = ()
    extended: ClassVar[tuple[str, ...]] = ("greedy", "beam")
    zero: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}
    alpha: float | int = 2.0
    beta: float | int = 0.5
    matcher: Matcher | str = "toy"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self._rule()
        as_matcher(self.matcher)

    def _rule(self) -> ContrastRule:
        return ContrastRule(strength=self.alpha, beta=self.beta, form="sum")

    def sessions(self, target: Target) -> list[Session]:
        """Return the sum with what is said of the masked picture; nothing for α = 0.

        Raises:
            InterventionError: if the model came without its processor, or its language model is an
                encoder-decoder.
        """
        rule = self._rule()
        if rule.is_identity:
            return []
        image = find_family(target.model).image_token_id(target.model)
        shown = Shown(target.processor, as_matcher(self.matcher), image, "AGLA")
        return [ContrastSession(target.model, _Masked(shown), rule, whole=True)]


@dataclass(frozen=True, eq=False)
class _Masked:
    shown: Shown

    def __call__(self, inputs: Inputs) -> Inputs:
        pictures = self.shown.pictures(inputs["pixel_values"])
        texts = self.shown.questions(inputs)
        relevance = self.shown.matcher.relevance(pictures, texts)
        alike = self.shown.matcher.similarity(pictures, texts).diagonal()
        kept = brightest(relevance, (1 - alike / 2).clamp(0, 1 - 1e-5))
        masked = self.shown.pixels(pictures * kept[:, None].to(pictures))
        return inputs | {"pixel_values": masked.to(inputs["pixel_values"].dtype)}


def brightest(
    relevance: Float[Tensor, "batch height width"], share: Float[Tensor, " batch"]
) -> Bool[Tensor, "batch height width"]:
    """Return the share of each map's pixels that is brightest; of equal ones, the first."""
    flat = relevance.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(flat.shape[1], device=order.device).expand_as(order)
    )
    kept = rank < (share * flat.shape[1]).round()[:, None]
    return kept.reshape(relevance.shape)
