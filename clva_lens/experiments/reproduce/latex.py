"""The report as a LaTeX document: booktabs tables, figures by name, no package beyond the usual."""

import math
from collections.abc import Sequence

from clva_lens.experiments.reproduce.cells import Cell
from clva_lens.experiments.reproduce.escaping import in_latex, marked
from clva_lens.experiments.reproduce.items import Answered
from clva_lens.experiments.reproduce.sections import Section

_HEAD = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage{textcomp,booktabs,longtable,graphicx,xcolor}
\usepackage[a4paper,landscape,margin=1.5cm]{geometry}
\newcommand{\inside}{\,$\checkmark$}
\newcommand{\outside}{\,$\times$}
\newcommand{\contradictory}{\,$?!$}
\newcommand{\wrongword}[1]{\textcolor{red}{#1}}
\newcommand{\interval}[1]{{\scriptsize #1}}
\usepackage{amssymb}
\begin{document}
"""
_LEGEND = (
    "Ours with its 95 % interval over pictures / the paper's printed number: ",
    r"\inside{} inside, \outside{} outside, \contradictory{} printed numbers contradict each other",
    ". Best in bold, second underlined, by our value alone.",
)
_WIDTH = r"\ifdim\width>\textwidth\textwidth\else\width\fi"
_ROWS = 30  # that a page holds
_VERDICTS = {
    "inside": r"\inside{}",
    "outside": r"\outside{}",
    "printed numbers contradict each other": r"\contradictory{}",
}


def latex_report(sections: Sequence[Section], facts: Sequence[tuple[str, str]]) -> str:
    """Return the document."""
    told = "".join(f"\\item {in_latex(name)}: {in_latex(text)}\n" for name, text in facts)
    parts = [
        _HEAD,
        r"\section*{arXiv:2603.25088v1, measured again}",
        f"{in_latex(_LEGEND[0])} {_LEGEND[1]} {in_latex(_LEGEND[2])}",
        f"\\begin{{itemize}}\n{told}\\end{{itemize}}" if told else "",
        *(_section(one) for one in sections),
        "\\end{document}\n",
    ]
    return "\n".join(part for part in parts if part)


def _section(section: Section) -> str:
    parts = [
        f"\\subsection*{{{in_latex(section.name.capitalize())}: {in_latex(section.title)}}}",
        in_latex(section.method),
        _table(section) if section.cells else "",
        *(f"\\par {in_latex(note)}" for note in section.notes),
        *(_answer(one) for one in section.answers),
        *(
            f"\\par\\noindent\\includegraphics[width=\\textwidth,height=0.8\\textheight,keepaspectratio]"
            f"{{figures/{file}.pdf}}\\par {in_latex(words)}"
            for file, words in section.figures
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def _table(section: Section) -> str:
    """Return the cells, a box a model; a long one is cut, since a box never breaks over pages."""
    columns = list(dict.fromkeys(cell.column for cell in section.cells))
    placed = {(c.model, c.row, c.column): (at, c) for at, c in enumerate(section.cells)}
    boxes = []
    for model in dict.fromkeys(cell.model for cell in section.cells):
        rows = list(dict.fromkeys(cell.row for cell in section.cells if cell.model == model))
        lines = []
        for row in rows:
            cells = [in_latex(row)]
            for column in columns:
                found = placed.get((model, row, column))
                mark = "" if found is None else section.marks.get(found[0], "")
                cells.append("" if found is None else _cell(found[1], mark))
            lines.append(" & ".join(cells) + r" \\")
        size = math.ceil(len(lines) / math.ceil(len(lines) / _ROWS))
        pieces = range(0, len(lines), size)
        boxes += [_box(model, columns, lines[at : at + size]) for at in pieces]
    return "\n\n".join(boxes)


def _box(model: str, columns: Sequence[str], lines: Sequence[str]) -> str:
    head = " & ".join(["", *(in_latex(column) for column in columns)]) + r" \\"
    title = f"\\multicolumn{{{len(columns) + 1}}}{{l}}{{{in_latex(model)}}} \\\\"
    begun = f"\\begin{{tabular}}{{l{'r' * len(columns)}}}"
    parts = [begun, r"\toprule", head, r"\midrule", title, *lines, r"\bottomrule", r"\end{tabular}"]
    table = "\n".join(parts)
    return f"\\par\\noindent\\resizebox{{{_WIDTH}}}{{!}}{{%\n{table}}}"


def _cell(cell: Cell, mark: str) -> str:
    digits = cell.digits
    shown = "--" if cell.value is None else f"{cell.value:.{digits}f}".replace("-", "$-$")
    if mark:
        shown = f"\\textbf{{{shown}}}" if mark == "best" else f"\\underline{{{shown}}}"
    if cell.low is not None and cell.high is not None:
        ends = f"[{cell.low:.{digits}f}, {cell.high:.{digits}f}]".replace("-", "$-$")
        shown += f" \\interval{{{ends}}}"
    if cell.printed is not None:
        shown += f" / {cell.printed:.{digits}f}{_VERDICTS.get(cell.verdict, '')}"
    return shown


def _answer(one: Answered) -> str:
    lines = [f"\\par\\textbf{{{in_latex(one.model)}, {in_latex(one.sample)}}}: "]
    lines.append(in_latex(one.question))
    for name, text in one.answers.items():
        said = marked(text, one.marked.get(name, ()), in_latex_piece, r"\wrongword{", "}")
        told = one.told.get(name, "")
        lines.append(f"\\par\\textit{{{in_latex(name)}}}: {said} {in_latex(told)}")
    return "\n".join(lines)


def in_latex_piece(text: str) -> str:
    """Return a piece of a text, with the spaces at its ends."""
    left = " " if text[:1].isspace() else ""
    right = " " if text[-1:].isspace() and text.strip() else ""
    return left + in_latex(text) + right
