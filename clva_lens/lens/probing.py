"""Linear probes: what a linear classifier reads off the residual stream, by layer and span.

A probe says that something *can* be read off linearly, not that the model uses it (Belinkov,
arXiv:2102.12452): steer along it, or patch it, to see. Its null are the same probes on labels that
were shuffled (Hewitt & Liang, arXiv:1909.03368): with many dimensions and few prompts they are
above chance too. Where all prompts of a group have one label, groups are shuffled.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.benchmarks.statistics import cluster_index, resample_counts, wilson_interval
from clva_lens.engine.stream import Part
from clva_lens.figures import Drawing, layer_curves
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.drawn import SelfDrawn
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.files import Row
from clva_lens.ground.parameters import check_arguments, is_integer
from clva_lens.ground.progress import progress_bar
from clva_lens.lens.intervene import intervening, refuse_in_trace
from clva_lens.lens.stream_reading import span_states, stack_layers_of
from clva_lens.methods.base import MethodLike
from clva_lens.methods.stream_rows import Stack
from clva_lens.models.family import transformers_model
from clva_lens.models.prompt import Asked

RESAMPLES = 2000


@dataclass(frozen=True, eq=False, repr=False)
class Probe(SelfDrawn):
    """Cross-validated accuracy of linear probes, by layer and span; all prompts count once.

    ``low`` and ``high`` are the ends of its 95 % interval: Wilson's, or with groups that of a
    bootstrap over them. ``shuffled`` are the same probes on shuffled labels, one draw each.
    ``chance`` is the share of the most frequent label, ``settings`` what decides the numbers.
    """

    accuracy: Float[Tensor, "layer span"]
    low: Float[Tensor, "layer span"]
    high: Float[Tensor, "layer span"]
    shuffled: Float[Tensor, "layer span shuffle"]
    layers: tuple[int, ...]
    spans: tuple[str, ...]
    prompts: int
    chance: float
    settings: dict[str, Any]

    @property
    def null(self) -> Float[Tensor, "layer span"]:
        """The mean accuracy on shuffled labels."""
        return self.shuffled.mean(dim=-1)

    @property
    def p(self) -> Float[Tensor, "layer span"]:
        """How often shuffled labels do as well, (1 + count) / (1 + draws); for one probe alone."""
        as_well = (self.shuffled >= self.accuracy[..., None]).sum(dim=-1)
        return (1 + as_well) / (1 + self.shuffled.shape[-1])

    def rows(self) -> list[Row]:
        """Return the curves as rows: quantity, run, layer, value, low, high."""
        found: list[Row] = []
        for column, span in enumerate(self.spans):
            quantity = f"accuracy of a linear probe, span '{span}'"
            ends = torch.quantile(
                self.shuffled[:, column], torch.tensor([0.025, 0.975]).to(self.shuffled), dim=-1
            )
            curves = {
                "labels": (self.accuracy[:, column], self.low[:, column], self.high[:, column]),
                "shuffled labels": (self.null[:, column], ends[0], ends[1]),
            }
            for run, curve in curves.items():
                for layer, value, low, high in zip(self.layers, *curve, strict=True):
                    row = {"value": float(value), "low": float(low), "high": float(high)}
                    found.append({"quantity": quantity, "run": run, "layer": layer, **row})
            level = {"run": "most frequent label", "layer": None, "value": self.chance}
            found.append({"quantity": quantity, **level, "low": None, "high": None})
        return found

    def draw(self) -> Drawing:
        """Return accuracy by layer, a panel a span, beside that on shuffled labels."""
        return layer_curves(self.rows())

    def __repr__(self) -> str:
        """Return the best probe of each span, beside its null."""
        lines = [f"Probe({self.prompts} prompts, {len(self.layers)} layers)"]
        for column, span in enumerate(self.spans):
            row = int(self.accuracy[:, column].argmax())
            low, high = float(self.low[row, column]), float(self.high[row, column])
            lines.append(
                f"  {span}: {float(self.accuracy[row, column]):.2f} [{low:.2f}, {high:.2f}] at "
                f"layer {self.layers[row]}; shuffled {float(self.null[row, column]):.2f}"
            )
        return "\n".join(lines)


def probe(
    model: Any,
    prompts: Sequence[Asked],
    labels: Sequence[Hashable],
    *,
    layer: int | Sequence[int] | str = "all",
    span: str | Sequence[str] = ("image", "text", "last"),
    part: Part = "resid_post",
    stack: Stack = "decoder",
    groups: Sequence[Hashable] | None = None,
    folds: int = 5,
    strength: float = 0.1,
    shuffles: int = 10,
    seed: int = 0,
    method: MethodLike | None = None,
    progress: bool = True,
) -> Probe:
    """Return how well a linear classifier tells labels apart, by layer and span, cross-validated.

    Each prompt is read once; its state is the mean over a span of a part of the residual stream.
    Logistic regression on standardised states, in ``folds`` folds: each prompt is judged by a probe
    that has not seen it, nor its group.

    Args:
        model: the model.
        prompts: the prompts; of a batch each is one.
        labels: the label of each.
        layer: "all", or one or more 0-based indices.
        span: "image", "text", "system", "last" or "all", one or more; "all" at the tower.
        part: which part of the stream.
        stack: "decoder", or "vision" for the tower.
        groups: what prompts have in common, such as the picture: a group is in one fold.
        folds: how many; each label needs as many prompts (or groups).
        strength: inverse of the weight of the squared coefficients (scikit-learn's C).
        shuffles: how often labels are shuffled for the null, at least 1.
        seed: of folds, shuffles and resamples.
        method: holds in all runs.
        progress: whether a progress bar is shown.

    Raises:
        ParameterError: if an argument does not fit, or scikit-learn is not installed.
        InterventionError: inside a trace.

    >>> labels = ["there", "gone"] * 3
    >>> found = cl.probe(model, [there, gone] * 3, labels, layer=6, span="last", folds=3)
    >>> found.accuracy.shape
    torch.Size([1, 1])
    """
    refuse_in_trace("probe", "")
    told: Any = {"folds": folds, "strength": strength, "shuffles": shuffles, "seed": seed}
    check_arguments(probe, span=span, **told)
    labels = _written_apart(labels)
    groups = groups if groups is None else _named("groups", groups)
    found = transformers_model(model)
    numbers = stack_layers_of(found, stack, part, _several(layer))
    spans = (span,) if isinstance(span, str) else tuple(span)
    with undisturbed(), intervening(model, method):
        options: Any = {"part": part, "stack": stack, "progress": progress}
        states = span_states(model, prompts, numbers, spans, **options)
    kinds, given = np.unique(np.asarray([str(one) for one in labels]), return_inverse=True)
    fitting = _Fitting(given, groups, len(states), folds, strength, shuffles, seed)
    values = _judged(fitting, states, progress)
    told |= {"part": part, "stack": stack, "labels": kinds.tolist(), "groups": groups is not None}
    chance = float(np.bincount(given).max() / len(given))
    return Probe(*values, numbers, spans, len(states), chance, told)


def _several(layer: Any) -> Any:
    return (layer,) if is_integer(layer) else layer


def _named(name: str, given: Any) -> list[Hashable]:
    """Return labels or groups as a list, of Python's own where they are of another library.

    Raises:
        ParameterError: if one is nothing by which prompts can be told apart.
    """
    plain = given.tolist() if hasattr(given, "tolist") else given
    several = list(plain) if isinstance(plain, Iterable) else [plain]
    several = [one.tolist() if hasattr(one, "tolist") else one for one in several]
    strange = [one for one in several if not isinstance(one, Hashable) or one != one]
    if strange:
        raise ParameterError(
            f"{name} has {strange[0]!r}, by which no prompts can be told apart. Pass a text or an "
            "integer for each prompt."
        )
    return several


def _written_apart(given: Any) -> list[Hashable]:
    """Return labels that are told apart by how they are written, or raise ParameterError."""
    labels = _named("labels", given)
    if len(set(labels)) != len(set(map(str, labels))):
        raise ParameterError(
            f"labels are {list(dict.fromkeys(labels))}, some of which are told apart by their type "
            "only. Pass all as texts, or all as integers."
        )
    return labels


def shuffled_labels(
    labels: np.ndarray, groups: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """Return labels in another order: by group where all of a group have the same.

    What a group has in common then stays with one label, as in the labels themselves; prompt by
    prompt the null would be as narrow as if there were as many groups as prompts.
    """
    if groups is not None:
        own = np.zeros(int(groups.max()) + 1, dtype=labels.dtype)
        own[groups] = labels
        if bool((own[groups] == labels).all()):
            return rng.permutation(own)[groups]
    return rng.permutation(labels)


def _judged(
    fitting: "_Fitting", states: Float[Tensor, "prompt span layer width"], progress: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return accuracies, ends of intervals and accuracies on shuffled labels, by layer and span."""
    table, rows = states.permute(2, 1, 0, 3), []
    flat = table.flatten(0, 1).numpy()
    with progress_bar("probes", len(flat), wanted=progress and len(flat) > 1) as advance:
        for one in flat:
            rows.append(fitting.judge(one))
            advance(1)
    made = [torch.tensor(np.array(one)) for one in zip(*rows, strict=True)]
    accuracy, low, high = (one.reshape(table.shape[:2]) for one in made[:3])
    return accuracy, low, high, made[3].reshape(*table.shape[:2], -1)


class _Fitting:
    """Fits probes on the labels, and on shuffled ones."""

    def __init__(
        self,
        labels: np.ndarray,
        groups: Sequence[Hashable] | None,
        count: int,
        folds: int,
        strength: float,
        shuffles: int,
        seed: int,
    ) -> None:
        if len(labels) != count or (groups is not None and len(groups) != count):
            raise ParameterError(
                f"there are {count} prompts, {len(labels)} labels and "
                f"{'no' if groups is None else len(groups)} groups. Pass one label, and group, for "
                "each prompt."
            )
        if shuffles < 1 or folds < 2 or not strength > 0 or seed < 0:
            raise ParameterError(
                f"folds={folds}, strength={strength}, shuffles={shuffles} and seed={seed}, but at "
                "least 2 folds, a positive strength, 1 shuffle and a seed from 0 are needed. Pass "
                "folds=5, strength=0.1."
            )
        units = range(count) if groups is None else groups
        fewest = min(
            len({one for one, own in zip(units, labels, strict=True) if own == label})
            for label in set(labels.tolist())
        )
        kinds = len(set(labels.tolist()))
        if kinds < 2 or fewest < folds:
            raise ParameterError(
                f"there are {kinds} labels, the rarest with {fewest} prompts or groups, but 2 "
                f"labels with at least folds={folds} each are needed. Pass more prompts, or fewer "
                "folds."
            )
        self.kit = _scikit_learn()
        self.labels, self.folds, self.strength, self.seed = labels, folds, strength, seed
        self.index = None if groups is None else cluster_index(groups, count)
        rng = np.random.default_rng(seed)
        self.shuffled = [shuffled_labels(labels, self.index, rng) for _ in range(shuffles)]

    def judge(self, states: np.ndarray) -> tuple[float, float, float, list[float]]:
        """Return accuracy, the ends of its interval, and the accuracies on shuffled labels."""
        right = self._right(states, self.labels)
        null = [float(self._right(states, one).mean()) for one in self.shuffled]
        if self.index is None:
            low, high = wilson_interval(int(right.sum()), len(right))
            return float(right.mean()), low, high, null
        rng, clusters = np.random.default_rng(self.seed), int(self.index.max()) + 1
        weights = resample_counts(clusters, RESAMPLES, rng)[:, self.index]
        values = (weights * right).sum(axis=1) / weights.sum(axis=1)
        low, high = np.quantile(values, [0.025, 0.975])
        return float(right.mean()), float(low), float(high), null

    def _right(self, states: np.ndarray, labels: np.ndarray) -> np.ndarray:
        splits, pipeline, scaler, regression, predict = self.kit
        grouped = self.index is not None
        kind = splits.StratifiedGroupKFold if grouped else splits.StratifiedKFold
        fold = kind(self.folds, shuffle=True, random_state=self.seed)
        fitted = pipeline(scaler(), regression(C=self.strength, max_iter=2000))
        return predict(fitted, states, labels, groups=self.index, cv=fold) == labels


def _scikit_learn() -> tuple[Any, ...]:
    try:
        from sklearn import model_selection
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ParameterError(
            f"probes are fitted by scikit-learn, which is not installed ({error}). Run "
            "pip install 'clva-lens[probes]'."
        ) from None
    predict = model_selection.cross_val_predict
    return model_selection, make_pipeline, StandardScaler, LogisticRegression, predict
