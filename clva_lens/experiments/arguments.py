"""What is written on a command line, as the benchmark, method and decoding that it means."""

from dataclasses import replace
from typing import Annotated, Any

import typer

from clva_lens.ground.errors import ParameterError

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="A setting of the benchmark, as parser=strict; repeatable."),
]


def benchmark_of(name: str, settings: list[str] | None) -> Any:
    """Return a registered benchmark with some of its settings changed."""
    from clva_lens.benchmarks.base import BENCHMARKS
    from clva_lens.ground.settings import parse_settings

    found = BENCHMARKS.get(name)
    return replace(found, **parse_settings(type(found), settings or []))


def method_of(name: str, parameters: list[str] | None) -> Any:
    """Return a registered method with these parameters, or None for "none"."""
    from clva_lens.ground.settings import parse_settings
    from clva_lens.methods.base import METHODS

    if name != "none":
        kind = METHODS.get(name)
        return kind(**parse_settings(kind, parameters or []))
    if parameters:
        raise ParameterError(f"-p {parameters[0]} was given without a method. Pass --method too.")
    return None


def decoding_of(name: str, parameters: list[str] | None, max_new_tokens: int) -> Any:
    """Return a decoding with these parameters."""
    from clva_lens.ground.settings import parse_settings
    from clva_lens.lens.decoding import DECODINGS

    kind = DECODINGS.get(name)
    given = parse_settings(kind, parameters or [])
    return kind(**{"max_new_tokens": max_new_tokens, **given})
