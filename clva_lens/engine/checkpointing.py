"""Gradient checkpointing: layers that are computed once more while gradients flow back.

By then a run may be over or have read another prompt, so what a session did inside of such a layer
cannot be repeated: edits there are refused, and sessions that only look do so once.
"""

import sys
from typing import Literal

from torch.utils.checkpoint import CheckpointFunction

from clva_lens.ground.errors import InterventionError

_TORCH = CheckpointFunction.backward.__code__.co_filename
# What of that file calls a layer the second time: of its two forms, the re-entrant one first.
_AGAIN = ("backward", "unpack_hook")


def checkpointed() -> Literal["first", "again"] | None:
    """Return whether this runs inside of a checkpoint, for the first time or once more."""
    frame, found = sys._getframe(1), None
    while frame is not None:
        if frame.f_code.co_filename == _TORCH:
            if frame.f_code.co_name in _AGAIN:
                return "again"
            found = "first"
        frame = frame.f_back
    return found


def refuse_checkpoint(what: str) -> None:
    """Raise InterventionError: ``what`` is edited or used inside of a checkpoint."""
    raise InterventionError(
        f"{what} is edited or used by a method under gradient checkpointing, which computes it "
        "once more, without the method, while gradients flow back: they would be wrong. Call "
        "model.activation_checkpointing_disable(), or model.eval() if you need none."
    )
