"""What heads look at, once it was read: intensities, masses and maps, and their drawings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.figures import Drawing, head_intensity
from clva_lens.figures.base import evenly
from clva_lens.ground.drawn import SelfDrawn
from clva_lens.ground.errors import ParameterError
from clva_lens.lens.overlay import overlay
from clva_lens.models.prompt import Prompt
from clva_lens.science.anchors import default_anchor_layers, saliency_map
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

    ``rows`` are the maps of all text rows, those of a batch from the first that is text in any of
    them, and ``words`` the tokens they read, by sample; where ``each_row`` was asked for.
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
    rows: Float[Tensor, "*batch layer head row visual"] | None = None
    words: tuple[tuple[str, ...], ...] = ()

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
        return replace(traces[0], **whole, logits=both, rows=None, words=())

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
        return saliency_map(self.maps, self._chosen(heads))

    def _chosen(self, heads: HeadChoice | SomeHeads) -> Bool[Tensor, "*batch layer head"]:
        if not isinstance(heads, str):
            size = self.intensity.shape
            depth = self.num_layers
            mask = head_mask(heads, self.layers, size[-1], depth=depth, of="the trace")
            return mask.to(self.maps.device).expand(size)
        if heads == "all":
            return torch.ones_like(self.intensity, dtype=torch.bool)
        if heads in ("sensitive", "insensitive"):
            return getattr(self.heads(), heads)
        raise ParameterError(
            f"heads must be 'all', 'sensitive', 'insensitive' or name heads, but is {heads!r}. "
            "Pass one of these."
        )

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
        tokens: Sequence[int | str] | None = None,
        **options: Any,
    ) -> Drawing:
        """Return where heads look on the photo of ``prompt``, one panel a layer, or layer and word.

        Args:
            prompt: the one that was traced.
            layers: 0-based; None draws eight, evenly spaced, or with tokens that of the positive
                anchor, L/2 − 2.
            heads: see ``saliency``.
            tokens: the words of the question whose rows looked: tokens as texts (the last one of
                this text), or their places among the text tokens, from the end if negative. The
                trace must have been made with ``each_row=True``. None is the last row.
            **options: those of ``cl.overlay``.

        Raises:
            ParameterError: if the trace is a batch, does not have a layer, a head or a token, or no
                row was kept.
            PromptError: if it is unknown where on the photo the image tokens lie.
        """
        if self.batched:
            raise ParameterError("the trace is of a batch. Pass trace[i], and prompt.row(i).")
        if layers is None and tokens is not None:
            layers = default_anchor_layers(self.layers, self.num_layers)[:1]
        if layers is None:
            layers = [self.layers[at] for at in evenly(len(self.layers), _SHOWN)]
        absent = [layer for layer in layers if layer not in self.layers]
        if absent or not layers:
            raise ParameterError(
                f"the trace has no layer {absent[0] if absent else 'chosen'}. Pass some of "
                f"{', '.join(map(str, self.layers))}."
            )
        places = [self.layers.index(layer) for layer in layers]
        titles = [f"layer {one}" for one in layers]
        maps = self.saliency(heads)[places]
        if tokens is not None:
            rows = [self._row(token) for token in tokens]
            assert self.rows is not None
            chosen = self._chosen(heads)[places, None]
            by_row = saliency_map(self.rows[places].transpose(1, 2)[:, rows], chosen)
            maps = by_row.flatten(0, 1)
            titles = [f"{title}, {self._token(row)}" for title in titles for row in rows]
        named: dict[str, Any] = {"titles": titles, **options}
        return overlay(prompt, maps, **named)

    def _row(self, token: int | str) -> int:
        """Return the place of a token among the text rows."""
        if self.rows is None:
            raise ParameterError(
                "the rows of the words were not kept. Pass each_row=True to cl.trace_attention."
            )
        count = self.rows.shape[-2]
        said = [one.strip() for one in self.words[0]] if self.words else []
        if isinstance(token, str) and token.strip() in said:
            return count - 1 - said[::-1].index(token.strip())
        if isinstance(token, int) and -count <= token < count:
            return token % count
        known = ", ".join(map(repr, said)) or f"places from 0 to {count - 1}"
        raise ParameterError(f"the text has no token {token!r}. Pass some of {known}.")

    def _token(self, row: int) -> str:
        return repr(self.words[0][row].strip()) if self.words else f"text token {row}"

    def __getitem__(self, item: int) -> "AttentionTrace":
        """Return the trace of one sample of a batch."""
        if not self.batched:
            raise ParameterError("this trace is of a single prompt. Use it as it is.")
        one = {
            field: getattr(self, field)[item] for field in ("intensity", "system", "text", "maps")
        }
        logits = None if self.logits is None else self.logits[item]
        rows = None if self.rows is None else self.rows[item]
        words = (self.words[item],) if self.words else ()
        return replace(self, **one, batched=False, logits=logits, rows=rows, words=words)

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
