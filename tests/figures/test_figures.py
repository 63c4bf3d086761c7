import csv
import itertools
import json
import math
import random
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
from clva_lens.figures.drift import RUNS
from clva_lens.figures.overlay import outline
from clva_lens.figures.saliency import SaliencyPicture
from clva_lens.ground.errors import BenchmarkError, FigureError

PROVENANCE = {"record": "demo/v1", "commit": "abc"}
INTENSITY = np.array([[0.1, 0.5, 0.9], [0.3, 0.2, 0.4]])
NAMES = ("entropy", "toward_positive", "toward_negative")
CURVES = dict(zip(NAMES, np.random.default_rng(0).uniform(0, 1, size=(3, 20, 4)), strict=True))
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


def cut(samples=None, layers=None):
    return {name: values[:samples, :layers] for name, values in CURVES.items()}


def test_drift_draws_the_mean_and_a_band_around_it():
    fig = drift_curves({"greedy": CURVES}, 2, resamples=50)
    rows = [row for row in fig.rows if row["curve"] == "entropy"]
    assert [row["mean"] for row in rows] == pytest.approx(CURVES["entropy"].mean(axis=0))
    assert all(row["low"] < row["mean"] < row["high"] for row in rows)
    # One sample a layer has no band.
    alone = drift_curves({"greedy": {name: one[0] for name, one in CURVES.items()}}, 2)
    assert {row["low"] for row in alone.rows} == {None}
    assert said(alone)[0] == "one prompt: no intervals"


def said(drawing):
    legend = drawing.legends[0] if drawing.legends else drawing.axes[1].get_legend()
    return [legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())]


@pytest.mark.parametrize("pictures", [2, 9, 10, 20])
def test_fewer_than_ten_pictures_have_no_band_and_the_figure_says_so(pictures):
    """However many questions are asked of them."""
    groups = [n % pictures for n in range(20)]
    fig = drift_curves({"greedy": CURVES}, 2, groups=groups, resamples=50)
    assert all((row["low"] is None) == (pictures < 10) for row in fig.rows)
    assert all(bool(ax.collections) == (pictures >= 10) for ax in fig.axes)
    told = said(fig)[0].replace("\n", " ")
    assert told == (
        f"{pictures} pictures: too few for intervals"
        if pictures < 10
        else f"means, 95 % bands over {pictures} pictures"
    )


def test_runs_are_told_apart_and_the_untrained_ones_are_grey():
    unmasked = {f"unmasked_{end}": CURVES[f"toward_{end}"] for end in ("positive", "negative")}
    fig = drift_curves(dict.fromkeys(RUNS, CURVES | unmasked), 2, resamples=20)
    assert len(fig.axes) == 6 and said(fig)[1:-1] == list(RUNS)
    looks = []
    for line in fig.axes[2].lines[: len(RUNS)]:
        looks.append((line.get_color(), line.get_linestyle()))
    assert len(set(looks)) == len(RUNS)
    greys = [run for run, (colour, _) in zip(RUNS, looks, strict=True) if colour == "0.5"]
    assert greys == [run for run in RUNS if run.startswith("untrained")]


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ({"greedy": CURVES | {"entropy": CURVES["entropy"][:2]}}, {}, "have shapes .*equal shapes"),
        ({"greedy": CURVES}, {"positive_layer": 4}, "positive_layer=4, but the layers are 0, 1, 2"),
        ({"greedy": CURVES}, {"negative_layer": -1}, "negative_layer=-1"),
        ({"greedy": CURVES, "CLVA": cut(layers=3)}, {}, "'CLVA' has 3 layers, not 4"),
        (
            {"greedy": CURVES | {"entropy": np.full((20, 4), math.nan)}},
            {},
            r"80 of 80 values of entropy \(greedy\)",
        ),
        ({"mine": CURVES}, {}, "the run 'mine' has the curves .*Pass runs named greedy"),
        ({"greedy": {"entropy": CURVES["entropy"]}}, {}, "each with entropy, toward_positive"),
        ({}, {}, "0 runs to draw"),
    ],
)
def test_drift_refuses(runs, options, message):
    with pytest.raises(FigureError, match=message):
        drift_curves(runs, **{"positive_layer": 2, **options})


def test_drift_band_needs_two_samples():
    with pytest.raises(BenchmarkError, match="at least 2 are needed"):
        drift_curves({"greedy": cut(samples=1)}, 2)


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


@pytest.mark.parametrize(("words", "conditions"), [(1, 2), (75, 3)])
def test_a_caption_is_never_cut(words, conditions):
    """Whatever is asked and answered stands above its maps, inside the canvas."""
    answers = {f"condition {n}": (f"answer{n} " * words, 1.0) for n in range(conditions)}
    answers["knock-out"] = ("No", None)
    asked = f"Is there a{' very' * words} long cup?"
    fig = saliency_overlays([picture(question=asked, answers=answers)] * 2, [4])
    written = " ".join(text.get_text() for text in fig.texts)
    for n in range(conditions):
        assert written.count(f"answer{n}") == 2 * words
    assert written.count("very") == 2 * words and "…" not in written
    fig.canvas.draw()
    for text in fig.texts:
        box = text.get_window_extent()
        assert box.x1 <= fig.bbox.width and 0 <= box.y0 < box.y1 <= fig.bbox.height
        assert not any(box.overlaps(ax.get_window_extent()) for ax in fig.axes)


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
        "accuracy ↑",
        "yes-ratio",
        "AUC of the margin ↑",
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


def test_differences_tell_what_is_sure_by_the_dot_and_say_so():
    fig = differences(CHANGES, ["accuracy", "auc"])
    ((sure, unsure),) = [[ax.lines for ax in fig.axes]]
    assert [line.get_markerfacecolor() for line in sure if line.get_marker() == "o"] == ["#0072B2"]
    assert [line.get_marker() for line in unsure if line.get_marker() != "None"] == ["x"]
    assert said(fig)[1:] == ["95 % interval leaves out 0", "no interval"]


def change(benchmark, method, value, half=1.0, metric="accuracy"):
    ends = {"change": value, "low": value - half, "high": value + half}
    return {"benchmark": benchmark, "method": method, "metric": metric} | {
        key: one / 100 for key, one in ends.items()
    }


def rows_of_three_splits():
    """Each change is told by its value: split × 10 + method."""
    splits, methods = ("random", "popular", "adversarial"), ("beam", "CLVA", "knock-out")
    return [
        change(split, method, 10 * s + m, metric=metric)
        for metric in ("accuracy", "auc")
        for s, split in enumerate(splits)
        for m, method in enumerate(methods)
    ]


@pytest.mark.parametrize("order", ["by split", "by method", 0, 1, 2, 3])
def test_each_change_stands_in_its_own_split_and_line_in_any_order_of_rows(order):
    rows = rows_of_three_splits()
    if order == "by method":
        rows.sort(key=lambda row: row["method"])
    elif order != "by split":
        random.Random(order).shuffle(rows)
    fig = differences(rows, ["accuracy", "auc"])
    ticks = fig.axes[0].get_yticks()
    names = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    lines = sorted(zip(ticks, names, strict=True))
    splits = list(dict.fromkeys(row["benchmark"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    # Read down the axis: a split, its methods, the next split.
    assert [name for _, name in lines] == [n for split in splits for n in (split, *methods)]
    assert min(b - a for (a, _), (b, _) in itertools.pairwise(lines)) >= 0.75
    for ax in fig.axes:
        dots = {
            line.get_ydata()[0]: line.get_xdata()[0]
            for line in ax.lines
            if line.get_marker() == "o"
        }
        split, found = None, {}
        for at, name in lines:
            split = name if name in splits else split
            if name not in splits:
                found[split, name] = dots.pop(at)
        assert dots == {}
        assert found == pytest.approx(
            {(row["benchmark"], row["method"]): 100 * row["change"] for row in rows}
        )


@pytest.mark.parametrize("far", [46.0, -46.0, -4600.0])
def test_one_that_reaches_far_does_not_squeeze_the_others(far):
    rows = [change("b", f"m{n}", n - 2.0) for n in range(6)] + [change("b", "knock-out", far)]
    fig = differences(rows, ["accuracy"])
    low, high = fig.axes[0].get_xlim()
    bars = [line.get_xdata() for line in fig.axes[0].lines if line.get_marker() == "None"]
    shares = [(bar[1] - bar[0]) / (high - low) for bar in bars if bar[0] != bar[1]]
    assert len(shares) == 7 and all(share > 0.15 for share in shares)
    assert [text.get_text() for text in fig.axes[0].texts] == [f"{far:.0f}".replace("-", "−")]
    assert "beyond the axis" in said(fig)
    # Where all reach as far, nothing is beyond.
    even = differences([change("b", f"m{n}", far) for n in range(4)], ["accuracy"])
    assert even.axes[0].texts[:] == [] and "beyond the axis" not in said(even)


def test_clva_is_marked_where_methods_stand_side_by_side():
    fig = differences(rows_of_three_splits(), ["accuracy", "auc"])
    bold = {t.get_text() for t in fig.axes[0].get_yticklabels() if t.get_weight() == "bold"}
    assert bold == {"CLVA"}
    for drawn in (
        method_comparison([row | {"method": row["method"].split()[0].upper()} for row in METHODS]),
        task_scores([{"method": m, "metric": "t", "value": 1.0} for m in ("a", "CLVA")], ["t"]),
    ):
        weights = {t.get_text(): t.get_weight() for t in drawn.legends[0].get_texts()}
        assert weights.pop("CLVA") == "bold" and "bold" not in weights.values()
    framed = surface(GRID, "alpha", "beta", "change", marked=[14, 0.9])
    assert [patch.get_xy() for patch in framed.axes[0].patches] == [(1, 1)]
    assert said(framed)[1:] == ["CLVA's defaults"]
    assert not surface(GRID, "alpha", "beta", "change", marked=[15, 0.9]).axes[0].patches


def test_metrics_say_which_way_is_better():
    rows = [change("b", "m", 1.0, metric=m) for m in ("accuracy", "yes_ratio", "chair_s", "recall")]
    fig = differences(rows, ["accuracy", "yes_ratio", "chair_s", "recall"])
    assert [ax.get_xlabel()[-1] for ax in fig.axes] == ["↑", "o", "↓", "↑"]
