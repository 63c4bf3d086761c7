"""The visual attention ratio, token by token: the plain attention of middle layers, added up.

Jiang et al., arXiv:2411.16724, Eq. 3. With A_lh the pattern of head h of layer l, and k the row
that writes the answer's first token, the ratio of a head is the sum over image tokens

    VAR(l, h) = Σ_i A_lh[k, i]
    map_i = mean over heads and layers of A_lh[k, i]

so the map adds up to the mean ratio: fractions of attention mass, in [0, 1]. It asks for no answer.
The paper reads ratios, not maps; by layer and head they are ``trace.maps.sum(-1)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from clva_lens.lens.maps.base import MapFormula, Reading, register_map
from clva_lens.lens.observers import Observer
from clva_lens.methods.scores import released_layer


@register_map
@dataclass(frozen=True, kw_only=True)
class VisualRatio(MapFormula):
    """The attention whose sum is the visual attention ratio.

    Args:
        layers: 0-based; None is the release's 5 to 18 of 32, or the same fractions of another
            depth.
    """

    name: ClassVar[str] = "visual-ratio"
    paper: ClassVar[str] = "arXiv:2411.16724, Eq. 3"
    explains: ClassVar[bool] = False
    layers: Sequence[int] | None = None

    def over(self, reading: Reading) -> Float[Tensor, "batch visual"]:
        """Return the map, from one pass."""
        shape = reading.shape
        first, last = (released_layer(one, shape.depth) for one in (5, 18))
        layers = shape.within(first, last + 1) if self.layers is None else self.layers
        observer = Observer(layers, shape)
        reading.run(observer)
        return observer.trace(batched=True).maps.mean(dim=(1, 2))
