"""CLVA without head classes: one average over all heads, Eq. 15 of arXiv:2603.25088v1 (B.2).

The paper argues that such an average is a low-pass filter, and does not measure it. **Departs from
the paper** where it is silent: it does not say of which layer the average is, nor whether masks are
averaged (as printed, Z_avg = 1/H Σ Z_h) or maps before they become a mask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.engine.session import Session
from clva_lens.ground.errors import ParameterError
from clva_lens.methods.base import Kernel, Method, Rows, register_method
from clva_lens.methods.clva import CLVA, ClvaSession
from clva_lens.methods.target import Target
from clva_lens.science.anchors import anchor_mask, averaged_log_weights
from clva_lens.science.heads import HeadClasses


@register_method
@dataclass(frozen=True, kw_only=True)
class AveragedAnchors(Method):
    """CLVA with the average of all heads in the place of both anchors; layers are 0-based.

    Args:
        alpha: α of Eq. 15.
        beta: β of Eq. 15; only α − β matters.
        tau: τ of Eq. 9, as CLVA's.
        average: of the heads' "masks", as printed: a token counts by the share of heads whose map
            it stands out of; or of their "maps", of which one mask is made.
        layer: where the heads are read; None is CLVA's positive anchor, L/2 − 2.
        layers: the edited layers; None is every layer after that.
        rows: as CLVA's.
        refresh: as CLVA's.
        site: as CLVA's.

    Raises:
        ParameterError: if a parameter is out of range.
    """

    name: ClassVar[str] = "averaged-anchors"
    paper: ClassVar[str] = "control: CLVA without head classes, arXiv:2603.25088 Eq. 15"
    kernel: ClassVar[Kernel] = "fused + rows"
    zero: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0, "beta": 0.0}
    alpha: float | int = 14.0
    beta: float | int = 0.9
    tau: float | int = 2.0
    average: Literal["masks", "maps"] = "masks"
    layer: int | None = None
    layers: Sequence[int] | None = None
    rows: Rows = "text"
    refresh: Literal["step", "prompt"] = "step"
    site: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model: CLVA's checks, and the average."""
        if self.average not in ("masks", "maps"):
            raise ParameterError(
                f"average must be 'masks' or 'maps', but is {self.average!r}. Pass average='masks'."
            )
        self._as_clva()

    def _as_clva(self, **more: Any) -> CLVA:
        """Return CLVA with the same settings; its anchors are both of one layer."""
        return CLVA(
            alpha=self.alpha,
            beta=self.beta,
            tau=self.tau,
            layers=self.layers,
            rows=self.rows,
            refresh=self.refresh,
            site=self.site,
            **more,
        )

    def sessions(self, target: Target) -> list[Session]:
        """Return one session, which reads all heads of one layer for both anchors."""
        shape = target.at(self.site)
        layer = shape.positive_layer if self.layer is None else self.layer
        method = self._as_clva(positive_layer=layer, negative_layer=layer)
        (made,) = method.sessions(target)
        assert isinstance(made, ClvaSession)
        every = torch.ones(len(shape.layers), shape.heads, dtype=torch.bool)
        none = torch.zeros(len(shape.layers), dtype=torch.bool)
        classes = HeadClasses(every, every, none, none, threshold=None, empty="skip")
        anchors = made.positive_layer, made.negative_layer
        kind = ClvaSession if self.average == "maps" else _AveragedSession
        return [kind(method, shape, anchors, tuple(made.steady), classes)]


class _AveragedSession(ClvaSession):
    """CLVA's session whose weights are those of one average of masks."""

    def _log_weights(
        self,
        positive: Float[Tensor, "batch *row head visual"],
        negative: Float[Tensor, "batch *row head visual"],
    ) -> Float[Tensor, "batch *row visual"]:
        del negative  # the same layer's
        share = anchor_mask(positive, self.method.tau).float().mean(dim=-2)
        return averaged_log_weights(share, self.method.alpha, self.method.beta)
