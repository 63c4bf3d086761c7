"""What a table needs of a model: benchmark runs and measurements, each under a name of its own.

A run is what ``evaluate`` writes, in a folder that is named by all that decides its answers: tables
that need the same answers share it, and another limit or method makes another one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clva_lens.benchmarks.base import Benchmark
from clva_lens.benchmarks.run_folder import SCORE, class_name, plain
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.lens.asking import Asking
from clva_lens.lens.decoding import Beam, Decoding, Greedy
from clva_lens.lens.load import LensModel
from clva_lens.lens.provenance import describe
from clva_lens.methods.base import Method

_PLACES = ("data", "images")


@dataclass(frozen=True, eq=False)
class Run:
    """One benchmark under one method, for one model."""

    subject: Subject
    benchmark: Benchmark
    method: Method | None = None
    decoding: Decoding | None = None
    limit: int | None = None

    @property
    def asking(self) -> Asking:
        """How the questions are asked."""
        return Asking(
            method=self.method,
            decoding=self.decoding,
            batch_size=self.subject.batch_size,
            limit=self.limit,
            seed=self.subject.seed,
            share="picture",
        )

    @property
    def set_key(self) -> str:
        """The benchmark with its settings, whatever its data lie in."""
        settings = {k: v for k, v in self.benchmark.settings.items() if k not in _PLACES}
        return _as_text([class_name(type(self.benchmark)), self.benchmark.version, settings])

    @property
    def key(self) -> str:
        """A name for all that decides the answers, but for the model: that of equal records."""
        usual = Greedy(max_new_tokens=self.benchmark.max_new_tokens)
        decoding = None if self.decoding == usual else self.decoding
        subject = self.subject
        told = [
            self.set_key,
            describe(self.method),
            [type(decoding).__name__, decoding and asdict(decoding)],  # pyright: ignore
            [self.limit, subject.seed, subject.batch_size],
        ]
        return hashlib.sha256(_as_text(told).encode()).hexdigest()[:12]

    def folder(self, root: Path) -> Path:
        """Return where it lies below the folder of a reproduction."""
        how = "greedy" if self.decoding is None else type(self.decoding).__name__.lower()
        method = "plain" if self.method is None else self.method.name
        place = root / "runs" / self.subject.slug / self.benchmark.name.replace("/", "-")
        return place / f"{method}-{how}-{self.key}"

    def finished(self, root: Path) -> bool:
        """Return whether it has a score."""
        return (self.folder(root) / SCORE).is_file()

    @property
    def most_passes(self) -> float:
        """How many forward passes of the language model an answer may take: tokens × forwards."""
        beams = self.decoding.num_beams if isinstance(self.decoding, Beam) else 1
        tokens = self.benchmark.max_new_tokens
        if self.decoding is not None:
            tokens = self.decoding.max_new_tokens
        return tokens * beams * (1 if self.method is None else self.method.forwards)


def _as_text(value: Any) -> str:
    """Return a value as JSON, the same for equal ones: 6 and 6.0 are one number, as in records."""
    return json.dumps(_numbered(plain(value)), sort_keys=True)


def _numbered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbered(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbered(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True, eq=False)
class Measure:
    """What is no benchmark run: attention that is looked at, time and memory.

    ``make(model, subject, **settings)`` returns JSON. ``passes`` is how many forward passes it
    takes.
    """

    subject: Subject
    name: str
    make: Callable[..., dict[str, Any]]
    passes: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: str = "1"

    def call(self, model: LensModel) -> dict[str, Any]:
        """Measure."""
        return plain(self.make(model, self.subject, **self.settings))

    def path(self, root: Path) -> Path:
        """Return where it is kept below the folder of a reproduction."""
        subject = self.subject
        size = [subject.limit, subject.limit_of("looks")]
        told = [self.version, plain(dict(self.settings)), size, subject.seed]
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
        return root / "measured" / subject.slug / f"{self.name}-{key}.json"

    def finished(self, root: Path) -> bool:
        """Return whether it was measured."""
        return self.path(root).is_file()


Need = Run | Measure
