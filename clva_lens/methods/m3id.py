"""M3ID, multi-modal mutual-information decoding (arXiv:2403.14003). Its authors have no code.

The longer an answer, the more a model goes by what it has written, and the less by the picture. So
the logits l of the t-th new token (t = 1 is the first) are moved away from those of the same prompt
without its image tokens, l′, ever further:

    l + w_t·(l − l′),   w_t = e^{λt} − 1.

``variant="paper"`` does so only where the model is unsure, max softmax l < a, and cuts nothing off.
That gate is remembered, and is what mitigv 0.1.7 has; the paper's text was not at hand.
``variant="avisc"`` is what AvisC's comparison ran (sangminwoo/AvisC at 772eba4): no gate, and
tokens with l < max l + ln β become impossible.

w_1 is 0.02 at λ = 0.02: a one-word answer is the model's own, but for near ties, and with the gate
always where it is sure. w is 1 at t = 35 and 28 000 at t = 512, where a caption is all l − l′. λ =
0 edits nothing at all. **Departs from AvisC**, which samples: greedy decoding and beams work too.
In a Q-Former model the image tokens are its queries' places, and the Q-Former is not asked again.
Exact under fused kernels; a second pass of a prompt without image for each token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clva_lens.engine.session import Session
from clva_lens.ground.errors import ParameterError
from clva_lens.methods.base import Kernel, Method, register_method
from clva_lens.methods.branch import Logits
from clva_lens.methods.contrast import ContrastRule, ContrastSession, text_only
from clva_lens.methods.target import Target
from clva_lens.models.family import find_family
from clva_lens.models.norms import wide


@register_method
@dataclass(frozen=True, kw_only=True)
class M3ID(Method):
    """Logits moved away from those without the picture, further at each token.

    Args:
        decay: λ, how fast the picture is forgotten, a token; finite and >= 0; 0 edits nothing.
        threshold: a, the likeliest token's probability from which on nothing is moved, in [0, 1];
            for ``variant="paper"``.
        beta: β of the cut-off, in [0, 1]; for ``variant="avisc"``.
        variant: with the gate ("paper"), or with a cut-off ("avisc").

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.M3ID(variant="avisc")).texts
    ['no']
    """

    name: ClassVar[str] = "m3id"
    paper: ClassVar[str] = "M3ID, arXiv:2403.14003"
    kernel: ClassVar[Kernel] = "none"
    forwards: ClassVar[float | int] = 2
    sites: ClassVar[tuple[str, ...]] = ()
    extended: ClassVar[tuple[str, ...]] = ("greedy", "beam")
    zero: ClassVar[Mapping[str, Any] | None] = {"decay": 0.0}
    decay: float | int = 0.02
    threshold: float | int = 0.3
    beta: float | int = 0.1
    variant: Literal["paper", "avisc"] = "paper"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (math.isfinite(self.decay) and self.decay >= 0):
            raise ParameterError(
                f"decay must be a finite number >= 0, but is {self.decay}. Pass decay=0.02."
            )
        if not 0 <= self.threshold <= 1:
            raise ParameterError(
                f"threshold must be in [0, 1], but is {self.threshold}. Pass threshold=0.3."
            )
        ContrastRule(strength=1.0, beta=self.beta)

    def sessions(self, target: Target) -> list[Session]:
        """Return the contrast with the prompt without image; nothing for λ = 0.

        Raises:
            InterventionError: if the language model is an encoder-decoder.
        """
        if self.decay == 0:
            return []
        without = text_only(find_family(target.model).image_token_id(target.model))
        return [ContrastSession(target.model, without, _Growing(self))]


@dataclass(frozen=True)
class _Growing:
    """The rule of one token: a contrast whose strength grows."""

    method: M3ID

    def uncut(self, own: Logits, *others: Logits, token: int = 1) -> Logits:
        """Return l + w·(l − l′), where it is made."""
        own, other = wide(own), wide(others[0])
        moved = own + math.expm1(self.method.decay * token) * (own - other)
        if self.method.variant == "avisc":
            return moved
        unsure = own.softmax(dim=-1).amax(dim=-1, keepdim=True) < self.method.threshold
        return moved.where(unsure, own)

    def cut(self, own: Logits, contrast: Logits) -> Logits:
        """Return the contrast with its cut-off, if it has one."""
        if self.method.variant == "paper":
            return contrast
        return ContrastRule(strength=1.0, beta=self.method.beta).cut(own, contrast)
