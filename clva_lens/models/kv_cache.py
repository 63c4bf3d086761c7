"""The keys and values of earlier passes, under the name that the installed transformers has.

transformers 5.24 calls ``cache`` what was ``past_key_values``, among arguments and results, and
goes on taking the old name.
"""

import copy
from collections.abc import Mapping
from typing import Any

from transformers import DynamicCache
from transformers.generation.utils import ALL_CACHE_NAMES

from clva_lens.ground.errors import InterventionError

OLD = "past_key_values"
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else OLD


def cache_of(options: Mapping[str, Any]) -> Any:
    """Return the cache among arguments, or in a model's output, under either name; None without."""
    found = options.get(CACHE)
    return options.get(OLD) if found is None else found


def forked(cache: DynamicCache) -> DynamicCache:
    """Return a cache with the same keys and values, which can go on without the other one."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def take_off(cache: Any, count: int) -> None:
    """Take the last tokens off a key-value cache.

    Raises:
        InterventionError: if a layer of it has forgotten what was before them.
    """
    try:
        cache.crop(-count)
    except RuntimeError as error:
        raise InterventionError(
            "tokens are to be taken off the key-value cache again, but a layer of this model keeps "
            "no past to go back to (linear attention or convolutions, or a prompt that is longer "
            "than its window). Use another method, or a model with full attention in all layers."
        ) from error
