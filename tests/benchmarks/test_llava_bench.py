import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clva_lens.benchmarks.base import Answer, Sample
from clva_lens.benchmarks.chair_reading import Reader
from clva_lens.benchmarks.chair_vocabulary import vocabulary
from clva_lens.benchmarks.files import write_lines
from clva_lens.benchmarks.llava_bench import LlavaBench, score_objects
from clva_lens.benchmarks.llava_judge import (
    Judgement,
    judge_requests,
    parse_judgement,
    read_judgements,
    score_judgements,
)
from clva_lens.benchmarks.protocols import VICUNA_V1
from clva_lens.ground.errors import BenchmarkError, ParameterError

DATA = Path(__file__).parents[2].parent / "shared/data/llava_bench"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="un-skip when ../shared/data is beside the checkout"
)


@pytest.fixture
def bench(tmp_path):
    """One picture with a question of each category, in the layout of the COCO part."""
    questions = [
        {"question_id": n, "image": "7.jpg", "text": f"What {n}?", "category": category}
        for n, category in enumerate(("conv", "detail", "complex"))
    ]
    write_lines(tmp_path / "qa90_questions.jsonl", questions)
    write_lines(
        tmp_path / "qa90_gpt4_answer.jsonl",
        [{"question_id": n, "text": f"reference {n}"} for n in range(3)],
    )
    context = {
        "image": "7.jpg",
        "captions": ["A cat.", "A mat."],
        "instances": [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}],
    }
    write_lines(tmp_path / "caps_boxes_coco2014_val_80.jsonl", [context])
    (tmp_path / "images").mkdir()
    pixels = np.zeros((4, 4, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images/COCO_val2014_7.jpg")
    rules = {
        name: {"role": "Assistant", "prompt": f"Judge {name}."}
        for name in ("conv", "detail", "complex")
    }
    (tmp_path / "rule.json").write_text(json.dumps(rules))
    return LlavaBench("coco", data=tmp_path)


ANSWERS = [Answer("0", "one two three"), Answer("1", ""), Answer("2", "", error="no memory")]


def test_samples_and_lengths(bench):
    samples = bench.samples()
    assert [(s.id, s.label, s.category) for s in samples] == [
        ("0", "reference 0", "conv"),
        ("1", "reference 1", "detail"),
        ("2", "reference 2", "complex"),
    ]
    assert samples[0].image.name == "COCO_val2014_7.jpg"
    assert (samples[0].question, samples[0].system) == ("What 0?", VICUNA_V1)
    assert bench.max_new_tokens == 1024 and len(bench.digests()) == 3
    metrics = bench.score(samples, ANSWERS).metrics
    # Three words and none over the two that were answered.
    assert (metrics["words"], metrics["words/conv"], metrics["words/detail"]) == (1.5, 3, 0)
    assert math.isnan(metrics["words/complex"])
    assert (metrics["empty"], metrics["failed"], metrics["n"]) == (1, 1, 3)


def test_llavas_answers_are_read_and_compared(bench, tmp_path):
    rows = [{"question_id": n, "prompt": f"What {n}?", "text": f"A {n}"} for n in (2, 0, 1)]
    write_lines(tmp_path / "answers.jsonl", rows)
    assert bench.read_answers(tmp_path / "answers.jsonl")[0] == Answer("2", "A 2")
    write_lines(tmp_path / "answers.jsonl", [rows[0] | {"prompt": "What 1?"}])
    with pytest.raises(BenchmarkError, match=r"row 1 .* 'What 1\?'.* asks 'What 2\?'"):
        bench.read_answers(tmp_path / "answers.jsonl")


@needs_data
def test_the_published_references_are_read_as_answers():
    wild = LlavaBench("wild", data=DATA)
    answers = wild.read_answers(DATA / "wild/answers_gpt4.jsonl")
    assert [answer.text for answer in answers] == [sample.label for sample in wild.questions()]


def test_judge_requests_are_llavas_to_the_letter(bench, tmp_path):
    samples = bench.samples()
    requests = judge_requests(bench, samples, ANSWERS, tmp_path / "rule.json")
    assert [request["question_id"] for request in requests] == ["0", "1"]
    system, user = requests[0]["messages"]
    assert system["content"].startswith("You are a helpful and precise assistant for checking")
    assert user["content"] == (
        "[Context]\nA cat.\nA mat.\n\ncat: [0.1, 0.2, 0.3, 0.4]\n\n"
        "[Question]\nWhat 0?\n\n"
        "[Assistant 1]\nreference 0\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\none two three\n\n[End of Assistant 2]\n\n"
        "[System]\nJudge conv.\n\n"
    )
    assert (requests[0]["temperature"], requests[0]["max_tokens"]) == (0.2, 1024)
    (tmp_path / "rule.json").write_text("{}")
    with pytest.raises(BenchmarkError, match=r"'0' \(7.jpg, conv\) has no rule"):
        judge_requests(bench, samples, ANSWERS, tmp_path / "rule.json")
    (tmp_path / "rule.json").write_text("[]")
    with pytest.raises(BenchmarkError, match="holds no JSON object"):
        judge_requests(bench, samples, ANSWERS, tmp_path / "rule.json")


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 9\nBoth", (8, 9)),
        ("8.5,9", (8.5, 9)),
        ("8, 9", None),  # the comma becomes a space, and two spaces are too many
        ("8 9 ", None),
        ("\n8 9", None),
        ("Assistant 1: 8", None),
        ("nan 3", None),
        ("", None),
    ],
)
def test_replies_are_read_by_llavas_rule(text, scores):
    assert parse_judgement(text) == scores


