"""Activation patching: what changes when a part of the model sees another prompt.

The model runs on one prompt, but in some layers and at some positions its activations are those of
another: of the same scene with the object, say. Where that carries the other prompt's answer over,
the model keeps what makes the difference (Meng et al., arXiv:2202.05262; Wang et al.,
arXiv:2211.00593; TransformerLens' ``transformer_lens.patching``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from clva_lens.engine.session import AttentionCall, Session
from clva_lens.engine.stream import Part, Stream, StreamCall, stream_name
from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import Kernel, Method, check_layers
from clva_lens.methods.choosing import ChosenHeads, chosen_heads
from clva_lens.methods.target import Shape, Target
from clva_lens.models.prompt import as_prompt
from clva_lens.models.step import Step
from clva_lens.science.heads import SomeHeads

PatchedPart = Part
"""What is patched: a part of the residual stream, or the heads' outputs z."""

SOURCE = "cache must be that of model.run_with_cache(source)"


@dataclass(frozen=True, kw_only=True, repr=False)
class PatchActivations(Method):
    """Put another prompt's activations in the place of the model's own; prompt rows only.

    Positions are matched in the order of the span, which must have as many of them in both prompts.
    Generated rows are the model's own, but read what was patched. A patch comes after the edits of
    methods before it and is seen by those after it; attention that CLVA reads at layer l sees
    "resid_pre" of layer l and everything of earlier layers. Beside a contrastive method (VCD, ICD,
    IMCCD) the prompt's own pass is patched and the second input is not, as with edits by hand: the
    cache is not of that input, and a patch in both would cancel where they are subtracted.

    Args:
        source: the other prompt; or a batch, sample by sample for the batch that is run (times
            beams).
        cache: its activations under TransformerLens' names, as ``model.run_with_cache(source)``
            returns them; a ``names_filter`` needs to keep the part in question only.
        part: "resid_pre", "resid_post", "attn_out", "mlp_out" (a Q-Former's "cross_attn_out"), or
            "z", the heads' outputs before the output projection.
        span: "image", "text", "system", "last", "all", or positions (0-based, padding included).
            At the "qformer", whose rows are queries: "all" or positions.
        layers: 0-based; None is all that ``cache`` has of the part.
        heads: for "z": pairs (layer, head), {layer: [heads]} or a bool mask [layer, head]; None is
            all of them.
        site: the stack of layers: "decoder" or "qformer".

    Raises:
        ParameterError: if the part is unknown, or ``heads`` is given for another one than "z".

    Example::

        _, cache = model.run_with_cache(there)
        patch = cl.PatchActivations(source=there, cache=cache, layers=[4], span="image")
        with cl.intervening(model, patch):
            restored = model.hf_model(**gone).logits
    """

    name: ClassVar[str] = "patching"
    paper: ClassVar[str] = "control: activation patching (arXiv:2202.05262, arXiv:2211.00593)"
    kernel: ClassVar[Kernel] = "none"
    source: Mapping[str, Any]
    cache: Any
    part: PatchedPart = "resid_pre"
    span: str | Sequence[int] = "image"
    layers: Sequence[int] | None = None
    heads: SomeHeads | None = None
    site: str = "decoder"

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        known = get_args(Part)
        if self.part not in known:
            raise ParameterError(
                f"part must be one of {', '.join(known)}, but is {self.part!r}. Pass "
                "part='resid_pre'."
            )
        if self.heads is not None:
            table = chosen_heads(self.heads)
            if self.part != "z" or isinstance(table, str):
                raise ParameterError(
                    f"heads={self.heads!r} was passed with part='{self.part}', but single heads "
                    "are named, as by (layer, head) pairs, for part='z'. Pass both, or neither."
                )
            object.__setattr__(self, "heads", table)

    def activation(self, layer: int) -> str:
        """Return the name in ``cache`` of what is patched at a layer."""
        if self.part != "z":
            return stream_name(self.site, self.part, layer)
        if self.site == "decoder":
            return f"blocks.{layer}.attn.hook_z"
        return f"{self.site}.blocks.{layer}.cross_attn.hook_z"

    def sessions(self, target: Target) -> list[Session]:
        """Return one session with the source's values at this model's layers.

        Raises:
            ParameterError: if a layer, the span or the cache does not fit.
        """
        shape = target.at(self.site)
        stack = shape.layers if self.part == "z" else tuple(range(shape.depth))
        layers = self.layers
        if layers is None:
            layers = [layer for layer in stack if self.activation(layer) in self.cache]
            if not layers:
                raise ParameterError(
                    f"the cache has no '{self.activation(stack[0])}' nor that of another layer; "
                    f"{SOURCE}, with a names_filter that keeps it."
                )
        layers = check_layers("layers", layers, shape._replace(layers=stack))
        if self.part == "z" and self.site == "decoder":
            self._refuse_gates(target, layers)
        heads = None
        if self.heads is not None:
            heads = ChosenHeads(chosen_heads(self.heads), layers, shape)
            layers = heads.layers
        spans = _source_spans(target.model, self.source)
        values = {layer: self._taken(layer, spans) for layer in layers}
        return [_PatchSession(self, shape, values, heads)]

    def for_rows(self, target: Target, rows: slice) -> Session:
        """Return a session for these rows of the batch that is run; the others stay their own.

        The span's positions must be text: what is before them may have been read without it.

        Raises:
            ParameterError: as ``sessions``.
        """
        (session,) = self.sessions(target)
        assert isinstance(session, _PatchSession)
        session.rows, session.leaves_prefix = rows, True
        return session

    def _refuse_gates(self, target: Target, layers: Sequence[int]) -> None:
        """Refuse to put what is after the gates of a layer's heads before them."""
        written = target.readout().written
        gated = [layer for layer in layers if written and written[layer].gated]  # none of a bridge
        if gated:
            raise ParameterError(
                f"the heads of layer {gated[0]} are multiplied by gates before they are projected, "
                "and hook_z is after these, so it cannot be put in place of what the heads put "
                "out. Pass part='attn_out'."
            )

    def _taken(self, layer: int, spans: TokenSpans) -> Float[Tensor, "source position *width"]:
        """Return the source's values at the span."""
        name = self.activation(layer)
        if name not in self.cache:
            raise ParameterError(
                f"the cache has no '{name}'; {SOURCE}, with a names_filter that keeps it."
            )
        value = self.cache[name]
        ids = self.source["input_ids"]
        if len(value) != len(ids) or (self.site == "decoder" and value.shape[1] != ids.shape[1]):
            raise ParameterError(
                f"'{name}' is for {tuple(value.shape[:2])} (samples, positions), but the source "
                f"prompt has {tuple(ids.shape)}; {SOURCE}."
            )
        places = span_places(self.span, self.site, spans, value.shape[:2])
        index = places.to(value.device)
        return value[torch.arange(len(value), device=value.device)[:, None], index]

    def __repr__(self) -> str:
        """Return what is patched where."""
        layers = "all cached layers" if self.layers is None else f"layers {self.layers}"
        return f"PatchActivations({self.part} of {layers}, span {self.span}, {self.site})"


