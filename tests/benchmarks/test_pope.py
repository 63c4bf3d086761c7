import json
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clva_lens.benchmarks.base import Answer, Sample, Score, choose, match
from clva_lens.benchmarks.pope import PopeFile, parse, pope_metrics, read_questions, score_pope
from clva_lens.errors import BenchmarkError, UnknownName

OFFICIAL = Path(__file__).parents[2].parent / "shared/data/pope/official"


# The "official" column of the parser table in the design notes, and what strict makes of it.
@pytest.mark.parametrize(
    ("text", "official", "strict"),
    [
        ("Yes.", "yes", "yes"),
        ("No.", "no", "no"),
        ("no", "no", "no"),
        ("No, there is not", "no", "no"),
        ("NO", "yes", "no"),
        ("No\n", "yes", "no"),
        ("\nNo", "yes", "no"),
        ("There isn't a dog", "yes", "other"),
        ("There is not a dog", "no", "other"),
        ("Nope", "yes", "other"),
        ("none", "yes", "other"),
        ("unknown", "yes", "other"),
        ("...snow", "yes", "other"),
        ("Yes, no doubt", "no", "yes"),
        ("Yes. There is no cat though", "yes", "yes"),
        ("", "yes", "other"),
        ("  **Yes**, it is", "yes", "yes"),
        ("_No_", "yes", "no"),
        ("no-one is there", "yes", "other"),
        ("yesterday", "yes", "other"),
    ],
)
def test_parsers_diverge_as_the_table_says(text, official, strict):
    assert parse(text, "official") == official
    assert parse(text) == strict


@given(st.text(), st.sampled_from(["yes", "no"]))
def test_parsers_answer_any_text(text, word):
    assert parse(text, "official") in ("yes", "no")
    assert parse(text) in ("yes", "no", "other")
    assert parse(f" '{word.upper()}', {text}") == word


def test_unknown_parser_names_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean 'official'"):
        parse("yes", "oficial")


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


ROWS = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a cup?", "label": "yes"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there a cat?", "label": "no"},
]


@pytest.mark.parametrize("array", [True, False])
def test_file_as_lines_or_array(tmp_path, array):
    path = tmp_path / "mini.json"
    lines = "\n".join(json.dumps(row) for row in ROWS)
    path.write_text(json.dumps(ROWS, indent=2) if array else lines + "\n")
    benchmark = PopeFile(path, tmp_path / "images", suffix=" One word.")
    sample = benchmark.samples()[1]
    assert benchmark.name == "pope/mini"
    assert sample == Sample(
        "2", tmp_path / "images" / "a.jpg", "Is there a cat? One word.", "no", "a.jpg"
    )
    score = benchmark.score(benchmark.samples(), [Answer("1", "Yes"), Answer("2", "Yes")])
    assert score.metrics["yes_ratio"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("yes\n", "neither JSON lines nor a JSON array"), ('{"label": "yes"}', "row 1 .* no image")],
)
def test_file_errors_name_the_file(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(BenchmarkError, match=message):
        read_questions(path)
    with pytest.raises(BenchmarkError, match=r"no POPE file .*absent\.json"):
        read_questions(tmp_path / "absent.json")


@pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason="un-skip when ../shared/data/pope/official is beside the checkout"
)
@pytest.mark.parametrize(
    "name",
    ["coco/coco_pope_adversarial.json", "aokvqa/aokvqa_pope_seem_random.json"],
)
def test_official_files(name):
    samples = PopeFile(OFFICIAL / name, "images").samples()
    # 500 images with 6 questions each, half of them "yes".
    assert Counter(s.label for s in samples) == {"yes": 1500, "no": 1500}
    assert set(Counter(s.group for s in samples).values()) == {6}
    score = score_pope(samples, [Answer(s.id, "Yes") for s in samples], "official")
    assert score.metrics["accuracy"] == 0.5
    assert score.metrics["f1"] == pytest.approx(2 / 3)
