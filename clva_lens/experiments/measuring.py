"""What analyses measure: methods side by side on benchmarks, and attention over samples."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from clva_lens.benchmarks.base import BENCHMARKS, Benchmark, Sample
from clva_lens.benchmarks.comparison import ROW_KINDS, Comparison, compare
from clva_lens.benchmarks.run_folder import Report, score
from clva_lens.benchmarks.statistics import (
    FEWEST,
    Bootstrap,
    Interval,
    cluster_index,
    weighted_mean,
)
from clva_lens.experiments.paper import SPLITS
from clva_lens.experiments.reproduce.found import name_of, refusals
from clva_lens.experiments.reproduce.needs import Run
from clva_lens.experiments.reproduce.running import make_runs
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.ground.errors import BenchmarkError, ParameterError, RecordError
from clva_lens.ground.files import Row
from clva_lens.ground.progress import progress_bar
from clva_lens.lens.asking import Asking
from clva_lens.lens.attention_trace import AttentionTrace
from clva_lens.lens.evaluate import run_benchmark
from clva_lens.lens.load import LensModel
from clva_lens.lens.trace import trace_attention
from clva_lens.methods.base import MethodLike
from clva_lens.toy.toys import of_toy_world

OFFICIAL = {
    "pope": tuple(f"pope/coco/{split}" for split in SPLITS),
    "chair": ("chair/coco",),
    "mme": ("mme",),
}
TOY = {
    "pope": tuple(f"pope/toy/{split}" for split in SPLITS),
    "chair": ("chair/toy",),
    "mme": ("mme/toy",),
}


def is_toy(model: LensModel) -> bool:
    """Return whether a model was trained on the toy world: by its name, or its folder's recipe."""
    return of_toy_world(model.name)


