"""Images and questions become a prompt: model inputs, token spans, and the image's grid."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import PromptError
from clva_lens.models.family import find_family

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


class VisualTokens(NamedTuple):
    """The image tokens of one attention site: their spans among its keys, and their grid.

    ``grid`` is (rows, columns), or a sentence that says why there is none.
    """

    spans: TokenSpans
    grid: tuple[int, int] | str

    @property
    def shape(self) -> tuple[int, int]:
        """The grid.

        Raises:
            PromptError: if there is none.
        """
        if isinstance(self.grid, str):
            raise PromptError(self.grid)
        return self.grid


def visual_tokens(
    model: PreTrainedModel,
    site: str,
    spans: TokenSpans,
    inputs: Mapping[str, Tensor] | None = None,
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
        return VisualTokens(spans, str(error))
    if spans.visual_count != grid[0] * grid[1]:
        return VisualTokens(
            spans,
            f"the prompt has {spans.visual_count} image tokens, but the vision tower has a "
            f"grid of {grid[0]} × {grid[1]}, so they lie on no grid. Check the processor's "
            "patch_size, vision_feature_select_strategy and num_additional_image_tokens.",
        )
    return VisualTokens(spans, grid)


@dataclass(frozen=True, eq=False, repr=False)
class Prompt(Mapping[str, Tensor]):
    """What a model is run on. It is a mapping of the model's inputs, so ``**prompt`` unpacks it.

    ``sites`` has the image tokens of each attention site, the family's own first. ``batched`` is
    whether lists were given. ``images``, ``questions`` and ``system`` are what it was made from.
    """

    inputs: dict[str, Tensor]
    sites: dict[str, VisualTokens]
    batched: bool
    images: tuple[Image.Image, ...]
    questions: tuple[str, ...]
    system: str | None

    def __getitem__(self, name: str) -> Tensor:
        """Return one of the model's inputs."""
        return self.inputs[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the model's inputs."""
        return iter(self.inputs)

    def __len__(self) -> int:
        """Return the number of model inputs."""
        return len(self.inputs)

    @property
    def spans(self) -> TokenSpans:
        """Which positions of the token sequence are what."""
        return self.spans_at("decoder")

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the image tokens at the family's own site; None if on no grid."""
        grid = next(iter(self.sites.values())).grid
        return None if isinstance(grid, str) else grid

    @property
    def answer_start(self) -> int:
        """Where the answer begins in the ids that the model's ``generate`` returns."""
        rows = self.inputs.get("decoder_input_ids", self.inputs["input_ids"])
        return rows.shape[1]

    def spans_at(self, site: str) -> TokenSpans:
        """Return which keys of a site are what.

        Raises:
            PromptError: if there is no such site.
        """
        return self._at(site).spans

    def grid_at(self, site: str) -> tuple[int, int]:
        """Return (rows, columns) of a site's image tokens.

        Raises:
            PromptError: if there is no such site, or its image tokens lie on no grid.
        """
        return self._at(site).shape

    def _at(self, site: str) -> VisualTokens:
        if site not in self.sites:
            raise PromptError(
                f"this model has no attention site {site!r}; it has {', '.join(self.sites)}. Pass "
                "one of these."
            )
        return self.sites[site]

    def on_grid(self, values: Tensor) -> Tensor:
        """Return values over the image tokens as a map that can be drawn on the picture.

        The last axis of ``values`` becomes (rows, columns).

        Raises:
            PromptError: if the image tokens lie on no grid, or their number is another.
        """
        count, reasons, grids = values.shape[-1], [], []
        for site, tokens in self.sites.items():
            if isinstance(tokens.grid, str):
                if tokens.spans.visual_count == count:
                    reasons.append(tokens.grid)
            elif count == tokens.grid[0] * tokens.grid[1]:
                return values.unflatten(-1, tokens.grid)
            else:
                grids.append(f"{tokens.grid[0]} × {tokens.grid[1]} at the {site}")
        if reasons:
            raise PromptError(reasons[0])
        raise PromptError(
            f"the map has {count} values, but the grid is {' or '.join(grids)}. Pass a map over "
            "this prompt's image tokens."
        )

    def __repr__(self) -> str:
        """Return the questions and the sizes of the spans."""
        batch, length = self.spans.image.shape
        first = self.questions[0] if len(self.questions) == 1 else f"{batch} questions"
        grid = self.sites["decoder"].grid
        lie = "no grid" if isinstance(grid, str) else f"{grid[0]} × {grid[1]} grid"
        counts = [
            int(span[0].sum()) for span in (self.spans.system, self.spans.image, self.spans.text)
        ]
        return (
            f"Prompt({first!r}, {length} tokens: {counts[0]} system, {counts[1]} image ({lie}), "
            f"{counts[2]} text)"
        )


def read_image(image: ImageLike) -> Image.Image:
    """Return a picture as RGB: from a path, a PIL image, or an array or tensor of pixels.

    Arrays are [height, width] or [height, width, 3 or 4], uint8 or floats in [0, 1].

    Raises:
        PromptError: if there is no readable image, or the pixels are out of range.
    """
    if isinstance(image, str | Path):
        return _open_image(Path(image))
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        raise PromptError(
            f"an image must be a path, a PIL image or an array, but got {type(image).__name__}. "
            "Pass the path of a picture."
        )
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        raise PromptError(
            f"an image array must be [height, width] or [height, width, 3 or 4], but is "
            f"{list(image.shape)}. Transpose or split it."
        )
    if image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating):
            raise PromptError(
                f"image pixels must be uint8 or floats in [0, 1], but are {image.dtype}. "
                "Convert them with .astype(numpy.uint8)."
            )
        if not np.isfinite(image).all():
            raise PromptError(
                f"the image has {int((~np.isfinite(image)).sum())} pixel values that are NaN or "
                "infinite. Replace them, for example with numpy.nan_to_num."
            )
        if image.size and (image.min() < 0 or image.max() > 1):
            raise PromptError(
                f"float pixels must be in [0, 1], but range from {image.min():g} to "
                f"{image.max():g}. Divide by 255, or pass uint8."
            )
        image = (image * 255).round().astype(np.uint8)
    if image.size == 0:
        raise PromptError(f"the image is empty ({list(image.shape)}). Pass at least one pixel.")
    return Image.fromarray(image).convert("RGB")


