"""What a pool of workers is asked: whole batches, given out to any and written in their order."""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from clva_lens.benchmarks.base import Answer, Benchmark, Sample, judge
from clva_lens.benchmarks.readouts import TEXT
from clva_lens.benchmarks.run_folder import Report
from clva_lens.benchmarks.run_writing import decisive
from clva_lens.ground.errors import BenchmarkError, ClvaLensError
from clva_lens.ground.progress import progress_bar
from clva_lens.lens.answering import Failures, others_among, warn_of
from clva_lens.models.answer_tokens import AnswerTokens

AHEAD = 2
"""Calls that a worker has at once, so that it does not wait for the driver."""
CALL_SECONDS = 1.0
"""Batches are given to a worker together up to about so long: more is lost with a process."""
PICTURES = "pictures"

Jobs = list[tuple[int, range]]
"""Batches, each with the place of the asking that it is of."""


class Told(NamedTuple):
    """What a worker says of itself before it asks."""

    record: dict[str, Any]
    stretches: list[range]
    margin: AnswerTokens | None


class Asked(NamedTuple):
    """The answers to one batch, and the digest of what decided them."""

    who: str
    answers: list[Answer]
    likeliest: list[int | None]
    seconds: float


class Hands(Protocol):
    """What a schedule asks of workers, known by their numbers."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def ask(self, number: int, work: Any, jobs: Jobs) -> Any:
        """Give jobs to a worker; return what ``ready`` and ``get`` take."""
        ...

    def ready(self, pending: Sequence[Any]) -> Any:
        """Return one that is done; waiting can be interrupted."""
        ...

    def get(self, one: Any) -> list[Asked]:
        """Return what a worker answered, jobs from the first on, or raise what the first raised."""
        ...

    def words(self, ids: Sequence[int]) -> list[str]:
        """Return tokens as they are written."""
        ...


def digest_of(record: dict[str, Any]) -> str:
    """Return the SHA-256 of what decides answers, by which workers are told apart."""
    return hashlib.sha256(json.dumps(decisive(record), default=str).encode()).hexdigest()


@dataclass
class Schedule:
    """Which batches are asked where: those of one place, each way to ask, by one worker."""

    pool: Hands
    work: Any
    groups: dict[int, Jobs] = field(default_factory=dict)
    found: dict[tuple[int, int], Asked] = field(default_factory=dict)
    waiting: deque[Jobs] | None = None
    pending: dict[Any, tuple[int, Jobs]] = field(default_factory=dict)
    at_once: int = 1
    ended: ClvaLensError | None = None

    def add(self, place: int, part: range) -> None:
        """Note a batch that is due in the asking of this place."""
        self.groups.setdefault(part.start, []).append((place, part))

    def answer(self, place: int, part: range) -> Asked:
        """Return the answers to a batch as soon as they are there, and keep the workers busy.

        Raises:
            ClvaLensError: what a worker raised, once what the others still ask is of no more use.
        """
        if self.waiting is None:
            self.waiting = deque(self.groups[start] for start in sorted(self.groups))
            for _ in range(AHEAD):
                for worker in range(self.pool.count):
                    self._give(worker, self._next())
        while (place, part.start) not in self.found:
            if self.ended is not None and not self.pending:
                raise self.ended
            done = self.pool.ready(list(self.pending))
            self._take(done, *self.pending.pop(done))
        return self.found.pop((place, part.start))

    def _take(self, done: Any, worker: int, jobs: Jobs) -> None:
        """Keep what a worker answered, and give it the rest, if it came to an error, or more."""
        try:
            answered = self.pool.get(done)
        except ClvaLensError as error:
            self.ended, self.waiting = self.ended or error, deque()
            return
        asked, rest = jobs[: len(answered)], jobs[len(answered) :]
        for (place, part), one in zip(asked, answered, strict=True):
            self.found[place, part.start] = one
        batches = len({part.start for _, part in asked})
        seconds = sum(one.seconds for one in answered) / batches
        self.at_once = int(CALL_SECONDS / max(seconds, 1e-3))
        self._give(worker, rest or self._next())

    def _next(self) -> Jobs:
        """Return what is asked next: less together when little is left, so that all end at once."""
        assert self.waiting is not None
        share = len(self.waiting) // (AHEAD * self.pool.count)
        count = min(len(self.waiting), max(1, min(self.at_once, share)))
        return [job for _ in range(count) for job in self.waiting.popleft()]

    def _give(self, worker: int, jobs: Jobs) -> None:
        if jobs:
            self.pending[self.pool.ask(worker, self.work, jobs)] = (worker, jobs)


class PoolAsker:
    """The questions of a run to the workers of a pool; see ``answering.Asker``."""

    def __init__(
        self,
        pool: Hands,
        schedule: Schedule,
        place: int,
        benchmark: Benchmark,
        samples: Sequence[Sample],
        told: Told,
        max_failed: float,
        progress: bool,
    ) -> None:
        """Take over what the workers said."""
        self.record = {key: value for key, value in told.record.items() if key != PICTURES}
        self._pool, self._schedule, self._place, self._told = pool, schedule, place, told
        self._who = digest_of(told.record)
        self._benchmark, self._samples = benchmark, samples
        self._failures = Failures(len(samples), max_failed)
        self._progress = progress and place == 0
        self._seconds = 0.0
        self._likeliest: list[int | None] = []

    def stretches(self) -> list[range]:
        """Return which samples are asked at once."""
        return self._told.stretches

    def begin(self, due: Sequence[range]) -> None:
        """Have what is due given out."""
        for part in self._parts(due):
            self._schedule.add(self._place, part)

    def batches(self, due: Sequence[range]) -> Iterator[tuple[int, list[Answer]]]:
        """Yield the answers batch by batch, in their order, with each one's place.

        Raises:
            BenchmarkError: if too many samples failed, or a worker is another one than before.
        """
        count = len(self._samples)
        done = count - sum(map(len, due))
        with progress_bar("answers", count, done=done, wanted=self._progress) as advance:
            for part in self._parts(due):
                asked = self._schedule.answer(self._place, part)
                self._require_same(asked.who)
                self._seconds += asked.seconds
                self._likeliest += asked.likeliest
                yield part.start, asked.answers
                advance(len(part))
                self._failures.add([answer.error for answer in asked.answers])

    def report(self, answers: Sequence[Answer]) -> Report:
        """Return the report of all answers; ``seconds`` are those of all workers."""
        tokens = self._told.margin
        if tokens is not None and self._benchmark.settings["readout"] != TEXT:
            others = others_among(self._likeliest, tokens)
            shown = self._pool.words([one for one, _ in others.most_common(3)])
            warn_of(others.total(), len(self._likeliest), shown)
        score = judge(self._benchmark, self._samples, answers)
        return Report(score.metrics, score.rows, {**self.record, "seconds": self._seconds})

    def _parts(self, due: Sequence[range]) -> list[range]:
        starts = [one.start for one in due]
        stops = [one.stop for one in due]
        return [
            part
            for part in self._told.stretches
            if any(a <= part.start < b for a, b in zip(starts, stops, strict=True))
        ]

    def _require_same(self, who: str) -> None:
        if who != self._who:
            raise BenchmarkError(
                "a worker that was started again has other packages, weights, pictures or another "
                "device than before, so the answers would be of two kinds. Every batch before is "
                "kept: make the machines alike, then continue with resume=True (--resume)."
            )
