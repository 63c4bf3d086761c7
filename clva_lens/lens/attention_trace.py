"""What heads look at, once it was read: intensities, masses and maps, and their drawings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.figures import Drawing, head_intensity
from clva_lens.figures.base import evenly
from clva_lens.ground.drawn import SelfDrawn
from clva_lens.ground.errors import ParameterError
from clva_lens.lens.overlay import overlay
from clva_lens.models.prompt import Prompt
from clva_lens.science.anchors import saliency_map
from clva_lens.science.heads import EmptyPolicy, HeadClasses, SomeHeads, classify_heads, head_mask

_SHOWN = 8

HeadChoice = Literal["all", "sensitive", "insensitive"]


@dataclass(frozen=True, eq=False, repr=False)
class AttentionTrace(SelfDrawn):
    """Attention of the text rows, by layer and head, in fractions of attention mass.

    ``intensity`` is Eq. 1: the mean over the text rows of the mass on the image; ``system`` and
    ``text`` are the masses elsewhere, and the three sum to 1; in a model with ``sinks`` to less, by
    what its attention sinks take. ``maps`` are the last text row's
    attention to each image token. ``layers`` are the traced ones, 0-based, of the ``site_layers``
    that have attention, in a stack of ``num_layers``. With ``batched`` there is a batch axis first.

    At the ``site`` "qformer" the rows are the learned queries, which have no last one: ``maps``
    are their mean, and ``system`` is the mass on the CLS token.
    """

    intensity: Float[Tensor, "*batch layer head"]
    system: Float[Tensor, "*batch layer head"]
    text: Float[Tensor, "*batch layer head"]
    maps: Float[Tensor, "*batch layer head visual"]
    layers: tuple[int, ...]
    num_layers: int
    batched: bool
    site: str = "decoder"
    logits: Float[Tensor, "*batch vocabulary"] | None = None
    site_layers: tuple[int, ...] = ()
    sinks: bool = False

    @classmethod
    def concatenate(cls, traces: Sequence["AttentionTrace"]) -> "AttentionTrace":
        """Return the traces of several batches of one model as one batch.

        Raises:
            ParameterError: if there are none, one has no batch axis, or the layers differ.
        """
        if not traces or any(not trace.batched for trace in traces):
            raise ParameterError(
                "only batched traces can be put together. Make prompts from lists, and pass some."
            )
        if len({(trace.site, trace.layers) for trace in traces}) > 1:
            raise ParameterError(
                "the traces are of different sites or layers. Trace the same ones."
            )
        whole = {
            field: torch.cat([getattr(trace, field) for trace in traces])
            for field in ("intensity", "system", "text", "maps")
        }
        logits = [trace.logits for trace in traces if trace.logits is not None]
        both = torch.cat(logits) if len(logits) == len(traces) else None
        return replace(traces[0], **whole, logits=both)

    def heads(self, threshold: float = 1.0, empty: EmptyPolicy = "tail") -> HeadClasses:
        """Return the head classes of the traced layers (Eqs. 2–3)."""
        return classify_heads(self.intensity, threshold, empty)

    def saliency(
        self, heads: HeadChoice | SomeHeads = "all"
    ) -> Float[Tensor, "*batch layer visual"]:
        """Return where a head set looks (Eq. 4), for each traced layer.

        ``heads`` is "all", a class of Eqs. 2–3 at λ = 1, a mask of heads, pairs (layer, head) or
        {layer: [heads]}; a layer without heads looks nowhere.

        Raises:
            ParameterError: if the choice is unknown or the mask has another shape.
        """
        if not isinstance(heads, str):
            size = self.intensity.shape
            depth = self.num_layers
            mask = head_mask(heads, self.layers, size[-1], depth=depth, of="the trace")
            chosen = mask.to(self.maps.device).expand(size)
        elif heads == "all":
            chosen = torch.ones_like(self.intensity, dtype=torch.bool)
        elif heads == "sensitive":
            chosen = self.heads().sensitive
        elif heads == "insensitive":
            chosen = self.heads().insensitive
        else:
            raise ParameterError(
                f"heads must be 'all', 'sensitive', 'insensitive' or name heads, but is {heads!r}. "
                "Pass one of these."
            )
        return saliency_map(self.maps, chosen)

    def draw(self, numbers: Literal["image", "elsewhere"] = "image") -> Drawing:
        """Return the paper's Fig. 1: the visual mass of each head, both classes of heads marked.

        Of a batch it is the mean, and classes are those of the mean. ``numbers`` are what is
        written into the cells of small models: the mass on the "image", or that "elsewhere" (system
        and text), as in the paper.

        Raises:
            FigureError: if ``numbers`` is neither.
        """
        mean = self.intensity.mean(dim=0) if self.batched else self.intensity
        classes = classify_heads(mean)
        return head_intensity(
            mean.float().cpu().numpy(),
            classes.sensitive.cpu().numpy(),
            classes.insensitive.cpu().numpy(),
            layers=self.layers,
            numbers=numbers,
        )

    def draw_image(
        self,
        prompt: Prompt,
        layers: Sequence[int] | None = None,
        heads: HeadChoice | SomeHeads = "all",
        **options: Any,
    ) -> Drawing:
        """Return where heads look on the photo of ``prompt``, one panel a layer.

        ``layers`` are 0-based; None draws eight, evenly spaced. For ``heads`` see ``saliency``;
        ``options`` are those of ``cl.overlay``.

        Raises:
            ParameterError: if the trace is a batch, or does not have a layer or a head.
            PromptError: if it is unknown where on the photo the image tokens lie.
        """
        if self.batched:
            raise ParameterError("the trace is of a batch. Pass trace[i], and prompt.row(i).")
        if layers is None:
            layers = [self.layers[at] for at in evenly(len(self.layers), _SHOWN)]
        absent = [layer for layer in layers if layer not in self.layers]
        if absent or not layers:
            raise ParameterError(
                f"the trace has no layer {absent[0] if absent else 'chosen'}. Pass some of "
                f"{', '.join(map(str, self.layers))}."
            )
        maps = self.saliency(heads)[[self.layers.index(layer) for layer in layers]]
        named: dict[str, Any] = {"titles": [f"layer {one}" for one in layers], **options}
        return overlay(prompt, maps, **named)

    def __getitem__(self, item: int) -> "AttentionTrace":
        """Return the trace of one sample of a batch."""
        if not self.batched:
            raise ParameterError("this trace is of a single prompt. Use it as it is.")
        one = {
            field: getattr(self, field)[item] for field in ("intensity", "system", "text", "maps")
        }
        logits = None if self.logits is None else self.logits[item]
        return replace(self, **one, batched=False, logits=logits)

    def __repr__(self) -> str:
        """Return the size, and the mean visual mass of the traced layers."""
        mean = self.intensity.mean(dim=-1)
        mean = mean.reshape(-1, mean.shape[-1]).mean(dim=0)
        peak = int(mean.argmax())
        samples = f"{self.intensity.shape[0]} samples × " if self.batched else ""
        return (
            f"AttentionTrace({self.site}: {samples}{len(self.layers)} layers × "
            f"{self.intensity.shape[-1]} heads, {self.maps.shape[-1]} image tokens; mean visual "
            f"mass {float(mean.min()):.2f}–{float(mean.max()):.2f}, highest in layer "
            f"{self.layers[peak]})"
        )
