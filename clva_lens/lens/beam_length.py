"""By which length a finished beam's score is divided: what was generated, or the prompt with it.

transformers 5 (and 4.37) divides the sum of log-probabilities by the generated length. 4.29 and
4.31, on which OPERA, DeCo, IMCCD, VCD and others were released, divide it by the length of the
whole sequence, in which LLaVA's picture is one token. The longer a prompt, the less an answer's own
length matters then, and the shorter are the answers.

**Departs from 4.29 and 4.31**: the end token counts, as it does in transformers 5; there it does
not where it ends an answer, which is one token of the prompt and all of the answer.
"""

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from clva_lens.ground.errors import ParameterError
from clva_lens.models.prompt import Prompt

Length = Literal["generated", "with prompt"]
"""What the length of a beam is."""


class PromptCounted(float):
    """A length penalty of 1 for lengths that count the prompt: generated ** it is their sum.

    transformers and ``methods/beams.py`` raise generated lengths to the power of the penalty, and
    do nothing else with it, so both search by this rule.
    """

    prompt: int | Float[Tensor, "batch 1"]

    def __new__(cls, prompt: int | Float[Tensor, "batch 1"]) -> "PromptCounted":
        """Keep the prompts' lengths: a number, or one for each prompt of a batch."""
        made = super().__new__(cls, 1.0)
        made.prompt = prompt
        return made

    def __rpow__(self, generated: Any, mod: Any = None) -> Any:
        """Return a generated length with the prompt's."""
        return generated + self.prompt

    def __deepcopy__(self, _: Any) -> "PromptCounted":
        """Return itself: ``generate`` copies its settings."""
        return self


def counting_prompt(prompt: Prompt) -> PromptCounted:
    """Return the penalty that counts a prompt's tokens, without padding; a picture is one.

    Raises:
        ParameterError: if the picture comes through a Q-Former: the releases give such models
            embeddings, so that no token of the prompt was ever counted.
    """
    if next(iter(prompt.sites)) != "decoder":
        raise ParameterError(
            "length='with prompt' counts the tokens of a prompt, but releases give the embeddings "
            "of a Q-Former model's prompt to generate(), so they count none. Pass "
            "length='generated', which is their rule for this model."
        )
    image = prompt.spans.image
    begins = image & ~functional.pad(image, (1, -1))
    counts = prompt.spans.real.sum(dim=1) - image.sum(dim=1) + begins.sum(dim=1)
    return PromptCounted(int(counts) if len(counts) == 1 else counts[:, None].float())
