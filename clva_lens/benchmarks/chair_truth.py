"""What is there: the objects of COCO's images; and captions and image lists in files of others."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clva_lens.benchmarks.base import Answer
from clva_lens.benchmarks.chair_reading import Reader
from clva_lens.benchmarks.files import read_rows
from clva_lens.ground.errors import BenchmarkError

# A number, alone or at the end of a file name of COCO: COCO_val2014_000000310196.jpg. Twelve digits
# at most, so that a date with a time is no image.
_NUMBER = re.compile(r"(?:[A-Za-z]\w*_)?(\d{1,12})(?:\.(?:jpe?g|png))?", re.ASCII)


def image_id(value: object) -> int:
    """Return the COCO number of an image: from a number, its text, or a file name.

    >>> image_id(42), image_id("COCO_val2014_000000310196.jpg"), image_id("val/000000000139.jpg")
    (42, 310196, 139)

    Raises:
        BenchmarkError: if it is none of these.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    name = value.replace("\\", "/").rpartition("/")[2].strip() if isinstance(value, str) else ""
    found = _NUMBER.fullmatch(name)
    if found is None:
        raise BenchmarkError(
            f"{value!r} is no COCO image. Give its number, or a file name such as "
            "COCO_val2014_000000310196.jpg."
        )
    return int(found.group(1))


def read_captions(path: str | Path) -> list[Answer]:
    """Return the captions of a file as answers, whose ids are the numbers of the images.

    JSON lines or one JSON array, with ``image_id`` (a number or a file name) and the caption as
    ``caption`` (OPERA and what comes from it) or ``text`` (less-is-more).

    Raises:
        BenchmarkError: if the file is missing or broken, a row has no image or no caption, or an
            image occurs twice.
    """
    rows: dict[int, int] = {}
    answers = []
    for number, row in enumerate(read_rows(path, ("image_id",)), start=1):
        key = image_id(row["image_id"])
        text = row.get("caption", row.get("text"))
        if not isinstance(text, str):
            raise BenchmarkError(
                f"row {number} of {path} has no caption; it has {', '.join(row)}. Captions are "
                "looked for as caption or text."
            )
        if rows.setdefault(key, number) != number:
            raise BenchmarkError(
                f"rows {rows[key]} and {number} of {path} are both about image {key}. Keep one "
                "caption an image."
            )
        answers.append(Answer(str(key), text))
    return answers


def read_image_ids(path: str | Path) -> list[int]:
    """Return the images of a list: one a line or a JSON array, numbers or file names.

    A file of captions does too, so that the images of published captions can be taken.

    Raises:
        BenchmarkError: if there is no such file, it has no images, or one twice or no image.
    """
    file = Path(path)
    if not file.is_file():
        raise BenchmarkError(f"there is no list of images '{file}'. Check the path.")
    text = file.read_text(encoding="utf-8-sig").strip()
    items: list[Any] = _json(text) if text.startswith("[") else text.splitlines()
    found = [_listed(item) for item in items if item != ""]
    twice = [key for key, times in Counter(found).items() if times > 1]
    if twice or not found:
        what = f"image {twice[0]} twice" if twice else "no images"
        raise BenchmarkError(f"{file} has {what}. List each image once.")
    return found


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"the list of images is no JSON: {error}. Repair it.") from error


def _listed(item: Any) -> int:
    if isinstance(item, str) and item.lstrip().startswith("{"):
        item = _json(item)
    return image_id(item.get("image_id") if isinstance(item, dict) else item)


def images_with_captions(
    instances: Mapping[str, Any], captions: Mapping[str, Any]
) -> dict[int, str]:
    """Return the file name of each image that the instances file lists and a caption describes.

    Raises:
        BenchmarkError: if a file is none of COCO's.
    """
    try:
        described = {one["image_id"] for one in captions["annotations"]}
        listed = {one["id"]: one["file_name"] for one in instances["images"]}
    except (KeyError, TypeError) as error:
        raise _not_coco(error) from error
    return {number: listed[number] for number in sorted(listed) if number in described}


def objects_of_images(
    reader: Reader,
    instances: Mapping[str, Any],
    captions: Mapping[str, Any],
    images: Iterable[int] | None = None,
) -> dict[int, set[str]]:
    """Return the objects of each image: those with a mask, and those that its captions mention.

    CHAIR's ground truth; captions are read as those of a model are, so another lemmatiser gives
    another truth.

    Args:
        reader: reads the captions.
        instances: COCO's instances file, as an object.
        captions: COCO's captions file, as an object.
        images: the images wanted; None for all that either file has.

    Raises:
        BenchmarkError: if a file is none of COCO's, or a category is no word of the vocabulary.
    """
    nodes = reader.vocabulary.nodes
    try:
        names = {one["id"]: one["name"] for one in instances["categories"]}
        strange = sorted(name for name in names.values() if name not in nodes)
        if strange:
            raise BenchmarkError(
                f"{len(strange)} of {len(names)} categories are not in the list of synonyms "
                f"({reader.vocabulary.name}), such as '{strange[0]}'. Pass a list that has them."
            )
        if images is None:
            images = (one["id"] for file in (instances, captions) for one in file["images"])
        found: dict[int, set[str]] = {number: set() for number in images}
        for one in instances["annotations"]:
            if one["image_id"] in found:
                found[one["image_id"]].add(nodes[names[one["category_id"]]])
        for one in captions["annotations"]:
            if one["image_id"] in found:
                found[one["image_id"]].update(reader.read(one["caption"]).nodes)
    except (KeyError, TypeError) as error:
        raise _not_coco(error) from error
    return found


def _not_coco(error: Exception) -> BenchmarkError:
    return BenchmarkError(
        f"these annotations are not COCO's: {error!r}. Pass instances_*.json and captions_*.json "
        "of one split."
    )
