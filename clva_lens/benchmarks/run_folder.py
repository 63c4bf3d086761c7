"""The folder of a benchmark run: what was asked, every answer as it comes, and the score.

======================  ==========================================================================
``run.json``            everything that decides the answers, written once at the start
``samples.jsonl``       the samples, each with the SHA-256 of its picture instead of it: with the
                        answers, enough to score again
``answers.jsonl``       one line a sample, in the order of the samples, on disk after every batch
``score.json``          the metrics; undefined ones are null
``rows.jsonl``          one line a sample: label, answer, what was made of it
``log.jsonl``           when the run was started, continued and finished, and its seconds
``lock``                held by the process that writes; it means nothing once that is gone
======================  ==========================================================================
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from clva_lens.benchmarks.base import Answer, Benchmark, Sample, Score, judge, read_answers
from clva_lens.benchmarks.lines import as_lines, read_lines
from clva_lens.benchmarks.run_answers import due, whole_batches
from clva_lens.benchmarks.sample_rows import as_rows, as_samples, other_pictures
from clva_lens.ground.errors import BenchmarkError
from clva_lens.ground.settings import restore_settings

RUN, SAMPLES, ANSWERS = "run.json", "samples.jsonl", "answers.jsonl"
SCORE, ROWS, LOG, LOCK = "score.json", "rows.jsonl", "log.jsonl", "lock"
# What a run may leave behind that was killed before its first file was complete.
_LEFTOVERS = {LOCK, SAMPLES, f"{SAMPLES}.part", f"{RUN}.part"}
# In run.json, but free to change when a run is continued: where things lie is no matter, because
# digests say what they are.
ORIGIN = "origin"
_FREE = (ORIGIN, "settings.data", "settings.images")


@dataclass(frozen=True, eq=False, repr=False)
class Report:
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

    def __repr__(self) -> str:
        """Return what was run and its metrics."""
        record = self.record
        method = record.get("method", {}).get("name")
        title = " · ".join(str(x) for x in (record["benchmark"], record.get("model"), method) if x)
        return f"{title}\n{self.score!r}"


class OpenRun:
    """A run folder that this process holds; ``answers`` are those on disk.

    ``due`` are the stretches of samples that are to be asked, in their order, each from where a
    batch begins.
    """

    def __init__(self, folder: Path, answers: list[Answer], due: list[range]) -> None:
        """Take over the folder."""
        self.folder = folder
        self.answers = answers
        self.due = due

    def write(self, place: int, answers: Sequence[Answer]) -> None:
        """Write the answers from ``place`` on to the disk; once this returns they survive a crash.

        They are appended, or take the place of those that failed.
        """
        if place == len(self.answers):
            _append(self.folder / ANSWERS, [asdict(answer) for answer in answers])
            self.answers += answers
        elif self.answers[place : place + len(answers)] != answers:
            self.answers[place : place + len(answers)] = answers
            _replace(self.folder / ANSWERS, as_lines([asdict(answer) for answer in self.answers]))

    def finish(self, report: Report) -> None:
        """Write the score and its rows."""
        _replace(self.folder / ROWS, as_lines([plain(row) for row in report.rows]))
        _replace(self.folder / SCORE, _document(report.document))
        self.log("finished", report.record["seconds"])

    def log(self, event: str, seconds: float | None = None) -> None:
        """Note what happened, with the seconds that this process spent in the model."""
        row = {"event": event, "time": now(), "answers": len(self.answers), "seconds": seconds}
        _append(self.folder / LOG, [row])


def check_folder(folder: Path, resume: bool) -> None:
    """Raise unless a run may be started in ``folder``, or continued there with ``resume``.

    Raises:
        BenchmarkError: if it is a file, holds something else, or holds a run and ``resume`` is
            False.
    """
    if folder.exists() and not folder.is_dir():
        raise BenchmarkError(f"'{folder}' is a file. Pass a folder for the run.")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if RUN not in names and names - _LEFTOVERS:
        raise BenchmarkError(
            f"'{folder}' holds '{min(names - _LEFTOVERS)}' and no {RUN}, so it is no run, and is "
            "left alone. Pass another folder."
        )
    if RUN in names and not resume:
        raise BenchmarkError(
            f"'{folder}' holds a run. Pass resume=True (--resume) to continue it, or another "
            "folder."
        )


@contextmanager
def open_run(
    folder: Path,
    record: Mapping[str, Any],
    samples: Sequence[Sample],
    batch_size: int,
    resume: bool = False,
    keep_failed: bool = False,
) -> Iterator[OpenRun]:
    """Yield the folder of a run, started, or continued with ``resume`` if there is one.

    A continued run keeps its answers up to the last whole batch, and drops the rest: batches begin
    where they would have begun, so that the answers are those of a run that was never stopped. A
    batch with failed samples is due again as a whole, unless ``keep_failed``: its answers are then
    those of a run in which nothing failed.

    Raises:
        BenchmarkError: if the folder is refused (see ``check_folder``), another process is writing
            to it, an input that decides the answers has changed, or its files are damaged.
    """
    check_folder(folder, resume)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise BenchmarkError(
            f"another process is writing to '{folder}'. Wait for it, or pass another folder."
        ) from None
    try:
        check_folder(folder, resume)  # again: another process may have been quicker
        rows = as_rows(samples)
        content = as_lines(rows)
        wanted = {**plain(record), "samples_sha256": hashlib.sha256(content).hexdigest()}
        if not (folder / RUN).is_file():
            _replace(folder / SAMPLES, content)
            _replace(folder / RUN, _document(wanted))
            run = OpenRun(folder, [], [range(len(samples))])
            run.log("started")
        else:
            _require_same(folder, wanted, rows)
            kept = whole_batches(folder / ANSWERS, samples, batch_size)
            run = OpenRun(folder, kept, due(kept, len(samples), batch_size, keep_failed))
            run.log("continued")
        yield run
    finally:
        lock.release()


def _require_same(folder: Path, new: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    old = _read_record(folder)
    stored = _read_samples(folder, old)
    then, today, missing = _flat(old), _flat(new), "nothing"
    changed = [
        f"{key}: {then.get(key, missing)!r} then, {today.get(key, missing)!r} now"
        for key in dict.fromkeys([*then, *today])
        if not any(key == free or key.startswith(f"{free}.") for free in _FREE)
        and then.get(key, missing) != today.get(key, missing)
    ]
    pictures = other_pictures(stored, rows)
    changed += [pictures] if pictures else []
    if changed:
        raise BenchmarkError(
            f"the run in '{folder}' cannot be continued, because its answers would be of two "
            f"kinds:\n  " + "\n  ".join(changed) + "\nRun it as then, or into another folder."
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


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
    record = _read_record(folder)
    samples = as_samples(_read_samples(folder, record))
    answers = read_answers(folder / ANSWERS) if (folder / ANSWERS).is_file() else []
    if len(answers) < len(samples):
        raise BenchmarkError(
            f"the run in '{folder}' has {len(answers)} of its {len(samples)} answers. Continue it "
            "with resume=True (--resume)."
        )
    return FinishedRun(record, samples, answers)


def score(folder: str | Path, **settings: Any) -> Report:
    """Return the report of a finished run, scored again from its answers, without a model.

    ``settings`` change the benchmark's, for example ``parser="strict"``. Nothing is written.

    Raises:
        BenchmarkError: if there is no finished run, or its benchmark is unknown here.
        ParameterError: if the benchmark has no such setting.
    """
    run = read_run(folder)
    benchmark = benchmark_of(run.record, settings)
    return _report(benchmark, run.samples, run.answers, run.record)


def score_answers(benchmark: Benchmark, path: Path) -> Report:
    """Return the report of a file of answers, of a run of ours or of others.

    Raises:
        BenchmarkError: if the benchmark cannot read the file, or it is not about its samples.
    """
    samples, answers = benchmark.read_scored(path)
    return _report(benchmark, samples, answers, {})


def _report(
    benchmark: Benchmark,
    samples: Sequence[Sample],
    answers: Sequence[Answer],
    record: Mapping[str, Any],
) -> Report:
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
        BenchmarkError: if its class has not been imported.
        ParameterError: if it has no such setting.
    """
    known = {class_name(one): one for one in _kinds(Benchmark)}
    kind = known.get(record["benchmark_class"])
    if kind is None:
        raise BenchmarkError(
            f"the run is of a {record['benchmark_class']}, which is unknown here. Import the "
            "module that defines it, then score again from Python."
        )
    return kind(**restore_settings(kind, {**record["settings"], **settings}))


def class_name(kind: type) -> str:
    """Return the module and the name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _kinds(kind: type[Benchmark]) -> Iterator[type[Benchmark]]:
    for one in kind.__subclasses__():
        yield one
        yield from _kinds(one)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RUN
    if not path.is_file():
        raise BenchmarkError(f"'{folder}' holds no run: there is no {RUN} in it. Check the path.")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise BenchmarkError(
            f"{path} is damaged ({error}). Restore it, or run again into another folder."
        ) from None


def _read_samples(folder: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a run's samples, which must be those that its record was written with."""
    path = folder / SAMPLES
    rows = read_lines(path).rows
    found, told = hashlib.sha256(path.read_bytes()).hexdigest(), record.get("samples_sha256")
    if found != told:
        raise BenchmarkError(
            f"{path} was changed after the run began: its SHA-256 is {found}, and {RUN} says "
            f"{told}. Restore the file, or run again into another folder."
        )
    return rows


# ── writing ──


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


def now() -> str:
    """Return the time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _document(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("ab") as file:
        file.write(as_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it is never half there."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
