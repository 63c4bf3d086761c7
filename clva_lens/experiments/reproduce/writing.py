"""The report of a reproduction: HTML to read, LaTeX to print, CSV to compute with."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clva_lens.experiments.reproduce.items import Item, Part
from clva_lens.experiments.reproduce.latex import latex_report
from clva_lens.experiments.reproduce.pages import html_report
from clva_lens.experiments.reproduce.sections import Section
from clva_lens.figures.base import save

_CSV = (
    "item",
    "model",
    "row",
    "column",
    "ours",
    "low",
    "high",
    "printed",
    "verdict",
    "change",
    "change_low",
    "change_high",
    "printed_change",
    "mark",
    "n",
    "note",
)


def write_report(
    parts: Mapping[Item, Mapping[str, Part]],
    out: Path,
    facts: Sequence[tuple[str, str]],
    origin: Mapping[str, Any],
) -> list[Path]:
    """Write report.html, report.tex, cells.csv and a CSV an item, with figures; return the paths.

    ``parts`` are the parts of each item by model, ``facts`` what is said at the top; ``origin`` is
    written into the figures.
    """
    figures = out / "figures"
    sections = [_section(item, by_model, figures, origin) for item, by_model in parts.items()]
    pages: dict[str, Callable[[], str]] = {
        "report.html": lambda: html_report(sections, facts),
        "report.tex": lambda: latex_report(sections, facts),
        "cells.csv": lambda: _csv(sections),
        "answers.jsonl": lambda: _answers(sections),
    }
    pages |= {f"{one.slug}.csv": lambda one=one: _csv([one]) for one in sections if one.cells}
    for name, make in pages.items():
        (out / name).write_text(make(), encoding="utf-8", newline="")
    return [out / name for name in pages]


def _section(
    item: Item, by_model: Mapping[str, Part], figures: Path, origin: Mapping[str, Any]
) -> Section:
    drawn = []
    for slug, part in by_model.items():
        for name, drawing in part.drawings.items():
            file = f"{item.name}_{name}_{slug}".replace(" ", "_")
            save(drawing, figures, file, None, {**origin, "item": item.name, "model": slug})
            drawn.append((file, f"{item.name.capitalize()}: {name} of {slug}"))
    every = list(by_model.values())
    return Section(
        item.name,
        item.title,
        item.method,
        [cell for part in every for cell in part.cells],
        drawn,
        [one for part in every for one in part.answers],
        list(dict.fromkeys(note for part in every for note in part.notes)),
    )


def _csv(sections: Sequence[Section]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for section in sections:
        marked = section.marks
        for place, cell in enumerate(section.cells):
            note = "; ".join(one for one in (cell.note, cell.contradiction or "") if one)
            row = (
                *(section.name, cell.model, cell.row, cell.column, cell.value, cell.low),
                *(cell.high, cell.printed, cell.verdict, cell.change, cell.change_low),
                *(cell.change_high, cell.printed_change, marked.get(place), cell.n, note),
            )
            writer.writerow([_plain(one) for one in row])
    return text.getvalue()


def _plain(value: Any) -> Any:
    """Return a number as it is, None as nothing; text that a spreadsheet would run gets a quote."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@"):
        return f"'{value}"
    return value


def _answers(sections: Sequence[Section]) -> str:
    rows = [
        {
            "item": section.name,
            "model": one.model,
            "sample": one.sample,
            "question": one.question,
            "answers": dict(one.answers),
            "marked": {name: [list(span) for span in spans] for name, spans in one.marked.items()},
            "told": dict(one.told),
        }
        for section in sections
        for one in section.answers
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
