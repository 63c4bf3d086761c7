"""Results that draw themselves, though their rooms stand below those that can draw."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def drawing(name: str) -> Callable[..., Any]:
    """Return the registered figure of this name."""
    return import_module("clva_lens.figures").FIGURES.get(name).draw


def on_photo() -> Callable[..., Any]:
    """Return ``overlay``, which draws maps over the photo of a prompt."""
    return import_module("clva_lens.lens.overlay").overlay


def gallery() -> Callable[..., Any]:
    """Return ``gallery_of``, which writes a page for each question that a method changed."""
    return import_module("clva_lens.lens.explorer.gallery").gallery_of


class SelfDrawn:
    """A result with ``draw()``, which a notebook shows as a picture."""

    def draw(self) -> Any:
        """Return a matplotlib figure."""
        raise NotImplementedError

    @property
    def drawable(self) -> bool:
        """Whether ``draw()`` can be called without more; where not, a notebook shows the text."""
        return True

    def _repr_png_(self) -> bytes | None:
        """Return the picture that a notebook shows."""
        return self.draw()._repr_png_() if self.drawable else None
