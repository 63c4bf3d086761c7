"""The yes−no margin: how much likelier a model finds a yes than a no, whatever it then says."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

MARGIN = "logit(yes) − logit(no)"
YES = ("yes", "Yes", "YES", " yes", " Yes")
NO = ("no", "No", "NO", " no", " No")


def margins(
    logits: Float[Tensor, "batch vocabulary"], yes: list[int], no: list[int]
) -> Float[Tensor, " batch"]:
    """Return logit(yes) − logit(no) of each row, in nats: the larger of each word's spellings."""
    return logits[:, yes].amax(dim=1) - logits[:, no].amax(dim=1)


def yes_margins(scores: Float[Tensor, "batch vocabulary"], tokenizer: Any) -> list[float | None]:
    """Return logit(yes) − logit(no) of each row, in nats, over the spellings that are one token."""
    yes, no = answer_tokens(tokenizer)
    if not yes or not no:
        return [None] * len(scores)
    return margins(scores, yes, no).tolist()


def answer_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of the spellings of yes, and of no, that are one token each."""
    yes, no = (sorted(_single_tokens(tokenizer, words)) for words in (YES, NO))
    return yes, no


def _single_tokens(tokenizer: Any, words: Sequence[str]) -> set[int]:
    encoded = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    return {ids[0] for ids in encoded if len(ids) == 1 and ids[0] != tokenizer.unk_token_id}
