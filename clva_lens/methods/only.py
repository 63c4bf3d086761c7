"""ONLY, one-layer intervention (arXiv:2507.00898; zifuwan/ONLY at 109bffe, from its formulas).

A second opinion without a second pass: the heads of one early layer that spread over the text more
than over the picture go, with what they read, straight to the last layer. For the last row of a
pass, with A its pattern in layer 0 [head, key] and each of two spans of keys, text and image:

    A_j := 0 where A_j > mean + s of the span (s with n − 1; one threshold a head);
    H = −Σ_j p_j ln(p_j + 1e-6), p the span's A over its sum;   TVER = H_text / H_image;
    A := 0 in heads whose TVER lies below the heads' mean;   o = W_O · concat_h Σ_j A_hj V_hj,

W_O being layer 0's. The rows are not renormalised. Text keys are all but image tokens, less the
sequence's first (the attention sink, which keeps its weight). In the last layer L, with r what
enters it and h what leaves it, both of the model's own pass,

    x = norm_1(o) + 0.2·r,   y = x + MLP(norm_2(x)),   l′ = W_U (norm(y) + 0.5·norm(h)).

InstructBLIP's release leaves norm_1 out, Qwen-VL's adds 0.2 of layer L's attention output in the
place of r. With d = Σ_v |p_v − p′_v| in [0, 2], p and p′ the softmax of l and l′,

    l + α₁·l′ if d < γ,   (1 + α₂)·l − α₂·l′ otherwise,   for tokens with l ≥ max l + ln β.

**As released**: 0.2 and 0.5, which nothing explains, and thresholds of a head whose text or image
has lost all its weight (H_text = 0, H_image = ∞). InstructBLIP's code takes the pattern without its
causal mask, which is the same in the last row. **Departs from the release**, which samples and has
batches of one: greedy decoding and beams work too, and each sample has its own d. Spans come from
the prompt, where the release counts positions (35 and 576). Statistics of the pattern are float32
whatever the model's type. α₁ = α₂ = 0 edits nothing at all: the cut-off goes with the rest.

Of the paper only the abstract was at hand: whether it says what the code does was not checked.
Attention is left alone; one pass, and an MLP, an output projection and an unembedding of one row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.engine.session import AttentionCall, Session
from clva_lens.engine.stream import Part, Stream, StreamCall
from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import ModelLoadError, ParameterError
from clva_lens.methods.base import Kernel, Method, check_layers, register_method
from clva_lens.methods.contrast import ContrastRule
from clva_lens.methods.scores import span_keys
from clva_lens.methods.target import Target
from clva_lens.models.activations import Readout, Sublayers
from clva_lens.models.family import matching_family
from clva_lens.models.norms import wide
from clva_lens.models.step import Step
from clva_lens.models.twin import twin

# What is added to o in the last layer, and to norm(y) before the unembedding: the release's.
RESIDUAL, FINAL = 0.2, 0.5
TINY = 1e-6  # within the logarithm of the entropies

Logits = Float[Tensor, "batch vocabulary"]


class Way(NamedTuple):
    """How a release goes through the last layer: whether by norm_1, and what ``RESIDUAL`` is of."""

    normed: bool
    added: Part


RELEASED = {"instructblip": Way(False, "resid_pre"), "qwen-vl": Way(True, "attn_out")}
RELEASED_ELSE = Way(True, "resid_pre")


@register_method
@dataclass(frozen=True, kw_only=True)
class ONLY(Method):
    """One-layer intervention. The defaults are those of the release's POPE script.

    Args:
        support: α₁, the weight of l′ where both agree; finite and >= 0.
        contrast: α₂, the strength of the contrast where they do not; finite and >= 0.
        gamma: γ, the distance of the distributions from which on they do not agree, in [0, 2]; 0
            always contrasts. The release's captions and MME have 0.25.
        beta: β of the cut-off, in [0, 1]. The release's MME has 0.4.
        layer: the layer whose heads are read, 0-based, before the last one.

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.ONLY()).texts
    ['no']
    """

    name: ClassVar[str] = "only"
    paper: ClassVar[str] = "ONLY, arXiv:2507.00898"
    kernel: ClassVar[Kernel] = "eager rows"
    sites: ClassVar[tuple[str, ...]] = ()
    extended: ClassVar[tuple[str, ...]] = ("greedy", "beam")
    zero: ClassVar[Mapping[str, Any] | None] = {"support": 0.0, "contrast": 0.0}
    support: float | int = 3.0
    contrast: float | int = 1.0
    gamma: float | int = 0.2
    beta: float | int = 0.1
    layer: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in (("support", self.support), ("contrast", self.contrast)):
            if not (math.isfinite(value) and value >= 0):
                raise ParameterError(
                    f"{name} must be a finite number >= 0, but is {value}. Pass {name}=1.0."
                )
        if not 0 <= self.gamma <= 2:
            raise ParameterError(f"gamma must be in [0, 2], but is {self.gamma}. Pass gamma=0.2.")
        self.rule()

    def rule(self) -> ContrastRule:
        """Return the contrast, and the cut-off."""
        return ContrastRule(strength=self.contrast, beta=self.beta)

    def sessions(self, target: Target) -> list[Session]:
        """Return what reads the layer and decides; nothing for α₁ = α₂ = 0.

        Raises:
            ModelLoadError: if the language model's layers have no names (T5).
            ParameterError: if the decoder has no such layer, or none after it.
        """
        if self.support == self.contrast == 0:
            return []
        shape = target.at("decoder")
        layer = shape.first(self.layer)
        check_layers("layer", (layer,), shape)
        if layer == shape.depth - 1:
            raise ParameterError(
                f"layer={layer} is the decoder's last one, which what it reads goes through. "
                "Pass an earlier one, as layer=0."
            )
        family = matching_family(target.model)
        way = RELEASED_ELSE if family is None else RELEASED.get(family.name, RELEASED_ELSE)
        return [_SecondOpinion(self, (layer, shape.depth - 1), target.readout(), way)]


class _SecondOpinion(Session):
    site = "decoder"
    edits_output = True  # it edits none, but then sees the pattern under every method's bias
    edits_logits = True
    cuts_off = True
    leaves_prefix = True

    def __init__(self, method: ONLY, layers: tuple[int, int], readout: Readout, way: Way) -> None:
        self.method, self.readout, self.way = method, readout, way
        self.layer, last = layers
        self.layers = (self.layer,)
        self.streams = {(way.added, last), ("resid_post", last)}
        self._last: dict[str, Float[Tensor, "batch width"]] = {}
        self._z: Float[Tensor, "batch head_width"] | None = None
        self._parts: Sublayers | None = None

    def begin(self) -> None:
        """Take the modules a second time, without what hangs on them."""
        project, parts = self._sublayers(self.layer).project, self._sublayers(-1)
        feed = tuple(twin(one) for one in parts.feed)
        self._parts = Sublayers(twin(parts.norm), twin(project), twin(parts.norm_feed), feed)
        self._norm, self._unembed = twin(self.readout.norm), twin(self.readout.unembed)

    def _sublayers(self, layer: int) -> Sublayers:
        """Return the modules of a layer.

        Raises:
            ModelLoadError: if it has more in it than the formula.
        """
        found = self.readout.sublayers[layer] if self.readout.sublayers else None
        if found is None:
            raise ModelLoadError(
                f"ONLY goes through a norm, the heads' projection, a norm and an MLP, but layer "
                f"{layer} of this decoder has more or others (gates, norms after its blocks, "
                "experts). Use a model whose layers are as Llama's."
            )
        return found

    def end(self) -> None:
        """Forget what was read, and let go of the modules."""
        self._last.clear()
        self._z = self._parts = self._norm = self._unembed = None

    def output(self, call: AttentionCall, out: Float[Tensor, "batch query head width"]) -> None:
        """Keep what the last row's chosen heads read."""
        if call.layer != self.layer:
            return
        assert call.value is not None
        count, spans = call.query.shape[2], call.step.spans
        pattern = rearrange(call.rows(count - 1, count), "b h 1 k -> b h k")
        text, image = (span_keys(call, span) for span in (text_keys(spans), spans.image))
        kept = textual(pattern, text, image)
        # Query heads of a group share their values.
        grouped = rearrange(kept, "b (g r) k -> b g r k", g=call.value.shape[1])
        read = grouped @ call.value.to(kept.dtype)
        self._z = rearrange(read, "b g r w -> b (g r w)").to(out.dtype)

    def stream(self, call: StreamCall, hidden: Stream) -> None:
        """Keep the last position of the last layer."""
        self._last[call.part] = hidden[:, -1]

    def logits(self, step: Step, logits: Logits) -> Logits:
        """Return the logits with those of the second opinion, cut off."""
        own, other = wide(logits), wide(self._second()).to(logits.device)
        rule = self.method.rule()
        apart = (own.softmax(dim=-1) - other.softmax(dim=-1)).abs().sum(dim=-1, keepdim=True)
        agreed = own + self.method.support * other
        decided = torch.where(apart < self.method.gamma, agreed, rule.uncut(own, other))
        if step.number == 0:
            self.uncut = decided
        return rule.cut(own, decided)

    def _second(self) -> Logits:
        """Return l′."""
        parts, norm, unembed = self._parts, self._norm, self._unembed
        assert parts is not None and norm is not None and unembed is not None
        assert self._z is not None, "layers run before the logits"
        added, leaving = self._last[self.way.added], self._last["resid_post"]
        read = parts.project(self._z).to(added.device)
        if self.way.normed:
            read = parts.norm(read)
        x = read + RESIDUAL * added
        fed = parts.norm_feed(x)
        for module in parts.feed:
            fed = module(fed)
        return unembed(norm(x + fed) + FINAL * norm(leaving))


