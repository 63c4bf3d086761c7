"""Text of models in the report: shown as it is in HTML, LaTeX, CSV and JSON, and never obeyed."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from clva_lens.benchmarks.chair_reading import Reader
from clva_lens.benchmarks.chair_vocabulary import vocabulary
from clva_lens.experiments.reproduce.cases import wrong_words
from clva_lens.experiments.reproduce.cells import Cell
from clva_lens.experiments.reproduce.escaping import in_html, in_latex, marked
from clva_lens.experiments.reproduce.items import Answered, Item, Part
from clva_lens.experiments.reproduce.latex import _table
from clva_lens.experiments.reproduce.sections import Section
from clva_lens.experiments.reproduce.writing import write_report

HOSTILE = (
    '<script>alert("1")</script> & 50% of a_b $x$ #1 ^~ {\\input{/etc/passwd}} `sh` | \' " >\x00'
)
EXTRAS = ["</td></table>", "\\end{document}", "=cmd()", "犬 🐕", "&amp;", "%\nnext", "a--b ---"]
EXTRAS.append("".join(filter(str.isprintable, map(chr, range(0xA1, 0x180)))))


class Strange(Item):
    name, title, method = "table 1", HOSTILE, HOSTILE

    def needs(self, subject):
        return []

    def part(self, subject, found):
        raise NotImplementedError


class Page(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module", params=[HOSTILE, *EXTRAS], ids=range(1 + len(EXTRAS)))
def written(request, tmp_path_factory):
    text = request.param
    cells = [
        Cell(text, f"{row} {text}", f"{text} {row}", float(row), 0.0, 2.0, printed=1.0, note=text)
        for row in range(3)
    ]
    told = Answered(text, text, text, {text: text}, {text: [(1, 4)]}, {text: text})
    part = Part(cells, answers=[told], notes=[text])
    out = tmp_path_factory.mktemp("report")
    return text, out, write_report({Strange(): {"m": part}}, out, [(text, text)], {})


def test_html_has_the_text_and_no_element_of_it(written):
    text, out, _ = written
    page = Page()
    page.feed((out / "report.html").read_text(encoding="utf-8"))
    shown = text.replace("\x00", "\ufffd")
    own = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "b", "span", "ul"}
    own |= {"li", "table", "tr", "th", "td", "a", "div", "mark"}
    assert set(page.tags) <= own
    whole = "".join(page.text)
    # Model, column, row, note, sample, question, fact, and the answer across its mark.
    assert whole.count(shown) >= 8
    assert {value for name, value in page.attributes if name == "title"} == {shown}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    raw = (out / "report.html").read_text(encoding="utf-8")
    assert "<mark>" in raw and "<script" not in raw.lower()


def test_latex_obeys_nothing_of_it(written):
    _, out, _ = written
    document = (out / "report.tex").read_text(encoding="utf-8")
    assert document.count(r"\end{document}") == 1 and r"\input" not in document
    assert r"\wrongword{" in document
    body = document.split(r"\begin{document}")[1]
    assert not re.search(r"(?<!\\)#", body)
    # Comments are only ours, at the end of the box's first line.
    assert set(re.findall(r"(?<!\\)%.*", body)) <= {"%"}
    depth = 0
    for sign in re.findall(r"\\.|[{}]", body, flags=re.DOTALL):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    for line in rows:
        if r"\multicolumn" not in line:
            assert len(re.findall(r"(?<!\\)&", line)) == 3, line
    assert body.count("$") % 2 == body.count(r"\$") % 2
    assert all(ord(c) < 0x180 for c in body)


def test_latex_compiles(written):
    """Every command of ours can be defined (LaTeX keeps names that begin with "end" to itself)."""
    _, out, _ = written
    document = (out / "report.tex").read_text(encoding="utf-8")
    defined = re.findall(r"\\newcommand\{\\(\w+)\}", document)
    assert len(defined) == 5 and not any(name.startswith("end") for name in defined)
    latex = shutil.which("pdflatex")
    if latex is None:
        pytest.skip("there is no pdflatex; un-skip where texlive-latex-recommended is installed")
    told = [latex, "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "report.tex"]
    done = subprocess.run(told, cwd=out, capture_output=True, check=False)
    said = done.stdout.decode("latin-1")
    assert done.returncode == 0 and "Output written on report.pdf (1 page" in said, said[-2000:]
    assert not re.search(r"Overfull .vbox|Missing|LaTeX Error", said)


def test_a_long_table_is_cut_evenly():
    def rows_of_boxes(count):
        cells = [Cell("m", f"row {n}", "c", float(n)) for n in range(count)]
        section = Section("table 1", "", "", cells, [], [], [])
        boxes = _table(section).split("\n\n")
        return [box.count("row") for box in boxes]

    assert rows_of_boxes(30) == [30]
    assert rows_of_boxes(31) == [16, 15]


def test_tables_of_numbers_and_answers_come_back(written):
    text, out, _ = written
    with (out / "cells.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and not any(row["note"].startswith(("=", "+", "@")) for row in rows)
    assert all(row["note"].removeprefix("'") == text.replace("\r", "") for row in rows)
    (told,) = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert told["question"] == text and told["answers"] == {text: text}


def test_escapes_of_single_characters():
    for c in "<>&\"'":
        assert c not in in_html(c).replace("&lt;", "").replace("&gt;", "").replace(
            "&amp;", ""
        ).replace("&quot;", "").replace("&#x27;", "")
    for c in "\\{}$&#%_^~<>|":
        assert in_latex(c).startswith("\\") and in_latex(c) != c
    assert in_latex("a  b\n\nc") == "a b c"
    assert marked("a<b>c", [(1, 4)], in_html, "[", "]") == "a[&lt;b&gt;]c"


def test_wrong_objects_are_found_in_the_text():
    reader = Reader(vocabulary("builtin"), "builtin")
    cases = {
        "Two dogs sit near a cat.": (["dog"], ["cat"]),
        "A hot dog, and a dog.": (["dog"], ["hot dog"]),
        "A red fire hydrant & a Traffic light": (["fire hydrant"], ["Traffic light"]),
        "A brown dog and a <b>cup</b>": ([], ["dog", "cup"]),
        "Nothing of the kind": ([], []),
    }
    for text, (present, wanted) in cases.items():
        found = [text[start:end] for start, end in wrong_words(text, reader, present)]
        assert found == wanted, text
        counted = [node for node in reader.read(text).nodes if node not in present]
        assert len(counted) == len(found), text
