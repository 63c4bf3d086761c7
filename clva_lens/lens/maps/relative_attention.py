"""Relative attention: where a question makes a model look more than a general one would.

Zhang et al., arXiv:2502.17422, Sec. 4. With A(q) the last prompt row's attention to the image
tokens in one layer, averaged over its heads, under the question q, and q′ a question about nothing,

    map = A(q) / A(q′)

at least 0, without a unit: 1 where both look alike. ``cl.ViCrop`` crops by it, as the paper does.

**Departs from the paper:** the release divides by what may be 0; a token that the question does not
look at is 0 here. Its layer 14 of 32 lies at the same fraction of other depths.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from clva_lens.ground.errors import PromptError
from clva_lens.lens.load import LensModel
from clva_lens.lens.maps.base import MapFormula, Reading, register_map
from clva_lens.lens.observers import Observer
from clva_lens.methods.scores import released_layer
from clva_lens.methods.vicrop import GENERAL, LAYER, check_general, over_general


@register_map
@dataclass(frozen=True, kw_only=True)
class RelativeAttention(MapFormula):
    """Relative attention.

    Args:
        layer: 0-based; None is the release's 14 of 32, or the same fraction of another depth.
        general: the question about nothing; the default is the release's.

    Raises:
        ParameterError: if the question is empty.
    """

    name: ClassVar[str] = "relative-attention"
    paper: ClassVar[str] = "arXiv:2502.17422"
    explains: ClassVar[bool] = False
    layer: int | None = None
    general: str = GENERAL

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_general(self.general)

    def over(self, reading: Reading) -> Float[Tensor, "batch visual"]:
        """Return the map, from two passes."""
        prompt = reading.prompt
        if not isinstance(reading.handle, LensModel) or not prompt.images:
            raise PromptError(
                "relative attention asks a second question about the photo, but the prompt was not "
                "made of one by the model. Pass model.prompt(image, question), and the model that "
                "cl.load() returned."
            )
        images = list(prompt.images) if prompt.batched else prompt.images[0]
        asked = [self.general] * len(prompt.images) if prompt.batched else self.general
        other = Reading(
            reading.handle,
            reading.handle.prompt(images, asked, system=prompt.system),
            None,
            reading.method,
        )
        own, general = (self._attention(one) for one in (reading, other))
        return over_general(own, general)

    def _attention(self, reading: Reading) -> Float[Tensor, "batch visual"]:
        depth = reading.shape.depth
        layer = released_layer(LAYER, depth) if self.layer is None else self.layer
        observer = Observer([layer], reading.shape)
        reading.run(observer)
        return observer.trace(batched=True).maps[:, 0].mean(dim=1)
