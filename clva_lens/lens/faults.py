"""Faults of the machine and its files: no prompt's own, so that another would not fare better."""

import errno
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from clva_lens.ground.checkout import HOUSE
from clva_lens.ground.errors import ClvaLensError

_OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
# After one of these every call on the device fails; torch before 2.8 has no class for them.
_LOST = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)
_LOST_WORDS = ("CUDA error", "HIP error", "MPS backend error", "device-side assert")
# Decoders of damaged pictures seek to places that no file has: that is the picture's own fault.
_OF_DECODERS = (None, errno.EINVAL, errno.EOVERFLOW)


def machine_fault(error: BaseException) -> str | None:
    """Return "memory", "device" or "file" if an error comes from the machine, else None.

    "file" is an error of the system about a file, wherever in the chain of causes: a picture that
    is gone, or a disk that does not answer.
    """
    for one in _chain(error):
        words = str(one)
        if isinstance(one, _OUT_OF_MEMORY) or "DefaultCPUAllocator" in words:
            return "memory"
        if isinstance(one, _LOST):
            return "device"
        if isinstance(one, RuntimeError) and any(word in words for word in _LOST_WORDS):
            return "device"
        if isinstance(one, OSError) and one.errno not in _OF_DECODERS:
            return "file"
    return None


def own_fault(error: BaseException) -> bool:
    """Return whether an error comes from this package's own lines: a bug, and no refusal.

    One that comes up in a model, in a processor or in torch's Python is theirs.
    """
    frames = traceback.extract_tb(error.__traceback__)
    here = bool(frames) and Path(frames[-1].filename).is_relative_to(HOUSE)
    return here and not isinstance(error, ClvaLensError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes; what was being handled when it came up need not be one."""
    while error is not None:
        yield error
        error = error.__cause__
