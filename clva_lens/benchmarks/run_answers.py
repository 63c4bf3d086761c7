"""The answers of a run that is continued: which are kept, and which samples are asked (again)."""

from collections.abc import Sequence
from pathlib import Path

from clva_lens.benchmarks.base import Answer, Sample, read_answers
from clva_lens.benchmarks.lines import broken_line


def whole_batches(path: Path, samples: Sequence[Sample], batch_size: int) -> list[Answer]:
    """Return the answers in a file up to its last whole batch.

    Raises:
        BenchmarkError: if a line is no answer, or not that to the sample of its place.
    """
    if not path.is_file():
        return []
    answers = read_answers(path)
    for number, (answer, sample) in enumerate(zip(answers, samples, strict=False), start=1):
        if answer.id != sample.id:
            raise broken_line(path, number, f"answers '{answer.id}' where '{sample.id}' is due")
    if len(answers) > len(samples):
        raise broken_line(path, len(samples) + 1, "is one more than there are samples")
    keep = len(answers)
    if keep < len(samples):
        keep -= keep % batch_size
    return answers[:keep]


def due(answers: Sequence[Answer], count: int, batch_size: int, keep_failed: bool) -> list[range]:
    """Return the stretches of ``count`` samples that are to be asked, in whole batches.

    These are the batches without answers and, unless ``keep_failed``, those in which one failed.
    """
    stretches: list[range] = []
    for start in range(0, count, batch_size):
        stop = min(start + batch_size, count)
        failed = any(answer.error is not None for answer in answers[start:stop])
        if start < len(answers) and (keep_failed or not failed):
            continue
        if stretches and stretches[-1].stop == start:
            stretches[-1] = range(stretches[-1].start, stop)
        else:
            stretches.append(range(start, stop))
    return stretches
