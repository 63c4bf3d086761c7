"""The folder of a benchmark run: what was asked, every answer as it comes, and the score.

======================  ==========================================================================
``run.json``            everything that decides the answers, written once at the start
``samples.jsonl``       the samples, each with the SHA-256 of its picture instead of it: with the
                        answers, enough to score again
``answers.jsonl``       one line a sample, in the order of the samples, on disk after every batch
``score.json``          the metrics (undefined ones are null), and the SHA-256 of their answers
``rows.jsonl``          one line a sample: label, answer, what was made of it
``log.jsonl``           when the run was started, continued and finished, and its seconds
``lock``                held by the process that writes; it means nothing once that is gone
======================  ==========================================================================
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clva_lens.benchmarks.base import Answer, Benchmark, Sample, Score, judge, read_answers
from clva_lens.benchmarks.comparison import metric_intervals
from clva_lens.benchmarks.lines import each_line, sha256_of_lines
from clva_lens.benchmarks.readouts import require_margins_for
from clva_lens.benchmarks.sample_rows import as_samples
from clva_lens.ground.drawn import SelfDrawn, drawing, gallery
from clva_lens.ground.errors import BenchmarkError
from clva_lens.ground.files import sha256
from clva_lens.ground.parameters import check_arguments
from clva_lens.ground.settings import restore_settings

RUN, SAMPLES, ANSWERS = "run.json", "samples.jsonl", "answers.jsonl"
SCORE, ROWS, LOG, LOCK = "score.json", "rows.jsonl", "log.jsonl", "lock"
SAMPLES_SHA256, ANSWERS_SHA256 = "samples_sha256", "answers_sha256"


@dataclass(frozen=True, eq=False, repr=False)
class Report(SelfDrawn):
    """The metrics of a run, one row a sample, and the record of how it came about."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    record: dict[str, Any]

    @property
    def score(self) -> Score:
        """Metrics and rows as a Score, for ``cl.compare``."""
        return Score(self.metrics, self.rows)

    @property
    def document(self) -> dict[str, Any]:
        """What ``score.json`` says: which variant of which benchmark, and its metrics."""
        keys = ("benchmark", "benchmark_version", "settings")
        return plain({**{key: self.record[key] for key in keys}, "metrics": self.metrics})

    @property
    def title(self) -> str:
        """What was run: benchmark, model and method."""
        record = self.record
        method = record.get("method", {}).get("name")
        return " · ".join(str(x) for x in (record["benchmark"], record.get("model"), method) if x)

    def draw(self) -> Any:
        """Return the scores with 95 % intervals, groups resampled, as a matplotlib figure.

        Raises:
            BenchmarkError: if the rows are of no kind whose intervals are known.
        """
        rows = [
            {"metric": name, "value": one.estimate, "low": one.low, "high": one.high}
            for name, one in metric_intervals(self.score).items()
            if math.isfinite(one.estimate)
        ]
        return drawing("scores")(rows, title=self.title)

    def explore(self, model: Any, against: "Report", folder: str | Path, **options: Any) -> Path:
        """Write a gallery of the questions that this run's method fixed and broke; return its page.

        ``against`` is the run of the model alone, ``model`` that of both. Each question has its
        photo, maps, margins, and a page to touch (``cl.explore``), all in ``folder``, which open
        from disk. ``options``: ``most``, how many of each (12), those whose margins moved most;
        ``method``, where it cannot be made again from the record; ``knock_outs`` and ``progress``
        as in ``cl.explore``.

        Raises:
            BenchmarkError: if the runs cannot be compared, or the samples are not there.
            ParameterError: if the method of the record cannot be made again.
        """
        return gallery()(self, model, against, folder, **options)

    def _repr_png_(self) -> bytes | None:
        """Return the picture that a notebook shows; none of what has no intervals."""
        try:
            return self.draw()._repr_png_()
        except BenchmarkError:
            return None

    def __repr__(self) -> str:
        """Return what was run and its metrics."""
        return f"{self.title}\n{self.score!r}"


# ── reading a run back ──


@dataclass(frozen=True, eq=False, repr=False)
class FinishedRun:
    """A run as it lies in its folder: its record, its samples without pictures, its answers."""

    record: dict[str, Any]
    samples: list[Sample]
    answers: list[Answer]


def read_run(folder: str | Path) -> FinishedRun:
    """Return the run in ``folder``.

    Raises:
        BenchmarkError: if there is none, it is not finished, or its files are damaged or edited.
    """
    folder = Path(folder)
    record = read_record(folder)
    samples = as_samples(each_sample(folder, record))
    answers = read_answers(folder / ANSWERS) if (folder / ANSWERS).is_file() else []
    if len(answers) < len(samples):
        raise BenchmarkError(
            f"the run in '{folder}' has {len(answers)} of its {len(samples)} answers. Continue it "
            "with resume=True (--resume)."
        )
    require_as_scored(folder)
    return FinishedRun(record, samples, answers)


