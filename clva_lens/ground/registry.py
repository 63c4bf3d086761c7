"""A name → object table that says "did you mean" when asked for a name it does not have."""

import sys
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from types import ModuleType
from typing import Any, Generic, TypeVar

from clva_lens.ground.errors import ParameterError, UnknownName

T = TypeVar("T")


def known_as(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that ``name`` is, whatever its case; None if there is no single one."""
    known = tuple(known)
    if name in known:
        return name
    alike = [one for one in known if one.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean '…'?" with the nearest known name whatever its case, or nothing."""
    folded = {one.casefold(): one for one in known}
    near = get_close_matches(name.casefold(), folded, n=1)
    return f" Did you mean '{folded[near[0]]}'?" if near else ""


class Registry(Generic[T]):
    """Named objects of one kind, such as methods or benchmarks.

    >>> colours = Registry[str]("colour")
    >>> colours.register("red", "#f00")
    '#f00'
    >>> colours.get("rde")
    Traceback (most recent call last):
        ...
    clva_lens.ground.errors.UnknownName: no colour 'rde'. Did you mean 'red'? Known: red.
    >>> colours.get("Red")
    '#f00'
    """

    def __init__(self, kind: str, check: Callable[[str, T], None] | None = None) -> None:
        """Name the kind of thing kept here; the word appears in error messages.

        ``check(name, item)`` raises, in words, for an item that lacks what its kind must have.
        """
        self.kind = kind
        self._check = check
        self._items: dict[str, T] = {}

    def register(self, name: str, item: T) -> T:
        """Add ``item`` under ``name`` and return it.

        Raises:
            ParameterError: if the name is taken by another object, or ``item`` lacks something.
        """
        if self._check is not None:
            self._check(name, item)
        if self._items.setdefault(name, item) is not item:
            raise ParameterError(f"the {self.kind} '{name}' is registered twice. Rename one.")
        return item

    def get(self, name: str) -> T:
        """Return the object registered as ``name``, whatever its case.

        Raises:
            UnknownName: listing the known names and the nearest one.
        """
        return self._items[self.spelled(name)]

    def spelled(self, name: str) -> str:
        """Return a name as it is registered; case matters only between names that differ by it.

        Raises:
            UnknownName: listing the known names and the nearest one.
        """
        found = known_as(str(name), self._items)
        if found is None:
            known = ", ".join(self.names()) or "none"
            hint = did_you_mean(str(name), self._items)
            raise UnknownName(f"no {self.kind} '{name}'.{hint} Known: {known}.")
        return found

    def remove(self, name: str) -> None:
        """Take the object registered as ``name`` out again.

        Raises:
            UnknownName: listing the known names and the nearest one.
        """
        del self._items[self.spelled(name)]

    def names(self) -> tuple[str, ...]:
        """Return the registered names, sorted."""
        return tuple(sorted(self._items))

    def items(self) -> Iterator[tuple[str, T]]:
        """Iterate over (name, object) pairs in the order of the names."""
        return ((name, self._items[name]) for name in self.names())


def answer_calls(package: str, known: Registry[Any]) -> None:
    """Let a package be called for the names registered in it, as ``cl.methods()`` is.

    The import system puts a package into its parent under its own name, where ``cl.methods()``
    is looked up too, so one object has to be both.
    """

    class Room(ModuleType):
        def __call__(self) -> tuple[str, ...]:
            return known.names()

    sys.modules[package].__class__ = Room
