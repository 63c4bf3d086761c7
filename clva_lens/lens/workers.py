"""A run asked by several processes, on one machine or more: Ray's actors keep the model.

One process, the driver, gives out whole batches and alone writes the answers, in their order, so
that a run's files are those of a single process. A worker that dies is started again and asked its
batches again; one whose packages, weights or pictures differ is refused.
"""

import hashlib
import io
import os
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from clva_lens.benchmarks.base import Benchmark, Sample
from clva_lens.benchmarks.lines import as_lines
from clva_lens.benchmarks.run_folder import plain
from clva_lens.benchmarks.run_writing import WEIGHTS, differences
from clva_lens.benchmarks.sample_rows import as_rows
from clva_lens.ground.checkout import code_digest
from clva_lens.ground.errors import BenchmarkError, ClvaLensError, ParameterError
from clva_lens.ground.parameters import Parameters
from clva_lens.lens.answering import Answering
from clva_lens.lens.asking import Asking
from clva_lens.lens.load import LensModel, load
from clva_lens.lens.pool_asker import PICTURES, Asked, Jobs, PoolAsker, Schedule, Told, digest_of
from clva_lens.lens.preparing import prepare
from clva_lens.lens.provenance import identity
from clva_lens.lens.sharing import Prefixes
from clva_lens.lens.shipping import shipped


@dataclass(frozen=True, kw_only=True)
class Ray(Parameters):
    """Several processes that ask a run's batches, by Ray (``pip install 'clva-lens[ray]'``).

    ``workers`` processes each keep a model, with ``threads`` threads on a CPU, a number that
    decides last digits and stands in the record, and ``gpus`` of Ray's GPUs (1, or a part of one).
    ``address`` is that of a running Ray ("auto", "HOST:PORT"); None starts one on this machine,
    whatever else runs there, and ends it with the run. A worker that dies is started again up to
    ``restarts`` times.

    >>> cl.Ray(workers=4).threads
    1
    """

    workers: int = 2
    threads: int = 1
    gpus: float = 0
    address: str | None = None
    restarts: int = 3

    def __post_init__(self) -> None:
        """Check that there is something to start."""
        for name in ("workers", "threads"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} must be >= 1, but is {getattr(self, name)}. Pass 1.")
        for name in ("gpus", "restarts"):
            if getattr(self, name) < 0:
                raise ParameterError(f"{name} must be >= 0, but is {getattr(self, name)}. Pass 0.")

    def of(self, model: LensModel) -> "Pool":
        """Return workers, not started yet, to which a loaded model is sent as it is."""
        return Pool(self, shipped(model), identity(model)["weights"])

    def loading(self, name: str, **options: Any) -> "Pool":
        """Return workers, not started yet, which load a model by its name (see ``load``)."""
        return Pool(self, partial(load, name, **options))


class _Work(NamedTuple):
    """What a worker is asked about: a benchmark, and the ways to ask it.

    ``source`` is a list with Ray's reference to what makes the model, fetched when it is needed.
    """

    key: int
    source: list[Any]
    benchmark: Benchmark
    askings: Sequence[Asking]


class _Worker:
    """What runs in a process of its own; the model is loaded when it is first needed."""

    def __init__(self, threads: int, folder: str) -> None:
        import torch

        torch.set_num_threads(threads)
        if Path(folder).is_dir():  # on another machine there may be no such folder
            os.chdir(folder)
        self._model: LensModel | None = None
        self._ready: tuple[int, list[tuple[Answering, Told, str]]] | None = None

    def told(self, work: _Work) -> list[Told]:
        """Say how each asking is asked here."""
        return [told for _, told, _ in self._prepared(work)]

    def ask(self, work: _Work, jobs: Jobs) -> list[Asked]:
        """Ask batches, each of one asking, one after the other; those before one that fails."""
        found = []
        for place, part in jobs:
            asker, _, who = self._prepared(work)[place]
            asker.seconds, asker.likeliest = 0.0, []
            try:
                answers = [answer for _, some in asker.batches([part]) for answer in some]
            except Exception:
                if not found:
                    raise
                break  # it is asked again, first then
            found.append(Asked(who, answers, asker.likeliest, asker.seconds))
        return found

    def processor_seconds(self) -> float:
        """Return the processor time of this process so far."""
        return time.process_time()

    def words(self, ids: Sequence[int]) -> list[str]:
        """Decode tokens, each by itself."""
        assert self._model is not None
        return [self._model.words.decode([one]) for one in ids]

    def _prepared(self, work: _Work) -> list[tuple[Answering, Told, str]]:
        if self._ready is None or self._ready[0] != work.key:
            if self._model is None:
                self._model = _import_ray().get(work.source[0])()
            assert self._model is not None
            prefixes, made = Prefixes(), []
            for asking in work.askings:
                samples = work.benchmark.samples(asking.limit, asking.seed)
                one = prepare(self._model, work.benchmark, asking, samples, prefixes=prefixes)
                record = {**plain(one.record), PICTURES: _pictures_of(samples)}
                told = Told(record, one.stretches(), one.asking.margin)
                made.append((one, told, digest_of(record)))
            self._ready = (work.key, made)
        return self._ready[1]


def _pictures_of(samples: Sequence[Sample]) -> str:
    return hashlib.sha256(as_lines(as_rows(samples))).hexdigest()


