"""Where image tokens lie on the photo: pieces, each a grid of tokens over a box of pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.ground.errors import PromptError
from clva_lens.models.family import ModelFamily, find_family
from clva_lens.models.layouts import Laid, laid_out
from clva_lens.models.paintings import Fitted, fitted, painted

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the photo; a pixel's own edges are whole numbers."""

WHOLE = 0.97
"""A piece that covers more of what all pieces of its photo do is the thumbnail."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Image tokens that lie on a grid over one box of a photo.

    ``picture`` numbers the photos of a prompt, 0-based. ``box`` is (left, top, right, bottom) in
    pixels of the photo as it was given, upright; it reaches beyond the photo where the processor
    pads, and ends within it where the processor crops. Each cell has an equal share of it.
    ``tokens`` are the places of the tokens among the prompt's image tokens, row by row; tokens that
    end rows are none of them. ``thumbnail``: the photo is seen again, larger, in other pieces.
    """

    picture: int
    box: Box
    rows: int
    columns: int
    tokens: Int[Tensor, " token"]
    thumbnail: bool = False

    def on_grid(self, values: Shaped[Tensor, "*axes visual"]) -> Shaped[Tensor, "*axes row column"]:
        """Return values over all image tokens of the prompt as a map over the piece's box."""
        chosen = values[..., self.tokens.to(values.device)]
        return chosen.unflatten(-1, (self.rows, self.columns))

    @property
    def cells(self) -> Float[Tensor, "token 4"]:
        """The box of each token, in the order of ``tokens``."""
        left, top, right, bottom = self.box
        x = torch.linspace(left, right, self.columns + 1, dtype=torch.float64)
        y = torch.linspace(top, bottom, self.rows + 1, dtype=torch.float64)
        row = torch.arange(self.rows).repeat_interleave(self.columns)
        column = torch.arange(self.columns).repeat(self.rows)
        return torch.stack([x[column], y[row], x[column + 1], y[row + 1]], dim=1).float()

    def view(self, photo: Image.Image) -> Image.Image:
        """Return the photo within the box, and black beyond it: what a map is drawn over."""
        size = (max(1, round(self.box[2] - self.box[0])), max(1, round(self.box[3] - self.box[1])))
        return photo.transform(size, Image.Transform.EXTENT, self.box)

    def covered(self, mask: Bool[np.ndarray, "height width"]) -> Float[Tensor, " token"]:
        """Return the share of each token's box on which a mask of the photo is true, in [0, 1]."""
        height, width = mask.shape
        below = np.pad(mask, ((1, 0), (1, 0))).astype(np.float64).cumsum(axis=0).cumsum(axis=1)

        def upto(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            """The mask's area above and to the left of points."""
            x, y = x.clip(0, width), y.clip(0, height)
            left, top = (np.floor(x).astype(int), np.floor(y).astype(int))
            right, bottom = np.minimum(left + 1, width), np.minimum(top + 1, height)
            u, v = x - left, y - top
            upper = (1 - u) * below[top, left] + u * below[top, right]
            return (1 - v) * upper + v * ((1 - u) * below[bottom, left] + u * below[bottom, right])

        x0, y0, x1, y1 = self.cells.double().numpy().T
        area = upto(x1, y1) - upto(x0, y1) - upto(x1, y0) + upto(x0, y0)
        return torch.from_numpy(area / ((x1 - x0) * (y1 - y0))).float()

    def __repr__(self) -> str:
        """Return the grid and its box."""
        box = ", ".join(f"{edge:.1f}" for edge in self.box)
        kind = "thumbnail, " if self.thumbnail else ""
        return f"Piece({kind}picture {self.picture}, {self.rows} × {self.columns} over [{box}])"


def joined(pieces: Sequence[Piece]) -> Piece:
    """Return the mosaic of one picture's tiles as one piece.

    Raises:
        PromptError: if they do not lie edge to edge in rows and columns of one size.
    """
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    wide, high = first.box[2] - first.box[0], first.box[3] - first.box[1]
    left, top = (min(one.box[side] for one in pieces) for side in (0, 1))
    placed = {
        (round((one.box[1] - top) / high), round((one.box[0] - left) / wide)): one for one in pieces
    }
    down, across = (1 + max(place[axis] for place in placed) for axis in (0, 1))
    alike = len({(one.rows, one.columns, one.picture) for one in pieces}) == 1
    if not alike or down * across != len(pieces) or len(placed) != len(pieces):
        raise PromptError(
            f"the {len(pieces)} pieces do not lie edge to edge, so they are no mosaic. Draw them "
            "one by one: piece.on_grid(values)."
        )
    grids = [
        [placed[y, x].tokens.unflatten(0, (first.rows, -1)) for x in range(across)]
        for y in range(down)
    ]
    mosaic = torch.cat([torch.cat(row, dim=1) for row in grids])
    last = placed[down - 1, across - 1].box
    return Piece(
        first.picture,
        (left, top, last[2], last[3]),
        down * first.rows,
        across * first.columns,
        mosaic.flatten(),
    )


class Given(NamedTuple):
    """What a processor made a prompt's inputs of: photos and texts, by row of the batch."""

    processor: Any
    photos: tuple[tuple[Image.Image, ...], ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Places:
    """Where a site's image tokens lie on the photos of a prompt, found when it is asked for."""

    model: PreTrainedModel
    given: Given
    site: str

    def row(self, index: int) -> "Places":
        """Return those of one row of the batch."""
        one, (processor, photos, texts) = slice(index, index + 1), self.given
        return replace(self, given=Given(processor, photos[one], texts[one]))

    @cached_property
    def pieces(self) -> tuple[Piece, ...] | str:
        """The pieces, which all rows of the batch share, or a sentence that says why none are."""
        sizes = {tuple(one.size for one in row) for row in self.given.photos}
        if len(sizes) > 1:
            return (
                f"the pictures of the batch have different sizes ({sorted(sizes)}), so they have "
                "no pieces in common. Take prompt.row(index), or make a prompt for each."
            )
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._found()
        except PromptError as error:
            return str(error)

    def _found(self) -> tuple[Piece, ...]:
        family, photos = find_family(self.model), self.given.photos[0]

        def encode(shown: list[Image.Image]) -> dict[str, Tensor]:
            row: Any = shown if len(shown) > 1 else shown[0]
            return family.encode(self.model, self.given.processor, [row], [self.given.texts[0]])

        inputs, seen = painted(photos, encode)
        count = family.spans(self.model, self.site, inputs).visual_count
        laid, total = laid_out(self.model.config, inputs, seen, self._grid(family))
        if total != count:
            raise PromptError(
                f"the prompt has {count} image tokens, but {total} are accounted for, so it is "
                "unknown which part of the picture each is of. Maps can be read, not drawn."
            )
        known = fitted([one.canvas for one in laid], photos)
        return tuple(_piece(*one, laid, known, photos) for one in zip(laid, known, strict=True))

    def _grid(self, family: ModelFamily) -> tuple[int, int] | str:
        try:
            return family.grid(self.model, self.site)
        except PromptError as error:
            return str(error)


def _piece(
    own: Laid, where: Fitted, laid: list[Laid], known: list[Fitted], photos: Sequence[Image.Image]
) -> Piece:
    """Return a piece; it is the thumbnail if it covers as much of its photo as all of them do."""
    ends = (0, 0, *photos[where.picture].size)
    boxes = [
        _within(other.box(one.cell, one.rows, one.columns), ends)
        for one, other in zip(laid, known, strict=True)
        if other.picture == where.picture
    ]
    box = where.box(own.cell, own.rows, own.columns)
    whole = [end(one[side] for one in boxes) for side, end in enumerate((min, min, max, max))]
    covers = len(boxes) > 1 and _area(_within(box, ends)) > WHOLE * _area(whole)
    thumbnail = covers if own.thumbnail is None else own.thumbnail
    return Piece(where.picture, box, own.rows, own.columns, own.tokens, thumbnail)


def _within(box: Sequence[float | int], ends: Sequence[float | int]) -> list[float | int]:
    return [*map(max, box[:2], ends[:2]), *map(min, box[2:], ends[2:])]


def _area(box: Sequence[float | int]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
