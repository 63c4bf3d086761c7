import csv
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from clva_lens.figures import (
    costs,
    differences,
    drift_curves,
    head_intensity,
    layer_curves,
    method_comparison,
    saliency_overlays,
    save,
    surface,
    task_scores,
)
from clva_lens.figures.base import PAGE, plain
from clva_lens.figures.overlay import outline
from clva_lens.figures.saliency import SaliencyPicture
from clva_lens.ground.errors import BenchmarkError, FigureError

PROVENANCE = {"record": "demo/v1", "commit": "abc"}
INTENSITY = np.array([[0.1, 0.5, 0.9], [0.3, 0.2, 0.4]])
CURVES = tuple(np.random.default_rng(0).uniform(0, 1, size=(3, 5, 4)))
METHODS = [
    {"split": split, "method": method, "metric": metric, "value": 0.5, "low": 0.4, "high": 0.6}
    for split in ("random", "adversarial")
    for method in ("greedy", "clva $x$")
    for metric in ("accuracy", "yes_ratio", "auc")
]

CHANGES = [
    {"benchmark": "b", "method": "m $x$", "metric": metric, "change": 0.1, "low": low, "high": 0.2}
    for metric, low in (("accuracy", 0.05), ("auc", None))
]
GRID = [{"alpha": a, "beta": b, "change": a - b} for a in (0, 14) for b in (0.0, 0.9)]
LAYERS = [
    {"quantity": "r", "run": run, "layer": layer, "value": 0.5, "low": 0.4, "high": 0.6}
    for run, layer in (("a", 0), ("a", 1), ("chance", None))
]
RATIOS = [{"model": m, "case": "c", "over": "o", "ratio": 1.1, "low": 1, "high": 1.2} for m in "ab"]


def picture(**changes):
    rng = np.random.default_rng(0)
    corner = np.zeros((2, 2), dtype=bool)
    corner[0, 0] = True
    given = SaliencyPicture(
        image=rng.integers(0, 255, size=(8, 8, 3), dtype=np.uint8),
        before=rng.uniform(0, 0.1, size=(1, 2, 2)),
        after=rng.uniform(0, 0.1, size=(1, 2, 2)),
        question="Is there a $cup$ in the image?",
        label="no",
        answers={"greedy": ("Yes 猫", 1.25), "CLVA": ("No", -0.5), "knock-out": ("", None)},
        positive=corner,
        negative=~corner,
        objects=np.eye(8, dtype=bool),
    )
    return replace(given, **changes)


def heads():
    return head_intensity(INTENSITY, INTENSITY > 0.8, INTENSITY < 0.2)


def test_files_carry_provenance_and_the_drawn_rows(tmp_path):
    fig = heads()
    pdf, png, table = save(fig, tmp_path, "heads", None, PROVENANCE)
    with Image.open(png) as image:
        assert json.loads(image.text["Description"]) == PROVENANCE
        assert image.text["Software"] == "clva_lens"
    content = pdf.read_bytes()
    assert b"demo/v1" in content and b"CreationDate" not in content
    with table.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 6
    assert rows[2] == {
        "layer": "0",
        "head": "2",
        "intensity": "0.9",
        "sensitive": "True",
        "insensitive": "False",
    }


def test_save_takes_rows_or_a_data_frame(tmp_path):
    class Frame:
        def to_dict(self, orient):
            assert orient == "records"
            return [{"x": 1}, {"x": 2, "y": 3}]

    fig = heads()
    *_, table = save(fig, tmp_path, "frame", Frame(), {})
    assert table.read_bytes() == b"x,y\n1,\n2,3\n"
    with pytest.raises(FigureError, match="0 rows of drawn data"):
        save(fig, tmp_path, "none", [], {})
    with pytest.raises(FigureError, match="no plain file name"):
        save(fig, tmp_path, "../escape", None, {})
    with pytest.raises(FigureError, match="provenance is not JSON"):
        save(fig, tmp_path, "array", None, {"seed": np.arange(2)})
    assert not list(tmp_path.glob("array*"))


