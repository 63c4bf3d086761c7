"""Shapes are checked at run time, by jaxtyping and beartype; other types are pyright's to check.

What ``jaxtyping.jaxtyped`` does to every function costs a third of the suite's time: it binds the
arguments and checks them twice. Here only functions and dataclasses whose annotations hold an
array are checked, in one go. To be imported before the package, and before nnsight.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, get_args

import jaxtyping
from beartype import beartype


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
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        with jaxtyping.jaxtyped("context"):  # An axis has one size in all of a call's shapes.
            return strict(*args, **kwargs)

    return call


def install() -> None:
    """Check ``clva_lens`` as it is imported: the hook decorates all with ``jaxtyping.jaxtyped``."""
    original = jaxtyping.jaxtyped

    def jaxtyped(fn: Any = None, **options: Any) -> Any:
        return check_shapes if fn is None else original(fn, **options)

    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook("clva_lens", "beartype.beartype")
