"""The analyses of this checkout: they run on the toys, and their records are what they say."""

import ast
import re
import shutil
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.experiments import notebook as notebooks
from clva_lens.experiments.archive import Archive, analyse
from clva_lens.experiments.drawing import check_figures
from clva_lens.ground.moved import MOVED

ARCHIVE = Archive(Path(__file__).parents[2])

# What makes each analysis small enough to run with every change; 7 questions are of two pictures,
# so that intervals over pictures can be drawn.
SMALL = {
    "00_tour": ["questions=12"],
    "01_head_intensity": ["questions=24"],
    "02_saliency": ["pictures=2"],
    "03_drift": ["questions=12"],
    "04_pope": ["questions=7"],
    "05_chair": ["captions=4"],
    "06_mme": ["pictures=3"],
    "07_anchors": ["questions=7"],
    "08_speed": ["small=True", "rounds=1", "new_tokens=2"],
    "09_nucleus": ["questions=12", "seeds=[0]"],
    "10_strengths": ["questions=12", "alphas=[0, 14]", "betas=[0.0, 0.9]"],
    "11_sensitivity": ["questions=7", "captions=2"],
    "12_paper_arithmetic": [],
    "13_is_there_drift": ["scenes=2", "questions=7", 'models=["toy-llava"]'],
    "14_method_zoo": [
        "questions=7",
        "captions=2",
        "references=4",
        "twins=1",
        'only=["CLVA", "VCD", "VISTA", "beam"]',
    ],
    "15_attribution": ["pairs=2", "edges=4", "steps=2"],
    "16_steering": ["questions=7", "captions=2", "scenes=6", "trials=1"],
    "17_maps_judged": ["pictures=2", 'maps=["relevancy"]'],
}
RECORDS = ARCHIVE.records()


def test_every_analysis_has_a_record_and_is_run_here():
    assert set(SMALL) == set(ARCHIVE.analyses())
    assert {record.folder.parent.name for record in RECORDS} == set(SMALL)


@pytest.fixture
def short_captions(monkeypatch):
    """Captions of some words: two or three objects, not all."""
    short = replace(BENCHMARKS.get("chair/toy"), max_new_tokens=12)
    monkeypatch.setitem(BENCHMARKS._items, "chair/toy", short)


@pytest.mark.parametrize("slug", SMALL)
def test_it_runs_on_the_toys(slug, tmp_path, no_kernel, short_captions):
    root = tmp_path / "checkout"
    shutil.copytree(ARCHIVE.root / "analyses", root / "analyses", ignore=lambda *_: ["records"])
    outcome = analyse(slug, SMALL[slug], root=root, progress=False)
    assert outcome.new and outcome.record.problems() == []
    assert outcome.record.metrics and outcome.record.document["files"]
    runs = outcome.record.inputs["runs"]
    assert bool(runs) == ("record.ran" in ARCHIVE.source(slug).read_text())
    for run in runs:
        assert run["decoding"]["max_new_tokens"] and run["method"]["name"] and run["settings"]
    if runs:
        answers = outcome.record.rows("answers")
        assert len(answers) == sum(run["samples"] for run in runs)
        assert all(one["answer"] is not None and one["label"] is not None for one in answers)
        assert outcome.record.document["excluded"]["failed samples"] == 0
    if not SMALL[slug]:
        assert outcome.record.metrics == ARCHIVE.record(slug).metrics


def test_committed_records_are_as_they_were_written_and_small():
    assert ARCHIVE.problems() == {record.id: [] for record in RECORDS}
    assert not any(record.document["surroundings"]["changed"] for record in RECORDS)
    files = [path for path in (ARCHIVE.root / "analyses").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6
    newest = {record.folder.parent: record for record in RECORDS}.values()
    drawn = {path.parents[1] for path in files if path.suffix in (".pdf", ".png")}
    assert drawn <= {record.folder for record in newest}, "older versions keep no figures"


@pytest.mark.parametrize("slug", SMALL)
def test_the_newest_record_draws_its_figures(slug):
    """``clva-lens figures --all --check`` does it for all versions."""
    how, wrong = check_figures(ARCHIVE.record(slug))
    assert wrong == [], how


def prose(notebook):
    """The text of a notebook, modules by their paths of today."""
    text = "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    for old, new in MOVED.items():
        text = re.sub(rf"clva_lens\.{old}\b", f"clva_lens.{new}", text)
        text = text.replace(f"clva_lens/{old}.py", f"clva_lens/{new.replace('.', '/')}.py")
    return text


def kept_things(notebook):
    """The calls of the record in a notebook's code: what is kept, drawn and said, in order.

    Of data only that they are told: which they are is what the source asks.
    """
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    calls = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    own = [call for call in calls if ast.unparse(call.func).startswith("record.")]
    return ["record.data" if c.func.attr == "data" else ast.unparse(c) for c in own]


@pytest.mark.parametrize("slug", SMALL)
def test_the_notebook_says_and_keeps_what_its_source_does(slug):
    """It is a record's, as executed; since then a source may import and ask otherwise, no more."""
    kept, source = nbformat.read(ARCHIVE.notebook(slug), 4), ARCHIVE.source(slug)
    now = notebooks.read_source(source)
    assert prose(kept) == prose(now)
    assert kept_things(kept) == kept_things(now) != []
    outputs = [out for cell in kept.cells if cell.cell_type == "code" for out in cell.outputs]
    assert outputs and not any(out.output_type == "error" for out in outputs)
    executed = ARCHIVE.record(slug).folder / "notebook.ipynb"
    assert ARCHIVE.notebook(slug).read_bytes() == notebooks.shown(executed)
    assert not re.search(r"Warning: |site-packages|/home/|/root/|/tmp/|/work/", str(outputs))


def test_what_is_shown_is_what_was_executed_without_its_warnings(tmp_path):
    kind = nbformat.v4.new_output
    outputs = [kind("stream", name=name, text="said\n") for name in ("stdout", "stderr")]
    warned = "/lib/rich/live.py:260: UserWarning: install ipywidgets"
    outputs.append(kind("display_data", data={"text/plain": warned}))
    cells = [nbformat.v4.new_code_cell("1", id="a")]
    for count in (3, 2, 1):
        cells[0].outputs = outputs[:count]
        notebooks.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{count}.ipynb")
    clean = (tmp_path / "1.ipynb").read_bytes()
    assert all(notebooks.shown(tmp_path / f"{count}.ipynb") == clean for count in (3, 2, 1))
