"""Files of benchmarks: where they lie, rows of JSON, and pictures that must be there."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from clva_lens.benchmarks.base import Benchmark, Sample
from clva_lens.benchmarks.lines import value_of
from clva_lens.ground.errors import BenchmarkError
from clva_lens.ground.picture import Picture, check_reading

DATA = "CLVA_LENS_DATA"
# COCO pictures are called by number in some releases and with this prefix in others.
_COCO = "COCO_val2014_"
_NOT_SPACE = re.compile(r"\S")


@dataclass(frozen=True, kw_only=True)
class PictureBenchmark(Benchmark):
    """A benchmark whose pictures are files.

    The official scripts of LLaVA, POPE and MME read a picture by ``PIL.Image.open(path)
    .convert("RGB")``, which neither turns it as its EXIF tag says nor minds transparency;
    transformers' ``load_image`` turns it. Published numbers were made both ways.

    Args:
        orientation: "as stored", or "upright".
        background: the colour behind what is transparent; None takes what is stored with it.
    """

    orientation: str = "as stored"
    background: str | None = None

    def __post_init__(self) -> None:
        """Check how pictures are read."""
        check_reading(self.orientation, self.background)

    def picture(self, sample: Sample) -> Picture:
        """Return a sample's picture with how it is read."""
        return Picture(sample.image, self.orientation, self.background)


def locate(given: str | Path | None, places: Sequence[str], what: str, source: str) -> Path:
    """Return the first of ``places`` that exists under ``given``, or under $CLVA_LENS_DATA.

    A ``given`` file is returned as it is. ``what`` names the data and ``source`` says where they
    can be had; both are for the error.

    Raises:
        BenchmarkError: if no folder was given, or none of the places exists in it.
    """
    root = given if given is not None else os.environ.get(DATA)
    if not root:
        raise BenchmarkError(
            f"no folder was given for {what}. Get it from {source}, and pass its folder, or set "
            f"the environment variable {DATA} to a folder with all benchmark data."
        )
    folder = Path(root)
    if folder.is_file():
        return folder
    for place in places:
        if (folder / place).exists():
            return folder / place
    raise BenchmarkError(
        f"{what} was not found in {folder}: looked for {', '.join(places)}. Get it from {source}, "
        "or pass the folder that has it."
    )


def read_rows(path: str | Path, keys: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the rows of a file: objects a line each or over several lines, or a JSON array.

    Raises:
        BenchmarkError: if the file is missing, is none of these (naming the line, such as a
            half-written last one), or a row lacks one of ``keys``.
    """
    rows = read_values(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise BenchmarkError(f"row {number} of {path} is no object: {row!r}. Check the file.")
        absent = set(keys) - set(row)
        if absent:
            raise BenchmarkError(
                f"row {number} of {path} has no {', '.join(sorted(absent))}; it has "
                f"{', '.join(row)}. Pass a file of the right kind."
            )
    return rows


def each_row(path: str | Path, keys: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield what ``read_rows`` returns; a file of one object a line is never held whole.

    Raises:
        BenchmarkError: as ``read_rows`` does.
    """
    count = 0
    if Path(path).is_file():
        with Path(path).open("rb") as file:
            for line in file:
                if line.isspace():
                    continue
                row = _object(line)
                if row is None or not row.keys() >= keys:  # another layout, or an error
                    break
                yield row
                count += 1
            else:
                return
    yield from islice(read_rows(path, keys), count, None)


def _object(line: bytes) -> dict[str, Any] | None:
    """Return the object that a line is, None if it is anything else."""
    try:
        found = value_of(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_values(path: str | Path) -> list[Any]:
    """Return the JSON values that follow each other in a file; of an array, its items.

    Raises:
        BenchmarkError: if the file is missing or is no JSON, naming the line.
    """
    try:
        return _values(read_text(path))
    except ValueError as error:
        raise BenchmarkError(
            f"{path} is neither JSON lines nor a JSON array: {error}. Repair or remove that line."
        ) from error


def read_text(path: str | Path) -> str:
    """Return the text of a file; one that ends in ``.gz`` is unpacked.

    Raises:
        BenchmarkError: if the file is missing, damaged or no text.
    """
    file = Path(path)
    if not file.is_file():
        raise BenchmarkError(f"there is no file {file}. Check the path.")
    try:
        content = file.read_bytes()
        return (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8-sig")
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise BenchmarkError(f"{file} cannot be read: {error}. Get it again.") from error


def _values(text: str) -> list[Any]:
    decode = json.JSONDecoder().raw_decode
    rows: list[Any] = []
    place = 0
    while begins := _NOT_SPACE.search(text, place):
        start = begins.start()
        try:
            found, place = decode(text, start)
        except json.JSONDecodeError as error:
            # What follows a half-written object is where the decoder stumbles.
            at = error.pos if text[start] == "[" else start
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"line {line}: {error.msg}") from error
        rows += found if isinstance(found, list) else [found]
    return rows


def read_object(path: str | Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        BenchmarkError: if the file is missing or holds anything else.
    """
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        raise BenchmarkError(f"{path} is no JSON: {error}. Get it again.") from error
    if not isinstance(found, dict):
        raise BenchmarkError(f"{path} holds no JSON object. Pass the right file.")
    return found


def write_lines(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text("".join(lines), encoding="utf-8")


def find_images(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the picture of each name, with or without the prefix of COCO 2014.

    Raises:
        BenchmarkError: if any is missing; one error with their number and the first names.
    """
    found: dict[str, Path | None] = {}
    for name in dict.fromkeys(names):
        other = name.removeprefix(_COCO) if name.startswith(_COCO) else _COCO + name
        tries = (folder / one for one in (name, other))
        found[name] = next((path for path in tries if path.is_file()), None)
    missing = [name for name, path in found.items() if path is None]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise BenchmarkError(
            f"{len(missing)} of {len(found)} images are missing from {folder}: "
            f"{', '.join(missing[:3])}{more}. Download them, or pass images= another folder."
        )
    return [path for path in (found[name] for name in names) if path is not None]
