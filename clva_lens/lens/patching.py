"""Activation patching between two prompts, layer by layer: where the difference is kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.figures import Drawing, patch_maps
from clva_lens.figures import patching as draw_patching
from clva_lens.figures.base import evenly
from clva_lens.figures.patch_maps import MOST_MAPS
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.progress import progress_bar
from clva_lens.lens.cache import run_with_cache
from clva_lens.lens.generate import yes_margins
from clva_lens.lens.intervene import intervening, refuse_in_trace
from clva_lens.lens.logit_lens import MARGIN
from clva_lens.lens.observers import chosen_layers
from clva_lens.methods.base import Method
from clva_lens.methods.patching import PatchActivations, PatchedPart
from clva_lens.methods.target import Shape, shape_of
from clva_lens.models.family import transformers_model
from clva_lens.models.prompt import Asked, Prompt, as_prompt

Metric = Callable[[Float[Tensor, "batch 1 vocabulary"]], Any]
"""From the logits of the last position to a number for each sample, as TransformerLens' metrics."""

Each = Literal["position", "head"]
"""Whether every position of a span is patched on its own, or every head."""


@dataclass(frozen=True, eq=False, repr=False)
class PatchingResult:
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
    def normalised(self) -> Float[Tensor, "*batch layer column"]:
        """The effect as a share of the difference: 0 is the target unpatched, 1 the source.

        Raises:
            ParameterError: if the metric is the same for both prompts.
        """
        difference = self.source - self.target
        if (difference == 0).any():
            raise ParameterError(
                "the metric is the same for source and target, so no share of their difference can "
                "be given. Read .values, or choose prompts that the model answers differently."
            )
        return (self.values - self.target[..., None, None]) / difference[..., None, None]

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
        return self.normalised.unflatten(-1, self.prompt.grid_at("decoder"))

    def draw(self) -> Drawing:
        """Return the normalised effect, drawn: image tokens on the patch grid, else a heat map.

        Up to 12 evenly spaced layers are drawn on the grid.

        Raises:
            ParameterError: if this is a batch, or the metric is the same for both prompts.
        """
        if self.values.ndim > 2:
            raise ParameterError(
                "this is of a batch. Patch the prompts one at a time to draw the effect."
            )
        label = f"effect of {self.part} on {self.label}\n(0: unpatched, 1: source)"
        gridded = not isinstance(self.prompt.sites["decoder"].grid, str)
        if (self.each, self.span) == ("position", "image") and gridded:
            maps = self.on_grid()
            chosen = evenly(len(maps), MOST_MAPS)
            numbered = [self.layers[row] for row in chosen]
            label = f"effect of {self.part} (1: source)"
            return patch_maps(maps[chosen].cpu().numpy(), layers=numbered, label=label, sums=False)
        across = {
            "position": f"patched position of the span '{self.span}' (index in the prompt: token)",
            "head": f"patched head (index, 0-based), span '{self.span}'",
        }
        return draw_patching(
            self.normalised.cpu().numpy(),
            self.columns,
            layers=self.layers,
            across=across.get(self.each or "", "patched span"),
            label=label,
        )

    def _repr_png_(self) -> bytes | None:
        """Return the picture that a notebook shows; none for a batch, or without a difference."""
        if self.values.ndim > 2 or bool((self.source == self.target).any()):
            return None
        return self.draw()._repr_png_()

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


