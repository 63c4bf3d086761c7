"""Scores by task as the paper's Fig. 4 draws them: a radar, one line a method."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clva_lens.figures.base import COLUMN, MARKERS, PALETTE, Drawing, Example, figure, plain
from clva_lens.ground.errors import FigureError

_TASKS = ["existence", "count", "position", "color"]
_ROWS = [
    {"method": method, "metric": task, "value": 90.0 + 10 * number + 20 * place}
    for number, method in enumerate(("greedy", "CLVA"))
    for place, task in enumerate(_TASKS)
]
_OPTIONS = {"tasks": _TASKS, "top": 200.0}


def _recorded(record: Any, table: str, **options: Any) -> Drawing:
    return radar(record.rows(table), **options)


@figure(
    "radar",
    of_record=_recorded,
    example=Example(
        {"rows": _ROWS, **_OPTIONS},
        tables={"methods": _ROWS},
        options={"table": "methods", **_OPTIONS},
    ),
)
def radar(
    rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], *, top: float | int = 200
) -> Drawing:
    """Return a spoke for each task, from 0 to ``top``, and a closed line for each method.

    An area grows with the square of a score and depends on the order of the tasks, so what a radar
    shows of a difference is no measure of it: ``task_scores`` draws the same numbers as dots.

    Args:
        rows: ``method, metric, value``, where a metric is a task's score; others are left out.
        tasks: which ones, clockwise from the top; at least three.
        top: the score at the rim.

    Raises:
        FigureError: if a method lacks a task, or there are more methods than colours.
    """
    chosen = [row for row in rows if row["metric"] in tasks]
    methods = list(dict.fromkeys(row["method"] for row in chosen))
    found = {(row["method"], row["metric"]): row["value"] for row in chosen}
    absent = [f"{m}, {t}" for m in methods for t in tasks if found.get((m, t)) is None]
    if absent or len(tasks) < 3 or not 1 <= len(methods) <= len(PALETTE):
        raise FigureError(
            f"{len(methods)} methods on {len(tasks)} tasks, without a score of: "
            f"{'; '.join(absent) or '–'}. Pass 1 to {len(PALETTE)} methods and 3 tasks or more."
        )
    fig = Drawing(COLUMN, COLUMN + 0.3 + 0.2 * (-(-len(methods) // 3)), chosen)
    ax: Any = fig.add_subplot(projection="polar")
    ax.set_theta_zero_location("N")
    ax.set_theta_direction(-1)
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    closed = np.append(angles, angles[0])
    for number, method in enumerate(methods):
        values = [found[method, task] for task in tasks]
        ax.plot(
            closed,
            [*values, values[0]],
            color=PALETTE[number],
            marker=MARKERS[number],
            ms=3,
            lw=1.1,
            label=plain(method, 24),
        )
    ax.set_ylim(0, top)
    ax.set_yticks([top / 2, top], [f"{top / 2:g}", ""])
    ax.set_rlabel_position(180 / len(tasks))
    ax.set_xticks(angles, [plain(task, 24).replace("_", "\n") for task in tasks])
    ax.tick_params(labelsize=7)
    fig.legend(loc="outside lower center", ncols=min(3, len(methods)))
    return fig
