"""Whom a run belongs to: the thread and the task that opened it; for all others it is not there.

A model is one object, and what hangs on it (hooks, the name of its attention function) is seen by
every thread. So each run is known by the context that opened it (a context variable), and its hooks
are silent elsewhere. Whoever shares the context without being its owner is refused in words: a
thread or task that was handed a copy of it, and whoever draws from a half-finished generator.
"""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from types import FrameType, MappingProxyType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from clva_lens.ground.errors import InterventionError

HERE: ContextVar[Mapping[nn.Module, "Owned"]] = ContextVar(
    "clva_lens_runs", default=MappingProxyType({})
)
"""The runs of this thread or task, by the modules that they are at."""

_OPENING: ContextVar["Owned | None"] = ContextVar("clva_lens_opening", default=None)

# Generators that these resume are set-ups: what they open is for whoever comes after them.
_SETTING_UP = ("contextlib", "_pytest.fixtures")


class Owned:
    """What belongs to the thread and the task that made it, and to the generators in ``frames``.

    ``traced``: an nnsight trace serves every call of the model, so no other thread may call it.
    """

    traced = False

    def __init__(self, places: Iterable[nn.Module]) -> None:
        """Name the modules that it is at."""
        self._places = tuple(places)
        self._owner = _owner()
        self.frames: list[FrameType] = []
        self._left = False

    def enter(self) -> None:
        """Be there for this context from now on."""
        known = {place: one for place, one in HERE.get().items() if not one._left}
        HERE.set({**known, **dict.fromkeys(self._places, self)})

    def leave(self) -> None:
        """Be there no more: not in copies of the context either, nor if it ends in another one."""
        self._left = True
        HERE.set({place: one for place, one in HERE.get().items() if not one._left})

    def here(self) -> bool:
        """Whether it belongs to this context."""
        return HERE.get().get(self._places[0]) is self

    def check(self) -> None:
        """Refuse whoever shares the context, but is not its owner.

        Raises:
            InterventionError: if another thread, task or generator is running.
        """
        if self._owner != _owner():
            raise InterventionError(
                "this thread or task was handed the context of another one, which has a run open "
                "on this model, and one run cannot follow two of them. Open cl.intervening() or "
                "cl.observing() in the function that the thread or task runs."
            )
        for frame in self.frames:
            if _is_running(frame):
                continue
            code = frame.f_code
            raise InterventionError(
                f"a half-finished generator, {code.co_name} ({code.co_filename}:"
                f"{code.co_firstlineno}), has a run open on this model, so it is unclear whether "
                "its methods are meant for this call. Exhaust or close() the generator first, or "
                "open cl.intervening() around the loop that draws from it."
            )


def found_at(module: nn.Module) -> Owned | None:
    """Return what this context has open at a module."""
    found = HERE.get().get(module)
    return None if found is None or found._left else found


def _refuse_beside_a_trace(owned: Owned) -> None:
    if owned.traced and owned._owner[0] != threading.get_ident():
        raise InterventionError(
            "another thread traces this model, and an nnsight trace takes part in every call of "
            "it. Call it after the trace, or load the model once more for this thread."
        )


@contextmanager
def opening(owned: Owned | None) -> Iterator[None]:
    """Have hooks that are put on modules in the block belong to ``owned``, or to nobody."""
    token = _OPENING.set(owned)
    try:
        yield
    finally:
        _OPENING.reset(token)


def whose() -> Owned | None:
    """Return whom hooks belong to that are put on modules now."""
    return _OPENING.get()


def hook_before(
    module: nn.Module, call: Callable[..., Any], *, first: bool = False
) -> RemovableHandle:
    """Have ``call(module, args, kwargs)`` before a module; what a run opens is silent elsewhere.

    ``first``: it is where a pass begins, so that whoever is no owner is refused.
    """
    owned = _OPENING.get()

    # While another thread adds or removes the hook, torch may leave out its keyword arguments.
    def before(module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        if owned is not None:
            if not owned.here():
                return _refuse_beside_a_trace(owned) if first else None
            if first:
                owned.check()
        return call(module, args, kwargs)

    return module.register_forward_pre_hook(before, with_kwargs=True)


def hook_after(
    module: nn.Module, call: Callable[..., Any], *, first: bool = False
) -> RemovableHandle:
    """Have ``call(module, args, kwargs, output)`` after a module; see ``hook_before``.

    ``first``: before all hooks that are there.
    """
    owned = _OPENING.get()

    def after(module: nn.Module, args: Any, *rest: Any) -> Any:
        if owned is not None and not owned.here():
            return None
        return call(module, args, *rest)

    return module.register_forward_hook(after, with_kwargs=True, prepend=first)


def drawn_frame() -> FrameType | None:
    """Return the frame of the generator that enters the context manager that asks, if one does.

    Generators that are context managers themselves are passed over.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _sets_up(frame):
        frame = frame.f_back
    while frame is not None:
        if not _sets_up(frame):
            if not frame.f_code.co_flags & (CO_GENERATOR | CO_ASYNC_GENERATOR):
                return None
            if frame.f_back is None or not _sets_up(frame.f_back):
                return frame
        frame = frame.f_back
    return None


def _sets_up(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") in _SETTING_UP


def _owner() -> tuple[int, Any]:
    """Return the thread, and the task if there is one."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task


def _is_running(frame: FrameType) -> bool:
    above: FrameType | None = sys._getframe(1)
    while above is not None:
        if above is frame:
            return True
        above = above.f_back
    return False
