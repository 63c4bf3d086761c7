"""What every registered benchmark keeps, whatever it asks (its settings: test_settings.py)."""

import math
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS, Answer, Sample, choose, judge
from clva_lens.benchmarks.metrics import METRICS, Outcomes
from clva_lens.benchmarks.parsers import PARSERS
from clva_lens.ground.errors import BenchmarkError, ParameterError

DATA = Path(__file__).parents[2].parent / "shared/data"
MOST = 40


@cache
def questions(name):
    """Some samples without their pictures, or why there are none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLVA_LENS_DATA", str(DATA))
        try:
            found = BENCHMARKS.get(name).questions()
        except BenchmarkError as error:
            return str(error)
    return [replace(one, image=None) for one in choose(found, min(MOST, len(found)), 0)]


def samples_of(name):
    found = questions(name)
    if isinstance(found, str):
        pytest.skip(f"un-skip when its data are in {DATA}: {found}")
    return found


def asks_yes_or_no(samples):
    return {one.label for one in samples} <= {"yes", "no"}


def answers(samples, text):
    return [Answer(one.id, text(one), margin=float(len(one.id))) for one in samples]


def mixed(samples):
    """Answers of all kinds: right ones, wrong ones, junk, and one failure."""
    words = ("Yes.", "No, it is not.", "perhaps", "")
    said = [replace(one, text=words[n % 4]) for n, one in enumerate(answers(samples, str))]
    return [*said[:-1], replace(said[-1], text="", error="out of memory")]


def equal(one, other):
    return one.keys() == other.keys() and all(
        one[key] == pytest.approx(other[key], nan_ok=True) for key in one
    )


every_benchmark = pytest.mark.parametrize("name", BENCHMARKS.names())


@every_benchmark
def test_samples_can_be_told_apart(name):
    samples = samples_of(name)
    assert len({one.id for one in samples}) == len(samples) > 1
    assert all(isinstance(one, Sample) and one.question for one in samples)


@every_benchmark
def test_a_model_that_always_says_the_same(name):
    """Always yes and always no are right as often as that is the label, by every parser."""
    samples, benchmark = samples_of(name), BENCHMARKS.get(name)
    if not asks_yes_or_no(samples):
        pytest.skip(f"{name} does not ask for yes or no")
    share = sum(one.label == "yes" for one in samples) / len(samples)
    assert 0 < share < 1
    for parser in PARSERS.names() if hasattr(benchmark, "parser") else [None]:
        asked = benchmark if parser is None else replace(benchmark, parser=parser)
        for word, right in (("Yes", share), ("No", 1 - share)):
            score = judge(asked, samples, answers(samples, lambda _, word=word: word))
            assert {row["prediction"] for row in score.rows} == {word.lower()}, parser
            run, one = Outcomes.from_rows(score.rows), np.ones((1, len(samples)))
            assert METRICS["accuracy"](run, one)[0] == pytest.approx(right)
            assert score.metrics["accuracy"] == pytest.approx(right)
            assert score.metrics["yes_ratio"] == (word == "Yes")
            assert score.metrics["unparsed"] == score.metrics["failed"] == 0
        perfect = judge(asked, samples, answers(samples, lambda one: one.label.title()))
        assert perfect.metrics["accuracy"] == 1


@every_benchmark
def test_scoring_is_order_free(name):
    samples, benchmark = samples_of(name), BENCHMARKS.get(name)
    given = mixed(samples)
    score = judge(benchmark, samples, given)
    shuffled = judge(
        benchmark,
        random.Random(1).sample(samples, len(samples)),
        random.Random(2).sample(given, len(given)),
    )
    assert equal(score.metrics, shuffled.metrics)
    by_id = {row["id"]: row for row in shuffled.rows}
    assert [by_id[row["id"]] for row in score.rows] == score.rows


@every_benchmark
def test_junk_and_failures_are_counted(name):
    samples, benchmark = samples_of(name), BENCHMARKS.get(name)
    junk = judge(benchmark, samples, answers(samples, lambda _: "zzz"))
    if asks_yes_or_no(samples):
        assert "unparsed" in junk.metrics, f"{name} does not say how many answers it cannot read"
    assert junk.metrics.get("unparsed", len(samples)) == len(samples)
    failed = [replace(one, text="", error="no memory") for one in answers(samples, str)]
    assert judge(benchmark, samples, failed).metrics["failed"] == len(samples)
    assert junk.metrics["failed"] == 0


@every_benchmark
def test_nothing_is_gained_over_itself(name):
    samples, benchmark = samples_of(name), BENCHMARKS.get(name)
    score = judge(benchmark, samples, mixed(samples))
    try:
        found = cl.compare(score, score, resamples=50)
    except BenchmarkError as error:
        assert not asks_yes_or_no(samples)
        pytest.skip(f"{name} is not compared: {error}")
    assert found.fixed == found.broken == 0 and found.p_value == 1
    for metric, (before, after, change) in found.metrics.items():
        assert before == after or math.isnan(before), metric
        ends = (change.estimate, change.low, change.high)
        assert all(end == 0 or math.isnan(end) for end in ends), metric
    assert found.beyond_bias is None or found.beyond_bias[:3] == (0, 0, 0)


def test_what_cannot_be_registered():
    known = BENCHMARKS.get("chair/toy")
    for name, item, message in (
        ("mine", type(known), r"which is no Benchmark\. Register one with its settings"),
        ("mine", known, r"ToyChair calls itself 'chair/toy', but is to be registered as 'mine'"),
        ("mine", type("Loose", (type(known),), {})(), r"Loose is no frozen dataclass"),
    ):
        with pytest.raises(ParameterError, match=message):
            BENCHMARKS.register(name, item)
    assert "mine" not in cl.benchmarks()
