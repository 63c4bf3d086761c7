"""A progress bar, in a terminal and in a notebook."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    """Things per second, over the last minutes."""

    def render(self, task: Task) -> Text:
        """Return the rate, once there is one."""
        speed = task.finished_speed or task.speed
        return Text("-/s" if speed is None else f"{speed:.3g}/s")


@contextmanager
def progress_bar(
    what: str, total: int | None, *, done: int = 0, wanted: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error, with the rate and the time that is left.

    It begins at ``done``; what is called with a number moves it on. ``total`` is None where it is
    not known.
    """
    if not wanted:
        yield lambda count: None
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # In a notebook, rich draws its bars with ipywidgets only.
    shows = find_spec("ipywidgets") if console.is_jupyter else console.is_terminal
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not shows,
        speed_estimate_period=600,  # a batch may take longer than rich's own half minute
    ) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
