"""Pictures as they are given, read into RGB: one gate for files, bytes, PIL images and arrays.

What comes out is what the model's own processor makes of the picture once it is opened: turned
upright as transformers' ``load_image`` does, and with what is transparent on white as transformers'
image processors do. (``load_image`` itself drops the transparency, so that there a path and an
opened picture differ.)
"""

import errno
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO, IOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from clva_lens.ground.errors import PromptError
from clva_lens.ground.picture import Picture


class Opened:
    """A picture that is read when it is needed first, and stays the same image then."""

    def __init__(self, source: Any) -> None:
        """Keep what ``read_image`` takes."""
        self.source = source
        self.found: Image.Image | None = None

    def read(self) -> Image.Image:
        """Return the image; see ``read_image``."""
        if self.found is None:
            self.found = read_image(self.source)
        return self.found


ImageLike = str | Path | bytes | IOBase | Image.Image | np.ndarray | Tensor | Picture | Opened

LONGEST_RATIO = 200
"""Of the sides: Qwen2-VL's processor refuses more. One that scales the shorter side to 336 pixels,
as LLaVA-1.5's does, makes 336 × 67,200 of it."""

_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_CLEAR = ("LA", "La", "PA", "RGBA", "RGBa")


def opened_of(image: ImageLike) -> Opened:
    """Return a picture to be read once."""
    return image if isinstance(image, Opened) else Opened(image)


def picture_keys(images: Sequence[Any]) -> list[Hashable]:
    """Return what pictures are known by: their paths, else the very object, and how it is read."""
    return [_key(one) for one in images]


def _key(image: Any) -> Hashable:
    if isinstance(image, Picture):
        return (_key(image.source), image.orientation, image.background)
    return str(image) if isinstance(image, str | Path) else id(image)


