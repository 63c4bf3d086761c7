"""Attention rollout: attention multiplied through the layers, with the stream as one half of it.

Abnar and Zuidema, arXiv:2005.00928, Sec. 3. With Ā_l the mean over heads of layer l's pattern,

    Ã_l = ½ Ā_l + ½ I, its rows divided by their sums
    R   = Ã_L ⋯ Ã_2 Ã_1

and the map is R[last text row, image tokens]: fractions of a whole of 1, what falls on words left
out. Only that row is carried, from the last layer down: r ← r Ã_l, which is exact.

It asks for no answer: it is the same for every token. Queries and keys of all layers are kept.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from clva_lens.ground.errors import ParameterError
from clva_lens.lens.maps.base import MapFormula, Reading, register_map
from clva_lens.lens.maps.passes import Patterns, carried


@register_map
@dataclass(frozen=True, kw_only=True)
class Rollout(MapFormula):
    """Attention rollout.

    Args:
        residual: how much of each layer is the stream itself, in [0, 1]; the paper's is a half.
    """

    name: ClassVar[str] = "rollout"
    paper: ClassVar[str] = "arXiv:2005.00928"
    explains: ClassVar[bool] = False
    residual: float | int = 0.5

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.residual <= 1:
            raise ParameterError(
                f"residual must be in [0, 1], but is {self.residual}. Pass residual=0.5."
            )

    def over(self, reading: Reading) -> Float[Tensor, "batch visual"]:
        """Return the map, from one pass."""
        reading.need_all_layers(self.name)
        patterns = Patterns(reading.shape)
        reading.run(patterns)
        row = patterns.last_row()
        for call in patterns.from_the_top():
            row = row.to(call.query.device)
            row = self.residual * row + (1 - self.residual) * carried(call, row, _mean_of_heads)
            row = row / row.sum(dim=1, keepdim=True)
        return patterns.on_image(row.to(patterns.last_row().device))


def _mean_of_heads(
    rows: Float[Tensor, "batch head piece key"], start: int, stop: int
) -> Float[Tensor, "batch piece key"]:
    return rows.mean(dim=1)
