"""What the positions of a sequence are, known by the cache that holds their keys and values.

A pass that reads onto a filled cache brings the new tokens only. Which of the old ones are the
image and which are padding is kept here, for as long as the cache lives, whoever reads on.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Context:
    """The token ids of the positions that a cache holds, and which of them are no padding."""

    ids: Int[Tensor, "batch position"]
    real: Bool[Tensor, "batch position"]

    def __len__(self) -> int:
        """Return the number of positions."""
        return self.ids.shape[1]

    def rows(self, rows: Int[Tensor, " row"]) -> "Context":
        """Return it with these rows."""
        return Context(self.ids[rows], self.real[rows])


_OF_CACHES: WeakKeyDictionary[Any, Context] = WeakKeyDictionary()


def remember(cache: Any, context: Context) -> None:
    """Keep what a cache's positions are, for as long as it lives."""
    _OF_CACHES[cache] = context


def context_of(cache: Any, length: int) -> Context | None:
    """Return what a cache's first ``length`` positions are, None if nobody said."""
    known = None if cache is None else _OF_CACHES.get(cache)
    if known is None or len(known) < length:
        return None
    return Context(known.ids[:, :length], known.real[:, :length])
