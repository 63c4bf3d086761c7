"""Scores by task, one mark a method: the paper's Fig. 4."""

from collections.abc import Mapping, Sequence
from typing import Any

from clva_lens.figures.base import (
    COLUMN,
    MARKERS,
    PALETTE,
    Drawing,
    Example,
    embolden,
    figure,
    plain,
)
from clva_lens.ground.errors import FigureError

_TASKS = ["existence", "color"]
_ROWS = [
    {"method": method, "metric": task, "value": 150.0 + 10 * number}
    for number, method in enumerate(("greedy", "clva"))
    for task in _TASKS
]


def _recorded(record: Any, table: str, tasks: Sequence[str]) -> Drawing:
    return task_scores(record.rows(table), tasks)


@figure(
    "task_scores",
    of_record=_recorded,
    example=Example(
        {"rows": _ROWS, "tasks": _TASKS},
        tables={"methods": _ROWS},
        options={"table": "methods", "tasks": _TASKS},
    ),
)
def task_scores(
    rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], label: str = "score (points of 200) ↑"
) -> Drawing:
    """Return a line for each task with the score of each method.

    Args:
        rows: ``method, metric, value``, where a metric is a task's score; others are left out.
        tasks: which ones, from top to bottom.
        label: what a score is, with its unit.

    Raises:
        FigureError: if a task has no row, or there are more methods than colours.
    """
    chosen = [row for row in rows if row["metric"] in tasks]
    methods = list(dict.fromkeys(row["method"] for row in chosen))
    absent = [task for task in tasks if task not in {row["metric"] for row in chosen}]
    if absent or not 1 <= len(methods) <= len(PALETTE):
        raise FigureError(
            f"{len(methods)} methods, and no score of: {', '.join(absent) or '–'}. Pass 1 to "
            f"{len(PALETTE)} methods and tasks that they were scored on."
        )
    fig = Drawing(COLUMN, 0.3 * len(tasks) + 1.1, chosen)
    ax = fig.add_subplot()
    step = 0.6 / max(len(methods) - 1, 1)
    for number, method in enumerate(methods):
        found = {row["metric"]: row["value"] for row in chosen if row["method"] == method}
        ax.plot(
            [found[task] for task in tasks],
            [place - 0.3 + step * number for place in range(len(tasks))],
            MARKERS[number],
            color=PALETTE[number],
            ms=4,
            label=plain(method, 30),
        )
    for place in range(len(tasks) - 1):
        ax.axhline(place + 0.5, color="0.92", lw=0.6)
    ax.set_yticks(range(len(tasks)), [plain(task) for task in tasks])
    ax.set_ylim(len(tasks) - 0.5, -0.5)
    ax.set_xlabel(plain(label))
    ax.grid(axis="x", color="0.92", lw=0.5)
    ax.set_axisbelow(True)
    legend = fig.legend(loc="outside lower center", ncols=min(3, len(methods)))
    embolden(legend.get_texts(), "CLVA")
    return fig
