"""Pictures that are read and prepared once, however many questions are asked about them."""

import copy
from collections.abc import Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from clva_lens.models.pictures import Opened, opened_of, picture_keys

_PROVEN: WeakKeyDictionary[Any, dict[str, bool]] = WeakKeyDictionary()
"""For an image processor, by how it is called: whether it prepares every picture by itself."""


KEPT = 32
"""So many pictures are kept, or those of a batch that has more."""


class Prepared:
    """Pictures that are opened once, and ``processor``, which prepares each of them once.

    It takes the place of a model's own. What was made is kept for the pictures shown last: methods
    that ask side by side may be a few pictures apart.
    """

    def __init__(self, processor: Any) -> None:
        """Prepare nothing yet."""
        self.processor = processor
        self._shown: dict[Hashable, Opened] = {}
        self._recent: dict[int, Opened] = {}
        self._images: _Once | None = None
        if hasattr(processor, "image_processor"):
            self.processor = copy.copy(processor)
            self._images = self.processor.image_processor = _Once(processor.image_processor)

    def show(self, images: Sequence[Any]) -> list[Any]:
        """Return pictures to be passed on in their place: the same one for the same picture."""
        keys = picture_keys(images)
        recent = self._recent
        opened = {id(one.found): one for one in recent.values() if one.found is not None}
        known = {**opened, **self._shown}
        pairs = dict(zip(keys, images, strict=True)).items()
        shown = {key: known.get(key) or opened_of(image) for key, image in pairs}
        for one in shown.values():
            recent.pop(id(one), None)
            recent[id(one)] = one
        while len(recent) > max(KEPT, len(shown)):
            recent.pop(next(iter(recent)))
        whole = {**self._shown, **shown}
        self._shown = {key: one for key, one in whole.items() if id(one) in recent}
        if self._images is not None:
            self._images.keep(list(recent.values()))
        return [shown[key] for key in keys]


class _Once:
    """An image processor that keeps what it makes of some pictures, each by itself.

    All others go through. So does a call whose pictures do not make one batch of what was made of
    each: where they are padded to the largest, for example.
    """

    def __init__(self, images: Any) -> None:
        self._images = images
        self._kept: list[Opened] = []
        self._made: dict[Any, Any] = {}

    def keep(self, pictures: list[Opened]) -> None:
        """Keep what is made of these pictures from now on, and forget all others."""
        self._kept, known = pictures, {id(one.found) for one in pictures}
        self._made = {key: made for key, made in self._made.items() if known.issuperset(key[0])}

    def __call__(self, images: Any, *args: Any, **options: Any) -> Any:
        parts = list(images) if isinstance(images, list | tuple) else [images]
        known = {id(one.found) for one in self._kept if one.found is not None}
        how = repr((args, options))
        if not known.issuperset(map(id, _flat(parts))):
            return self._images(images, *args, **options)
        if len(parts) > 1 and not self._each_by_itself(parts[0], how, args, options):
            return self._whole(images, how, args, options)
        joined = _joined([self._whole([part], how, args, options) for part in parts])
        return self._whole(images, how, args, options) if joined is None else joined

    def _whole(self, images: Any, how: str, args: Any, options: Any) -> Any:
        nested = any(isinstance(part, list | tuple) for part in images)
        key = (tuple(map(id, _flat(images))), nested, how)
        if key not in self._made:
            self._made[key] = self._images(images, *args, **options)
        return copy.copy(self._made[key])

    def _each_by_itself(self, part: Any, how: str, args: Any, options: Any) -> bool:
        """Whether pictures made one by one are those made together, bit by bit: of two of noise."""
        proven = _PROVEN.setdefault(self._images, {})
        if how not in proven:
            noise = np.random.default_rng(0)
            pixels = noise.integers(0, 255, (2, 64, 96, 3), dtype=np.uint8)
            pictures: list[Any] = [Image.fromarray(one) for one in pixels]
            pictures = [[one] for one in pictures] if isinstance(part, list | tuple) else pictures
            whole = self._images(pictures, *args, **options)
            joined = _joined([self._images([one], *args, **options) for one in pictures])
            proven[how] = joined is not None and _are_equal(joined, whole)
        return proven[how]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._images, name)


def _flat(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [one for part in images for one in _flat(part)]
    return [images]


def _joined(parts: list[Any]) -> Any:
    """Return the outputs of an image processor as one of all pictures; None if they make none."""
    if len(parts) == 1:
        return parts[0]
    if not all(isinstance(one, BatchFeature) and one.keys() == parts[0].keys() for one in parts):
        return None
    found = copy.copy(parts[0])
    for name in parts[0]:
        values = [one[name] for one in parts]
        if not all(isinstance(one, Tensor) and one.ndim for one in values):
            return None
        if len({(one.shape[1:], one.dtype) for one in values}) > 1:
            return None
        found[name] = torch.cat(values)
    return found


def _are_equal(one: BatchFeature, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        isinstance(other[name], Tensor) and torch.equal(one[name], other[name]) for name in one
    )
