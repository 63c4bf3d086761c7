"""A run before its first question: how a model is asked a benchmark, and the record of that."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from clva_lens.benchmarks.base import Benchmark, Sample
from clva_lens.benchmarks.run_folder import class_name
from clva_lens.benchmarks.run_writing import ORIGIN
from clva_lens.ground.checkout import origin
from clva_lens.lens.answering import Answering
from clva_lens.lens.asking import Asking
from clva_lens.lens.decoding import told
from clva_lens.lens.load import LensModel
from clva_lens.lens.margins import readout_tokens
from clva_lens.lens.provenance import describe, identity, machine
from clva_lens.lens.sharing import Prefixes, picture_keys, shared
from clva_lens.methods.target import Target
from clva_lens.models.answer_tokens import AnswerTokens, prompt_end


def prepare(
    model: LensModel,
    benchmark: Benchmark,
    asking: Asking,
    samples: Sequence[Sample],
    *,
    prefixes: Prefixes | None = None,
    progress: bool = False,
    max_failed: float = 1.0,
    kept: bool = True,
) -> Answering:
    """Return what asks ``samples``; one that is ``kept`` has weights and code in its record.

    ``prefixes`` are shared by several that run side by side.

    Raises:
        ParameterError: if the method or the decoding does not fit the model.
    """
    asking = _with_margin(asking.fitted(model, benchmark.max_new_tokens), model, benchmark)
    pictures = [benchmark.picture(sample) for sample in samples]
    keys = picture_keys(pictures)
    asking, unshared = _sharing(model, asking, keys)
    if asking.method is not None:  # an error of the settings is no sample's error
        asking.method.sessions(Target(model.hf_model, model.processor))
    record = _record(model, benchmark, asking, len(samples))
    if unshared is not None:
        record["unshared"] = unshared
    if kept:
        record |= {**identity(model), ORIGIN: origin()}
    return Answering(
        model=model,
        benchmark=benchmark,
        samples=samples,
        pictures=pictures,
        asking=asking,
        record=record,
        progress=progress,
        max_failed=max_failed,
        prefixes=prefixes or Prefixes(),
        keys=keys,
    )


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
    end = prompt_end(model.family, processor)
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
