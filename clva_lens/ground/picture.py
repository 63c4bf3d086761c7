"""A picture together with how it is read: which way up, and on what it lies where it is clear."""

from dataclasses import dataclass
from typing import Any

from PIL import ImageColor

from clva_lens.ground.errors import ParameterError

ORIENTATIONS = ("upright", "as stored")


@dataclass(frozen=True)
class Picture:
    """A picture that is not read as every other: ``source`` is whatever a prompt takes as one.

    ``orientation``: "upright" turns it as its EXIF tag says, as viewers and transformers'
    ``load_image`` do; "as stored" leaves it as its pixels lie, as ``PIL.Image.open`` does.
    ``background``: the colour behind what is transparent, "white" as in transformers' image
    processors; None takes the colour that is stored with transparent pixels, as
    ``PIL.Image.convert("RGB")`` does.
    """

    source: Any
    orientation: str = "upright"
    background: str | None = "white"

    def __post_init__(self) -> None:
        """Check the names."""
        check_reading(self.orientation, self.background)


def check_reading(orientation: str, background: str | None) -> None:
    """Raise ParameterError unless there are such an orientation and such a background."""
    if orientation not in ORIENTATIONS:
        known = " or ".join(f"'{one}'" for one in ORIENTATIONS)
        raise ParameterError(
            f"orientation must be {known}, but is {orientation!r}. Pass one of them."
        )
    try:
        opaque = background is None or len(ImageColor.getrgb(background)) == 3
    except (ValueError, AttributeError, TypeError):
        opaque = False
    if not opaque:
        raise ParameterError(
            f"background must be an opaque colour or None, but is {background!r}. Pass "
            "background='white', or '#rrggbb'."
        )
