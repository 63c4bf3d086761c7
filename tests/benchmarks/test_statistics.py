import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clva_lens.benchmarks.base import Answer, Sample
from clva_lens.benchmarks.comparison import compare
from clva_lens.benchmarks.metrics import METRICS, Outcomes
from clva_lens.benchmarks.parsers import PARSERS
from clva_lens.benchmarks.pope import pope_metrics, score_pope
from clva_lens.benchmarks.readouts import READOUTS, TEXT
from clva_lens.benchmarks.run_folder import Report
from clva_lens.benchmarks.statistics import (
    auc,
    best_threshold_accuracy,
    bias_matched_accuracy,
    bootstrap_interval,
    mcnemar,
    paired_bootstrap,
    wilson_interval,
)
from clva_lens.experiments.measuring import _metric_rows, one, points
from clva_lens.figures.differences import differences
from clva_lens.ground.errors import BenchmarkError, UnknownName

# Rows of a run: label, prediction and a margin from few values, so that ties are common.
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["yes", "no"]),
        st.sampled_from(["yes", "no", "other"]),
        st.integers(-2, 2).map(float),
    ),
    min_size=1,
    max_size=12,
)


def columns(rows):
    return tuple(list(column) for column in zip(*rows, strict=True))


def auc_by_definition(margins, labels):
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, label_a in zip(margins, labels, strict=True)
        for b, label_b in zip(margins, labels, strict=True)
        if (label_a, label_b) == ("yes", "no")
    ]
    return sum(pairs) / len(pairs) if pairs else math.nan


@given(ROWS)
def test_auc_is_the_share_of_ordered_pairs(rows):
    labels, _, margins = columns(rows)
    wanted = auc_by_definition(margins, labels)
    assert auc(margins, labels) == pytest.approx(wanted, nan_ok=True)
    # Any increasing function keeps it; the opposite sign mirrors it.
    assert auc(np.exp(margins), labels) == pytest.approx(wanted, nan_ok=True)
    assert auc(-np.array(margins), labels) == pytest.approx(1 - wanted, nan_ok=True)


def test_auc_refuses_unlike_lengths_and_strange_labels():
    with pytest.raises(BenchmarkError, match=r"shape \(2,\) but labels \(1,\)"):
        auc([1.0, 2.0], ["yes"])
    with pytest.raises(BenchmarkError, match="but 'maybe' was found"):
        auc([1.0], ["maybe"])


@given(ROWS, st.data())
def test_weighted_metrics_are_the_metrics_of_repeated_rows(rows, data):
    times = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    if not sum(times):
        times[0] = 1
    repeated = [row for row, count in zip(rows, times, strict=True) for _ in range(count)]
    plain = pope_metrics(*columns(repeated))
    weights = np.array([times], dtype=float)
    for name, metric in METRICS.items():
        value = metric(Outcomes.of(*columns(rows)), weights)[0]
        assert value == pytest.approx(plain[name], nan_ok=True), name


def test_wilson_interval():
    # At 0 of n the upper end is z² / (n + z²) = 3.8415 / 13.8415.
    assert wilson_interval(0, 10) == (0.0, pytest.approx(0.27753, abs=1e-5))
    assert wilson_interval(10, 10) == (pytest.approx(1 - 0.27753, abs=1e-5), 1.0)
    # Centre (0.5 + z²/200) / (1 + z²/100) = 0.5, half z √(1/400 + z²/40000) / 1.038415 = 0.0962.
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    with pytest.raises(BenchmarkError, match="3 successes of 2 trials"):
        wilson_interval(3, 2)
    with pytest.raises(BenchmarkError, match=r"confidence=95"):
        wilson_interval(1, 2, confidence=95.0)


def test_mcnemar_is_exact():
    # 2 · Σ_{k≤7} C(17, k) / 2¹⁷ = 2 · 41226 / 131072.
    assert mcnemar(10, 7) == mcnemar(7, 10) == pytest.approx(2 * 41226 / 131072)
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    with pytest.raises(BenchmarkError, match="fixed=-1"):
        mcnemar(-1, 0)


