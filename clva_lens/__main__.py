"""The command line. Each command imports what it needs when it runs, so that --help is quick."""

import functools
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, ParamSpec, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from clva_lens.experiments import commands, run_commands
from clva_lens.experiments.arguments import Settings, benchmark_of
from clva_lens.experiments.commands import Device, Dtype
from clva_lens.experiments.explore_command import explore
from clva_lens.experiments.reproduce.command import reproduce
from clva_lens.ground.errors import ClvaLensError, ParameterError

P = ParamSpec("P")

app = typer.Typer(
    name="clva-lens",
    help="Look inside vision-language models, and act on what you see.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
toy = typer.Typer(help="The embedded toy models.", no_args_is_help=True)
app.add_typer(toy, name="toy")


def friendly(command: Callable[P, None]) -> Callable[P, None]:
    """Print our own errors without a traceback, and exit with status 1."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ClvaLensError as error:
            Console(stderr=True).print(
                f"[bold red]{type(error).__name__}[/]: ", end="", highlight=False
            )
            Console(stderr=True).print(str(error), markup=False, highlight=False)
            raise typer.Exit(1) from None

    return run


@app.command()
@friendly
def demo(
    model: Annotated[
        str, typer.Option(help="A toy name, a Hub id or a folder with a model and its processor.")
    ] = "toy-llava",
    image: Annotated[Path | None, typer.Option(help="Your own picture.")] = None,
    question: Annotated[str | None, typer.Option(help="Your own question about it.")] = None,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("clva-demo"),
    questions: Annotated[int, typer.Option(help="Questions per split (toys only).", min=12)] = 300,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Show which heads look at the picture, how attention drifts, and what CLVA changes."""
    from clva_lens.experiments.demo import demo_picture, demo_toy
    from clva_lens.toy.pretrained import names

    console = Console()
    if image is not None and question is not None:
        demo_picture(model, image, question, out, console, device=device, dtype=dtype)
    elif image is not None or question is not None:
        given, missing = ("--image", "--question") if image else ("--question", "--image")
        raise ParameterError(f"{given} was given without {missing}. Pass both, or neither.")
    elif model in names():
        demo_toy(model, out, questions, console, device=device, dtype=dtype)
    else:
        raise ParameterError(
            f"'{model}' is no toy ({', '.join(names())}), so it needs a picture of yours. Pass "
            "--image photo.jpg --question '…'."
        )


@app.command()
@friendly
def score(
    folder: Annotated[Path | None, typer.Argument(help="The folder of a run.")] = None,
    settings: Settings = None,
    against: Annotated[
        Path | None, typer.Option(help="Another run, that this one is compared with.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Instead of a folder: a file of answers.")
    ] = None,
    benchmark: Annotated[str | None, typer.Option(help="What the file of answers is of.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the score as JSON.")] = None,
) -> None:
    """Score a run again, without a model; with --against, as a paired comparison of two runs."""
    from clva_lens.benchmarks import run_folder as runs
    from clva_lens.benchmarks.comparison import compare
    from clva_lens.ground.settings import parse_settings

    def again(run: Path) -> runs.Report:
        kind = type(runs.benchmark_of(runs.read_run(run).record, {}))
        return runs.score(run, **parse_settings(kind, settings or []))

    if (folder is None) == (answers is None) or (answers is None) != (benchmark is None):
        raise ParameterError("Pass the folder of a run, or --answers FILE with --benchmark NAME.")
    if answers is not None and benchmark is not None:
        report = runs.score_answers(benchmark_of(benchmark, settings), answers)
    else:
        assert folder is not None
        report = again(folder)
    shown, document = [repr(report)], report.document
    if against is not None:
        other = again(against)
        difference = compare(other.score, report.score)
        shown += [f"A: {other!r}", f"A is {against}, B is {folder or answers}.\n{difference!r}"]
        document |= {"against": other.document, "comparison": asdict(difference)}
    Console().print("\n\n".join(shown), markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        out.write_text(json.dumps(runs.plain(document), indent=1) + "\n", encoding="utf-8")


@app.command()
@friendly
def benchmarks() -> None:
    """List the benchmarks, with their settings."""
    from clva_lens.benchmarks.base import BENCHMARKS

    for name, one in BENCHMARKS.items():
        told = ", ".join(f"{key}={value}" for key, value in one.settings.items())
        Console().print(f"{name}  ({told})", markup=False, highlight=False, soft_wrap=True)


@app.command()
@friendly
def bench(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 3,
    quick: Annotated[bool, typer.Option(help="The toy only, to see that it runs.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(
            help="llava-1.5-7b, instructblip-7b, qwen-vl-7b, or a folder with a config.json."
        ),
    ] = None,
    scaling: Annotated[
        str | None, typer.Option(help="Vary the image tokens, the batch or the layers.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts at once, with --random-weights.", min=1)] = 1,
    case: Annotated[
        list[str] | None, typer.Option(help="With --random-weights: this case; may be repeated.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Instead: a run by so many workers of Ray, over one process.", min=1),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to measure.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of --random-weights: bfloat16, …")] = "bfloat16",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 10,
) -> None:
    """Measure what interventions and tracing cost, as ratios within one interleaved run."""
    from clva_lens.experiments.speed.bench import bench as measure
    from clva_lens.experiments.speed.models import (
        Subject,
        dtype_of,
        named_subject,
        scaling_subjects,
    )
    from clva_lens.lens.load import check_device

    check_device(device)
    if workers is not None:
        _bench_workers(workers, rounds, quick, out, beside=random_weights or scaling or case)
        return
    subjects: Iterable[Subject] | None = None
    kind, only = dtype_of(dtype), tuple(case) if case else None
    if scaling is not None:
        subjects = scaling_subjects(scaling, random_weights, device, kind)
    elif random_weights is not None:
        subjects = [named_subject(random_weights, device, kind, batch, only)]
    elif batch > 1 or only:
        raise ParameterError("--batch and --case are for a model of --random-weights. Name one.")
    report = measure(rounds, quick, device=device, subjects=subjects, new_tokens=new_tokens)
    _say_bench(report, out)


def _bench_workers(
    workers: int, rounds: int, quick: bool, out: Path | None, beside: object
) -> None:
    from clva_lens.experiments.speed.several import FEW, QUESTIONS, measure_workers

    if beside:
        raise ParameterError(
            "--workers measures a toy's run, so --random-weights, --scaling and --case do not go "
            "with it. Leave them out."
        )
    _say_bench(measure_workers(workers, FEW if quick else QUESTIONS, rounds), out)


def _say_bench(report: Any, out: Path | None) -> None:
    """Show measurements, and keep them if a file is named."""
    Console().print(report)
    if out is not None:
        out.write_text(json.dumps(report.as_dict(), indent=1), encoding="utf-8")


@app.command()
@friendly
def methods() -> None:
    """List the methods: their papers, cost, decodings (ours: an extension) and parameters."""
    from clva_lens.methods.base import METHODS

    console = Console()
    for name, method in METHODS.items():
        parameters = ", ".join(
            field.name if field.default is MISSING else f"{field.name}={field.default!r}"
            for field in fields(method)  # pyright: ignore[reportArgumentType]
        )
        sites = " and ".join(method.sites) or "no site of its own"
        facts = f"attention: {method.kernel} · forwards a token: {method.forwards:g} · {sites}"
        console.print(f"[bold]{escape(name)}[/]  {escape(method.paper)}", highlight=False)
        decodings = ", ".join(
            f"{one} (ours)" if one in method.extended else one for one in method.decodings
        )
        for line in (facts, f"decoding: {decodings}", parameters):
            console.print(Padding(escape(line), (0, 0, 0, 2)), highlight=False)


@toy.command()
@friendly
def train(
    name: Annotated[
        str,
        typer.Argument(
            help="toy-llava, toy-llava-control, toy-llava-natural (nothing planted), "
            "toy-instructblip, or one to look for drift in (the page on organisms)."
        ),
    ] = "toy-llava",
    seed: Annotated[int, typer.Option(help="Seed of the weights and the scenes.")] = 0,
    folder: Annotated[
        Path | None, typer.Option(help="Checkpoints and result; continues what is there.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the longest stage, if not the recipe's.", min=1)
    ] = None,
    device: Annotated[str, typer.Option(help="Where to train: cpu or cuda.")] = "cpu",
) -> None:
    """Train a toy model from a seed; a run that was interrupted goes on from its checkpoint."""
    import torch
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from clva_lens.lens.load import check_device
    from clva_lens.toy.toys import TOYS
    from clva_lens.toy.train import RECIPE, TIMES

    check_device(device)
    chosen = TOYS.get(name)
    target = folder or Path("toy-runs") / f"{name}-seed{seed}"
    changes = {"seed": seed} if steps is None else {"seed": seed, chosen.steps: steps}
    recipe = replace(chosen.recipe, **changes)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}")) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, step: int, total: int, figures: dict[str, float]) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, figures="")
            text = " ".join(f"{key} {value:.3f}" for key, value in figures.items())
            bar.update(tasks[stage], completed=step + 1, figures=text)

        with torch.device(device):
            model = chosen.train(recipe, target, advance)
    finished = target / "model"
    chosen.save(model, finished)
    for file in (RECIPE, TIMES):
        shutil.copy(target / file, finished / file)
    Console().print(f"Written to {target / 'model'}; measure it with: clva-lens toy card {target}")


@toy.command()
@friendly
def card(
    folder: Annotated[Path, typer.Argument(help="A model folder, or a training run.")],
    scenes: Annotated[int, typer.Option(help="Held-out scenes.", min=20)] = 340,
) -> None:
    """Measure a toy on held-out scenes and write its card (README.md) beside the weights."""
    from clva_lens.experiments.toy_card import write_card

    source = folder / "model" if (folder / "model").is_dir() else folder
    Console().print(f"Written to {write_card(source, scenes, Console())}")


@toy.command()
@friendly
def drift(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished trainings.")],
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = Path("organisms.csv"),
    scenes: Annotated[int, typer.Option(help="Pictures that maps are looked at on.", min=10)] = 60,
    twins: Annotated[int, typer.Option(help="Models with random weights.", min=1)] = 2,
    limit: Annotated[int, typer.Option(help="Captions or questions.", min=2)] = 40,
) -> None:
    """Measure whether maps of trained toys go back to the first layer's, beside untrained ones."""
    from clva_lens.experiments.organism import measure_organisms

    measure_organisms(folders, out, typer.echo, scenes=scenes, twins=twins, limit=limit)
    typer.echo(f"Written to {out}")


for _command in (
    explore,
    commands.check_model,
    commands.analyse,
    commands.records,
    commands.diff,
    commands.verify,
    commands.figures,
    reproduce,
    run_commands.run,
    run_commands.merge,
    run_commands.sweep,
):
    _name = _command.__name__.replace("_", "-")
    app.command(_name)(friendly(cast(Callable[..., None], _command)))


if __name__ == "__main__":
    app()
