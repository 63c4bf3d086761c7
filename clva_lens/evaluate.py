"""A benchmark run: samples to prompts, prompts to answers, answers to a score with its record."""

from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from typing import Any

import torch

from clva_lens.benchmarks.base import BENCHMARKS, Answer, Benchmark, Score
from clva_lens.generate import Decoding, Greedy, generate
from clva_lens.methods.base import Composed, Method
from clva_lens.models.lens import LensModel

PACKAGES = ("clva-lens", "torch", "transformers", "nnsight")


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """The metrics of a run, one row a sample, and the record of how it came about."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    record: dict[str, Any]

    @property
    def score(self) -> Score:
        """Metrics and rows as a Score, for ``cl.compare``."""
        return Score(self.metrics, self.rows)

    def __repr__(self) -> str:
        """Return what was run and its metrics."""
        record = self.record
        title = f"{record['benchmark']} · {record['model']} · {record['method']['name']}"
        return f"{title}\n{self.score!r}"


def evaluate(
    model: LensModel,
    benchmark: str | Benchmark,
    method: Method | None = None,
    decoding: Decoding | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> Report:
    """Return the report of ``model`` on a benchmark, under ``method`` if one is given.

    ``limit`` takes that many samples only, drawn with ``seed``: the same ones for every method.

    Raises:
        UnknownName: if there is no such benchmark.
        BenchmarkError: if the limit does not fit.
    """
    chosen = BENCHMARKS.get(benchmark) if isinstance(benchmark, str) else benchmark
    decoding = decoding or Greedy(max_new_tokens=chosen.max_new_tokens)
    samples = chosen.samples(limit, seed)
    made = generate(
        model,
        [
            (sample.image, sample.question, sample.system if model.family.chats else None)
            for sample in samples
        ],
        method,
        decoding,
        batch_size=batch_size,
        progress=progress,
    )
    answers = [
        Answer(sample.id, text, margin)
        for sample, text, margin in zip(samples, made.texts, made.margins, strict=True)
    ]
    score = chosen.score(samples, answers)
    record = {
        "benchmark": chosen.name,
        "benchmark_version": chosen.version,
        "settings": chosen.settings,
        "samples": len(samples),
        "limit": limit,
        "seed": seed,
        "model": model.name,
        "method": describe(method),
        "decoding": {"name": type(decoding).__name__, **asdict(decoding)},
        "batch_size": batch_size,
        "attention_kernel": model.site.config._attn_implementation,
        "dtype": str(model.hf_model.dtype),
        "device": str(model.hf_model.device),
        "torch_threads": torch.get_num_threads(),
        "seconds": made.seconds,
        "packages": {name: version(name) for name in PACKAGES},
    }
    return Report(score.metrics, score.rows, record)


def describe(method: Method | None) -> dict[str, Any]:
    """Return a method's name and every parameter, given or defaulted."""
    if method is None:
        return {"name": "none"}
    if isinstance(method, Composed):
        return {"name": "composed", "methods": [describe(one) for one in method.methods]}
    fields = vars(method) if is_dataclass(method) else {}
    return {
        "name": method.name,
        **{key: value if _is_plain(value) else repr(value) for key, value in fields.items()},
    }


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str | tuple)
