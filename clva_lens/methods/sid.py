"""SID, self-introspective decoding (arXiv:2408.02032; huofushuo/SID at 127dd41, from its formulas).

The second input is the same prompt, of which the model sees only what matters least: from layer 2
on, no row looks at an image token but the k to which the last row of layer 1 pays least attention,
averaged over the heads. Then (1 + α)·l − α·l′ for tokens with l ≥ max l + ln β. k is chosen anew at
each step; the second input has a cache of its own.

k = 100 of LLaVA's 576 image tokens as released for questions (50 for captions); of another number,
the same part. α = 0.5 and β = 0.1: the release's options for them are never passed on.

**Departs from the release**, which samples (its greedy mode takes the largest of the sum *without*
the cut-off): greedy decoding and beams work too, with the cut-off. All of the prompt's rows have
the choice of its last one, and each generated row its own, so that reading everything again without
a key-value cache gives the same. InstructBLIP's span is off by one there, and is not here. α = 0
edits nothing at all. A bias under fused kernels, which hides tokens and does not leave them out, so
that a token costs two whole passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.ambient import without_gradients
from clva_lens.ground.errors import ParameterError
from clva_lens.methods.base import Kernel, Method, register_method
from clva_lens.methods.contrast import ContrastRule, ContrastSession, same
from clva_lens.methods.target import Target, shape_of

KEPT, OF = 100, 576


@register_method
@dataclass(frozen=True, kw_only=True)
class SID(Method):
    """Contrast with a look at the least important image tokens.

    Args:
        alpha: α, the strength of the contrast, >= 0; 0 edits nothing.
        beta: β of the cut-off, in [0, 1].
        kept: k, >= 1, how many image tokens stay. None: 100 of 576, and that part of other numbers.
        layer: the first layer, 0-based and >= 1, in which only they are seen. None: 2, or the
            second one with attention where none before 2 has any.

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.SID()).texts
    ['no']
    """

    name: ClassVar[str] = "sid"
    paper: ClassVar[str] = "SID, arXiv:2408.02032"
    kernel: ClassVar[Kernel] = "fused + rows"
    forwards: ClassVar[float | int] = 2
    sites: ClassVar[tuple[str, ...]] = ()
    extended: ClassVar[tuple[str, ...]] = ("greedy", "beam")
    zero: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}
    alpha: float | int = 0.5
    beta: float | int = 0.1
    kept: int | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        self._rule()
        if self.kept is not None and self.kept < 1:
            raise ParameterError(f"kept must be at least 1, but is {self.kept}. Pass kept=None.")
        if self.layer is not None and self.layer < 1:
            raise ParameterError(
                f"layer must be at least 1, since the layer before it chooses, but is {self.layer}."
                " Pass layer=2."
            )

    def _rule(self) -> ContrastRule:
        return ContrastRule(strength=self.alpha, beta=self.beta)

    def sessions(self, target: Target) -> list[Session]:
        """Return the contrast; nothing for α = 0.

        Raises:
            InterventionError: if the language model is an encoder-decoder.
            ParameterError: if no layer with attention is left before or after the first one.
        """
        if self._rule().is_identity:
            return []
        layers = target.at("decoder").layers
        first = self.first_of(layers)
        if not (layers[0] < first <= layers[-1]):
            raise ParameterError(
                f"layer={first} needs a layer before it that chooses and one to act in, but "
                f"those with attention are {layers[0]} to {layers[-1]}. Pass one in between."
            )
        return [ContrastSession(target.model, same, self._rule(), self._impair, whole=True)]

    def first_of(self, layers: Sequence[int]) -> int:
        """Return the first layer that sees only them, of those with attention."""
        if self.layer is not None:
            return self.layer
        return 2 if layers[0] < 2 else (*layers, layers[0] + 1)[1]

    def _impair(self, model: PreTrainedModel) -> list[Session]:
        return [_LeastSeen(self, model)]


class _LeastSeen(Session):
    """Hides all image tokens but the least attended ones."""

    site = "decoder"

    def __init__(self, method: SID, model: PreTrainedModel) -> None:
        layers = shape_of(model, "decoder").layers
        self.kept = method.kept
        first = method.first_of(layers)
        self.chooses = max(one for one in layers if one < first)
        self.steady = tuple(one for one in layers if one >= first)
        self.layers = (self.chooses, *self.steady)
        self._bias: Float[Tensor, "batch 1 query key"] | None = None

    def end(self) -> None:
        """Forget the choice."""
        self._bias = None

    def attention(self, call: AttentionCall) -> Float[Tensor, "batch 1 query key"] | None:
        """Choose, or return −∞ on what is hidden."""
        if call.layer == self.chooses:
            self._bias = self._hidden(call)
            return None
        assert self._bias is not None, "the layer that chooses runs before"
        return self._bias.to(call.query.device)

    @without_gradients
    def _hidden(self, call: AttentionCall) -> Float[Tensor, "batch 1 query key"]:
        batch, _, count, _ = call.query.shape
        old = count - call.new_rows
        visual = call.step.visual.to(call.query.device)
        on = {"dtype": torch.float32, "device": call.query.device}
        bias = torch.zeros(batch, 1, count, call.key.shape[2], **on)
        rows = [(0, old, old - 1)] if old else []
        for start, stop, row in (*rows, *((i, i + 1, i) for i in range(old, count))):
            unseen = torch.zeros(visual.shape, **on)
            unseen.masked_fill_(~self._least(call, row), -torch.inf)
            where = rearrange(visual, "b v -> b 1 1 v").expand(-1, -1, stop - start, -1)
            unseen = rearrange(unseen, "b v -> b 1 1 v").expand(where.shape)
            bias[:, :, start:stop].scatter_(3, where, unseen)
        return bias

    def _least(self, call: AttentionCall, row: int) -> Bool[Tensor, "batch visual"]:
        """Return the image tokens that a row looks at least."""
        looked = call.step.on_image(call.rows(row, row + 1))[:, :, 0].mean(dim=1)
        number = looked.shape[1]
        kept = max(1, round(number * KEPT / OF)) if self.kept is None else min(self.kept, number)
        found = looked.topk(kept, dim=1, largest=False).indices
        return torch.zeros_like(looked, dtype=torch.bool).scatter_(1, found, True)
