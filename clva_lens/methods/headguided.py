"""Heads-guided intervention of "Devils in middle layers" (arXiv:2411.16724; release at a0622a9).

In the middle layers, the row that a token is predicted from looks harder at what the heads have in
common: at image keys j, the scores before the softmax become

    l_hj + α · mean over heads h′ of |l_h′j|,

in all heads. It is PAI with the size of a score averaged over the heads. α = 0.5; layers 5 to 18 of
32 as in the release's script for captions (its function, called as its README does, ends at 17).

**Departs from the release** (ZhangqiJiang07/middle_layers_indicating_hallucinations), which has
layers of 32: of smaller depths, the same part is taken. Whether the paper says otherwise was not
checked: its text was not at hand.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.errors import ParameterError
from clva_lens.methods.base import (
    BiasSession,
    Kernel,
    Method,
    check_layers,
    edited_rows,
    register_method,
)
from clva_lens.methods.scores import (
    released_layer,
    score_bias,
    single_row_score_bias,
    span_keys,
)
from clva_lens.methods.target import Target

FIRST, END = 5, 19


@register_method
@dataclass(frozen=True, kw_only=True)
class HeadGuided(Method):
    """Raise scores of image keys by their mean size over the heads, in middle layers.

    Args:
        alpha: α, finite; 0 changes nothing, below 0 lowers the scores.
        layers: the edited layers, 0-based; None is 5 to 18 of 32, and that part of other depths.

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.HeadGuided(alpha=0.5)).texts
    ['no']
    """

    name: ClassVar[str] = "head-guided"
    paper: ClassVar[str] = "Devils in middle layers, arXiv:2411.16724"
    kernel: ClassVar[Kernel] = "fused + rows"
    sites: ClassVar[tuple[str, ...]] = ("decoder",)
    zero: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}
    alpha: float | int = 0.5
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if not math.isfinite(self.alpha):
            raise ParameterError(f"alpha must be finite, but is {self.alpha}. Pass alpha=0.5.")

    def sessions(self, target: Target) -> list[Session]:
        """Return one session for the layers of this model."""
        shape = target.at("decoder")
        layers: Sequence[int] | None = self.layers
        if layers is None:
            ends = (released_layer(one, shape.depth) for one in (FIRST, END))
            layers = shape.within(*ends)
        chosen = check_layers("layers", layers, shape)
        return [BiasSession(shape.site, chosen, self._bias, row=self._row, leaves_prefix=True)]

    def _bias(self, call: AttentionCall) -> Float[Tensor, "batch head query key"] | None:
        """Return the bias of the rows that predict a token."""
        if self.alpha == 0:
            return None
        return score_bias(call, edited_rows(call, "last"), self._change(call))

    def _row(self, call: AttentionCall) -> Float[Tensor, "batch head 1 key"] | None:
        """Return the same for a pass's only row, a generated one."""
        return None if self.alpha == 0 else single_row_score_bias(call, self._change(call))

    def _change(self, call: AttentionCall) -> Callable[[Tensor], Tensor]:
        image = span_keys(call, call.step.spans.image)[:, None, None]

        def change(scores: Tensor) -> Tensor:
            shared = scores.abs().mean(dim=1, keepdim=True).expand_as(scores)
            return (self.alpha * shared).where(image, 0.0)

        return change
