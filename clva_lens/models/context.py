"""What the positions of a sequence are, known by the cache that holds their keys and values.

A pass that reads onto a filled cache brings the new tokens only. Which of the old positions are the
image, and which are padding, is kept here for as long as the cache lives, whoever reads on.
"""

import sys
from types import CodeType, FrameType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from transformers import GenerationMixin

from clva_lens.ground.axes import TokenSpans

_OF_CACHES: WeakKeyDictionary[Any, TokenSpans] = WeakKeyDictionary()
_GENERATING: Any = GenerationMixin
_ASSISTED: CodeType = _GENERATING._assisted_decoding.__code__
_PREFILL: CodeType = _GENERATING._prefill.__code__


def remember(cache: Any, spans: TokenSpans) -> None:
    """Keep what a cache's positions are, for as long as it lives."""
    _OF_CACHES[cache] = spans


def known_spans(cache: Any, length: int) -> TokenSpans | None:
    """Return what a cache's first ``length`` positions are, None if nobody said."""
    known = None if cache is None else _OF_CACHES.get(cache)
    if known is None or known.image.shape[1] < length:
        return None
    return known.first(length)


class Drafting(NamedTuple):
    """How assisted decoding has a pass check tokens that it guessed.

    ``written`` is the number of tokens before them that it was given or has accepted; ``first``:
    the pass reads what it was given too.
    """

    written: int
    first: bool


def drafting() -> Drafting | None:
    """Return what assisted decoding is about, None if the pass is none of its.

    Nothing but its caller tells.
    """
    caller = _caller(_ASSISTED)
    if caller is None:
        return None
    known = caller.f_locals
    return Drafting(known["input_ids"].shape[1], known["is_first_iteration"])


def is_generating() -> bool:
    """Whether a pass reads the prompt of ``generate``, which is a whole one."""
    return _caller(_PREFILL, _ASSISTED) is not None


def beside(model: Any, **inputs: Any) -> Any:
    """Call a model beside the one that generates: it is no pass of that."""
    return model(**inputs)


def _caller(*codes: CodeType) -> FrameType | None:
    """Return the innermost call of one of these functions that this is in."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in codes:
        frame = None if frame.f_code is beside.__code__ else frame.f_back
    return frame
