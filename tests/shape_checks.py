"""Shapes are checked at run time, by jaxtyping and beartype; other types are pyright's to check.

What ``jaxtyping.jaxtyped`` does to every function costs a third of the suite's time: it binds the
arguments and checks them twice. Here only functions and dataclasses whose annotations hold an
array are checked, in one go. Importing this checks ``clva_lens`` as it is imported afterwards;
beartype does not bear nnsight before it.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, get_args

import jaxtyping
from beartype import beartype

# The steps of one test repeat their shapes: a function is checked in the first calls of each test.
ENOUGH = 24
CALLS = Counter[Callable]()


def _holds_an_array(annotation: Any) -> bool:
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(_holds_an_array(part) for part in get_args(annotation))


def check_shapes(found: Any) -> Any:
    """The function or class, with shapes checked wherever its annotations name one."""
    if isinstance(found, classmethod | staticmethod):
        return type(found)(check_shapes(found.__func__))
    if isinstance(found, property):
        return property(found.fget and check_shapes(found.fget), found.fset, found.fdel)
    if inspect.isclass(found):
        if is_dataclass(found) and "__init__" in vars(found):
            found.__init__ = check_shapes(found.__init__)
        return found
    if any(_holds_an_array(one) for one in getattr(found, "__annotations__", {}).values()):
        return _checked(found)
    return found


def _checked(function: Callable) -> Callable:
    strict = beartype(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable or CALLS[function] == ENOUGH:
            return function(*args, **kwargs)
        CALLS[function] += 1
        with _ORIGINAL("context"):  # An axis has one size in all of a call's shapes.
            return strict(*args, **kwargs)

    return call


def _jaxtyped(fn: Any = None, **options: Any) -> Any:
    """Stand for ``jaxtyping.jaxtyped``, with which jaxtyping's import hook decorates everything."""
    return check_shapes if fn is None else _ORIGINAL(fn, **options)


_ORIGINAL, jaxtyping.jaxtyped = jaxtyping.jaxtyped, _jaxtyped
jaxtyping.install_import_hook("clva_lens", "beartype.beartype")
