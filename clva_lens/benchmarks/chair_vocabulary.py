"""Which words name which object: synonym lists, and pairs of words that are read as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clva_lens.benchmarks.chair_words import CATEGORIES
from clva_lens.benchmarks.hub import download_file, is_hub
from clva_lens.ground.errors import BenchmarkError
from clva_lens.ground.files import sha256

# data/synonyms.txt at commit 6e4d33c4.
OFFICIAL_DIGEST = "b685537b36fe21b791c87151b96a991ceb582edff19f3da204dcc7a7905502f2"


@dataclass(frozen=True)
class Vocabulary:
    """The words that count as objects.

    Attributes:
        name: what results call it; lists of different names are not comparable.
        nodes: word to node word, the name under which all its synonyms count.
        pairs: two words in a row to what they are read as.
    """

    name: str
    nodes: Mapping[str, str]
    pairs: Mapping[str, str]


# Read as one word, so that a stop light is no light and home plate is no plate.
# The pairs of github.com/LisaAnne/Hallucination (utils/chair.py, commit 6e4d33c4), with
# "train track" of its port to Python 3 (github.com/Maxlinn/CHAIR-metric-standalone, 471eb753).
# An entry of theirs, "stove top oven", has three words and can never match.
_WHOLE = (
    "air plane, baseball bat, baseball glove, bow tie, cell phone, fire hydrant, hair drier, "
    "home plate, hot dog, laptop computer, mobile phone, motor bike, motor cycle, parking meter, "
    "potted plant, sports ball, stop light, stop sign, street light, suit case, teddy bear, "
    "tennis racket, traffic light, traffic signal, train track, wine glass"
)
_GROWN = "animal, bear, bird, cat, cow, cub, dog, elephant, giraffe, horse, sheep, zebra"


def official_pairs() -> dict[str, str]:
    """Return the pairs of words that CHAIR merges, with what they become.

    "baby bear" and "adult bear" are a bear and no person, a "passenger train" is a train, and
    "wine glas" is what ``pattern`` makes of a wine glass.
    """
    pairs = {pair: pair for pair in _WHOLE.split(", ")}
    grown = _GROWN.split(", ")
    pairs |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in grown}
    pairs |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
    return pairs | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}


def vocabulary(synonyms: str | Path) -> Vocabulary:
    """Return our own list ("builtin") or the one in a file (see ``synonym_file``).

    Under our own list every two-word synonym is read as one word; under a file the official pairs
    only, as the official evaluator does.

    Raises:
        BenchmarkError: if there is no such file, or it is no list of synonyms.
    """
    if str(synonyms) != "builtin":
        return read_synonyms(synonym_file(synonyms))
    nodes = _nodes(CATEGORIES.split("\n"), "the builtin list")
    return Vocabulary("builtin", nodes, {w: w for w in nodes if " " in w} | official_pairs())


def synonym_file(synonyms: str | Path) -> Path:
    """Return a list of synonyms on the disk; ``hf://datasets/OWNER/NAME@COMMIT/FILE`` is fetched.

    Raises:
        BenchmarkError: if the Hub does not have it.
    """
    return download_file(str(synonyms)) if is_hub(synonyms) else Path(synonyms)


def read_synonyms(path: str | Path) -> Vocabulary:
    """Return the vocabulary of a file: a line a category, its node word first, ", " between words.

    Read to the letter, as the official evaluator does: a word with a capital or a doubled space
    ("iPhone" and " motor bike" in the official file) can never be found in a caption.

    Raises:
        BenchmarkError: if there is no such file, or a word stands in two lines.
    """
    file = Path(path)
    if not file.is_file():
        raise BenchmarkError(
            f"there is no list of synonyms '{file}'. Get data/synonyms.txt from "
            "github.com/LisaAnne/Hallucination and pass its path, or pass synonyms='builtin'."
        )
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{file} is no text ({error}). Pass a list of synonyms.") from error
    digest = sha256(file)
    name = "official" if digest == OFFICIAL_DIGEST else f"sha256:{digest[:16]}"
    return Vocabulary(name, _nodes(lines, str(file)), official_pairs())


def _nodes(lines: Sequence[str], where: str) -> dict[str, str]:
    nodes: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        words = [word for word in line.strip().split(", ") if word]
        for word in words:
            if nodes.setdefault(word, words[0]) != words[0]:
                raise BenchmarkError(
                    f"line {number} of {where} has '{word}', which already means "
                    f"'{nodes[word]}'. Keep it in one line."
                )
    if not nodes:
        raise BenchmarkError(f"{where} has no words. Pass a list of synonyms.")
    return nodes
