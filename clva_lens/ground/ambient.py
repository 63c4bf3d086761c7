"""What PyTorch holds around a call and what decides numbers unseen: autocast, inference mode."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Made = TypeVar("Made")

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


def without_gradients(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Have a function record no gradients; where none are recorded anyway it costs a call.

    ``torch.no_grad()`` takes 13 each time, which counts in a decoding step.
    """

    @wraps(function)
    def inner(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return inner
