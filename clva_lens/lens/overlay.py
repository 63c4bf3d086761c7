"""Maps over the image tokens of a prompt, drawn on its photo."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from clva_lens.figures import Drawing, photo_maps
from clva_lens.figures.photo_maps import COLUMNS, Box, Scale
from clva_lens.ground.errors import ParameterError, PromptError
from clva_lens.ground.parameters import check_arguments
from clva_lens.models.pieces import Piece
from clva_lens.models.prompt import Prompt

Photo = Literal["seen", "whole"]
"""The part of the photo that the maps cover, as the model saw it, or all of the photo."""

_LONGEST = 640  # pixels of the drawn photo


def overlay(
    prompt: Prompt,
    maps: ArrayLike | Tensor,
    *,
    titles: Sequence[str] | None = None,
    notes: Sequence[str] | None = None,
    marked: Sequence[bool] | None = None,
    scale: Scale = "p99",
    smooth: bool = False,
    photo: Photo = "seen",
    part: str = "tiles",
    picture: int | None = None,
    label: str = "attention",
    outlines: Mapping[str, ArrayLike | Tensor] | None = None,
    columns: int = COLUMNS,
) -> Drawing:
    """Return maps over the prompt's image tokens, drawn on its photo: a matplotlib figure.

    Args:
        prompt: a single one; take ``prompt.row(index)`` of a batch.
        maps: [visual] or [panel, visual], over the image tokens of one of the prompt's sites, of
            either sign, such as ``trace.saliency()``.
        titles: what each map is, above it.
        notes: a line under each map.
        marked: which titles are red.
        scale: where colours end, which the picture says: "p99", at the 99th percentile of all
            values, so that attention sinks do not hide the rest; "shared", at the largest value;
            "panel", at each map's own.
        smooth: colours run between the middles of patches.
        photo: "seen", cropped and padded as the model saw it, or the "whole".
        part: of a photo that was cut, its "tiles" or the "thumbnail".
        picture: which photo, 0-based, where the prompt has several.
        label: what the values are, with their unit.
        outlines: bool [visual] of "objects" (``cl.patch_mask``), "positive" or "negative" anchors.
        columns: how many panels stand side by side.

    Raises:
        PromptError: if it is a batch, or it is unknown where on the photo the tokens lie.
        ParameterError: if the maps are of other tokens, or a choice is unknown.

    >>> maps = cl.trace_attention(model, prompt).saliency()[4:6]
    >>> drawing = cl.overlay(prompt, maps, titles=["layer 4", "layer 5"])
    """
    _check(prompt, photo)
    values = _numbers(maps)
    piece = _piece(prompt, values, part, picture)
    image, box = _under(prompt.photos[piece.picture], piece, photo)
    given = (outlines or {}).items()
    masks = {name: piece.on_grid(torch.as_tensor(mask).cpu()) for name, mask in given}
    return photo_maps(
        image,
        piece.on_grid(values).numpy(),
        box=box,
        titles=titles,
        notes=notes,
        marked=marked,
        scale=scale,
        smooth=smooth,
        label=label,
        outlines=masks,
        columns=columns,
    )


def _numbers(maps: ArrayLike | Tensor) -> Float[Tensor, "panel visual"]:
    try:
        values = torch.as_tensor(maps).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ParameterError(
            f"the maps are no numbers ({error}). Pass trace.saliency()."
        ) from error
    if not values.ndim:
        raise ParameterError("the maps are one number. Pass one for each image token.")
    return values[None] if values.ndim == 1 else values


def _check(prompt: Any, photo: str) -> None:
    check_arguments(overlay, prompt=prompt)
    if photo not in get_args(Photo):
        raise ParameterError(f"photo is {photo!r}. Pass 'seen' or 'whole'.")
    if len(prompt["input_ids"]) > 1:
        raise PromptError(
            f"the prompt is a batch of {len(prompt['input_ids'])}. Pass prompt.row(index), and "
            "that row's maps."
        )


def under_map(
    prompt: Prompt, values: Float[Tensor, " visual"]
) -> tuple[np.ndarray, Box, np.ndarray]:
    """Return the photo as the model saw it, the box of a map on it, and the map on its grid.

    Raises:
        PromptError: if it is unknown where on the photo the image tokens lie.
    """
    maps = values.detach().float().cpu()[None]
    piece = _piece(prompt, maps, "tiles", None)
    image, box = _under(prompt.photos[piece.picture], piece, "seen")
    return image, box, piece.on_grid(maps)[0].numpy()


def _piece(
    prompt: Prompt, values: Float[Tensor, "panel visual"], part: str, picture: int | None
) -> Piece:
    """Return where the tokens lie that the maps are of."""
    site = prompt.site_of(values.shape[-1])
    if values.ndim != 2 or site is None:
        sites = prompt.sites.items()
        known = ", ".join(f"{one.spans.visual_count} at the {name}" for name, one in sites)
        raise ParameterError(
            f"maps have shape {tuple(values.shape)}, but [panel, visual] is needed, over the "
            f"prompt's image tokens: {known}. Select or average the other axes."
        )
    return prompt.piece_at(site, part, picture)


def _under(shot: Image.Image, piece: Piece, photo: Photo) -> tuple[np.ndarray, Box]:
    """Return the pixels to draw on, in [0, 1], and the maps' box in them."""
    left, upper, right, lower = piece.box
    if photo == "seen":
        shot, left, upper = piece.view(shot), 0.0, 0.0
        right, lower = float(shot.width), float(shot.height)
    less = min(1.0, _LONGEST / max(shot.size))
    small = shot.resize((max(1, round(shot.width * less)), max(1, round(shot.height * less))))
    x, y = small.width / shot.width, small.height / shot.height
    pixels: Any = np.asarray(small.convert("RGB"))
    return pixels / 255, (left * x, upper * y, right * x, lower * y)
