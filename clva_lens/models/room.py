"""Room behind keys and values that were read before, in which those of a question are written.

transformers' ``DynamicLayer`` copies all that it holds at every pass. Where a question is a few
tokens onto hundreds of a picture, that costs more than to read the question.
"""

import copy
import weakref
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class Held(NamedTuple):
    """A layer's keys and values, of more positions than are in use."""

    keys: Float[Tensor, "batch head room key_channel"]
    values: Float[Tensor, "batch head room value_channel"]


class RoomyLayer(DynamicLayer):
    """Keys and values that take the next ones in place, for as long as there is room.

    Where there is none, where something else was done to them (reordered, cropped), and where
    gradients are kept, they are copied as ``DynamicLayer`` does.
    """

    def __init__(self, held: Held, length: int) -> None:
        """Begin with the first ``length`` positions."""
        super().__init__()
        self.lazy_initialization(*held)
        self._held = held
        self._use(length)

    def __copy__(self) -> DynamicLayer:
        """Return a layer without room: two must not write to the same."""
        assert self.keys is not None and self.values is not None
        other = DynamicLayer()
        other.lazy_initialization(self.keys, self.values)
        other.keys, other.values = self.keys, self.values
        return other

    def _use(self, length: int) -> None:
        self.keys, self.values = (one[..., :length, :] for one in self._held)
        self._used = self.keys, self.values

    def update(
        self,
        key_states: Float[Tensor, "batch head new key_channel"],
        value_states: Float[Tensor, "batch head new value_channel"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[
        Float[Tensor, "batch head all key_channel"], Float[Tensor, "batch head all value_channel"]
    ]:
        """Take the keys and values of more positions; return all."""
        untouched = self.keys is self._used[0] and self.values is self._used[1]
        if not untouched or torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        known = self._used[0].shape[-2]
        length = known + key_states.shape[-2]
        if length > self._held.keys.shape[-2]:
            return super().update(key_states, value_states, *args, **kwargs)
        for one, more in zip(self._held, (key_states, value_states), strict=True):
            one[..., known:length, :] = more
        self._use(length)
        return self._used


class Room:
    """Room for a beginning's rows, which runs that ask the same use one after another.

    Args:
        size: of how many positions behind the beginning.
    """

    def __init__(self, size: int) -> None:
        """Take no memory yet."""
        self.size = size
        self._held: list[Held | None] = []
        self._of: tuple[DynamicCache, list[int]] | None = None
        self._lent: list[weakref.ref[RoomyLayer]] = []

    def fork(self, cache: DynamicCache, rows: Int[Tensor, " row"]) -> DynamicCache:
        """Return a cache of its own with these rows.

        What the last one held is used again if it had the same, and nobody has it any more.
        """
        of = cache, rows.tolist()
        lent = any(layer() is not None for layer in self._lent)
        if lent or self._of is None or self._of[0] is not cache or self._of[1] != of[1]:
            self._held, self._of = [_held(layer, rows, self.size) for layer in cache.layers], of
        length = cache.get_seq_length()
        other = copy.copy(cache)
        other.layers = [
            copy.copy(layer) if held is None else RoomyLayer(held, length)
            for layer, held in zip(cache.layers, self._held, strict=True)
        ]
        self._lent = [weakref.ref(one) for one in other.layers if isinstance(one, RoomyLayer)]
        return other


def _held(layer: Any, rows: Int[Tensor, " row"], room: int) -> Held | None:
    """Return copies of rows with room behind them; None of a layer that uses another's."""
    if not layer.is_initialized:
        return None
    held = []
    for one in (layer.keys, layer.values):
        _, heads, length, channels = one.shape
        more = one.new_empty(len(rows), heads, length + room, channels)
        torch.index_select(one, 0, rows, out=more[..., :length, :])
        held.append(more)
    return Held(*held)
