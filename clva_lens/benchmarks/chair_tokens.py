"""Words of a caption, as the Penn Treebank rules of NLTK's ``word_tokenize`` cut it.

Our own rules, for captions in lower case. Sentences end at every final full stop, so abbreviations
("u.s.") lose theirs, which NLTK's trained sentence splitter would know to keep.
"""

import re
from functools import lru_cache

# What stands alone: dots, dashes, a comma or colon unless a digit follows, marks, brackets, quotes,
# and the full stop that ends what stands between spaces. All else belongs to a word.
_ALONE = r"""\.{2,}|--|''|[:,](?!\d)|[][(){}<>;@#$%&?!*"`“”„«»‘’]|\.(?=[])}>"'»”’]*$)"""
# Since 3.9.3 the figure dash, the dashes, the bar; since 3.10.1 an apostrophe that opens a word.
_NEWER = r"[\u2012-\u2015]|(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)"
_PIECES = {
    nltk: re.compile(rf"(?:{alone})|(?:(?!{alone}).)+")
    for nltk, alone in (("3.9", _ALONE), ("3.10", f"{_ALONE}|{_NEWER}"))
}
NLTKS = tuple(_PIECES)
"""Versions of NLTK that cut captions differently: up to 3.9.2, and 3.10 (as 3.10.4)."""
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|m|d|ll|re|ve)?)")
_TWO = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "wanna": ("wan", "na")}


def tokenise(text: str, nltk: str = "3.10") -> list[str]:
    """Return the tokens of a text in lower case, punctuation among them.

    ``nltk`` is the version whose rules are followed, one of NLTKS.

    >>> tokenise("a man's dogs aren't here, on t-shirts.")
    ['a', 'man', "'s", 'dogs', 'are', "n't", 'here', ',', 'on', 't-shirts', '.']
    >>> tokenise("a bus—red"), tokenise("a bus—red", nltk="3.9")
    (['a', 'bus', '—', 'red'], ['a', 'bus—red'])
    """
    return [token for piece in text.split() for token in _tokens(piece, nltk)]


@lru_cache(maxsize=1 << 17)
def _tokens(piece: str, nltk: str) -> tuple[str, ...]:
    """Return the tokens of what stands between two spaces."""
    if piece.isalpha() and piece not in _TWO:
        return (piece,)
    found: list[str] = []
    for word in _PIECES[nltk].findall(piece):
        clitic = _CLITIC.fullmatch(word)
        found += _TWO.get(word, clitic.groups() if clitic and word != "''" else (word,))
    return tuple(found)
