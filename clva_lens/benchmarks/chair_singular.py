"""The singular of a noun as ``pattern.en.singularize`` gives it, its faults included.

The original CHAIR used pattern 2.6 (github.com/clips/pattern), so its faults are part of published
numbers: "bus" becomes "bu", "ties" "ty", "glass" "glas", "tennis" "tenni", and plurals in -ie
("doggies") stay as they are. This is our own statement of its rules; most of what it says of Latin
and Greek plurals is left out, as captions have none.
"""

import re
from functools import lru_cache

# A word stays as it is if one of these ends with it (in pattern the test is the wrong way round).
_SAME = (
    "aircraft antelope bison bread bream breeches britches butter carp cattle chassis cheese "
    "clippers cod corps debris electricity elk equipment flounder fruit furniture gallows garbage "
    "gravel happiness headquarters homework information innings ketchup knowledge love luggage "
    "mackerel mathematics mayonnaise measles meat mews moose mumps mustard news offspring pincers "
    "pliers proceedings progress research rice salmon sand scissors sea-bass series shears "
    "software species swine swiss trout tuna understanding water whiting wildebeest"
)
_SAME_WORDS = tuple(_SAME.split())
# Plurals that stay as they are.
_IES = (
    "alergies aunties beanies birdies bogies bombies bookies collies cookies cuties doggies eyries "
    "freebies goonies groupies hankies hippies hoagies hotties indies junkies laddies laramies "
    "lingeries meanies nighties oldies pixies quickies reveries rookies softies sorties stoolies "
    "sweeties techies toughies valkyries veggies weenies yuppies zombies"
)
_IES_ENDINGS = tuple(_IES.split())
# Endings with a singular of their own; the first that fits. "your" becomes "ymy".
_OWN = {
    "axes": "axe",
    "children": "child",
    "feet": "foot",
    "geese": "goose",
    "graffiti": "graffito",
    "leaves": "leaf",
    "loaves": "loaf",
    "men": "man",
    "mongooses": "mongoose",
    "monies": "money",
    "moves": "move",
    "opera": "opus",
    "our": "my",
    "oxen": "ox",
    "people": "person",
    "sexes": "sex",
    "teeth": "tooth",
}
# (ending, letters cut off, letters added): the first that fits.
_RULES = tuple(
    (re.compile(f"(?:{ending})$"), cut, added)
    for ending, cut, added in (
        (".ae", 1, ""),
        (".eaux", 1, ""),
        ("quizzes", 3, ""),
        ("matrices", 3, "x"),
        ("(?:ap|vert|ind)ices", 4, "ex"),
        ("(?:alias|status)es", 2, ""),
        ("[octpvir]i", 1, "us"),
        ("(?:cris|ax|test)es", 2, "is"),
        ("shoes", 1, ""),
        ("oes|buses", 2, ""),
        ("[ml]ice", 3, "ouse"),
        ("(?:x|ch|ss|sh)es", 2, ""),
        ("movies|.ombies", 1, ""),
        ("series", 0, ""),
        ("(?:[^aeiouy]|qu)ies", 3, "y"),
        ("[aeo]lves|[^d]eaves|arves", 3, "f"),
        ("erves", 1, ""),
        ("[nlw]ives", 3, "fe"),
        ("[lr]ves", 3, "f"),
        ("[aeo]ves|sives|tives|hives", 1, ""),
        ("[^f]ves", 3, "fe"),
        ("(?:naly|ba|diagno|parenthe|progno|synop|the)ses|.yses|.opses", 2, "is"),
        ("(?:h|d|r|o|n|b|cl|p)oses", 1, ""),
        (".oses", 2, "is"),
        ("[ti]a", 1, "um"),
        ("news", 0, ""),
        ("s", 1, ""),
    )
)


@lru_cache(maxsize=1 << 17)
def singular(word: str) -> str:
    """Return what pattern takes for the singular of a word in lower case.

    >>> [singular(word) for word in ("dogs", "knives", "men", "bus", "buses", "ties", "police")]
    ['dog', 'knife', 'man', 'bu', 'bus', 'ty', 'polouse']
    """
    if word.endswith("'"):
        return singular(word[:-1]) + "'s"
    if word.endswith(_IES_ENDINGS) or any(same.endswith(word) for same in _SAME_WORDS):
        return word
    for ending, own in _OWN.items():
        if word.endswith(ending):
            return word.removesuffix(ending) + own
    for ending, cut, added in _RULES:
        if ending.search(word):
            return word[: len(word) - cut] + added
    return word
