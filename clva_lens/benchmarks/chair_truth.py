"""What is there: the objects of COCO's images; and captions and image lists in files of others."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clva_lens.benchmarks.base import Answer
from clva_lens.benchmarks.chair_reading import Reader
from clva_lens.benchmarks.chair_vocabulary import Vocabulary
from clva_lens.benchmarks.files import read_rows, read_text, read_values
from clva_lens.benchmarks.foreign import answer_text
from clva_lens.ground.errors import BenchmarkError

IMAGE_KEYS = ("image_id", "image")
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
    """Return the captions of a file as answers, see ``captions_of``."""
    return captions_of(path, caption_rows(path))


def captions_of(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Return the captions in the rows of a file as answers, whose ids are the images' numbers.

    Rows have ``image_id`` or ``image`` (a number or a file name), and the caption under one of
    ``foreign.ANSWER_KEYS``: ``caption`` (OPERA and what comes from it) or ``text`` (less-is-more).
    The rows may stand under ``sentences``, as in what CHAIR's own script writes.

    Raises:
        BenchmarkError: if a row has no image or no caption, or an image occurs twice.
    """
    seen: dict[int, int] = {}
    answers = []
    for number, row in enumerate(rows, start=1):
        where = f"row {number} of {path}"
        key = _image_of(row, where)
        if seen.setdefault(key, number) != number:
            raise BenchmarkError(
                f"rows {seen[key]} and {number} of {path} are both about image {key}. Keep one "
                "caption an image."
            )
        answers.append(Answer(str(key), answer_text(row, where)))
    return answers


def caption_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a file of captions, those under ``sentences`` where it has them there."""
    rows = read_rows(path)
    inner = rows[0].get("sentences") if len(rows) == 1 else None
    return inner if isinstance(inner, list) and all(isinstance(x, dict) for x in inner) else rows


def names_image(row: Mapping[str, Any]) -> bool:
    """Return whether a row says which image it is about, as captions of others do."""
    return any(key in row for key in IMAGE_KEYS)


def _image_of(row: Mapping[str, Any], where: str) -> int:
    """Return the number of the image that a row is about."""
    key = next((key for key in IMAGE_KEYS if key in row), None)
    if key is None:
        raise BenchmarkError(
            f"{where} has no {' or '.join(IMAGE_KEYS)}; it has {', '.join(row)}. Name the image."
        )
    return image_id(row[key])


def read_image_ids(path: str | Path) -> list[int]:
    """Return the images of a list: one a line or a JSON array, numbers or file names.

    A file of captions does too, so that the images of published captions can be taken.

    Raises:
        BenchmarkError: if there is no such file, it has no images, or one twice or no image.
    """
    text = read_text(path).strip()
    items: list[Any] = text.splitlines()
    if text.startswith(("[", "{")):
        items = read_values(path)
        if len(items) == 1 and isinstance(items[0], dict):
            items = caption_rows(path)
    found = [
        _image_of(item, f"{path}, item {number},") if isinstance(item, dict) else image_id(item)
        for number, item in enumerate(items, start=1)
        if item != ""
    ]
    twice = [key for key, times in Counter(found).items() if times > 1]
    if twice or not found:
        what = f"image {twice[0]} twice" if twice else "no images"
        raise BenchmarkError(f"{path} has {what}. List each image once.")
    return found


def read_objects(path: str | Path, vocabulary: Vocabulary) -> dict[int, set[str]]:
    """Return the objects of images from a file that lists them, by node word.

    ``{"categories": [names], "objects": {image: [places in categories]}}``, ``{image: [names]}``,
    or rows with ``image`` and ``objects``. Images are numbers or file names of COCO.

    Raises:
        BenchmarkError: if the file is missing or of another shape, an image stands in it twice, or
            a name is no word of the vocabulary.
    """
    rows = read_rows(path)
    listed = rows[0] if len(rows) == 1 else {}
    names = listed.get("categories")
    try:
        if names_image((rows or [{}])[0]):
            pairs = [(_image_of(row, f"{path}"), row["objects"]) for row in rows]
        elif names is not None:
            told = listed["objects"].items()
            pairs = [(image_id(key), [names[place] for place in places]) for key, places in told]
        else:
            pairs = [(image_id(key), some) for key, some in listed.items()]
        strange = sorted({name for _, some in pairs for name in some} - set(vocabulary.nodes))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BenchmarkError(
            f"{path} does not list the objects of images: {error!r}. Pass categories and objects, "
            "a list of names for each image, or rows with image and objects."
        ) from error
    if strange or not pairs or len(dict(pairs)) != len(pairs):
        what = f"'{strange[0]}', no word of the synonyms" if strange else "no images, or one twice"
        raise BenchmarkError(f"{path} has {what} ({vocabulary.name}). Pass a list that fits them.")
    return {key: {vocabulary.nodes[name] for name in some} for key, some in pairs}


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
