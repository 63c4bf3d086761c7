"""A benchmark run: samples to prompts, prompts to answers, answers to a score with its record."""

from collections.abc import Generator, Hashable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

from clva_lens.benchmarks.base import BENCHMARKS, Answer, Benchmark, Sample, judge
from clva_lens.benchmarks.run_folder import Report, class_name
from clva_lens.benchmarks.run_writing import ORIGIN, open_run
from clva_lens.ground.checkout import origin
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.ground.parameters import check_arguments
from clva_lens.lens.answering import Answering
from clva_lens.lens.asking import Asking, Share
from clva_lens.lens.decoding import Decoding, told
from clva_lens.lens.facts import QUESTION
from clva_lens.lens.load import LensModel
from clva_lens.lens.margins import AnswerTokens, readout_tokens
from clva_lens.lens.provenance import describe, identity, machine
from clva_lens.lens.sharing import Prefixes, picture_keys, shared
from clva_lens.methods.base import Method, MethodLike, as_method
from clva_lens.methods.target import Target

_END = 16
"""Characters of a prompt's end, after which an answer begins."""
MAX_FAILED = 0.1


@overload
def evaluate(
    model: LensModel,
    benchmark: str | Benchmark,
    method: MethodLike | None = None,
    decoding: Decoding | None = None,
    *,
    methods: None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    share: Share | None = "picture",
    progress: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    keep_failed: bool = False,
    max_failed: float = MAX_FAILED,
) -> Report: ...
@overload
def evaluate(
    model: LensModel,
    benchmark: str | Benchmark,
    method: None = None,
    decoding: Decoding | None = None,
    *,
    methods: Sequence[MethodLike | None],
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    share: Share | None = "picture",
    progress: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    keep_failed: bool = False,
    max_failed: float = MAX_FAILED,
) -> list[Report]: ...
def evaluate(
    model: LensModel,
    benchmark: str | Benchmark,
    method: MethodLike | None = None,
    decoding: Decoding | None = None,
    *,
    methods: Sequence[MethodLike | None] | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    share: Share | None = "picture",
    progress: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    keep_failed: bool = False,
    max_failed: float = MAX_FAILED,
) -> Report | list[Report]:
    """Return the report of ``model`` on a ``benchmark``, by name too, under ``method`` if given.

    ``methods`` in its place asks every batch under each of them (None is the model alone), so that
    a picture is read once for all; it returns reports, whose runs are ``0``, ``1``, … of ``out``.
    ``decoding`` None is greedy, as long as the benchmark asks for; ``progress`` shows a bar.
    ``limit`` takes that many samples only, drawn with ``seed``: the same ones for every method;
    ``batch_size`` are asked at once. With ``share="picture"`` neighbours with one picture are asked
    together, and it is read once ("tower": by the vision tower), up to what another batch size
    makes; or the record has why not.

    With ``out`` every answer is written to that folder as it comes (see
    ``clva_lens.benchmarks.run_folder``), and ``resume`` continues a run that was stopped, however
    it was stopped; the answers and the score are then those of a run that was not. Samples that
    failed are asked again, at their places, unless ``keep_failed``.

    A sample that fails (a broken picture, a prompt that is too long, an exception in the model) is
    asked again alone, and is then recorded with its error, scored as wrong, and counted as
    ``failed``. Whole batches are kept when a run ends: by a method that does not fit, too little
    memory, a lost device, a picture that is gone, or more than ``max_failed`` (and nine) failures.

    Raises:
        UnknownName: if there is no such benchmark, or no method of that name.
        BenchmarkError: if the limit does not fit, pictures are missing, the run is ended, or the
            folder cannot be used (see ``run_writing.open_run``).
        ParameterError: if the method, the batch size or ``max_failed`` does not fit, ``resume`` has
            no ``out``, ``keep_failed`` no ``resume``, or both ``method`` and ``methods`` are given.

    >>> report = cl.evaluate(model, "pope/toy/random", limit=8, progress=False)
    >>> len(report.score.rows), report.metrics["failed"]
    (8, 0.0)
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
    options = {"resume": resume, "keep_failed": keep_failed, "max_failed": max_failed}
    if methods is None:
        return run_benchmark(model, chosen, asking, progress=progress, out=out, **options)
    each = [replace(asking, method=one) for one in _each_method(method, methods)]
    folders = [None if out is None else Path(out) / str(place) for place in range(len(each))]
    return run_side_by_side(model, chosen, each, folders, progress=progress, **options)


def _each_method(
    method: MethodLike | None, methods: Sequence[MethodLike | None]
) -> list[Method | None]:
    if method is not None or not methods:
        raise ParameterError(
            "methods= is a list of at least one, in the place of method=. Pass one of the two; "
            "None in the list is the model alone."
        )
    return [as_method(one) for one in methods]


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
    options = {"resume": resume, "keep_failed": keep_failed, "max_failed": max_failed}
    (report,) = run_side_by_side(model, benchmark, [asking], [out], progress=progress, **options)
    return report


def run_side_by_side(
    model: LensModel,
    benchmark: Benchmark,
    askings: Sequence[Asking],
    outs: Sequence[str | Path | None],
    *,
    progress: bool = True,
    **options: Any,
) -> list[Report]:
    """Return the reports of several ways to ask the same questions, batch by batch in turn.

    They share what is read of the pictures. ``options`` are the others of ``run_benchmark``.
    """
    samples: dict[tuple[int | None, int], list[Sample]] = {}
    for asking in askings:
        which = asking.limit, asking.seed
        if which not in samples:
            samples[which] = benchmark.samples(*which)
            check_images(samples[which])
    prefixes = Prefixes()
    reports: list[Report | None] = [None] * len(askings)
    with ExitStack() as open_runs:
        running = {
            place: open_runs.enter_context(
                closing(
                    _asked(
                        model,
                        benchmark,
                        asking,
                        samples[asking.limit, asking.seed],
                        prefixes,
                        progress=progress and place == 0,
                        out=outs[place],
                        **options,
                    )
                )
            )
            for place, asking in enumerate(askings)
        }
        while running:
            for place, run in list(running.items()):
                try:
                    next(run)
                except StopIteration as end:
                    reports[place] = end.value
                    del running[place]
    return [report for report in reports if report is not None]


def _asked(
    model: LensModel,
    benchmark: Benchmark,
    asking: Asking,
    samples: Sequence[Sample],
    prefixes: Prefixes,
    *,
    progress: bool,
    out: str | Path | None,
    resume: bool = False,
    keep_failed: bool = False,
    max_failed: float = MAX_FAILED,
) -> Generator[None, None, Report]:
    """Ask one batch after the other; return the report."""
    asking = _with_margin(asking.fitted(model, benchmark.max_new_tokens), model, benchmark)
    pictures = [benchmark.picture(sample) for sample in samples]
    keys = picture_keys(pictures)
    asking, unshared = _sharing(model, asking, keys)
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
    # A setting that cannot be scored should not be found out after hours of answers.
    judge(benchmark, samples, [Answer(sample.id, "", 0.0) for sample in samples])
    record = _record(model, benchmark, asking, len(samples))
    if unshared is not None:
        record["unshared"] = unshared
    answering = Answering(
        model, benchmark, samples, pictures, asking, progress, max_failed, prefixes, keys
    )
    if out is None:
        answers: list[Answer] = []
        for _, batch in answering.batches(range(len(samples))):
            answers += batch
            yield
        return answering.report(answers, record)
    record |= {**identity(model), ORIGIN: origin()}
    stretches = answering.stretches()
    with open_run(Path(out), record, samples, stretches, resume, keep_failed) as run:
        for due in run.due:
            for place, batch in answering.batches(due):
                run.write(place, batch)
                yield
        report = answering.report(run.answers, record)
        run.finish(report)
    return report


def _sharing(
    model: LensModel, asking: Asking, keys: Sequence[Hashable]
) -> tuple[Asking, str | None]:
    """Return how to ask, and why not all is shared where that was wanted."""
    if all(one != next_one for one, next_one in pairwise(keys)):
        return replace(asking, share=None), None
    kind, unshared = shared(model, asking.method, asking.share)
    return replace(asking, share=kind), unshared


def _with_margin(asking: Asking, model: LensModel, benchmark: Benchmark) -> Asking:
    """Return how to ask, with the tokens that the benchmark's readout compares."""
    readout = benchmark.settings.get("readout")
    if readout is None:
        return asking
    processor: Any = model.processor
    end = model.family.ask(processor, QUESTION, None)[-_END:]
    return replace(asking, margin=readout_tokens(model.words, readout, end))


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
