"""Words of an answer, and the tokens that each is made of."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# A word, with what joins its parts; in scripts without spaces, one sign.
_ALONE = r"[\u3040-\u30ff\u3400-\u9fff]"
_WORD = re.compile(rf"{_ALONE}|(?:(?!{_ALONE})\w)+(?:['’-]\w+)*")


class Word(NamedTuple):
    """A word of an answer, and the places of its tokens among the answer's."""

    text: str
    tokens: tuple[int, ...]


def words_of(tokenizer: Any, ids: Sequence[int]) -> list[Word]:
    """Return the words of an answer with their tokens; marks between words belong to none.

    A token belongs to each word that has characters of it, or bytes of one: tokens are lined up
    with the text by what the tokens up to each of them decode to.
    """
    text = _decoded(tokenizer, ids)
    spans = []
    known = 0
    for count in range(1, len(ids) + 1):
        # Until all bytes of a sign are there, they decode to a replacement.
        made = _decoded(tokenizer, ids[:count])
        whole = made.rstrip("\N{REPLACEMENT CHARACTER}")
        start, known = known, max(known, min(len(whole), len(text)))
        spans.append((start, known + (len(whole) < len(made))))
    found = []
    for match in _WORD.finditer(text):
        first, last = match.span()
        own = [at for at, (start, stop) in enumerate(spans) if start < last and stop > first]
        found.append(Word(match.group(), tuple(own)))
    return found


def by_word(
    maps: Float[Tensor, "layer head token visual"], words: Sequence[Word]
) -> Float[Tensor, "layer head word visual"]:
    """Return the mean map of each word's tokens."""
    if not words:
        return maps[:, :, :0]
    return torch.stack([maps[:, :, list(word.tokens)].mean(dim=2) for word in words], dim=2)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
