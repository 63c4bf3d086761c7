"""Edits of the residual stream by rows: which rows of a pass a span is, at decoder and tower."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from clva_lens.engine.checkpointing import checkpointed, refuse_checkpoint
from clva_lens.engine.session import Session
from clva_lens.engine.stream import Part, Stream, StreamCall, stream_hooks, stream_name
from clva_lens.ground.ambient import exact
from clva_lens.ground.errors import ParameterError
from clva_lens.methods.target import shape_of
from clva_lens.models.family import find_family
from clva_lens.models.step import Step

Stack = Literal["decoder", "vision"]
"""Whose residual stream: the language model's, or the vision tower's."""

RowSpan = Literal["text", "last", "image", "system", "all", "generated"]
"""Prompt rows by name; generated rows belong to "text", "last", "all" and "generated"."""

Edit = Callable[[int, Stream], Stream]
"""From a layer (0-based) and what is in its stream to what shall be there, for every row."""

_WITH_GENERATED = ("text", "last", "all", "generated")
_AFTER_IMAGE = ("text", "last", "generated")


def check_span(span: str | Sequence[int] | None) -> None:
    """Raise ParameterError unless ``span`` is a name, or positions that are not negative."""
    if isinstance(span, str):
        if span not in get_args(RowSpan):
            raise ParameterError(
                f"span must be one of {', '.join(get_args(RowSpan))}, or positions, but is "
                f"{span!r}. Pass span='text'."
            )
    elif not span or min(span) < 0:
        raise ParameterError(
            f"span is {span}, but positions are one or more integers from 0. Pass span='text', for "
            "example."
        )


def span_rows(step: Step, span: str | Sequence[int], count: int) -> Bool[Tensor, "batch query"]:
    """Return which of a pass's ``count`` rows belong to a span; padding never does.

    Positions are those of the prompt, 0-based and padding included.

    Raises:
        ParameterError: if a position is not in the prompt.
    """
    old, first = step.old_rows(count), step.offset
    rows = torch.zeros(len(step.text_rows), count, dtype=torch.bool, device=step.text_rows.device)
    rows[:, old:] = span in _WITH_GENERATED
    if not old or span == "generated":
        return rows
    real = step.spans.real[:, first : first + old]
    if isinstance(span, str):
        if span == "text":
            mine = step.text_rows[:, first : first + old]
        elif span == "last":
            position = torch.arange(first, first + old, device=rows.device)
            mine = position == rearrange(step.last_text, "b -> b 1")
        else:
            mine = real if span == "all" else getattr(step.spans, span)[:, first : first + old]
        rows[:, :old] = mine & real
        return rows
    if max(span) >= step.prompt_rows:
        raise ParameterError(
            f"span names position {max(span)}, but the prompt has 0 to {step.prompt_rows - 1}. "
            "Pass positions like that."
        )
    here = [place - first for place in span if first <= place < first + old]
    rows[:, here] = real[:, here]
    return rows


class StreamSession(Session):
    """Edits a part of the decoder's residual stream, in the rows of a span."""

    site = "decoder"
    layers = ()

    def __init__(
        self, part: Part, layers: Sequence[int], span: str | Sequence[int], edit: Edit
    ) -> None:
        """Name the part and the layers, 0-based; ``edit`` is asked for all rows of a pass."""
        self.span, self.edit = span, edit
        self.streams = {(part, layer) for layer in layers}
        self.leaves_prefix = span in _AFTER_IMAGE
        self._rows: tuple[Step, int, Bool[Tensor, "batch query"], bool] | None = None

    def end(self) -> None:
        """Forget the last pass."""
        self._rows = None

    def stream(self, call: StreamCall, hidden: Stream) -> Stream | None:
        """Return the stream with the span's rows edited; None where the pass has none."""
        count = hidden.shape[1]
        if self._rows is None or self._rows[0] is not call.step or self._rows[1] != count:
            rows = span_rows(call.step, self.span, count)
            self._rows = (call.step, count, rows, bool(rows.any()))
        _, _, rows, some = self._rows
        if not some:
            return None
        chosen = rows.reshape(*rows.shape, *[1] * (hidden.ndim - 2)).to(hidden.device)
        return torch.where(chosen, self.edit(call.layer, hidden), hidden)


class TowerSession(Session):
    """Edits a part of the vision tower's residual stream, in all rows or in some positions.

    It belongs to the decoder's run, which begins before the tower reads and ends with it; there it
    sees that no text is read onto a picture that was read without it. What the tower makes of a
    picture under it is not shared with who asks without it.
    """

    site = "decoder"
    edits_tower = True

    def __init__(
        self,
        model: PreTrainedModel,
        part: Part,
        layers: Sequence[int],
        span: str | Sequence[int],
        edit: Edit,
    ) -> None:
        """Name the part and the layers, 0-based; positions count the tower's tokens, CLS first.

        Raises:
            ParameterError: if the span is one of a prompt, which a tower has not, or the tower has
                no such part or layer that has a name.
        """
        if isinstance(span, str) and span != "all":
            raise ParameterError(
                f"span is {span!r}, but the rows of a vision tower are its own tokens. Pass "
                "span='all', or positions."
            )
        self.model, self.span, self.edit = model, span, edit
        self.layers = shape_of(model, "decoder").layers[:1]
        self.wanted: list[tuple[Part, int]] = [(part, layer) for layer in layers]
        depth = tower_depth(model, part)
        unknown = [layer for layer in layers if layer >= depth or layer < 0]
        if unknown:
            known = f"layers 0 to {depth - 1}" if depth else "no layers that have names"
            raise ParameterError(
                f"the vision tower of this {type(model).__name__} has {known} with '{part}', so "
                f"layer {unknown[0]} cannot be edited. Pass other layers=, or stack='decoder'."
            )
        self._hooks: list[RemovableHandle] = []

    def begin(self) -> None:
        """Put a hook at each layer, before those by which a model reads its own tower's layers."""
        for _, hook in stream_hooks(self.model, "vision", self.wanted, self._edited, first=True):
            self._hooks.append(hook)

    def end(self) -> None:
        """Take the hooks away."""
        while self._hooks:
            self._hooks.pop().remove()

    def _edited(self, part: Part, layer: int, value: Tensor) -> Tensor | None:
        if isinstance(value, FakeTensor):
            return None
        inside = checkpointed()
        if inside == "again":
            return None
        if inside == "first":
            refuse_checkpoint("the vision tower's residual stream")
        with exact():
            found = self.edit(layer, value)
        if isinstance(self.span, str):
            return found
        if max(self.span) >= value.shape[1]:
            raise ParameterError(
                f"span names position {max(self.span)}, but the vision tower has 0 to "
                f"{value.shape[1] - 1}. Pass positions like that."
            )
        mine = torch.zeros(value.shape[1], 1, dtype=torch.bool, device=value.device)
        mine[list(self.span)] = True
        return torch.where(mine, found, value)


def tower_depth(model: PreTrainedModel, part: str) -> int:
    """Return how many layers of a vision tower have a part that has a name; 0 if none has."""
    names: set[Any] = {place.name for place in find_family(model).activations(model).places}
    depth = 0
    while stream_name("vision", part, depth) in names:
        depth += 1
    return depth
