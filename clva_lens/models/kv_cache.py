"""The keys and values of earlier passes, under the name that the installed transformers has.

transformers 5.24 calls ``cache`` what was ``past_key_values``, among arguments and results, and
goes on taking the old name.
"""

from collections.abc import Mapping
from typing import Any

from transformers.generation.utils import ALL_CACHE_NAMES

OLD = "past_key_values"
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else OLD


def cache_of(options: Mapping[str, Any]) -> Any:
    """Return the cache among arguments, or in a model's output, under either name; None without."""
    found = options.get(CACHE)
    return options.get(OLD) if found is None else found
