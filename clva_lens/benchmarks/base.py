"""What every benchmark shares: samples, answers, scores, and the registry of benchmarks."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from clva_lens.benchmarks.lines import FOREIGN, RESUME, broken_line, each_line
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.ground.parameters import Parameters
from clva_lens.ground.registry import Registry


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one image, and the label that its answer is judged by.

    ``image`` is a path, an array or a PIL image, and does not count for equality. ``group`` names
    the image: questions of one image are not independent, so intervals resample groups.
    ``category`` is the part of the benchmark that the sample counts for. ``system`` is the system
    message it is asked under, where the model has one: None leaves the model's own. With id,
    question, label, group and category a sample can be scored again; its image is for the model
    only.
    """

    id: str
    image: Any = field(compare=False)
    question: str
    label: str
    group: str = ""
    category: str = ""
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered to the sample ``id``.

    ``margin`` is logit(yes) − logit(no) at the first answer position, None if it was not recorded.
    ``error`` says why there is no answer: such a sample is counted as wrong and as failed, and is
    never dropped.
    """

    id: str
    text: str
    margin: float | None = None
    error: str | None = None


@dataclass(frozen=True, repr=False)
class Score:
    """Metrics of one run, and one row a sample to compute them again from.

    A metric that is undefined for the run (a zero denominator) is nan, never 0.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]

    def __repr__(self) -> str:
        """Return one line a metric, in the order they were computed."""
        width = max((len(name) for name in self.metrics), default=0)
        lines = [f"  {name:<{width}}  {_number(value)}" for name, value in self.metrics.items()]
        return "\n".join([f"Score of {len(self.rows)} samples", *lines])


def _number(value: float) -> str:
    if math.isnan(value):
        return "undefined (nan)"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4f}"


@dataclass(frozen=True)
class Benchmark(Parameters, ABC):
    """A set of samples and the rule that scores answers to them; its fields are its settings.

    Whatever the score depends on besides the answers is a field (parser, prompt, lemmatiser, where
    the data lie), so that ``settings`` names the variant in every result, and
    ``dataclasses.replace`` makes another. Scoring needs samples and answers only, no data files.
    ``version`` is raised whenever what is counted changes, so that scores of different versions are
    not compared by accident.
    """

    version: ClassVar[str]

    @property
    @abstractmethod
    def max_new_tokens(self) -> int:
        """How long an answer may be unless the run says otherwise."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name under which it is registered: benchmark, source and split."""

    @property
    def settings(self) -> dict[str, Any]:
        """Every field by name, paths as text."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
        }

    @abstractmethod
    def samples(self, limit: int | None = None, seed: int = 0) -> list[Sample]:
        """Return all samples, or ``limit`` of them chosen with ``seed``."""

    def picture(self, sample: Sample) -> Any:
        """Return the picture that a model is shown for a sample: its image, read as any other."""
        return sample.image

    def questions(self) -> list[Sample]:
        """Return all samples for scoring: pictures that are files need not be there."""
        return self.samples()

    @abstractmethod
    def score(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> Score:
        """Return the score of ``answers``, matched to ``samples`` by id."""

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each data file that ``samples`` reads, by file name."""
        return {}

    def read_answers(self, path: Path) -> list[Answer]:
        """Return the answers in a file: of our own runs, unless a benchmark reads others' too.

        Raises:
            BenchmarkError: if the file is missing, or a line of it is no answer.
        """
        return read_answers(path, FOREIGN)

    def read_scored(self, path: Path) -> tuple[list[Sample], list[Answer]]:
        """Return the samples that a file of answers is scored by, and the answers.

        Raises:
            BenchmarkError: if the data or the file cannot be read, or do not fit.
        """
        return self.questions(), self.read_answers(path)


def _check_benchmark(name: str, benchmark: Any) -> None:
    """Raise ParameterError, naming what a benchmark lacks to be registered."""
    if not isinstance(benchmark, Benchmark):
        raise ParameterError(
            f"'{name}' would be {benchmark!r}, which is no Benchmark. Register one with its "
            "settings: BENCHMARKS.register(name, MyBenchmark(...))."
        )
    kind = type(benchmark)
    if not getattr(vars(kind).get("__dataclass_params__"), "frozen", False):
        raise ParameterError(
            f"{kind.__name__} is no frozen dataclass, so its settings would not stand in its "
            "results. Put @dataclass(frozen=True) above the class."
        )
    if not isinstance(getattr(kind, "version", None), str):
        raise ParameterError(
            f"{kind.__name__} has no version, which says what is counted. Write "
            'version: ClassVar[str] = "1" in it.'
        )
    if benchmark.name != name:
        raise ParameterError(
            f"{kind.__name__} calls itself '{benchmark.name}', but is to be registered as "
            f"'{name}', and its results could not be found again. Use one name."
        )


BENCHMARKS = Registry[Benchmark]("benchmark", _check_benchmark)


