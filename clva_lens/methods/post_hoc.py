"""Post-hoc debiasing of yes/no answers (arXiv:2403.05262; yfzhang114/LLaVA-Align at dfbecfa).

What a model would answer without any picture is its prior, and is divided by. With p(yes) and p(no)
the softmax of logits over a temperature T at the first answer position, the likeliest spelling of
each word, and c those of the prompt without its image tokens ("nothing"), with one ``<unk>`` in
their place ("unknown"), or the sum of the two ("both"),

    c̄ = c / (c(yes) + c(no)) + ε,    p′ ∝ p / c̄,    ε = 1e-4,

is what the two words are compared by. Here the logits of all spellings are moved by

    −T · ln(c̄ / (½ + ε)),

so that their difference is T·ln(p′(yes) / p′(no)), and a prior of one half changes nothing. The
answer is then decoded, and its margin recorded, as under any method: readout="first token" reads
from it what the release does. It is contextual calibration (arXiv:2102.09690) of each question.

T = 0.2, at which the release samples, decides how much of a prior is taken away: ε bounds it to
T·ln((1 + ε) / ε), 1.84 nats of logits there and 9.21 at T = 1.

**Departs from the release**: it calibrates answers that were written to a file, and looks for the
two words among the ten likeliest tokens only. Its prompt without image has no line break in its
place. Its other rule, p − c, and one prior for all questions are not here. Later tokens are the
model's own; a second pass for each, or two, of a prompt without image.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from clva_lens.engine.session import Session
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import Kernel, Method, register_method
from clva_lens.methods.contrast import ContrastSession, Logits
from clva_lens.methods.target import Target
from clva_lens.methods.vdd import Without, without_picture
from clva_lens.models.answer_tokens import AnswerTokens, answer_tokens, prompt_end
from clva_lens.models.family import find_family
from clva_lens.models.norms import wide

FLOOR = 1e-4


@register_method
@dataclass(frozen=True, kw_only=True)
class PostHocDebias(Method):
    """Divide p(yes) and p(no) by what they are without a picture; it needs the model's processor.

    Args:
        without: what stands in the place of the picture: "nothing", one "unknown" token, or "both",
            whose probabilities are added.
        temperature: T, > 0, of the probabilities.

    Raises:
        ParameterError: if a parameter is out of range.

    >>> answers = cl.generate(model, prompt, cl.PostHocDebias())
    >>> answers.texts
    ['no']
    """

    name: ClassVar[str] = "post-hoc-debias"
    paper: ClassVar[str] = "post-hoc debiasing, arXiv:2403.05262"
    kernel: ClassVar[Kernel] = "none"
    forwards: ClassVar[float | int] = 2
    sites: ClassVar[tuple[str, ...]] = ()
    extended: ClassVar[tuple[str, ...]] = ("beam", "sampling")
    without: Without = "nothing"
    temperature: float | int = 0.2

    def __post_init__(self) -> None:
        """Check the range."""
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ParameterError(
                f"temperature must be a finite number > 0, but is {self.temperature}. Pass "
                "temperature=0.2."
            )

    def sessions(self, target: Target) -> list[Session]:
        """Return what reads the prior and moves the two words.

        Raises:
            InterventionError: if there is no tokenizer, or it has no single token for yes or no, or
                the language model is an encoder-decoder.
        """
        tokens = _words(target)
        seconds = without_picture(target, self.without)
        return [ContrastSession(target.model, seconds, _Divided(tokens, self.temperature))]


@dataclass(frozen=True)
class _Divided:
    """The rule of one token: the first, in which yes and no are divided by their prior."""

    tokens: AnswerTokens
    temperature: float | int

    def uncut(self, own: Logits, *others: Logits, token: int = 1) -> Logits:
        """Return l, less T·ln(c̄ / (½ + ε)) where it says yes or no."""
        if token > 1:
            return own
        own = wide(own)
        chances = [(wide(one) / self.temperature).log_softmax(dim=-1) for one in others]
        each = torch.stack(
            [
                torch.stack([one[:, ids].amax(dim=1) for one in chances]).logsumexp(dim=0)
                for ids in self.tokens
            ]
        )
        prior = each.softmax(dim=0) + FLOOR
        moved = own.clone()
        for ids, chance in zip(self.tokens, prior, strict=True):
            less = self.temperature * (chance / (0.5 + FLOOR)).log()
            moved[:, ids] -= less[:, None]
        return moved

    def cut(self, own: Logits, contrast: Logits) -> Logits:
        """Return them as they are."""
        return contrast


def _words(target: Target) -> AnswerTokens:
    """Return the tokens that say yes or no where an answer begins.

    Raises:
        InterventionError: if there are none.
    """
    processor: Any = target.processor
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise InterventionError(
            "post-hoc debiasing moves the tokens that say yes or no, but a bare transformers "
            "model has no processor. Pass the model that cl.load((hf_model, processor)) returns."
        )
    tokens = answer_tokens(tokenizer, prompt_end(find_family(target.model), processor))
    if not (tokens.yes and tokens.no):
        raise InterventionError(
            "the tokenizer has no single token for yes or for no, so there is nothing to debias. "
            "Use a model with such tokens."
        )
    return tokens
