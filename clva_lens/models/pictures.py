"""Pictures as they are given, read into RGB: from files, PIL images, arrays and tensors."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from clva_lens.ground.errors import PromptError

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


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
