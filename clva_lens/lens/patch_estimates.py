"""Attribution patching: every activation patch estimated at once, to the first order.

Patching a part of the target's run with the source's changes a metric m by about

    (a_source − a_target) · ∂m/∂a,

the gradient being the target's (Nanda 2023, "Attribution patching"; Syed et al., arXiv:2310.10348).
Two forward passes and one backward give it for all layers, positions and heads; the sum over a
span's positions estimates the patch of the span. What is neglected is of second order: it is large
where softmax or norms saturate, so what matters is to be patched (``cl.patch_activations``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.engine.run import running
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.engine.stream import Stream, StreamCall
from clva_lens.ground.ambient import exact
from clva_lens.ground.drawn import SelfDrawn
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.parameters import check_arguments
from clva_lens.lens.intervene import intervening, refuse_in_trace
from clva_lens.lens.margins import MARGIN
from clva_lens.lens.patching import Each, LogitMetric, PatchingResult, columns_of, reader_of
from clva_lens.methods.base import MethodLike
from clva_lens.methods.patching import PatchedPart
from clva_lens.methods.target import Shape, shape_of
from clva_lens.models.family import transformers_model
from clva_lens.models.prompt import Asked, Prompt, as_prompt, readable

PARTS: tuple[PatchedPart, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post", "z")


@dataclass(frozen=True, eq=False, repr=False)
class PatchEstimates(SelfDrawn):
    """First-order estimates of every patch, from two forward passes and one backward.

    ``parts`` has, by part and layer, what patching each position would change the metric by: for
    "z" of each head. ``target`` and ``source`` are the metric of both prompts as they are. There
    is a batch axis first throughout; ``passes`` counts forward and backward ones.
    """

    parts: Mapping[str, Mapping[int, Float[Tensor, "batch position *head"]]]
    target: Float[Tensor, " batch"]
    source: Float[Tensor, " batch"]
    label: str
    prompts: tuple[Prompt, Prompt]
    shape: Shape
    model: Any
    passes: int = 3

    def patching(
        self,
        part: PatchedPart = "resid_pre",
        spans: str | Sequence[str] = ("image", "text", "last"),
        each: Each | None = None,
        layers: Sequence[int] | None = None,
    ) -> PatchingResult:
        """Return the estimates as ``cl.patch_activations`` returns what was measured.

        Raises:
            ParameterError: as there, or if the part was not estimated.
        """
        if part not in self.parts:
            raise ParameterError(
                f"part is {part!r}, but {', '.join(self.parts)} were estimated. Pass one of these."
            )
        known = self.parts[part]
        check_arguments(PatchEstimates.patching, spans=spans, layers=layers)
        numbers = tuple(known) if layers is None else tuple(layers)
        names = (spans,) if isinstance(spans, str) else tuple(spans)
        if not names:
            raise ParameterError("spans is empty. Pass spans='image', for example.")
        source, target = self.prompts
        columns = list(columns_of(self.model, source, target, names, each, part, self.shape))
        if not numbers or set(numbers) - known.keys():
            raise ParameterError(
                f"layers are {numbers}, but '{part}' was estimated at {', '.join(map(str, known))}."
                " Pass layers= from these."
            )
        found = torch.stack(
            [torch.stack([_at(known[i], target, one) for _, one in columns], 1) for i in numbers], 1
        )
        item = slice(None) if target.batched else 0
        return PatchingResult(
            values=(self.target[:, None, None] + found.to(self.target))[item],
            target=self.target[item],
            source=self.source[item],
            layers=numbers,
            columns=tuple(name for name, _ in columns),
            part=part,
            span=", ".join(names),
            each=each,
            label=f"{self.label}, estimated",
            prompt=target,
        )

    def draw(self) -> Any:
        """Return the estimates of "resid_pre" by layer and span, drawn.

        Raises:
            ParameterError: if this is of a batch.
        """
        return self.patching().draw()

    @property
    def drawable(self) -> bool:
        """Whether this is of a single prompt."""
        return not self.prompts[1].batched

    def __repr__(self) -> str:
        """Return what was estimated."""
        return (
            f"PatchEstimates({', '.join(self.parts)} of {len(self.parts['resid_pre'])} layers, "
            f"{self.passes} passes; {self.label} {float(self.target.mean()):+.2f} target, "
            f"{float(self.source.mean()):+.2f} source)"
        )


def _at(
    known: Float[Tensor, "batch position *head"], target: Prompt, where: Mapping[str, Any]
) -> Float[Tensor, " batch"]:
    """Return the sum over a span's positions and over the named heads, or all."""
    places = target.spans.places(where["span"]).to(known.device)
    rows = known[torch.arange(len(places), device=known.device)[:, None], places].sum(dim=1)
    if rows.ndim == 1:
        return rows
    heads = where.get("heads")
    return rows.sum(dim=1) if heads is None else rows[:, heads[0].to(rows.device)].sum(dim=1)