def _open_image(path: Path) -> Image.Image:
    if not path.is_file():
        raise PromptError(f"there is no image file '{path}'. Check the path.")
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except UnidentifiedImageError:
        raise PromptError(
            f"'{path}' is not an image that Pillow can read. Pass a JPEG or PNG file."
        ) from None
    except Image.DecompressionBombError as error:
        raise PromptError(f"'{path}' is too large ({error}). Scale the picture down.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise PromptError(
            f"'{path}' is broken or truncated ({error}). Replace the file with a whole one."
        ) from None


def as_lists(
    image: ImageLike | Sequence[ImageLike] | None, question: str | Sequence[str]
) -> tuple[list[Image.Image], list[str], bool]:
    """Return images and questions as lists of one length, and whether lists were given.

    One image with several questions is asked all of them; one question is asked of all images.

    Raises:
        PromptError: if an image is missing, a question is empty, or the lists differ in length.
    """
    if image is None:
        raise PromptError(
            "there is a question but no image. Pass a picture: model.prompt(image, question)."
        )
    images: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
    questions = [question] if isinstance(question, str) else list(question)
    batched = isinstance(image, list | tuple) or not isinstance(question, str)
    if not images or not questions:
        raise PromptError(
            f"got {len(images)} images and {len(questions)} questions. Pass at least one of each."
        )
    if len(images) != len(questions) and 1 not in (len(images), len(questions)):
        raise PromptError(
            f"got {len(images)} images but {len(questions)} questions. Pass lists of one length, "
            "or a single image or question for all."
        )
    for index, text in enumerate(questions):
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"question {index} is {text!r}. Pass a question that is not empty.")
    count = max(len(images), len(questions))
    read = [read_image(one) for one in images]
    return read * (count // len(read)), questions * (count // len(questions)), batched
