"""Table 3: MME's hallucination subset, six methods."""

from collections.abc import Sequence

from clva_lens.benchmarks.mme import HALLUCINATION
from clva_lens.experiments.reproduce.found import Found
from clva_lens.experiments.reproduce.items import Item, Part, register
from clva_lens.experiments.reproduce.making import Column, make_cells, tasks
from clva_lens.experiments.reproduce.needs import Need, Run
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.experiments.reproduce.table1 import LABELS, METHODS
from clva_lens.lens.decoding import Beam


def mme_runs(subject: Subject) -> dict[str, Run]:
    """Return a run of all of MME for each method."""
    benchmark = subject.benchmark("mme")
    beam = Beam(num_beams=5, max_new_tokens=benchmark.max_new_tokens)
    limit = subject.limit_of("mme")
    return {
        name: Run(subject, benchmark, method, beam if name == "beam" else None, limit)
        for name, (_, method) in METHODS.items()
    }


@register
class Table3(Item):
    """MME."""

    name = "table 3"
    title = "MME, hallucination subset"
    method = (
        "Points of 200 a task and of 800 in all, as the official script counts them; a constant "
        "answer gets 50 a task. Intervals resample the pictures of each task. From the runs of "
        "all 14 tasks that Figure 4 draws, where the benchmark has them."
    )

    def needs(self, subject: Subject) -> Sequence[Need]:
        """Return a run a method."""
        return list(mme_runs(subject).values())

    def part(self, subject: Subject, found: Found) -> Part:
        """Return the paper's five columns."""
        runs = {method: [run] for method, run in mme_runs(subject).items()}
        columns = [
            Column(task.capitalize(), tasks((task,)), runs, metric=task, summed=True)
            for task in HALLUCINATION
        ]
        columns.append(
            Column("Total", tasks(HALLUCINATION), runs, metric="hallucination", summed=True)
        )
        return Part(make_cells(subject, found, 3, columns, LABELS))
