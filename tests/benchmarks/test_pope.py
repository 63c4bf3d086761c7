import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clva_lens.benchmarks.base import Answer, Sample, Score, choose, match
from clva_lens.benchmarks.parsers import PARSERS
from clva_lens.benchmarks.pope import pope_metrics, score_pope
from clva_lens.ground.errors import BenchmarkError


def test_metrics_worked_by_hand():
    labels = ["yes"] * 4 + ["no"] * 4
    predictions = ["yes", "yes", "yes", "no", "yes", "no", "no", "other"]
    # TP 3, FP 1, TN 2, one "other" on a no-label, 4 yeses: accuracy (3 + 2) / 8, precision 3/4,
    # recall 3/4, F1 2·3 / (4 + 4), FPR 1/4.
    # AUC: yes-margins 4 3 2 0, no-margins 2 0 -1 -2: wins 4 + 4 + 3.5 + 2.5 = 14 of 16 pairs.
    margins = [4.0, 3.0, 2.0, 0.0, 2.0, 0.0, -1.0, -2.0]
    assert pope_metrics(labels, predictions, margins) == {
        "accuracy": 0.625,
        "precision": 0.75,
        "recall": 0.75,
        "f1": 0.75,
        "yes_ratio": 0.5,
        "false_positive_rate": 0.25,
        "auc": 14 / 16,
        "unparsed": 1,
        "n": 8,
    }


def test_undefined_metrics_are_nan_and_never_zero():
    # Always "no": no precision, so no F1; recall is a true 0.
    metrics = pope_metrics(["yes", "no"], ["no", "no"])
    assert math.isnan(metrics["precision"]) and math.isnan(metrics["f1"])
    assert math.isnan(metrics["auc"])
    assert (metrics["recall"], metrics["yes_ratio"], metrics["accuracy"]) == (0, 0, 0.5)
    # One yes, and it is wrong: precision 0, recall 0, so F1 is a true 0.
    assert pope_metrics(["yes", "no"], ["no", "yes"])["f1"] == 0
    # No yes-label: no recall; no no-label: no false-positive rate.
    assert math.isnan(pope_metrics(["no"], ["yes"])["recall"])
    assert math.isnan(pope_metrics(["yes"], ["yes"])["false_positive_rate"])
    assert math.isnan(pope_metrics(["yes", "no"], ["yes", "no"], [1.0, None])["auc"])
    assert math.isnan(pope_metrics(["yes", "no"], ["yes", "no"], [1.0, math.nan])["auc"])


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([], [], "0 samples"),
        (["yes"], [], "1 labels but 0 predictions"),
        (["Yes"], ["yes"], "label must be one of yes, no, but 'Yes'"),
        (["yes"], ["Yes."], r"prediction must be one of .* but 'Yes\.'.*parse"),
    ],
)
def test_metrics_refuse_what_they_cannot_count(labels, predictions, message):
    with pytest.raises(BenchmarkError, match=message):
        pope_metrics(labels, predictions)


def _samples(labels):
    return [
        Sample(id=str(n), image=None, question="Is it?", label=label, group=f"image {n // 2}")
        for n, label in enumerate(labels)
    ]


def test_score_keeps_raw_answers_and_counts_unparsed_under_any_parser():
    samples = _samples(["yes", "no", "no"])
    answers = [Answer("2", "NO", -1.0), Answer("0", "maybe", 0.5), Answer("1", "No", -2.0)]
    score = score_pope(samples, answers, "official")
    assert [row["answer"] for row in score.rows] == ["maybe", "No", "NO"]
    assert [row["prediction"] for row in score.rows] == ["yes", "no", "yes"]
    assert [row["strict"] for row in score.rows] == ["other", "no", "no"]
    assert score.metrics["unparsed"] == 1
    assert score.metrics["auc"] == 1
    assert score_pope(samples, answers, "strict").metrics["unparsed"] == 1
    assert "accuracy             0.6667" in repr(score)
    assert "undefined (nan)" in repr(Score({"f1": math.nan}, []))


def test_a_failed_sample_is_wrong_under_every_parser_and_no_answer():
    samples = _samples(["yes", "no"])
    answers = [Answer("0", "", error="out of memory"), Answer("1", "", error="no picture")]
    for parser in PARSERS.names():
        score = score_pope(samples, answers, parser)
        counts = [score.metrics[name] for name in ("accuracy", "failed", "unparsed", "yes_ratio")]
        assert counts == [0, 2, 0, 0]
        assert [row["error"] for row in score.rows] == ["out of memory", "no picture"]


