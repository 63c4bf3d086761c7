"""How attention drifts through the layers: the paper's Fig. 2b."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from clva_lens.benchmarks.statistics import cluster_index, resample_counts
from clva_lens.figures.base import (
    BLUE,
    COLUMN,
    GREEN,
    VERMILION,
    Drawing,
    Example,
    figure,
    layer_numbers,
    numbers,
)
from clva_lens.ground.errors import FigureError
from clva_lens.ground.files import Row

# Curve: (panel, colour, words in the legend).
_CURVES = {
    "entropy": (0, BLUE, "entropy"),
    "toward_positive": (1, VERMILION, "to the positive anchor"),
    "toward_negative": (1, GREEN, "to the negative anchor"),
}


_SAMPLES = np.random.default_rng(0).uniform(size=(6, 5, 4))


def _recorded(record: Any) -> Drawing:
    """Draw the arrays ``drift``: three curves by sample, without and with CLVA."""
    kept = record.arrays("drift")
    positive, negative = kept["anchors"].tolist()
    return drift_curves(
        kept["entropy"],
        kept["toward_positive"],
        kept["toward_negative"],
        positive,
        negative,
        clva=(kept["clva_entropy"], kept["clva_toward_positive"], kept["clva_toward_negative"]),
        layers=kept["layers"].tolist(),
        groups=kept["groups"].tolist(),
    )


@figure(
    "drift_curves",
    of_record=_recorded,
    example=Example(
        dict(zip(_CURVES, _SAMPLES, strict=False))
        | {"positive_layer": 2, "clva": tuple(_SAMPLES[3:]), "groups": list("aabbc")},
        arrays={
            "drift": dict(zip((*_CURVES, *(f"clva_{n}" for n in _CURVES)), _SAMPLES, strict=True))
            | {"anchors": [2, 0], "layers": [0, 1, 2, 3], "groups": list("aabbc")}
        },
    ),
)
def drift_curves(
    entropy: ArrayLike,
    toward_positive: ArrayLike,
    toward_negative: ArrayLike,
    positive_layer: int,
    negative_layer: int = 0,
    *,
    clva: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    groups: Sequence[Hashable] | None = None,
    layers: Sequence[int] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Drawing:
    """Return entropy and correlation with the anchors by layer, one panel above the other.

    Each quantity is [layer] or [sample, layer]; with samples the line is their mean and the band
    its 95 % percentile bootstrap interval.

    Args:
        entropy: Eq. 5, nats.
        toward_positive: Eq. 6 with the positive anchor, Pearson r in [-1, 1].
        toward_negative: Eq. 6 with the negative anchor, Pearson r in [-1, 1].
        positive_layer: layer of the positive anchor, marked by a vertical line.
        negative_layer: layer of the negative anchor, marked likewise.
        clva: the same three quantities under CLVA, drawn dashed.
        groups: image of each sample, resampled together; None resamples the samples.
        layers: the 0-based number of each layer, where they are not 0, 1, 2, …
        resamples: number of bootstrap resamples of the band.
        seed: seed of the band.

    Raises:
        FigureError: if the data is empty, nan or of other shapes, or an anchor is at no layer.
        BenchmarkError: if the groups do not fit the samples, or there are fewer than two.
    """
    runs = {"greedy": (entropy, toward_positive, toward_negative)}
    if clva is not None:
        runs["with CLVA"] = clva
    curves = {run: _checked(run, values) for run, values in runs.items()}
    names = _aligned(curves, layers, positive_layer, negative_layer)
    rows = [
        row
        for run, values in curves.items()
        for name, value in zip(_CURVES, values, strict=True)
        for row in _summary(run, name, value, names, groups, resamples, seed)
    ]
    fig = Drawing(COLUMN, 4.2, rows)
    panels = fig.subplots(2, 1, sharex=True)
    for run in curves:
        for name in _CURVES:
            _draw(panels, name, run, [r for r in rows if (r["run"], r["curve"]) == (run, name)])
    panels[0].set_ylabel("attention entropy (nats)")
    panels[1].set_ylabel("correlation (Pearson r)")
    panels[1].set_xlabel("layer (index, 0-based)")
    panels[1].axhline(0, color="0.7", lw=0.6, zorder=0)
    panels[1].xaxis.get_major_locator().set_params(integer=True)
    _mark_anchors(panels, positive_layer, negative_layer)
    _legend(fig, list(curves), banded=curves["greedy"][0].ndim == 2)
    return fig


def _checked(run: str, values: tuple[ArrayLike, ArrayLike, ArrayLike]) -> list[np.ndarray]:
    axes = ("sample", "layer") if np.ndim(values[0]) == 2 else ("layer",)
    arrays = [numbers(f"{name} ({run})", v, axes) for name, v in zip(_CURVES, values, strict=True)]
    if len({array.shape for array in arrays}) > 1:
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise FigureError(f"the curves of '{run}' have shapes {shapes}. Pass equal shapes.")
    return arrays


def _aligned(
    curves: dict[str, list[np.ndarray]],
    layers: Sequence[int] | None,
    positive_layer: int,
    negative_layer: int,
) -> list[int]:
    """Return the layers' numbers, which all curves share and the anchors are among."""
    count = curves["greedy"][0].shape[-1]
    for run, values in curves.items():
        if values[0].shape[-1] != count:
            raise FigureError(f"'{run}' has {values[0].shape[-1]} layers, not {count}. Align them.")
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
        counts = resample_counts(int(index.max()) + 1, resamples, np.random.default_rng(seed))
        weights = counts[:, index]
        means = weights @ values / weights.sum(axis=1, keepdims=True)
        low, high = np.quantile(means, [0.025, 0.975], axis=0).tolist()
    mean = values.mean(axis=0) if values.ndim == 2 else values
    return [
        {"run": run, "curve": name, "layer": layer, "mean": float(m), "low": lo, "high": hi}
        for layer, m, lo, hi in zip(layers, mean, low, high, strict=True)
    ]