def benchmarks_for(model: LensModel, kind: str, named: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the benchmarks named, or those of a kind (pope, chair, mme) that fit the model.

    A toy gets the toy world's, any other model the official ones.
    """
    return tuple(named) or (TOY if is_toy(model) else OFFICIAL)[kind]


def configured(names: Sequence[str], settings: Mapping[str, Any]) -> list[Benchmark]:
    """Return benchmarks by name, with settings (parser, readout, protocol, data, …) in place.

    Each takes those that it has: a caption has no parser.

    Raises:
        UnknownName: if there is no such benchmark.
        ParameterError: if none of them has a setting, or a value does not fit.
    """
    chosen = [BENCHMARKS.get(name) for name in names]
    known = [{field.name for field in fields(one)} for one in chosen]
    strange = [name for name in settings if not any(name in own for own in known)]
    if strange:
        listed = ", ".join(sorted(set().union(*known)))
        raise ParameterError(
            f"no benchmark of {', '.join(names)} has the setting '{strange[0]}'. They have: "
            f"{listed}."
        )
    return [
        replace(one, **{name: value for name, value in settings.items() if name in own})
        for one, own in zip(chosen, known, strict=True)
    ]


def require_pictures(name: str, samples: Sequence[Sample]) -> None:
    """Return silently if samples are of two pictures or more, which intervals are over.

    Raises:
        BenchmarkError: saying how many samples are of how many pictures.
    """
    require_several(name, len(samples), len({sample.group or sample.id for sample in samples}))


def require_several(name: str, samples: int, pictures: int) -> None:
    """Return silently if there are two pictures or more, which intervals are over.

    Raises:
        BenchmarkError: saying how many samples are of how many pictures.
    """
    if pictures < 2:
        raise BenchmarkError(
            f"the {samples} samples of {name} are of {pictures} picture, and intervals are over "
            f"pictures: nothing was run. Ask {samples + 1} or more; below {FEWEST} pictures no "
            "interval is shown."
        )


def measure_methods(
    model: LensModel,
    benchmarks: Sequence[str | Benchmark],
    askings: Mapping[str, Asking],
    *,
    keep: Callable[[str, Report], None] | None = None,
    progress: bool = True,
) -> list[Row]:
    """Return one row for each benchmark, method and metric, with its change against the first.

    ``askings`` are the methods by name, each with how it is asked (see ``Asking.each``); without a
    decoding of its own one is greedy, as long as the benchmark wants. ``keep`` is called with each
    method's name and report: a record's ``ran``.

    A row has ``benchmark, method, metric, value, change, low, high, n``: ``value`` in the metric's
    own unit (fractions in [0, 1], MME's scores in points, ``seconds`` of all answers), ``change``
    is ``value`` less that of the first method, ``low`` and ``high`` the ends of its paired 95 %
    interval over pictures; None where there is none, as of fewer than ten pictures. Yes/no
    benchmarks have the metrics ``bias_matched_accuracy`` (of the first method, at this one's number
    of yeses) and ``beyond_bias`` (what is gained over it, with its interval) too; their ``value``
    is None where the first method has no threshold to move (see ``Comparison``).

    Raises:
        UnknownName: if there is no such benchmark.
        BenchmarkError: if a benchmark cannot be run, or, before any is, if what is asked of one is
            of a single picture.
        ParameterError: if a method does not fit.
    """
    rows: list[Row] = []
    chosen = [BENCHMARKS.get(one) if isinstance(one, str) else one for one in benchmarks]
    first_asked = next(iter(askings.values()))
    for benchmark in chosen:
        samples = benchmark.samples(first_asked.limit, first_asked.seed)
        require_pictures(benchmark.name, samples)
    total = len(chosen) * len(askings)
    with progress_bar("methods × benchmarks", total, wanted=progress) as advance:
        for benchmark in chosen:
            first: Report | None = None
            for name, asking in askings.items():
                report = run_benchmark(model, benchmark, asking, progress=False)
                if keep is not None:
                    keep(name, report)
                first = first or report
                rows += _rows_of(benchmark, name, report, first)
                advance(1)
    return rows


def measure_sweep(
    model: LensModel,
    benchmarks: Sequence[Benchmark],
    askings: Mapping[str, Asking],
    root: Path,
    *,
    keep: Callable[[str, Report], None] | None = None,
    progress: bool = True,
) -> list[Row]:
    """Return the rows of ``measure_methods``, of runs that are made as a sweep in a folder.

    Methods are asked side by side, so that a picture is read once for all that can share it, and a
    folder that holds some of the runs already is continued. What one of them took is not told
    apart, so there is no ``seconds``.

    Raises:
        BenchmarkError: if a run is ended, or what is asked is of a single picture.
        ParameterError: if a method does not fit.
    """
    runs = {
        (benchmark, name): Run(
            Subject(model.name, None, asking.seed, asking.batch_size),
            benchmark,
            asking.method,
            asking.decoding,
            asking.limit,
        )
        for benchmark in benchmarks
        for name, asking in askings.items()
    }
    for (benchmark, _), run in runs.items():
        require_pictures(benchmark.name, benchmark.samples(run.limit, run.subject.seed))
    make_runs(model, [*runs.values()], root, lambda text: None, progress=progress)
    rows, first = list[Row](), dict[str, Report]()
    for (benchmark, name), run in runs.items():
        if not run.finished(root):
            raise ParameterError(refusals(root, run.subject.slug)[name_of(run)])
        report = score(run.folder(root))
        if keep is not None:
            keep(name, report)
        rows += _rows_of(benchmark, name, report, first.setdefault(benchmark.name, report))
    return rows


def _rows_of(benchmark: Benchmark, name: str, report: Report, first: Report) -> list[Row]:
    """Return a method's rows, compared with the first one's unless it is that."""
    against = None if first is report else compare(first.score, report.score)
    made = _metric_rows(report, first, against)
    return [{"benchmark": benchmark.name, "method": name, **row} for row in made]


def _metric_rows(report: Report, first: Report, against: Comparison | None) -> list[Row]:
    # A sweep does not tell what one of its runs took.
    values, before = (
        one.metrics | {key: value for key, value in one.record.items() if key == "seconds"}
        for one in (report, first)
    )
    rows = []
    for name, value in values.items():
        pair = None if against is None else against.metrics.get(name)
        interval = None if pair is None else pair.difference
        change = None if against is None or name not in before else value - before[name]
        rows.append(_row(name, value, change, _shown(interval, against), report))
    if against is not None and ROW_KINDS.get(against.kind).threshold:
        matched, beyond = against.bias_matched_accuracy, against.beyond_bias
        gain = None if beyond is None else beyond.estimate
        rows.append(_row("bias_matched_accuracy", matched, None, None, report))
        rows.append(_row("beyond_bias", gain, gain, _shown(beyond, against), report))
    return rows


def _shown(interval: Interval | None, against: Comparison | None) -> Interval | None:
    """Return an interval, if it is over enough pictures to be shown."""
    return interval if against is not None and against.groups >= FEWEST else None


def _row(
    metric: str,
    value: float | None,
    change: float | None,
    interval: Interval | None,
    report: Report,
) -> Row:
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return {
        "metric": metric,
        "value": None if value is None else float(value),
        "change": None if change is None else float(change),
        "low": low,
        "high": high,
        "n": len(report.rows),
    }


def trace_samples(
    model: LensModel,
    samples: Sequence[Sample],
    method: MethodLike | None = None,
    *,
    benchmark: Benchmark | None = None,
    site: str | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> AttentionTrace:
    """Return the attention for samples, with a batch axis, on the CPU.

    With a ``benchmark`` pictures are read as its settings say, as ``evaluate`` reads them.

    Raises:
        BenchmarkError: if a picture is missing.
        PromptError: if a picture cannot be read, or numbers of image tokens differ.
    """
    traces = []
    with progress_bar("samples", len(samples), wanted=progress) as advance:
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            pictures = [one.image if benchmark is None else benchmark.picture(one) for one in part]
            prompt = model.prompt(pictures, [one.question for one in part])
            traces.append(trace_attention(model, prompt, method, site=site))
            advance(len(part))
    return AttentionTrace.concatenate(traces)


def mean_interval(
    values: ArrayLike, groups: Sequence[Hashable] | None = None, *, seed: int = 0
) -> tuple[float, float | None, float | None]:
    """Return a mean and the ends of its 95 % bootstrap interval over groups (pictures).

    Of fewer than ten groups the ends are None: such an interval is too narrow to be shown.

    Raises:
        BenchmarkError: if there are not as many groups as values.
    """
    column = np.asarray(values, dtype=float)
    if len(column if groups is None else set(groups)) < FEWEST:
        return float(column.mean()), None, None
    index = cluster_index(None if groups is None else list(groups), len(column))
    found = Bootstrap(index, 2000, 0.95, seed).intervals([(weighted_mean, column, None)])[0]
    return float(column.mean()), found.low, found.high


def points(row: Mapping[str, Any]) -> str:
    """Return a row's change in points with its interval: ``+0.2 points (−0.4 to +0.8)``.

    A change that is None is "undefined"; one without an interval says so.
    """
    if row["change"] is None:
        return "undefined"
    change = f"{100 * row['change']:+.1f} points"
    if row["low"] is not None:
        change += f" ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
    else:
        change += " (no interval)"
    return change.replace("-", "−")


def one(rows: Sequence[Row], **wanted: Any) -> Row:
    """Return the only row that has these values.

    Raises:
        RecordError: if there is none, or more than one.
    """
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise RecordError(f"{len(found)} rows have {wanted}, but one is needed. Name more columns.")
    return found[0]
