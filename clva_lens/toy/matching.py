"""What of a text is in a toy picture, and where: glyphs compared with the picture, without weights.

It stands in for models that match pictures and texts (BLIP's, CLIP's) where a method asks one. It
knows the fourteen glyphs of the toy world, and nothing else.
"""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from clva_lens.toy.scenes import GLYPHS, KINDS

SIZES = (14, 17, 20)  # pixels; glyphs have 13 to 20

Pictures = Float[Tensor, "batch channel height width"]


@cache
def _template(kind: str, size: int) -> Float[Tensor, "1 1 size size"]:
    """Return a glyph without its mean, of norm 1."""
    rows = torch.arange(size) * 8 // size
    ink = torch.from_numpy(GLYPHS[kind])[rows][:, rows].float()
    ink = ink - ink.mean()
    return (ink / ink.norm())[None, None]


def _ink(pictures: Pictures) -> Float[Tensor, "batch 1 height width"]:
    """Return how far each pixel's colour is from the picture's middle one."""
    ground = pictures.flatten(2).median(dim=2).values[:, :, None, None]
    return (pictures - ground).norm(dim=1, keepdim=True)


def kind_maps(pictures: Pictures) -> Float[Tensor, "batch kind height width"]:
    """Return how well each kind's glyph fits, the best of those that cover a pixel; in [−1, 1]."""
    ink, found = _ink(pictures.float()), []
    for size in (one for one in SIZES if one <= min(pictures.shape[2:])):
        ones = torch.ones(1, 1, size, size, dtype=ink.dtype, device=ink.device)
        mean = functional.conv2d(ink, ones) / size**2
        spread = functional.conv2d(ink**2, ones) - size**2 * mean**2
        glyphs = torch.cat([_template(kind, size) for kind in KINDS]).to(ink.device)
        fits = functional.conv2d(ink, glyphs) / (spread.clamp_min(1e-3)).sqrt()
        covered = functional.pad(fits, (size - 1,) * 4, value=-1.0)
        found.append(functional.max_pool2d(covered, size, stride=1))
    return torch.stack(found).amax(dim=0)


def named_kinds(text: str) -> list[int]:
    """Return the kinds that a text names; all if it names none."""
    words = {word.strip(".,?!:").casefold() for word in text.split()}
    return [i for i, kind in enumerate(KINDS) if kind in words] or list(range(len(KINDS)))