def test_vcd_books_right_and_wrong_as_its_own_script_does():
    # Worked by VCD's rules. yes-labels: "Yes." right, "I know" wrong (a "no", so no yes answer);
    # no-labels: "I know" right, "Maybe" wrong (booked as a yes). TP 1, FN 1, TN 1, FP 1.
    texts = ["Yes.", "I know", "I know", "Maybe"]
    samples = _samples(["yes", "yes", "no", "no"])
    score = score_pope(samples, [Answer(str(i), t) for i, t in enumerate(texts)], "vcd")
    assert [row["right"] for row in score.rows] == [True, False, True, False]
    wanted = {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}
    assert {name: score.metrics[name] for name in wanted} == wanted
    assert score.metrics["unparsed"] == 3


def test_lmms_metrics_by_hand():
    # Labels yes yes yes no no; "Yes." is neither for lmms-eval. TP 1, FN 1 ("no"), FP 1:
    # precision 1/2, its recall 1/2 (the junk left out), F1 1/2, and a "yes ratio" of 3/5 whatever
    # was said. Ours: recall 1/3, F1 2 · 1 / (2 + 3), yes-ratio 2/5.
    texts = ["yes", "no", "Yes.", "yes", "no"]
    samples = _samples(["yes", "yes", "yes", "no", "no"])
    answers = [Answer(str(i), t) for i, t in enumerate(texts)]
    metrics = score_pope(samples, answers, "lmms").metrics
    assert [metrics[f"lmms_{name}"] for name in ("recall", "f1", "yes_ratio")] == [0.5, 0.5, 0.6]
    assert metrics["recall"] == pytest.approx(1 / 3)
    assert (metrics["f1"], metrics["yes_ratio"], metrics["accuracy"]) == (0.4, 0.4, 0.4)
    never = score_pope(samples, [Answer(str(i), "maybe") for i in range(5)], "lmms").metrics
    assert (never["lmms_recall"], never["lmms_f1"], never["accuracy"]) == (0, 0, 0)
    assert "lmms_recall" not in score_pope(samples, answers, "strict").metrics


@given(
    st.lists(
        st.tuples(st.sampled_from(["yes", "no"]), st.text(max_size=12)), min_size=1, max_size=8
    ),
    st.sampled_from(PARSERS.names()),
    st.randoms(use_true_random=False),
)
def test_order_does_not_matter_and_metrics_stay_in_their_bounds(rows, parser, random):
    samples = _samples([label for label, _ in rows])
    answers = [Answer(str(i), text, float(len(text))) for i, (_, text) in enumerate(rows)]
    score = score_pope(samples, answers, parser)
    turned = list(samples)
    random.shuffle(turned)
    random.shuffle(answers)
    assert score_pope(turned, answers, parser).metrics == pytest.approx(score.metrics, nan_ok=True)
    for name, value in score.metrics.items():
        top = len(rows) if name in ("unparsed", "failed", "n") else 1
        assert math.isnan(value) or 0 <= value <= top, name
    assert score.metrics["accuracy"] == sum(row["right"] for row in score.rows) / len(rows)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["0"], "1 of the 2 ids of the samples are missing from the answers: '1'"),
        (["0", "1", "9"], "1 of the 3 ids of the answers are missing from the samples: '9'"),
        (["0", "0", "1"], "'0' occurs more than once among the answers"),
    ],
)
def test_answers_must_match_the_samples(ids, message):
    with pytest.raises(BenchmarkError, match=message):
        match(_samples(["yes", "no"]), [Answer(i, "yes") for i in ids])


def test_limit_takes_whole_images():
    samples = _samples(["yes", "no"] * 10)
    chosen = choose(samples, 6, seed=1)
    assert sorted(Counter(s.group for s in chosen).values()) == [2, 2, 2]
    assert [int(s.id) for s in chosen] == sorted(int(s.id) for s in chosen)
    assert chosen == choose(samples, 6, seed=1) != choose(samples, 6, seed=2)
    assert choose(samples, None, seed=0) == samples
    with pytest.raises(BenchmarkError, match="limit=21, but this benchmark has 20"):
        choose(samples, 21, seed=0)
