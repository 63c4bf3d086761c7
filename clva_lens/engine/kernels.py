"""How the biases of a layer's sessions reach its kernel: merged with the mask, or without one.

What is made for one layer of a pass serves the next ones, which mostly have the same mask and bias.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clva_lens.engine import bias as folding
from clva_lens.engine.bias import Bias, KeyBias
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.models.step import Step

AttentionKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""An attention kernel: queries, keys, values and a mask to outputs by row, and weights if any."""


class Formula(NamedTuple):
    """What a layer's attention has besides queries, keys and a mask; see ``AttentionCall``."""

    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


PLAIN = Formula()


class Acting(NamedTuple):
    """The sessions that act on one layer's attention.

    ``output``: one of them edits what the heads put out. ``steady``: in one pass, their bias is
    that of any other layer with the same sessions.
    """

    layer: int
    sessions: tuple[Session, ...]
    output: bool
    steady: bool

    @classmethod
    def at(cls, layer: int, sessions: list[Session]) -> "Acting | None":
        """Return those of the sessions that act on a layer, None if none does."""
        acting = tuple(session for session in sessions if layer in session.layers)
        output = any(session.edits_output for session in acting)
        steady = not output and all(layer in session.steady for session in acting)
        return cls(layer, acting, output, steady) if acting else None


class _Merged(NamedTuple):
    """A mask and a bias of the rows from ``first`` on, as one additive mask."""

    mask: Tensor | None
    bias: Bias
    first: int
    both: Tensor


class _Ready(NamedTuple):
    """What a single row's pass put on the scores of one steady layer, for the next ones."""

    step: Step
    sessions: tuple[Session, ...]
    keys: int
    mask: Tensor | None
    both: Tensor


class Merging:
    """The masks of one site's passes; ``fused`` says whether the kernel is causal without one."""

    def __init__(self, fused: bool) -> None:
        """Start with none."""
        self.fused = fused
        self._merged: _Merged | None = None
        self._ready: _Ready | None = None

    def ready(self, acting: Acting, step: Step | None, key: Tensor, mask: Any) -> Tensor | None:
        """Return the mask of a steady layer's single row, if one like it came before in the pass.

        To ask the sessions again at every layer would be most of what a decoding step costs.
        """
        known = self._ready
        if known is None or known.step is not step or not acting.steady:
            return None
        same = known.mask is mask and known.keys == key.shape[2]
        same = same and known.both.device == key.device and known.sessions == acting.sessions
        return known.both if same else None

    def attend(
        self, kernel: AttentionKernel, call: AttentionCall, acting: Acting | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the kernel under the bias of a call, in the form that fits it best."""
        query, key, value, mask, bias = call.query, call.key, call.value, call.mask, call.bias
        assert bias is not None and value is not None
        if query.shape[2] == 1:
            both = self.merge(call)
            if acting is not None and acting.steady:
                self._ready = _Ready(call.step, acting.sessions, key.shape[2], mask, both)
            return kernel(query, key, value, both)
        starts = call.step.causal and call.step.offset == 0 and self.fused
        starts = starts and call.softcap is None
        form = folding.choose_form(bias, query, key, mask, from_start=starts)
        if form == "split" and _looks_ahead(mask, call.bias):
            form = "masked"
        if form == "masked" or not isinstance(bias, KeyBias):
            return kernel(query, key, value, self.merge(call))
        if form == "folded":
            out, weights = kernel(*folding.fold(bias, query, key, value, call.scaling), mask)
            return out[..., : value.shape[3]], weights
        first = bias.first
        before = None if mask is None else mask[:, :, :first, :first]
        out, _ = kernel(query[:, :, :first], key[:, :, :first], value[:, :, :first], before)
        edited, weights = kernel(query[:, :, first:], key, value, self.merge(call, first))
        return torch.cat([out, edited], dim=1), weights

    def merge(self, call: AttentionCall, first: int = 0) -> Tensor:
        """Return mask and bias of the rows from ``first`` on as one additive mask.

        The last one is kept for the next layer.
        """
        mask, bias, count = call.mask, call.bias, call.query.shape[2]
        assert bias is not None
        known = self._merged
        same = known is not None and known.mask is mask and known.bias is bias
        if known is None or not same or known.first != first:
            additive, both = call.additive_mask(first, count), folding.part(bias, first, count)
            # Finite in the queries' type: a row of padding that sees nothing must not become NaN.
            # The bias is float32, which the lowest float64 does not fit.
            lowest = max(torch.finfo(call.query.dtype).min, torch.finfo(both.dtype).min)
            if additive is not None:
                both = (both + additive).clamp_min(lowest)
            # CUDA kernels take a mask of the queries' type only; CPU kernels take float32 too, but
            # read it wrongly beside float64 queries.
            if both.device.type != "cpu" or call.query.dtype == torch.float64:
                both = folding.aligned(both, call.query.dtype)
            self._merged = known = _Merged(mask, bias, first, both)
        return known.both


def _looks_ahead(mask: Tensor | None, bias: Bias | None) -> bool:
    """Whether a row before the first edited one sees a key from there on (a prefix model's)."""
    if mask is None or not isinstance(bias, KeyBias):
        return False
    ahead = mask[:, :, : bias.first, bias.first :]
    allowed = ahead if ahead.dtype == torch.bool else ahead > torch.finfo(ahead.dtype).min
    return bool(allowed.any())
