"""``clva-lens run``, ``merge`` and ``sweep``: benchmarks asked by one process or by several."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from clva_lens.experiments.arguments import Settings, benchmark_of, decoding_of, method_of
from clva_lens.experiments.commands import Device, Dtype
from clva_lens.experiments.engine_options import takes_engine
from clva_lens.ground.errors import ParameterError

Parameters = Annotated[
    list[str] | None,
    typer.Option("--parameter", "-p", help="Of the method, as alpha=10; repeatable."),
]
DecodingParameters = Annotated[
    list[str] | None,
    typer.Option("--decoding-parameter", "-d", help="As num_beams=3; repeatable."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in the folder, if there is one.")
]
ShardOf = Annotated[
    str | None,
    typer.Option("--shard", help="As 3/8: that part only, into shards/3; then clva-lens merge."),
]
Tokens = Annotated[int | None, typer.Option(help="The benchmark's, if not given.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Questions at a time.", min=1)]
KeepFailed = Annotated[bool, typer.Option("--keep-failed", help="As they are.")]
Limit = Annotated[int | None, typer.Option(help="So many samples only.", min=1)]
MaxFailed = Annotated[
    float, typer.Option(help="End the run if more fail, as a share.", min=0, max=1)
]


@takes_engine
def run(
    benchmark: Annotated[str, typer.Option(help="A name from clva-lens benchmarks.")],
    out: Annotated[Path, typer.Option(help="The folder of the run.")],
    model: Annotated[str, typer.Option(help="A toy name, a Hub id or a folder.")] = "toy-llava",
    method: Annotated[str, typer.Option(help="A method, or none.")] = "none",
    parameter: Parameters = None,
    settings: Settings = None,
    decoding: Annotated[str, typer.Option(help="greedy, beam or sampling.")] = "greedy",
    decoding_parameter: DecodingParameters = None,
    max_new_tokens: Tokens = None,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Which samples a limit takes.")] = 0,
    batch_size: BatchSize = 16,
    share: Annotated[bool, typer.Option(help="Read a picture once for its questions.")] = True,
    shard: ShardOf = None,
    engine: Any = None,
    resume: Resume = False,
    keep_failed: KeepFailed = False,
    max_failed: MaxFailed = 0.1,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Run a benchmark and keep every answer; a run that was killed goes on with --resume."""
    from clva_lens.benchmarks.run_writing import check_folder
    from clva_lens.lens.asking import Asking
    from clva_lens.lens.evaluate import check_images, run_benchmark, run_shard
    from clva_lens.lens.load import check_device

    chosen = benchmark_of(benchmark, settings)
    asking = Asking(
        method=method_of(method, parameter),
        decoding=decoding_of(decoding, decoding_parameter, max_new_tokens or chosen.max_new_tokens),
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        share="picture" if share else None,
    )
    part = part_of(shard, engine, out)
    check_folder(out if part is None else part.folder(out), resume)
    check_device(device if engine is None else None)
    check_images(chosen.samples(limit, seed))
    options = {"resume": resume, "keep_failed": keep_failed, "max_failed": max_failed}
    try:
        with loaded(model, engine, device, dtype) as lens:
            if part is None:
                said = repr(run_benchmark(lens, chosen, asking, out=out, **options))
            else:
                folder = run_shard(lens, chosen, asking, part, out, **options)
                said = f"{folder} is finished. When all {part.of} are: clva-lens merge {out}"
    except KeyboardInterrupt:
        Console(stderr=True).print(f"Stopped. Continue with the same command and --resume ({out}).")
        raise typer.Exit(130) from None
    Console().print(said, markup=False, highlight=False, soft_wrap=part is not None)


def loaded(model: str, engine: Any, device: str | None, dtype: str | None) -> Any:
    """Return a context with the model, loaded in this process or by the workers of an engine."""
    from clva_lens.lens.load import load

    if engine is not None:
        return engine.loading(model, dtype=dtype, device_map=device)
    return nullcontext(load(model, dtype=dtype, device_map=device))


def part_of(shard: str | None, engine: Any, out: Path) -> Any:
    """Return the shard of a run, or None; an engine cuts it otherwise."""
    from clva_lens.benchmarks.shards import check_sharded, parse_shard

    if shard is None:
        return None
    if engine is not None:
        raise ParameterError("--shard and --engine both cut the run. Pass one of them.")
    part = parse_shard(shard)
    check_sharded(out)
    return part


def merge(
    folder: Annotated[Path, typer.Argument(help="The folder that --out named.")],
) -> None:
    """Join the shards of a run: the folder becomes that of a run that was not cut."""
    from clva_lens.benchmarks.merging import merge as merged

    Console().print(repr(merged(folder)), markup=False, highlight=False)


@takes_engine
def sweep(
    spec: Annotated[Path, typer.Argument(help="A TOML file: models, benchmarks, methods, ….")],
    out: Annotated[Path, typer.Option(help="The folder of the runs; continues it.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is done, failed and left; run nothing.")
    ] = False,
    engine: Any = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Make many runs from one file; the same command goes on where it was stopped."""
    from clva_lens.experiments.sweep_spec import read_sweep
    from clva_lens.experiments.sweeping import states
    from clva_lens.experiments.sweeping import sweep as made
    from clva_lens.lens.load import check_device

    runs = read_sweep(spec)
    console = Console()
    found = states(runs, out)
    _say_sweep(console, found, out, 1 if engine is None else engine.workers)
    if dry_run:
        return
    check_device(device)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        found = made(runs, out, say, engine=engine, device=device, dtype=dtype)
    except KeyboardInterrupt:
        say(f"Stopped. The same command goes on where it stood ({out}).")
        raise typer.Exit(130) from None
    _say_sweep(console, found, out, 1)
    if any(state.word != "done" for state in found):
        raise typer.Exit(1)


def _say_sweep(console: Console, found: Any, out: Path, workers: int) -> None:
    """Show one line a run, and how long what is left takes."""
    from rich.table import Table

    from clva_lens.experiments.sweeping import forecast

    table = Table("model", "benchmark", "method", "decoding", "seed", "answers", "state")
    for state in found:
        row = state.row
        method = f"{row['method']} {row['parameters']}".removesuffix(" {}")
        answers = f"{state.answers} of {state.samples}"
        words = (row["model"], row["benchmark"], method, row["decoding"], str(row["seed"]))
        table.add_row(*map(escape, (*words, answers, state.word)))
    console.print(table)
    counts = Counter(state.word.partition(":")[0] for state in found)
    told = ", ".join(f"{count} {word}" for word, count in counts.items())
    left = forecast(found, out, workers)
    rest = "unknown until a run is done" if left is None else f"about {left:,.0f} s in the model"
    console.print(f"{len(found)} runs: {told}; what is left takes {rest}.", highlight=False)
