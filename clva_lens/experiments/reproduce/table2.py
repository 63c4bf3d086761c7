"""Table 2: CHAIR, six methods."""

from collections.abc import Sequence

from clva_lens.experiments.reproduce.found import Found
from clva_lens.experiments.reproduce.items import Item, Part, register
from clva_lens.experiments.reproduce.making import Column, captions, make_cells
from clva_lens.experiments.reproduce.needs import Need, Run
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.experiments.reproduce.table1 import LABELS, METHODS
from clva_lens.lens.decoding import Beam

COLUMNS = {"chair_i": ("CHAIR_i", -1), "chair_s": ("CHAIR_s", -1), "recall": ("Recall", 1)}


@register
class Table2(Item):
    """CHAIR."""

    name = "table 2"
    title = "CHAIR"
    method = (
        "In percent, under the paper's headers. CHAIR_i counts mentions and CHAIR_s captions; the "
        "paper's text says which header is meant for two of its models, and these are swapped. "
        "The paper's 500 pictures, lemmatiser and synonyms are not named, so its numbers are on "
        "other pictures than ours. Length is the mean number of words and marks of a caption: "
        "shorter captions hallucinate less."
    )

    def needs(self, subject: Subject) -> Sequence[Need]:
        """Return a run a method."""
        return list(_runs(subject).values())

    def part(self, subject: Subject, found: Found) -> Part:
        """Return the paper's three columns, and the length."""
        runs = {method: [run] for method, run in _runs(subject).items()}
        columns = [
            Column(header, captions(key), runs, metric=key, scale=100, better=better, digits=1)
            for key, (header, better) in COLUMNS.items()
        ]
        columns.append(Column("length", captions("length"), runs, better=0, digits=1))
        return Part(make_cells(subject, found, 2, columns, LABELS))


def _runs(subject: Subject) -> dict[str, Run]:
    benchmark = subject.benchmark("chair")
    beam = Beam(num_beams=5, max_new_tokens=benchmark.max_new_tokens)
    limit = subject.limit_of("chair")
    return {
        name: Run(subject, benchmark, method, beam if name == "beam" else None, limit)
        for name, (_, method) in METHODS.items()
    }
