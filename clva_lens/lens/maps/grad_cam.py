"""Grad-CAM on the projector: which image tokens have the features that the answer asks more of.

Selvaraju et al., arXiv:1610.02391, Eqs. 1 and 2, with the projector's output in the place of a
convolution's maps. With x[i, c] feature c of image token i as it enters the decoder, and y the
logit that is explained,

    α_c = mean over i of ∂y/∂x[i, c]
    map_i = (Σ_c α_c x[i, c])⁺

at least 0, in logits a token. All of it may be 0: then no token has more of what is asked for.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from clva_lens.lens.maps.base import MapFormula, Reading, register_map
from clva_lens.lens.maps.passes import Entry, slopes


@register_map
@dataclass(frozen=True, kw_only=True)
class GradCam(MapFormula):
    """Grad-CAM on what the projector puts out."""

    name: ClassVar[str] = "grad-cam"
    paper: ClassVar[str] = "arXiv:1610.02391, Eqs. 1-2"

    def over(self, reading: Reading) -> Float[Tensor, "batch visual"]:
        """Return the map, from one pass and one backward."""
        entry = Entry()
        wanted = reading.run(entry, gradients=True)
        (slope,) = slopes(wanted, [entry.entered])
        assert slope is not None
        features, steep = (entry.of_image(one).flatten(2) for one in (entry.entered, slope))
        weights = steep.mean(dim=1, keepdim=True)
        return (weights * features).sum(dim=2).clamp(min=0)
