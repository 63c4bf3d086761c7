"""What every head of every layer looks at, from one forward pass, with no pattern ever kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.engine.beams import Histories, Reordering
from clva_lens.engine.row_reading import (
    PromptRows,
    read_generated_rows,
    read_prompt_rows,
    read_query_rows,
    stack_layers,
)
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import check_layers
from clva_lens.methods.target import Shape
from clva_lens.models.family import find_site
from clva_lens.science.anchors import saliency_map
from clva_lens.science.heads import EmptyPolicy, HeadClasses, SomeHeads, classify_heads, head_mask

HeadChoice = Literal["all", "sensitive", "insensitive"]


@dataclass(frozen=True, eq=False, repr=False)
class AttentionTrace:
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


def chosen_layers(layers: Sequence[int] | str, shape: Shape) -> tuple[int, ...]:
    """Return the layers of a site that "all" or 0-based indices name.

    Raises:
        ParameterError: if a layer does not exist.
    """
    if isinstance(layers, str):
        if layers != "all":
            raise ParameterError(
                f"layers must be 'all' or layer indices, but is {layers!r}. Pass layers='all'."
            )
        layers = shape.layers
    return check_layers("layers", tuple(layers), shape)


class Observer(Session):
    """A session that edits nothing and keeps what ``row_reading.py`` reads at the chosen layers.

    ``differentiable``: where gradients are recorded, they flow through what is read.
    """

    leaves_prefix = True

    def __init__(
        self, layers: Sequence[int] | str, shape: Shape, *, differentiable: bool = False
    ) -> None:
        """Choose the layers: "all", or 0-based indices.

        Raises:
            ParameterError: if a layer does not exist.
        """
        self.layers = chosen_layers(layers, shape)
        self.shape, self.site = shape, shape.site
        self.differentiable = differentiable
        self._prompt: dict[int, PromptRows] = {}
        self._generated: list[dict[int, Float[Tensor, "batch head row visual"]]] = []
        self._guessed: dict[int, Float[Tensor, "batch head row visual"]] = {}
        self._sinks = False
        self._beams = Histories()
        self._reordering: Reordering | None = None

    def follow(self, model: PreTrainedModel) -> None:
        """Follow beams of this model, so that ``answers`` finds their rows."""
        entry = find_site(model, "decoder").passes().entry
        self._reordering = Reordering(entry, self._beams.reorder)

    def begin(self) -> None:
        """Watch the cache, if beams are followed."""
        if self._reordering is not None:
            self._reordering.begin()

    def end(self) -> None:
        """Let go of the cache."""
        if self._reordering is not None:
            self._reordering.end()

    def attention(self, call: AttentionCall) -> None:
        """Read the layer's rows."""
        if call.layer in self.layers:
            with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
                self._read(call)

    def _read(self, call: AttentionCall) -> None:
        self._sinks = self._sinks or call.sinks is not None
        if call.layer == self.layers[0]:
            self._beams.read(call.step)
        if call.step.number == 0:
            if call.layer == self.layers[0]:
                self._prompt, self._generated, self._guessed = {}, [], {}
            self._prompt[call.layer] = read_prompt_rows(call)
            if call.new_rows:
                self._guessed[call.layer] = read_generated_rows(call)
        elif call.new_rows:
            while len(self._generated) < call.step.number:
                self._generated.append({})
            self._generated[call.step.number - 1][call.layer] = read_generated_rows(call)

    def trace(self, batched: bool | None = None, logits: Tensor | None = None) -> AttentionTrace:
        """Return what was read from the prompt; by default with a batch axis if it was a batch.

        Raises:
            InterventionError: if no prompt was read yet.
        """
        if set(self._prompt) != set(self.layers):
            raise InterventionError(
                "the attention is not known yet: the model has not read a prompt. Read it after "
                "the block that runs the model."
            )
        stacked = [
            stack_layers(field, dim=1)
            for field in zip(*(self._prompt[layer] for layer in self.layers), strict=True)
        ]
        if batched is None:
            batched = len(stacked[0]) > 1
        if not batched:
            stacked = [one[0] for one in stacked]
            logits = None if logits is None else logits[0]
        image, system, text, maps = stacked
        shape = self.shape
        return AttentionTrace(
            *(image, system, text, maps),
            layers=self.layers,
            num_layers=shape.depth,
            batched=batched,
            site=self.site,
            logits=logits,
            site_layers=shape.layers,
            sinks=self._sinks,
        )

    def steps(self) -> list[Float[Tensor, "layer batch head row visual"]]:
        """Return the maps of the generated rows of each later pass."""
        return [
            stack_layers([step[layer] for layer in self.layers], dim=0)
            for step in self._generated
            if step
        ]

    def answers(
        self, ids: Int[Tensor, "answer position"], prompts: int = 1
    ) -> list[Float[Tensor, "layer head token visual"]]:
        """Return, for each answer, the map of the row that wrote each of its tokens.

        The first token was written by the prompt's last row, each later one by the row that read
        the token before, in whichever beam it stood. ``ids`` are what ``generate`` returned for
        ``prompts`` prompts, with the prompt or without; an answer ends where nobody read on.

        Raises:
            InterventionError: if no prompt was read, or nobody read these tokens.
        """
        if set(self._prompt) != set(self.layers):
            raise InterventionError(
                "the attention is not known yet: the model has not read a prompt. Read it after "
                "the block that runs the model."
            )
        rows = [self._guessed, *self._generated]  # by the number of the pass
        passes = [[self._prompt[layer].map for layer in self.layers]]
        passes += [
            [rows[number][layer][:, :, row] for layer in self.layers]
            for number, row in self._beams.places
        ]
        maps = [stack_layers(one, dim=0) for one in passes]  # each: layer batch head visual
        return [
            torch.stack([maps[number][:, row] for number, row in enumerate(rows)], dim=2)
            for rows in self._beams.rows_of(ids, prompts)
        ]


class QueryObserver(Session):
    """A session that edits nothing and keeps where each query looks, averaged over the heads."""

    def __init__(self, layers: Sequence[int] | str, shape: Shape) -> None:
        """Choose the layers: "all", or 0-based indices.

        Raises:
            ParameterError: if a layer does not exist.
        """
        self.layers = chosen_layers(layers, shape)
        self.site = shape.site
        self._maps: dict[int, Float[Tensor, "batch query visual"]] = {}

    @torch.no_grad()
    def attention(self, call: AttentionCall) -> None:
        """Read the layer's rows."""
        if call.layer in self.layers:
            self._maps[call.layer] = read_query_rows(call)

    def maps(self) -> Float[Tensor, "batch layer query visual"]:
        """Return what was read, in fractions of attention mass."""
        return stack_layers([self._maps[layer] for layer in self.layers], dim=1)
