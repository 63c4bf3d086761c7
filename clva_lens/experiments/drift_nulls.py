"""Attention drift beside its nulls: random tokens under CLVA, and twins that learned nothing.

Fig. 2b of arXiv:2603.25088v1 has two features that need no training. The map of all heads at the
anchor's layer holds the anchor's own heads, so r with the positive anchor peaks there by
definition, and falls after it; and CLVA puts attention on the tokens of the positive mask, so that
r with the anchor returns by the edit. What training did is what models of the same shape with
seeded random weights do not show. Take the mean of several: the maps of one hardly depend on the
picture, so that pictures do not average out what its seed made. (Shuffled image tokens would be no
such null: trained weights keep what they learned of places.)
What CLVA's anchors do is what the same weights on random tokens do not; and what its edit does to
the rest of a map is r over the tokens that no mask marks.
"""

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from clva_lens.benchmarks.base import Benchmark, Sample
from clva_lens.experiments.measuring import mean_interval, trace_samples
from clva_lens.figures.base import Drawing
from clva_lens.figures.drift import RUNS, drift_curves
from clva_lens.ground.errors import BenchmarkError
from clva_lens.ground.files import Row
from clva_lens.lens.load import LensModel
from clva_lens.lens.observers import AttentionTrace
from clva_lens.methods.base import MethodLike
from clva_lens.methods.clva import CLVA
from clva_lens.methods.controls import Shuffled
from clva_lens.science.anchors import saliency_map
from clva_lens.science.drift import AttentionDrift, attention_drift

_CURVES = (
    "entropy",
    "toward_positive",
    "toward_negative",
    "unmasked_positive",
    "unmasked_negative",
)
# What is told of a run; the letter r is Eq. 6's correlation.
BACK, AWAY = "change of r(first layer)", "change of r(positive anchor)"
SHARPER, PEAK = "change of entropy (nats)", "r(positive anchor) at its own layer"
PULL, PULL_ELSEWHERE = "CLVA's change of r(positive anchor)", "the same, unmasked tokens"
LESS = ", less the untrained twins'"


def untrained_twin(model: LensModel, seed: int = 0) -> LensModel:
    """Return a model of the same classes and configuration with seeded random weights.

    It has the model's processor, device and dtype, and as many weights again in memory.
    """
    hf_model = model.hf_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = type(hf_model)(copy.deepcopy(hf_model.config))
    nn.Module.to(twin.eval(), device=hf_model.device, dtype=hf_model.dtype)
    return LensModel(twin, model.processor, f"{model.name}, untrained, seed {seed}")


@dataclass(frozen=True, eq=False)
class DriftRuns:
    """Drift of the same questions under each run of Fig. 2b and its nulls.

    ``curves[run][name]`` are [sample, layer], of the samples that have every curve under every run
    (a constant map has no correlation); ``left_out`` counts the others. ``groups`` are pictures.
    """

    curves: Mapping[str, Mapping[str, np.ndarray]]
    layers: tuple[int, ...]
    positive_layer: int
    negative_layer: int
    groups: Sequence[Hashable]
    left_out: int

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what a record keeps, and the figure ``drift`` draws."""
        named = {
            RUNS[run][0] + name: values
            for run, curves in self.curves.items()
            for name, values in curves.items()
        }
        return {
            **named,
            "layers": np.array(self.layers),
            "anchors": np.array([self.positive_layer, self.negative_layer]),
            "groups": np.array(self.groups),
        }

    def draw(self) -> Drawing:
        """Return Fig. 2b with its nulls; a single sample has curves without a sample axis."""
        anchors, shown, groups = (
            (self.positive_layer, self.negative_layer),
            self.curves,
            self.groups,
        )
        if len(groups) == 1:
            shown = {run: {k: one[0] for k, one in found.items()} for run, found in shown.items()}
        return drift_curves(shown, *anchors, groups=groups, layers=self.layers)


class _Maps:
    """What ``attention_drift`` reads of a trace, with the head classes of a method's rule."""

    def __init__(self, trace: AttentionTrace, method: CLVA) -> None:
        self.trace, self.layers, self.num_layers = trace, trace.layers, trace.num_layers
        self.site_layers = trace.site_layers
        self.heads = trace.heads(method.head_threshold, method.empty)

    def saliency(self, heads: str) -> Float[Tensor, "*batch layer visual"]:
        if heads == "all":
            return self.trace.saliency("all")
        return saliency_map(self.trace.maps, getattr(self.heads, heads))