class Pool:
    """Workers that are started when this is entered, and ended when it is left.

    They keep their model from run to run.
    """

    def __init__(
        self, engine: Ray, source: Callable[[], LensModel], weights: str | None = None
    ) -> None:
        """Start nothing yet; ``weights`` is the SHA-256 that the workers' must have, if known."""
        self.engine, self._source, self._weights = engine, source, weights
        self._workers: list[Any] = []
        self._kept: list[Any] = []
        self._works = 0

    def __enter__(self) -> "Pool":
        """Start Ray, if this process has none yet, and the workers.

        Raises:
            ParameterError: if Ray is not installed, or there is none at the address.
        """
        self._ray = _import_ray()
        self._began = not self._ray.is_initialized()
        engine = self.engine
        if self._began:
            self._start()
        options = {
            "num_cpus": engine.threads,
            "num_gpus": engine.gpus,
            "max_restarts": engine.restarts,
            "max_task_retries": -1,
        }
        kind = self._ray.remote(**options)(_Worker)
        self._kept = [self._ray.put(self._source)]
        made = range(engine.workers)
        self._workers = [kind.remote(engine.threads, str(Path.cwd())) for _ in made]
        return self

    def _start(self) -> None:
        engine = self.engine
        count = max(os.cpu_count() or 1, engine.workers * engine.threads)
        own = {} if engine.address else {"num_cpus": count, "include_dashboard": False}
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            self._ray.init(address=engine.address or "local", **own, **quiet)
        except (OSError, ValueError, RuntimeError, SystemExit) as error:  # it exits if none answers
            where = "here" if engine.address is None else f"at '{engine.address}'"
            said = error if str(error) and not isinstance(error, SystemExit) else "nothing answers"
            raise ParameterError(
                f"Ray could not be had {where} ({said}). Pass the address of one that runs (ray "
                "start says it), or leave it out (--address), and one is started here."
            ) from error

    def __exit__(self, *_: object) -> None:
        """End the workers, and Ray if it was started or found here."""
        # Ray would say of each batch that ends with its worker that it is asked again.
        with redirect_stdout(io.StringIO()):
            for worker in self._workers:  # alive, they crash a process that shuts Ray down
                self._ray.kill(worker)
            self._workers, self._kept = [], []
            if self._began:
                self._ray.shutdown()

    def askers(
        self,
        benchmark: Benchmark,
        askings: Sequence[Asking],
        samples: Sequence[Sequence[Sample]],
        *,
        progress: bool,
        max_failed: float,
    ) -> "list[PoolAsker]":
        """Return what asks each way; a batch is asked each way by one worker, if they can share.

        Raises:
            BenchmarkError: if the workers differ in what decides the answers.
            ClvaLensError: what a worker raised: a model or a method that does not fit.
        """
        self._works += 1
        work = self._ray.put(_Work(self._works, self._kept, benchmark, askings))
        every = self._get([worker.told.remote(work) for worker in self._workers])
        mine: list[dict[str, Any]] = [{PICTURES: _pictures_of(one)} for one in samples]
        if self._weights is not None:
            mine = [{**one, WEIGHTS: self._weights} for one in mine]
        for number, told in enumerate(every):
            for first, one, own in zip(every[0], told, mine, strict=True):
                _require_alike(first.record, one.record, f"worker {number + 1}")
                here = {**one.record, **own, **_of_this_process()}
                _require_alike(here, one.record, f"worker {number + 1}")
        schedule = Schedule(self, work)
        return [
            PoolAsker(self, schedule, place, benchmark, samples[place], told, max_failed, progress)
            for place, told in enumerate(every[0])
        ]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._workers)

    def processor_seconds(self) -> list[float]:
        """Return the processor time of each worker so far."""
        return self._get([worker.processor_seconds.remote() for worker in self._workers])

    def ask(self, number: int, work: Any, jobs: Jobs) -> Any:
        """Give jobs to a worker; return what ``ready`` and ``get`` take."""
        return self._workers[number].ask.remote(work, jobs)

    def ready(self, pending: Sequence[Any]) -> Any:
        """Return one that is done; waiting can be interrupted."""
        while True:
            done, _ = self._ray.wait(list(pending), num_returns=1, timeout=1)
            if done:
                return done[0]

    def get(self, one: Any) -> list[Asked]:
        """Return what a worker answered, jobs from the first on, or raise what the first raised."""
        return self._get(one)

    def words(self, ids: Sequence[int]) -> list[str]:
        """Return tokens as they are written."""
        return self._get(self._workers[0].words.remote(list(ids)))

    def _get(self, wanted: Any) -> Any:
        """Return results; errors of ours as they were raised, others in words."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(wanted)
        except errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ClvaLensError):
                raise cause from None
            raise BenchmarkError(
                f"a worker failed with {type(cause).__name__}: {cause} Every batch before is kept: "
                "mend what is wrong, then continue with resume=True (--resume)."
            ) from error
        except errors.RayError as error:
            told = " ".join(str(error).split())[:300]
            raise BenchmarkError(
                f"a worker died, and was started again {self.engine.restarts} times at most "
                f"({told}). Every batch before is kept: see what ends it (memory, a device), then "
                "continue with resume=True (--resume)."
            ) from error


def _of_this_process() -> dict[str, Any]:
    """Return what must be the same where answers are written as where they are made."""
    return {"code": code_digest()}


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ParameterError(
            "several workers need Ray, which is not installed. Run pip install 'clva-lens[ray]', "
            "or cut the run into shards (--shard), which need nothing."
        ) from None
    return ray


def _require_alike(first: dict[str, Any], other: dict[str, Any], who: str) -> None:
    found = differences(first, other)
    if found:
        said = "\n  ".join(f"{key}: {a!r}, {b!r} on {who}" for key, (a, b) in found.items())
        raise BenchmarkError(
            f"the workers differ in what decides the answers:\n  {said}\nGive all of them the same "
            "packages, weights, pictures and kind of device."
        )
