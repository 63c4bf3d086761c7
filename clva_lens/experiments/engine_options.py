"""``--engine`` and the options that go with it, which several commands take alike."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from clva_lens.ground.errors import ParameterError

Engine = Annotated[
    str | None,
    typer.Option(help='"ray": several processes; install clva-lens with its extra "ray".'),
]
Workers = Annotated[
    int | None, typer.Option(help="Of --engine ray: so many; 2 if not given.", min=1)
]
Threads = Annotated[
    int | None, typer.Option(help="Of each worker, on a CPU; 1 if not given.", min=1)
]
Gpus = Annotated[
    float | None, typer.Option(help="Of each worker; 0.5 is half of one; else none.", min=0)
]
Address = Annotated[
    str | None, typer.Option(help='A running Ray, as "auto"; else one is started here.')
]


def engine_of(
    engine: Engine = None,
    workers: Workers = None,
    threads: Threads = None,
    gpus_per_worker: Gpus = None,
    address: Address = None,
) -> Any:
    """Return the engine that options mean, or None for this process.

    Raises:
        ParameterError: if there is no such engine, or its options are given without one.
    """
    told = {"workers": workers, "threads": threads, "gpus": gpus_per_worker, "address": address}
    given = {name: value for name, value in told.items() if value is not None}
    if engine is None:
        if given:
            option = {"gpus": "gpus-per-worker"}.get(first := next(iter(given)), first)
            raise ParameterError(f"--{option} is an option of --engine ray. Pass that too.")
        return None
    if engine != "ray":
        raise ParameterError(f"there is no engine '{engine}'. Pass --engine ray, or leave it out.")
    from clva_lens.lens.workers import Ray

    return Ray(**given)


def takes_engine(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with these options in the place of its own parameter ``engine``."""
    options = inspect.signature(engine_of).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in options if name in given}
        command(**given, engine=engine_of(**chosen))

    parameters = []
    for name, own in inspect.signature(command).parameters.items():
        parameters += options.values() if name == "engine" else [own]
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run
