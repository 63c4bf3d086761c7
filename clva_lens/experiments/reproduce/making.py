"""How the cells of tables of yes/no questions, captions and MME are made of runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clva_lens.benchmarks.chair import CAPTION_METRICS, Captions
from clva_lens.benchmarks.metrics import METRICS, Outcomes, bias_matched_to, why_no_threshold
from clva_lens.benchmarks.run_folder import Report
from clva_lens.experiments.reproduce.cells import Cell
from clva_lens.experiments.reproduce.contradictions import contradiction, printed
from clva_lens.experiments.reproduce.found import Found, Missing
from clva_lens.experiments.reproduce.intervals import (
    FEW,
    Estimate,
    Piece,
    estimate,
    resampled,
    task_columns,
    task_score,
)
from clva_lens.experiments.reproduce.needs import Run
from clva_lens.experiments.reproduce.subjects import Subject


@dataclass(frozen=True)
class Column:
    """A column: its header, where the paper prints it, and how its values become one number.

    ``runs`` are those whose values are averaged, or ``summed``, by the method of a row. ``split``
    and ``metric`` are the paper's names in ``paper_rows``; ``scale`` makes the paper's unit.
    ``complete``: the paper's number is over as many sets as these.
    """

    header: str
    pieces: Callable[[Report], list[Piece]]
    runs: Mapping[str, Sequence[Run]]
    split: str = ""
    metric: str = ""
    scale: float = 1.0
    better: int = 1
    digits: int = 2
    summed: bool = False
    complete: bool = True
    note: str = ""


def groups_of(report: Report) -> list[str]:
    """Return the picture of each row."""
    return [row["group"] or row["id"] for row in report.rows]


def yes_no(metric: str, stratum: Callable[[Report], str]) -> Callable[[Report], list[Piece]]:
    """Return what reads a metric of yes/no questions from a run."""

    def pieces(report: Report) -> list[Piece]:
        columns = Outcomes.from_rows(report.rows)
        return [Piece(stratum(report), groups_of(report), METRICS[metric], columns)]

    return pieces


def source_of(report: Report) -> str:
    """Return whose pictures a POPE set asks about: those of one source are the same."""
    return report.record["benchmark"].rsplit("/", 1)[0]


def captions(metric: str) -> Callable[[Report], list[Piece]]:
    """Return what reads a metric of CHAIR from a run."""

    def pieces(report: Report) -> list[Piece]:
        columns = Captions.from_rows(report.rows)
        return [Piece("captions", groups_of(report), CAPTION_METRICS[metric], columns)]

    return pieces


def tasks(names: Sequence[str]) -> Callable[[Report], list[Piece]]:
    """Return what reads MME's tasks from a run, one piece each; none if one was not asked."""

    def pieces(report: Report) -> list[Piece]:
        made = []
        for name in names:
            rows = [row for row in report.rows if row["category"] == name]
            if not rows:
                return []
            groups = [row["group"] for row in rows]
            made.append(Piece(name, groups, task_score, task_columns(rows)))
        return made

    return pieces


def make_cells(
    subject: Subject,
    found: Found,
    table: int | None,
    columns: Sequence[Column],
    rows: Mapping[str, str],
    *,
    baseline: str | None = None,
) -> list[Cell]:
    """Return the cells of a table for one model.

    ``rows`` are labels by method, ``baseline`` the method that changes are against: None is the
    first row. ``table`` is the paper's, None if it has no such table.
    """
    first = baseline or next(iter(rows))
    made = []
    for column in columns:
        values = {one: _values(column, found, one) for one in dict.fromkeys((first, *rows))}
        counts = {one: _count(column, found, one) for one in rows}
        made += [
            _cell(subject, table, column, method, first, values, label=label, n=counts[method])
            for method, label in rows.items()
        ]
    return made


def _cell(
    subject: Subject,
    table: int | None,
    column: Column,
    method: str,
    first: str,
    values: Mapping[str, np.ndarray | str],
    *,
    label: str,
    n: int | None,
) -> Cell:
    """Return one cell: ours, the paper's, and the changes of both against the first row."""
    own, change, note, mine = Estimate(None), Estimate(None), "", values[method]
    if isinstance(mine, str):
        note = mine
    else:
        own = _scaled(estimate(mine), column.scale)
        if own.value is None:
            note = "undefined: a denominator is 0"
        elif own.low is None:
            note = f"fewer than {FEW} pictures: no interval"
        before = values[first]
        if method != first and not isinstance(before, str):
            change = _scaled(estimate(mine - before), column.scale)
    place = (subject.printed, column.split, method, column.metric)
    theirs, base = (
        printed(table, subject.printed, column.split, one, column.metric)
        if table is not None and column.complete
        else None
        for one in (method, first)
    )
    told = None
    if method != first and theirs is not None and base is not None:
        told = theirs - base
    return Cell(
        model=subject.model,
        row=label,
        column=column.header,
        value=own.value,
        low=own.low,
        high=own.high,
        printed=theirs,
        contradiction=None if table is None else contradiction(table, *place),
        change=change.value,
        change_low=change.low,
        change_high=change.high,
        printed_change=told,
        better=column.better,
        digits=column.digits,
        n=n,
        note="; ".join(part for part in (note, column.note) if part),
    )


def beyond_bias(found: Found, before: Sequence[Run], after: Sequence[Run]) -> Estimate | str:
    """Return the accuracy of a method beyond the baseline with its threshold moved, or why not.

    The mean over sets, in fractions, with its paired interval: exactly 0 for a method that changes
    nothing.
    """
    pairs: list[tuple[Piece, Piece]] = []
    for one, other in zip(before, after, strict=True):
        try:
            first, second = found.report(one), found.report(other)
        except Missing as missing:
            return str(missing)
        a, b = (Outcomes.from_rows(report.rows) for report in (first, second))
        reason = why_no_threshold(a)
        if reason is not None:
            return f"undefined: the baseline has no threshold to move, {reason}"
        place, groups, metric = source_of(first), groups_of(first), METRICS["accuracy"]
        pairs.append(
            (Piece(place, groups, metric, bias_matched_to(a, b)), Piece(place, groups, metric, b))
        )
    moved, own = (resampled([pair[side] for pair in pairs]) for side in (0, 1))
    return estimate((own - moved).mean(axis=1))


def _values(column: Column, found: Found, method: str) -> np.ndarray | str:
    """Return values[1 + resample] of one cell, or why there are none."""
    pieces: list[Piece] = []
    for run in column.runs.get(method, ()):
        try:
            report = found.report(run)
        except Missing as missing:
            return str(missing)
        pieces += column.pieces(report)
    if not pieces:
        return "not asked here"
    values = resampled(pieces)
    return values.sum(axis=1) if column.summed else values.mean(axis=1)


def _count(column: Column, found: Found, method: str) -> int | None:
    try:
        reports: list[Any] = [found.report(run) for run in column.runs.get(method, ())]
    except Missing:
        return None
    return sum(len(report.rows) for report in reports) or None


def _scaled(one: Estimate, scale: float) -> Estimate:
    return Estimate(*(None if value is None else scale * value for value in one))
