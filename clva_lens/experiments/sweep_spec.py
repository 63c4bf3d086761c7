"""A set of runs from one TOML file: models × benchmarks × methods × decodings × seeds.

::

    models = ["toy-llava"]
    seeds = [0, 1]          # which samples a limit takes
    limit = 60
    batch_size = 16

    [[benchmarks]]
    name = "pope/toy/adversarial"
    parser = ["strict", "official"]

    [[methods]]
    name = "none"

    [[methods]]
    name = "clva"
    alpha = [6, 14]
    beta = [0.3, 0.9]

    [[decodings]]
    name = "sampling"
    seed = [0, 1, 2]

A list is tried value by value, each with each; a parameter that is a list itself is written as a
list of lists. Decodings, seeds, limit and batch size may be left out.
"""

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.experiments.reproduce.needs import Run
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.parameters import is_integer
from clva_lens.ground.registry import did_you_mean
from clva_lens.ground.settings import parse_settings
from clva_lens.lens.decoding import DECODINGS
from clva_lens.methods.base import METHODS

_KINDS: dict[str, tuple[Any, str]] = {
    "models": (list, "a list of names"),
    "seeds": (list, "a list of integers from 0"),
    "benchmarks": (list, "tables [[benchmarks]] with a name"),
    "methods": (list, "tables [[methods]] with a name"),
    "decodings": (list, "tables [[decodings]] with a name"),
    "limit": (int, "an integer from 1"),
    "batch_size": (int, "an integer from 1"),
}
_LEAST = {"seeds": 0, "limit": 1, "batch_size": 1}


def read_sweep(path: Path) -> list[Run]:
    """Return the runs of a file, model by model, those that ask the same questions together.

    Raises:
        ParameterError: if the file cannot be read, has a key that is unknown or lacks one, or a
            parameter does not fit.
        UnknownName: if there is no such benchmark, method or decoding.
    """
    told = _read(path)
    benchmarks = list(_each(told, "benchmarks", _benchmark))
    methods = list(_each(told, "methods", _method))
    decodings = list(_each(told, "decodings", _decoding)) or [None]
    limit, size = told.get("limit"), told.get("batch_size", 16)
    subjects = [
        Subject(model, None, seed, size)
        for model in told["models"]
        for seed in told.get("seeds", [0])
    ]
    runs = []
    for subject, benchmark, how in product(subjects, benchmarks, decodings):
        decoding = None if how is None else how(benchmark.max_new_tokens)
        runs += [Run(subject, benchmark, method, decoding, limit) for method in methods]
    by_folder = {run.folder(Path()): run for run in runs}
    if len(by_folder) < len(runs):
        twice = next(run for run in runs if by_folder[run.folder(Path())] is not run)
        raise ParameterError(
            f"'{path}' names runs more than once, for one that of {twice.subject.model} on "
            f"{twice.benchmark.name} under {twice.method or 'none'} (6 and 6.0 are one number). "
            "Leave out what is there twice."
        )
    return runs


def _read(path: Path) -> dict[str, Any]:
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ParameterError(f"'{path}' cannot be read as TOML ({error}). Check it.") from None
    for key, value in told.items():
        if key not in _KINDS:
            hint, known = did_you_mean(key, list(_KINDS)), ", ".join(_KINDS)
            raise ParameterError(f"a sweep has no '{key}'.{hint} It has: {known}.")
        kind, words = _KINDS[key]
        several = value if isinstance(value, list) else [value]
        fits = isinstance(value, kind) and all(_fits(key, one) for one in several)
        if not fits or not several:
            raise ParameterError(f"'{key}' of '{path}' is {words}, but is {value!r}. Write it so.")
    for key in ("models", "benchmarks", "methods"):
        if not told.get(key):
            raise ParameterError(f"'{path}' names no {key}. Write {_KINDS[key][1]}.")
    return told


def _fits(key: str, value: Any) -> bool:
    """Whether one of a key's values is of its kind; tables are looked at where they are made."""
    if key in _LEAST:
        return is_integer(value) and value >= _LEAST[key]
    return key != "models" or (isinstance(value, str) and value != "")


def _each(told: Mapping[str, Any], key: str, make: Callable[..., Any]) -> Iterator[Any]:
    """Yield what a key's tables mean, every combination of the values that they list."""
    for table in told.get(key, []):
        if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
            raise ParameterError(f"one of {key} is {table!r}. Write {_KINDS[key][1]}.")
        rest = {name: value for name, value in table.items() if name != "name"}
        empty = [name for name, value in rest.items() if value == []]
        if empty:
            raise ParameterError(
                f"{empty[0]} of '{table['name']}' is an empty list, so nothing would be run. Write "
                "values, or leave it out."
            )
        listed = [value if isinstance(value, list) else [value] for value in rest.values()]
        for values in product(*listed):
            yield make(table["name"], dict(zip(rest, values, strict=True)))


def _fitting(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return parse_settings(kind, [f"{name}={value!r}" for name, value in values.items()])


def _benchmark(name: str, values: Mapping[str, Any]) -> Any:
    found = BENCHMARKS.get(name)
    return replace(found, **_fitting(type(found), values))


def _method(name: str, values: Mapping[str, Any]) -> Any:
    if name == "none":
        if values:
            raise ParameterError(f"the method 'none' takes no {next(iter(values))}. Leave it out.")
        return None
    kind = METHODS.get(name)
    return kind(**_fitting(kind, values))


def _decoding(name: str, values: Mapping[str, Any]) -> Callable[[int], Any]:
    kind = DECODINGS.get(name)
    given = _fitting(kind, values)
    kind(**given)  # what does not fit is told before anything is asked

    def made(max_new_tokens: int) -> Any:
        return kind(**{"max_new_tokens": max_new_tokens, **given})

    return made
