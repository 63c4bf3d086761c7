"""A benchmark run: samples to prompts, prompts to answers, answers to a score with its record."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clva_lens.benchmarks.base import BENCHMARKS, Answer, Benchmark, Sample, judge
from clva_lens.benchmarks.readouts import TEXT
from clva_lens.benchmarks.run_folder import Report, class_name
from clva_lens.benchmarks.run_writing import ORIGIN, open_run
from clva_lens.ground.batching import batches
from clva_lens.ground.checkout import origin
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.ground.parameters import check_arguments
from clva_lens.lens.asking import Asking, Share
from clva_lens.lens.decoding import Decoding, told
from clva_lens.lens.facts import QUESTION
from clva_lens.lens.faults import machine_fault
from clva_lens.lens.generate import generate_batches
from clva_lens.lens.load import LensModel
from clva_lens.lens.margins import AnswerTokens, readout_tokens
from clva_lens.lens.provenance import describe, identity, machine
from clva_lens.lens.sharing import Prefixes, picture_keys, why_unshared
from clva_lens.methods.base import MethodLike, as_method
from clva_lens.methods.target import Target

_END = 16
"""Characters of a prompt's end, after which an answer begins."""
MAX_FAILED = 0.1
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


def evaluate(
    model: LensModel,
    benchmark: str | Benchmark,
    method: MethodLike | None = None,
    decoding: Decoding | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    share: Share | None = "picture",
    progress: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    keep_failed: bool = False,
    max_failed: float = MAX_FAILED,
) -> Report:
    """Return the report of ``model`` on a benchmark, under ``method`` if one is given.

    ``limit`` takes that many samples only, drawn with ``seed``: the same ones for every method.
    With ``share="picture"`` neighbours with the same picture are asked together, and what is read
    of it is read once; where that is not possible, the record says why (``unshared``). The answers
    are those without sharing up to what another batch size makes.

    With ``out`` every answer is written to that folder as it comes (see
    ``clva_lens.benchmarks.run_folder``), and ``resume`` continues a run that was stopped, however
    it was stopped; the answers and the score are then those of a run that was not. Samples that
    failed are asked again, at their places, unless ``keep_failed``. A run that is finished, and of
    which nothing failed, is only scored again.

    A sample that fails (a broken picture, a prompt that is too long, an exception in the model) is
    asked again alone, and is then recorded with its error, scored as wrong, and counted as
    ``failed``. A method that does not fit ends the run; so do too little memory, a lost device, a
    picture whose file is gone, and failures of more than ``max_failed`` of all samples (and more
    than nine). So does Ctrl-C. All whole batches before are kept.

    Raises:
        UnknownName: if there is no such benchmark, or no method of that name.
        BenchmarkError: if the limit does not fit, pictures are missing, the run is ended, or the
            folder cannot be used (see ``run_writing.open_run``).
        ParameterError: if the method, the batch size or ``max_failed`` does not fit, ``resume`` has
            no ``out``, or ``keep_failed`` no ``resume``.
    """
    chosen = BENCHMARKS.get(benchmark) if isinstance(benchmark, str) else benchmark
    check_arguments(evaluate, max_failed=max_failed)
    asking = Asking(
        method=as_method(method),
        decoding=decoding,
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        share=share,
    )
    options = {"progress": progress, "out": out, "resume": resume, "keep_failed": keep_failed}
    return run_benchmark(model, chosen, asking, max_failed=max_failed, **options)


def run_benchmark(
    model: LensModel,
    benchmark: Benchmark,
    asking: Asking,
    *,
    progress: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    keep_failed: bool = False,
    max_failed: float = MAX_FAILED,
) -> Report:
    """Return the report of ``model`` on a benchmark; this is ``evaluate`` with one ``Asking``."""
    asking = _with_margin(asking.fitted(model, benchmark.max_new_tokens), model, benchmark)
    unshared = why_unshared(model, asking.method) if asking.share else None
    if unshared is not None:
        asking = replace(asking, share=None)
    if asking.method is not None:  # an error of the settings is no sample's error
        asking.method.sessions(Target(model.hf_model, model.processor))
    if resume and out is None:
        raise ParameterError("resume=True was passed without a folder. Pass out='…' with it.")
    if keep_failed and not resume:
        raise ParameterError(
            "keep_failed=True was passed without resume=True, so there are no failed samples to "
            "keep. Pass both, or neither."
        )
    if not 0 <= max_failed <= 1:
        raise ParameterError(
            f"max_failed must be a share from 0 to 1, but is {max_failed}. Pass {MAX_FAILED}, or 1 "
            "to let every sample fail."
        )
    samples = benchmark.samples(asking.limit, asking.seed)
    check_images(samples)
    # A setting that cannot be scored should not be found out after hours of answers.
    judge(benchmark, samples, [Answer(sample.id, "", 0.0) for sample in samples])
    record = _record(model, benchmark, asking, len(samples))
    if unshared is not None:
        record["unshared"] = unshared
    answering = _Answering(model, benchmark, samples, asking, progress, max_failed)
    if out is None:
        everything = answering.batches(range(len(samples)))
        answers = [answer for _, batch in everything for answer in batch]
        return answering.report(answers, record)
    record |= {**identity(model), ORIGIN: origin()}
    stretches = answering.stretches()
    with open_run(Path(out), record, samples, stretches, resume, keep_failed) as run:
        for due in run.due:
            for place, batch in answering.batches(due):
                run.write(place, batch)
        report = answering.report(run.answers, record)
        run.finish(report)
    return report


