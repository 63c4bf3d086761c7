"""VisFlow: token- and head-level attention intervention, arXiv:2506.12609. There is no public code.

*Tokens* (TAI): in each layer R(j) is what image token j receives from the other image tokens,
averaged over the heads. Tokens with R > max R / 2 are sinks, others with R > max R / 20 salient;
text rows look at them with δ times and k times the weight, renormalised. Left out where the image
comes through a Q-Former, as in the paper.

*Heads* (HAI): heads of which text rows spend more than λ_sys of their attention on the system
prompt look at it with (1 − α_sys) times the weight, in all layers; heads that spend more than
λ_txt on text look at text with (1 − α_txt) times, in the first quarter of the layers (0 to 7 of
32); renormalised. Both are decided on the prompt and kept while generating.

**Departs from the paper**, or decides what our sources do not say: δ, λ and α of the heads are
ours (only k = 20 is known to us); attention of text rows is their mean, a fraction in [0, 1], so
that a threshold does not depend on the length of the question; a sink is not salient as well; R
sums over the rows of the other image tokens; tokens and heads of a layer are judged on the
pattern before either edit; "text" keys are the prompt's text and what was generated.

R is the picture's alone, whatever is asked: where it was read before its questions, a twin of the
model reads it once more for R, and R is kept with it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.engine.row_reading import read_prompt_rows, read_received
from clva_lens.engine.run import running
from clva_lens.engine.session import AttentionCall, Session, required_read_before
from clva_lens.ground.ambient import without_gradients
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import Kernel, Method, edited_rows, register_method
from clva_lens.methods.scores import released_layer, span_keys
from clva_lens.methods.target import Shape, Target
from clva_lens.models.beginning import Beginning, read_beginning
from clva_lens.models.twin import twin

# Shares of the largest R above which a token is a sink, and above which it is salient.
SINK_SHARE, SALIENT_SHARE = 1 / 2, 1 / 20


@register_method
@dataclass(frozen=True, kw_only=True)
class VisFlow(Method):
    """Reweight salient and sink image tokens, and heads that look away from the image.

    It acts on the language model only: a Q-Former's attention to the picture has no rows of image
    tokens, and no text among its keys.

    Args:
        salient: k, the factor on weights of salient image tokens, > 0; 1 changes nothing.
        sink: δ, the factor on weights of sink tokens, > 0; 1 changes nothing.
        system: α_sys, the loss on the system prompt in its heads, in [0, 1).
        text: α_txt, the loss on text in its heads, in [0, 1).
        system_threshold: λ_sys, as a fraction of attention.
        text_threshold: λ_txt, as a fraction of attention.

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.VisFlow()).texts
    ['no']
    """

    name: ClassVar[str] = "visflow"
    paper: ClassVar[str] = "VisFlow, arXiv:2506.12609"
    kernel: ClassVar[Kernel] = "fused + rows"
    sites: ClassVar[tuple[str, ...]] = ("decoder",)
    zero: ClassVar[Mapping[str, Any] | None] = {
        "salient": 1.0,
        "sink": 1.0,
        "system": 0.0,
        "text": 0.0,
    }
    salient: float | int = 20.0
    sink: float | int = 0.5
    system: float | int = 0.5
    text: float | int = 0.5
    system_threshold: float | int = 0.5
    text_threshold: float | int = 0.5

    def __post_init__(self) -> None:
        """Check the parameters."""
        for name in ("salient", "sink"):
            factor = getattr(self, name)
            if not (math.isfinite(factor) and factor > 0):
                raise ParameterError(
                    f"{name} must be a finite factor > 0, but is {factor}. Pass {name}=1.0 for no "
                    "change."
                )
        for name in ("system", "text"):
            if not 0 <= getattr(self, name) < 1:
                raise ParameterError(
                    f"{name} must be in [0, 1), but is {getattr(self, name)}. Pass {name}=0.0 for "
                    "no change."
                )
        for name in ("system_threshold", "text_threshold"):
            if not math.isfinite(getattr(self, name)):
                raise ParameterError(
                    f"{name} must be a fraction of attention, but is {getattr(self, name)}. Pass "
                    f"{name}=0.5."
                )

    def sessions(self, target: Target) -> list[Session]:
        """Return one session; it edits tokens unless the image comes through a Q-Former."""
        tokens = target.at().site == "decoder"
        return [_VisFlowSession(self, target.model, target.at("decoder"), tokens)]


class _Judged(NamedTuple):
    """What a layer's prompt decided; None where the layer is left alone."""

    tokens: Float[Tensor, "batch visual"] | None
    system: Bool[Tensor, "batch head"] | None
    text: Bool[Tensor, "batch head"] | None


