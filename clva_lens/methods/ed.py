"""ED, ensemble decoding over parts of the picture (arXiv:2505.17529; yjch00/ED at 8580475).

Four more inputs have the same text and one corner of the picture each, enlarged to its size. The
row that predicts a token looks at the four quarters of the picture by shares q: its attention to
each image token is the mean of the 3 largest over the layers, then of the 3 largest over the heads,
and summed over the quarter. With w = softmax(10^τ·q) the model says

    (1 − α)·l + α·l_e,   l_e = Σ w_i·l_i,   for tokens with l_e ≥ max l_e + ln β.

α = β = 0.5, τ = 2. ``fast=True`` is its cheaper form: only the corner that the prompt's last row
looks at most is read beside the picture, for all tokens, as l_e.

**Departs from the release**, which samples and has batches of one (its map is that of the first row
of a batch): greedy decoding and beams work too, and each sample has its own weights. Corners are
cut out of the picture as the model is given it, with sides of 0.75, as 336 of 448 pixels in the
release, which cuts the photo itself (scaled to 448 where it is larger than 672, and else as it is).
Corners overlap, and quarters do not. Pictures are one square of pixels each, and image tokens lie
on it: a Q-Former's, and those of tiles, do not. Attention of all layers is formed for one row. α =
0 edits nothing at all: the cut-off goes with the rest. Five passes for each token, two if it is
fast.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import Kernel, Method, register_method
from clva_lens.methods.branch import Logits
from clva_lens.methods.contrast import ContrastRule, ContrastSession, Second
from clva_lens.methods.target import Target, shape_of
from clva_lens.models.family import Inputs, find_family
from clva_lens.models.norms import wide

# A corner's side, of the picture's; how many layers, and heads, the map is the mean of.
SIDE, MOST = 336 / 448, 3
CORNERS = 4  # left to right, then top to bottom

Pixels = Float[Tensor, "batch channel height width"]


@register_method
@dataclass(frozen=True, kw_only=True)
class ED(Method):
    """Ensemble decoding over four corners of the picture.

    Args:
        alpha: α, the share of the corners, in [0, 1]; 0 edits nothing.
        beta: β of the cut-off, in [0, 1].
        tau: τ, how sharply the best quarter is preferred; finite.
        fast: only the corner that the prompt looks at most is read.

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.ED(fast=True)).texts
    ['no']
    """

    name: ClassVar[str] = "ed"
    paper: ClassVar[str] = "Ensemble Decoding, arXiv:2505.17529"
    kernel: ClassVar[Kernel] = "fused + rows"
    forwards: ClassVar[float | int] = 5
    sites: ClassVar[tuple[str, ...]] = ()
    extended: ClassVar[tuple[str, ...]] = ("greedy", "beam")
    zero: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}
    alpha: float | int = 0.5
    beta: float | int = 0.5
    tau: float | int = 2.0
    fast: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.alpha <= 1:
            raise ParameterError(f"alpha must be in [0, 1], but is {self.alpha}. Pass alpha=0.5.")
        if not math.isfinite(self.tau):
            raise ParameterError(f"tau must be finite, but is {self.tau}. Pass tau=2.")
        ContrastRule(strength=1.0, beta=self.beta)

    def sessions(self, target: Target) -> list[Session]:
        """Return what looks and the ensemble; nothing for α = 0.

        Raises:
            InterventionError: if image tokens do not lie on the picture, or the language model is
                an encoder-decoder.
            PromptError: if they lie on no grid.
        """
        if self.alpha == 0:
            return []
        model = target.model
        if target.at().site != "decoder":
            raise InterventionError(
                "ED weighs quarters of the picture by the attention to their image tokens, but a "
                "Q-Former's queries lie on no part of it. Use a model that reads patches."
            )
        looking = _Quarters(model)
        seconds: Sequence[Second] = [_Corner(number) for number in range(CORNERS)]
        if self.fast:
            seconds = [_Chosen(looking)]
        rule = _Ensemble(self, looking)
        contrast = ContrastSession(model, seconds, rule, whole=self.fast)
        return [looking, contrast]


def corner(pixels: Pixels, number: int) -> Pixels:
    """Return a corner of pictures, enlarged bilinearly to their size.

    Raises:
        InterventionError: if they are no pictures of one square each.
    """
    if pixels.ndim != 4:
        raise InterventionError(
            "ED cuts corners out of pictures, but this model takes them as tiles or patches "
            f"(pixel_values of {pixels.ndim} axes). Use a model that takes one square each."
        )
    size = pixels.shape[2:]
    height, width = (round(SIDE * one) for one in size)
    top = 0 if number < 2 else size[0] - height
    left = 0 if number % 2 == 0 else size[1] - width
    cut = pixels[:, :, top : top + height, left : left + width].float()
    grown = functional.interpolate(cut, size=size, mode="bilinear", align_corners=False)
    return grown.to(pixels.dtype)


@dataclass(frozen=True)
class _Corner:
    number: int

    def __call__(self, inputs: Inputs) -> Inputs:
        return inputs | {"pixel_values": corner(inputs["pixel_values"], self.number)}


class _Quarters(Session):
    """How the last row of a pass looks at the quarters of the picture."""

    site = "decoder"
    edits_output = True  # it edits none, but then sees attention under every method's bias
    leaves_prefix = True
    prompt_only = True  # nobody asks how the corners are looked at

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = shape_of(model, "decoder").layers
        self.grid = find_family(model).grid(model, "decoder")
        self._rows: list[Float[Tensor, "batch head visual"]] = []

    def end(self) -> None:
        """Forget the rows."""
        self._rows = []

    def output(self, call: AttentionCall, out: Float[Tensor, "batch query head width"]) -> None:
        """Keep a layer's last row."""
        if call.layer == self.layers[0]:
            self._rows = []
        count = call.query.shape[2]
        self._rows.append(call.step.on_image(call.rows(count - 1, count))[:, :, 0])

    def shares(self) -> Float[Tensor, "batch corner"]:
        """Return q of the pass that has just been read."""
        device = self._rows[0].device
        rows = torch.stack([one.to(device) for one in self._rows])
        layers = rows.topk(min(MOST, len(rows)), dim=0).values.mean(dim=0)
        looked = layers.topk(min(MOST, layers.shape[1]), dim=1).values.mean(dim=1)
        high, wide_ = self.grid
        if looked.shape[1] != high * wide_:
            raise InterventionError(
                f"ED needs one image token for each cell of a grid of {high} × {wide_}, but the "
                f"prompt has {looked.shape[1]}. Ask about one picture."
            )
        looked = looked.unflatten(1, self.grid)
        parts = [
            reduce(part, "b r c -> b", "sum")
            for rows in (looked[:, : high // 2], looked[:, high // 2 :])
            for part in (rows[:, :, : wide_ // 2], rows[:, :, wide_ // 2 :])
        ]
        return torch.stack(parts, dim=1)


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Takes the corner that the prompt looks at most."""

    looking: _Quarters

    def __call__(self, inputs: Inputs) -> Inputs:
        best: Int[Tensor, " batch"] = self.looking.shares().argmax(dim=1)
        pixels = inputs["pixel_values"]
        corners = torch.stack([corner(pixels, number) for number in range(CORNERS)])
        rows = torch.arange(len(pixels), device=pixels.device)
        return inputs | {"pixel_values": corners[best.to(pixels.device), rows]}


class _Ensemble:
    """The rule: corners weighed by what the row looks at, and cut off by what they say."""

    def __init__(self, method: ED, looking: _Quarters) -> None:
        self.method, self.looking = method, looking
        self._together: Logits | None = None

    def uncut(self, own: Logits, *others: Logits, token: int = 1) -> Logits:
        """Return (1 − α)·l + α·l_e."""
        corners = torch.stack([wide(one) for one in others], dim=1)
        if self.method.fast:
            together = corners[:, 0]
        else:
            shares = self.looking.shares().to(corners)
            weights = (shares * 10**self.method.tau).softmax(dim=1)
            together = (weights[:, :, None] * corners).sum(dim=1)
        self._together = together
        return (1 - self.method.alpha) * wide(own) + self.method.alpha * together

    def cut(self, own: Logits, contrast: Logits) -> Logits:
        """Return it with −∞ where l_e is far below its largest."""
        assert self._together is not None
        return ContrastRule(strength=1.0, beta=self.method.beta).cut(self._together, contrast)
