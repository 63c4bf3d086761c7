"""Integrated gradients on the image tokens: how the answer grows as the picture is let in.

Sundararajan, Taly and Yan, arXiv:1703.01365, Eq. 1. With x[i, c] feature c of image token i as it
enters the decoder, x′ the same of a picture that shows nothing, and y the logit that is explained,

    map_i = Σ_c (x − x′)[i, c] ∫₀¹ ∂y/∂x[i, c] (x′ + s (x − x′)) ds

in logits; below 0 where a token speaks against the answer. The integral is the mean of gradients at
the middles of ``steps`` equal parts. The words stay as they are all the way, and the map adds up to
y(x) − y(x′), but for the error of the mean (completeness): ``cl.image_map`` costs ``steps`` passes
with a backward each, and two more.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clva_lens.engine.stream import Stream
from clva_lens.ground.errors import ParameterError
from clva_lens.lens.maps.base import MapFormula, Reading, register_map
from clva_lens.lens.maps.passes import Entry, slopes


@register_map
@dataclass(frozen=True, kw_only=True)
class IntegratedGradients(MapFormula):
    """Integrated gradients on the image tokens.

    Args:
        steps: how many gradients are averaged.
        baseline: what shows nothing: a "blank" picture of one colour, the mean of the processor's,
            through the vision tower; or tokens of "zero" features, which no picture gives.

    Raises:
        ParameterError: if there is no step, or no such baseline.
    """

    name: ClassVar[str] = "integrated-gradients"
    paper: ClassVar[str] = "arXiv:1703.01365, Eq. 1"
    signed: ClassVar[bool] = True
    steps: int = 32
    baseline: Literal["blank", "zero"] = "blank"

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if self.steps < 1 or self.baseline not in ("blank", "zero"):
            raise ParameterError(
                f"steps is {self.steps} and baseline {self.baseline!r}. Pass steps of at least 1 "
                "and baseline='blank' or 'zero'."
            )

    def over(self, reading: Reading) -> Float[Tensor, "batch visual"]:
        """Return the map."""
        shown = Entry()
        reading.run(shown)
        nothing = torch.zeros_like(shown.entered)
        if self.baseline == "blank":
            empty = Entry()
            reading.run(empty, blank=True)
            nothing = empty.entered
        full, none = (one.detach() for one in (shown.entered, nothing))
        total = torch.zeros_like(full, dtype=torch.float32)
        for step in range(self.steps):
            share = (step + 0.5) / self.steps
            entry = Entry(_Between(none, share))
            wanted = reading.run(entry, gradients=True)
            (slope,) = slopes(wanted, [entry.entered])
            assert slope is not None
            total += slope.float() / self.steps
        grown = total * (full.float() - none.float())
        return shown.of_image(grown).flatten(2).sum(dim=2)


class _Between:
    """Replaces the image tokens by what is ``share`` of the way to them from a baseline."""

    def __init__(self, none: Stream, share: float) -> None:
        self.none, self.share = none, share

    def __call__(self, full: Stream, places: Int[Tensor, "batch visual"]) -> Stream:
        image = torch.zeros(full.shape[:2], dtype=torch.bool, device=full.device)
        image = image.scatter(1, places, True).reshape(*full.shape[:2], *[1] * (full.ndim - 2))
        return torch.where(image, self.none + self.share * (full - self.none), full)
