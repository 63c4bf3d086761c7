"""Figures 8 to 10: answers side by side, with the objects marked that are not in the picture."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from clva_lens.benchmarks.base import Answer, Sample
from clva_lens.benchmarks.chair import score_captions, truth
from clva_lens.benchmarks.chair_reading import Reader
from clva_lens.benchmarks.chair_vocabulary import vocabulary
from clva_lens.benchmarks.files import DATA, locate
from clva_lens.benchmarks.llava_bench import LlavaBench
from clva_lens.benchmarks.llava_judge import read_judgements
from clva_lens.benchmarks.run_folder import Report
from clva_lens.benchmarks.toy_chair import READER as TOY_READER
from clva_lens.experiments.reproduce.cells import Cell
from clva_lens.experiments.reproduce.found import Found, Missing
from clva_lens.experiments.reproduce.intervals import estimate, resampled
from clva_lens.experiments.reproduce.items import Answered, Item, Part, register
from clva_lens.experiments.reproduce.making import captions
from clva_lens.experiments.reproduce.needs import Need, Run
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.ground.errors import BenchmarkError
from clva_lens.methods.clva import CLVA

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_LONGEST = 3
"""Words of the longest name of an object that is looked for: "fire hydrant"."""
_ROWS = {"Greedy": None, "CLVA": CLVA()}


def wrong_words(text: str, reader: Reader, present: Sequence[str]) -> list[tuple[int, int]]:
    """Return where a text names objects that are not there: (start, end), from left to right.

    Words are read one by one and in pairs, by the same rules that count them; the longest reading
    counts.
    """
    words = [(found.start(), found.end()) for found in _WORD.finditer(text)]
    marked, place = [], 0
    while place < len(words):
        for length in range(min(_LONGEST, len(words) - place), 0, -1):
            start, end = words[place][0], words[place + length - 1][1]
            nodes = reader.read(text[start:end]).nodes
            if len(nodes) == 1 and (
                length == 1 or not _shorter(text, words, place, length, reader)
            ):
                if nodes[0] not in present:
                    marked.append((start, end))
                place += length
                break
        else:
            place += 1
    return marked


def _shorter(
    text: str, words: Sequence[tuple[int, int]], place: int, length: int, reader: Reader
) -> bool:
    """Return whether fewer of these words name the same object, so the others add nothing."""
    ends = words[place : place + length]
    whole = reader.read(text[ends[0][0] : ends[-1][1]]).nodes
    parts = [
        text[ends[first][0] : ends[last][1]]
        for first in range(length)
        for last in range(first, length)
        if last - first < length - 1
    ]
    return any(reader.read(part).nodes == whole for part in parts)


@register
class Cases(Item):
    """Answers."""

    name = "figures 8-10"
    title = "answers to LLaVA-Bench side by side"
    method = (
        "Greedy and CLVA on the first questions of the COCO part, where what is in the picture is "
        "known from boxes and captions. Marked is what CHAIR's reading takes for an object that "
        "is not there; it knows 80 kinds of objects and nothing of colours, counts or places, and "
        "the paper's red text is a person's judgement of the whole answer. All answers are "
        "counted in the table, not only those shown. On a toy: captions of its own world. A "
        "judge's replies, if data/judgements has MODEL-METHOD.jsonl, are told below an answer."
    )

    def needs(self, subject: Subject) -> Sequence[Need]:
        """Return both runs."""
        return list(_runs(subject).values())

    def part(self, subject: Subject, found: Found) -> Part:
        """Return the answers of the first questions, and both methods' rates of wrong objects."""
        runs = _runs(subject)
        try:
            reports = {name: found.report(run) for name, run in runs.items()}
            reader, present = _objects(subject, runs["Greedy"], reports["Greedy"])
        except (Missing, BenchmarkError) as missing:
            return Part(notes=[f"{subject.model}: {missing}"])
        judged, notes, shown = {}, [], []
        for name in runs:
            try:
                judged[name] = _judgements(subject, name)
            except BenchmarkError as error:
                judged[name] = {}
                notes.append(f"{subject.model}, {name}: the judge's replies are left out: {error}")
        by_id = {name: {row["id"]: row for row in one.rows} for name, one in reports.items()}
        for row in reports["Greedy"].rows[: subject.limit_of("cases")]:
            texts = {name: rows[row["id"]]["answer"] for name, rows in by_id.items()}
            there = present[row["id"]]
            shown.append(
                Answered(
                    subject.model,
                    f"{row['group']} ({row['id']})",
                    row["question"],
                    texts,
                    {name: wrong_words(text, reader, there) for name, text in texts.items()},
                    {name: judged[name].get(row["id"], "") for name in texts},
                )
            )
        for name, replies in judged.items():
            if replies:
                rows = by_id[name]
                known = len(replies.keys() & rows.keys())
                notes.append(
                    f"{subject.model}, {name}: a judge scored {known} of {len(rows)} answers"
                    f" ({len(replies) - known} replies are about none of them)."
                )
        return Part(_cells(subject, reports, reader, present), answers=shown, notes=notes)