def drift_under(trace: AttentionTrace, method: CLVA) -> AttentionDrift:
    """Return a trace's drift from the anchors that a method takes: its layers, λ and τ."""
    positive, negative = method.positive_layer, method.negative_layer
    return attention_drift(_Maps(trace, method), positive, negative, tau=method.tau)


def measure_drift(
    model: LensModel,
    samples: Sequence[Sample],
    method: CLVA | None = None,
    *,
    twins: Sequence[LensModel] = (),
    benchmark: Benchmark | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> DriftRuns:
    """Return the drift of samples, greedily, under CLVA, on random tokens, and in the twins.

    Curves of the untrained twins are their mean; without any there are three runs. ``seed`` is that
    of the random tokens.

    Raises:
        BenchmarkError: if no sample has every curve.
    """
    method = CLVA() if method is None else method
    asked: dict[str, tuple[Sequence[LensModel], MethodLike | None]] = {
        "greedy": ([model], None),
        "CLVA": ([model], method),
        "CLVA, random tokens": ([model], Shuffled(method, seed=seed)),
    }
    if twins:
        asked |= {"untrained": (twins, None), "untrained, CLVA": (twins, method)}
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    return drift_of(asked, samples, method, benchmark=benchmark, **how)


def drift_of(
    asked: Mapping[str, tuple[Sequence[LensModel], MethodLike | None]],
    samples: Sequence[Sample],
    method: CLVA,
    **how: Any,
) -> DriftRuns:
    """Return the drift from the anchors of ``method`` under each run: models, and what acts there.

    Curves of several models are their mean; one run is "greedy". ``how`` goes to ``trace_samples``.

    Raises:
        BenchmarkError: if no sample has every curve.
    """
    drifts = {
        run: [drift_under(trace_samples(one, samples, acting, **how), method) for one in models]
        for run, (models, acting) in asked.items()
    }
    curves = {
        run: {
            name: np.mean([getattr(one, name).float().cpu().numpy() for one in found], axis=0)
            for name in _CURVES
        }
        for run, found in drifts.items()
    }
    every = [one for given in curves.values() for one in given.values()]
    whole = np.all([np.isfinite(one).all(axis=-1) for one in every], axis=0)
    if not whole.any():
        raise BenchmarkError(
            f"none of the {len(samples)} samples has a correlation at every layer: maps are "
            "constant. Ask more samples, or take other anchor layers."
        )
    (first,) = drifts["greedy"]
    return DriftRuns(
        {run: {name: one[whole] for name, one in given.items()} for run, given in curves.items()},
        first.layers,
        first.positive_layer,
        first.negative_layer,
        [sample.group for sample, kept in zip(samples, whole, strict=True) if kept],
        int((~whole).sum()),
    )


def drift_rows(found: DriftRuns, last: int = 1) -> list[Row]:
    """Return what happens between the anchor's layer and the mean of the ``last`` layers.

    A row has ``run, what, mean, low, high``: means over samples with 95 % bootstraps over pictures,
    None of fewer than ten. Differences are paired by sample.
    """
    at = list(found.layers).index(found.positive_layer)

    def late(run: str, curve: str) -> np.ndarray:
        return found.curves[run][curve][:, -last:].mean(axis=1)

    def change(run: str, curve: str) -> np.ndarray:
        return late(run, curve) - found.curves[run][curve][:, at]

    told: list[tuple[str, str, np.ndarray]] = []
    for run in found.curves:
        told += [
            (run, BACK, change(run, "toward_negative")),
            (run, AWAY, change(run, "toward_positive")),
            (run, SHARPER, change(run, "entropy")),
            (run, PEAK, found.curves[run]["toward_positive"][:, at]),
        ]
    if "untrained" in found.curves:
        for what, curve in ((BACK, "toward_negative"), (AWAY, "toward_positive")):
            told.append(
                ("greedy", what + LESS, change("greedy", curve) - change("untrained", curve))
            )
    for run, without in (
        ("CLVA", "greedy"),
        ("CLVA, random tokens", "greedy"),
        ("untrained, CLVA", "untrained"),
    ):
        if run in found.curves:
            for what, curve in ((PULL, "toward_positive"), (PULL_ELSEWHERE, "unmasked_positive")):
                told.append((run, what, late(run, curve) - late(without, curve)))
    rows = []
    for run, what, values in told:
        mean, low, high = mean_interval(values, found.groups)
        rows.append({"run": run, "what": what, "mean": mean, "low": low, "high": high})
    return rows


def drift_sentences(rows: Sequence[Row]) -> list[str]:
    """Return what the rows of ``drift_rows`` say; without intervals, that they decide nothing."""
    by = {(row["run"], row["what"]): row for row in rows}
    twins = ("untrained", BACK) in by
    return [
        f"r with the first layer's map changes by {told(by['greedy', BACK])} from the positive "
        f"anchor's layer to the last{_and_twins(by, BACK)}: {_back(by)}.",
        f"r with the positive anchor is {told(by['greedy', PEAK], sign='')} at its own layer and "
        f"changes by {told(by['greedy', AWAY])} after it{_and_twins(by, AWAY)}: {_away(by)}.",
        f"CLVA moves r with the anchor at the end by {told(by['CLVA', PULL])}, over unmasked "
        f"tokens by {told(by['CLVA', PULL_ELSEWHERE])}; on random tokens it moves by "
        f"{told(by['CLVA, random tokens', PULL])}"
        + (f", in untrained twins by {told(by['untrained, CLVA', PULL])}" if twins else "")
        + f": {_pull(by)}.",
    ]


def told(row: Row, sign: str = "+") -> str:
    """Return a row's mean with its interval, or without one."""
    mean = f"{row['mean']:{sign}.3f}"
    ends = "(no interval)"
    if row["low"] is not None:
        ends = f"[{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"
    return f"{mean} {ends}".replace("-", "−")


def _and_twins(by: Mapping[tuple[str, str], Row], what: str) -> str:
    row = by.get(("untrained", what))
    return "" if row is None else f" (untrained twins {told(row)})"


def _side(row: Row) -> int | None:
    """Return on which side of 0 an interval lies, 0 if on both; None without an interval."""
    if row["low"] is None:
        return None
    return int(row["low"] > 0) - int(row["high"] < 0)


UNDECIDED = "fewer than ten pictures decide nothing"


def _back(by: Mapping[tuple[str, str], Row]) -> str:
    side = _side(by["greedy", BACK])
    if side is None:
        return UNDECIDED
    if side <= 0:
        return "the maps do not go back to the first layer's"
    against = by.get(("greedy", BACK + LESS))
    if against is None:
        return "the maps go back towards the first layer's"
    if (_side(against) or 0) > 0:
        return "the maps go back towards the first layer's, further than without training"
    return "the maps go back towards the first layer's, no further than without training"


def _away(by: Mapping[tuple[str, str], Row]) -> str:
    side = _side(by["greedy", AWAY])
    if side is None:
        return UNDECIDED
    words = "the maps leave the anchor's" if side < 0 else "the maps do not leave the anchor's"
    row = by.get(("untrained", AWAY))
    if row is None:
        return words
    leave = "leave it" if (_side(row) or 0) < 0 else "do not leave it"
    return f"{words}; those of models that learned nothing {leave}"


def _pull(by: Mapping[tuple[str, str], Row]) -> str:
    side = _side(by["CLVA", PULL])
    if side is None:
        return UNDECIDED
    if side <= 0:
        return "the maps do not return to the anchor"
    row, elsewhere = by.get(("untrained, CLVA", PULL)), _side(by["CLVA", PULL_ELSEWHERE]) or 0
    words = "the maps return to the anchor"
    if row is not None:
        same = (_side(row) or 0) > 0
        words += (
            ", which is the edit's doing: untrained maps do too"
            if same
            else ", as untrained maps do not"
        )
    rest = {1: "follow", 0: "do not follow", -1: "move away from it"}[elsewhere]
    return f"{words}; the tokens that are not re-weighted {rest}"
