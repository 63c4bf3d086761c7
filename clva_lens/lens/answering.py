"""The questions of a run to a model: batch by batch, with what ends a run said in words."""

import warnings
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

from clva_lens.benchmarks.base import Answer, Benchmark, Sample, judge
from clva_lens.benchmarks.readouts import TEXT
from clva_lens.benchmarks.run_folder import Report
from clva_lens.ground.batching import batches
from clva_lens.ground.errors import BenchmarkError
from clva_lens.lens.asking import Asking
from clva_lens.lens.faults import machine_fault
from clva_lens.lens.generate import generate_batches
from clva_lens.lens.load import LensModel
from clva_lens.lens.sharing import Prefixes
from clva_lens.models.answer_tokens import AnswerTokens

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


class Asker(Protocol):
    """What a run is answered by: this process (``Answering``), or several."""

    record: dict[str, Any]

    def stretches(self) -> list[range]:
        """Return which samples are asked at once, in their order."""
        ...

    def begin(self, due: Sequence[range]) -> None:
        """Be told which samples are due, in whole batches, before the first is asked for."""
        ...

    def batches(self, due: Sequence[range]) -> Iterator[tuple[int, list[Answer]]]:
        """Yield the answers to these batch by batch, in their order, with each one's place."""
        ...

    def report(self, answers: Sequence[Answer]) -> Report:
        """Return the report of all answers."""
        ...


@dataclass
class Failures:
    """How many of ``count`` samples failed, which may be a share of ``most``."""

    count: int
    most: float
    seen: list[str] = field(default_factory=list)

    def add(self, errors: Sequence[str | None]) -> None:
        """Count these.

        Raises:
            BenchmarkError: if more of all samples failed than may, whatever their order.
        """
        self.seen += [error for error in errors if error is not None]
        failed = len(self.seen)
        if failed >= FEW and failed > self.most * self.count:
            raise BenchmarkError(
                f"{failed} of {self.count} samples failed, more than max_failed={self.most} of "
                f"them, so the run was ended. The last failed with: {self.seen[-1]} Mend what "
                "is wrong and run again (a run in a folder has kept its answers, and goes on with "
                "resume=True, --resume), or allow more with max_failed=1 (--max-failed 1)."
            )


@dataclass(kw_only=True)
class Answering:
    """The questions of a run to a model, about ``pictures``, one for each sample.

    ``record`` is what decides the answers, ``keys`` what the pictures are known by, ``count`` how
    many samples ``max_failed`` is a share of, if not of all; ``seconds`` is the time spent in the
    model so far.
    """

    model: LensModel
    benchmark: Benchmark
    samples: Sequence[Sample]
    pictures: Sequence[Any]
    asking: Asking
    record: dict[str, Any]
    prefixes: Prefixes
    keys: Sequence[Hashable]
    progress: bool = False
    max_failed: float = 1.0
    count: int | None = None
    seconds: float = 0.0
    likeliest: list[int | None] = field(default_factory=list)

    def begin(self, due: Sequence[range]) -> None:
        """Nothing is done ahead."""

    def stretches(self) -> list[range]:
        """Return which samples are asked at once."""
        keys = None if self.asking.share is None else self.keys
        return batches(len(self.samples), self.asking.batch_size, keys)

    def batches(self, due: Sequence[range]) -> Iterator[tuple[int, list[Answer]]]:
        """Yield the answers to stretches of the samples batch by batch, with each one's place.

        Raises:
            BenchmarkError: if the machine is at fault, or too many samples failed.
        """
        failures = Failures(self.count or len(self.samples), self.max_failed)
        for stretch in due:
            for place, answers in self._stretch(stretch):
                yield place, answers
                failures.add([answer.error for answer in answers])

    def _stretch(self, due: range) -> Iterator[tuple[int, list[Answer]]]:
        chats = self.model.family.chats
        part = slice(due.start, due.stop)
        asked = [
            (picture, s.question, s.system if chats else None)
            for s, picture in zip(self.samples[part], self.pictures[part], strict=True)
        ]
        done = due.start
        options = {
            "progress": self.progress,
            "first": done,
            "record_errors": True,
            "prefixes": self.prefixes,
            "keys": self.keys[part],
        }
        try:
            with closing(generate_batches(self.model, asked, self.asking, **options)) as made:
                for batch in made:
                    self.seconds += batch.seconds
                    self.likeliest += batch.likeliest
                    answered = zip(batch.texts, batch.margins, batch.errors, strict=True)
                    ids = [sample.id for sample in self.samples[done : done + len(batch.texts)]]
                    yield done, [Answer(i, *one) for i, one in zip(ids, answered, strict=True)]
                    done += len(ids)
        except Exception as error:
            said = _FAULTS.get(machine_fault(error) or "")
            if said is None:
                raise
            size = self.asking.batch_size
            raise BenchmarkError(said.format(place=done + 1, size=size, error=error)) from error

    def report(self, answers: Sequence[Answer]) -> Report:
        """Return the report of all answers; warn of first tokens that its readout does not read."""
        tokens = self.asking.margin
        if tokens is not None and self.benchmark.settings["readout"] != TEXT:
            warn_of_others(self.likeliest, tokens, self.model.words)
        score = judge(self.benchmark, self.samples, answers)
        return Report(score.metrics, score.rows, {**self.record, "seconds": self.seconds})


def others_among(likeliest: Sequence[int | None], tokens: AnswerTokens) -> Counter[int]:
    """Return the likeliest first tokens that are neither a yes nor a no of the readout's."""
    known = {*tokens.yes, *tokens.no}
    return Counter(one for one in likeliest if one is not None and one not in known)


def warn_of_others(likeliest: Sequence[int | None], tokens: AnswerTokens, words: Any) -> None:
    """Warn if the likeliest first token of an answer is neither a yes nor a no of the readout's."""
    others = others_among(likeliest, tokens)
    shown = [words.decode([one]) for one, _ in others.most_common(3)]
    warn_of(others.total(), len(likeliest), shown)


def warn_of(others: int, answers: int, words: Sequence[str]) -> None:
    """Warn of first tokens that a readout does not read, if there are any."""
    if others:
        warnings.warn(
            f"the likeliest first token of {others} of {answers} answers is neither a yes nor a no "
            f"that the readout compares, but {', '.join(map(repr, words))}. Its predictions are "
            "not what the model says there: look at the answers, or score with readout='text'.",
            stacklevel=4,
        )
