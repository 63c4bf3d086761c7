"""Figure 4: all of MME's tasks, as the paper's radar and as dots."""

from collections.abc import Sequence

from clva_lens.benchmarks.mme import COGNITION, PERCEPTION
from clva_lens.experiments.reproduce.found import Found
from clva_lens.experiments.reproduce.items import Item, Part, register
from clva_lens.experiments.reproduce.making import Column, make_cells, tasks
from clva_lens.experiments.reproduce.needs import Need
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.experiments.reproduce.table1 import LABELS
from clva_lens.experiments.reproduce.table3 import mme_runs
from clva_lens.figures import radar, task_scores


@register
class Figure4(Item):
    """MME's tasks."""

    name = "figure 4"
    title = "MME, every task"
    method = (
        "The runs of Table 3. The paper draws a radar and prints no numbers; its area grows with "
        "the square of a score and depends on the order of the tasks, so the same scores stand "
        "beside it as dots, and in the table with their intervals."
    )

    def needs(self, subject: Subject) -> Sequence[Need]:
        """Return Table 3's runs."""
        return list(mme_runs(subject).values())

    def part(self, subject: Subject, found: Found) -> Part:
        """Return both drawings and the table."""
        runs = {method: [run] for method, run in mme_runs(subject).items()}
        columns = [
            Column(task, tasks((task,)), runs, summed=True, digits=1)
            for task in (*PERCEPTION, *COGNITION)
        ]
        cells = make_cells(subject, found, None, columns, LABELS)
        there = [one for one in cells if one.value is not None]
        names = list(dict.fromkeys(one.column for one in there))
        rows = [
            {"method": one.row, "metric": one.column, "value": one.value, "n": one.n}
            for one in there
        ]
        kept = [one for one in cells if one.column in names]
        whole = [
            m
            for m in dict.fromkeys(r["method"] for r in rows)
            if {r["metric"] for r in rows if r["method"] == m} == set(names)
        ]
        rows = [row for row in rows if row["method"] in whole]
        if len(names) < 3 or not rows:
            return Part(kept, notes=[f"{subject.model}: too few tasks for a radar."])
        drawings = {"radar": radar(rows, names), "dots": task_scores(rows, names)}
        return Part(kept, drawings=drawings)
