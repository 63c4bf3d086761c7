"""ViCrop, a second look at where the question looks (arXiv:2502.17422; saccharomycetes/mllms_know).

The answer is given to two pictures, the one that was asked about and a crop of it, enlarged. Where
to crop is told by relative attention: with A(q) the last prompt row's attention to the image tokens
in one layer, the mean over its heads, and q′ a question about nothing,

    M = A(q) / A(q′)   on the grid of image tokens.

Windows of side ρ·w pixels, ρ = 1, 1.2 … 2, are moved over M, whole cells at a time (as many as lie
within the side). With S the largest sum of M in a window and S̄ the mean of those in the windows
beside it (left, right, above, below, as far as there are), the ρ is chosen whose

    (S − S̄) / cells of the window

is largest: where the sum falls off most steeply. The crop is a square of side ρ·w around that
window's middle, moved into the picture. A window that covers the picture is left out; if the
smallest does, the crop is the whole picture. Of equal sums the leftmost window is taken, then the
highest.

**Departs from the release** at a64c5d5, whose cropping was read in a public copy of its file: it
crops the photo itself, w = 336 of its pixels, so that the crop shows what the model's own picture
is too coarse for; a run of a method holds the picture as the model is given it, and w is half of
its shorter side. The crop's image tokens follow the picture's at once. Both maps are read without
other methods, and a token that neither question looks at has M = 0, where there 0 is divided by 0.
Layer 14 of 32 lies at the same fraction of other depths. Words of q′ that a tokenizer does not know
(the toys') are read as unknown ones: give ``general`` one of its own. The release decodes greedily;
beams and sampling work too. Its other maps (gradients) are not here.

Attention is left alone; two passes of the prompt more, and a pass of the longer one for each token
beside the model's own, whose logits are not used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from clva_lens.engine.run import running
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.ambient import without_gradients
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import Kernel, Method, check_layers, register_method
from clva_lens.methods.branch import Logits
from clva_lens.methods.contrast import ContrastSession
from clva_lens.methods.scores import released_layer
from clva_lens.methods.target import Target
from clva_lens.models.family import Inputs, find_family
from clva_lens.models.twin import twin

RATIOS = (1, 1.2, 1.4, 1.6, 1.8, 2)
LAYER, GENERAL = 14, "Write a general description of the image."
"""The release's: the layer whose attention is asked, of 32, and q′."""
ALONE = {"input_ids", "attention_mask", "pixel_values"}


class Box(NamedTuple):
    """A part of a picture in pixels, the first inside and the last outside."""

    left: int
    top: int
    right: int
    bottom: int


@register_method
@dataclass(frozen=True, kw_only=True)
class ViCrop(Method):
    """Ask about the picture and a crop of it; it needs the model's processor.

    Args:
        window: w, the smallest crop's side over the picture's shorter side, in (0, 1]; 1 shows the
            whole picture twice.
        layer: the layer whose attention is asked, 0-based. None: 14 of 32, the same part of others.
        general: q′, the question about nothing; the default is the release's.

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.ViCrop(window=0.5)).texts
    ['no']
    """

    name: ClassVar[str] = "vicrop"
    paper: ClassVar[str] = "ViCrop, arXiv:2502.17422"
    kernel: ClassVar[Kernel] = "fused + rows"
    forwards: ClassVar[float | int] = 2
    sites: ClassVar[tuple[str, ...]] = ()
    extended: ClassVar[tuple[str, ...]] = ("beam", "sampling")
    zero: ClassVar[Mapping[str, Any] | None] = None
    window: float | int = 0.5
    layer: int | None = None
    general: str = GENERAL

    def __post_init__(self) -> None:
        """Check what needs no model."""
        if not 0 < self.window <= 1:
            raise ParameterError(
                f"window must be in (0, 1], but is {self.window}. Pass window=0.5."
            )
        check_general(self.general)

    def sessions(self, target: Target) -> list[Session]:
        """Return what answers to both pictures.

        Raises:
            InterventionError: if the model has no processor, reads a picture by queries, or has an
                encoder-decoder.
            ParameterError: if there is no such layer.
        """
        model, processor = target.model, target.processor
        shape = target.at()
        if shape.site != "decoder":
            raise InterventionError(
                "ViCrop shows two pictures and asks where on a grid a question looks, but this "
                f"{type(model).__name__} reads one picture by queries, which lie on no part of it. "
                "Use a model whose decoder reads patches."
            )
        if processor is None:
            raise InterventionError(
                "ViCrop has to tokenize its general question, but a bare transformers model has no "
                "processor. Pass the model that cl.load((hf_model, processor)) returns."
            )
        layer = released_layer(LAYER, shape.depth) if self.layer is None else self.layer
        (layer,) = check_layers("layer", (layer,), shape)
        second = _Both(self, model, processor, layer)
        return [ContrastSession(model, second, _Instead(), whole=True)]


