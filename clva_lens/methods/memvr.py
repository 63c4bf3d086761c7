"""MemVR, memory-space visual retracing (arXiv:2410.03577; 1zhou-Wang/MemVR at de2e3cf).

Where a middle layer is unsure of the next word, the next layer's FFN is shown the picture again.
After each layer l with start < l < end, h_l of the last position is read out through the final norm
and the unembedding; u is the entropy of its k = 10 largest logits' softmax over ln 10, in [0, 1].
At the first l with u > γ, layer l + 1 puts out, for the FFN's input x (after the norm),

    (1 − r)·FFN(x) + r·s·φ(x Vᵀ) V,   s = mean |FFN(x)| / mean |φ(x Vᵀ) V|,

V being the picture's features as they enter the decoder. At most once a forward pass.

**As released**, all rows of the pass are edited, those of system and image too, and the means are
over the whole pass. **Departs from the release**, which is for one sample and decides for the
batch: each sample decides for itself, over its own rows without padding. The prompt's rows are one
group, which its last row decides for, and each generated row is its own, so that reading
everything again without a key-value cache gives the same. Layers are 5 and 16 of 32 in the release,
whatever the depth; here the same fraction of other depths. φ is the identity as released for LLaVA
and SiLU as released for Qwen-VL, which ``variant="paper"`` takes: that the paper has an activation
φ is remembered, and which one was not checked against its text. The retrieval is formed in float32.
Attention is left alone; one pass, and a row of logits for each layer that is asked.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from clva_lens.engine.session import Session
from clva_lens.engine.stream import Stream, StreamCall
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import Kernel, Method, Variant, check_variant, register_method
from clva_lens.methods.target import Target
from clva_lens.models.activations import Readout
from clva_lens.models.norms import wide
from clva_lens.models.readout import read_out
from clva_lens.models.step import Step

CANDIDATES = 10
START, END, DEPTH = 5, 16, 32


@register_method
@dataclass(frozen=True, kw_only=True)
class MemVR(Method):
    """Memory-space visual retracing.

    Args:
        ratio: r, in [0, 1]; 0 edits nothing. 0.12 is the released scripts' for MME and CHAIR; they
            have 0.28 for VizWiz and 0.1 in the demonstration.
        gamma: γ, the uncertainty that must be exceeded, in [0, 1].
        start: layers after this one (0-based) are asked. None: 5 of 32, 5L/32 rounded down of L.
        end: layers before this one are asked. None: 16 of 32, L/2 rounded down of L.
        variant: "released" retrieves linearly, as released for LLaVA; "paper" with φ = SiLU, as
            released for Qwen-VL (the paper's own φ was not checked).

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.MemVR(ratio=0.12, gamma=0.75)).texts
    ['no']
    """

    name: ClassVar[str] = "memvr"
    paper: ClassVar[str] = "MemVR, arXiv:2410.03577"
    kernel: ClassVar[Kernel] = "none"
    sites: ClassVar[tuple[str, ...]] = ()
    extended: ClassVar[tuple[str, ...]] = ("beam",)
    zero: ClassVar[Mapping[str, Any] | None] = {"ratio": 0.0}
    ratio: float | int = 0.12
    gamma: float | int = 0.75
    start: int | None = None
    end: int | None = None
    variant: Variant = "released"

    def __post_init__(self) -> None:
        """Check what needs no model."""
        check_variant(self.variant)
        for name, value in (("ratio", self.ratio), ("gamma", self.gamma)):
            if not 0 <= value <= 1:
                raise ParameterError(
                    f"{name} must be in [0, 1], but is {value}. Pass 0.12 or 0.75."
                )

    def asked_layers(self, depth: int) -> range:
        """Return the layers whose last row may be unsure, in a decoder of ``depth`` layers.

        Raises:
            ParameterError: if there is none, or the last one has no layer after it.
        """
        start = START * depth // DEPTH if self.start is None else self.start
        end = END * depth // DEPTH if self.end is None else self.end
        layers = range(start + 1, end)
        if not layers or start < -1 or end > depth - 1:
            raise ParameterError(
                f"MemVR asks the layers between start={start} and end={end}, and edits the layer "
                f"after one, but the decoder has layers 0 to {depth - 1}. Pass start= and "
                f"end= with start + 1 < end <= {depth - 1}."
            )
        return layers

    def sessions(self, target: Target) -> list[Session]:
        """Return what asks and retraces; nothing for r = 0.

        Raises:
            ModelLoadError: if the language model's layers have no names (T5).
            ParameterError: if no layer is left.
        """
        if self.ratio == 0:
            return []
        layers = self.asked_layers(target.at("decoder").depth)
        return [_Retracing(self, layers, target.readout())]


class _Retracing(Session):
    site = "decoder"
    layers = ()

    def __init__(self, method: MemVR, asked: range, readout: Readout) -> None:
        self.method, self.asked, self.readout = method, asked, readout
        edited = [layer + 1 for layer in asked]
        self.streams = {
            ("resid_pre", 0),
            *(("resid_post", layer) for layer in asked),
            *(("mlp_in", layer) for layer in edited),
            *(("mlp_out", layer) for layer in edited),
        }
        self.features: Float[Tensor, "batch visual width"] | None = None
        self._x: Stream | None = None
        # By group of rows: whether it has fired in this pass, and whether it does at this layer.
        self._fired: Bool[Tensor, "batch group"] | None = None
        self._now: Bool[Tensor, "batch group"] | None = None

    def end(self) -> None:
        """Forget the picture."""
        self.features = self._x = self._fired = self._now = None

    def stream(self, call: StreamCall, hidden: Stream) -> Stream | None:
        """Keep the features, ask, or replace what an FFN puts out."""
        if call.part == "resid_pre":
            self._begin(call.step, hidden)
        elif call.part == "resid_post":
            self._ask(call.step, hidden)
        elif call.part == "mlp_in":
            self._x = hidden
        else:
            return self._retrace(call.step, hidden)
        return None

    def _begin(self, step: Step, hidden: Stream) -> None:
        self._fired = self._now = None
        if step.number == 0:
            places = rearrange(step.visual.to(hidden.device), "b v -> b v 1")
            self.features = wide(hidden.gather(1, places.expand(-1, -1, hidden.shape[2])))
        if self.features is None:
            raise InterventionError(
                "MemVR joined a run whose prompt had been read already, so the picture's features "
                "are unknown. Start it before the prompt is read."
            )

    def _ask(self, step: Step, hidden: Stream) -> None:
        old = step.old_rows(hidden.shape[1])
        asked = hidden[:, old:]
        if old:
            last = rearrange(step.last_text - step.offset, "b -> b 1 1").to(hidden.device)
            mine = hidden.gather(1, last.expand(-1, 1, hidden.shape[2]))
            asked = torch.cat([mine, asked], dim=1)
        unsure = uncertainty(read_out(self.readout, asked)) > self.method.gamma
        self._now = unsure if self._fired is None else unsure & ~self._fired
        self._fired = unsure if self._fired is None else unsure | self._fired

    def _retrace(self, step: Step, out: Stream) -> Stream:
        assert self._x is not None and self._now is not None and self.features is not None
        old, now = step.old_rows(out.shape[1]), self._now.to(out.device)
        features = self.features.to(out.device)
        scores = wide(self._x) @ features.mT
        if self.method.variant == "paper":
            scores = functional.silu(scores)
        found, own = scores @ features, wide(out)
        real = step.spans.real[:, step.offset : step.offset + out.shape[1]].to(out.device)
        scale = found.new_ones(found.shape[:2])
        size, other = own.abs().mean(dim=2), found.abs().mean(dim=2)
        tiny = torch.finfo(found.dtype).tiny
        if old:
            counted = real[:, :old]
            whole, retrieved = ((x[:, :old] * counted).sum(1, True) for x in (size, other))
            scale[:, :old] = whole / retrieved.clamp_min(tiny)
        scale[:, old:] = size[:, old:] / other[:, old:].clamp_min(tiny)
        ratio = self.method.ratio
        mixed = (1 - ratio) * own + ratio * rearrange(scale, "b q -> b q 1") * found
        fires = torch.cat([now[:, :1].expand(-1, old), now[:, bool(old) :]], dim=1) & real
        return torch.where(rearrange(fires, "b q -> b q 1"), mixed.to(out.dtype), out)


def uncertainty(logits: Float[Tensor, "*rows vocabulary"]) -> Float[Tensor, "*rows"]:
    """Return the entropy of the 10 likeliest tokens among themselves over ln 10, in [0, 1]."""
    log = wide(logits.topk(min(CANDIDATES, logits.shape[-1]), dim=-1).values).log_softmax(dim=-1)
    return -(log.exp() * log).sum(dim=-1) / math.log(CANDIDATES)