def test_bias_matched_accuracy_by_hand():
    margins, labels = [3.0, 2.0, 1.0, -1.0, -2.0], ["yes", "no", "yes", "yes", "no"]
    # Three yeses: right, wrong, right, wrong, right. Four yeses: only the second is wrong.
    assert bias_matched_accuracy(margins, labels, 3) == pytest.approx(3 / 5)
    assert bias_matched_accuracy(margins, labels, 4) == pytest.approx(4 / 5)
    predictions = ["yes", "yes", "no", "yes", "yes"]
    assert bias_matched_accuracy(margins, labels, predictions) == pytest.approx(4 / 5)
    assert best_threshold_accuracy(margins, labels) == pytest.approx(4 / 5)
    # Two yeses of 1 0 0 -1: the tied pair shares one yes, so each is right with one half.
    assert bias_matched_accuracy([1, 0, 0, -1], ["yes", "yes", "no", "no"], 2) == 3 / 4
    with pytest.raises(BenchmarkError, match="yes_count=6, but there are 5"):
        bias_matched_accuracy(margins, labels, 6)
    with pytest.raises(BenchmarkError, match="1 of 2 margins are missing"):
        bias_matched_accuracy([1.0, math.nan], ["yes", "no"], 1)
    with pytest.raises(BenchmarkError, match="5 labels but 1 predictions"):
        bias_matched_accuracy(margins, labels, ["yes"])
    with pytest.raises(BenchmarkError, match="margin is missing"):
        best_threshold_accuracy([math.nan], ["yes"])


@given(ROWS, st.data())
def test_no_threshold_beats_the_best_one(rows, data):
    labels, _, margins = columns(rows)
    target = data.draw(st.integers(0, len(rows)))
    best = best_threshold_accuracy(margins, labels)
    assert bias_matched_accuracy(margins, labels, target) <= best + 1e-12
    cuts = [*margins, math.inf]
    accuracy = [
        np.mean([(m >= cut) == (la == "yes") for m, la in zip(margins, labels, strict=True)])
        for cut in cuts
    ]
    assert best == pytest.approx(max(accuracy))


def test_paired_interval_by_enumeration():
    # Two images: B fixes the only answer of the first, both are right on the second. A resample
    # draws (1,1), (1,2), (2,1) or (2,2): differences 1, ½, ½, 0, so 95 % reach from 0 to 1.
    a = Outcomes.of(["yes", "no"], ["no", "no"])
    b = Outcomes.of(["yes", "no"], ["yes", "no"])
    interval = paired_bootstrap("accuracy", a, b, ["x", "y"], seed=3)
    assert interval[:6] == (0.5, 0.0, 1.0, 0.95, 2000, 3)
    # F1 of A is nan in every resample: it never says yes.
    undefined = paired_bootstrap("f1", a, b, resamples=50)
    assert math.isnan(undefined.estimate) and math.isnan(undefined.low)
    assert undefined.undefined == 50