def test_drawing_leaves_pyplot_alone():
    code = (
        "import matplotlib.pyplot as plt\n"
        "before = dict(plt.rcParams)\n"
        "from clva_lens.figures import head_intensity\n"
        "head_intensity([[0.5]])\n"
        "assert plt.get_fignums() == [] and dict(plt.rcParams) == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_notebook_shows_the_picture():
    shown = head_intensity(INTENSITY)._repr_png_()
    assert shown.startswith(b"\x89PNG") and len(shown) > 5000


def test_heads_write_numbers_up_to_twelve():
    assert "0.90" in {text.get_text() for text in head_intensity(INTENSITY).axes[0].texts}
    assert not head_intensity(np.full((13, 2), 0.5)).axes[0].texts
    labels = [text.get_text() for text in heads().legends[0].get_texts()]
    assert labels == ["sensitive (1 of 6 heads)", "insensitive (1 of 6 heads)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[]],), "intensity is empty"),
        (([0.1, 0.2],), r"shape \(2,\), but \[layer, head\] is needed"),
        (([[0.1, math.nan]],), "1 of 2 values of intensity are nan"),
        ((INTENSITY, INTENSITY), "sensitive holds float64, but a mask is bool"),
        ((INTENSITY, INTENSITY[:1] > 0), r"sensitive has shape \(1, 3\), but \(2, 3\)"),
        ((INTENSITY, INTENSITY > 0.8, INTENSITY > 0.8), "layer 0 head 2 is in both"),
    ],
)
def test_heads_refuse(arguments, message):
    with pytest.raises(FigureError, match=message):
        head_intensity(*arguments)


def test_drift_draws_the_mean_and_a_band_around_it():
    fig = drift_curves(*CURVES, 2, resamples=50)
    rows = [row for row in fig.rows if row["curve"] == "entropy"]
    assert [row["mean"] for row in rows] == pytest.approx(CURVES[0].mean(axis=0))
    assert all(row["low"] < row["mean"] < row["high"] for row in rows)
    # One sample a layer has no band.
    alone = drift_curves(*(curve[0] for curve in CURVES), 2)
    assert {row["low"] for row in alone.rows} == {None}
    # Two images: the resamples of the first layer are the two images' means and their middle.
    two = drift_curves(*CURVES, 2, groups=["a", "a", "b", "b", "b"])
    means = sorted([CURVES[0][:2, 0].mean(), CURVES[0][2:, 0].mean()])
    first = next(row for row in two.rows if row["curve"] == "entropy")
    assert [first["low"], first["high"]] == pytest.approx(means)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((CURVES[0], CURVES[1], CURVES[2][:2], 2), {}, "have shapes .*Pass equal shapes"),
        ((*CURVES, 4), {}, "positive_layer=4, but the layers are 0, 1, 2, 3"),
        ((*CURVES, 2, -1), {}, "negative_layer=-1"),
        ((*CURVES, 2), {"clva": tuple(c[:, :3] for c in CURVES)}, "has 3 layers, not 4"),
        ((np.full(4, math.nan), *CURVES[1:], 2), {}, r"4 of 4 values of entropy \(greedy\)"),
    ],
)
def test_drift_refuses(arguments, options, message):
    with pytest.raises(FigureError, match=message):
        drift_curves(*arguments, **options)


def test_drift_band_needs_two_samples():
    with pytest.raises(BenchmarkError, match="at least 2 are needed"):
        drift_curves(*(curve[:1] for curve in CURVES), 2)


def test_saliency_states_the_knock_out_beside_the_maps():
    fig = saliency_overlays([picture(), picture()], [4])
    texts = [text.get_text() for text in fig.texts]
    # The font has no 猫; the strict parser judges: yes is wrong, no is right, empty is wrong.
    assert "greedy: Yes ? ✗ (+1.25)  →  CLVA: No ✓ (−0.50)  →  knock-out: (empty) ✗" in texts
    assert "Is there a $cup$ in the image?   label: no" in texts
    # A picture: the image, a map before, a map after, a colour bar.
    assert len(fig.axes) == 8
    assert fig.get_figwidth() == PAGE
    # 2 pictures × 2 runs × 1 layer × 2 × 2 cells.
    assert len(fig.rows) == 16


def test_panel_scale_and_empty_maps_draw(tmp_path):
    still = picture(after=np.zeros((1, 2, 2)), image=np.ones((1, 1, 3)), positive=None)
    fig = saliency_overlays([still], [0], scale="panel")
    _, png, _ = save(fig, tmp_path, "still", None, {})
    assert imread(png).ndim == 3


