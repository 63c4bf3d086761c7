"""A benchmark run: samples to prompts, prompts to answers, answers to a score with its record."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import overload

from clva_lens.benchmarks.base import BENCHMARKS, Answer, Benchmark, Sample, judge
from clva_lens.benchmarks.run_folder import Report
from clva_lens.benchmarks.run_writing import open_run
from clva_lens.benchmarks.shards import Shard, check_sharded
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.ground.parameters import check_arguments
from clva_lens.lens.answering import Asker
from clva_lens.lens.asking import Asking, Share
from clva_lens.lens.decoding import Decoding
from clva_lens.lens.load import LensModel
from clva_lens.lens.preparing import prepare
from clva_lens.lens.sharing import Prefixes
from clva_lens.lens.workers import Pool, Ray
from clva_lens.methods.base import Method, MethodLike, as_method

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
    engine: Ray | None = None,
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
    engine: Ray | None = None,
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
    engine: Ray | None = None,
) -> Report | list[Report]:
    """Return the report of ``model`` on a ``benchmark``, by name too, under ``method`` if given.

    ``methods`` in its place asks every batch under each of them (None is the model alone), so that
    a picture is read once for all; it returns reports, whose runs are ``0``, ``1``, … of ``out``.
    ``decoding`` None is greedy, as long as the benchmark asks for; ``progress`` shows a bar.
    ``limit`` takes that many samples only, drawn with ``seed``: the same ones for every method;
    ``batch_size`` are asked at once. With ``share="picture"`` neighbours with one picture are asked
    together, and it is read once ("tower": by the vision tower), up to what another batch size
    makes; or the record has why not.

    With ``out`` every answer is written to that folder as it comes (see ``benchmarks.run_folder``),
    and ``resume`` continues a run, however it was stopped; answers and score are then those of a
    run that was not. Samples that failed are asked again, at their places, unless ``keep_failed``.
    With ``engine=cl.Ray(...)`` several processes ask, and the files are the same.

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
    check_arguments(evaluate, benchmark=benchmark, max_failed=max_failed)
    chosen = BENCHMARKS.get(benchmark) if isinstance(benchmark, str) else benchmark
    common = {"batch_size": batch_size, "limit": limit, "seed": seed, "share": share}
    asking = Asking(method=as_method(method), decoding=decoding, **common)
    each = [asking]
    if methods is not None:
        each = [replace(asking, method=one) for one in _each_method(method, methods)]
    folders = [out] * len(each)
    if methods is not None and out is not None:
        folders = [Path(out) / str(place) for place in range(len(each))]
    options = {"resume": resume, "keep_failed": keep_failed, "max_failed": max_failed}
    with nullcontext(model) if engine is None else engine.of(model) as asked:
        reports = run_side_by_side(asked, chosen, each, folders, progress=progress, **options)
    return reports[0] if methods is None else reports


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
    model: LensModel | Pool,
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
    model: LensModel | Pool,
    benchmark: Benchmark,
    askings: Sequence[Asking],
    outs: Sequence[str | Path | None],
    *,
    progress: bool = True,
    resume: bool = False,
    keep_failed: bool = False,
    max_failed: float = MAX_FAILED,
) -> list[Report]:
    """Return the reports of several ways to ask the same questions, batch by batch in turn.

    They share what is read of the pictures. Options are those of ``run_benchmark``.
    """
    _check_options(outs, resume, keep_failed, max_failed)
    samples = _samples_of(benchmark, askings)
    askers = _askers(model, benchmark, askings, samples, outs, progress, max_failed)
    reports: list[Report | None] = [None] * len(askings)
    with ExitStack() as open_runs:
        options = {"resume": resume, "keep_failed": keep_failed}
        running = {
            place: open_runs.enter_context(
                closing(_asked(asker, samples[place], out=outs[place], **options))
            )
            for place, asker in enumerate(askers)
        }
        while running:
            for place, run in list(running.items()):
                try:
                    next(run)
                except StopIteration as end:
                    reports[place] = end.value
                    del running[place]
    return [report for report in reports if report is not None]