def _source_spans(model: Any, source: Mapping[str, Any]) -> TokenSpans:
    spans = getattr(source, "spans", None)
    return spans if isinstance(spans, TokenSpans) else as_prompt(model, source).spans


def span_places(
    span: str | Sequence[int], site: str, spans: TokenSpans, rows: Sequence[int]
) -> Int[Tensor, "batch position"]:
    """Return the rows of a span: of a prompt's tokens, or of a Q-Former's ``rows`` (batch, rows).

    Raises:
        ParameterError: if there is no such span.
    """
    if site == "decoder":
        return spans.places(span)
    if isinstance(span, str) and span != "all":
        raise ParameterError(
            f"span is {span!r}, but the rows of the site '{site}' are queries, not tokens. Pass "
            "span='all', or positions."
        )
    every = torch.ones(tuple(rows), dtype=torch.bool, device=spans.image.device)
    return TokenSpans(every, ~every, ~every, ~every).places(span)


class _PatchSession(Session):
    prompt_only = True
    rows = slice(None)

    def __init__(
        self,
        method: PatchActivations,
        shape: Shape,
        values: dict[int, Tensor],
        heads: ChosenHeads | None,
    ) -> None:
        self.method, self.site, self.heads = method, shape.site, heads
        self.values = values
        self.leaves_prefix = self.site == "decoder" and method.span in ("text", "last")
        self.edits_output = method.part == "z"
        self.layers = tuple(values) if method.part == "z" else ()
        if method.part != "z":
            self.streams = {(method.part, layer) for layer in values}

    def output(
        self, call: AttentionCall, out: Float[Tensor, "batch query head width"]
    ) -> Float[Tensor, "batch query head width"] | None:
        """Return z with the chosen heads' rows replaced."""
        if call.layer not in self.values:
            return None
        patched = self._patch(call.step, call.layer, out)
        if self.heads is None or patched is None:
            return patched
        chosen = rearrange(self.heads.known(call), "b h -> b 1 h 1")
        return torch.where(chosen, patched, out)

    def stream(self, call: StreamCall, hidden: Stream) -> Stream | None:
        """Return a part of the residual stream with the span replaced."""
        return self._patch(call.step, call.layer, hidden)

    def _patch(self, step: Step, layer: int, own: Tensor) -> Tensor | None:
        if step.offset > 0 and step.number > 0:  # rows after the prompt
            return None
        if step.offset > 0 and bool(step.spans.text[:, : step.offset].any()):
            raise InterventionError(
                "a later turn of a conversation is read onto the ones before it, but a patch is of "
                "one prompt. Read the whole conversation in one pass."
            )
        rows = torch.arange(len(own), device=own.device)[self.rows]
        batch, value = len(rows), self.values[layer].to(own)
        if batch % len(value):
            raise InterventionError(
                f"the source is {len(value)} prompts, but {batch} are run. Patch from one prompt, "
                "or from as many as are run."
            )
        if value.shape[2:] != own.shape[2:]:
            raise InterventionError(
                f"the source's {self.method.part} has {tuple(value.shape[2:])} numbers at a "
                f"position, but the model has {tuple(own.shape[2:])}. Cache it on this model."
            )
        places = self._places(step, own)
        if places.shape[1] != value.shape[1]:
            raise InterventionError(
                f"the span {self.method.span!r} has {value.shape[1]} positions in the source but "
                f"{places.shape[1]} in the prompt that is run, so they do not line up. Ask both "
                "the same question, or patch another span ('image', 'last')."
            )
        value = value.repeat_interleave(batch // len(value), dim=0)
        return own.index_put((rows[:, None], places.to(own.device)), value)

    def _places(self, step: Step, own: Tensor) -> Int[Tensor, "batch position"]:
        """Return which of this pass's rows are patched."""
        spans = step.spans.first(step.prompt_rows)
        parts = (spans.system, spans.image, spans.text, spans.generated)
        mine = TokenSpans(*(part[self.rows] for part in parts))
        count = (len(mine.image), own.shape[1])
        return span_places(self.method.span, self.site, mine, count) - step.offset