def text_keys(spans: TokenSpans) -> Bool[Tensor, "batch position"]:
    """Return the keys that are text: no image token, and not the first of the sequence."""
    real = spans.real
    first = real.int().argmax(dim=1, keepdim=True)
    return (real & ~spans.image).scatter(1, first, False)


def textual(
    pattern: Float[Tensor, "batch head key"],
    text: Bool[Tensor, "batch key"],
    image: Bool[Tensor, "batch key"],
) -> Float[Tensor, "batch head key"]:
    """Return a row's weights without what stands out, and without heads of low TVER.

    Weights are fractions of attention mass, in [0, 1]; their sum is no longer 1.
    """
    entropies = []
    for span in (rearrange(text, "b k -> b 1 k"), rearrange(image, "b k -> b 1 k")):
        count = span.sum(dim=-1, keepdim=True)
        mean = pattern.where(span, 0.0).sum(dim=-1, keepdim=True) / count
        squares = (pattern - mean).square().where(span, 0.0).sum(dim=-1, keepdim=True)
        limit = mean + (squares / (count - 1)).sqrt()
        pattern = pattern.masked_fill(span & (pattern > limit), 0.0)
        within = pattern.where(span, 0.0)
        share = within / within.sum(dim=-1, keepdim=True)
        entropies.append(-(share * (share + TINY).log()).sum(dim=-1))
    spread, seen = entropies
    ratio = spread.nan_to_num(nan=0.0) / seen.nan_to_num(nan=torch.inf)
    low = ratio < ratio.mean(dim=-1, keepdim=True)
    return pattern.masked_fill(rearrange(low, "b h -> b h 1"), 0.0)
