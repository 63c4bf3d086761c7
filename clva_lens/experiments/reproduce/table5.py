"""Table 5: what the methods cost, beside the accuracies of Table 1."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from clva_lens.experiments.paper import SPLITS
from clva_lens.experiments.reproduce.cells import Cell
from clva_lens.experiments.reproduce.contradictions import QUESTIONS, printed
from clva_lens.experiments.reproduce.found import Found, Missing
from clva_lens.experiments.reproduce.items import Item, Part, register
from clva_lens.experiments.reproduce.making import Column, make_cells, source_of, yes_no
from clva_lens.experiments.reproduce.needs import Measure, Need
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.experiments.reproduce.table1 import LABELS, METHODS, done_sources, pope_runs
from clva_lens.experiments.speed.bench import peak_memory
from clva_lens.lens.decoding import Greedy
from clva_lens.lens.generate import generate
from clva_lens.lens.load import LensModel

TIMED = ("greedy", "IMCCD", "CLVA")
_ROUNDS, _EACH = 3, 8
_GIB = 2.0**30


def measure_costs(model: LensModel, subject: Subject) -> dict[str, Any]:
    """Return seconds an example of each method, one at a time, and the most memory of a pass."""
    (benchmark,) = subject.pope("random", "coco").values()
    count = min(_EACH, subject.limit or _EACH)
    samples = benchmark.samples(count, subject.seed)
    asked = [(benchmark.picture(one), one.question) for one in samples]
    how = Greedy(max_new_tokens=benchmark.max_new_tokens)
    weights = sum(one.numel() * one.element_size() for one in model.hf_model.parameters())
    calls = {
        name: partial(generate, model, asked, METHODS[name][1], how, batch_size=1, progress=False)
        for name in TIMED
    }
    peaks = {name: peak_memory(call, model.hf_model.device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):  # interleaved, so that what else the machine does is the same for all
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            seconds[name].append((time.perf_counter() - begun) / len(asked))
    return {
        "device": model.hf_model.device.type,
        "examples": len(asked),
        "seconds": seconds,
        "bytes": {name: weights + peak for name, peak in peaks.items()},
    }


def _measure(subject: Subject) -> Measure:
    return Measure(subject, "cost", measure_costs, (_ROUNDS + 1) * _EACH * len(TIMED) * 16)


@register
class Table5(Item):
    """Costs."""

    name = "table 5"
    title = "speed and memory on POPE"
    method = (
        "Accuracy is Table 1's average. Seconds are those of one question at a time, the middle "
        "of three interleaved rounds, on this machine; the total is for 3,000 questions, as the "
        "paper's latencies and totals imply (its accuracies are over nine such sets). Memory is "
        "that of the weights and the most that a pass allocates beyond them. Seconds and memory "
        "of another machine cannot be compared, so the last two columns are over greedy's."
    )

    def needs(self, subject: Subject) -> Sequence[Need]:
        """Return the runs of Table 1, and the costs."""
        runs = [
            run
            for split in SPLITS
            for method in TIMED
            for run in pope_runs(subject, split, method).values()
        ]
        return [*runs, _measure(subject)]

    def part(self, subject: Subject, found: Found) -> Part:
        """Return the paper's four columns, and what time and memory are over greedy's."""
        runs = {s: {m: pope_runs(subject, s, m) for m in TIMED} for s in SPLITS}
        done = done_sources(subject, found, runs)
        every = {m: [runs[s][m][source] for s in SPLITS for source in done] for m in TIMED}
        complete = len(done) == 3
        column = Column(
            "Accuracy",
            yes_no("accuracy", source_of),
            every,
            metric="accuracy",
            scale=100,
            complete=complete,
            note="" if complete or subject.toy else f"over {', '.join(done) or 'no source'} only",
        )
        cells = make_cells(subject, found, 5, [column], {name: LABELS[name] for name in TIMED})
        try:
            told = found.measured(_measure(subject))
        except Missing as missing:
            return Part(cells, notes=[f"Costs of {subject.model}: {missing}."])
        return Part(cells + _cost_cells(subject, told))


def _cost_cells(subject: Subject, told: Mapping[str, Any]) -> list[Cell]:
    cells = []
    middle = {name: float(np.median(told["seconds"][name])) for name in TIMED}
    shown = {
        "Total, s": ("seconds", {n: QUESTIONS * middle[n] for n in TIMED}, 0),
        "Memory, GiB": ("gib", {n: told["bytes"][n] / _GIB for n in TIMED}, 2),
        "s / example": ("seconds_each", middle, 3),
    }
    for header, (metric, values, digits) in shown.items():
        for name in TIMED:
            place = (subject.printed, "", name, metric)
            cell = Cell(
                subject.model,
                LABELS[name],
                header,
                values[name],
                printed=printed(5, *place),
                better=0,
                digits=digits,
                note=f"on {told['device']}",
                comparable=False,
            )
            cells.append(cell)
    for header, (metric, values, _) in list(shown.items())[1:]:
        base = printed(5, subject.printed, "", "greedy", metric)
        for name in TIMED:
            theirs = printed(5, subject.printed, "", name, metric)
            over = None if theirs is None or base is None else theirs / base
            each = [
                a / b for a, b in zip(told["seconds"][name], told["seconds"]["greedy"], strict=True)
            ]
            ends = (min(each), max(each)) if metric == "seconds_each" else (None, None)
            cells.append(
                Cell(
                    subject.model,
                    LABELS[name],
                    f"{header.split(',')[0]} / greedy's",
                    values[name] / values["greedy"],
                    *ends,
                    printed=over,
                    better=0,
                    note="the ends are of three rounds" if ends[0] is not None else "",
                )
            )
    return cells
