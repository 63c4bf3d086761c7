"""The samples of a run as rows of its ``samples.jsonl``, each with the SHA-256 of its picture.

One row: ``{"id": "0/cup", "question": "is there a cup ?", "label": "yes", "group": "0",
"category": "", "system": null, "picture": "9f86d0…"}``. The digest says what the picture is,
wherever it lies: a file by its bytes, an opened picture or an array by its pixels. It is null for a
sample without a picture, and for one that cannot be read. Rows of older runs have no digest.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from io import BytesIO, IOBase
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clva_lens.benchmarks.base import Sample
from clva_lens.ground.errors import BenchmarkError
from clva_lens.ground.files import sha256
from clva_lens.ground.picture import Picture

PICTURE = "picture"
_ORIENTATION = 0x0112  # the EXIF tag that says which way up a picture is


def as_rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return one row a sample; a file that several samples name is read once.

    Raises:
        BenchmarkError: if the file of a picture cannot be read.
    """
    digests = _Digests()
    kept = [f.name for f in fields(Sample) if f.name != "image"]
    return [
        {**{name: getattr(s, name) for name in kept}, PICTURE: digests.of(s.image)} for s in samples
    ]


def as_samples(rows: Iterable[Mapping[str, Any]]) -> list[Sample]:
    """Return the samples of rows, without their pictures."""
    shared: dict[Any, Any] = {}  # all but ids repeat
    names = [f.name for f in fields(Sample) if f.name not in ("id", "image")]
    return [
        Sample(row["id"], None, *[shared.setdefault(told, told) for told in map(row.get, names)])
        for row in rows
    ]


def other_pictures(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    """Return which samples show another picture now, in words; nothing if none does.

    Samples that are on one side only, or were written down without a digest, are not compared.
    """
    known = {row["id"]: row[PICTURE] for row in then if PICTURE in row}
    shared = [row for row in now if row["id"] in known]
    others = [row["id"] for row in shared if known[row["id"]] != row[PICTURE]]
    if not others:
        return ""
    shown = ", ".join(f"'{name}'" for name in others[:5]) + (", …" if len(others) > 5 else "")
    return f"pictures: {len(others)} of {len(shared)} samples show another one now ({shown})"


class _Digests:
    """The SHA-256 of pictures, kept by path, or by the bytes of a file that is open."""

    def __init__(self) -> None:
        self._known: dict[str, str | None] = {}

    def of(self, image: Any) -> str | None:
        """Return the digest of a picture, or None if there is none to be had."""
        if isinstance(image, Picture):
            inner = self.of(image.source)
            return inner and _sha256(inner, image.orientation, image.background)
        if isinstance(image, str | Path):
            if str(image) not in self._known:
                self._known[str(image)] = _of_file(image)
            return self._known[str(image)]
        try:
            return self._of_object(image)
        except Exception:  # decoders raise errors of every kind: asking such a sample records its
            return None

    def _of_object(self, image: Any) -> str | None:
        if isinstance(image, bytes):
            return hashlib.sha256(image).hexdigest()
        if isinstance(image, IOBase):
            return hashlib.sha256(_whole(image)).hexdigest()
        if isinstance(image, Image.Image):
            file = getattr(image, "fp", None)
            return _of_pixels(image) if file is None else self._of_undecoded(_whole(file))
        if hasattr(image, "detach"):  # a tensor
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() else image).numpy()
        if isinstance(image, np.ndarray) and not image.dtype.hasobject:
            return _sha256(image.dtype.str, image.shape, image.tobytes())
        return None

    def _of_undecoded(self, content: bytes) -> str | None:
        """Return the digest that the picture has once decoded; the one at hand stays undecoded.

        Decoded, all pictures of a benchmark might not fit into memory.
        """
        key = f"bytes {hashlib.sha256(content).hexdigest()}"
        if key not in self._known:
            with Image.open(BytesIO(content)) as decoded:
                self._known[key] = _of_pixels(decoded)
        return self._known[key]


def _of_file(path: str | Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise BenchmarkError(
            f"the picture '{path}' cannot be read ({error}). Check that it is there and may be "
            "read."
        ) from error


def _of_pixels(image: Image.Image) -> str:
    pixels, upright = image.tobytes(), image.getexif().get(_ORIENTATION)
    return _sha256(image.mode, image.size, upright, image.getpalette(), pixels)


def _whole(file: Any) -> bytes:
    """Return all bytes of an open file, and leave it where it is."""
    place = file.tell()
    try:
        file.seek(0)
        return file.read()
    finally:
        file.seek(place)


def _sha256(*parts: Any) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part if isinstance(part, bytes) else f"{part!r};".encode())
    return total.hexdigest()
