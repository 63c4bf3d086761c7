"""ASCD, attention-steerable contrastive decoding (arXiv:2506.14766).

Two passes, both steered, in the row that a token is predicted from, on its scores l before the
softmax, in all layers:

    positive:  l_j + p·|l_j|   at image keys j, in text-centric heads;
    negative:  l_j − n·|l_j|   at the tenth of image keys with the largest scores, in all heads,

a tenth being that of each head and row (57 of 576). Then (1 + α)·l⁺ − α·l⁻ for tokens with
l⁺ ≥ max l⁺ + ln β. No pass is left as it is. p = 0.625, n = 1 (so that a positive score becomes 0),
α = 1, β = 0.1.

Text-centric heads look most at text for what they look at the image. The paper ranks heads by that
on 500 pictures and takes the 32 of 1024 that lead most often: ``heads`` of
``cl.text_centric_heads(model, prompts)``.

**Departs from it**: without ``heads``, each prompt finds its own, in each layer 1 of 32 heads (one
at least), by the attention of its text rows to text over that to the image. The official repository
could not be read: the formulas are those of a derivative (feibinuonuo/dg-ascd-repro). The signs
switched off there (system and text keys) are left out. Each generated row has its own tenth. α = 0
leaves the negative pass out, with the cut-off; p = 0 the positive steering. A bias under fused
kernels; twice the passes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.engine.row_reading import read_prompt_rows
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.ambient import without_gradients
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import BiasSession, Kernel, Method, edited_rows, register_method
from clva_lens.methods.contrast import ContrastRule, ContrastSession, same
from clva_lens.methods.scores import score_bias, span_keys
from clva_lens.methods.target import Shape, Target, shape_of
from clva_lens.science.heads import SomeHeads, named_heads

# Of a layer's heads, one of so many is text-centric; of a row's image keys, this share is lowered.
ONE_OF, SHARE = 32, 0.1


@register_method
@dataclass(frozen=True, kw_only=True)
class ASCD(Method):
    """Attention-steerable contrastive decoding.

    Args:
        alpha: α, the strength of the contrast, >= 0; 0 leaves it out.
        beta: β of the cut-off, in [0, 1].
        positive: p, by how much of their size text-centric heads' scores of the image are raised,
            >= 0.
        negative: n, by how much the largest scores of the second pass are lowered, >= 0.
        heads: the text-centric heads: pairs (layer, head), {layer: [heads]} or a mask, such as
            ``cl.text_centric_heads(model, prompts).heads``. None: each prompt's own (see above).

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.ASCD(heads=[(5, 0), (7, 1)])).texts
    ['no']
    """

    name: ClassVar[str] = "ascd"
    paper: ClassVar[str] = "ASCD, arXiv:2506.14766"
    kernel: ClassVar[Kernel] = "fused + rows"
    forwards: ClassVar[float | int] = 2
    sites: ClassVar[tuple[str, ...]] = ("decoder",)
    zero: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0, "positive": 0.0}
    alpha: float | int = 1.0
    beta: float | int = 0.1
    positive: float | int = 0.625
    negative: float | int = 1.0
    heads: SomeHeads | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, usual in (("positive", 0.625), ("negative", 1.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ParameterError(
                    f"{name} must be a finite number >= 0, but is {value}. Pass {name}={usual}."
                )
        if self.heads is not None:
            object.__setattr__(self, "heads", named_heads(self.heads))
        self._rule()

    def _rule(self) -> ContrastRule:
        return ContrastRule(strength=self.alpha, beta=self.beta)

    def sessions(self, target: Target) -> list[Session]:
        """Return the positive steering, and the contrast with the negative one.

        Raises:
            InterventionError: if there is a contrast, and the language model is an encoder-decoder.
            ParameterError: if a head does not exist.
        """
        shape = target.at("decoder")
        sessions: list[Session] = [_Positive(self, shape)]
        if not self._rule().is_identity:
            contrast = ContrastSession(target.model, same, self._rule(), self._lowered)
            sessions.append(contrast)
        return sessions

    def _lowered(self, model: PreTrainedModel) -> list[Session]:
        layers = shape_of(model, "decoder").layers
        return [BiasSession("decoder", layers, self._negative, leaves_prefix=True)]

    def _negative(self, call: AttentionCall) -> Float[Tensor, "batch head query key"] | None:
        """Return −n·|l| at the largest scores of each head and row."""
        if self.negative == 0:
            return None
        count = max(1, int(SHARE * call.step.visual.shape[1]))

        def change(scores: Tensor) -> Tensor:
            largest = call.step.on_image(scores).topk(count, dim=-1)
            where = call.step.visual[:, None, None].expand(*scores.shape[:3], -1)
            where = where.to(scores.device).gather(-1, largest.indices)
            less = -self.negative * largest.values.abs()
            return torch.zeros_like(scores).scatter_(-1, where, less)

        return score_bias(call, edited_rows(call, "last"), change)


class _Positive(Session):
    """Raises the scores of text-centric heads, in the first pass only."""

    leaves_prefix = True
    prompt_only = True  # the second pass is steered the other way

    def __init__(self, method: ASCD, shape: Shape) -> None:
        self.method, self.site, self.layers = method, shape.site, shape.layers
        self._given: dict[int, Bool[Tensor, " head"]] | None = None
        if method.heads is not None:
            mask = shape.head_mask(method.heads)
            self._given = dict(zip(shape.layers, mask, strict=True))
        self._found: dict[int, Bool[Tensor, "batch head"]] = {}

    def end(self) -> None:
        """Forget the prompt's heads."""
        self._found.clear()

    def attention(self, call: AttentionCall) -> Float[Tensor, "batch head query key"] | None:
        """Return p·|l| at the image keys of the rows that predict a token."""
        strength = self.method.positive
        if strength == 0:
            return None
        heads = self._heads(call)
        image = span_keys(call, call.step.spans.image)
        chosen = rearrange(heads, "b h -> b h 1 1") & rearrange(image, "b k -> b 1 1 k")

        def change(scores: Tensor) -> Tensor:
            return (strength * scores.abs()).where(chosen, 0.0)

        return score_bias(call, edited_rows(call, "last"), change)

    @without_gradients
    def _heads(self, call: AttentionCall) -> Bool[Tensor, "batch head"]:
        batch, count = call.query.shape[:2]
        if self._given is not None:
            return self._given[call.layer].to(call.query.device).expand(batch, -1)
        if call.step.number == 0:
            rows = read_prompt_rows(call)
            ratio = rows.text / rows.image.clamp_min(torch.finfo(rows.image.dtype).tiny)
            found = ratio.topk(max(1, round(count / ONE_OF)), dim=1).indices
            mask = torch.zeros_like(ratio, dtype=torch.bool).scatter_(1, found, True)
            self._found[call.layer] = mask
        if call.layer not in self._found:
            raise InterventionError(
                "ASCD joined a run whose prompt had been read already, so its text-centric heads "
                "are unknown. Start it before the prompt is read, or pass heads=."
            )
        return self._found[call.layer]