def attribution_patching(
    model: Any,
    source: Asked,
    target: Asked,
    *,
    metric: LogitMetric | None = None,
    method: MethodLike | None = None,
) -> PatchEstimates:
    """Return first-order estimates of every patch of ``target`` with activations of ``source``.

    All layers of the decoder, all positions, all heads, from two forward passes and one backward.
    ``.patching(part, spans, each)`` gives them in the form of ``cl.patch_activations``.

    Args:
        model: the model that both prompts are for.
        source: whose activations would be taken: the same question about another picture.
        target: the prompt that is run, token for token as long as the source.
        metric: from the last position's logits [batch, 1, vocabulary] to a number a sample, by
            torch operations; None is logit(yes) − logit(no), in nats.
        method: holds in both runs, and gradients flow through it.

    Raises:
        ParameterError: if the prompts do not line up, or the metric has no gradient.
        InterventionError: inside a trace, or under gradient checkpointing.

    >>> estimates = cl.attribution_patching(model, there, gone)
    >>> estimates.patching("z", "image", each="head").values.shape
    torch.Size([12, 8])
    """
    refuse_in_trace("attribution_patching", "")
    source, target = as_prompt(model, source), as_prompt(model, target)
    check_aligned(source, target)
    found: Any = transformers_model(model)
    shape, read = shape_of(found, "decoder"), reader_of(model, metric)
    with exact(), torch.inference_mode(False):
        with torch.no_grad():
            own = Differentiating(shape)
            before = read(run_through(model, found, source, [own], method))
        with torch.enable_grad():
            other = Differentiating(shape)
            after = read(run_through(model, found, target, [other], method))
            slopes = gradients(after, list(other.added.values()))
    kept = dict(zip(other.added, slopes, strict=True))
    parts: dict[str, dict[int, Tensor]] = {part: {} for part in PARTS}
    for (part, layer), slope in kept.items():
        change = own.values[part, layer] - other.values[part, layer]
        change = change.expand_as(slope)
        product = change.to(slope) * slope
        parts[part][layer] = product.flatten(3 if part == "z" else 2).sum(dim=-1)
    return PatchEstimates(
        parts={part: values for part, values in parts.items() if values},
        target=after.detach(),
        source=before.expand_as(after),
        label=MARGIN if metric is None else getattr(metric, "__name__", "metric"),
        prompts=(source, target),
        shape=shape,
        model=model,
    )


def check_aligned(source: Prompt, target: Prompt) -> None:
    """Raise ParameterError unless each position of the target is one of the source."""
    own, other = target.spans, source.spans
    if len(other.image) not in (1, len(own.image)):
        raise ParameterError(
            f"the source is a batch of {len(other.image)} prompts and the target of "
            f"{len(own.image)}. Pass as many of each, or one source for all."
        )
    pairs = [(own.image, other.image), (own.text, other.text), (own.system, other.system)]
    if own.image.shape[1] != other.image.shape[1] or not all(
        bool((mine == theirs).all()) for mine, theirs in pairs
    ):
        raise ParameterError(
            f"the source has {other.image.shape[1]} positions and the target "
            f"{own.image.shape[1]}, or their spans lie elsewhere, so they do not line up. Ask both "
            "the same question."
        )


def run_through(
    model: Any,
    found: Any,
    prompt: Prompt,
    sessions: Sequence[Session],
    method: MethodLike | None,
) -> Float[Tensor, "batch 1 vocabulary"]:
    """Return the last logits of a prompt, read once under a method and then these sessions."""
    with intervening(model, method), running(found, sessions), readable(prompt):
        return found(**prompt.inputs, logits_to_keep=1, use_cache=False).logits[:, -1:]


def gradients(values: Float[Tensor, " batch"], of: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradient of each sample's value with respect to what is its own.

    Raises:
        ParameterError: if the values have no gradient, or are not finite.
    """
    if not values.requires_grad:
        raise ParameterError(
            "the metric has no gradient with respect to the logits. Write it in torch operations, "
            "without .item() or .tolist()."
        )
    if not bool(values.detach().isfinite().all()):
        raise ParameterError(
            f"the metric is {values.detach().tolist()}, which has no gradient. Where a method "
            "makes logits infinite, leave it out; else pass a metric= that is finite."
        )
    return torch.autograd.grad(values.sum(), of, materialize_grads=True)


class Differentiating(Session):
    """Adds zeros to parts of the stream, with respect to which gradients can be asked."""

    site = "decoder"
    edits_output = True
    prompt_only = True

    def __init__(self, shape: Shape) -> None:
        """Begin with nothing; ``values`` and ``added`` are by (part, layer)."""
        self.layers = shape.layers
        self.streams = {(part, i) for part in PARTS if part != "z" for i in range(shape.depth)}
        self.streams -= {("attn_out", i) for i in range(shape.depth) if i not in shape.layers}
        self.values: dict[tuple[PatchedPart, int], Tensor] = {}
        self.added: dict[tuple[PatchedPart, int], Tensor] = {}

    def stream(self, call: StreamCall, hidden: Stream) -> Stream | None:
        """Add zeros to a part of the stream."""
        return self._differentiable(call.part, call.layer, hidden)

    def output(
        self, call: AttentionCall, out: Float[Tensor, "batch query head width"]
    ) -> Float[Tensor, "batch query head width"] | None:
        """Add zeros to what the heads put out."""
        return self._differentiable("z", call.layer, out)

    def _differentiable(self, part: PatchedPart, layer: int, own: Tensor) -> Tensor | None:
        self.values[part, layer] = own.detach()
        if not torch.is_grad_enabled():
            return None
        added = self.added[part, layer] = torch.zeros_like(own, requires_grad=True)
        return own + added