def test_failed_judgements_are_counted_and_kept_out(bench, tmp_path):
    samples = [
        Sample(str(n), None, "?", "ref", "7.jpg", category)
        for n, category in enumerate(("conv", "conv", "detail", "complex"))
    ]
    path = tmp_path / "reviews.jsonl"
    rows = [
        {"question_id": 0, "content": "8 6\nGood.", "tuple": [8, 6]},
        {"question_id": 1, "text": "I cannot judge."},
        {"question_id": 2, "content": "10 5"},
    ]
    write_lines(path, rows)
    judgements = read_judgements(path)
    assert judgements[1] == Judgement("1", None, None, "I cannot judge.")
    score = score_judgements(samples, judgements)
    metrics = score.metrics
    # conv: 6 / 8; with (-1, -1) averaged in: 2.5 / 3.5 = 71.4. all: 11 / 18, and 10 / 17 = 58.8.
    assert (metrics["conv"], metrics["conv/official"]) == (75, 71.4)
    assert metrics["all"] == pytest.approx(100 * 11 / 18)
    assert (metrics["all/official"], metrics["detail"]) == (58.8, 50)
    assert math.isnan(metrics["complex"]) and math.isnan(metrics["complex/official"])
    assert (metrics["failed"], metrics["missing"], metrics["n"]) == (1, 1, 4)
    assert score.rows[3]["reply"] is None
    with pytest.raises(BenchmarkError, match=r"1 samples have several \['0'\]"):
        score_judgements(samples, [*judgements, judgements[0]])
    with pytest.raises(BenchmarkError, match=r"1 are to no sample \['9'\]"):
        score_judgements(samples, [Judgement("9", 1.0, 1.0, "1 1")])


# As LLaVA's eval_gpt_review_bench.py writes them, and as FastChat did before.
REVIEWS = {
    "tuple and content": {"content": "9 7\nBoth are good.", "tuple": [9.0, 7.0]},
    "tuple alone": {"tuple": [9, 7]},
    "text and score": {"text": "9,7\nBoth.", "score": [9.0, 7.0]},
    "text alone": {"text": "9 7"},
    "mended by hand": {"content": "Assistant 1: 9, assistant 2: 7", "tuple": [9.0, 7.0]},
    "failed": {"content": "I cannot judge.", "tuple": [-1, -1]},
    "failed, scores alone": {"tuple": [-1, -1]},
}


@pytest.mark.parametrize("layout", REVIEWS)
def test_llavas_reviews_are_read_and_scored(bench, layout, tmp_path):
    row = {"id": 1, "question_id": 0, "answer1_id": "Mh6", "answer2_id": "bf8"}
    path = tmp_path / "reviews.jsonl"
    write_lines(path, [{**row, "category": "llava_bench_conv", **REVIEWS[layout]}])
    metrics = score_judgements(bench.questions(), read_judgements(path)).metrics
    failed = layout.startswith("failed")
    assert (metrics["failed"], metrics["missing"]) == (failed, 2)
    # What LLaVA's summarize_gpt_review.py prints of it: 7 / 9, or −1 / −1.
    assert metrics["conv/official"] == (100.0 if failed else 77.8)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"content": "9 7", "tuple": [9, 8]}, r"row 1 .* scores \[9, 8\], but .* begins with 9 7"),
        ({"content": "9 7", "tuple": [-1, -1]}, r"row 1 .* scores \[-1, -1\], but"),
        ({"tuple": [9]}, r"row 1 .* scores \[9\], but they are two"),
        ({"tuple": "9 7"}, r"row 1 .* scores '9 7'"),
        ({"content": 9}, r"row 1 .* no reply"),
    ],
)
def test_reviews_that_contradict_themselves_are_refused(more, message, tmp_path):
    write_lines(tmp_path / "reviews.jsonl", [{"question_id": 0, **more}])
    with pytest.raises(BenchmarkError, match=message):
        read_judgements(tmp_path / "reviews.jsonl")


