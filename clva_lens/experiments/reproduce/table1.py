"""Table 1: POPE, three sources in three splits, six methods."""

from collections.abc import Mapping, Sequence
from functools import partial

from clva_lens.benchmarks.pope_sets import SOURCES
from clva_lens.experiments.paper import SPLITS
from clva_lens.experiments.reproduce.cells import Cell
from clva_lens.experiments.reproduce.found import Found, Missing
from clva_lens.experiments.reproduce.items import Item, Part, register
from clva_lens.experiments.reproduce.making import (
    Column,
    beyond_bias,
    make_cells,
    source_of,
    yes_no,
)
from clva_lens.experiments.reproduce.needs import Need, Run
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.lens.decoding import Beam
from clva_lens.methods.base import Method
from clva_lens.methods.clearsight import ClearSight
from clva_lens.methods.clva import CLVA
from clva_lens.methods.imccd import IMCCD
from clva_lens.methods.memvr import MemVR

METHODS: dict[str, tuple[str, Method | None]] = {
    "greedy": ("Greedy", None),
    "beam": ("Beam Search", None),
    "MemVR": ("MemVR", MemVR()),
    "ClearSight": ("ClearSight", ClearSight()),
    "IMCCD": ("IMCCD", IMCCD()),
    "CLVA": ("CLVA", CLVA()),
}
LABELS = {name: label for name, (label, _) in METHODS.items()}
HEADERS = {"f1": "F1", "accuracy": "Acc."}


def pope_runs(subject: Subject, split: str, method: str) -> dict[str, Run]:
    """Return the runs of a method on a split, by source."""
    found = {}
    for source, benchmark in subject.pope(split).items():
        tokens = benchmark.max_new_tokens
        beam = Beam(num_beams=5, max_new_tokens=tokens) if method == "beam" else None
        asked = {"limit": subject.limit_of("pope"), "decoding": beam}
        found[source] = Run(subject, benchmark, METHODS[method][1], **asked)
    return found


@register
class Table1(Item):
    """POPE."""

    name = "table 1"
    title = "POPE (averaged over MS-COCO, A-OKVQA and GQA)"
    method = (
        "F1 and accuracy in percent, the mean over the sources of each split; the average is the "
        "mean over splits. Intervals resample pictures, together in the splits of a source, which "
        "share them. Beside them: how often yes is said, the AUC of the yes−no margin, and the "
        "accuracy beyond greedy with its threshold moved to as many yeses. The paper names neither "
        "prompt nor parser."
    )

    def needs(self, subject: Subject) -> Sequence[Need]:
        """Return a run for each source, split and method."""
        return [
            run
            for split in SPLITS
            for method in METHODS
            for run in pope_runs(subject, split, method).values()
        ]

    def part(self, subject: Subject, found: Found) -> Part:
        """Return the paper's eight columns and three of ours."""
        runs = {
            split: {method: pope_runs(subject, split, method) for method in METHODS}
            for split in SPLITS
        }
        done = done_sources(subject, found, runs)
        left_out = [source for source in subject.pope(SPLITS[0]) if source not in done]
        used = {
            split: {m: [by[source] for source in done] for m, by in runs[split].items()}
            for split in SPLITS
        }
        every = {m: [run for split in SPLITS for run in used[split][m]] for m in METHODS}
        complete = set(done) == set(SOURCES)
        note = "" if complete or subject.toy else f"over {', '.join(done) or 'no source'} only"
        places = [(split, used[split]) for split in SPLITS] + [("average", every)]
        columns = [
            Column(
                f"{split.capitalize()} {header}",
                yes_no(metric, source_of),
                of,
                split=split,
                metric=metric,
                scale=100,
                complete=complete,
                note=note,
            )
            for split, of in places
            for metric, header in HEADERS.items()
        ]
        columns += [
            Column("yes, %", yes_no("yes_ratio", source_of), every, scale=100, better=0, note=note),
            Column("AUC", yes_no("auc", source_of), every, digits=3, note=note),
        ]
        cells = make_cells(subject, found, 1, columns, LABELS)
        cells += _beyond(subject, found, every, note)
        reasons = [
            f"{source}: {found.reason(runs[SPLITS[0]]['greedy'][source])}" for source in left_out
        ]
        return Part(cells, notes=[f"Left out on {subject.model}: {one}." for one in reasons])


def done_sources(
    subject: Subject, found: Found, runs: Mapping[str, Mapping[str, Mapping[str, Run]]]
) -> list[str]:
    """Return the sources whose greedy runs are all there."""
    done = []
    for source in subject.pope(SPLITS[0]):
        try:
            for split in SPLITS:
                found.report(runs[split]["greedy"][source])
        except Missing:
            continue
        done.append(source)
    return done


def _beyond(
    subject: Subject, found: Found, runs: Mapping[str, Sequence[Run]], note: str
) -> list[Cell]:
    """Return what each method gains over greedy with as many yeses."""
    cells = []
    for method, label in LABELS.items():
        make = partial(Cell, subject.model, label, "beyond bias")
        if not runs["greedy"]:
            cells.append(make(None, note="not run yet"))
            continue
        gain = beyond_bias(found, runs["greedy"], runs[method])
        if isinstance(gain, str):
            cells.append(make(None, note=gain))
        else:
            value, low, high = (None if x is None else 100 * x for x in gain)
            cells.append(make(value, low, high, better=0, note=note))
    return cells
