"""How POPE chooses its questions: from pictures with their objects to a set of yes/no questions.

The algorithm is that of POPE's ``main.py`` and ``utils.py`` (github.com/AoiDragon/POPE, commit
08d957b9; arXiv:2305.10355, Sec. 3). From the objects of the 500 COCO pictures it gives the official
popular set exactly; the official adversarial set but for ties, as the order of objects that were
not asked about is not published.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from clva_lens.benchmarks.base import require_known
from clva_lens.benchmarks.pope_sets import SPLITS
from clva_lens.ground.errors import BenchmarkError

TEMPLATE = "Is there {article} {object} in the image?"


def choose_pictures(
    pictures: Sequence[dict[str, Any]], count: int, *, per_picture: int = 3, seed: int = 0
) -> list[dict[str, Any]]:
    """Return ``count`` random pictures with at least ``per_picture`` objects.

    **Departs from the original:** the seed; POPE drew its 500 without one.

    Raises:
        BenchmarkError: if there are fewer of them.
    """
    enough = [picture for picture in pictures if len(picture["objects"]) >= per_picture]
    if len(enough) < count:
        raise BenchmarkError(
            f"{len(enough)} of the {len(pictures)} pictures have {per_picture} or more objects, "
            f"but count={count}. Pass more pictures or a smaller count."
        )
    return random.Random(seed).sample(enough, count)


def pope_set(
    pictures: Sequence[dict[str, Any]], split: str, *, per_picture: int = 3, seed: int = 0
) -> list[dict[str, Any]]:
    """Return a POPE set: rows of question_id, image, text and label, yes and no by turns.

    ``pictures`` are ``{"image": name, "objects": [...]}``; the order of pictures and objects
    matters. Of each, the first ``per_picture`` objects are asked about, and after each of them an
    object that is neither in the picture nor was asked about there:

    - ``random``: any;
    - ``popular``: the one that is in most of the pictures;
    - ``adversarial``: the one most often together with the object just asked about.

    Ties go to the object met first. Where no such object is left, a random one is asked about.

    **Departs from the original:** ``seed`` makes random choices repeatable (POPE has none, and one
    generator for the three splits); "an" is put before vowels without turning "image" into
    "imange".

    Raises:
        ParameterError: if there is no such split.
        BenchmarkError: if a picture has too few objects, or has all objects there are.
    """
    require_known("split", split, SPLITS)
    frequency = Counter(name for picture in pictures for name in picture["objects"])
    together = _company(pictures)
    names, rng = list(frequency), random.Random(seed)
    popular = _ranked(frequency)
    rows: list[dict[str, Any]] = []
    for picture in pictures:
        present = picture["objects"]
        if len(present) < per_picture or len(set(names) - set(present)) < per_picture:
            raise BenchmarkError(
                f"{picture['image']} has {len(present)} of {len(names)} objects, so it has not "
                f"{per_picture} to ask about in each way. Leave it out with choose_pictures()."
            )
        taken = set(present)
        for asked in present[:per_picture]:
            ranked = {
                "random": [],
                "popular": popular,
                "adversarial": _ranked(together[asked]),
            }[split]
            absent = next((name for name in ranked if name not in taken), None)
            while absent is None or absent in taken:
                absent = rng.choice(names)
            taken.add(absent)
            for name, label in ((asked, "yes"), (absent, "no")):
                rows.append(
                    {
                        "question_id": len(rows) + 1,
                        "image": picture["image"],
                        "text": _ask(name),
                        "label": label,
                    }
                )
    return rows


def _company(pictures: Sequence[dict[str, Any]]) -> dict[str, Counter[str]]:
    """Return, for each object, in how many pictures each other object is with it."""
    together: dict[str, Counter[str]] = {}
    for picture in pictures:
        for name in picture["objects"]:
            others = together.setdefault(name, Counter())
            others.update(other for other in picture["objects"] if other != name)
    return together


def _ranked(counts: Counter[str]) -> list[str]:
    """Return the objects by falling count, ties in the order in which they were met."""
    return sorted(counts, key=lambda name: -counts[name])


def _ask(name: str) -> str:
    return TEMPLATE.format(article="an" if name[0] in "aeiou" else "a", object=name)