def _draw(panels: Any, name: str, run: str, rows: list[Row]) -> None:
    panel, colour, _ = _CURVES[name]
    layer = [row["layer"] for row in rows]
    dashed = "-" if run == "greedy" else (0, (3, 1.5))
    panels[panel].plot(
        layer,
        [row["mean"] for row in rows],
        color=colour,
        ls=dashed,
        marker="o",
        ms=2.2 if run == "greedy" else 0,
    )
    if rows[0]["low"] is not None:
        panels[panel].fill_between(
            layer,
            [row["low"] for row in rows],
            [row["high"] for row in rows],
            color=colour,
            alpha=0.18,
            lw=0,
        )


def _mark_anchors(panels: Any, positive_layer: int, negative_layer: int) -> None:
    for ax in panels:
        ax.axvline(negative_layer, color=GREEN, lw=0.8, ls=":", zorder=0)
        ax.axvline(positive_layer, color=VERMILION, lw=0.8, ls=":", zorder=0)
    top = panels[0].get_xaxis_transform()
    words = (
        ("negative anchor", negative_layer, GREEN),
        ("positive anchor", positive_layer, VERMILION),
    )
    low, high = panels[0].get_xlim()
    for step, (word, layer, colour) in enumerate(words):
        # The positive label sits a line higher, so that near layers do not write over each other.
        panels[0].text(
            layer,
            1.02 + 0.09 * step,
            word,
            color=colour,
            fontsize=6.5,
            ha="left" if layer < (low + high) / 2 else "right",
            va="bottom",
            transform=top,
        )


def _legend(fig: Drawing, runs: list[str], *, banded: bool) -> None:
    handles = [Line2D([], [], color=colour, label=word) for _, colour, word in _CURVES.values()]
    if len(runs) > 1:
        handles += [
            Line2D([], [], color="0.3", ls="-", label="greedy"),
            Line2D([], [], color="0.3", ls=(0, (3, 1.5)), label="with CLVA"),
        ]
    title = "mean, band: 95 % bootstrap interval" if banded else None
    fig.legend(handles=handles, loc="outside lower center", ncols=2, title=title, title_fontsize=7)
