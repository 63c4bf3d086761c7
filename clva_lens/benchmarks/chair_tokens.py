"""Words of a caption, as the Penn Treebank rules of NLTK's ``word_tokenize`` cut it.

Our own rules, for captions in lower case. Sentences end at every final full stop, so abbreviations
("u.s.") lose theirs, which NLTK's trained sentence splitter would know to keep.
"""

import re
from functools import lru_cache

# What stands alone: dots, dashes, a comma or colon unless a digit follows, marks, brackets, quotes,
# and the full stop that ends what stands between spaces. All else belongs to a word.
_ALONE = r"""\.{2,}|--|''|[:,](?!\d)|[][(){}<>;@#$%&?!*"`“”„«»‘’]|\.(?=[])}>"'»”’]*$)"""
_PIECE = re.compile(rf"(?:{_ALONE})|(?:(?!{_ALONE}).)+")
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|m|d|ll|re|ve)?)")
_TWO = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "wanna": ("wan", "na")}


def tokenise(text: str) -> list[str]:
    """Return the tokens of a text in lower case, punctuation among them.

    >>> tokenise("a man's dogs aren't here, on t-shirts.")
    ['a', 'man', "'s", 'dogs', 'are', "n't", 'here', ',', 'on', 't-shirts', '.']
    """
    return [token for piece in text.split() for token in _tokens(piece)]


@lru_cache(maxsize=1 << 17)
def _tokens(piece: str) -> tuple[str, ...]:
    """Return the tokens of what stands between two spaces."""
    if piece.isalpha() and piece not in _TWO:
        return (piece,)
    found: list[str] = []
    for word in _PIECE.findall(piece):
        clitic = _CLITIC.fullmatch(word)
        found += _TWO.get(word, clitic.groups() if clitic and word != "''" else (word,))
    return tuple(found)
