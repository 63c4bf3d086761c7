"""DeCo, dynamic correction decoding (arXiv:2410.11779; zjunlp/Deco at fee8d75).

What the model names at its end is corrected by an earlier layer that already knew. Candidates C
are the likeliest tokens, at most 20, up to the one with which their probability reaches 0.9 (one at
least). Each layer l of a range is read out through the final norm and the unembedding, z_l, with
q_l = softmax z_l over the whole vocabulary. With (l*, m) = argmax, max of q_l(v) over layers and
v in C, the logits of the candidates are z + α·m·z_{l*}; all other tokens become impossible (−∞).

The release and the paper's formulas are one. Layers are the release's 19 to 27 of 32; of another
depth L, 19L/32 to 27L/32, rounded down. Each sample chooses its own layer (the release is for
batches of one). α = 0 edits nothing at all: the cut-off goes with the correction. Attention is left
alone; one pass, and a row of logits for each layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.engine.session import Session
from clva_lens.engine.stream import Stream, StreamCall
from clva_lens.ground.errors import ParameterError
from clva_lens.methods.base import Kernel, Method, check_layers, register_method
from clva_lens.methods.target import Target
from clva_lens.models.activations import Readout
from clva_lens.models.norms import wide
from clva_lens.models.readout import read_out
from clva_lens.models.step import Step

FIRST, LAST, DEPTH = 19, 27, 32

Logits = Float[Tensor, "batch vocabulary"]


@register_method
@dataclass(frozen=True, kw_only=True)
class DeCo(Method):
    """Dynamic correction decoding.

    Args:
        alpha: α, the strength of the correction, finite and >= 0; 0 edits nothing.
        layers: l, 0-based, whose outputs are read. None: 19 to 27 of 32, and that part of others.
        top_p: the probability that the candidates reach together, in (0, 1].
        top_k: the most candidates, >= 1.

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.DeCo(alpha=0.6)).texts
    ['no']
    """

    name: ClassVar[str] = "deco"
    paper: ClassVar[str] = "DeCo, arXiv:2410.11779"
    kernel: ClassVar[Kernel] = "none"
    sites: ClassVar[tuple[str, ...]] = ()
    zero: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}
    alpha: float | int = 0.6
    layers: Sequence[int] | None = None
    top_p: float | int = 0.9
    top_k: int = 20

    def __post_init__(self) -> None:
        """Check the ranges; layers become a tuple."""
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ParameterError(
                f"alpha must be a finite number >= 0, but is {self.alpha}. Pass alpha=0.6."
            )
        if not 0 < self.top_p <= 1:
            raise ParameterError(f"top_p must be in (0, 1], but is {self.top_p}. Pass top_p=0.9.")
        if self.top_k < 1:
            raise ParameterError(f"top_k must be at least 1, but is {self.top_k}. Pass top_k=20.")
        if self.layers is not None and not self.layers:
            raise ParameterError("layers is empty, so nothing corrects. Pass layers=None.")

    def sessions(self, target: Target) -> list[Session]:
        """Return what reads the layers and corrects; nothing for α = 0.

        Raises:
            ModelLoadError: if the language model's layers have no names (T5).
            ParameterError: if the decoder has no such layer.
        """
        if self.alpha == 0:
            return []
        shape = target.at("decoder")
        depth = shape.depth
        layers = self.layers
        if layers is None:
            layers = range(FIRST * depth // DEPTH, LAST * depth // DEPTH + 1)
        every = shape._replace(layers=tuple(range(depth)))  # also layers without attention
        return [_Correcting(self, check_layers("layers", layers, every), target.readout())]


class _Correcting(Session):
    site = "decoder"
    layers = ()
    edits_logits = True
    cuts_off = True
    leaves_prefix = True

    def __init__(self, method: DeCo, read: tuple[int, ...], readout: Readout) -> None:
        self.method, self.read, self.readout = method, read, readout
        self.streams = {("resid_post", layer) for layer in read}
        self._last: dict[int, Float[Tensor, "batch width"]] = {}

    def end(self) -> None:
        """Forget what was read."""
        self._last.clear()

    def stream(self, call: StreamCall, hidden: Stream) -> None:
        """Keep the last position of a layer."""
        self._last[call.layer] = hidden[:, -1]

    def logits(self, step: Step, logits: Logits) -> Logits:
        """Return the candidates' corrected logits, and −∞ elsewhere."""
        device = self._last[self.read[0]].device
        residual = torch.stack([self._last[layer].to(device) for layer in self.read], dim=1)
        early = wide(read_out(self.readout, residual)).to(logits.device)
        own = wide(logits)
        kept = candidates(own, self.method.top_p, self.method.top_k)
        held = early.softmax(dim=-1).masked_fill(~rearrange(kept, "b v -> b 1 v"), -1).amax(dim=-1)
        most, which = held.max(dim=1)
        chosen = early[torch.arange(len(early), device=early.device), which]
        corrected = own + self.method.alpha * rearrange(most, "b -> b 1") * chosen
        if step.number == 0:
            self.uncut = corrected
        return corrected.masked_fill(~kept, -torch.inf)


def candidates(logits: Logits, top_p: float | int, top_k: int) -> Bool[Tensor, "batch vocabulary"]:
    """Return which tokens are likely: the top k, up to the one that reaches ``top_p`` together."""
    likeliest, ids = logits.softmax(dim=-1).topk(min(top_k, logits.shape[-1]), dim=-1)
    before = likeliest.cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = 0
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, before < top_p)
