"""The tokens with which a model says yes or no."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from clva_lens.models.family import ModelFamily

NEUTRAL = ":"
"""What a prompt may end with, where no template says it."""
YES = ("yes", "Yes", "YES", " yes", " Yes")
NO = ("no", "No", "NO", " no", " No")
_QUESTION, _END = "Is there a cup in the image?", 16


class AnswerTokens(NamedTuple):
    """The ids of the tokens that say yes, and of those that say no."""

    yes: list[int]
    no: list[int]


def answer_tokens(tokenizer: Any, before: str = NEUTRAL) -> AnswerTokens:
    """Return the tokens that are a spelling of yes or no: alone, and after the end of a prompt.

    ``before`` is that end. A sentencepiece tokenizer writes a word after it with and without the
    mark of a space (LLaVA-1.5: " Yes" is 3869, "Yes" 8241), but alone with it only.
    """
    yes, no = (_single_tokens(tokenizer, words, before) for words in (YES, NO))
    return AnswerTokens(sorted(yes - no), sorted(no - yes))


def prompt_end(family: ModelFamily, processor: Any) -> str:
    """Return the last characters of a family's prompts, after which an answer begins."""
    return family.ask(processor, _QUESTION, None)[-_END:]


def _single_tokens(tokenizer: Any, words: Sequence[str], before: str) -> set[int]:
    start = tokenizer(before, add_special_tokens=False).input_ids
    found = set()
    for word in words:
        alone = tokenizer(word, add_special_tokens=False).input_ids
        after = tokenizer(before + word, add_special_tokens=False).input_ids
        found |= set(alone) if len(alone) == 1 else set()
        found |= {after[-1]} if after[:-1] == start else set()
    return found - {tokenizer.unk_token_id}
