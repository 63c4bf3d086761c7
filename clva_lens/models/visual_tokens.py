"""The image tokens of a prompt at one attention site, and how maps over them can be drawn."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import ParameterError, PromptError
from clva_lens.models.family import find_family
from clva_lens.models.pieces import Piece, Places, joined

NO_PHOTO = (
    "it is unknown where on a photo the image tokens lie, because the prompt was not made of one. "
    "Pass model.prompt(image, question)."
)


class VisualTokens(NamedTuple):
    """The image tokens of one attention site: their spans among its keys, and their grid.

    ``grid`` is (rows, columns), or a sentence that says why there is none. ``places`` knows the
    pieces of the photos, if the prompt was made of some.
    """

    spans: TokenSpans
    grid: tuple[int, int] | str
    places: Places | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The grid.

        Raises:
            PromptError: if there is none.
        """
        if isinstance(self.grid, str):
            raise PromptError(self.grid)
        return self.grid

    @property
    def pieces(self) -> tuple[Piece, ...] | str:
        """Where they lie on the photos, or a sentence that says why that is unknown."""
        return NO_PHOTO if self.places is None else self.places.pieces

    @property
    def drawable(self) -> bool:
        """Whether a map over them can be drawn, by their grid or as the mosaic of one photo."""
        return not isinstance(self.grid, str) or (
            not isinstance(self.pieces, str) and len({one.picture for one in self.pieces}) == 1
        )

    @property
    def reason(self) -> str:
        """Why a map over them cannot be drawn; "" if it can."""
        if not isinstance(self.grid, str) or not isinstance(self.pieces, str):
            return ""
        return self.grid if self.places is None else self.pieces

    def picture(self, number: int | None) -> int:
        """Return the number of a photo, which may be left out where there is one.

        Raises:
            ParameterError: if there are several, or none of this number.
        """
        known = sorted({one.picture for one in self.pieces if isinstance(one, Piece)})
        if number in known or (number is None and len(known) == 1):
            return known[0] if number is None else number
        raise ParameterError(
            f"the prompt has {len(known)} pictures, but picture is {number}. Pass picture=0 to "
            f"{len(known) - 1}."
        )

    def piece(self, part: str = "tiles", picture: int | None = None) -> Piece:
        """Return the tiles of a photo as one mosaic, or its thumbnail (``part``).

        What is not cut has one piece, whatever ``part`` is. ``picture`` is the photo's number,
        which may be left out where there is one.

        Raises:
            ParameterError: if ``part`` or ``picture`` is none of these.
            PromptError: if the pieces are unknown.
        """
        if part not in ("tiles", "thumbnail"):
            raise ParameterError(f"part is {part!r}. Pass 'tiles' or 'thumbnail'.")
        if isinstance(self.pieces, str):
            raise PromptError(self.reason or self.pieces)
        picture = self.picture(picture)
        own = [one for one in self.pieces if one.picture == picture]
        asked = [one for one in own if one.thumbnail == (part == "thumbnail")]
        return joined(asked or own)

    def row(self, index: int) -> "VisualTokens":
        """Return those of one row of the batch."""
        places = None if self.places is None else self.places.row(index)
        return VisualTokens(self.spans.row(index), self.grid, places)

    def on_grid(
        self, values: Tensor, part: str | None = None, picture: int | None = None
    ) -> Tensor:
        """Return values over the image tokens as a map; see ``Prompt.on_grid``.

        Raises:
            PromptError: if it is unknown where the image tokens lie.
        """
        if part is None and picture is None and not isinstance(self.grid, str):
            return values.unflatten(-1, self.grid)
        return self.piece(part or "tiles", picture).on_grid(values)


def visual_tokens(
    model: PreTrainedModel,
    site: str,
    spans: TokenSpans,
    inputs: Mapping[str, Tensor] | None = None,
    places: Places | None = None,
) -> VisualTokens:
    """Return the image tokens of a site with their grid, or the reason why they lie on none.

    Where the grid depends on the picture, it is known from the prompt's ``inputs`` only.
    """
    family = find_family(model)
    try:
        if inputs is None:
            grid = family.grid(model, site)
        else:
            grid = family.prompt_grid(model, site, inputs)
    except PromptError as error:
        return VisualTokens(spans, str(error), places)
    if spans.visual_count != grid[0] * grid[1]:
        return VisualTokens(
            spans,
            f"the prompt has {spans.visual_count} image tokens, but the vision tower has a "
            f"grid of {grid[0]} × {grid[1]}, so they lie on no grid. Check the processor's "
            "patch_size, vision_feature_select_strategy and num_additional_image_tokens.",
            places,
        )
    return VisualTokens(spans, grid, places)