def test_outline_follows_the_border_of_the_mask():
    ax = saliency_overlays([picture()], [4]).axes[0]
    for old in list(ax.collections):
        old.remove()
    # One cell of a 2 × 2 mask over an 8 × 8 picture: four edges of length 4 around (4..8, 0..4).
    outline(ax, np.array([[False, True], [False, False]]), (8, 8, 3), "positive", 1.0)
    edges = {tuple(map(tuple, segment)) for segment in ax.collections[0].get_segments()}
    assert edges == {
        ((4.0, 0.0), (8.0, 0.0)),
        ((4.0, 4.0), (8.0, 4.0)),
        ((4.0, 0.0), (4.0, 4.0)),
        ((8.0, 0.0), (8.0, 4.0)),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": {"greedy": ("Yes", 1.0)}}, "picture 0 has no 'knock-out'"),
        ({"image": np.full((2, 2, 3), 255.0)}, "Pass RGB as uint8"),
        ({"image": np.zeros((2, 2))}, r"but \[height, width, channel\]"),
        ({"before": np.zeros((2, 2, 2))}, "for 1 layers"),
        ({"before": np.full((1, 2, 2), -0.1)}, "is negative"),
        ({"after": np.full((1, 2, 2), math.nan)}, "4 of 4 values of after of picture 0"),
        ({"positive": np.zeros((3, 3), dtype=bool)}, "positive anchor has shape"),
        ({"objects": np.zeros(3, dtype=bool)}, r"object mask has shape \(3,\)"),
    ],
)
def test_saliency_refuses(changes, message):
    with pytest.raises(FigureError, match=message):
        saliency_overlays([picture(**changes)], [4])


def test_saliency_refuses_nothing_and_too_much():
    with pytest.raises(FigureError, match="0 pictures"):
        saliency_overlays([], [4])
    with pytest.raises(FigureError, match="1 pictures and 9 layers"):
        saliency_overlays([picture()], range(9))
    with pytest.raises(FigureError, match="scale='log'"):
        saliency_overlays([picture()], [4], scale="log")


def test_methods_stand_side_by_side_with_missing_margins_named():
    rows = [dict(row) for row in METHODS]
    rows[2] |= {"value": math.nan, "low": None, "high": None}
    rows.append(
        {"split": "random", "method": "clva $x$", "metric": "bias_matched_accuracy", "value": 0.55}
    )
    fig = method_comparison(rows)
    assert [ax.get_xlabel().split(" (")[0] for ax in fig.axes] == [
        "accuracy",
        "yes-ratio",
        "AUC of the margin",
    ]
    assert [text.get_text() for text in fig.axes[2].texts] == ["no margins"]
    assert "baseline at the method's yes-ratio" in [t.get_text() for t in fig.legends[0].texts]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "0 rows to draw"),
        (METHODS[:1], "has no yes_ratio. Pass accuracy, yes_ratio and auc together"),
        (METHODS + METHODS[:1], "random / greedy / accuracy is given twice"),
        ([{"split": "random"}], "a row has no method, metric, value"),
        ([METHODS[0] | {"metric": "f1"}], "no panel for the metric 'f1'"),
        ([METHODS[0] | {"value": math.nan}], "accuracy is nan"),
        ([METHODS[0] | {"value": 0.7}], r"0\.7 is outside \[0\.4, 0\.6\]"),
        ([row | {"method": str(n)} for n in range(8) for row in METHODS[:3]], "8 methods"),
    ],
)
def test_methods_refuse(rows, message):
    with pytest.raises(FigureError, match=message):
        method_comparison(rows)


def test_plain_text_is_one_line_in_known_characters():
    assert plain(" a\n b\t猫 ") == "a b ?"
    assert plain("long " * 9, longest=8) == "long lo…"


def test_figures_of_rows_refuse_rows_that_do_not_fit():
    with pytest.raises(FigureError, match="no row has a change of f1"):
        differences(CHANGES, ["accuracy", "f1"])
    with pytest.raises(FigureError, match="3 rows do not fill a grid of 2 × 2"):
        surface(GRID[:3], "alpha", "beta", "change")
    with pytest.raises(FigureError, match="there are 0 runs"):
        layer_curves(LAYERS[2:])
    with pytest.raises(FigureError, match="no score of: color"):
        task_scores(METHODS, ["color"])
    with pytest.raises(FigureError, match="0 rows to draw"):
        costs([])


def test_differences_tell_what_is_sure_by_the_dot():
    ((sure, unsure),) = [[ax.lines for ax in differences(CHANGES, ["accuracy", "auc"]).axes]]
    assert [line.get_markerfacecolor() for line in sure if line.get_marker() == "o"] == ["#0072B2"]
    assert [line.get_marker() for line in unsure if line.get_marker() != "None"] == ["x"]
