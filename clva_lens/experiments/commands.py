"""``clva-lens check-model``, ``analyse``, ``records``, ``diff``, ``verify`` and ``figures``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from clva_lens.ground.errors import RecordError

Root = Annotated[
    Path | None, typer.Option(help="The folder that holds analyses/; by default the checkout.")
]
Device = Annotated[str | None, typer.Option(help="As cuda or cuda:1; else the CPU.")]
Dtype = Annotated[str | None, typer.Option(help="As float16; else the weights' own.")]


def check_model(
    model: Annotated[str, typer.Argument(help="A toy name, a Hub id or a folder.")],
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Say what a model is to clva_lens, check its attention, and which methods apply to it."""
    from clva_lens.lens.facts import check, facts, refusals, sample_prompt, sharing
    from clva_lens.lens.load import load

    console = Console()

    def say(text: str, indent: int = 0) -> None:
        console.print(Padding(escape(text), (0, 0, 0, indent)), highlight=False)

    lens = load(model, check=False, device_map=device, dtype=dtype)
    prompt = sample_prompt(lens)
    say(model)
    for fact in facts(lens, prompt):
        say(fact, 2)
    say(f"check: {check(lens)}", 2)
    say(f"a picture is read once for its questions: {sharing(lens)}", 2)
    say("methods, with their default parameters:")
    for name, reason in refusals(lens, prompt):
        say(f"{name}: applies" if reason is None else f"{name}: refused. {reason}", 2)


