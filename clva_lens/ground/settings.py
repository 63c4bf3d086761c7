"""Parameters as text: ``alpha=10`` becomes a number because the dataclass's field is one."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from clva_lens.ground.errors import ParameterError
from clva_lens.ground.registry import did_you_mean

_WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse_settings(owner: type, texts: Sequence[str]) -> dict[str, Any]:
    """Return the values that ``texts`` ("name=value") give to fields of the dataclass ``owner``.

    A value is read as a Python literal (10, 0.5, none, [5, 6]) if the field takes one, else as the
    text itself; a single value stands for a sequence of one.

    Raises:
        ParameterError: if a text has no "=", names no field or one twice, or its value does not
            fit the field.
    """
    given: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise ParameterError(f"'{text}' is no setting. Write it as name=value.")
        if name in given:
            raise ParameterError(f"'{name}' is set twice. Set it once.")
        given[name] = _parse(owner, name, value)
    return given


def restore_settings(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of fields of ``owner`` as they were before they were written as JSON.

    Raises:
        ParameterError: if there is no such field, or a value does not fit it.
    """
    restored = {}
    for name, value in values.items():
        try:
            restored[name] = _fit(_hint(owner, name), value, strict=False)
        except ValidationError:
            raise ParameterError(
                f"{owner.__name__} cannot have {name}={value!r}. It was written by another "
                "version: score it with that one."
            ) from None
    return restored


def _hint(owner: type, name: str) -> Any:
    known = [field.name for field in fields(owner)]
    if name not in known:
        hint, listed = did_you_mean(name, known), ", ".join(known) or "nothing to set"
        raise ParameterError(f"{owner.__name__} has no '{name}'.{hint} It has: {listed}.")
    return get_type_hints(owner)[name]


def _parse(owner: type, name: str, text: str) -> Any:
    hint = _hint(owner, name)
    candidates: list[Any] = [text]
    try:
        word = text.strip().lower()
        literal = _WORDS[word] if word in _WORDS else ast.literal_eval(text.strip())
        several = tuple(literal) if isinstance(literal, list) else (literal,)
        candidates = [literal, text, several]
    except (ValueError, SyntaxError):
        pass
    for candidate in candidates:
        try:
            return _fit(hint, candidate, strict=True)
        except ValidationError:
            continue
    kind = getattr(hint, "__name__", str(hint)).replace("typing.", "")
    if str(hint) != kind and "[" in str(hint):
        kind = str(hint).replace("typing.", "").replace("collections.abc.", "")
    raise ParameterError(
        f"{name}={text!r} does not fit {owner.__name__}, where {name} is {kind}. Write a value of "
        "that kind, or pass it in Python."
    )


def _fit(hint: Any, value: Any, strict: bool) -> Any:
    # In a list, because pydantic takes a configuration for anything but a bare dataclass.
    adapter = TypeAdapter(list[hint], config=ConfigDict(arbitrary_types_allowed=True))
    return adapter.validate_python([value], strict=strict)[0]
