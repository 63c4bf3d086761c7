"""Activation patching between two prompts, layer by layer: where the difference is kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.figures import Drawing, patch_maps
from clva_lens.figures import patching as draw_patching
from clva_lens.figures.base import evenly
from clva_lens.figures.patch_maps import MOST_MAPS
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.drawn import SelfDrawn
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.progress import progress_bar
from clva_lens.lens.cache import run_with_cache
from clva_lens.lens.intervene import refuse_in_trace
from clva_lens.lens.margins import MARGIN, margins
from clva_lens.lens.observers import chosen_layers
from clva_lens.lens.patch_sweep import sweep
from clva_lens.methods.base import MethodLike
from clva_lens.methods.patching import PatchActivations, PatchedPart
from clva_lens.methods.target import Shape, shape_of
from clva_lens.models.answer_tokens import AnswerTokens, answer_tokens
from clva_lens.models.family import transformers_model
from clva_lens.models.prompt import Asked, Prompt, as_prompt

LogitMetric = Callable[[Float[Tensor, "batch 1 vocabulary"]], Any]
"""From the logits of the last position to a number for each sample, as TransformerLens' metrics."""

LEAST_SHARE = 0.05
"""A difference smaller than this share of the largest effect divides nothing sensibly."""

LEAST_CHANGE = 1e-3
"""Nor does one smaller than this share of the metric itself: that may be rounding."""

Each = Literal["position", "head"]
"""Whether every position of a span is patched on its own, or every head."""


@dataclass(frozen=True, eq=False, repr=False)
class PatchingResult(SelfDrawn):
    """A metric under patches, by layer and by ``columns``: spans, positions or heads.

    ``values`` are in the metric's own unit (logits, for the margin), ``target`` and ``source`` what
    it is for the two prompts as they are. ``part`` of ``layers`` (0-based) was patched. There is a
    batch axis first if the target is a batch.
    """

    values: Float[Tensor, "*batch layer column"]
    target: Float[Tensor, "*batch"]
    source: Float[Tensor, "*batch"]
    layers: tuple[int, ...]
    columns: tuple[str, ...]
    part: str
    span: str
    each: Each | None
    label: str
    prompt: Prompt

    @property
    def effect(self) -> Float[Tensor, "*batch layer column"]:
        """How a patch changes the metric, in its own unit (nats, for the margin)."""
        return self.values - self.target[..., None, None]

    @property
    def divides(self) -> Bool[Tensor, "*batch"]:
        """Whether source and target differ enough for shares of their difference to say much."""
        larger = torch.maximum(self.source.abs(), self.target.abs())
        largest = self.effect.abs().amax(dim=(-2, -1))
        least = torch.maximum(LEAST_SHARE * largest, LEAST_CHANGE * larger)
        return (self.source - self.target).abs() > least

    @property
    def normalised(self) -> Float[Tensor, "*batch layer column"]:
        """The effect as a share of the difference: 0 is the target unpatched, 1 the source.

        Raises:
            ParameterError: if the metric is almost the same for both prompts (see ``divides``).
        """
        if not self.divides.all():
            number = int((~self.divides).reshape(-1).nonzero()[0])
            source, target = (float(x.reshape(-1)[number]) for x in (self.source, self.target))
            raise ParameterError(
                f"the metric is almost the same for source and target ({source:+.3g} and "
                f"{target:+.3g}), so shares of their difference say nothing. Read .effect, in the "
                "metric's own unit, or choose prompts that the model answers differently."
            )
        return self.effect / (self.source - self.target)[..., None, None]

    def on_grid(self) -> Float[Tensor, "*batch layer row column"]:
        """Return the normalised effect of each image token on the patch grid.

        Raises:
            ParameterError: if not every image token was patched on its own.
            PromptError: if the image tokens lie on no grid.
        """
        if (self.each, self.span) != ("position", "image"):
            raise ParameterError(
                "only image tokens that were patched one by one lie on a grid. Call "
                "patch_activations(..., spans='image', each='position')."
            )
        return self._gridded(self.normalised)

    def _gridded(
        self, effects: Float[Tensor, "*batch layer token"]
    ) -> Float[Tensor, "*batch layer row column"]:
        return self.prompt.sites["decoder"].on_grid(effects)

    def draw(self) -> Drawing:
        """Return the normalised effect, drawn: image tokens on the patch grid, else a heat map.

        Up to 12 evenly spaced layers are drawn on the grid. Where source and target hardly differ
        (see ``divides``) the effect is in the metric's own unit, and the label says so.

        Raises:
            ParameterError: if this is a batch.
        """
        if self.values.ndim > 2:
            raise ParameterError(
                "this is of a batch. Patch the prompts one at a time to draw the effect."
            )
        shares = bool(self.divides)
        effects = self.normalised if shares else self.effect
        unit = "nats" if self.label == MARGIN else "its own unit"
        apart = float(self.source - self.target)
        note = (
            "(0: unpatched, 1: source)"
            if shares
            else f"in {unit}, as source − target is only {apart:+.2g}"
        )
        label = f"effect of {self.part} on {self.label}\n{note}"
        gridded = self.prompt.sites["decoder"].drawable
        if (self.each, self.span) == ("position", "image") and gridded:
            maps = self._gridded(effects)
            chosen = evenly(len(maps), MOST_MAPS)
            numbered = [self.layers[row] for row in chosen]
            label = f"effect of {self.part} {'(1: source)' if shares else note}"
            return patch_maps(maps[chosen].cpu().numpy(), layers=numbered, label=label, sums=False)
        across = {
            "position": f"patched position of the span '{self.span}' (index in the prompt: token)",
            "head": f"patched head (index, 0-based), span '{self.span}'",
        }
        return draw_patching(
            effects.cpu().numpy(),
            self.columns,
            layers=self.layers,
            across=across.get(self.each or "", "patched span"),
            label=label,
        )

    @property
    def drawable(self) -> bool:
        """Whether this is of a single prompt."""
        return self.values.ndim <= 2

    def __repr__(self) -> str:
        """Return the metric of both prompts, and the patches with the largest effect."""
        middle = self.values.reshape(-1, *self.values.shape[-2:]).mean(dim=0)
        target, source = float(self.target.mean()), float(self.source.mean())
        lines = [
            f"PatchingResult({self.part}: {len(self.layers)} layers × {len(self.columns)} "
            f"{self.each or 'span'}s; {self.label} {target:+.2f} unpatched, {source:+.2f} source)"
        ]
        effect = middle - target
        ranked = effect.flatten().abs().argsort(descending=True)[:3].tolist()
        for row, column in (divmod(place, len(self.columns)) for place in ranked):
            change = f"{target:+.2f} → {float(middle[row, column]):+.2f}"
            lines.append(f"  layer {self.layers[row]}, {self.columns[column]}: {change}")
        return "\n".join(lines)


