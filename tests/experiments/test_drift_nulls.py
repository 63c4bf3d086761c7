"""Fig. 2b beside its nulls: what a twin is, what random tokens are, and what is said of them."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.experiments.draft import Draft
from clva_lens.experiments.drift_nulls import (
    AWAY,
    BACK,
    LESS,
    PEAK,
    PULL,
    PULL_ELSEWHERE,
    UNDECIDED,
    drift_rows,
    drift_sentences,
    measure_drift,
    untrained_twin,
)
from clva_lens.experiments.measuring import mean_interval, trace_samples


@pytest.fixture(scope="module")
def model():
    return cl.load("toy-llava")


@pytest.fixture(scope="module")
def samples():
    asked = BENCHMARKS.get("pope/toy/adversarial").samples()
    return list({sample.group: sample for sample in asked}.values())[:12]


@pytest.fixture(scope="module")
def drift(model, samples):
    return measure_drift(model, samples, twins=[untrained_twin(model, n) for n in (0, 1)])


@pytest.mark.parametrize("name", ["toy-llava", "toy-instructblip"])
def test_a_twin_has_the_shape_and_none_of_the_weights_and_is_the_same_each_time(name):
    model = cl.load(name)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    weights = dict(model.hf_model.named_parameters())
    first, again, other = (
        dict(untrained_twin(model, seed).hf_model.named_parameters()) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in weights.items()}
    assert all(torch.equal(first[key], again[key]) for key in first)
    matrices = [key for key, value in first.items() if value.ndim > 1 and value.any()]
    assert len(matrices) > 20
    assert not any(torch.equal(first[key], weights[key]) for key in matrices)
    assert not all(torch.equal(first[key], other[key]) for key in matrices)


def test_runs_are_of_the_same_questions_and_twins_are_averaged(model, samples, drift):
    assert list(drift.curves) == [
        "greedy",
        "CLVA",
        "CLVA, random tokens",
        "untrained",
        "untrained, CLVA",
    ]
    twins = [untrained_twin(model, n) for n in (0, 1)]
    each = [cl.attention_drift(trace_samples(twin, samples, progress=False)) for twin in twins]
    expected = np.mean([one.toward_positive.numpy() for one in each], axis=0)
    np.testing.assert_allclose(drift.curves["untrained"]["toward_positive"], expected, atol=1e-6)
    # Up to the anchor nothing is edited; after it CLVA differs, and from its control.
    at = list(drift.layers).index(drift.positive_layer)
    plain, acted, control = (drift.curves[run]["toward_positive"] for run in list(drift.curves)[:3])
    np.testing.assert_allclose(acted[:, : at + 1], plain[:, : at + 1], atol=1e-6)
    assert np.abs(acted - plain)[:, -1].max() > 0.1
    assert np.abs(acted - control)[:, -1].max() > 0.1


def test_untrained_maps_peak_at_the_anchor_and_fall_after_it(drift):
    """The null that the figure is for: the definition gives a peak without any training."""
    at = list(drift.layers).index(drift.positive_layer)
    curve = drift.curves["untrained"]["toward_positive"].mean(axis=0)
    others = np.delete(curve, at)
    print(
        f"untrained: r {curve[at]:.2f} at the anchor's layer, elsewhere {others.max():.2f} at most"
    )
    assert curve[at] > others.max() + 0.1


def test_drift_is_from_the_anchors_that_a_method_takes(model, samples):
    given = cl.CLVA(positive_layer=6, tau=1.0, head_threshold=0.5)
    found = measure_drift(model, samples, given)
    assert found.positive_layer == 6 and list(found.curves)[-1] == "CLVA, random tokens"
    trace = trace_samples(model, samples, progress=False)
    own = cl.attention_drift(trace, 6)
    greedy = found.curves["greedy"]
    assert np.abs(greedy["toward_positive"] - own.toward_positive.numpy()).max() > 0.01
    tau = measure_drift(model, samples, replace(given, tau=2.0)).curves["greedy"]
    np.testing.assert_allclose(tau["toward_positive"], greedy["toward_positive"])
    assert np.abs(tau["unmasked_positive"] - greedy["unmasked_positive"]).max() > 0.01


def test_a_record_draws_the_same_figure(drift, tmp_path):
    draft = Draft(tmp_path / "draft")
    draft.keep_arrays("drift", **drift.arrays())
    drawn = draft.draw("drift")
    assert drawn.rows == drift.draw().rows
    assert {row["run"] for row in drawn.rows} == set(drift.curves)


def test_a_single_prompt_is_drawn_without_bands(model, samples):
    found = measure_drift(model, samples[:1])
    assert {row["low"] for row in found.draw().rows} == {None}
    assert all(one.endswith(f": {UNDECIDED}.") for one in drift_sentences(drift_rows(found)))


# ── sentences ──


def told(values, half=0.01):
    """Rows with these means, each ± half; None for no interval."""
    return [
        {"run": run, "what": what, "mean": mean}
        | {
            "low": None if half is None else mean - half,
            "high": None if half is None else mean + half,
        }
        for (run, what), mean in values.items()
    ]


BASE = {
    ("greedy", BACK): 0.2,
    ("greedy", BACK + LESS): 0.1,
    ("greedy", AWAY): -0.4,
    ("greedy", PEAK): 0.8,
    ("untrained", BACK): 0.1,
    ("untrained", AWAY): -0.4,
    ("untrained", PEAK): 0.5,
    ("CLVA", PULL): 0.5,
    ("CLVA", PULL_ELSEWHERE): -0.1,
    ("CLVA, random tokens", PULL): 0.0,
    ("untrained, CLVA", PULL): 0.3,
}


@pytest.mark.parametrize(
    ("key", "value", "place", "before", "after"),
    [
        (("greedy", BACK), -0.2, 0, "go back towards", "do not go back"),
        (("greedy", BACK + LESS), 0.0, 0, "further than without", "no further than without"),
        (("greedy", AWAY), 0.0, 1, "the maps leave", "the maps do not leave"),
        (("untrained", AWAY), 0.0, 1, "nothing leave it", "nothing do not leave it"),
        (("CLVA", PULL), 0.0, 2, "the maps return", "the maps do not return"),
        (("untrained, CLVA", PULL), 0.0, 2, "untrained maps do too", "untrained maps do not"),
        (("CLVA", PULL_ELSEWHERE), 0.1, 2, "move away from it", "not re-weighted follow"),
        (("CLVA", PULL_ELSEWHERE), 0.0, 2, "move away from it", "do not follow"),
    ],
)
def test_each_sentence_follows_from_its_number(key, value, place, before, after):
    first = drift_sentences(told(BASE))[place]
    then = drift_sentences(told(BASE | {key: value}))[place]
    assert before in first and after not in first
    assert after in then and before not in then.replace(after, "")
    written = [float(one.replace("−", "-")) for one in re.findall(r"[−+]?\d\.\d{3}", then)]
    numbers = {abs(round(one["mean"], 3)) for one in told(BASE)} | {abs(value)}
    assert {abs(one) for one in written[::3]} <= numbers


def test_without_intervals_nothing_is_said_to_be_so():
    for sentence in drift_sentences(told(BASE, half=None)):
        assert sentence.endswith(f": {UNDECIDED}.") and "(no interval)" in sentence


def test_without_twins_nothing_is_said_of_them():
    kept = {key: mean for key, mean in BASE.items() if "untrained" not in "".join(key)}
    assert not any("untrained" in one or "training" in one for one in drift_sentences(told(kept)))


@pytest.mark.parametrize("pictures", [1, 2, 9, 10, 11])
def test_fewer_than_ten_pictures_have_no_interval(pictures):
    groups = [n % pictures for n in range(40)]
    mean, low, high = mean_interval(np.arange(40.0), groups)
    assert mean == 19.5 and (low is None) == (high is None) == (pictures < 10)


def test_rows_are_what_the_curves_say(drift):
    rows = {(one["run"], one["what"]): one for one in drift_rows(drift, last=3)}
    at = list(drift.layers).index(drift.positive_layer)
    plain, acted = (drift.curves[run]["toward_positive"] for run in ("greedy", "CLVA"))
    late = plain[:, -3:].mean(axis=1)
    assert rows["greedy", AWAY]["mean"] == pytest.approx((late - plain[:, at]).mean(), abs=1e-6)
    pull = acted[:, -3:].mean(axis=1) - late
    assert rows["CLVA", PULL]["mean"] == pytest.approx(pull.mean(), abs=1e-6)
    less = rows["greedy", AWAY]["mean"] - rows["untrained", AWAY]["mean"]
    assert rows["greedy", AWAY + LESS]["mean"] == pytest.approx(less, abs=1e-6)
    assert all(one["low"] <= one["mean"] <= one["high"] for one in rows.values())
