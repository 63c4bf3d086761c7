"""The analyses of this checkout: they run on the toys, and their records are what they say."""

import resource
import shutil
from pathlib import Path

import nbformat
import pytest

from clva_lens.experiments import notebook as notebooks
from clva_lens.experiments.archive import Archive, analyse
from clva_lens.experiments.drawing import check_figures

ARCHIVE = Archive(Path(__file__).parents[2])
BUDGET = 180  # seconds of processor time, whatever else the machine does

# What makes each analysis small enough to run with every change.
SMALL = {
    "01_head_intensity": ["questions=24"],
    "02_saliency": ["pictures=2"],
    "03_drift": ["questions=24"],
    "04_pope": ["questions=16"],
    "05_chair": ["captions=8"],
    "06_mme": ["pictures=3"],
    "07_anchors": ["questions=12"],
    "08_speed": ["small=True", "rounds=1", "new_tokens=2"],
    "09_nucleus": ["questions=12", "seeds=[0]"],
    "10_strengths": ["questions=12", "alphas=[0, 14]", "betas=[0.0, 0.9]"],
    "11_sensitivity": ["questions=12", "captions=6"],
    "12_paper_arithmetic": [],
    "13_is_there_drift": ["scenes=4", "questions=12", 'models=["toy-llava"]'],
    "14_method_zoo": ["questions=12", "captions=3"],
}
RECORDS = ARCHIVE.records()


def test_every_analysis_has_a_record_and_is_run_here():
    assert set(SMALL) == set(ARCHIVE.analyses())
    assert {record.folder.parent.name for record in RECORDS} == set(SMALL)


@pytest.mark.parametrize("slug", SMALL)
def test_it_runs_on_the_toys(slug, tmp_path, monkeypatch):
    # Threads that wait for each other on a busy machine would take many times as long.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    root = tmp_path / "checkout"
    shutil.copytree(ARCHIVE.root / "analyses", root / "analyses", ignore=lambda *_: ["records"])
    outcome = analyse(slug, SMALL[slug], root=root, progress=False)
    assert outcome.new and outcome.record.problems() == []
    assert outcome.record.metrics and outcome.record.document["files"]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 1 < after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < BUDGET
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


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.id)
def test_a_committed_record_is_as_it_was_written(record):
    assert record.problems() == []
    assert not record.document["surroundings"]["changed"]
    how, wrong = check_figures(record)
    assert wrong == [], how


@pytest.mark.parametrize("slug", SMALL)
def test_the_notebook_and_its_source_are_in_sync(slug):
    def cells(notebook):
        return [
            (cell.cell_type, cell.source)
            for cell in notebook.cells
            if notebooks.INJECTED not in cell.metadata.get("tags", [])
        ]

    kept = nbformat.read(ARCHIVE.notebook(slug), 4)
    assert cells(kept) == cells(notebooks.read_source(ARCHIVE.source(slug)))
    outputs = [out for cell in kept.cells if cell.cell_type == "code" for out in cell.outputs]
    assert outputs and not any(out.output_type == "error" for out in outputs)
    assert ARCHIVE.notebook(slug).read_bytes() in {
        (record.folder / "notebook.ipynb").read_bytes()
        for record in RECORDS
        if record.folder.parent.name == slug
    }
