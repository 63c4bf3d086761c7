"""What PyTorch holds around a call and what decides numbers unseen: autocast, inference mode."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_KINDS = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def exact() -> Iterator[None]:
    """Compute in the types that the tensors have, whatever autocast the caller is in."""
    with ExitStack() as stack:
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run a model as it was loaded and return ordinary tensors, whatever the caller is in.

    For functions that run a model by themselves; no gradients are recorded.
    """
    with exact(), torch.inference_mode(False), torch.no_grad():
        yield