def test_llavas_own_answers_are_read(bench, tmp_path):
    rows = [
        {
            "question_id": n,
            "prompt": f"What {n}?",
            "text": "A b c.",
            "answer_id": "X",
            "model_id": "llava-v1.5-7b",
            "metadata": {},
        }
        for n in range(3)
    ]
    write_lines(tmp_path / "answers.jsonl", rows)
    score = bench.score(bench.questions(), bench.read_answers(tmp_path / "answers.jsonl"))
    assert (score.metrics["words"], score.metrics["n"]) == (3, 3)


def test_corrupted_replies_and_missing_files_are_named(bench, tmp_path):
    path = tmp_path / "reviews.jsonl"
    path.write_text('{"question_id": 0, "content": "8 6"}\n{"question_id": 1, "cont')
    with pytest.raises(BenchmarkError, match="line 2"):
        read_judgements(path)
    path.write_text('{"question_id": 0, "category": "conv"}\n')
    with pytest.raises(BenchmarkError, match=r"row 1 .* has no reply"):
        read_judgements(path)
    write_lines(tmp_path / "qa90_gpt4_answer.jsonl", [{"question_id": 0, "text": "reference"}])
    with pytest.raises(BenchmarkError, match="2 of 3 questions have no reference answer"):
        bench.questions()
    (tmp_path / "images/COCO_val2014_7.jpg").unlink()
    write_lines(
        tmp_path / "qa90_gpt4_answer.jsonl", [{"question_id": n, "text": "r"} for n in range(3)]
    )
    with pytest.raises(BenchmarkError, match=r"1 of 1 images are missing .*: 7\.jpg\."):
        bench.samples()
    with pytest.raises(BenchmarkError, match=r"file questions\.jsonl of llava-bench/wild was not"):
        LlavaBench("wild", data=tmp_path).questions()
    with pytest.raises(ParameterError, match="part must be one of coco, wild"):
        LlavaBench("home")


@needs_data
@pytest.mark.parametrize(
    ("part", "counts"),
    [
        ("coco", {"conv": 30, "detail": 30, "complex": 30}),
        ("wild", {"conv": 17, "detail": 15, "complex": 28}),
    ],
)
def test_the_published_parts(part, counts):
    bench = LlavaBench(part, data=DATA)
    samples = bench.questions()
    assert Counter(s.category for s in samples) == counts
    answers = [Answer(s.id, "It is a cat.") for s in samples]
    requests = judge_requests(bench, samples, answers, DATA / "rule.json")
    assert len(requests) == len(samples)
    body = requests[0]["messages"][1]["content"]
    assert body.startswith("[Context]\n") and samples[0].label in body
    assert body.count("[End of Assistant") == 2
    perfect = [Judgement(s.id, 9.0, 9.0, "9 9") for s in samples]
    assert score_judgements(samples, perfect).metrics["all"] == 100


@needs_data
def test_objects_of_the_coco_part():
    """Naming what is there is no hallucination, naming a toaster is; wild has no boxes."""
    bench = LlavaBench("coco", data=DATA)
    samples = bench.questions()
    reader = Reader(vocabulary("builtin"), "builtin")
    present = bench.objects(reader)
    assert not any("toaster" in objects.split(",") for objects in present.values())
    named = [f"There is a {present[s.group].replace(',', ' and a ')}." for s in samples]
    answers = [Answer(s.id, text) for s, text in zip(samples, named, strict=True)]
    true = score_objects(bench, samples, answers)
    assert true.metrics["chair_i"] == 0
    assert true.metrics["recall"] == 1
    invented = [Answer(one.id, f"{one.text} A toaster.") for one in answers]
    toaster = score_objects(bench, samples, invented)
    assert toaster.metrics["chair_s"] == 1
    mentions = sum(len(present[s.group].split(",")) for s in samples)
    assert toaster.metrics["chair_i"] == pytest.approx(len(samples) / (mentions + len(samples)))
    with pytest.raises(BenchmarkError, match="no boxes"):
        LlavaBench("wild", data=DATA).objects(reader)