def _runs(subject: Subject) -> dict[str, Run]:
    limit = subject.limit_of("chair") if subject.toy else subject.limit
    benchmark = subject.benchmark("cases")
    return {name: Run(subject, benchmark, method, limit=limit) for name, method in _ROWS.items()}


def _objects(
    subject: Subject, run: Run, report: Report
) -> tuple[Reader, Mapping[str, Sequence[str]]]:
    """Return how answers are read, and the objects of each sample's picture."""
    if subject.toy:
        return TOY_READER, {row["id"]: truth(row["label"]) for row in report.rows}
    assert isinstance(run.benchmark, LlavaBench)
    reader = Reader(vocabulary("builtin"), "builtin")
    labels = run.benchmark.objects(reader)
    return reader, {row["id"]: truth(labels[row["group"]]) for row in report.rows}


def _cells(
    subject: Subject,
    reports: Mapping[str, Report],
    reader: Reader,
    present: Mapping[str, Sequence[str]],
) -> list[Cell]:
    """Return CHAIR's two rates of all answers of both methods."""
    cells = []
    for metric, header in (("chair_i", "wrong objects, %"), ("chair_s", "answers with one, %")):
        before = None
        for name, report in reports.items():
            samples = [
                Sample(r["id"], None, r["question"], ",".join(sorted(present[r["id"]])), r["group"])
                for r in report.rows
            ]
            samples = [replace(one, category=reader.name) for one in samples]
            answers = [
                Answer(r["id"], r["answer"], None, r.get("error") or None) for r in report.rows
            ]
            scored = Report(*_scored(samples, answers, reader), report.record)
            values = 100 * resampled(captions(metric)(scored))[:, 0]
            one, change = estimate(values), None if before is None else estimate(values - before)
            before = values if before is None else before
            cells.append(
                Cell(
                    subject.model,
                    name,
                    header,
                    *one,
                    change=None if change is None else change.value,
                    change_low=None if change is None else change.low,
                    change_high=None if change is None else change.high,
                    better=-1,
                    digits=1,
                    n=len(samples),
                )
            )
    return cells


def _scored(samples: list[Sample], answers: list[Answer], reader: Reader):
    score = score_captions(samples, answers, reader)
    return score.metrics, score.rows


def _judgements(subject: Subject, method: str) -> dict[str, str]:
    """Return a judge's scores by sample, if there is a file of its replies.

    Raises:
        BenchmarkError: if there is one, and it cannot be read.
    """
    name = f"judgements/{subject.slug}-{method}.jsonl"
    try:
        path: Path = locate(None, (name,), "a judge's replies", DATA)
    except BenchmarkError:
        return {}
    return {
        one.id: f"judge: {one.model:g} (reference {one.reference:g})"
        for one in read_judgements(path)
        if one.model is not None and one.reference is not None
    }
