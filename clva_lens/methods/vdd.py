"""VDD, visual debias decoding (arXiv:2403.05262; yfzhang114/LLaVA-Align at dfbecfa).

What a model would say without any picture is its bias, and is taken away: (1 + α)·l − α·l′, for
tokens with l ≥ max l + ln β. l′ are the logits of the prompt without its image tokens ("nothing"),
of the prompt with one ``<unk>`` in their place ("unknown"), or the mean of the two ("both"). α = 1
and β = 0.1.

**Departs from the release**, which has sampling only (at temperature 0.2): greedy decoding and
beams work too. Its other half, post-hoc debiasing, is ``cl.PostHocDebias``. α = 0 edits nothing at
all: the cut-off goes with the contrast. Exact under fused kernels; a second pass for each token, or
two, of a prompt without image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from clva_lens.engine.session import Session
from clva_lens.ground.errors import InterventionError
from clva_lens.methods.base import Kernel, Method, register_method
from clva_lens.methods.contrast import ContrastRule, ContrastSession, Second, text_only
from clva_lens.methods.target import Target
from clva_lens.models.family import Inputs, find_family

Without = Literal["nothing", "unknown", "both"]
"""What stands in the place of the picture."""


@register_method
@dataclass(frozen=True, kw_only=True)
class VDD(Method):
    """Visual debias decoding.

    Args:
        alpha: α, the strength of the contrast, >= 0; 0 edits nothing.
        beta: β of the cut-off, in [0, 1]. The release's example script has 0.2.
        without: what stands in the place of the picture: "nothing", one "unknown" token, or "both",
            whose logits are averaged. For the last two the model's processor is needed.

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.VDD(without="both")).texts
    ['no']
    """

    name: ClassVar[str] = "vdd"
    paper: ClassVar[str] = "VDD, arXiv:2403.05262"
    kernel: ClassVar[Kernel] = "none"
    forwards: ClassVar[float | int] = 2
    sites: ClassVar[tuple[str, ...]] = ()
    extended: ClassVar[tuple[str, ...]] = ("greedy", "beam")
    zero: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}
    alpha: float | int = 1.0
    beta: float | int = 0.1
    without: Without = "nothing"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self._rule()

    def _rule(self) -> ContrastRule:
        return ContrastRule(strength=self.alpha, beta=self.beta)

    def sessions(self, target: Target) -> list[Session]:
        """Return the contrast with the prompts without image; nothing for α = 0.

        Raises:
            InterventionError: if there is no unknown token to put in, or the language model is an
                encoder-decoder.
        """
        rule = self._rule()
        if rule.is_identity:
            return []
        return [ContrastSession(target.model, without_picture(target, self.without), rule)]


def without_picture(target: Target, without: Without) -> list[Second]:
    """Return what makes the second inputs, in which something else stands for the picture.

    Raises:
        InterventionError: if there is no unknown token to put in.
    """
    image = find_family(target.model).image_token_id(target.model)
    seconds: list[Second] = []
    if without != "unknown":
        seconds.append(text_only(image))
    if without != "nothing":
        seconds.append(_Unknown(image, _unknown_id(target.processor, without)))
    return seconds


@dataclass(frozen=True)
class _Unknown:
    """Puts one token in the place of a prompt's image tokens."""

    image: int
    unknown: int

    def __call__(self, inputs: Inputs) -> Inputs:
        ids = inputs["input_ids"]
        is_image = ids == self.image
        first = is_image & (is_image.cumsum(dim=1) == 1)
        kept = ~is_image | first
        shown = torch.where(first, self.unknown, ids)
        real = inputs["attention_mask"]
        found = {"input_ids": shown, "attention_mask": real}
        return {name: one[kept].reshape(len(ids), -1) for name, one in found.items()}


def _unknown_id(processor: Any, without: str) -> int:
    """Return the tokenizer's id for unknown words.

    Raises:
        InterventionError: if there is none.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    found = getattr(tokenizer, "unk_token_id", None)
    if found is None:
        why = "the model came without a processor" if tokenizer is None else "it has none"
        raise InterventionError(
            f"without='{without}' puts the tokenizer's unknown token in the place of the picture, "
            f"but {why}. Pass without='nothing', or load the model with cl.load()."
        )
    return int(found)
