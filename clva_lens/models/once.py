"""A processor that prepares a picture once, however many questions are asked about it."""

import copy
from typing import Any


class _Once:
    """An image processor that gives what it gave before where it is given the same pictures."""

    def __init__(self, images: Any) -> None:
        self._images = images
        self._made: dict[Any, tuple[Any, Any]] = {}

    def __call__(self, images: Any, *args: Any, **options: Any) -> Any:
        key = (*map(id, _flat(images)), repr((args, options)))
        if key not in self._made:
            # The pictures are kept too, so that their ids stay theirs.
            self._made[key] = images, self._images(images, *args, **options)
        return copy.copy(self._made[key][1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._images, name)


def _flat(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [one for part in images for one in _flat(part)]
    return [images]


def pictures_once(processor: Any) -> Any:
    """Return a processor like this one, which prepares each picture once while it lives."""
    if not hasattr(processor, "image_processor"):
        return processor
    other = copy.copy(processor)
    other.image_processor = _Once(processor.image_processor)
    return other
