"""A run folder that this process writes to: begun or continued, answer by answer, to its score."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from clva_lens.benchmarks.base import Answer, Sample
from clva_lens.benchmarks.lines import as_lines, end_of
from clva_lens.benchmarks.run_answers import due, whole_batches
from clva_lens.benchmarks.run_files import RunFiles, document, in_words, told
from clva_lens.benchmarks.run_folder import (
    ANSWERS,
    ANSWERS_SHA256,
    LOCK,
    LOG,
    ROWS,
    RUN,
    SAMPLES,
    SAMPLES_SHA256,
    SCORE,
    Report,
    each_sample,
    plain,
    read_record,
    require_as_scored,
)
from clva_lens.benchmarks.sample_rows import as_rows, other_pictures
from clva_lens.benchmarks.shards import SHARD, SHARDS, Shard, require_as_finished, shard_of
from clva_lens.ground.errors import BenchmarkError

# What a run may leave behind that was killed before its first file was complete.
_LEFTOVERS = {LOCK, SAMPLES, f"{SAMPLES}.part", f"{RUN}.part", SHARD, f"{SHARD}.part"}
# In run.json, but free to change when a run is continued: where things lie is no matter, because
# digests say what they are.
ORIGIN, WEIGHTS = "origin", "weights"
_FREE = (ORIGIN, "settings.data", "settings.images")
_FREE_OF_A_MODEL = ("model", "revision")


class OpenRun:
    """A run folder that this process holds; ``answers`` are those on disk.

    ``due`` are the stretches of samples that are to be asked, in their order, each from where a
    batch begins. A shard's answers are those from the sample ``first`` on.
    """

    def __init__(
        self,
        files: RunFiles,
        answers: list[Answer],
        due: list[range],
        first: int = 0,
        shard: Shard | None = None,
    ) -> None:
        """Take over the folder."""
        self.files = files
        self.answers = answers
        self.due = due
        self.first = first
        self.shard = shard

    def write(self, place: int, answers: Sequence[Answer]) -> None:
        """Write the answers from ``place`` on to the disk; once this returns they survive a crash.

        They are appended, or take the place of those that failed; a score of before is no more.

        Raises:
            BenchmarkError: if the disk is full or fails, or something else writes to the folder.
        """
        self.files.require_sizes()
        place -= self.first
        if place == len(self.answers):
            self._unfinish()
            self.files.append(ANSWERS, [asdict(answer) for answer in answers])
            self.answers += answers
        elif self.answers[place : place + len(answers)] != answers:
            self._unfinish()
            self.answers[place : place + len(answers)] = answers
            self.files.replace(ANSWERS, as_lines([asdict(answer) for answer in self.answers]))

    def finish(self, report: Report) -> None:
        """Write the score and its rows, unless they are there: then nothing is written.

        Raises:
            BenchmarkError: if the disk is full or fails, or something else wrote to the folder.
        """
        self.files.require_contents()
        score = document({**report.document, ANSWERS_SHA256: self.files.sha256(ANSWERS)})
        wanted = {ROWS: as_lines([plain(row) for row in report.rows]), SCORE: score}
        missing = {name: it for name, it in wanted.items() if not self.files.has(name, it)}
        for name, content in missing.items():
            self.files.replace(name, content)
        if missing or self.due:
            self.log("finished", report.record["seconds"])

    def finish_shard(self, seconds: float) -> None:
        """Write that a shard has all its answers, and which, unless it is written there.

        Raises:
            BenchmarkError: if the disk is full or fails, or something else wrote to the folder.
        """
        assert self.shard is not None, "a whole run is finished by its report"
        self.files.require_contents()
        self._tell_shard(self.shard, self.files.sha256(ANSWERS))
        if self.due:
            self.log("finished", seconds)

    def _unfinish(self) -> None:
        """Take back what a finished run says of its answers."""
        self.files.remove(SCORE)
        if self.shard is not None:
            self._tell_shard(self.shard, None)

    def _tell_shard(self, shard: Shard, answers: str | None) -> None:
        told = document(shard.told(answers))
        if not self.files.has(SHARD, told):
            self.files.replace(SHARD, told)

    def log(self, event: str, seconds: float | None = None) -> None:
        """Note what happened, with the seconds that this process spent in the model."""
        row = {"event": event, "time": now(), "answers": len(self.answers), "seconds": seconds}
        self.files.append(LOG, [row])


def check_folder(folder: Path, resume: bool) -> None:
    """Raise unless a run may be started in ``folder``, or continued there with ``resume``.

    Raises:
        BenchmarkError: if it is a file, holds something else, or holds a run and ``resume`` is
            False.
    """
    with in_words(folder):
        if folder.exists() and not folder.is_dir():
            raise BenchmarkError(f"'{folder}' is a file. Pass a folder for the run.")
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if RUN not in names and SHARDS in names:
        raise BenchmarkError(
            f"'{folder}' holds shards of a run. Join them with clva-lens merge {folder}, run the "
            "shards that are missing with --shard, or pass another folder."
        )
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
    batches: Sequence[range],
    resume: bool = False,
    keep_failed: bool = False,
    shard: Shard | None = None,
) -> Iterator[OpenRun]:
    """Yield the folder of a run, started, or continued with ``resume`` if there is one.

    ``batches`` are the stretches of samples that are asked at once, in their order. A continued run
    keeps its answers up to the last whole batch, and drops the rest: batches begin
    where they would have begun, so that the answers are those of a run that was never stopped. A
    batch with failed samples is due again as a whole, unless ``keep_failed``: its answers are then
    those of a run in which nothing failed. Of a ``shard`` the batches are its own, and ``samples``
    those of the whole run.

    A run of which nothing is due needs no write access.

    Raises:
        BenchmarkError: if the folder is refused (see ``check_folder``), another process is writing
            to it, an input that decides the answers has changed, its files are damaged or edited,
            or the disk is full or fails.
    """
    check_folder(folder, resume)
    with locked(folder) as unwritable:
        check_folder(folder, resume)  # again: another process may have been quicker
        rows = as_rows(samples)
        content = as_lines(rows)
        wanted = {**plain(record), SAMPLES_SHA256: hashlib.sha256(content).hexdigest()}
        files, kept = RunFiles(folder), []
        first, stop = (batches[0].start, batches[-1].stop) if batches else (0, 0)
        own = [range(one.start - first, one.stop - first) for one in batches]
        begun = (folder / RUN).is_file()
        if begun:
            _require_same(folder, wanted, rows)
            _require_shard(folder, shard)
            kept = whole_batches(folder / ANSWERS, samples[first:stop], own)
        found = due(kept, own, keep_failed)
        stretches = [range(one.start + first, one.stop + first) for one in found]
        if unwritable is not None and stretches:
            raise unwritable
        if begun:
            _hold(files, kept, stop - first)
        else:
            files.replace(SAMPLES, content)
            if shard is not None:
                files.replace(SHARD, document(shard.told(None)))
            files.replace(RUN, document(wanted))
        run = OpenRun(files, kept, stretches, first, shard)
        if stretches:
            files.take(LOG, end_of(folder / LOG) if (folder / LOG).is_file() else 0)
            run.log("continued" if begun else "started")
        yield run


@contextmanager
def locked(folder: Path) -> Iterator[BenchmarkError | None]:
    """Hold the lock of a folder, which is made; yield why it cannot be had if it is read-only."""
    lock = FileLock(folder / LOCK)
    unwritable = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise BenchmarkError(
            f"another process is writing to '{folder}'. Wait for it, or pass another folder."
        ) from None
    except OSError as error:
        unwritable = told(folder, error)
    try:
        yield unwritable
    finally:
        lock.release()


def _hold(files: RunFiles, kept: Sequence[Answer], count: int) -> None:
    """Hold the files of a run that is continued; its answers are cut after those that are kept."""
    if len(kept) == count:
        require_as_scored(files.folder)
        require_as_finished(files.folder)
    files.take(ANSWERS, end_of(files.folder / ANSWERS, len(kept)) if kept else 0)
    for name in (RUN, SAMPLES):
        files.take(name)


def _require_shard(folder: Path, shard: Shard | None) -> None:
    """Raise unless a folder is that of a shard, or of a whole run (None)."""
    found = shard_of(folder)
    if (found and found[0]) != shard:
        there, here = (
            "a whole run" if one is None else f"shard {one}" for one in (found and found[0], shard)
        )
        raise BenchmarkError(
            f"'{folder}' holds {there}, and {here} is to be written there. Cut a run in one way "
            "only, or pass another folder."
        )


def differences(then: Mapping[str, Any], today: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what two records of runs say otherwise of what decides the answers, by dotted key."""
    pathless = bool(today.get(WEIGHTS))
    old, new, missing = decisive(then, pathless), decisive(today, pathless), "nothing"
    return {
        key: (old.get(key, missing), new.get(key, missing))
        for key in dict.fromkeys([*old, *new])
        if old.get(key, missing) != new.get(key, missing)
    }


def decisive(record: Mapping[str, Any], pathless: bool | None = None) -> dict[str, Any]:
    """Return what decides the answers of a run, by dotted key.

    Without a digest of the weights, which are elsewhere then, their path says what they are; None
    asks the record itself.
    """
    without = bool(record.get(WEIGHTS)) if pathless is None else pathless
    free = _FREE + (_FREE_OF_A_MODEL if without else ())
    return {
        key: value
        for key, value in _flat(record).items()
        if not any(key == one or key.startswith(f"{one}.") for one in free)
    }


def _require_same(folder: Path, new: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    old = read_record(folder)
    stored = list(each_sample(folder, old))
    found = differences(old, new).items()
    changed = [f"{key}: {then!r} then, {today!r} now" for key, (then, today) in found]
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


def now() -> str:
    """Return the time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