class _VisFlowSession(Session):
    leaves_prefix = rereads = True

    def __init__(self, method: VisFlow, model: PreTrainedModel, shape: Shape, tokens: bool) -> None:
        self.method, self.model, self.shape, self.site = method, model, shape, shape.site
        changes = tokens and (method.salient, method.sink) != (1, 1)
        self.token_layers = [i for i in shape.layers if changes and i >= 1]
        self.system_layers = [i for i in shape.layers if method.system > 0]
        end = released_layer(8, shape.depth)
        self.text_layers = list(shape.within(0, end)) if method.text > 0 else []
        edited = {*self.token_layers, *self.system_layers, *self.text_layers}
        self.layers = tuple(sorted(edited))
        self._judged: dict[int, _Judged] = {}

    def attention(self, call: AttentionCall) -> Float[Tensor, "batch _ query key"] | None:
        """Judge the tokens and heads of a prompt; return log-weights on the keys of text rows."""
        if call.layer not in self.layers:
            return None
        if call.step.number == 0:
            self._judged[call.layer] = self._judge(call)
        if call.layer not in self._judged:
            raise InterventionError(
                "VisFlow joined a run whose prompt had been read already, so its tokens and heads "
                "are unknown. Start it before the prompt is read."
            )
        judged = self._judged[call.layer]
        if judged == (None, None, None):
            return None
        weights = self._log_weights(call, judged)
        rows = rearrange(edited_rows(call, "text"), "b q -> b 1 q 1")
        return rearrange(weights, "b h k -> b h 1 k").where(rows, 0.0)

    @without_gradients
    def _judge(self, call: AttentionCall) -> _Judged:
        method, layer = self.method, call.layer
        tokens = system = text = None
        if layer in self.token_layers:
            received = read_received(call) if call.step.offset == 0 else self._received(call)
            largest = received.amax(dim=1, keepdim=True)
            tokens = torch.zeros_like(received)
            tokens[received > SALIENT_SHARE * largest] = math.log(method.salient)
            tokens[received > SINK_SHARE * largest] = math.log(method.sink)
        if layer in self.system_layers or layer in self.text_layers:
            rows = read_prompt_rows(call)
            if layer in self.system_layers:
                system = rows.system > method.system_threshold
            if layer in self.text_layers:
                text = rows.text > method.text_threshold
        heads = (one if one is not None and one.any() else None for one in (system, text))
        return _Judged(tokens, *heads)

    def _received(self, call: AttentionCall) -> Float[Tensor, "batch visual"]:
        """Return R of a picture that was read before."""
        before, rows = required_read_before(call.step)
        known = before.once(self.model, _Received, self._reread)
        return known[call.layer][rows]

    def _reread(self, before: Beginning) -> dict[int, Float[Tensor, "picture visual"]]:
        """Return R of each layer as a twin of the model reads a beginning once more."""
        other, session = twin(self.model), _Received(self.shape)
        with running(other, [session]):
            read_beginning(other, before.inputs, before.spans)
        return session.found

    def _log_weights(self, call: AttentionCall, judged: _Judged) -> Float[Tensor, "batch _ key"]:
        """Return the log-weight of each key, for each head if some heads differ."""
        spans, method = call.step.spans, self.method
        batch, keys = call.query.shape[0], call.key.shape[2]
        weights = torch.zeros(batch, 1, keys, dtype=torch.float32, device=call.query.device)
        if judged.tokens is not None:
            weights.scatter_(2, rearrange(call.step.visual, "b v -> b 1 v"), judged.tokens[:, None])
        for heads, loss, span in (
            (judged.system, method.system, spans.system),
            (judged.text, method.text, spans.text | spans.generated),
        ):
            if heads is not None:
                lost = rearrange(heads, "b h -> b h 1") & rearrange(
                    span_keys(call, span), "b k -> b 1 k"
                )
                weights = weights + lost.float() * math.log1p(-loss)
        return weights


class _Received(Session):
    """What each image token receives from the others, in the pass that reads them."""

    looks_ahead = leaves_prefix = True

    def __init__(self, shape: Shape) -> None:
        self.site, self.layers = shape.site, shape.layers
        self.found: dict[int, Float[Tensor, "picture visual"]] = {}

    def attention(self, call: AttentionCall) -> None:
        """Read a layer."""
        self.found[call.layer] = read_received(call)
