"""``clva-lens reproduce``: the tables and figures of the paper, for given checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from clva_lens.experiments.commands import Device, Dtype
from clva_lens.experiments.engine_options import takes_engine


@takes_engine
def reproduce(
    model: Annotated[list[str], typer.Option(help="A toy name, a Hub id or a folder; repeatable.")],
    out: Annotated[Path, typer.Option(help="The folder of runs and report; continues it.")],
    data: Annotated[
        Path | None, typer.Option(help="The folder of the benchmarks' data; toys need none.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help='As "table 1" or "figure 4"; repeatable.')
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="So many samples of each benchmark only.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Which samples a limit takes.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.", min=1)] = 16,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is needed and what is there; run nothing.")
    ] = False,
    engine: Any = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Make the paper's tables and figures again, each number beside the printed one.

    What was stopped goes on where it stood with the same command.
    """
    from rich.console import Console

    from clva_lens.experiments.reproduce.items import chosen
    from clva_lens.experiments.reproduce.reproducing import items_of, reproduce_paper, say_plan
    from clva_lens.experiments.reproduce.subjects import Subject, data_in
    from clva_lens.lens.load import check_device

    items_of()
    items = chosen(only or [])
    subjects = [Subject(one, limit, seed, batch_size) for one in dict.fromkeys(model)]
    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with data_in(data):
        if dry_run:
            say_plan(items, subjects, out, say)
            return
        check_device(device)
        try:
            written: Sequence[Path] = reproduce_paper(
                items, subjects, out, say, engine=engine, device=device, dtype=dtype
            )
        except KeyboardInterrupt:
            say(f"Stopped. The same command goes on where it stood ({out}).")
            raise typer.Exit(130) from None
    for path in written:
        say(str(path))
