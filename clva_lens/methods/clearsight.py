"""ClearSight (VAF, visual amplification fusion): arXiv:2503.13107, ustc-hyin/ClearSight.

In the middle layers the scores l = q·k/√d of text rows are scaled before the softmax: l · 1.15 at
image tokens and l · 0.95 at what stands before the image, the system prompt and the BOS token. As a
bias that is (c − 1)·l, for every head.

``variant="released"`` is what the public code computes (single commit, 2024-12-18; its own part has
no licence, so this is written from the mathematics): all heads. ``variant="paper"`` scales only
"visual perception heads", the half of each layer's heads with the most attention to the image,
which the public code leaves out; notes on the paper quote its coefficients as 0.15 and 0.1, one
as 0.1 and 0.15.

Two things to know. A negative score is made *more* negative by "enhancement", since l is scaled
and not shifted. And the BOS token is where most attention goes, so that its × 0.95 may be the
larger part of the effect.

**Departs from the paper:** the head ranking, of which only "top 50 %" is known, is by Eq. 1 of
arXiv:2603.25088v1 on the prompt, layer by layer. In a Q-Former, where nobody has tried it, all
queries are edited and the system is the CLS token.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.engine.row_reading import read_prompt_rows
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.ambient import without_gradients
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import (
    Kernel,
    Method,
    Variant,
    check_layers,
    check_variant,
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
from clva_lens.models.step import Step


@register_method
@dataclass(frozen=True, kw_only=True)
class ClearSight(Method):
    """Scale the scores of image and system keys in the middle layers; layers are 0-based.

    Args:
        enhance: the factor on scores of image keys, >= 0; 1 changes nothing.
        suppress: the factor on scores of system keys, >= 0; 1 changes nothing. None is 0.95, and
            0.9 in the paper's variant.
        variant: "released", or "paper" (see above).
        layers: the edited layers; None is 9 to 14, in stacks of fewer than 32 layers those at the
            same fractions of the depth (3 to 5 of 12).
        site: where; the language model's "decoder" as in the paper, or a "qformer".

    Raises:
        ParameterError: if a factor is negative or infinite, or the variant unknown.
    """

    name: ClassVar[str] = "clearsight"
    paper: ClassVar[str] = "ClearSight (VAF), arXiv:2503.13107"
    kernel: ClassVar[Kernel] = "fused + rows"
    zero: ClassVar[Mapping[str, Any] | None] = {"enhance": 1.0, "suppress": 1.0}
    enhance: float | int = 1.15
    suppress: float | int | None = None
    variant: Variant = "released"
    layers: Sequence[int] | None = None
    site: str = "decoder"

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_variant(self.variant)
        for name, factor in zip(("enhance", "suppress"), self.factors, strict=True):
            if not (math.isfinite(factor) and factor >= 0):
                raise ParameterError(
                    f"{name} must be a finite factor >= 0, but is {factor}. Pass {name}=1.0 for no "
                    "change."
                )

    @property
    def factors(self) -> tuple[float | int, float | int]:
        """The factors on scores of image keys and of system keys."""
        default = 0.95 if self.variant == "released" else 0.9
        return self.enhance, default if self.suppress is None else self.suppress

    def sessions(self, target: Target) -> list[Session]:
        """Return one session for the layers of this model."""
        shape = target.at(self.site)
        layers: Sequence[int] | None = self.layers
        if layers is None:
            first, end = released_layer(9, shape.depth), released_layer(15, shape.depth)
            layers = shape.within(first, max(end, first + 1))
        return [_ClearSightSession(self, shape.site, check_layers("layers", layers, shape))]


class _ClearSightSession(Session):
    leaves_prefix = True
    compiles = True

    def __init__(self, method: ClearSight, site: str, layers: tuple[int, ...]) -> None:
        self.method, self.site, self.layers = method, site, layers
        self.passive = method.factors == (1, 1)
        self._heads: dict[int, Bool[Tensor, "batch head"]] = {}
        self._scale: tuple[Step, Float[Tensor, "batch 1 1 key"]] | None = None

    def attention(self, call: AttentionCall) -> Float[Tensor, "batch head query key"] | None:
        """Return (c − 1)·l at image and system keys of text and generated rows."""
        if call.layer not in self.layers or self.passive:
            return None
        perceiving = self._perceiving(call) if self.method.variant == "paper" else None
        if self._scale is None or self._scale[0] is not call.step:
            self._scale = (call.step, self._factors(call))
        change = self._change(self._scale[1], perceiving)
        if call.is_step:
            return single_row_score_bias(call, change)
        return score_bias(call, edited_rows(call, "text"), change)

    def compiled_step(
        self, call: AttentionCall, seen: dict[Any, Any]
    ) -> Float[Tensor, "batch head 1 key"] | None:
        """Return the same for the only row."""
        if self.passive:
            return None
        perceiving = self._heads[call.layer] if self.method.variant == "paper" else None
        if "scale" not in seen:
            seen["scale"] = self._factors(call)
        return single_row_score_bias(call, self._change(seen["scale"], perceiving))

    def _factors(self, call: AttentionCall) -> Float[Tensor, "batch 1 1 key"]:
        """Return c − 1 of each key: the same in all layers of a pass."""
        spans = call.step.spans
        image, system = (factor - 1 for factor in self.method.factors)
        on_image = image * span_keys(call, spans.image).float()
        scale = on_image + system * span_keys(call, spans.system).float()
        return scale[:, None, None]

    def _change(
        self,
        scale: Float[Tensor, "batch 1 1 key"],
        perceiving: Bool[Tensor, "batch head"] | None,
    ) -> Callable[[Tensor], Tensor]:
        if perceiving is not None:
            scale = scale * rearrange(perceiving, "b h -> b h 1 1")

        def change(scores: Float[Tensor, "batch head row key"]) -> Tensor:
            return (scale * scores).where(scale != 0, 0.0)

        return change

    @without_gradients
    def _perceiving(self, call: AttentionCall) -> Bool[Tensor, "batch head"]:
        """Return the half of the heads with the most attention to the image, on the prompt."""
        if call.step.number == 0:
            mass = read_prompt_rows(call).image
            chosen = torch.zeros_like(mass, dtype=torch.bool)
            best = mass.topk(max(1, mass.shape[1] // 2), dim=1).indices
            self._heads[call.layer] = chosen.scatter_(1, best, True)
        if call.layer not in self._heads:
            raise InterventionError(
                "ClearSight joined a run whose prompt had been read already, so the paper's "
                "visual perception heads are unknown. Start it before the prompt is read."
            )
        return self._heads[call.layer]
