"""Table 4 and Eq. 15: which anchors, and heads in classes or all in one average."""

from collections.abc import Mapping, Sequence

from clva_lens.benchmarks.mme import COGNITION, HALLUCINATION, PERCEPTION
from clva_lens.experiments.reproduce.found import Found
from clva_lens.experiments.reproduce.items import Item, Part, register
from clva_lens.experiments.reproduce.making import Column, make_cells, source_of, tasks, yes_no
from clva_lens.experiments.reproduce.needs import Need, Run
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.experiments.reproduce.table1 import HEADERS
from clva_lens.methods.averaged import AveragedAnchors
from clva_lens.methods.base import Method
from clva_lens.methods.clva import CLVA
from clva_lens.methods.controls import Shuffled

_ANCHORS: dict[str, tuple[str, Method | None]] = {
    "none": ("no anchors", None),
    "positive": ("positive only", CLVA(beta=0.0)),
    "negative": ("negative only", CLVA(alpha=0.0)),
    "both": ("both", CLVA()),
    "swapped": ("roles swapped", CLVA(alpha=-0.9, beta=-14.0)),
}
_HEADS: dict[str, tuple[str, Method | None]] = {
    "none": ("no anchors", None),
    "both": ("classes of heads (CLVA)", CLVA()),
    "masks": ("average of all heads' masks", AveragedAnchors()),
    "maps": ("average of all heads' maps", AveragedAnchors(average="maps")),
    "shuffled": ("CLVA on random tokens", Shuffled(CLVA())),
}


class _Ablation(Item):
    """Variants of CLVA on MME and on POPE's random COCO questions."""

    variants: Mapping[str, tuple[str, Method | None]]
    table: int | None = None

    def needs(self, subject: Subject) -> Sequence[Need]:
        """Return both runs of each variant."""
        mme, pope = self._runs(subject)
        return [*mme.values(), *pope.values()]

    def _runs(self, subject: Subject) -> tuple[dict[str, Run], dict[str, Run]]:
        (pope,) = subject.pope("random", "coco").values()
        asked = [
            (subject.benchmark("mme"), subject.limit_of("mme")),
            (pope, subject.limit_of("pope")),
        ]
        mme_of, pope_of = (
            {
                name: Run(subject, benchmark, method, limit=limit)
                for name, (_, method) in self.variants.items()
            }
            for benchmark, limit in asked
        )
        return mme_of, pope_of

    def part(self, subject: Subject, found: Found) -> Part:
        """Return MME's two totals, and F1 and accuracy of POPE."""
        mme, pope = ({m: [run] for m, run in runs.items()} for runs in self._runs(subject))
        columns = [
            Column(
                "MME hallucination", tasks(HALLUCINATION), mme, metric="hallucination", summed=True
            ),
            Column(
                "MME overall",
                _all_tasks,
                mme,
                metric="overall",
                summed=True,
                note="" if not subject.toy else "the toy set has four of the 14 tasks",
            ),
        ]
        columns += [
            Column(
                f"POPE {header}",
                yes_no(metric, source_of),
                pope,
                split="random",
                metric=metric,
                scale=100,
            )
            for metric, header in HEADERS.items()
        ]
        columns.append(Column("yes, %", yes_no("yes_ratio", source_of), pope, scale=100, better=0))
        labels = {name: label for name, (label, _) in self.variants.items()}
        return Part(make_cells(subject, found, self.table, columns, labels))


_all_tasks = tasks((*PERCEPTION, *COGNITION))


@register
class Table4(_Ablation):
    """Anchors."""

    name = "table 4"
    title = "which anchors help"
    method = (
        "MME's totals and POPE on random COCO questions. The paper's swapped anchors are printed "
        "as 1 − 14·Z_pos, a negative weight, so what was run must have been something else: here "
        "the roles of the anchors are swapped."
    )
    variants = _ANCHORS
    table = 4


@register
class Equation15(_Ablation):
    """Classes of heads."""

    name = "equation 15"
    title = "one average of all heads in the place of classes (B.2)"
    method = (
        "B.2 argues that an average over all heads is a low-pass filter, and prints no number. "
        "As printed, Z_avg is the mean of the heads' masks; the mask of their mean map stands "
        "beside it. Both at the layer of the positive anchor; beside them CLVA's own weights on "
        "random tokens."
    )
    variants = _HEADS