def read_image(image: ImageLike, background: str | None = "white") -> Image.Image:
    """Return a picture as RGB: from a path, a file, its bytes, a PIL image, an array or a tensor.

    Arrays are [height, width] or [height, width, channels], with grey, grey and alpha, RGB or RGBA
    as channels; booleans, uint8, uint16 (of which the upper byte is taken, as Pillow does in
    files) or floats in [0, 1]. Files are held to the same ranges. A ``Picture`` says how it is
    read; without one it is upright and on ``background`` (see there).

    Raises:
        PromptError: if there is no readable picture, it is too large, or its pixels are out of
            range.
        ParameterError: if the background is no opaque colour.
    """
    if isinstance(image, Opened):
        return image.read()
    asked = image if isinstance(image, Picture) else Picture(image, background=background)
    source = asked.source
    name = _name(source)
    try:
        with _opened(source) as opened:
            _check_size(name, *opened.size)
            if asked.orientation == "upright":
                opened = ImageOps.exif_transpose(opened)
            if opened.mode in _DEEP:
                opened = Image.fromarray(_eight_bits(np.asarray(opened)))
            return _rgb(opened, asked.background)
    except (PromptError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise PromptError(
            f"{name} is not an image that Pillow can read. Pass a JPEG or PNG file."
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PromptError(f"{name} is too large ({error}). Scale the picture down.") from None
    except Exception as error:  # decoders of damaged files raise errors of every kind
        state, remedy = "broken or truncated", "Replace the file with a whole one"
        if isinstance(source, Image.Image | IOBase):
            state, remedy = f"closed, {state}", "Open it again, or pass its path"
        why = str(error) or type(error).__name__
        raise PromptError(f"{name} is {state} ({why}). {remedy}.") from error


def _name(source: Any) -> str:
    path = source if isinstance(source, str | Path) else getattr(source, "filename", None)
    return f"'{path}'" if path else "the picture"


@contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """Yield the picture, which is not decoded yet where it is a file."""
    if isinstance(source, str | Path):
        if not Path(source).is_file():
            gone = FileNotFoundError(errno.ENOENT, "no such file", str(source))
            raise PromptError(f"there is no image file '{source}'. Check the path.") from gone
        # Not by its name: Pillow 13 maps some TIFF files into memory and forgets to turn them.
        with Path(source).open("rb") as file:
            yield Image.open(file)
    elif isinstance(source, bytes | IOBase):
        file: Any = BytesIO(source) if isinstance(source, bytes) else source
        yield Image.open(file)
    elif isinstance(source, Image.Image):
        yield source
    else:
        yield Image.fromarray(_eight_bits(_array(source)))


def _array(source: Any) -> np.ndarray:
    if isinstance(source, Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    if not isinstance(source, np.ndarray):
        raise PromptError(
            f"an image must be a path, a PIL image or an array, but got {type(source).__name__}. "
            "Pass the path of a picture."
        )
    return source


def _check_size(name: str, width: int, height: int) -> None:
    if not width or not height:
        raise PromptError(f"{name} is empty ({width} × {height}). Pass at least one pixel.")
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise PromptError(
            f"{name} is too large ({width} × {height} = {width * height:,} pixels, at most "
            f"{most:,}). Scale the picture down, or raise PIL.Image.MAX_IMAGE_PIXELS."
        )
    short, long = sorted((width, height))
    if long / short > LONGEST_RATIO:
        raise PromptError(
            f"{name} is {width} × {height} pixels, so one side is {long / short:,.0f} times the "
            f"other, at most {LONGEST_RATIO}: processors that scale the shorter side would take "
            "gigabytes. Crop or pad the picture."
        )


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Return an array of pixels as uint8, by the range of its type."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or channels not in (0, 1, 2, 3, 4):
        raise PromptError(
            f"an image array must be [height, width] or [height, width, 1 to 4], but is "
            f"{list(pixels.shape)}. Transpose or split it."
        )
    if pixels.size == 0:
        raise PromptError(f"the image is empty ({list(pixels.shape)}). Pass at least one pixel.")
    if pixels.ndim == 3 and channels == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if np.issubdtype(pixels.dtype, np.unsignedinteger) and pixels.dtype.itemsize == 2:
        return (pixels >> 8).astype(np.uint8)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise PromptError(
            f"image pixels must be uint8, uint16 or floats in [0, 1], but are {pixels.dtype}. "
            "Scale them, and convert them with .astype(numpy.uint8)."
        )
    if not np.isfinite(pixels).all():
        raise PromptError(
            f"the image has {int((~np.isfinite(pixels)).sum())} pixel values that are NaN or "
            "infinite. Replace them, for example with numpy.nan_to_num."
        )
    if pixels.min() < 0 or pixels.max() > 1:
        raise PromptError(
            f"float pixels must be in [0, 1], but range from {pixels.min():g} to "
            f"{pixels.max():g}. Divide by 255, or pass uint8."
        )
    finer = pixels.astype(np.result_type(pixels.dtype, np.float32), copy=False)
    return (finer * 255).round().astype(np.uint8)


def _rgb(opened: Image.Image, background: str | None) -> Image.Image:
    clear = opened.mode in _CLEAR or opened.info.get("transparency") is not None
    if background is None or not clear:
        return opened.convert("RGB")
    behind = Image.new("RGBA", opened.size, background)
    return Image.alpha_composite(behind, opened.convert("RGBA")).convert("RGB")


def as_lists(
    image: ImageLike | Sequence[ImageLike] | None,
    question: str | Sequence[str],
    background: str | None = "white",
) -> tuple[list[Image.Image], list[str], bool]:
    """Return images and questions as lists of one length, and whether lists were given.

    One image with several questions is asked all of them; one question is asked of all images.
    ``background`` is behind what is transparent (``read_image``).

    Raises:
        PromptError: if an image is missing, a question is empty, or the lists differ in length.
    """
    if image is None:
        raise PromptError(
            "there is a question but no image. Pass a picture: model.prompt(image, question)."
        )
    images: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
    alone = isinstance(question, str) or not isinstance(question, Iterable)
    questions: list[Any] = [question] if alone else list(question)
    batched = isinstance(image, list | tuple) or not alone
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
    read = [read_image(one, background) for one in images]
    return read * (count // len(read)), questions * (count // len(questions)), batched
