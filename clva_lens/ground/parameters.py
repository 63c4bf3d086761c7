"""Parameters are what their annotations say: one that is not is named when it is given."""

import functools
import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxtyping import AbstractArray

from clva_lens.ground.errors import ParameterError

_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a text",
    NoneType: "None",
}


class Parameters:
    """A base for frozen dataclasses: fields must fit their annotations, and cannot change.

    A sequence becomes a tuple and a number of another library Python's own, before the class's own
    ``__post_init__`` sees them. The words that a ``Literal`` allows are looked at after it; the
    shapes of tensors, and what else may stand for a tensor, are left to it.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Have the fields checked before the class's own checks, which need not ask for it."""
        super().__init_subclass__(**options)
        own = vars(cls).get("__post_init__")
        if own is not None:

            @functools.wraps(own)
            def checked(self: Any) -> None:
                _check_fields(self)
                own(self)
                _check_choices(self)

            cls.__post_init__ = checked

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ParameterError: naming the first one that does not fit its annotation.
        """
        _check_fields(self)
        _check_choices(self)


def _check_fields(owner: Any) -> None:
    for field in fields(owner):
        given = getattr(owner, field.name)
        found = _checked(type(owner), field.name, given, field.default)
        if found is not given:
            object.__setattr__(owner, field.name, found)


def _check_choices(owner: Any) -> None:
    """Refuse a word that a ``Literal`` does not allow, where the class itself has not."""
    for field in fields(owner):
        hint, value = _hints(type(owner)).get(field.name, Any), getattr(owner, field.name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ParameterError(
                f"{field.name} must be {_said(hint)}, but is {value!r}. Pass one of these."
            )


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of any library, and none of True and False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_arguments(function: Any, **given: Any) -> None:
    """Check arguments against the annotations of the function that they were given to.

    Raises:
        ParameterError: naming the first one that does not fit its annotation.
    """
    known = inspect.signature(function).parameters
    for name, value in given.items():
        _checked(function, name, value, known[name].default)


def check_several(name: str, value: Any, what: str) -> None:
    """Refuse what is not several things, one after another.

    Raises:
        ParameterError: naming the argument, and what its items are.
    """
    one = isinstance(value, str | bytes | Mapping) or hasattr(value, "ndim")
    if one or not isinstance(value, Iterable):
        raise ParameterError(
            f"{name} must be a list of {what}, but is {value!r:.80}. Pass a list of one or more."
        )


def _checked(owner: Any, name: str, value: Any, usual: Any) -> Any:
    """Return a value as its parameter holds it; ``usual`` is what the error advises."""
    hint = _hints(owner).get(name, Any)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ParameterError(f"{name} must fit into 64 bits, but is {value}. Pass a smaller one.")
    try:
        return _fitted(value, hint)
    except TypeError:
        advice = "one" if usual is MISSING else f"{name}={usual!r}"
        raise ParameterError(
            f"{name} must be {_said(hint)}, but is {value!r}. Pass {advice}, for example."
        ) from None


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    try:
        return get_type_hints(owner)
    except NameError:  # of a class in a function, annotated with another one: nothing to go by
        return {}


def _fitted(value: Any, hint: Any) -> Any:
    """Return ``value`` if the annotation allows it, else raise TypeError."""
    kind: Any = get_origin(hint) or hint
    if kind in (Union, UnionType):
        for one in get_args(hint):
            try:
                return _fitted(value, one)
            except TypeError:
                continue
        if not any(map(_is_array, get_args(hint))):  # what may stand for a tensor, the class knows
            raise TypeError
        return value
    if kind in (Any, Literal):
        return value
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        return value if type(value) is int else float(value)
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if kind in (tuple, Sequence):
        several = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(several, Collection) and not isinstance(several, str | bytes | dict):
            return tuple(_fitted(item, get_args(hint)[0]) for item in several)
    elif _is_array(kind):
        kind = getattr(kind, "array_type", Any)
    if kind in (int, float, tuple, Sequence) or not isinstance(value, kind):
        raise TypeError
    return value


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _said(hint: Any) -> str:
    """Return an annotation in words."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        said = dict.fromkeys(_said(one) for one in get_args(hint) if one is not int)
        if int in get_args(hint) and float not in get_args(hint):
            said = {_WORDS[int]: None, **said}
        return " or ".join(said)
    if kind is Literal:
        return " or ".join(repr(one) for one in get_args(hint))
    if kind in (tuple, Sequence):
        return f"a list (each item {_said(get_args(hint)[0])})"
    return _WORDS.get(kind) or f"a {getattr(kind, '__name__', kind)}"
