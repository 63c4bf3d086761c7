"""The yes−no margin: how much likelier a model finds a yes than a no, whatever it then says."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from clva_lens.benchmarks.readouts import LEGACY, TEXT
from clva_lens.ground.errors import ParameterError

MARGIN = "logit(yes) − logit(no)"
NEUTRAL = ":"
"""What a prompt may end with, where no template says it."""
YES = ("yes", "Yes", "YES", " yes", " Yes")
NO = ("no", "No", "NO", " no", " No")


def margins(
    logits: Float[Tensor, "batch vocabulary"], yes: list[int], no: list[int]
) -> Float[Tensor, " batch"]:
    """Return logit(yes) − logit(no) of each row, in nats: the larger of each word's spellings."""
    return logits[:, yes].amax(dim=1) - logits[:, no].amax(dim=1)


class AnswerTokens(NamedTuple):
    """The ids of the tokens that say yes, and of those that say no."""

    yes: list[int]
    no: list[int]


def yes_margins(
    scores: Float[Tensor, "batch vocabulary"], tokens: AnswerTokens
) -> list[float | None]:
    """Return logit(yes) − logit(no) of each row, in nats; None without a token for each."""
    if not tokens.yes or not tokens.no:
        return [None] * len(scores)
    return margins(scores, *tokens).tolist()


def answer_tokens(tokenizer: Any, before: str = NEUTRAL) -> AnswerTokens:
    """Return the tokens that are a spelling of yes or no: alone, and after the end of a prompt.

    ``before`` is that end. A sentencepiece tokenizer writes a word after it with and without the
    mark of a space (LLaVA-1.5: " Yes" is 3869, "Yes" 8241), but alone with it only.
    """
    yes, no = (_single_tokens(tokenizer, words, before) for words in (YES, NO))
    return AnswerTokens(sorted(yes - no), sorted(no - yes))


def _single_tokens(tokenizer: Any, words: Sequence[str], before: str) -> set[int]:
    start = tokenizer(before, add_special_tokens=False).input_ids
    found = set()
    for word in words:
        alone = tokenizer(word, add_special_tokens=False).input_ids
        after = tokenizer(before + word, add_special_tokens=False).input_ids
        found |= set(alone) if len(alone) == 1 else set()
        found |= {after[-1]} if after[:-1] == start else set()
    return found - {tokenizer.unk_token_id}


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