def _askers(
    model: LensModel | Pool,
    benchmark: Benchmark,
    askings: Sequence[Asking],
    samples: Sequence[Sequence[Sample]],
    outs: Sequence[str | Path | None],
    progress: bool,
    max_failed: float,
) -> Sequence[Asker]:
    """Return what asks each way: this process, or the workers of a pool."""
    if isinstance(model, Pool):
        options = {"progress": progress, "max_failed": max_failed}
        return model.askers(benchmark, askings, samples, **options)
    prefixes = Prefixes()
    return [
        prepare(
            model,
            benchmark,
            asking,
            samples[place],
            prefixes=prefixes,
            progress=progress and place == 0,
            max_failed=max_failed,
            kept=outs[place] is not None,
        )
        for place, asking in enumerate(askings)
    ]


def run_shard(
    model: LensModel,
    benchmark: Benchmark,
    asking: Asking,
    shard: Shard,
    out: str | Path,
    *,
    progress: bool = True,
    resume: bool = False,
    keep_failed: bool = False,
    max_failed: float = MAX_FAILED,
) -> Path:
    """Ask one shard of a run; return its folder, ``out/shards/NUMBER``, for ``merge``.

    Options are those of ``run_benchmark``; ``max_failed`` is a share of the shard's samples.

    Raises:
        BenchmarkError: as ``evaluate`` does, or if the folder holds another shard.
    """
    _check_options([out], resume, keep_failed, max_failed)
    check_sharded(Path(out))
    samples = _samples(benchmark, asking)
    asker = prepare(model, benchmark, asking, samples, progress=progress, max_failed=max_failed)
    folder, own = shard.folder(Path(out)), shard.part(asker.stretches())
    asker.count = sum(map(len, own))
    with open_run(folder, asker.record, samples, own, resume, keep_failed, shard) as run:
        for place, batch in asker.batches(run.due):
            run.write(place, batch)
        run.finish_shard(asker.seconds)
    return folder


def _check_options(
    outs: Sequence[str | Path | None], resume: bool, keep_failed: bool, max_failed: float
) -> None:
    if resume and None in outs:
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


def _samples_of(benchmark: Benchmark, askings: Sequence[Asking]) -> list[list[Sample]]:
    """Return what each way to ask asks: the same objects if it can, so that each is read once."""
    made: dict[tuple[int | None, int], list[Sample]] = {}
    for asking in askings:
        which = asking.limit, asking.seed
        made[which] = made[which] if which in made else _samples(benchmark, asking)
    return [made[asking.limit, asking.seed] for asking in askings]


def _samples(benchmark: Benchmark, asking: Asking) -> list[Sample]:
    """Return the samples that are asked, which can be scored, and whose pictures are there."""
    samples = benchmark.samples(asking.limit, asking.seed)
    check_images(samples)
    # A setting that cannot be scored should not be found out after hours of answers.
    judge(benchmark, samples, [Answer(sample.id, "", 0.0) for sample in samples])
    return samples


def _asked(
    asker: Asker,
    samples: Sequence[Sample],
    *,
    out: str | Path | None,
    resume: bool = False,
    keep_failed: bool = False,
) -> Generator[None, None, Report]:
    """Ask one batch after the other, after a first step in which none is; return the report."""
    if out is None:
        due, answers = [range(len(samples))], []
        asker.begin(due)
        yield
        for _, batch in asker.batches(due):
            answers += batch
            yield
        return asker.report(answers)
    stretches = asker.stretches()
    with open_run(Path(out), asker.record, samples, stretches, resume, keep_failed) as run:
        asker.begin(run.due)
        yield
        for place, batch in asker.batches(run.due):
            run.write(place, batch)
            yield
        report = asker.report(run.answers)
        run.finish(report)
    return report


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
