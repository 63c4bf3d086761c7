"""What heads look at over a data set: means, covariances and drift curves; no map is kept."""

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.parameters import check_several
from clva_lens.ground.progress import progress_bar
from clva_lens.lens.trace import trace_attention
from clva_lens.methods.base import MethodLike
from clva_lens.models.prompt import Asked, as_prompt
from clva_lens.science.drift import CURVES, AttentionDrift, attention_drift
from clva_lens.science.moments import RunningMoments


@dataclass(frozen=True, eq=False)
class TraceStatistics:
    """Moments over the prompts of a data set, in float64.

    ``maps``: of each layer's map of all heads (Eq. 4 of arXiv:2603.25088v1), [layer, visual].
    ``intensity``: of Eq. 1, [layer, head]. ``curves``: of the six curves of ``AttentionDrift`` in
    the order of its fields, [curve, layer]. ``layers`` are 0-based.
    """

    maps: RunningMoments
    intensity: RunningMoments
    curves: RunningMoments
    layers: tuple[int, ...]
    _anchors: tuple[int, int]

    def drift(self) -> tuple[AttentionDrift, AttentionDrift, AttentionDrift]:
        """Return the mean curves, and the lower and the upper end of their 95 % intervals.

        The intervals are normal, mean ± 1.96 standard errors, for each layer by itself; a curve is
        NaN at a layer where it is undefined for a prompt.

        Raises:
            ParameterError: if there were fewer than two prompts.
        """
        half = 1.959964 * self.curves.error
        return (self._curves(0 * half), self._curves(-half), self._curves(half))

    def _curves(self, shift: Float[Tensor, "curve layer"]) -> AttentionDrift:
        positive, negative = self._anchors
        curves = dict(zip(CURVES, self.curves.mean + shift, strict=True))
        return AttentionDrift(
            **curves, positive_layer=positive, negative_layer=negative, layers=self.layers
        )


@undisturbed()
def trace_statistics(
    model: Any,
    prompts: Iterable[Asked],
    method: MethodLike | None = None,
    *,
    site: str | None = None,
    progress: bool = True,
) -> TraceStatistics:
    """Return the moments of ``trace_attention`` over prompts, which may be batches.

    Memory does not grow with the number of prompts: layers × (image tokens)² numbers are kept.

    Args:
        model: what ``cl.load`` returned, or a transformers model.
        prompts: what is read.
        method: what acts meanwhile.
        site: where; None is the family's own.
        progress: whether a bar may be shown.

    Raises:
        ModelLoadError: if no family knows the model.
        ParameterError: if there are no prompts, their numbers of image tokens differ, or the site
            does not exist.

    >>> stats = cl.trace_statistics(model, [prompt, prompt], progress=False)
    >>> stats.maps.covariance.shape
    torch.Size([12, 64, 64])
    """
    check_several("prompts", prompts, "prompts")
    maps, intensity, curves = RunningMoments(), RunningMoments(), RunningMoments()
    layers: tuple[int, ...] = ()
    anchors = (0, 0)
    total = len(prompts) if isinstance(prompts, Sized) else None
    with progress_bar("prompts", total, wanted=progress) as advance:
        for asked in prompts:
            prompt = as_prompt(model, asked)
            trace = trace_attention(model, prompt, method, site=site)
            drift = attention_drift(trace)
            layers, anchors = trace.layers, (drift.positive_layer, drift.negative_layer)
            found = torch.stack([getattr(drift, name) for name in CURVES], dim=-2)
            read = ((maps, trace.saliency()), (intensity, trace.intensity), (curves, found))
            for moments, values in read:
                moments.add(values if prompt.batched else values[None])
            advance(1)
    if maps.count == 0:
        raise ParameterError("there are no prompts. Pass some.")
    return TraceStatistics(maps, intensity, curves, layers, anchors)
