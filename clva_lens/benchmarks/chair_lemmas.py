"""From a caption to its lemmas, in the ways that CHAIR evaluators differ by.

======================  ==========================================================================
``builtin``             plurals of the vocabulary's own words become singular; nothing to install
``pattern``             as the original evaluator, see ``chair_singular``
``nltk``                WordNet with parts of speech, as OPERA's evaluator (needs nltk and its data)
======================  ==========================================================================

They differ in the objects that they find, and so in the ground truth too: scores under two of them
are not comparable.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from clva_lens.benchmarks.chair_singular import singular
from clva_lens.benchmarks.chair_tokens import tokenise
from clva_lens.benchmarks.chair_vocabulary import Vocabulary
from clva_lens.ground.errors import BenchmarkError
from clva_lens.ground.registry import Registry

Lemmatise = Callable[[str], list[str]]
LEMMATISERS = Registry[Callable[[Vocabulary, str], Lemmatise]]("lemmatiser")

# Words with plurals that no rule gives; an ending stands for every word that ends so.
_IRREGULAR = {
    "calf": ("calves",),
    "child": ("children",),
    "foot": ("feet",),
    "goose": ("geese",),
    "knife": ("knives",),
    "loaf": ("loaves",),
    "mouse": ("mice", "mouses"),
    "ox": ("oxen",),
    "person": ("people", "persons"),
    "thief": ("thieves",),
}
_REGULAR_MAN = ("doberman", "human")


def plurals(word: str) -> tuple[str, ...]:
    """Return the plurals of an English noun, all that are in use.

    >>> plurals("bus"), plurals("policewoman"), plurals("pony")
    (('buses', 'busses'), ('policewomen',), ('ponies',))
    """
    for ending, forms in _IRREGULAR.items():
        if word.endswith(ending) and (word == ending or len(ending) > 3):
            return tuple(word.removesuffix(ending) + form for form in forms)
    if word.endswith("man") and word not in _REGULAR_MAN:
        return (f"{word[:-2]}en",)
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return (f"{word[:-1]}ies",)
    if word.endswith("bus"):
        return (f"{word}es", f"{word}ses")
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return (f"{word}es",)
    return (f"{word}s", f"{word}es") if word.endswith("o") else (f"{word}s",)


def _builtin(vocabulary: Vocabulary, nltk: str) -> Lemmatise:
    """Map plurals of the vocabulary's words; a form that is itself in the vocabulary stays."""
    singles = {text.rpartition(" ")[2] for text in (*vocabulary.nodes, *vocabulary.pairs)}
    known = {form: word for word in sorted(singles) for form in plurals(word)}
    table = {form: word for form, word in known.items() if form not in vocabulary.nodes}
    return lambda caption: [table.get(token, token) for token in tokenise(caption, nltk)]


def _pattern(vocabulary: Vocabulary, nltk: str) -> Lemmatise:
    return lambda caption: [singular(token) for token in tokenise(caption, nltk)]


def _import_nltk() -> Any:
    try:
        return import_module("nltk")
    except ImportError as error:
        raise BenchmarkError(
            f"lemmatiser='nltk' needs NLTK ({error}). Run pip install nltk, or pass "
            "lemmatiser='builtin' or 'pattern'."
        ) from error


def installed_nltk() -> str:
    """Return the version of NLTK that is installed.

    Raises:
        BenchmarkError: if there is none.
    """
    return _import_nltk().__version__


def _nltk(vocabulary: Vocabulary, _: str) -> Lemmatise:
    """Tag every word and look up its lemma by part of speech (a noun where WordNet has none).

    OPERA's chair.py (github.com/shikiw/OPERA, commit 61426efe) does the same. So "seated" becomes a
    seat, hence a chair; the result depends on NLTK's version, which is the one that is installed.
    """
    nltk = _import_nltk()
    try:
        lemma = import_module("nltk.stem").WordNetLemmatizer().lemmatize
        nltk.pos_tag(nltk.word_tokenize("a dog."))
        lemma("dogs", pos="n")
    except LookupError as error:
        raise BenchmarkError(
            "lemmatiser='nltk' needs data of NLTK that are not here. Run python -m nltk.downloader "
            "punkt_tab averaged_perceptron_tagger_eng wordnet, or pass lemmatiser='builtin' or "
            "'pattern'."
        ) from error
    kinds = {"J": "a", "V": "v", "R": "r"}

    def lemmatise(caption: str) -> list[str]:
        tagged = nltk.pos_tag(nltk.word_tokenize(caption))
        return [lemma(word, pos=kinds.get(tag[:1], "n")) for word, tag in tagged]

    return lemmatise


LEMMATISERS.register("builtin", _builtin)
LEMMATISERS.register("pattern", _pattern)
LEMMATISERS.register("nltk", _nltk)
