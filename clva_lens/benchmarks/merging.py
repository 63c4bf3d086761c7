"""Shards of a run made one: the folder that an uncut run would have written, to the byte."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clva_lens.benchmarks.base import read_answers
from clva_lens.benchmarks.lines import as_lines, each_line, end_of
from clva_lens.benchmarks.run_files import RunFiles, document, in_words
from clva_lens.benchmarks.run_folder import (
    ANSWERS,
    ANSWERS_SHA256,
    LOG,
    ROWS,
    RUN,
    SAMPLES,
    SCORE,
    Report,
    benchmark_of,
    each_sample,
    plain,
    read_record,
    report_of,
)
from clva_lens.benchmarks.run_writing import differences, locked, now
from clva_lens.benchmarks.sample_rows import as_samples
from clva_lens.benchmarks.shards import SHARDS, Shard, require_as_finished, shard_of
from clva_lens.ground.errors import BenchmarkError


class _Part(NamedTuple):
    """A shard as it lies in its folder."""

    folder: Path
    shard: Shard
    finished: bool


def merge(folder: str | Path) -> Report:
    """Write the run that the shards in a folder are the parts of, and return its report.

    Its files are those of a run that was not cut, byte for byte; ``log.jsonl`` says that it was
    merged. A merge that was stopped, or came before shards were asked again, is done again.

    Raises:
        BenchmarkError: if a shard is missing, there twice, unfinished or of another run (what
            differs is named), or the folder cannot be written.
    """
    folder = Path(folder)
    parts = _parts(folder)
    record = _one_record(folder, [part.folder for part in parts])
    samples = as_samples(each_sample(parts[0].folder, record))
    answers = [one for part in parts for one in _answers(part)]
    if [one.id for one in answers] != [sample.id for sample in samples]:
        raise BenchmarkError(
            f"the shards in '{folder}' have {len(answers)} answers, and they are not those to the "
            f"{len(samples)} samples in their order. Remove the shards that were edited, and run "
            "them again."
        )
    report = report_of(benchmark_of(record, {}), samples, answers, record)
    _write(folder, parts, report)
    return report


def _parts(folder: Path) -> list[_Part]:
    """Return the shards in their order, each there once and finished."""
    inside = folder / SHARDS
    with in_words(folder):
        found = sorted(inside.iterdir()) if inside.is_dir() else []
    told = [(path, shard_of(path)) for path in found]
    parts = sorted(
        (_Part(path, one[0], one[1] is not None) for path, one in told if one is not None),
        key=lambda part: (part.shard.number, str(part.folder)),
    )
    if not parts:
        raise BenchmarkError(f"'{folder}' holds no shards. Write them with --shard 1/8, 2/8, ….")
    _require_each_once(folder, parts)
    unfinished = [str(part.shard) for part in parts if not part.finished]
    if unfinished:
        raise BenchmarkError(
            f"{len(unfinished)} of the {len(parts)} shards of '{folder}' are not finished: "
            f"{', '.join(unfinished)}. Continue them with --shard {unfinished[0]} --resume."
        )
    return parts


def _require_each_once(folder: Path, parts: Sequence[_Part]) -> None:
    ways = sorted({part.shard.of for part in parts})
    if len(ways) > 1:
        cut = "; ".join(
            f"{', '.join(str(p.shard.number) for p in parts if p.shard.of == of)} of {of}"
            for of in ways
        )
        raise BenchmarkError(
            f"the run in '{folder}' was cut in {len(ways)} ways: there are shards {cut}. Keep "
            "those of one way."
        )
    counts = Counter(part.shard.number for part in parts)
    for number, count in counts.items():
        if count > 1:
            where = ", ".join(f"'{p.folder}'" for p in parts if p.shard.number == number)
            raise BenchmarkError(
                f"shard {number}/{ways[0]} is there {count} times: {where}. Keep one of them."
            )
    missing = [str(n) for n in range(1, ways[0] + 1) if n not in counts]
    if missing:
        raise BenchmarkError(
            f"{len(missing)} of the {ways[0]} shards of '{folder}' are missing: "
            f"{', '.join(missing)}. Run them with --shard {missing[0]}/{ways[0]}, or copy them "
            f"into '{folder / SHARDS}'."
        )


def _one_record(folder: Path, shards: Sequence[Path]) -> dict[str, Any]:
    """Return what all shards, and a run that was merged before, say of themselves."""
    first = read_record(shards[0])
    for other in [*shards[1:], *([folder] if (folder / RUN).is_file() else [])]:
        found = differences(first, read_record(other))
        if found:
            said = "\n  ".join(
                f"{key}: {one!r} in '{shards[0]}', {another!r} in '{other}'"
                for key, (one, another) in found.items()
            )
            raise BenchmarkError(
                f"'{shards[0]}' and '{other}' are not of one run:\n  {said}\nRun one of them again "
                "as the other."
            )
    return first


def _answers(part: _Part) -> list[Any]:
    require_as_finished(part.folder)
    path = part.folder / ANSWERS
    return read_answers(path) if path.is_file() else []


def _write(folder: Path, parts: Sequence[_Part], report: Report) -> None:
    """Write what is not there yet; a score that is there before its answers is removed first."""
    with locked(folder) as unwritable:
        files = RunFiles(folder)
        answers = b"".join(_lines(part.folder / ANSWERS) for part in parts)
        whole = {SAMPLES: _lines(parts[0].folder / SAMPLES)}
        if not (folder / RUN).is_file():  # that of a run merged before may name other folders
            whole[RUN] = _read(parts[0].folder / RUN)
        whole[ANSWERS] = answers
        whole[ROWS] = as_lines([plain(row) for row in report.rows])
        missing = {name: it for name, it in whole.items() if not files.has(name, it)}
        files.take(ANSWERS)
        if missing:
            if unwritable is not None:
                raise unwritable
            files.remove(SCORE)
        for name, content in missing.items():
            files.replace(name, content)
        score = document({**report.document, ANSWERS_SHA256: files.sha256(ANSWERS)})
        if not files.has(SCORE, score):
            files.replace(SCORE, score)
            seconds = sum(_seconds(part.folder) for part in parts)
            row = {
                "event": "merged",
                "time": now(),
                "answers": len(report.rows),
                "seconds": seconds,
            }
            files.append(LOG, [row])


def _lines(path: Path) -> bytes:
    """Return the whole lines of a file; what a killed process left of one is not."""
    content = _read(path)
    return content[: end_of(path)] if content else b""


def _read(path: Path) -> bytes:
    with in_words(path.parent):
        return path.read_bytes() if path.is_file() else b""


def _seconds(shard: Path) -> float:
    """Return the seconds in the model that a shard took, as far as its log has them."""
    rows = each_line(shard / LOG) if (shard / LOG).is_file() else ()
    return sum(row.get("seconds") or 0.0 for row in rows)
