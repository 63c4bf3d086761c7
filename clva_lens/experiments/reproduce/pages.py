"""The report as one HTML page, with no script and nothing from elsewhere."""

from collections.abc import Sequence

from clva_lens.experiments.reproduce.cells import Cell
from clva_lens.experiments.reproduce.escaping import in_html, marked
from clva_lens.experiments.reproduce.items import Answered
from clva_lens.experiments.reproduce.sections import Section

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px }
th, td { padding: .3rem .6rem; text-align: right; vertical-align: top; border-top: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
.model th { text-align: left; background: #f4f4f4 }
.interval, .paper, .note, .change { color: #555; font-size: 12px; display: block;
  white-space: nowrap }
.inside { color: #00664a } .outside { color: #a34700 } .contradictory { color: #7a3e66 }
.best { font-weight: 700 } .second { text-decoration: underline }
.answers td { text-align: left; max-width: 28rem } mark { background: #ffd9bf; color: #8c2d00 }
figure { margin: 1rem 0 } img { max-width: 100% } figcaption { color: #555; font-size: 13px }
.wide { overflow-x: auto } .notes { color: #555 }
"""
_CLASSES = {
    "inside": "inside",
    "outside": "outside",
    "printed numbers contradict each other": "contradictory",
}


def html_report(sections: Sequence[Section], facts: Sequence[tuple[str, str]]) -> str:
    """Return the page."""
    told = "".join(f"<li><b>{in_html(name)}</b>: {in_html(text)}</li>" for name, text in facts)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>arXiv:2603.25088v1, measured again</title><style>{_STYLE}</style></head><body>",
        "<h1>arXiv:2603.25088v1, measured again</h1>",
        "<p>Each cell: ours, its 95 % interval over pictures, the change against the first row "
        "with its paired interval, and the number that the paper prints with the verdict: does "
        "our interval hold it? <b class='best'>Best</b> and <span class='second'>second</span> of "
        "a model's column are marked by our value alone, whatever the intervals say; no interval "
        "is corrected for their number.</p>",
        f"<ul>{told}</ul>",
        _summary(sections),
        *(_section(one) for one in sections),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _summary(sections: Sequence[Section]) -> str:
    words = list(dict.fromkeys(word for one in sections for word in one.verdicts))
    head = "".join(f"<th>{in_html(word)}</th>" for word in words)
    rows = "".join(
        f'<tr><td><a href="#{one.slug}">{in_html(one.name)}</a></td>'
        + "".join(f"<td>{one.verdicts[word] or ''}</td>" for word in words)
        + "</tr>"
        for one in sections
        if one.cells
    )
    return f"<table><tr><th>cells by verdict</th>{head}</tr>{rows}</table>"


def _section(section: Section) -> str:
    parts = [
        f'<h2 id="{section.slug}">{in_html(section.name.capitalize())}: '
        f"{in_html(section.title)}</h2>",
        f"<p>{in_html(section.method)}</p>",
        _table(section) if section.cells else "",
        *(f'<p class="notes">{in_html(note)}</p>' for note in section.notes),
        _answers(section.answers) if section.answers else "",
        *(
            f'<figure><img src="figures/{in_html(file)}.png" alt="{in_html(words)}">'
            f"<figcaption>{in_html(words)}</figcaption></figure>"
            for file, words in section.figures
        ),
    ]
    return "\n".join(part for part in parts if part)


def _table(section: Section) -> str:
    columns = list(dict.fromkeys(cell.column for cell in section.cells))
    head = "".join(f"<th>{in_html(column)}</th>" for column in columns)
    lines = [f"<tr><th></th>{head}</tr>"]
    marked_as = section.marks
    placed = {(c.model, c.row, c.column): (at, c) for at, c in enumerate(section.cells)}
    for model in dict.fromkeys(cell.model for cell in section.cells):
        lines.append(
            f'<tr class="model"><th colspan="{len(columns) + 1}">{in_html(model)}</th></tr>'
        )
        for row in dict.fromkeys(cell.row for cell in section.cells if cell.model == model):
            cells = ""
            for column in columns:
                found = placed.get((model, row, column))
                mark = "" if found is None else marked_as.get(found[0], "")
                cells += "<td></td>" if found is None else _cell(found[1], mark)
            lines.append(f"<tr><td>{in_html(row)}</td>{cells}</tr>")
    notes = dict.fromkeys(
        f"{c.row}, {c.column} ({c.model}): {c.contradiction}"
        for c in section.cells
        if c.contradiction and c.printed is not None
    )
    listed = "".join(f"<li>{in_html(note)}</li>" for note in notes)
    below = f'<ul class="notes">{listed}</ul>' if listed else ""
    return f'<div class="wide"><table>{"".join(lines)}</table></div>{below}'


def _cell(cell: Cell, mark: str) -> str:
    digits = cell.digits
    if cell.value is None:
        shown = '<span class="value">–</span>'
    else:
        shown = f'<span class="value {mark}">{cell.value:.{digits}f}</span>'
    if cell.low is not None and cell.high is not None:
        shown += f'<span class="interval">[{cell.low:.{digits}f}, {cell.high:.{digits}f}]</span>'
    if cell.change is not None:
        ends = ""
        if cell.change_low is not None and cell.change_high is not None:
            ends = f" [{cell.change_low:+.{digits}f}, {cell.change_high:+.{digits}f}]"
        theirs = "" if cell.printed_change is None else f", paper {cell.printed_change:+.{digits}f}"
        shown += f'<span class="change">{cell.change:+.{digits}f}{ends}{theirs}</span>'
    if cell.printed is not None:
        kind = _CLASSES.get(cell.verdict, "")
        shown += (
            f'<span class="paper {kind}">paper {cell.printed:.{digits}f}: '
            f"{in_html(cell.verdict)}</span>"
        )
    title = f' title="{in_html(cell.note)}"' if cell.note else ""
    note = f'<span class="note">{in_html(_short(cell.note))}</span>' if cell.note else ""
    return f"<td{title}>{shown}{note}</td>"


def _short(note: str, longest: int = 40) -> str:
    return note if len(note) <= longest else note[: longest - 1] + "…"


def _answers(answers: Sequence[Answered]) -> str:
    lines = []
    for one in answers:
        names = list(one.answers)
        head = "".join(f"<th>{in_html(name)}</th>" for name in names)
        cells = "".join(
            f"<td>{marked(one.answers[n], one.marked.get(n, ()), in_html, '<mark>', '</mark>')}"
            f'<span class="note">{in_html(one.told.get(n, ""))}</span></td>'
            for n in names
        )
        lines.append(
            f'<tr class="model"><th colspan="{len(names)}">{in_html(one.model)}, '
            f"{in_html(one.sample)}: {in_html(one.question)}</th></tr>"
            f"<tr>{head}</tr><tr>{cells}</tr>"
        )
    return f'<div class="wide"><table class="answers">{"".join(lines)}</table></div>'
