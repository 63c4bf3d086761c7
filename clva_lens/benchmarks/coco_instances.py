"""Where COCO's objects lie: the instances of an image by name, for questions about one object."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from clva_lens.benchmarks.base import Sample
from clva_lens.benchmarks.chair_truth import image_id
from clva_lens.benchmarks.files import read_object
from clva_lens.ground.errors import BenchmarkError

# POPE's question, also with its typo "imange" and with a protocol's request after it.
_ASKED = re.compile(r"\bis there an? (.+?) in the iman?ge\b", re.IGNORECASE)


def asked_name(question: str) -> str | None:
    """Return the object that a question of POPE asks for, None if it is no such question.

    >>> asked_name("Is there a cell phone in the image?"), asked_name("What is this?")
    ('cell phone', None)
    """
    found = _ASKED.search(question)
    return None if found is None else found.group(1).lower()


@dataclass(frozen=True, eq=False)
class Instances:
    """COCO's instances: sizes (height, width) by image, and annotations by (image, name)."""

    sizes: Mapping[int, tuple[int, int]]
    annotations: Mapping[tuple[int, str], Sequence[Mapping[str, Any]]]

    def asked(self, sample: Sample) -> tuple[tuple[int, int], Sequence[Mapping[str, Any]]] | None:
        """Return the picture's size and the annotations of the object that a question asks for.

        None if the question asks for no object, the picture is not in the file, or no instance of
        the object is: as for objects that only the reference captions name.
        """
        name = asked_name(sample.question)
        try:
            number = image_id(sample.group)
        except BenchmarkError:
            return None
        found = self.annotations.get((number, name or ""))
        return None if found is None else (self.sizes[number], found)


@lru_cache(maxsize=1)
def read_instances(path: str | Path) -> Instances:
    """Return the instances in a file such as COCO's instances_val2014.json.

    Raises:
        BenchmarkError: if the file is missing or of another kind.
    """
    whole = read_object(path)
    try:
        names = {one["id"]: one["name"] for one in whole["categories"]}
        sizes = {one["id"]: (one["height"], one["width"]) for one in whole["images"]}
        found: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
        for one in whole["annotations"]:
            found.setdefault((one["image_id"], names[one["category_id"]]), []).append(one)
    except (KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{path} has no instances of COCO: {error!r}. Pass an instances_*.json."
        ) from error
    return Instances(sizes, found)
