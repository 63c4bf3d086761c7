"""The beginning of prompts, read once: its keys and values, and what else is made of it.

A contrast's second input may have a beginning of its own (a noisy picture), and a method may have
to know what the picture's rows look at. Either is read when it is first asked for, and kept here.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import PromptError
from clva_lens.models.context import beside, remember
from clva_lens.models.kv_cache import CACHE, forked
from clva_lens.models.room import Room
from clva_lens.models.weights import weights_state

# What is made of a beginning may be as large as its keys and values: so many are kept.
KEPT = 4

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Beginning:
    """What a model has read of prompts that go on from there, a row a picture.

    ``inputs`` are what it was given, ``spans`` say what the positions are. ``cache``, their keys
    and values, is never written to: ``fork`` copies it. ``weights`` are what the model's were then.
    """

    inputs: dict[str, Tensor]
    spans: TokenSpans
    cache: DynamicCache
    weights: int
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def length(self) -> int:
        """The number of positions."""
        return self.spans.image.shape[1]

    def fork(
        self, model: PreTrainedModel, rows: Int[Tensor, " row"], room: Room | None = None
    ) -> DynamicCache:
        """Return a cache of its own with these rows, for ``model`` to go on from.

        In ``room``, which has been for the same rows before, what follows is written in place.

        Raises:
            PromptError: if the model has other weights or adapters than when it read them.
        """
        self.check(model)
        if room is None:
            cache = forked(self.cache)
            cache.batch_select_indices(rows)
        else:
            cache = room.fork(self.cache, rows)
        remember(cache, self.spans.each(lambda span: span[rows]))
        _READ_BEFORE[cache] = ReadBefore(self, rows)
        return cache

    def check(self, model: PreTrainedModel) -> None:
        """Raise PromptError if a model has other weights or adapters than when it read this."""
        if weights_state(model) != self.weights:
            raise PromptError(
                "the model's weights or its adapters were changed after it read the picture, so "
                "what it read is no more what it would read. Read it again: cl.read(model, image)."
            )

    def once(
        self, model: PreTrainedModel, key: Hashable, make: Callable[["Beginning"], Made]
    ) -> Made:
        """Return what ``make`` makes of this with ``model``: made once, and known by ``key``.

        Raises:
            PromptError: if the model has other weights or adapters than when it read this.
        """
        self.check(model)
        if key in self._made:
            return self._made[key]
        with undisturbed():
            made = make(self)
        for oldest in list(self._made)[: max(0, len(self._made) + 1 - KEPT)]:
            self._made.pop(oldest, None)
        self._made[key] = made
        return made


class ReadBefore(NamedTuple):
    """What a cache goes on from: rows of a beginning."""

    beginning: Beginning
    rows: Int[Tensor, " row"]


_READ_BEFORE: WeakKeyDictionary[Any, ReadBefore] = WeakKeyDictionary()


def read_before(cache: Any, rows: int, length: int) -> ReadBefore | None:
    """Return what a cache of this size goes on from; None if it holds anything else."""
    known = None if cache is None else _READ_BEFORE.get(cache)
    if known is None or (len(known.rows), known.beginning.length) != (rows, length):
        return None
    return known


def read_beginning(
    model: PreTrainedModel, inputs: dict[str, Tensor], spans: TokenSpans
) -> Beginning:
    """Return the beginning of prompts as ``model`` reads it, which has these spans."""
    cache = DynamicCache(config=cast(Any, model).config)
    with undisturbed():
        beside(model, **inputs, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    return Beginning(inputs, spans, cache, weights_state(model))