def _with_margin(asking: Asking, model: LensModel, benchmark: Benchmark) -> Asking:
    """Return how to ask, with the tokens that the benchmark's readout compares."""
    readout = benchmark.settings.get("readout")
    if readout is None:
        return asking
    processor: Any = model.processor
    end = model.family.ask(processor, QUESTION, None)[-_END:]
    return replace(asking, margin=readout_tokens(model.words, readout, end))


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


def _spelled(tokens: AnswerTokens, words: Any) -> dict[str, dict[str, int]]:
    """Return the tokens by their names in the vocabulary."""
    pairs = tokens._asdict().items()
    return {
        word: dict(zip(words.convert_ids_to_tokens(ids), ids, strict=True)) for word, ids in pairs
    }


def _record(model: LensModel, benchmark: Benchmark, asking: Asking, samples: int) -> dict[str, Any]:
    """Return what decides the answers, as a run's record has it."""
    return {
        "benchmark": benchmark.name,
        "benchmark_class": class_name(type(benchmark)),
        "benchmark_version": benchmark.version,
        "settings": benchmark.settings,
        "data": benchmark.digests(),
        "samples": samples,
        "limit": asking.limit,
        "seed": asking.seed,
        "model": model.name,
        "method": describe(asking.method),
        "decoding": told(asking.how, model.hf_model, model.words),
        "margin": asking.margin and _spelled(asking.margin, model.words),
        "batch_size": asking.batch_size,
        **({} if asking.share is None else {"share": asking.share}),
        **machine(model),
    }


def check_images(samples: Sequence[Sample]) -> None:
    """Raise if pictures that are named by a path are not there, before anything slow is done.

    Raises:
        BenchmarkError: with the number of missing files and the first names.
    """
    paths = {Path(s.image) for s in samples if isinstance(s.image, str | Path)}
    missing = sorted(str(path) for path in paths if not path.is_file())
    if missing:
        shown = ", ".join(f"'{name}'" for name in missing[:5])
        more = "" if len(missing) <= 5 else f" and {len(missing) - 5} more"
        raise BenchmarkError(
            f"{len(missing)} of {len(paths)} pictures are missing: {shown}{more}. Check the folder "
            "of the images."
        )


@dataclass
class _Answering:
    """The questions of a run to a model; ``seconds`` is the time spent in it so far."""

    model: LensModel
    benchmark: Benchmark
    samples: Sequence[Sample]
    asking: Asking
    progress: bool
    max_failed: float
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    likeliest: list[int | None] = field(default_factory=list)
    prefixes: Prefixes = field(default_factory=Prefixes)

    def stretches(self) -> list[range]:
        """Return which samples are asked at once."""
        keys = None if self.asking.share is None else picture_keys([s.image for s in self.samples])
        return batches(len(self.samples), self.asking.batch_size, keys)

    def _pictures(self, count: int) -> Iterator[Any]:
        """Yield the pictures of the first samples: one object for neighbours that share it."""
        key, picture = None, None
        samples = self.samples[:count]
        keys = picture_keys([sample.image for sample in samples])
        for sample, now in zip(samples, keys, strict=True):
            if key is None or now != key:
                key, picture = now, self.benchmark.picture(sample)
            yield picture

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
            for s, picture in zip(self.samples, self._pictures(due.stop), strict=False)
        ]
        done = due.start
        options = {
            "progress": self.progress,
            "done": done,
            "record_errors": True,
            "prefixes": self.prefixes,
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
