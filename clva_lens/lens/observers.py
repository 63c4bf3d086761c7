"""What every head of every layer looks at, from one forward pass, with no pattern ever kept."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

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
    read_text_rows,
    stack_layers,
)
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.ground.parameters import is_integer
from clva_lens.lens.attention_trace import AttentionTrace
from clva_lens.methods.base import check_layers
from clva_lens.methods.target import Shape
from clva_lens.models.family import find_site


def chosen_layers(layers: Sequence[int] | str, shape: Shape) -> tuple[int, ...]:
    """Return the layers of a site that "all" or 0-based indices name.

    Raises:
        ParameterError: if a layer does not exist, or none is named.
    """
    if isinstance(layers, str) and layers == "all":
        return shape.layers
    several = isinstance(layers, Iterable) and not isinstance(layers, str | Mapping)
    numbers = tuple(layers) if several else ()
    if not numbers or not all(map(is_integer, numbers)):
        raise ParameterError(
            f"layers must be 'all' or one or more layer indices, but is {layers!r}. Pass "
            "layers='all', or layers=[6]."
        )
    return check_layers("layers", tuple(map(int, numbers)), shape)


class Written(NamedTuple):
    """The tokens of an answer that were read on, and where each head looked as each was written."""

    tokens: list[int]
    maps: Float[Tensor, "layer head token visual"]


class Observer(Session):
    """A session that edits nothing and keeps what ``row_reading.py`` reads at the chosen layers.

    ``differentiable``: where gradients are recorded, they flow through what is read. ``each_row``:
    the maps of all text rows are kept too.
    """

    leaves_prefix = True

    def __init__(
        self,
        layers: Sequence[int] | str,
        shape: Shape,
        *,
        differentiable: bool = False,
        each_row: bool = False,
    ) -> None:
        """Choose the layers: "all", or 0-based indices.

        Raises:
            ParameterError: if a layer does not exist, or rows have no order and each is wanted.
        """
        if each_row and not shape.ordered:
            raise ParameterError(
                f"the rows of the site '{shape.site}' are queries, not words. Pass site='decoder'."
            )
        self.layers = chosen_layers(layers, shape)
        self.shape, self.site = shape, shape.site
        self.differentiable, self.each_row = differentiable, each_row
        self._rows: dict[int, Float[Tensor, "batch head row visual"]] = {}
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
            found = read_prompt_rows(call)
            # The map may be a view of all keys' means, which all layers together would keep.
            self._prompt[call.layer] = found._replace(map=found.map.clone())
            if self.each_row:
                self._rows[call.layer] = read_text_rows(call)
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
        self._require_prompt()
        stacked = [
            stack_layers(field, dim=1)
            for field in zip(*(self._prompt[layer] for layer in self.layers), strict=True)
        ]
        if batched is None:
            batched = len(stacked[0]) > 1
        rows = None
        if self.each_row:
            rows = stack_layers([self._rows[layer] for layer in self.layers], dim=1)
            rows = rows if batched else rows[0]
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
            rows=rows,
        )

    def steps(self) -> list[Float[Tensor, "layer batch head row visual"]]:
        """Return the maps of the generated rows of each later pass."""
        return [
            stack_layers([step[layer] for layer in self.layers], dim=0)
            for step in self._generated
            if step
        ]

    def answers(self, ids: Int[Tensor, "answer position"], prompts: int = 1) -> list[Written]:
        """Return, for each answer, its tokens, and the map of the row that wrote each of them.

        The first token was written by the prompt's last row, each later one by the row that read
        the token before, in whichever beam it stood. ``ids`` are what ``generate`` returned for
        ``prompts`` prompts, with the prompt or without; an answer ends where nobody read on.

        Raises:
            InterventionError: if no prompt was read, or nobody read these tokens.
        """
        self._require_prompt()
        rows = [self._guessed, *self._generated]  # by the number of the pass
        passes = [[self._prompt[layer].map for layer in self.layers]]
        passes += [
            [rows[number][layer][:, :, row] for layer in self.layers]
            for number, row in self._beams.places
        ]
        maps = [stack_layers(one, dim=0) for one in passes]  # each: layer batch head visual
        found = zip(self._beams.new(ids, prompts), self._beams.rows_of(ids, prompts), strict=True)
        return [
            Written(
                tokens[: len(rows)],
                torch.stack([maps[number][:, row] for number, row in enumerate(rows)], dim=2),
            )
            for tokens, rows in found
        ]

    def rows_of(
        self, ids: Int[Tensor, "answer position"], prompts: int = 1
    ) -> list[list[tuple[int, int]]]:
        """Return, for each answer, the pass and its row of the batch that wrote each token.

        For ``ids`` see ``answers``; passes count from 0, the prompt's.

        Raises:
            InterventionError: if no prompt was read, or nobody read these tokens.
        """
        self._require_prompt()
        passes = [0, *(number for number, _ in self._beams.places)]
        return [list(zip(passes, rows, strict=False)) for rows in self._beams.rows_of(ids, prompts)]

    @property
    def seen(self) -> str:
        """What was read so far, in words."""
        if not self._prompt:
            return "nothing was read yet"
        later = len(self._beams.places)
        return "a prompt" + (f" and {later} generated tokens" if later else "")

    def _require_prompt(self) -> None:
        if set(self._prompt) != set(self.layers):
            raise InterventionError(
                "the attention is not known yet: the model has not read a prompt. Read it after "
                "the block that runs the model."
            )


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
