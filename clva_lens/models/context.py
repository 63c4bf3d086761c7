"""What the positions of a sequence are, known by the cache that holds their keys and values.

A pass that reads onto a filled cache brings the new tokens only. Which of the old positions are the
image, and which are padding, is kept here for as long as the cache lives, whoever reads on.
"""

import sys
from types import CodeType, FrameType
from typing import Any
from weakref import WeakKeyDictionary

from transformers import GenerationMixin

from clva_lens.ground.axes import TokenSpans

_OF_CACHES: WeakKeyDictionary[Any, TokenSpans] = WeakKeyDictionary()
_ASSISTED = GenerationMixin._assisted_decoding.__code__
_PREFILL = GenerationMixin._prefill.__code__


def remember(cache: Any, spans: TokenSpans) -> None:
    """Keep what a cache's positions are, for as long as it lives."""
    _OF_CACHES[cache] = spans


def known_spans(cache: Any, length: int) -> TokenSpans | None:
    """Return what a cache's first ``length`` positions are, None if nobody said."""
    known = None if cache is None else _OF_CACHES.get(cache)
    if known is None or known.image.shape[1] < length:
        return None
    return known.first(length)


def written_before_drafts() -> int | None:
    """Return how many tokens there were before those that assisted decoding has a pass check.

    The prompt and what was accepted since; None if the pass is none of assisted decoding's, which
    nothing but its caller tells.
    """
    caller = _caller(_ASSISTED)
    return None if caller is None else caller.f_locals["input_ids"].shape[1]


def is_generating() -> bool:
    """Whether a pass reads the prompt of ``generate``, which is a whole one."""
    return _caller(_PREFILL, _ASSISTED) is not None


def _caller(*codes: CodeType) -> FrameType | None:
    """Return the innermost call of one of these functions that this is in."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame
