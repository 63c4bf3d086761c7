"""How attention drifts through the layers: the paper's Fig. 2b, beside its nulls."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from clva_lens.benchmarks.statistics import FEWEST, cluster_index, resample_counts
from clva_lens.figures.base import (
    BLUE,
    COLUMN,
    GREEN,
    SMALL,
    VERMILION,
    Drawing,
    Example,
    figure,
    layer_numbers,
    numbers,
)
from clva_lens.ground.errors import FigureError
from clva_lens.ground.files import Row

# Curve: (row and column of its panel, words at its axis).
_CURVES = {
    "entropy": (0, 0, "entropy of the\nsensitive heads (nats)"),
    "toward_positive": (1, 0, "r with the\npositive anchor"),
    "toward_negative": (2, 0, "r with the\nnegative anchor"),
    "unmasked_positive": (1, 1, ""),
    "unmasked_negative": (2, 1, ""),
}
_NEEDED = tuple(_CURVES)[:3]
# Run: (what its arrays' names begin with in a record, colour, line style).
_DASHED, _DOTTED = (0, (4, 1.5)), (0, (1, 1.2))
RUNS = {
    "greedy": ("", BLUE, "-"),
    "CLVA": ("clva_", VERMILION, _DASHED),
    "CLVA, random tokens": ("random_", GREEN, _DOTTED),
    "untrained": ("untrained_", "0.5", "-"),
    "untrained, CLVA": ("untrained_clva_", "0.5", _DASHED),
}

Curves = Mapping[str, ArrayLike]

_SAMPLES = np.random.default_rng(0).uniform(size=(6, 5, 4))
_RUNS = {
    run: dict(zip(_NEEDED, _SAMPLES[start : start + 3], strict=True))
    for run, start in (("greedy", 0), ("CLVA", 3))
}


def _recorded(record: Any, arrays: str = "drift") -> Drawing:
    """Draw arrays of curves by sample; what a name begins with says of which run."""
    kept = record.arrays(arrays)
    positive, negative = kept["anchors"].tolist()
    runs = {
        run: {name: kept[begin + name] for name in _CURVES if begin + name in kept}
        for run, (begin, _, _) in RUNS.items()
        if f"{begin}entropy" in kept
    }
    layers, groups = kept["layers"].tolist(), kept["groups"].tolist()
    return drift_curves(runs, positive, negative, layers=layers, groups=groups)


@figure(
    "drift_curves",
    of_record=_recorded,
    example=Example(
        {"runs": _RUNS, "positive_layer": 2, "groups": list("aabbc")},
        arrays={
            "drift": {
                RUNS[run][0] + name: values
                for run, curves in _RUNS.items()
                for name, values in curves.items()
            }
            | {"anchors": [2, 0], "layers": [0, 1, 2, 3], "groups": list("aabbc")}
        },
    ),
)
def drift_curves(
    runs: Mapping[str, Curves],
    positive_layer: int,
    negative_layer: int = 0,
    *,
    groups: Sequence[Hashable] | None = None,
    layers: Sequence[int] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Drawing:
    """Return entropy and the correlations with both anchors over the layers.

    A curve with a sample axis is drawn as its mean with a 95 % bootstrap band over groups
    (pictures), the samples of one group drawn together; of fewer than ten there is no band, which
    would be too narrow. Leave out samples with a NaN (a constant map has no correlation), and
    report how many they are.

    Args:
        runs: by name, "greedy" first, each a mapping of curves, [sample, layer] or [layer]:
            ``entropy`` (Eq. 5, nats), ``toward_positive`` and ``toward_negative`` (Eq. 6), and,
            where they are known, ``unmasked_positive`` and ``unmasked_negative``, the same over
            the tokens that no mask marks. Untrained runs are grey: what they show is no training's.
        positive_layer: the 0-based layer of the positive anchor.
        negative_layer: the 0-based layer of the negative anchor.
        groups: the picture of each sample; None makes each a group of its own.
        layers: the 0-based number of each layer, where they are not 0, 1, 2, …
        resamples: bootstrap resamples of the band.
        seed: seed of the band.

    Raises:
        FigureError: if the data is empty, nan or of other shapes, a run is unknown, or an anchor
            is at no layer.
        BenchmarkError: if the groups do not fit the samples, or there are fewer than two.
    """
    curves = {run: _checked(run, given) for run, given in runs.items()}
    numbered = _aligned(curves, layers, positive_layer, negative_layer)
    rows = [
        row
        for run, given in curves.items()
        for name, value in given.items()
        for row in _summary(run, name, value, numbered, groups, resamples, seed)
    ]
    wide = any("unmasked_positive" in given for given in curves.values())
    fig = Drawing(COLUMN, 4.6, rows)
    panels = fig.subplots(3, 1 + wide, sharex=True, sharey="row", squeeze=False)
    for run, given in curves.items():
        for name in given:
            _draw(panels, name, run, [r for r in rows if (r["run"], r["curve"]) == (run, name)])
    _name(panels, wide)
    _mark_anchors(panels, positive_layer, negative_layer, wide)
    _legend(fig, panels, list(curves), wide, _band(curves, groups))
    return fig


def _name(panels: Any, wide: bool) -> None:
    """Name the axes, and in two columns what each is of."""
    for name in _NEEDED:
        row, column, words = _CURVES[name]
        panels[row, column].set_ylabel(words, fontsize=SMALL)
    for ax in panels[1:].flat:
        ax.axhline(0, color="0.7", lw=0.6, zorder=0)
    for ax in panels[-1]:
        ax.set_xlabel("layer (0-based)", fontsize=SMALL)
        ax.xaxis.get_major_locator().set_params(integer=True)
    if wide:
        panels[0, 1].set_axis_off()
        panels[1, 0].set_title("all image tokens", fontsize=SMALL)
        panels[1, 1].set_title("unmasked tokens only", fontsize=SMALL)


def _checked(run: str, given: Curves) -> dict[str, np.ndarray]:
    if run not in RUNS or not set(_NEEDED) <= set(given) <= set(_CURVES):
        raise FigureError(
            f"the run '{run}' has the curves {', '.join(given) or '–'}. Pass runs named "
            f"{', '.join(RUNS)}, each with {', '.join(_NEEDED)}."
        )
    axes = ("sample", "layer") if np.ndim(given["entropy"]) == 2 else ("layer",)
    arrays = {name: numbers(f"{name} ({run})", values, axes) for name, values in given.items()}
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = ", ".join(str(array.shape) for array in arrays.values())
        raise FigureError(f"the curves of '{run}' have shapes {shapes}. Pass equal shapes.")
    return arrays


def _aligned(
    curves: Mapping[str, Mapping[str, np.ndarray]],
    layers: Sequence[int] | None,
    positive_layer: int,
    negative_layer: int,
) -> list[int]:
    """Return the layers' numbers, which all curves share and the anchors are among."""
    if not curves:
        raise FigureError("there are 0 runs to draw. Pass one by name: {'greedy': …}.")
    counts = {run: given["entropy"].shape[-1] for run, given in curves.items()}
    count = next(iter(counts.values()))
    for run, other in counts.items():
        if other != count:
            raise FigureError(f"'{run}' has {other} layers, not {count}. Align them.")
    names = layer_numbers(layers, count)
    for name, layer in (("positive_layer", positive_layer), ("negative_layer", negative_layer)):
        if layer not in names:
            raise FigureError(
                f"{name}={layer}, but the layers are {', '.join(map(str, names))}. Pass one."
            )
    return names


def _summary(
    run: str,
    name: str,
    values: np.ndarray,
    layers: list[int],
    groups: Any,
    resamples: int,
    seed: int,
) -> list[Row]:
    """Return a row a layer; every curve sees the same draws, because the seed is the same."""
    low = high = [None] * values.shape[-1]
    if values.ndim == 2:
        index = cluster_index(groups, len(values))
        pictures = int(index.max()) + 1
        if pictures >= FEWEST:
            counts = resample_counts(pictures, resamples, np.random.default_rng(seed))
            weights = counts[:, index]
            means = weights @ values / weights.sum(axis=1, keepdims=True)
            low, high = np.quantile(means, [0.025, 0.975], axis=0).tolist()
    mean = values.mean(axis=0) if values.ndim == 2 else values
    return [
        {"run": run, "curve": name, "layer": layer, "mean": float(m), "low": lo, "high": hi}
        for layer, m, lo, hi in zip(layers, mean, low, high, strict=True)
    ]


def _draw(panels: Any, name: str, run: str, rows: list[Row]) -> None:
    row, column, _ = _CURVES[name]
    _, colour, style = RUNS[run]
    ax, layer = panels[row, column], [one["layer"] for one in rows]
    marker = {"marker": "o", "ms": 2.2} if run == "greedy" else {}
    ax.plot(layer, [one["mean"] for one in rows], color=colour, ls=style, lw=1.2, **marker)
    if rows[0]["low"] is not None:
        low, high = ([one[end] for one in rows] for end in ("low", "high"))
        ax.fill_between(layer, low, high, color=colour, alpha=0.18, lw=0)


def _mark_anchors(panels: Any, positive_layer: int, negative_layer: int, wide: bool) -> None:
    """Draw a line at each anchor's layer, with the sign of the anchor above the first panel."""
    for number, ax in enumerate(panels.flat):
        if wide and number == 1:
            continue  # the legend's
        for layer in (negative_layer, positive_layer):
            ax.axvline(layer, color="0.4", lw=0.7, ls=":", zorder=0)
    first = panels[0, 0]
    for layer, sign in ((negative_layer, "−"), (positive_layer, "+")):
        first.text(
            layer,
            1.01,
            sign,
            color="0.3",
            fontsize=8,
            ha="center",
            va="bottom",
            transform=first.get_xaxis_transform(),
        )


def _band(curves: Mapping[str, Mapping[str, np.ndarray]], groups: Any) -> str:
    """Return what the bands are, or why there are none."""
    values = next(iter(curves.values()))["entropy"]
    if values.ndim != 2:
        return "one prompt: no intervals"
    pictures = int(cluster_index(groups, len(values)).max()) + 1
    if pictures < FEWEST:
        return f"{pictures} pictures: too few\nfor intervals"
    return f"means, 95 % bands\nover {pictures} pictures"


def _legend(fig: Drawing, panels: Any, runs: list[str], wide: bool, title: str) -> None:
    handles = [
        Line2D([], [], color=RUNS[run][1], ls=RUNS[run][2], lw=1.2, label=run) for run in runs
    ]
    handles.append(Line2D([], [], color="0.4", ls=":", lw=0.7, label="layers of anchors −, +"))
    style: dict[str, Any] = {"title": title, "title_fontsize": SMALL, "fontsize": SMALL}
    if wide:
        panels[0, 1].legend(
            handles=handles, loc="center", borderpad=0, labelspacing=0.25, handlelength=1.8, **style
        )
    else:
        fig.legend(handles=handles, loc="outside lower center", ncols=2, **style)