def score(folder: str | Path, **settings: Any) -> Report:
    """Return the report of a finished run, scored again from its answers, without a model.

    ``settings`` change the benchmark's, for example ``parser="strict"``. Nothing is written.

    ``folder``: that of the run.

    Raises:
        BenchmarkError: if there is no finished run, its files are damaged or edited, or its
            benchmark is unknown here or of another version.
        ParameterError: if the benchmark has no such setting.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = cl.evaluate(
    ...         model, "pope/toy/random", limit=4, out=f"{folder}/run", progress=False
    ...     )
    ...     again = cl.score(f"{folder}/run", parser="official")
    >>> again.metrics["failed"]
    0.0
    """
    check_arguments(score, folder=folder)
    run = read_run(folder)
    benchmark = benchmark_of(run.record, settings)
    require_margins_for(benchmark.settings, run.record["settings"])
    return report_of(benchmark, run.samples, run.answers, run.record)


def score_answers(benchmark: Benchmark, path: Path) -> Report:
    """Return the report of a file of answers, of a run of ours or of others.

    Raises:
        BenchmarkError: if the benchmark cannot read the file, or it is not about its samples.
    """
    samples, answers = benchmark.read_scored(path)
    return report_of(benchmark, samples, answers, {})


def report_of(
    benchmark: Benchmark,
    samples: Sequence[Sample],
    answers: Sequence[Answer],
    record: Mapping[str, Any],
) -> Report:
    """Return the report of answers, with the variant of the benchmark that they are judged by."""
    judged = judge(benchmark, samples, answers)
    variant = {
        "benchmark": benchmark.name,
        "benchmark_version": benchmark.version,
        "settings": plain(benchmark.settings),
    }
    return Report(judged.metrics, judged.rows, {**record, **variant})


def benchmark_of(record: Mapping[str, Any], settings: Mapping[str, Any]) -> Benchmark:
    """Return the benchmark of a record, with some settings changed.

    Raises:
        BenchmarkError: if its class has not been imported, or is of another version.
        ParameterError: if it has no such setting.
    """
    known = {class_name(one): one for one in _kinds(Benchmark)}
    kind = known.get(record["benchmark_class"])
    if kind is None:
        raise BenchmarkError(
            f"the run is of a {record['benchmark_class']}, which is unknown here. Import the "
            "module that defines it, then score again from Python."
        )
    if record["benchmark_version"] != kind.version:
        raise BenchmarkError(
            f"the run is of version {record['benchmark_version']} of {record['benchmark']}, but "
            f"version {kind.version} is installed, which counts otherwise. Install the clva-lens "
            "of the run (see packages in its run.json), or score its answers by today's rules with "
            "--answers answers.jsonl --benchmark NAME."
        )
    return kind(**restore_settings(kind, {**record["settings"], **settings}))


def class_name(kind: type) -> str:
    """Return the module and the name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _kinds(kind: type[Benchmark]) -> Iterator[type[Benchmark]]:
    for one in kind.__subclasses__():
        yield one
        yield from _kinds(one)


def read_record(folder: Path) -> dict[str, Any]:
    """Return what ``run.json`` says.

    Raises:
        BenchmarkError: if there is none, or it is damaged.
    """
    path = folder / RUN
    if not path.is_file():
        raise BenchmarkError(f"'{folder}' holds no run: there is no {RUN} in it. Check the path.")
    record = _read_object(path)
    absent = {"benchmark", "benchmark_class", "benchmark_version", "settings"} - set(record)
    if absent:
        raise BenchmarkError(
            f"{path} is no record of a run: it has no {', '.join(sorted(absent))}. Restore it, or "
            "run again into another folder."
        )
    return record


def each_sample(folder: Path, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a run's samples, which must be those that its record was written with.

    Raises:
        BenchmarkError: if they are not.
    """
    path = folder / SAMPLES
    if not path.is_file():
        raise BenchmarkError(f"there is no file '{path}'. Restore it, or run again.")
    found, told = sha256(path), record.get(SAMPLES_SHA256)
    if found != told:
        raise BenchmarkError(
            f"{path} was changed after the run began: its SHA-256 is {found}, and {RUN} says "
            f"{told}. Restore the file, or run again into another folder."
        )
    yield from each_line(path)


def require_as_scored(folder: Path) -> None:
    """Return silently if the answers of a run are those of its score; older scores do not tell.

    Raises:
        BenchmarkError: if they are others, or the score is damaged.
    """
    told = _read_object(folder / SCORE).get(ANSWERS_SHA256) if (folder / SCORE).is_file() else None
    if told is None:
        return
    found = sha256_of_lines(folder / ANSWERS)
    if found != told:
        raise BenchmarkError(
            f"{folder / ANSWERS} was changed after the run was finished: its SHA-256 is {found}, "
            f"and {SCORE} says {told}. Restore the file, or run again into another folder."
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BenchmarkError(
            f"{path} is damaged ({error}). Restore it, or run again into another folder."
        ) from None
    if not isinstance(found, dict):
        raise BenchmarkError(
            f"{path} is damaged (it is a {type(found).__name__}, not an object). Restore it, or "
            "run again into another folder."
        )
    return found


def plain(value: Any) -> Any:
    """Return a value as JSON has it: paths as text, tuples as lists, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