def run(seed, n=120):
    rng = np.random.default_rng(seed)
    labels = ["yes", "no"] * (n // 2)
    margins = rng.normal(size=n) + np.tile([0.7, -0.7], n // 2)
    return Outcomes.of(labels, ["yes" if m > 0 else "no" for m in margins], margins.tolist())


@pytest.mark.parametrize("metric", METRICS)
def test_paired_interval_of_a_run_with_itself_is_zero(metric):
    interval = paired_bootstrap(metric, run(0), run(0), resamples=40)
    assert interval[:3] == (0, 0, 0)


def test_bootstrap_is_reproducible_pairs_and_widens_with_groups():
    a, b = run(0), run(1)
    forward = paired_bootstrap("auc", a, b, seed=1, resamples=300)
    assert forward == paired_bootstrap("auc", a, b, seed=1, resamples=300)
    assert forward != paired_bootstrap("auc", a, b, seed=2, resamples=300)
    backward = paired_bootstrap("auc", b, a, seed=1, resamples=300)
    assert (backward.low, backward.high) == pytest.approx((-forward.high, -forward.low))
    assert forward.low < forward.estimate < forward.high
    # Ten copies of every row: rows would claim √10 more certainty, groups know better.
    many = Outcomes(*(np.repeat(c, 10) for c in vars(a).values()))
    groups = np.repeat(np.arange(120), 10).tolist()
    by_row = bootstrap_interval("accuracy", many, resamples=300)
    by_group = bootstrap_interval("accuracy", many, groups, resamples=300)
    assert (by_group.high - by_group.low) > 2 * (by_row.high - by_row.low)


def test_interval_agrees_with_theory():
    # 120 independent answers: the bootstrap interval is near accuracy ± 1.96 √(p (1 − p) / n).
    a = run(0)
    p = float(a.correct.mean())
    half = 1.96 * math.sqrt(p * (1 - p) / 120)
    interval = bootstrap_interval("accuracy", a)
    assert (interval.low, interval.high) == pytest.approx((p - half, p + half), abs=0.012)


def test_own_metric_and_unknown_metric():
    # A metric may be any function of a run and weights, here the mean of plain numbers.
    def mean(values, weights):
        return weights @ values / weights.sum(axis=1)

    a, b = run(0), run(1)
    by_name = paired_bootstrap("yes_ratio", a, b, resamples=30)
    by_hand = bootstrap_interval(
        lambda run, weights: mean(b.predicted_yes - run.predicted_yes, weights), a, resamples=30
    )
    assert by_hand == pytest.approx(by_name)
    with pytest.raises(UnknownName, match=r"no metric 'acc'\. Known: accuracy"):
        bootstrap_interval("acc", a)


def test_bootstrap_refuses_what_cannot_be_paired():
    with pytest.raises(BenchmarkError, match=r"different labels.*compare"):
        paired_bootstrap("accuracy", Outcomes.of(["yes"], ["no"]), Outcomes.of(["no"], ["no"]))
    with pytest.raises(BenchmarkError, match="1 group cannot be resampled"):
        bootstrap_interval("accuracy", run(0), ["one image"] * 120)
    with pytest.raises(BenchmarkError, match="120 rows but 1 groups"):
        bootstrap_interval("accuracy", run(0), ["one image"])
    with pytest.raises(BenchmarkError, match="resamples=0"):
        bootstrap_interval("accuracy", run(0), resamples=0)
    with pytest.raises(BenchmarkError, match="2 labels, 1 predictions and no margins"):
        Outcomes.of(["yes", "no"], ["yes"])


def score(texts, margins, labels=("yes", "yes", "no", "no"), parser="official", group=""):
    samples = [Sample(str(n), None, "Is it?", label, group) for n, label in enumerate(labels)]
    answers = [Answer(str(n), t, m) for n, (t, m) in enumerate(zip(texts, margins, strict=True))]
    return score_pope(samples, answers, parser)


def test_comparison_by_hand():
    a = score(["Yes", "No", "No", "No"], [2.0, -1.0, -0.5, -2.0])
    b = score(["Yes", "Yes", "Yes", "No"], [3.0, 1.0, 0.5, -1.0])
    result = compare(a, b, resamples=200)
    # A: one yes missed, 3/4 right. B: that one fixed, one no broken, 3/4 right.
    assert result.metrics["accuracy"][:2] == (0.75, 0.75)
    assert result.metrics["yes_ratio"][:2] == (0.25, 0.75)
    # AUC of A: pairs (2, -.5) (2, -2) (-1, -2) won, (-1, -.5) lost. All of B's are won.
    assert result.metrics["auc"][:2] == (0.75, 1.0)
    # F1 of A 2·1 / (1 + 2), of B 2·2 / (3 + 2).
    assert result.metrics["f1"][:2] == pytest.approx((2 / 3, 4 / 5))
    assert (result.fixed, result.broken, result.p_value) == (1, 1, 1.0)
    # A with three yeses: 2, -0.5 and -1, so 3/4 right: B gains nothing beyond the shift.
    assert result.bias_matched_accuracy == 0.75
    assert result.beyond_bias is not None and result.beyond_bias.estimate == 0
    assert (result.n, result.groups) == (4, 4)
    assert "yes_ratio    0.2500   0.7500  +0.5000" in repr(result)
    assert "bias-matched accuracy of A 0.7500" in repr(result)


@pytest.mark.parametrize(
    ("texts", "margins", "why"),
    [
        ("Yes No No No", [None] * 4, "it lacks the margins of 4 of its 4 yes/no answers"),
        ("Yes No ? No", [1.0, None, 0.0, -1.0], "the margins of 1 of its 3 yes/no answers"),
        ("? ? ? ?", [1.0] * 4, "none of its 4 answers is a yes or a no"),
        ("Yes No No Yes", [2.0, 1.0, -1.0, -2.0], "1 of its 4 yes/no answers contradict"),
        ("Yes No ? ?", [1.0, 1.0, 0.0, 2.0], "1 of its 2 yes/no answers contradict"),
    ],
)
def test_without_a_threshold_nothing_is_matched(texts, margins, why):
    a = score(texts.split(), margins, parser="strict")
    b = score(["Yes"] * 4, [1.0] * 4, parser="strict")
    for other in (a, b):
        result = compare(a, other, resamples=20)
        assert result.bias_matched_accuracy is None and result.beyond_bias is None
        assert result.no_threshold is not None and why in result.no_threshold
        assert f"undefined, because A has no threshold to move: {result.no_threshold}" in repr(
            result
        )


def test_a_shift_leaves_unread_answers_as_they_are():
    a = score(["Yes", "?", "No", "No"], [2.0, None, -0.5, -2.0], parser="strict")
    # B reads "?" and, of the three others, says one yes more: so A does, to -0.5, a no.
    b = score(["Yes", "Yes", "Yes", "No"], [2.0, 1.0, 0.5, -2.0], parser="strict")
    result = compare(a, b, resamples=20)
    assert result.bias_matched_accuracy == 2 / 4 and result.no_threshold is None
    assert result.beyond_bias is not None and result.beyond_bias.estimate == 1 / 4
    assert result.unread == 1 and "1 answers of A are neither yes nor no" in repr(result)


def measured(a, b):
    reports = [Report(each.metrics, each.rows, {"seconds": 1.0}) for each in (a, b)]
    rows = _metric_rows(reports[1], reports[0], compare(a, b, resamples=20))
    return [{"benchmark": "b", "method": "m", **row} for row in rows]


def test_what_is_undefined_is_no_number_in_rows_and_figures():
    a = score(["Yes", "No", "No", "Yes"], [2.0, 1.0, -1.0, -2.0])
    rows = measured(a, a)
    for metric in ("beyond_bias", "bias_matched_accuracy"):
        row = one(rows, metric=metric)
        assert row["value"] is row["change"] is row["low"] is row["high"] is None
    assert points(one(rows, metric="beyond_bias")) == "undefined"
    drawn = differences(rows, ["accuracy", "beyond_bias"])
    assert [[text.get_text() for text in ax.texts] for ax in drawn.axes] == [[], ["undefined"]]
    greedy = score(["Yes", "No", "No", "No"], [2.0, -1.0, -1.5, -2.0])
    assert one(measured(greedy, greedy), metric="beyond_bias")["change"] == 0


def test_comparison_pairs_by_id_and_refuses_mismatch():
    texts, margins = ["Yes", "No", "No", "No"], [2.0, -1.0, -0.5, -2.0]
    a, b = score(texts, margins), score(texts, margins)
    b.rows.reverse()
    assert compare(a, b, resamples=20).fixed == 0
    with pytest.raises(BenchmarkError, match=r"4 ids of the rows of A are missing .*: '3'"):
        compare(a, score(texts[:3], margins[:3], ("yes", "yes", "no")))
    with pytest.raises(BenchmarkError, match="label of '1' is 'yes' in A but 'no' in B"):
        compare(a, score(texts, margins, ("yes", "no", "no", "no")))
    with pytest.raises(BenchmarkError, match="parser of '0' is 'official' in A but 'strict' in B"):
        compare(a, score(texts, margins, parser="strict"))
    with pytest.raises(BenchmarkError, match="at least 2 are needed"):
        compare(score(texts, margins, group="x"), score(texts, margins, group="x"))


@settings(max_examples=20)
@given(ROWS.filter(lambda rows: len(rows) > 1), st.integers(0, 5))
def test_comparison_with_itself_is_null(rows, seed):
    labels, predictions, margins = columns(rows)
    same = score(predictions, margins, labels, "strict")
    result = compare(same, same, resamples=20, seed=seed)
    assert (result.fixed, result.broken) == (0, 0)
    for pair in result.metrics.values():
        assert pair.difference.estimate == 0 or math.isnan(pair.difference.estimate)
    assert null_or_undefined(result)


def null_or_undefined(result):
    """Whether a method gains exactly nothing beyond its own bias, or it is said why not."""
    if result.no_threshold is not None:
        return result.beyond_bias is None and result.bias_matched_accuracy is None
    exact = result.metrics["accuracy"].a == result.bias_matched_accuracy
    return exact and result.beyond_bias[:3] == (0, 0, 0)


def said(kind, margins, rng):
    """Answers to margins: what a greedy, a sampling or a rambling model says, and failures."""
    greedy = ["Yes." if margin > 0 else "No" for margin in margins]
    if kind == "greedy":
        return greedy
    if kind == "sampled":
        return ["Yes." if rng.random() < 1 / (1 + math.exp(-m)) else "No" for m in margins]
    other = {"unparsed": ["perhaps", ""], "failed": [None]}[kind]
    return [rng.choice(other) if rng.random() < 0.3 else text for text in greedy]


@pytest.mark.parametrize("kind", ["greedy", "sampled", "unparsed", "failed"])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("parser", PARSERS.names())
def test_no_score_gains_anything_over_itself(parser, readout, kind):
    rng = random.Random(0)
    margins = [rng.gauss(0, 1) for _ in range(60)]
    samples = [
        Sample(str(n), None, "Is it?", "yes" if margin + rng.gauss(0, 1) > 0 else "no", str(n // 3))
        for n, margin in enumerate(margins)
    ]
    texts = said(kind, margins, rng)
    answers = [
        Answer(str(n), "", error="no memory") if text is None else Answer(str(n), text, margin)
        for n, (text, margin) in enumerate(zip(texts, margins, strict=True))
    ]
    a = score_pope(samples, answers, parser, readout)
    result = compare(a, a, resamples=50)
    assert null_or_undefined(result)
    if readout != TEXT:  # answers are those of the margins, whatever the words say
        assert result.no_threshold is None
        return
    # Greedy answers have a threshold, by whichever rule they read "Yes." and "No"; drawn have none.
    if kind in ("greedy", "failed"):
        assert result.no_threshold is None
    elif kind == "sampled" and parser != "lmms":
        assert "contradict its margins" in result.no_threshold
