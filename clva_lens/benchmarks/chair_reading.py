"""CHAIR's way from a caption to the objects that it mentions (arXiv:1809.02156)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from clva_lens.benchmarks.chair_lemmas import LEMMATISERS, Lemmatise, installed_nltk
from clva_lens.benchmarks.chair_vocabulary import Vocabulary


class Objects(NamedTuple):
    """The objects that a caption mentions.

    Attributes:
        words: the words that name objects, as they are counted, in order and with repeats.
        nodes: the node word of each.
        length: number of words and marks in the caption, a merged pair as one.
    """

    words: list[str]
    nodes: list[str]
    length: int


@dataclass(frozen=True)
class Reader:
    """Reads captions with a vocabulary and a lemmatiser (a name in ``LEMMATISERS``).

    ``nltk`` is the version of NLTK whose rules cut the words, one of ``chair_tokens.NLTKS``; the
    lemmatiser "nltk" is the NLTK that is installed.
    """

    vocabulary: Vocabulary
    lemmatiser: str
    nltk: str = "3.10"

    @property
    def name(self) -> str:
        """What decides the objects: results under different names are not comparable."""
        cut = f"NLTK {installed_nltk() if self.lemmatiser == 'nltk' else self.nltk}"
        return f"lemmatiser {self.lemmatiser}, synonyms {self.vocabulary.name}, {cut}"

    @cached_property
    def _lemmatise(self) -> Lemmatise:
        make: Callable[[Vocabulary, str], Lemmatise] = LEMMATISERS.get(self.lemmatiser)
        return make(self.vocabulary, self.nltk)

    def read(self, caption: str) -> Objects:
        """Return the objects that a caption mentions.

        Lower case, lemmas, pairs merged from left to right, no "seat" beside a "toilet", then the
        words of the vocabulary (utils/chair.py of github.com/LisaAnne/Hallucination, commit
        6e4d33c4). Left out, as a fault: in the port to Python 3 an empty lemma counts as an object.
        """
        words = self._merge(self._lemmatise(caption.lower()))
        length = len(words)
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        nodes = self.vocabulary.nodes
        found = [word for word in words if word in nodes]
        return Objects(found, [nodes[word] for word in found], length)

    def _merge(self, words: list[str]) -> list[str]:
        pairs = self.vocabulary.pairs
        merged: list[str] = []
        place = 0
        while place < len(words):
            pair = pairs.get(" ".join(words[place : place + 2]))
            merged.append(words[place] if pair is None else pair)
            place += 1 if pair is None else 2
        return merged
