"""The yes−no margin: how much likelier a model finds a yes than a no, whatever it then says."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from clva_lens.benchmarks.readouts import LEGACY, TEXT
from clva_lens.ground.errors import ParameterError
from clva_lens.models.answer_tokens import AnswerTokens, answer_tokens

MARGIN = "logit(yes) − logit(no)"


def margins(
    logits: Float[Tensor, "batch vocabulary"], yes: list[int], no: list[int]
) -> Float[Tensor, " batch"]:
    """Return logit(yes) − logit(no) of each row, in nats: the larger of each word's spellings."""
    return logits[:, yes].amax(dim=1) - logits[:, no].amax(dim=1)


def yes_margins(
    scores: Float[Tensor, "batch vocabulary"], tokens: AnswerTokens
) -> list[float | None]:
    """Return logit(yes) − logit(no) of each row, in nats; None without a token for each."""
    if not tokens.yes or not tokens.no:
        return [None] * len(scores)
    return margins(scores, *tokens).tolist()


def readout_tokens(tokenizer: Any, readout: str, before: str) -> AnswerTokens:
    """Return the tokens that a benchmark's readout compares; see ``benchmarks.readouts``.

    Raises:
        ParameterError: if it reads tokens, and the tokenizer has none of them.
    """
    if readout == LEGACY:
        ids = [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
        known = [[] if one in (None, tokenizer.unk_token_id) else [one] for one in ids]
        tokens = AnswerTokens(*known)
    else:
        tokens = answer_tokens(tokenizer, before)
    if readout != TEXT and not (tokens.yes and tokens.no):
        raise ParameterError(
            f"the tokenizer has no single token for yes or for no, so readout='{readout}' has "
            "nothing to read. Pass readout='text'."
        )
    return tokens