@undisturbed()
def patch_activations(
    model: Any,
    source: Asked,
    target: Asked,
    *,
    layers: Sequence[int] | str = "all",
    spans: str | Sequence[str] = ("image", "text", "last"),
    part: PatchedPart = "resid_pre",
    each: Each | None = None,
    metric: LogitMetric | None = None,
    method: MethodLike | None = None,
    progress: bool = True,
) -> PatchingResult:
    """Return how a metric of ``target`` changes when it gets activations of ``source``.

    For every layer of the decoder and every span, the target is run with that part of that layer
    taken from the source at the span's positions, all else its own. This is TransformerLens'
    ``get_act_patch_*``, where the source is the clean prompt and the target the corrupted one.
    Where text rows are patched, what is before them is read once, for many patches at a time.

    Args:
        model: the model that both prompts are for.
        source: whose activations are taken (the picture with the object); one, or as the target.
        target: the prompt that is run (the same question about the picture without it).
        layers: "all", or 0-based indices.
        spans: "image", "text", "system", "last" or "all", of equal length in both prompts.
        part: "resid_pre", "attn_out", "mlp_out", "resid_post", or "z", the heads' outputs.
        each: "position" patches every position of one span on its own, "head" every head (of "z").
        metric: from the last position's logits [batch, 1, vocabulary] to a number a sample; None is
            logit(yes) − logit(no), the larger of each word's spellings, in nats.
        method: holds in all runs, of the source too; patches come after it.
        progress: whether a progress bar is shown.

    Raises:
        ParameterError: if a layer, span, part or metric does not fit, or positions do not line up.
        InterventionError: inside a trace: ``PatchActivations`` is one such patch in a run of yours.

    >>> patched = cl.patch_activations(model, there, gone)
    >>> patched.values.shape
    torch.Size([12, 3])
    """
    refuse_in_trace("patch_activations", ", or cl.intervene(cl.PatchActivations(...)) in it")
    source, target = as_prompt(model, source), as_prompt(model, target)
    shape = shape_of(transformers_model(model), "decoder")
    numbers = chosen_layers(layers, shape)
    names = (spans,) if isinstance(spans, str) else tuple(spans)
    columns = list(columns_of(model, source, target, names, each, part, shape))
    read = reader_of(model, metric)
    where = [where for _, where in columns]
    logits, patches = _patches(model, source, part, numbers, where, method)
    unpatched, values = _swept(sweep(model, target, patches, method), read, len(patches), progress)
    item = slice(None) if target.batched else 0
    return PatchingResult(
        values=values.unflatten(1, (len(numbers), len(columns)))[item],
        target=unpatched[item],
        source=read(logits).expand_as(unpatched)[item],
        layers=numbers,
        columns=tuple(name for name, _ in columns),
        part=part,
        span=", ".join(names),
        each=each,
        label=MARGIN if metric is None else getattr(metric, "__name__", "metric"),
        prompt=target,
    )


