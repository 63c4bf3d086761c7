"""What every registered figure keeps, drawn from the example that it brings along."""

from itertools import combinations
from pathlib import Path
from unittest import mock

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import layout_engine
from matplotlib.layout_engine import do_constrained_layout
from matplotlib.text import Text
from matplotlib.transforms import Bbox

import clva_lens
from clva_lens.experiments.archive import Archive
from clva_lens.experiments.draft import Draft
from clva_lens.figures.base import (
    COLUMN,
    FIGURES,
    PAGE,
    SMALL,
    STORED,
    Example,
    drawing_of_record,
    figure,
    look,
    save,
)
from clva_lens.ground.errors import FigureError, UnknownName
from clva_lens.lens.load import LensModel

ARCHIVE = Archive(Path(clva_lens.__file__).parents[1])
# Pixels at 100 a inch: boxes are a little larger than the ink in them.
TOLERANCE = 1.0

every_figure = pytest.mark.parametrize("name", FIGURES.names())


def example(name):
    kept = FIGURES.get(name)
    return kept.draw(**kept.example.arguments)


def drawn_once():
    """A record for each figure that records draw, the newest of the last analysis with it."""
    found = {}
    for record in ARCHIVE.records():  # the newest version of each analysis comes last
        found |= {one["figure"]: (record, one["name"]) for one in record.figures}
    return list(found.values())


def last_bit_moved(fig, *args, **kwargs):
    """Arrange a figure, its places one bit off: what the solver's order of work does to them."""
    arranged = do_constrained_layout(fig, *args, **kwargs)
    for axes in fig.axes:
        place = axes.get_position(original=True).get_points()
        axes._set_position(Bbox(np.nextafter(place, 2.0)), which="original")
    return arranged


def texts(drawing):
    """Every text that is drawn, with its box in pixels; ticks out of view are not drawn."""
    seen, draw = {}, Text.draw

    def note(text, *args, **kwargs):
        if text.get_visible() and text.get_text().strip():
            seen[id(text)] = text
        return draw(text, *args, **kwargs)

    with look(), mock.patch.object(Text, "draw", note):
        drawing.canvas.draw()
        renderer = drawing.canvas.get_renderer()
        return [(text, text.get_window_extent(renderer)) for text in seen.values()]


def flaws(drawing):
    """What is illegible in print: a width between a column and a page, which would be scaled, and
    texts that are too small, leave the canvas, or lie on each other, in words."""
    boxes, canvas = texts(drawing), drawing.bbox
    wide = drawing.get_figwidth()
    found = [] if wide in (COLUMN, PAGE) else [f"{wide} inches are no column and no page"]
    found += [f"'{t.get_text()}' is small" for t, _ in boxes if t.get_fontsize() < SMALL]
    found += [
        f"'{text.get_text()}' leaves the canvas"
        for text, box in boxes
        if box.x0 < -TOLERANCE
        or box.y0 < -TOLERANCE
        or box.x1 > canvas.width + TOLERANCE
        or box.y1 > canvas.height + TOLERANCE
    ]
    found += [
        f"'{one.get_text()}' lies on '{other.get_text()}'"
        for (one, a), (other, b) in combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > TOLERANCE
        and min(a.y1, b.y1) - max(a.y0, b.y0) > TOLERANCE
    ]
    assert boxes, "nothing is written on it"
    return found


@every_figure
def test_same_data_same_bytes_and_no_trace_in_matplotlib(tmp_path, name):
    with mpl.rc_context({"font.size": 23, "figure.dpi": 31, "savefig.bbox": "tight"}):
        before = dict(mpl.rcParams)
        first = save(example(name), tmp_path / "a", name, None, {"record": "demo/v1"})
        assert dict(mpl.rcParams) == before
    with mock.patch.object(layout_engine, "do_constrained_layout", last_bit_moved):
        second = save(example(name), tmp_path / "b", name, None, {"record": "demo/v1"})
    assert [path.name for path in first] == [f"{name}.{e}" for e in ("pdf", "png", "csv")]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.suffix


@every_figure
def test_texts_are_legible_on_the_canvas_and_apart(name):
    assert flaws(example(name)) == []


@every_figure
def test_a_record_draws_it_without_a_model(tmp_path, name, monkeypatch):
    """What a record keeps is what the figure is drawn from: the same rows as from arrays."""
    kept = FIGURES.get(name)
    if kept.of_record is None:
        with pytest.raises(FigureError, match=r"is drawn of arrays.*of_record="):
            Draft(tmp_path).draw(name)
        pytest.skip(f"{name} is drawn of arrays only; un-skip by giving it of_record=")
    monkeypatch.setattr(LensModel, "__init__", lambda *_: pytest.fail("a model was loaded"))
    draft = Draft(tmp_path)
    for table, rows in kept.example.tables.items():
        draft.keep_rows(table, rows)
    for room, arrays in kept.example.arrays.items():
        draft.keep_arrays(room, **arrays)
    drawn = draft.draw(name, **kept.example.options)
    assert drawn.rows == example(name).rows


@pytest.mark.parametrize(
    ("record", "drawn"), drawn_once(), ids=lambda part: part if isinstance(part, str) else part.id
)
def test_figures_of_records_are_legible_too(record, drawn):
    assert flaws(record.draw(drawn)) == []


def test_flaws_are_found():
    drawing = example("costs")
    with look():
        drawing.set_figwidth(5.0)
        drawing.text(0.5, 0.5, "tiny", fontsize=6.9)
        drawing.text(0.99, 0.02, "too far to the right")
        for word in ("one", "other"):
            drawing.text(0.02, 0.02, word)
    found = flaws(drawing)
    assert "'tiny' is small" in found and "5.0 inches are no column and no page" in found
    assert "'too far to the right' leaves the canvas" in found
    assert "'one' lies on 'other'" in found


def test_names_in_records_are_found():
    stored = {one["figure"] for record in ARCHIVE.records() for one in record.figures}
    assert set(STORED) <= stored
    assert all(callable(drawing_of_record(name)) for name in stored)
    with pytest.raises(UnknownName, match=r"no figure 'drift_curve'. Did you mean 'drift_curves'"):
        drawing_of_record("drift_curve")


def test_a_figure_without_an_example_is_refused():
    with pytest.raises(FigureError, match=r"'mine' has None for an example.*Pass example=Example"):
        figure("mine")
    with pytest.raises(FigureError, match=r"'mine' is drawn of records, but its example keeps"):
        figure("mine", example=Example({}), of_record=lambda record: None)
