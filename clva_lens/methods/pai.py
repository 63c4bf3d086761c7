"""PAI, pay attention to image: arXiv:2407.21771, LALBJ/PAI at 9bbd8bd.

Each row that a token is predicted from looks at the image with its scores raised by their own
size before the softmax: l + α·|l| at image keys, in all heads of all layers but the first two.

PAI's other half is guidance away from what the model would say without the image. With lp the log
softmax of the edited model's logits, and lp′ that of the same prompt without its image tokens, read
with a cache of its own and without the attention edit,

    γ·(lp − lp′) + lp′   for tokens with lp ≥ max lp + ln β.

The release's example for POPE has γ = 1.1, its scripts' default is 2, and β = 0.1 is written into
its code. Here the default is 1, which is the attention part alone: no second input, no cut-off, and
the logits stay as they are. Which γ the paper's tables have was not checked.

**As released**, where it differs from the paper: with guidance on, the prompt's last row is left
unedited, since a flag on the modules is cleared only after the first step. So the first token, and
a one-word answer, is that of guidance alone. That is the default; ``prompt_row=True`` edits the row
as the paper's formula does.

**Departs from the paper:** in a Q-Former, where nobody has tried it and rows have no last one, all
queries are edited.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.errors import ParameterError
from clva_lens.methods.base import (
    BiasSession,
    Kernel,
    Method,
    check_layers,
    edited_rows,
    register_method,
)
from clva_lens.methods.contrast import ContrastRule, ContrastSession, text_only
from clva_lens.methods.scores import score_bias, single_row_score_bias, span_keys
from clva_lens.methods.target import Target
from clva_lens.models.family import find_family


@register_method
@dataclass(frozen=True, kw_only=True)
class PAI(Method):
    """Raise scores of image keys by ``α·|l|`` in the last row of the prompt and generated rows.

    Args:
        alpha: α, by default the release's 0.2; 0 changes nothing, below 0 lowers the scores.
        guidance: γ of the guidance by a prompt without image, finite and >= 0; 1 is none. Any other
            costs a second pass for each token, though of a prompt without image.
        beta: β of the guidance's cut-off, in [0, 1]; 0 cuts nothing off.
        layers: the edited layers, 0-based; None is all from layer 2 on.
        prompt_row: whether the prompt's last row is edited too. None: as released, yes without
            guidance and no with it.
        site: where; the language model's "decoder" as in the paper, or a "qformer".

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.PAI(alpha=0.2, guidance=1.1)).texts
    ['no']
    """

    name: ClassVar[str] = "pai"
    paper: ClassVar[str] = "PAI, arXiv:2407.21771"
    kernel: ClassVar[Kernel] = "fused + rows"
    zero: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}
    alpha: float | int = 0.2
    guidance: float | int = 1.0
    beta: float | int = 0.1
    layers: Sequence[int] | None = None
    prompt_row: bool | None = None
    site: str = "decoder"

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if not math.isfinite(self.alpha):
            raise ParameterError(f"alpha must be finite, but is {self.alpha}. Pass alpha=0.2.")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ParameterError(
                f"guidance must be a finite number >= 0, but is {self.guidance}. Pass "
                "guidance=1.1, or 1.0 for the attention part alone."
            )
        self._rule()

    def _rule(self) -> ContrastRule:
        return ContrastRule(strength=self.guidance, beta=self.beta, form="guidance")

    def sessions(self, target: Target) -> list[Session]:
        """Return one session for the layers of this model, if α is not 0, and one for any guidance.

        Raises:
            InterventionError: if there is guidance, and the language model is an encoder-decoder.
        """
        shape = target.at(self.site)
        layers: Sequence[int] | None = self.layers
        if layers is None:
            layers = [layer for layer in shape.layers if layer >= 2]
        chosen = check_layers("layers", layers, shape)
        sessions: list[Session] = []
        if self.alpha != 0:
            bias = BiasSession(shape.site, chosen, self._bias, row=self._row, leaves_prefix=True)
            sessions.append(bias)
        if not self._rule().is_identity:
            without = text_only(find_family(target.model).image_token_id(target.model))
            sessions.append(ContrastSession(target.model, without, self._rule()))
        return sessions

    def _bias(self, call: AttentionCall) -> Float[Tensor, "batch head query key"] | None:
        """Return α·|l| at the image keys of the rows that predict a token."""
        if self.alpha == 0:
            return None
        rows = edited_rows(call, "last" if call.step.ordered else "text")
        edited = self._rule().is_identity if self.prompt_row is None else self.prompt_row
        if not edited:
            old = call.query.shape[2] - call.new_rows
            position = torch.arange(call.query.shape[2], device=rows.device)
            rows = rows & (position >= old)
        return score_bias(call, rows, self._change(call))

    def _row(self, call: AttentionCall) -> Float[Tensor, "batch head 1 key"] | None:
        """Return the same for a pass's only row, a generated one."""
        return None if self.alpha == 0 else single_row_score_bias(call, self._change(call))

    def _change(self, call: AttentionCall) -> Callable[[Tensor], Tensor]:
        image = span_keys(call, call.step.spans.image)[:, None, None]
        return lambda scores: (self.alpha * scores.abs()).where(image, 0.0)