def require_known(name: str, value: str, known: Sequence[str]) -> None:
    """Return silently if a parameter has one of its values.

    Raises:
        ParameterError: naming the values it may have.
    """
    if value not in known:
        raise ParameterError(
            f"{name} must be one of {', '.join(known)}, but is '{value}'. Pass one of them."
        )


def match(samples: Sequence[Sample], answers: Sequence[Answer]) -> list[tuple[Sample, Answer]]:
    """Return each sample with its answer, in the order of the samples.

    Raises:
        BenchmarkError: if there are no samples, an id occurs twice, or the ids differ.
    """
    if not samples:
        raise BenchmarkError("there are 0 samples to score. Pass at least one sample.")
    by_id = {answer.id: answer for answer in answers}
    same = len(samples) == len(answers) == len(by_id)
    if not same or {sample.id for sample in samples} != by_id.keys():
        require_same_ids("samples", [s.id for s in samples], "answers", [a.id for a in answers])
    return [(sample, by_id[sample.id]) for sample in samples]


def read_answers(path: Path, remedy: str = RESUME) -> list[Answer]:
    """Return the answers of a run's ``answers.jsonl``; a last line that was cut short is left out.

    ``remedy`` is what is said to do about a broken line.

    Raises:
        BenchmarkError: if there is no such file, or a line is no answer.
    """
    answers = []
    once: dict[str, str] = {}  # most answers of a run are the same few words
    for number, row in enumerate(each_line(path, remedy), start=1):
        name, text, margin, error = map(row.get, _KINDS)
        told = (name, text, margin, error)
        if not all(map(isinstance, told, _KINDS.values())) or not row.keys() <= _KINDS.keys():
            odd = [key for key, kind in _KINDS.items() if not isinstance(row.get(key), kind)]
            odd = odd or sorted(row.keys() - _KINDS.keys())
            what = f"is no answer of a run (look at its {odd[0]})"
            raise broken_line(path, number, what, remedy)
        answers.append(Answer(name, once.setdefault(text, text), margin, error))
    return answers


_KINDS = {"id": str, "text": str, "margin": (float, int, type(None)), "error": (str, type(None))}
"""The keys of a line of answers, and what each may be."""


def judge(benchmark: Benchmark, samples: Sequence[Sample], answers: Sequence[Answer]) -> Score:
    """Return the benchmark's score, with the number of ``failed`` samples and each row's error.

    Raises:
        BenchmarkError: if samples and answers do not have the same ids.
    """
    score = benchmark.score(samples, answers)
    errors = {answer.id: answer.error for answer in answers if answer.error is not None}
    rows = [_with_error(row, errors.get(row.get("id", ""))) for row in score.rows]
    return replace(score, metrics={**score.metrics, "failed": float(len(errors))}, rows=rows)


def _with_error(row: dict[str, Any], error: str | None) -> dict[str, Any]:
    return row if row.get("error", "") == error else {**row, "error": error}


def require_same_ids(name_a: str, ids_a: Iterable[str], name_b: str, ids_b: Iterable[str]) -> None:
    """Return silently if both hold the same ids, each once.

    Raises:
        BenchmarkError: naming the ids that occur twice or on one side only.
    """
    counts = {name_a: Counter(ids_a), name_b: Counter(ids_b)}
    for name, count in counts.items():
        repeated = [item for item, times in count.items() if times > 1]
        if repeated:
            raise BenchmarkError(
                f"{_some(repeated)} occurs more than once among the {name}. Give each an id of its "
                "own."
            )
    for name, other in ((name_a, name_b), (name_b, name_a)):
        alone = [item for item in counts[name] if item not in counts[other]]
        if alone:
            raise BenchmarkError(
                f"{len(alone)} of the {len(counts[name])} ids of the {name} are missing from the "
                f"{other}: {_some(alone)}. Pass two sides of the same samples."
            )


def choose(samples: Sequence[Sample], limit: int | None, seed: int) -> list[Sample]:
    """Return ``limit`` of the samples, from as few groups as possible, in their own order.

    Groups are drawn at random with ``seed`` and taken whole (the last one may be cut), because
    intervals are over groups and an image with all its questions costs one encoding.

    Raises:
        BenchmarkError: if ``limit`` is below 1 or above the number of samples.
    """
    if limit is None:
        return list(samples)
    if not 1 <= limit <= len(samples):
        raise BenchmarkError(
            f"limit={limit}, but this benchmark has {len(samples)} samples. Pass a limit from 1 to "
            f"{len(samples)}, or None for all."
        )
    members: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        members.setdefault(sample.group or f"id {sample.id}", []).append(index)
    names = list(members)
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = [index for place in order for index in members[names[place]]][:limit]
    return [samples[index] for index in sorted(chosen)]


def _some(ids: Sequence[str]) -> str:
    shown = ", ".join(f"'{item}'" for item in ids[:5])
    return shown if len(ids) <= 5 else f"{shown} and {len(ids) - 5} more"
