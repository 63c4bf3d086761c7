"""The answers of a run that is continued: which are kept, and which samples are asked (again)."""

from collections.abc import Sequence
from pathlib import Path

from clva_lens.benchmarks.base import Answer, Sample, read_answers
from clva_lens.benchmarks.lines import broken_line


def whole_batches(path: Path, samples: Sequence[Sample], batches: Sequence[range]) -> list[Answer]:
    """Return the answers in a file up to the end of the last whole one of these batches.

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
    ends = [batch.stop for batch in batches if batch.stop <= len(answers)]
    return answers[: max(ends, default=0)]


def due(answers: Sequence[Answer], batches: Sequence[range], keep_failed: bool) -> list[range]:
    """Return the stretches of samples that are to be asked, in whole batches.

    These are the batches without answers and, unless ``keep_failed``, those in which one failed.
    """
    stretches: list[range] = []
    for start, stop in ((batch.start, batch.stop) for batch in batches):
        failed = any(answer.error is not None for answer in answers[start:stop])
        if start < len(answers) and (keep_failed or not failed):
            continue
        if stretches and stretches[-1].stop == start:
            stretches[-1] = range(stretches[-1].start, stop)
        else:
            stretches.append(range(start, stop))
    return stretches
