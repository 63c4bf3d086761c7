"""Table 6: nucleus sampling on COCO, with and without a nucleus."""

from collections.abc import Sequence

from clva_lens.experiments.paper import SPLITS
from clva_lens.experiments.reproduce.cells import Cell
from clva_lens.experiments.reproduce.found import Found
from clva_lens.experiments.reproduce.items import Item, Part, register
from clva_lens.experiments.reproduce.making import Column, make_cells, source_of, yes_no
from clva_lens.experiments.reproduce.needs import Need, Run
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.experiments.reproduce.table1 import HEADERS
from clva_lens.lens.decoding import Sampling
from clva_lens.methods.clva import CLVA

NUCLEI = (1.0, 0.9)
_METHODS = {"sampling": None, "CLVA": CLVA()}


@register
class Table6(Item):
    """Sampling."""

    name = "table 6"
    title = "nucleus sampling on the COCO part of POPE"
    method = (
        "Temperature 1 and one seed. The paper prints neither temperature nor p, so its number "
        "stands beside top-p = 1, which is no nucleus, and beside top-p = 0.9. An interval over "
        "pictures is of this draw alone: another seed is another draw."
    )

    def needs(self, subject: Subject) -> Sequence[Need]:
        """Return a run for each split, nucleus and method."""
        return [
            _run(subject, split, method, top_p)
            for split in SPLITS
            for top_p in NUCLEI
            for method in _METHODS
        ]

    def part(self, subject: Subject, found: Found) -> Part:
        """Return F1 and accuracy of each split, two rows a nucleus."""
        cells: list[Cell] = []
        for top_p in NUCLEI:
            columns = [
                Column(
                    f"{split.capitalize()} {header}",
                    yes_no(metric, source_of),
                    {method: [_run(subject, split, method, top_p)] for method in _METHODS},
                    split=split,
                    metric=metric,
                    scale=100,
                )
                for split in SPLITS
                for metric, header in HEADERS.items()
            ]
            labels = {"sampling": f"Sample, top-p {top_p:g}", "CLVA": f"CLVA, top-p {top_p:g}"}
            cells += make_cells(subject, found, 6, columns, labels)
        return Part(cells)


def _run(subject: Subject, split: str, method: str, top_p: float) -> Run:
    (benchmark,) = subject.pope(split, "coco").values()
    tokens = benchmark.max_new_tokens
    how = Sampling(top_p=top_p, seed=subject.seed, max_new_tokens=tokens)
    return Run(subject, benchmark, _METHODS[method], how, subject.limit_of("pope"))