def analyse(
    analysis: Annotated[str, typer.Argument(help="The name of a file in analyses/: 03_drift.")],
    new: Annotated[
        bool, typer.Option("--new", help="Write a template of that name, which runs, instead.")
    ] = False,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", help="A parameter, as model=toy-llava; repeatable."),
    ] = None,
    root: Root = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Run an analysis' notebook and keep what it finds as a record.

    Those that ask a model take clva={…} (CLVA's parameters), settings={…} (a benchmark's parser,
    protocol, data or readout) and batch_size=… with -p.
    """
    from clva_lens.experiments import archive
    from clva_lens.experiments.template import write_template
    from clva_lens.lens.load import DEVICE, DTYPE, check_device

    if new:
        path = write_template(archive.find_root(root), analysis)
        Console().print(f"Written: {path}", f"Run it: clva-lens analyse {path.stem}", sep="\n")
        return
    check_device(device)
    given = {name: value for name, value in ((DEVICE, device), (DTYPE, dtype)) if value}
    outcome = archive.analyse(analysis, parameter, root=root, environment=given)
    console, record = Console(), outcome.record
    if outcome.new:
        console.print(f"Kept as [bold]{record.id}[/]", record.folder, sep="\n", highlight=False)
    else:
        console.print(f"The inputs are those of [bold]{record.id}[/], so nothing was recorded.")
        changed = ", ".join(outcome.changed)
        text = f"The results differ in: {changed}." if changed else "The metrics are the same."
        console.print(text, highlight=False)
    _print_metrics(record, console)


def _print_metrics(record: Any, console: Console) -> None:
    table = Table("metric", "value", box=box.SIMPLE_HEAD)
    for name, value in record.metrics.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)


def records(root: Root = None) -> None:
    """List all records."""
    from clva_lens.experiments.archive import Archive, find_root

    console, damaged = Console(), []
    table = Table(box=box.SIMPLE_HEAD)
    rows = []
    for record in Archive(find_root(root)).records():
        try:
            rows.append(_summary(record))
        except RecordError as error:
            damaged.append(f"{record.id}: {error}")
    # A version that is cut off names another one, so names keep their width, whatever is folded.
    table.add_column(
        "record", no_wrap=True, min_width=max((len(row[0]) for row in rows), default=1)
    )
    for title in ("date", "models", "parameters given", "size"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for problem in damaged:
        console.print(problem, highlight=False, style="bold red")
    if damaged:
        raise typer.Exit(1)


def _summary(record: Any) -> tuple[str, ...]:
    inputs, date = record.inputs, record.document["surroundings"]["date"][:10]
    given = ", ".join(f"{name}={value}" for name, value in inputs["given"].items())
    models = ", ".join(model["name"] for model in inputs["models"])
    size = sum(path.stat().st_size for path in record.folder.rglob("*") if path.is_file())
    return record.id, date, models or "–", given or "–", f"{size / 2**10:.0f} KiB"


def diff(
    analysis: Annotated[str, typer.Argument(help="The name of an analysis.")],
    first: Annotated[str, typer.Argument(help="A version: v1.")],
    second: Annotated[str, typer.Argument(help="Another: v2.")],
    root: Root = None,
) -> None:
    """Show which inputs and metrics of two records differ."""
    from clva_lens.experiments.archive import Archive, differences, find_root

    archive = Archive(find_root(root))
    pair = archive.record(analysis, first), archive.record(analysis, second)
    found = differences(*pair)
    if not found:
        Console().print("They have the same inputs and metrics.")
        return
    table = Table("what", first, second, box=box.SIMPLE_HEAD)
    for name, old, new in found:
        table.add_row(name, _short(old), _short(new))
    Console().print(table)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "–" if value is None else str(value)
    return text if len(text) <= 48 else text[:47] + "…"


def verify(root: Root = None) -> None:
    """Hash every file of every record again; fail if one was changed, added or removed.

    A record that was removed, copied or renamed is found by the list of all, records.json.
    """
    from clva_lens.experiments.archive import Archive, find_root

    console, wrong = Console(), Archive(find_root(root)).problems()
    for name, problems in wrong.items():
        for problem in problems:
            console.print(f"{name}: {problem}", highlight=False)
    if any(wrong.values()):
        raise typer.Exit(1)
    console.print(f"{len(wrong)} records are as they were written.")


def figures(
    name: Annotated[
        str | None,
        typer.Argument(help="A record (03_drift for its newest, 03_drift/v1), or a figure."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="The figures of every record.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Draw, compare with the files, and change nothing.")
    ] = False,
    root: Root = None,
) -> None:
    """Draw the figures of records again, from what they keep; no model is loaded.

    With --all only newest versions are drawn, which alone keep their figures; --check looks at all.
    """
    from clva_lens.experiments.archive import Archive, find_root
    from clva_lens.experiments.drawing import check_figures, draw_figures
    from clva_lens.experiments.inventory import enlist

    if (name is None) != every:
        raise RecordError("pass a record or a figure to draw, or --all for everything.")
    console = Console()
    archive = Archive(find_root(root))
    chosen = _chosen(archive, name, check)
    wrong: list[str] = []
    for record in chosen:
        try:
            if check:
                how, found = check_figures(record)
                wrong += found
                console.print(f"{record.id}: {len(record.figures)} figures compared {how}")
            else:
                for path in draw_figures(record, record.folder / "figures"):
                    console.print(str(path), highlight=False)
                enlist(archive.folder, record)
        except RecordError as error:
            wrong.append(f"{record.id}: {error}")
    for problem in wrong:
        console.print(f"[bold red]{problem}[/]", highlight=False)
    if wrong:
        raise typer.Exit(1)


def _chosen(archive: Any, name: str | None, older: bool) -> list[Any]:
    """Return the records that a name means: one, or the newest ones, all or those with a figure.

    Without a name they may be ``older`` versions too.
    """
    newest = {record.folder.parent.name: record for record in archive.records()}
    if name is None:
        return archive.records() if older else [*newest.values()]
    slug, _, version = name.partition("/")
    if slug in newest:
        return [archive.record(slug, version or None)]
    found = [r for r in newest.values() if name in [one["name"] for one in r.figures]]
    if not found:
        drawn = sorted({one["name"] for record in newest.values() for one in record.figures})
        known = ", ".join([*newest, *drawn]) or "none"
        raise RecordError(f"there is no record and no figure '{name}'. There is: {known}.")
    return found
