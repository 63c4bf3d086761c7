"""The questions of a run to a model: batch by batch, with what ends a run said in words."""

import warnings
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from clva_lens.benchmarks.base import Answer, Benchmark, Sample, judge
from clva_lens.benchmarks.readouts import TEXT
from clva_lens.benchmarks.run_folder import Report
from clva_lens.ground.batching import batches
from clva_lens.ground.errors import BenchmarkError
from clva_lens.lens.asking import Asking
from clva_lens.lens.faults import machine_fault
from clva_lens.lens.generate import generate_batches
from clva_lens.lens.load import LensModel
from clva_lens.lens.margins import AnswerTokens
from clva_lens.lens.sharing import Prefixes

FEW = 10
"""Fewer than that may fail whatever their share."""

# What ended a run, and what helps; the first sample of the batch and its size are filled in.
_FAULTS = {
    "memory": "memory ran out at sample {place} with batch_size={size}. Run again with a smaller "
    "batch_size, into another folder: batches decide the last digits of the margins.",
    "device": "the device was lost at sample {place} ({error}). Every batch before is kept: "
    "continue in a new process with resume=True (--resume).",
    "file": "a file could not be read at sample {place} ({error}). Every batch before is kept: see "
    "that the folder of the pictures is there, then continue with resume=True (--resume).",
}


@dataclass
class Answering:
    """The questions of a run to a model, about ``pictures``, one for each sample.

    ``keys`` is what these are known by, ``seconds`` the time spent in the model so far.
    """

    model: LensModel
    benchmark: Benchmark
    samples: Sequence[Sample]
    pictures: Sequence[Any]
    asking: Asking
    progress: bool
    max_failed: float
    prefixes: Prefixes
    keys: Sequence[Hashable]
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    likeliest: list[int | None] = field(default_factory=list)

    def stretches(self) -> list[range]:
        """Return which samples are asked at once."""
        keys = None if self.asking.share is None else self.keys
        return batches(len(self.samples), self.asking.batch_size, keys)

    def batches(self, due: range) -> Iterator[tuple[int, list[Answer]]]:
        """Yield the answers to a stretch of the samples batch by batch, with each one's place.

        The samples before are passed over and not left out: what is drawn for a sample depends on
        its place among all.

        Raises:
            BenchmarkError: if the machine is at fault, or too many samples failed.
        """
        chats = self.model.family.chats
        asked = [
            (picture, s.question, s.system if chats else None)
            for s, picture in zip(self.samples[: due.stop], self.pictures, strict=False)
        ]
        done = due.start
        options = {
            "progress": self.progress,
            "done": done,
            "record_errors": True,
            "prefixes": self.prefixes,
            "keys": self.keys[: due.stop],
        }
        with closing(generate_batches(self.model, asked, self.asking, **options)) as made:
            try:
                for batch in made:
                    self.seconds += batch.seconds
                    self.likeliest += batch.likeliest
                    answered = zip(batch.texts, batch.margins, batch.errors, strict=True)
                    ids = [sample.id for sample in self.samples[done : done + len(batch.texts)]]
                    yield done, [Answer(i, *one) for i, one in zip(ids, answered, strict=True)]
                    done += len(ids)
                    self._require_few_failures(batch.errors)
            except Exception as error:
                said = _FAULTS.get(machine_fault(error) or "")
                if said is None:
                    raise
                size = self.asking.batch_size
                raise BenchmarkError(said.format(place=done + 1, size=size, error=error)) from error

    def report(self, answers: Sequence[Answer], record: dict[str, Any]) -> Report:
        """Return the report of all answers; warn of first tokens that its readout does not read."""
        tokens = self.asking.margin
        if tokens is not None and self.benchmark.settings["readout"] != TEXT:
            warn_of_others(self.likeliest, tokens, self.model.words)
        score = judge(self.benchmark, self.samples, answers)
        return Report(score.metrics, score.rows, {**record, "seconds": self.seconds})

    def _require_few_failures(self, errors: Sequence[str | None]) -> None:
        """Raise if more of all samples failed than may, whatever their order, with these."""
        self.failures += [error for error in errors if error is not None]
        failed, count = len(self.failures), len(self.samples)
        if failed >= FEW and failed > self.max_failed * count:
            raise BenchmarkError(
                f"{failed} of {count} samples failed, more than max_failed={self.max_failed} of "
                f"them, so the run was ended. The last failed with: {self.failures[-1]} Mend what "
                "is wrong and run again (a run in a folder has kept its answers, and goes on with "
                "resume=True, --resume), or allow more with max_failed=1 (--max-failed 1)."
            )


def warn_of_others(likeliest: Sequence[int | None], tokens: AnswerTokens, words: Any) -> None:
    """Warn if the likeliest first token of an answer is neither a yes nor a no of the readout's."""
    known = {*tokens.yes, *tokens.no, None}
    others = Counter(one for one in likeliest if one not in known)
    if others:
        shown = ", ".join(repr(words.decode([one])) for one, _ in others.most_common(3))
        warnings.warn(
            f"the likeliest first token of {others.total()} of {len(likeliest)} answers is neither "
            f"a yes nor a no that the readout compares, but {shown}. Its predictions are not what "
            "the model says there: look at the answers, or score with readout='text'.",
            stacklevel=3,
        )
