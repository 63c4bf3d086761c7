"""Whom the paper's tables are made for: a checkpoint, its benchmarks, and how much of them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from os import environ
from pathlib import Path

from clva_lens.benchmarks.base import BENCHMARKS, Benchmark
from clva_lens.benchmarks.files import DATA
from clva_lens.benchmarks.pope_sets import SOURCES
from clva_lens.experiments.paper import paper_model
from clva_lens.toy.toys import of_toy_world

# How many samples of each kind a toy is asked, unless a limit is given: all tables in minutes.
TOY_LIMITS = {"pope": 120, "chair": 40, "mme": 120, "grid": 48, "looks": 72, "cases": 6}
LOOKS, CASES = 100, 6
"""How many questions attention is looked at for (the paper's 100 pictures), and answers shown."""


@dataclass(frozen=True)
class Subject:
    """A model by the name that it is loaded by, and how much it is asked.

    ``limit`` is the number of samples of each benchmark, None for all of them (for a toy, for what
    ``TOY_LIMITS`` says). ``printed`` is the paper's name of the model, None if it has none.
    """

    model: str
    limit: int | None = None
    seed: int = 0
    batch_size: int = 16

    @property
    def slug(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[^\w.-]+", "-", self.model).strip("-.") or "model"

    @property
    def printed(self) -> str | None:
        """The paper's name of the model."""
        return paper_model(self.model)

    @cached_property
    def toy(self) -> bool:
        """Whether it was trained on the toy world."""
        return of_toy_world(self.model)

    def pope(self, split: str, source: str | None = None) -> dict[str, Benchmark]:
        """Return the sets of a split by source: the three of the paper, or one; or the toy's."""
        sources = ("toy",) if self.toy else SOURCES if source is None else (source,)
        return {one: BENCHMARKS.get(f"pope/{one}/{split}") for one in sources}

    def benchmark(self, kind: str) -> Benchmark:
        """Return the benchmark of a kind: "chair", "mme" or "cases" (LLaVA-Bench)."""
        official = {"chair": "chair/coco", "mme": "mme", "cases": "llava-bench/coco"}
        toys = {"chair": "chair/toy", "mme": "mme/toy", "cases": "chair/toy"}
        return BENCHMARKS.get((toys if self.toy else official)[kind])

    def hallucination(self) -> Benchmark:
        """Return MME's hallucination subset."""
        return self.benchmark("mme") if self.toy else BENCHMARKS.get("mme/hallucination")

    def limit_of(self, kind: str) -> int | None:
        """Return how many samples of a kind of benchmark are asked."""
        default = {"looks": LOOKS, "cases": CASES}.get(kind)
        default = TOY_LIMITS[kind] if self.toy else default
        if default is None or self.limit is None:
            return default if self.limit is None else self.limit
        return min(default, self.limit)


@contextmanager
def data_in(folder: Path | None) -> Iterator[None]:
    """Look for benchmarks' data in a folder inside the block, if one is given."""
    before = environ.get(DATA)
    try:
        if folder is not None:
            environ[DATA] = str(folder)
        yield
    finally:
        if folder is not None:
            environ.pop(DATA)
            if before is not None:
                environ[DATA] = before