class _Instead:
    """The rule: what is said of both pictures takes the place of the model's own logits."""

    def uncut(self, own: Logits, *others: Logits, token: int = 1) -> Logits:
        """Return the second input's."""
        return others[0].to(own)

    def cut(self, own: Logits, contrast: Logits) -> Logits:
        """Return them as they are."""
        return contrast


class _LastRow(Session):
    """Keeps the last prompt row's attention to the image tokens, the mean over heads."""

    site = "decoder"

    def __init__(self, layer: int) -> None:
        self.layers = (layer,)
        self.found: Float[Tensor, "batch visual"] | None = None

    def attention(self, call: AttentionCall) -> None:
        """Read a row; nothing is edited."""
        count = call.query.shape[2]
        self.found = call.step.on_image(call.rows(count - 1, count))[:, :, 0].mean(dim=1)


@dataclass(frozen=True, eq=False)
class _Both:
    """Makes the prompt about the picture and its crop."""

    method: ViCrop
    model: PreTrainedModel
    processor: Any
    layer: int

    @without_gradients
    def __call__(self, inputs: Inputs) -> Inputs:
        pixels = inputs["pixel_values"]
        if pixels.ndim != 4 or set(inputs) - ALONE or len(pixels) != len(inputs["input_ids"]):
            more = ", ".join(sorted(set(inputs) - ALONE)) or f"{pixels.ndim} axes"
            raise InterventionError(
                "ViCrop takes one square picture a prompt and shows a second one beside it, but "
                f"this model is given pictures otherwise (pixel_values with {more}). Use a model "
                "that takes each picture as one square, such as LLaVA-1.5."
            )
        relative = self._relative(inputs)
        size = (pixels.shape[3], pixels.shape[2])
        shown = torch.stack(
            [
                cropped(one, crop_box(m, size, self.method.window * min(size)))
                for one, m in zip(pixels, relative, strict=True)
            ]
        )
        both = rearrange([pixels, shown], "two b c h w -> (b two) c h w")
        image = find_family(self.model).image_token_id(self.model)
        rows = []
        for ids in _real(inputs):
            last = _last(ids, image)
            rows.append(torch.cat([ids[: last + 1], ids[ids == image], ids[last + 1 :]]))
        return self._padded(rows) | {"pixel_values": both}

    def _relative(self, inputs: Inputs) -> Float[Tensor, "batch row column"]:
        """Return M."""
        family = find_family(self.model)
        image = family.image_token_id(self.model)
        placeholder = str(getattr(self.processor, "image_token", "<image>"))
        asked = family.ask(self.processor, self.method.general, None).split(placeholder)[-1]
        words = self.processor.tokenizer(asked, add_special_tokens=False).input_ids
        rows = [
            torch.cat([ids[: _last(ids, image) + 1], ids.new_tensor(words)])
            for ids in _real(inputs)
        ]
        own, general = (
            self._attention(one)
            for one in (inputs, self._padded(rows) | {"pixel_values": inputs["pixel_values"]})
        )
        grid = family.grid(self.model, "decoder")
        if own.shape[1] != grid[0] * grid[1]:
            raise InterventionError(
                f"ViCrop needs one image token for each cell of a grid of {grid[0]} × {grid[1]}, "
                f"but the prompt has {own.shape[1]}. Ask about one picture."
            )
        return over_general(own, general).unflatten(1, grid)

    def _attention(self, inputs: Inputs) -> Float[Tensor, "batch visual"]:
        other, row = twin(self.model), _LastRow(self.layer)
        with running(other, [row]):
            other(**inputs, use_cache=False, logits_to_keep=1)
        assert row.found is not None
        return row.found

    def _padded(self, rows: list[Int[Tensor, " position"]]) -> Inputs:
        """Return rows as a batch with padding on the left."""
        pad = self.processor.tokenizer.pad_token_id or 0
        ids, mask = (
            pad_sequence(one, batch_first=True, padding_value=value, padding_side="left")
            for one, value in ((rows, pad), ([torch.ones_like(row) for row in rows], 0))
        )
        return {"input_ids": ids, "attention_mask": mask}


