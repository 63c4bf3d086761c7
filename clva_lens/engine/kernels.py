"""How the biases of a layer's sessions reach its kernel: merged with the mask, or without one.

What is made for one layer of a pass serves the next ones, which mostly have the same mask and bias.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clva_lens.engine import bias as folding
from clva_lens.engine.bias import Bias, BiasForm, KeyBias
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.models.step import Step

AttentionKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""An attention kernel: queries, keys, values and a mask to outputs by row, and weights if any."""


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

    def ask(self, call: AttentionCall) -> None:
        """Put on the layer's scores what each session in turn wants there."""
        for session in self.sessions:
            bias = session.attention(call)
            if bias is not None:
                call.bias = folding.add(call.bias, folding.on(bias, call.query.device))


class Formed(NamedTuple):
    """A mask and a bias in the form in which a kernel takes them.

    ``both`` is one additive mask of all rows, or, where it is "split", of those from the first
    edited one on; None where it is "folded".
    """

    form: BiasForm
    bias: Bias
    mask: Tensor | None
    both: Tensor | None

    def attend(
        self, kernel: AttentionKernel, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor | None]:
        """Run a kernel under the bias."""
        if self.form == "masked":
            return kernel(query, key, value, self.both)
        assert isinstance(self.bias, KeyBias)
        if self.form == "folded":
            out, weights = kernel(*folding.fold(self.bias, query, key, value, scaling), self.mask)
            return out[..., : value.shape[3]], weights
        first = self.bias.first
        before = None if self.mask is None else self.mask[:, :, :first, :first]
        out, _ = kernel(query[:, :, :first], key[:, :, :first], value[:, :, :first], before)
        edited, weights = kernel(query[:, :, first:], key, value, self.both)
        return torch.cat([out, edited], dim=1), weights


class Ready(NamedTuple):
    """What a pass put on the scores of one steady layer, for the next ones that are like it.

    ``like``: their sessions, and the shapes, type and device of their queries and keys.
    """

    like: tuple[tuple[Session, ...], torch.Size, torch.Size, torch.dtype, torch.device]
    formed: Formed


class Merging:
    """The masks of one site's passes; ``fused`` says whether the kernel is causal without one.

    ``ready`` is what steady layers got so far in the pass ``step``.
    """

    def __init__(self, fused: bool) -> None:
        """Start with none."""
        self.fused = fused
        self._formed: Formed | None = None
        self.step: Step | None = None
        self.ready: list[Ready] = []

    def attend(
        self, kernel: AttentionKernel, call: AttentionCall, acting: Acting | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the kernel under the bias of a call, in the form that fits it best."""
        query, key, value = call.query, call.key, call.value
        assert value is not None
        formed = self._form(call)
        if acting is not None and acting.steady:
            if self.step is not call.step:
                self.step, self.ready = call.step, []
            like = (acting.sessions, query.shape, key.shape, query.dtype, query.device)
            self.ready.append(Ready(like, formed))
        return formed.attend(kernel, query, key, value, call.scaling)

    def _form(self, call: AttentionCall) -> Formed:
        """Return the mask and the bias of a call in the form that fits it best.

        The last one is kept for the next layer.
        """
        mask, bias, first = call.mask, call.bias, 0
        form = "masked" if call.query.shape[2] == 1 else self._choose(call)
        assert bias is not None
        known = self._formed
        if known is None or known.mask is not mask or known.bias is not bias or known.form != form:
            if form == "split":
                assert isinstance(bias, KeyBias)
                first = bias.first
            both = None if form == "folded" else merged(call, first)
            self._formed = known = Formed(form, bias, mask, both)
        return known

    def _choose(self, call: AttentionCall) -> BiasForm:
        """Return the form that fits a call best."""
        query, mask, bias = call.query, call.mask, call.bias
        assert bias is not None
        starts = call.step.causal and call.step.offset == 0 and self.fused
        starts = starts and call.softcap is None
        form = folding.choose_form(bias, query, call.key, mask, from_start=starts)
        return "masked" if form == "split" and _looks_ahead(mask, bias) else form


def merged(call: AttentionCall, first: int = 0) -> Tensor:
    """Return mask and bias of a call's rows from ``first`` on as one additive mask."""
    bias, count = call.bias, call.query.shape[2]
    assert bias is not None
    additive, both = call.additive_mask(first, count), folding.part(bias, first, count)
    # Finite in the queries' type: a row of padding that sees nothing must not become NaN.
    # The bias is float32, which the lowest float64 does not fit.
    lowest = max(torch.finfo(call.query.dtype).min, torch.finfo(both.dtype).min)
    if additive is not None:
        both = (both + additive).clamp_min(lowest)
    # CUDA kernels take a mask of the queries' type only; CPU kernels take float32 too, but read it
    # wrongly beside float64 queries.
    if both.device.type != "cpu" or call.query.dtype == torch.float64:
        both = folding.aligned(both, call.query.dtype)
    return both


def _looks_ahead(mask: Tensor | None, bias: Bias | None) -> bool:
    """Whether a row before the first edited one sees a key from there on (a prefix model's)."""
    if mask is None or not isinstance(bias, KeyBias):
        return False
    ahead = mask[:, :, : bias.first, bias.first :]
    allowed = ahead if ahead.dtype == torch.bool else ahead > torch.finfo(ahead.dtype).min
    return bool(allowed.any())