@torch.inference_mode()
def patch_activations(
    model: Any,
    source: Asked,
    target: Asked,
    *,
    layers: Sequence[int] | str = "all",
    spans: str | Sequence[str] = ("image", "text", "last"),
    part: PatchedPart = "resid_pre",
    each: Each | None = None,
    metric: Metric | None = None,
    method: Method | None = None,
    progress: bool = True,
) -> PatchingResult:
    """Return how a metric of ``target`` changes when it gets activations of ``source``.

    For every layer of the decoder and every span, the target is run once with that part of that
    layer taken from the source at the span's positions, all else its own. This is TransformerLens'
    ``get_act_patch_*``, where the source is the clean prompt and the target the corrupted one.

    Args:
        model: the model that both prompts are for.
        source: the prompt whose activations are taken (the picture with the object); one, or as
            many as the target.
        target: the prompt that is run (the same question about the picture without it).
        layers: "all", or 0-based indices.
        spans: "image", "text", "system", "last" or "all", of equal length in both prompts.
        part: "resid_pre", "attn_out", "mlp_out", "resid_post", or "z", the heads' outputs.
        each: "position" patches every position of one span on its own, "head" every head (of "z").
        metric: from logits [batch, 1, vocabulary] of the last position to a number a sample; None
            is logit(yes) − logit(no), the larger of each word's spellings, in nats.
        method: a method that holds in all runs, of the source too; patches come after it.
        progress: whether a progress bar is shown.

    Raises:
        ParameterError: if a layer, span, part or metric does not fit, or positions do not line up.
        InterventionError: if the spans' positions, or the numbers of prompts, do not line up; or
            inside a trace: this runs the model many times, and ``PatchActivations`` is one of
            these patches in a run of your own.
    """
    refuse_in_trace("patch_activations", ", or cl.intervene(cl.PatchActivations(...)) in it")
    found, words = transformers_model(model), getattr(model, "words", None)
    source, target = as_prompt(model, source), as_prompt(model, target)
    shape = shape_of(found, "decoder")
    numbers = chosen_layers(layers, shape)
    names = (spans,) if isinstance(spans, str) else tuple(spans)
    columns = list(_columns(words, source, target, names, each, part, shape))
    measure = _measure(words, metric)
    base = PatchActivations(source=source, cache={}, part=part, layers=numbers)
    wanted = [base.activation(layer) for layer in numbers]
    cache = run_with_cache(model, source, wanted, method).cache
    own = () if method is None else (method,)

    def run(prompt: Prompt, *patch: Method) -> Float[Tensor, " batch"]:
        with intervening(model, *own, *patch):
            made = found(**prompt.inputs, logits_to_keep=1).logits[:, -1:]
        return measure(made, len(made))

    from_source, unpatched = run(source), run(target)
    rows = []
    count = len(numbers) * len(columns)
    with progress_bar("patches", count, wanted=progress and count > 1) as advance:
        for layer in numbers:
            for _, options in columns:
                given = {"source": source, "cache": cache, "part": part, "layers": (layer,)}
                rows.append(run(target, PatchActivations(**given, **options)))
                advance(1)
    values = torch.stack(rows, dim=1).unflatten(1, (len(numbers), len(columns)))
    batched = target.batched
    return PatchingResult(
        values if batched else values[0],
        unpatched if batched else unpatched[0],
        from_source.expand_as(unpatched) if batched else from_source[0],
        numbers,
        tuple(name for name, _ in columns),
        part,
        ", ".join(names),
        each,
        MARGIN if metric is None else getattr(metric, "__name__", "metric"),
        target,
    )


def _columns(
    words: Any,
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
        raise ParameterError(
            f"each={each!r} was passed with spans={names} and part='{part}', but 'position' takes "
            "one span, and 'head' one span and part='z'. Pass spans='image', for example."
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
    for place in places[0].tolist():
        token = int(target["input_ids"][0, place])
        yield f"{place}: {token if words is None else words.decode([token])}", {"span": (place,)}


def _measure(words: Any, metric: Metric | None) -> Callable[[Tensor, int], Tensor]:
    """Return what makes a number for each sample from the logits of the last position."""
    if metric is None and words is None:
        raise ParameterError(
            "the model has no tokenizer, so yes and no are not known. Pass a metric= of the "
            "logits, or the model that cl.load() returned."
        )

    def measure(logits: Tensor, batch: int) -> Float[Tensor, " batch"]:
        made: Any = yes_margins(logits[:, -1], words) if metric is None else metric(logits)
        if metric is None and None in made:
            raise ParameterError(
                "the tokenizer has no single token for yes or no, so there is no margin. Pass a "
                "metric= of the logits."
            )
        values = torch.as_tensor(made, device=logits.device).float().reshape(-1)
        if len(values) != batch:
            raise ParameterError(
                f"the metric made {len(values)} numbers from the logits of {batch} samples. Return "
                "one for each, or patch one prompt at a time."
            )
        return values

    return measure