def check_general(general: str) -> None:
    """Raise ParameterError if q′ says nothing."""
    if not general.strip():
        raise ParameterError("general is empty. Pass a question about no object.")


def over_general(
    own: Float[Tensor, "batch visual"], general: Float[Tensor, "batch visual"]
) -> Float[Tensor, "batch visual"]:
    """Return A(q) / A(q′), 0 where q does not look."""
    return torch.where(own > 0, own / general.clamp(min=torch.finfo(own.dtype).tiny), 0.0)


def _real(inputs: Inputs) -> list[Int[Tensor, " position"]]:
    """Return the tokens of each prompt, without its padding."""
    pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [row[kept.bool()] for row, kept in pairs]


def _last(ids: Int[Tensor, " position"], image: int) -> int:
    return int((ids == image).nonzero()[-1])


def crop_box(
    values: Float[Tensor, "row column"], size: tuple[int, int], window: float | int
) -> Box:
    """Return the box of the module's docstring in a picture of ``size`` (width, height).

    Args:
        values: M, the map.
        size: of the picture, in pixels.
        window: w, in pixels.

    >>> crop_box(torch.eye(4), (64, 64), 32)
    Box(left=0, top=0, right=32, bottom=32)
    """
    rows, columns = values.shape
    cell = size[0] / columns, size[1] / rows
    best = None
    for ratio in RATIOS:
        wide = max(1, min(int(window * ratio / cell[0]), columns))
        high = max(1, min(int(window * ratio / cell[1]), rows))
        if (wide, high) == (columns, rows):
            if ratio == RATIOS[0]:
                return Box(0, 0, *size)
            continue
        sums = values.double().unfold(0, high, 1).unfold(1, wide, 1).sum(dim=(2, 3))
        x, y = divmod(int(sums.T.argmax()), sums.shape[0])
        near = [(y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x)]
        beside = [
            sums[at] for at in near if 0 <= at[0] < sums.shape[0] and 0 <= at[1] < sums.shape[1]
        ]
        falls = float(sums[y, x] - sum(beside) / len(beside)) / (wide * high)
        if best is None or falls > best[0]:
            best = falls, ratio, (x + wide / 2) * cell[0], (y + high / 2) * cell[1]
    assert best is not None
    half = int(window * best[1] // 2)
    middle = [
        min(max(int(one), half), length - half) for one, length in zip(best[2:], size, strict=True)
    ]
    ends = [
        (max(0, one - half), min(length, one + half))
        for one, length in zip(middle, size, strict=True)
    ]
    return Box(ends[0][0], ends[1][0], ends[0][1], ends[1][1])


def cropped(
    picture: Float[Tensor, "channel height width"], box: Box
) -> Float[Tensor, "channel height width"]:
    """Return a part of a picture, enlarged bilinearly to its size."""
    part = picture[None, :, box.top : box.bottom, box.left : box.right].float()
    size = (picture.shape[1], picture.shape[2])
    grown = functional.interpolate(part, size=size, mode="bilinear", align_corners=False)
    return grown[0].to(picture.dtype)
