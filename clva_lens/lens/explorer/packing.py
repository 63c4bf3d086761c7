"""An exploration as a browser gets it: what is said as JSON, and maps as codes of one byte.

A map's value is s·(c / n)², of its code c from 0 to n and its own scale s, the map's largest value:
small values are kept nearly as exactly as large ones. What does not fit is left out by rule: maps
of whole layers and of the classes of heads are there for all words, those of single heads for the
first word, and for later words of the heads with most on the image.
"""

import base64
import gzip
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from clva_lens.lens.explorer.explored import CLASSES, FORMAT, Explored

MOST_BYTES = 3_000_000
"""What a page of one exploration may have, where coarser codes or fewer heads can keep it there."""
MOST_LIVE = 12_000_000
"""The same, of what a notebook's kernel sends at first."""
STRONGEST = 16
_SHARES = 255  # of the codes of masses
# Steps of the codes, and whether single heads are there for all words: the first that fits.
_PLANS = ((255, True), *((steps, False) for steps in (255, 127, 90, 63, 45, 31)))
_SHRINKS = 4  # what codes are gzipped to, at best: a plan that is larger yet is passed over
_FRAME = 60_000  # what a page has besides the arrays and what is said


@dataclass(frozen=True)
class Packed:
    """What is ``said``, and the gzipped arrays that its ``sections`` name by type, shape, place."""

    said: dict[str, Any]
    data: bytes

    @property
    def document(self) -> dict[str, Any]:
        """Both as one JSON object."""
        return {**self.said, "data": base64.b64encode(self.data).decode()}


def pack(told: Explored, most: int | None = MOST_BYTES) -> Packed:
    """Return an exploration in at most ``most`` bytes of a page, if it can be; None is no limit."""
    said = _said(told)
    photo, packed = len(said["photo"]), None
    for levels, every in _PLANS:
        if every and most is not None and told.maps.size > _SHRINKS * most:
            continue
        parts = _parts(told, levels, every)
        data, sections = _joined(parts)
        packed = Packed({**said, "levels": levels, "every": every, "sections": sections}, data)
        if most is None or len(data) * 4 / 3 + photo + _FRAME <= most:
            break
    assert packed is not None
    return packed


def _parts(told: Explored, levels: int, every: bool) -> dict[str, np.ndarray]:
    """Return the arrays by name."""
    looks, layers, heads, words, patches = told.maps.shape
    parts = {"mass": np.rint(told.mass.clip(0, 1) * _SHARES).astype(np.uint8)}
    for kind in CLASSES:
        maps = np.zeros((looks, layers, words, patches), np.float32)
        for look, layer in np.ndindex(looks, layers):
            chosen = [True] * heads if kind == "all" else getattr(told, kind)[look, layer]
            if any(chosen):
                maps[look, layer] = told.maps[look, layer, chosen].mean(axis=0)
        parts[kind], parts[f"{kind}.scale"] = coded(maps, levels)
    places = [
        (word, layer, head)
        for word in range(words)
        for layer, head in (
            np.ndindex(layers, heads) if every or not word else told.strongest(word, STRONGEST)
        )
    ]
    word, layer, head = np.array(places).T
    parts["heads"], parts["heads.scale"] = coded(told.maps[:, layer, head, word], levels)
    parts["heads.key"] = ((word * layers + layer) * heads + head).astype(np.uint32)
    return parts


def coded(maps: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each map's codes, and its scale."""
    scale = maps.max(axis=-1).astype(np.float32)
    share = maps / np.where(scale > 0, scale, 1)[..., None]
    return np.rint(levels * np.sqrt(share.clip(0, 1))).astype(np.uint8), scale


def decoded(codes: np.ndarray, scale: np.ndarray, levels: int) -> np.ndarray:
    """Return the values that codes stand for, as the browser has them."""
    return scale[..., None] * (codes / levels) ** 2


def _joined(parts: dict[str, np.ndarray]) -> tuple[bytes, list[list[Any]]]:
    """Return the arrays one after the other, gzipped, each at a multiple of four, and where."""
    sections, whole, place = [], [], 0
    for name, array in parts.items():
        raw = array.tobytes()
        kind = {"uint8": "u8", "uint32": "u32", "float32": "f32"}[array.dtype.name]
        sections.append([name, kind, list(array.shape), place])
        whole.append(raw + bytes(-len(raw) % 4))
        place += len(whole[-1])
    return gzip.compress(b"".join(whole), compresslevel=6, mtime=0), sections


def _said(told: Explored) -> dict[str, Any]:
    """Return everything but the large arrays, as JSON has it."""
    looks, layers, heads, words, _ = told.maps.shape
    return {
        "format": FORMAT,
        "question": told.question,
        "model": told.model,
        "names": list(told.names),
        "answers": list(told.answers),
        "words": list(told.words),
        "layers": list(told.layers),
        "anchors": list(told.anchors),
        "grid": list(told.grid),
        "size": [looks, layers, heads, words],
        "photo": photo_url(told.photo),
        "probabilities": listed(told.probabilities),
        "margins": listed(told.margins),
        "knocked": listed(told.knocked),
        "curves": listed(told.curves),
        "classes": (told.sensitive + 2 * told.insensitive).astype(int).tolist(),
        "lens": listed(told.lens),
        "lensLayers": list(told.lens_layers),
        "lensWords": [list(one) for one in told.lens_words],
        "outlines": {n: np.flatnonzero(one).tolist() for n, one in told.outlines.items()},
        "leftOut": list(told.record.get("left_out", ())),
    }


def listed(array: np.ndarray) -> Any:
    """Return numbers as lists with five digits each; null where there is none."""
    if array.ndim > 1:
        return [listed(one) for one in array]
    return [float(f"{one:.5g}") if math.isfinite(one) else None for one in array.tolist()]


def photo_url(photo: np.ndarray, quality: int = 88) -> str:
    """Return a photo as a page holds it."""
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def heads_of(told: Explored, word: int, heads: Sequence[Sequence[int]]) -> bytes:
    """Return the maps of single heads, [head, look, patch] in float32, for a live notebook."""
    layer, head = np.array(heads, dtype=int).reshape(-1, 2).T
    word = min(max(word, 0), told.maps.shape[3] - 1)
    return np.moveaxis(told.maps[:, layer, head, word], 0, 1).astype("<f4").tobytes()
