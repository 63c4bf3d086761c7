"""A run by one process and by several workers, each with one thread: asking alone, in turn."""

import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch

from clva_lens.benchmarks.base import BENCHMARKS, Benchmark, Sample
from clva_lens.benchmarks.run_writing import open_run
from clva_lens.experiments.speed.bench import BenchReport, BenchRow, hardware
from clva_lens.lens.answering import Asker
from clva_lens.lens.asking import Asking
from clva_lens.lens.load import load
from clva_lens.lens.preparing import prepare
from clva_lens.lens.workers import Pool, Ray
from clva_lens.methods.clva import CLVA

QUESTIONS, FEW = 2_000, 120
EFFICIENCY, WRITER = 1.2, 0.02
"""Targets: the workers' time × their number over one process's; the writer's over a worker's."""


class Spent(NamedTuple):
    """Seconds of asking: by the wall clock, and of processor time.

    ``here`` is this process's, ``writer`` that of the thread that gives out and writes.
    """

    wall: float
    here: float
    writer: float
    workers: Sequence[float] = ()


def measure_workers(
    workers: int = 2, questions: int = QUESTIONS, rounds: int = 3, *, model: str = "toy-llava"
) -> BenchReport:
    """Return what ``workers`` of Ray take for a toy's questions, over one process of one thread.

    The workers are started, and the model is loaded, before anything is measured; answers are
    written as in any run. Ratios: of wall time, which others on the machine disturb; of the busiest
    worker's processor time to the process's, below which the first cannot lie; and of the writer's
    to a worker's, alone and with Ray's threads beside it, which wait by the wall.

    Raises:
        ParameterError: if Ray is not installed.
    """
    benchmark = replace(BENCHMARKS.get("pope/toy/adversarial"), count=questions // 5)
    asking = Asking(method=CLVA(), batch_size=16, limit=questions, share="picture")
    samples = benchmark.samples(asking.limit, asking.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one, several = list[Spent](), list[Spent]()
    try:
        lens = load(model)
        with Ray(workers=workers).loading(model) as pool, TemporaryDirectory() as folder:
            for number in range(rounds):
                # Every other round backwards, so that none is always the first.
                for kind in (one, several)[:: -1 if number % 2 else 1]:
                    out = Path(folder) / f"{number}-{'one' if kind is one else 'several'}"
                    if kind is one:
                        asker = prepare(lens, benchmark, asking, samples)
                        kind.append(_asked(asker, samples, out))
                    else:
                        kind.append(
                            _asked(_by(pool, benchmark, asking, samples), samples, out, pool)
                        )
    finally:
        torch.set_num_threads(threads)
    used = {name: version(name) for name in ("torch", "transformers", "ray")}
    used |= {"threads": "1 each", **hardware("cpu")}
    rows = _rows(f"{model}, {questions:,} questions", one, several)
    return BenchReport(rows, rounds, used)


def _by(pool: Pool, benchmark: Benchmark, asking: Asking, samples: Sequence[Sample]) -> Asker:
    (asker,) = pool.askers(benchmark, [asking], [samples], progress=False, max_failed=1.0)
    return asker


def _asked(asker: Asker, samples: Sequence[Sample], out: Path, pool: Pool | None = None) -> Spent:
    """Ask and write all answers; return what that took once everything was ready."""
    with open_run(out, asker.record, samples, asker.stretches()) as run:
        asker.begin(run.due)
        before = () if pool is None else pool.processor_seconds()
        began = time.perf_counter(), time.process_time(), time.thread_time()
        for place, batch in asker.batches(run.due):
            run.write(place, batch)
        ended = time.perf_counter(), time.process_time(), time.thread_time()
        after = () if pool is None else pool.processor_seconds()
    wall, here, writer = (b - a for a, b in zip(began, ended, strict=True))
    return Spent(wall, here, writer, [b - a for a, b in zip(before, after, strict=True)])


def _rows(model: str, one: Sequence[Spent], several: Sequence[Spent]) -> tuple[BenchRow, ...]:
    """Return medians over rounds, with quartiles, of which each gives a ratio."""
    count = len(several[0].workers)
    first, name = "1 process", f"{count} workers"
    busiest, worker = (f"{name}, processor time of {which}" for which in ("the busiest", "one"))
    writer = f"{name}, the writer"
    walls = [(s.wall, o.wall) for o, s in zip(one, several, strict=True)]
    most = [(max(s.workers), o.here) for o, s in zip(one, several, strict=True)]
    written = [(s.writer, sum(s.workers) / count) for s in several]
    beside = [(s.here, sum(s.workers) / count) for s in several]
    found = []
    for case, over, pairs, target in (
        (name, first, walls, EFFICIENCY / count),
        (busiest, first, most, EFFICIENCY / count),
        (writer, worker, written, WRITER),
        (f"{writer} with Ray's threads", worker, beside, None),
    ):
        own, base = np.array(pairs).T
        low, middle, high = np.quantile(own / base, [0.25, 0.5, 0.75]).tolist()
        wall = middle if pairs is walls else None
        spread = float(np.median(own)), middle, low, high, wall
        found.append(BenchRow(model, case, over, "s", *spread, len(pairs), target))
    return tuple(found)
