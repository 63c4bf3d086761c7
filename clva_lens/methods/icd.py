"""ICD, Instruction Contrastive Decoding (arXiv:2403.18715; p1k0pan/ICD at 2fa44c5).

The second input has the same picture and question under a disturbing instruction, which makes the
model hallucinate more: (1 + α)·l − α·l′, for tokens with l ≥ max l + ln β. LLaVA gets it as its
system message, in the place of the prompt's own; InstructBLIP's Q-Former reads it before its text,
and the language model's prompt stays.

**Departs from the release**: greedy decoding and beams work too (the release samples), and the
instruction never accumulates over prompts, as it does there. ``variant="paper"`` is l − α·l′, as
others quote the paper; its text was not at hand. α = 0 edits nothing at all. Exact under fused
kernels; twice the passes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel

from clva_lens.engine.session import Session
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import Kernel, Method, Variant, check_variant, register_method
from clva_lens.methods.contrast import ContrastRule, ContrastSession
from clva_lens.methods.target import Target
from clva_lens.models.family import Inputs, find_family

CONFUSED = (
    "You are a confused objects detector to provide a fuzzy overview or impression of the image."
)


@register_method
@dataclass(frozen=True, kw_only=True)
class ICD(Method):
    """Instruction Contrastive Decoding; it needs the model's processor.

    Args:
        instruction: the disturbing text; the default is one of the release's five.
        alpha: α, the strength of the contrast, >= 0; 0 edits nothing.
        beta: β of the cut-off, in [0, 1].
        variant: (1 + α)·l − α·l′ as "released", or l − α·l′ as the "paper".

    Raises:
        ParameterError: if a parameter is out of range, or the instruction is empty.

    >>> cl.generate(model, prompt, cl.ICD()).texts
    ['no']
    """

    name: ClassVar[str] = "icd"
    paper: ClassVar[str] = "Instruction Contrastive Decoding, arXiv:2403.18715"
    kernel: ClassVar[Kernel] = "none"
    forwards: ClassVar[float | int] = 2
    sites: ClassVar[tuple[str, ...]] = ()
    extended: ClassVar[tuple[str, ...]] = ("greedy", "beam")
    zero: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}
    instruction: str = CONFUSED
    alpha: float | int = 1.0
    beta: float | int = 0.1
    variant: Variant = "released"

    def __post_init__(self) -> None:
        """Check everything."""
        check_variant(self.variant)
        self._rule()
        if not self.instruction.strip():
            raise ParameterError(
                "instruction is empty, so there would be nothing to contrast with. Pass a text."
            )

    def _rule(self) -> ContrastRule:
        form = "difference" if self.variant == "released" else "subtraction"
        return ContrastRule(strength=self.alpha, beta=self.beta, form=form)

    def sessions(self, target: Target) -> list[Session]:
        """Return the contrast with the disturbed prompt; nothing for α = 0.

        Raises:
            InterventionError: if the model came without its processor.
        """
        rule = self._rule()
        if rule.is_identity:
            return []
        model, processor = target.model, target.processor
        if processor is None:
            raise InterventionError(
                "ICD has to tokenize its instruction, but a bare transformers model has no "
                "processor. Pass the model that cl.load((hf_model, processor)) returns."
            )
        return [ContrastSession(model, _Disturbed(model, processor, self.instruction), rule)]


@dataclass(frozen=True)
class _Disturbed:
    model: PreTrainedModel
    processor: Any
    instruction: str

    def __call__(self, inputs: Inputs) -> Inputs:
        family = find_family(self.model)
        return family.disturb(self.model, self.processor, inputs, self.instruction)