def columns_of(
    model: Any,
    source: Prompt,
    target: Prompt,
    names: tuple[str, ...],
    each: Each | None,
    part: PatchedPart,
    shape: Shape,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each column, and what its patches are made with."""
    if each is None:
        for name in names:
            target.spans.places(name)
            yield name, {"span": name}
        return
    if each not in ("position", "head") or len(names) != 1 or (each == "head" and part != "z"):
        remedy = "spans='image'" if each == "position" else "each='head', spans='image', part='z'"
        raise ParameterError(
            f"each={each!r} was passed with spans={names} and part='{part}', but 'position' takes "
            f"one span, and 'head' one span and part='z'. Pass {remedy}, for example."
        )
    if each == "head":
        for head in range(shape.heads):
            heads = torch.zeros(shape.depth, shape.heads, dtype=torch.bool)
            heads[:, head] = True
            yield str(head), {"span": names[0], "heads": heads}
        return
    places = target.spans.places(names[0])
    theirs = source.spans.places(names[0])
    if places.shape[1] != theirs.shape[1] or not (torch.cat([places, theirs]) == places[0]).all():
        raise ParameterError(
            f"the span '{names[0]}' has {theirs.shape[1]} positions in the source and "
            f"{places.shape[1]} in the target, or lies elsewhere, so single positions do not line "
            "up. Ask both the same question, one prompt at a time."
        )
    words = getattr(model, "words", None)
    for place in places[0].tolist():
        token = int(target["input_ids"][0, place])
        yield f"{place}: {token if words is None else words.decode([token])}", {"span": (place,)}


def _patches(
    model: Any,
    source: Prompt,
    part: PatchedPart,
    layers: tuple[int, ...],
    columns: Sequence[dict[str, Any]],
    method: MethodLike | None,
) -> tuple[Float[Tensor, "batch 1 vocabulary"], list[PatchActivations]]:
    """Return the source's last logits and the patch of each layer and column, from one pass."""
    make = partial(PatchActivations, source=source, part=part)
    every = make(cache={}, layers=layers)
    wanted = [every.activation(layer) for layer in layers]
    logits, cache = run_with_cache(model, source, wanted, method)
    patches = [make(cache=cache, layers=(i,), **where) for i, where in product(layers, columns)]
    return logits[:, -1:], patches


def _swept(
    passes: Iterator[tuple[int, Tensor]],
    read: Callable[[Tensor], Float[Tensor, " batch"]],
    count: int,
    progress: bool,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch patch"]]:
    """Return what is read of the prompt as it is, and under each patch."""
    _, logits = next(passes)
    unpatched, found = read(logits), dict[int, Tensor]()
    with progress_bar("patches", count, wanted=progress and count > 1) as advance:
        for number, logits in passes:
            found[number] = read(logits)
            advance(1)
    return unpatched, torch.stack([found[number] for number in range(count)], dim=1)


def reader_of(
    model: Any, metric: LogitMetric | None
) -> Callable[[Float[Tensor, "batch 1 vocabulary"]], Float[Tensor, " batch"]]:
    """Return what makes a number for each sample of the last logits."""
    words = getattr(model, "words", None)
    if metric is None and words is None:
        raise ParameterError(
            "the model has no tokenizer, so yes and no are not known. Pass a metric= of the "
            "logits, or the model that cl.load() returned."
        )
    spelled = AnswerTokens([], []) if words is None else answer_tokens(words)
    if metric is None and not all(spelled):
        raise ParameterError(
            "the tokenizer has no single token for yes or no, so there is no margin. Pass a "
            "metric= of the logits."
        )

    def read(logits: Float[Tensor, "batch 1 vocabulary"]) -> Float[Tensor, " batch"]:
        made: Any = metric(logits) if metric else margins(logits[:, -1], *spelled)
        values = torch.as_tensor(made, device=logits.device).reshape(-1)
        if values.dtype != torch.float64:  # what was computed in more digits keeps them
            values = values.float()
        if len(values) != len(logits):
            raise ParameterError(
                f"the metric made {len(values)} numbers from the logits of {len(logits)} samples. "
                "Return one for each, or patch one prompt at a time."
            )
        return values

    return read
