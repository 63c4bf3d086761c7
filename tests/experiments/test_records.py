"""Records: what goes in comes out, nothing is overwritten, and tampering shows."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
from filelock import FileLock
from powers import SOURCE, make_checkout, run

import clva_lens as cl
from clva_lens.experiments import notebook as notebooks
from clva_lens.experiments.archive import Archive, analyse, differences
from clva_lens.experiments.draft import Draft
from clva_lens.experiments.drawing import check_figures, draw_figures
from clva_lens.experiments.record import DRAWN, Record, sha256
from clva_lens.ground.errors import ParameterError, RecordError, UnknownName
from clva_lens.lens.load import LensModel


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


def record_of(root, version=1):
    return Archive(root).record("01_powers", version)


def test_what_was_kept_comes_back(first):
    record = record_of(first)
    assert record.rows("grid")[3] == {"x": 2, "y": 1, "value": 3.0}
    kept = record.arrays("numbers")
    assert np.array_equal(kept["values"], np.arange(4.0)) and kept["names"].tolist() == ["a"]
    assert record.metrics == {"largest": 9.0}
    document = record.document
    assert document["excluded"] == {"zero": 1}
    assert document["inputs"]["parameters"] == {"power": 2, "words": ["a"], "scale": 1.0}
    assert document["inputs"]["given"] == {}
    assert document["inputs"]["data"] == {"numbers.txt": "0" * 64}
    assert {"torch", "transformers", "nnsight"} <= set(document["inputs"]["packages"])
    assert document["surroundings"]["seconds"] > 0
    assert document["surroundings"]["peak_memory_mib"] > 10
    figures = {path.name for path in (record.folder / "figures").iterdir()}
    assert figures == {"surface.pdf", "surface.png", "surface.csv", "figures.json"}
    assert record.problems() == []


def test_the_notebook_is_kept_as_it_was_executed(first):
    record = record_of(first)
    kept = record.folder / "notebook.ipynb"
    assert kept.read_bytes() == Archive(first).notebook("01_powers").read_bytes()
    cells = nbformat.read(kept, 4).cells
    shown = [out for cell in cells if cell.cell_type == "code" for out in cell.outputs]
    assert any("image/png" in out.get("data", {}) for out in shown)


def test_a_record_that_is_not_there_is_named(first):
    with pytest.raises(RecordError, match=r"no rows 'gird', but grid\b"):
        record_of(first).rows("gird")
    with pytest.raises(RecordError, match=r"no record 01_powers/v7; there is 01_powers/v1\. Make"):
        record_of(first, 7)
    with pytest.raises(RecordError, match=r"no figure 'map', but surface"):
        record_of(first).draw("map")


def test_an_identical_run_is_recognised_and_another_is_a_new_version(checkout, no_kernel):
    before = tree(checkout / "analyses" / "records")
    again = analyse("01_powers", root=checkout, progress=False)
    assert not again.new and again.record.id == "01_powers/v1" and again.changed == ()
    assert tree(checkout / "analyses" / "records") == before
    other = analyse("01_powers", ["power=3"], root=checkout, progress=False)
    assert other.new and other.record.id == "01_powers/v2"
    assert other.record.inputs["given"] == {"power": 3}
    after = tree(checkout / "analyses" / "records")
    kept = [f"01_powers/v1/{name}" for name in ("record.json", "rows/grid.parquet", DRAWN)]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    found = {name: (old, new) for name, old, new in differences(record_of(checkout), other.record)}
    assert found == {
        "parameters.power": (2, 3),
        "given.power": (None, 3),
        "metrics.largest": (9.0, 27.0),
    }
    shown = run("diff", "01_powers", "v1", "v2", "--root", checkout).stdout
    assert "metrics.largest" in shown and "27" in shown
    listed = run("records", "--root", checkout).stdout
    assert "01_powers/v1" in listed and "power=3" in listed


def test_a_checkout_is_looked_at_before_anything_is_written_to_it(checkout, monkeypatch, no_kernel):
    notebooks = checkout / "notebooks"
    before = tree(notebooks)
    told = lambda: {"changed": tree(notebooks) != before}  # noqa: E731
    monkeypatch.setattr("clva_lens.experiments.archive.origin", told)
    made = analyse("01_powers", ["power=4"], root=checkout, progress=False)
    assert made.record.document["surroundings"]["changed"] is False
    assert told() == {"changed": True}


def test_metrics_that_differ_with_the_same_inputs_are_reported(checkout, no_kernel):
    record = record_of(checkout)
    (record.folder / "metrics.json").write_text('{"largest": 8.0}')
    again = analyse("01_powers", root=checkout, progress=False)
    assert not again.new and again.changed == ("largest",)


FILES = (
    "metrics.json",
    "rows/grid.parquet",
    "arrays/numbers.npz",
    "notebook.ipynb",
    "figures/surface.png",
    "figures/surface.pdf",
    "figures/surface.csv",
)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_a_missing_and_an_added_file_are_found(checkout, name):
    file = record_of(checkout).folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert f"{name} was changed" in record_of(checkout).problems()
    result = run("verify", "--root", checkout)
    assert result.exit_code == 1 and f"01_powers/v1: {name} was changed" in result.stdout
    file.unlink()
    assert f"{name} is missing" in record_of(checkout).problems()
    file.with_name("more.txt").write_text("more")
    stray = file.with_name("more.txt").relative_to(record_of(checkout).folder).as_posix()
    assert f"{stray} is no part of the record" in record_of(checkout).problems()


def test_a_changed_document_is_found(checkout):
    file = record_of(checkout).folder / "record.json"
    document = json.loads(file.read_text())
    document["inputs"]["parameters"]["power"] = 5
    file.write_text(json.dumps(document))
    assert record_of(checkout).problems() == ["record.json was changed"]
    file.write_text("{")
    with pytest.raises(RecordError, match="is no JSON"):
        record_of(checkout).problems()


def test_figures_are_drawn_again_to_the_byte_without_a_model(checkout, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(LensModel, "__init__", refuse)
    record = record_of(checkout)
    before = tree(record.folder)
    shutil.rmtree(record.folder / "figures")
    assert run("figures", "01_powers", "--root", checkout).exit_code == 0
    assert tree(record.folder) == before
    assert run("figures", "--all", "--check", "--root", checkout).exit_code == 0
    assert b"01_powers/v1" in (record.folder / "figures" / "surface.png").read_bytes()


def test_figures_that_no_longer_match_are_found(checkout):
    record = record_of(checkout)
    file = record.folder / "figures" / "surface.csv"
    file.write_text(file.read_text().replace("3.0", "4.0"))
    result = run("figures", "01_powers", "--check", "--root", checkout)
    assert result.exit_code == 1 and "surface.csv is not what the record draws" in result.stdout
    draw_figures(record, record.folder / "figures")
    assert check_figures(record)[1] == []


def test_with_another_matplotlib_rows_and_pixels_are_compared(checkout):
    from PIL import Image

    record = record_of(checkout)
    told = record.folder / "figures" / "figures.json"
    told.write_text(told.read_text().replace('"matplotlib": "', '"matplotlib": "0.'))
    how, wrong = check_figures(record)
    assert how.startswith("rows and pixels (drawn by matplotlib 0.") and wrong == []
    file = record.folder / "figures" / "surface.png"
    picture = np.asarray(Image.open(file).convert("RGB")).copy()
    picture[: len(picture) // 2] = 0
    Image.fromarray(picture).save(file)
    assert check_figures(record)[1] == ["01_powers/v1: surface.png is not what the record draws"]


def test_a_notebook_that_fails_leaves_no_record(tmp_path):
    root = make_checkout(tmp_path / "failing", SOURCE + "\n1 / 0\n")
    with pytest.raises(RecordError, match=r"failed: ZeroDivisionError.*Nothing was recorded"):
        analyse("01_powers", root=root, progress=False)
    assert Archive(root).records() == [] and not Archive(root).notebook("01_powers").exists()
    assert (root / "analyses" / "records" / ".failed" / "01_powers.ipynb").is_file()


def test_a_killed_run_leaves_no_half_record(tmp_path, no_kernel):
    slow = SOURCE + '\nopen("waiting", "w").close()\nimport time\ntime.sleep(600)\n'
    root = make_checkout(tmp_path / "slow", slow)
    command = [sys.executable, "-m", "clva_lens", "analyse", "01_powers", "--root", str(root)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    begun = lambda: [*(root / "analyses" / "records").glob(".01_powers.*.staging/waiting")]  # noqa: E731
    ends = time.monotonic() + 300
    while not begun():
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.2)
    (waiting,) = begun()
    staging = waiting.parent
    assert (staging / "rows" / "grid.parquet").exists()  # half of it was there
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert Archive(root).records() == []
    assert "0 records" in run("verify", "--root", root).stdout
    (root / "analyses" / "01_powers.py").write_text(SOURCE)
    outcome = analyse("01_powers", root=root, progress=False)
    assert outcome.record.id == "01_powers/v1" and outcome.record.problems() == []
    assert not staging.exists()


def test_two_runs_at_once_are_refused(checkout):
    lock = FileLock(checkout / "analyses" / "records" / ".01_powers.lock")
    with lock, pytest.raises(RecordError, match="run by another process"):
        analyse("01_powers", root=checkout, progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("power=two", "power"),
        ("pwoer=2", "pwoer"),
        ("words=3", "words"),
        ("scale=big", "scale"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(checkout, given, message):
    with pytest.raises(ParameterError, match=message):
        analyse("01_powers", [given], root=checkout, progress=False)


def test_sources_that_are_no_analysis_are_refused(tmp_path, no_kernel):
    root = make_checkout(tmp_path / "a", SOURCE.replace(' tags=["parameters"]', ""))
    with pytest.raises(RecordError, match='0 cells tagged "parameters"'):
        analyse("01_powers", root=root)
    root = make_checkout(tmp_path / "b", SOURCE.replace("power = 2", "power = 1 + 1"))
    with pytest.raises(RecordError, match=r"holds 'power = 1 \+ 1'"):
        analyse("01_powers", root=root)
    with pytest.raises(RecordError, match=r"no analysis '02_none'\. Pass one of: 01_powers"):
        analyse("02_none", root=root)
    with pytest.raises(RecordError, match="no folder 'analyses' in"):
        analyse("01_powers", root=tmp_path)
    root = make_checkout(tmp_path / "c", '# %% tags=["parameters"]\nx = 1\n')
    with pytest.raises(RecordError, match="keeps nothing"):
        analyse("01_powers", root=root, progress=False)


def test_prose_does_not_make_another_record_but_code_does(tmp_path):
    def digest(source):
        (tmp_path / "01_a.py").write_text(source)
        return notebooks.code_cells(notebooks.read_source(tmp_path / "01_a.py"))

    assert digest(SOURCE) == digest(SOURCE.replace("# # Powers", "# # Of numbers"))
    assert digest(SOURCE) != digest(SOURCE.replace("arange(4.0)", "arange(5.0)"))
    given = notebooks.inject(notebooks.read_source(tmp_path / "01_a.py"), {"power": 5})
    assert notebooks.code_cells(given) == notebooks.code_cells(
        notebooks.read_source(tmp_path / "01_a.py")
    )


def test_a_draft_refuses_what_cannot_be_kept(tmp_path):
    draft = Draft(tmp_path / "draft")
    with pytest.raises(RecordError, match="has no rows"):
        draft.keep_rows("none", [])
    draft.keep_rows("some", [{"a": 1}])
    with pytest.raises(RecordError, match="rows 'some' already"):
        draft.keep_rows("some", [{"a": 1}])
    with pytest.raises(RecordError, match="Python objects"):
        draft.keep_arrays("odd", values=np.array([object()]))
    with pytest.raises(RecordError, match="metric 'lost' is nan"):
        draft.keep_metrics(lost=float("nan"))
    with pytest.raises(UnknownName):
        draft.draw("no such figure")


def test_pickled_arrays_are_refused(tmp_path):
    folder = tmp_path / "01_a" / "v1"
    (folder / "arrays").mkdir(parents=True)
    np.savez(folder / "arrays" / "odd.npz", values=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        Record(folder).arrays("odd")


def test_open_record_takes_the_newest(first):
    assert cl.open_record("01_powers", root=first).id == "01_powers/v1"
    assert "largest  9" in repr(cl.open_record("01_powers", "v1", root=first))
