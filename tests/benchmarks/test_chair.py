import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clva_lens as cl
from clva_lens.benchmarks.base import Answer, Sample
from clva_lens.benchmarks.chair import is_finished, label, score_captions, truncate, truth
from clva_lens.benchmarks.chair_reading import Reader
from clva_lens.benchmarks.chair_vocabulary import vocabulary
from clva_lens.benchmarks.comparison import compare
from clva_lens.benchmarks.toy_chair import ToyChair
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.toy.questions import caption
from clva_lens.toy.scenes import KINDS, sample_scenes

READER = Reader(vocabulary("builtin"), "builtin")
NODES = sorted(set(READER.vocabulary.nodes.values()))


def sample(name, objects):
    return Sample(name, None, "Describe.", label(objects), name, READER.name)


def score(pairs, **options):
    """Score (objects there, caption) pairs."""
    samples = [sample(str(i), objects) for i, (objects, _) in enumerate(pairs)]
    answers = [
        Answer(str(i), "", error=text.args[0])
        if isinstance(text, Exception)
        else Answer(str(i), text)
        for i, (_, text) in enumerate(pairs)
    ]
    return score_captions(samples, answers, READER, **options)


BY_HAND = [
    # person, dog, dog, frisbee; 2 of 2 objects found, 1 mention of 4 wrong
    ({"person", "dog"}, "A man and a dog. The dog has a frisbee."),
    # cup; 1 of 3 found
    ({"cup", "fork", "knife"}, "A cup."),
    # cat, couch, cat: 2 wrong, couch right; 1 of 1
    ({"couch"}, "A cat on a sofa, a kitten"),
    # nothing; 0 of 1
    ({"bus"}, ""),
]


def test_metrics_by_hand():
    found = score(BY_HAND).metrics
    assert found["chair_s"] == 2 / 4
    assert found["chair_i"] == 3 / 8
    assert found["recall"] == 4 / 7
    precision, recall = 5 / 8, 4 / 7
    assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    # 12 + 3 + 8 + 0 words and marks
    assert found["length"] == (12 + 3 + 8 + 0) / 4
    counts = {"failed": 0, "empty": 1, "unfinished": 1, "n": 4}
    assert {name: found[name] for name in counts} == counts


def test_rows_keep_what_was_read():
    row = score(BY_HAND).rows[2]
    assert row["mentioned"] == ["cat", "couch", "cat"]
    assert row["hallucinated"] == ["cat", "cat"]
    assert row["reader"] == "lemmatiser builtin, synonyms builtin, NLTK 3.10, truncation keep"
    json.dumps(row)


def test_a_failed_sample_counts_as_wrong_and_an_empty_caption_does_not():
    failed = score([({"dog"}, RuntimeError("out of memory")), ({"dog"}, "A dog.")]).metrics
    assert (failed["failed"], failed["empty"], failed["chair_s"]) == (1, 0, 1 / 2)
    assert (failed["recall"], failed["chair_i"], failed["length"]) == (1 / 2, 0, 3)
    empty = score([({"dog"}, " "), ({"dog"}, "A dog.")]).metrics
    assert (empty["failed"], empty["empty"], empty["chair_s"]) == (0, 1, 0)
    assert (empty["recall"], empty["length"]) == (1 / 2, 3 / 2)


def test_undefined_is_nan():
    found = score([(set(), "Nothing to see."), (set(), "")]).metrics
    assert math.isnan(found["chair_i"])
    assert math.isnan(found["recall"])
    assert math.isnan(found["f1"])
    assert found["chair_s"] == 0
    assert math.isnan(score([({"dog"}, ValueError("broken"))]).metrics["length"])
    # All mentions wrong and nothing found: F1 is 0, and defined.
    assert score([({"dog"}, "A cat.")]).metrics["f1"] == 0


def by_definition(pairs):
    """CHAIR from sets of the node words that make up a caption, in plain Python."""
    wrong = mentions = found = there = captions = 0
    for objects, named in pairs:
        bad = [node for node in named if node not in objects]
        wrong, mentions = wrong + len(bad), mentions + len(named)
        found, there = found + len(set(named) & objects), there + len(objects)
        captions += bool(bad)
    return {
        "chair_s": captions / len(pairs),
        "chair_i": wrong / mentions if mentions else math.nan,
        "recall": found / there if there else math.nan,
    }


SOME = st.sampled_from(["dog", "cat", "stop sign", "person", "hot dog", "toilet", "chair"])
PAIRS = st.lists(st.tuples(st.sets(SOME), st.lists(SOME, max_size=6)), min_size=1, max_size=6)


@given(PAIRS, st.randoms())
def test_laws(pairs, random):
    captions = [(objects, ", ".join(named) + ".") for objects, named in pairs]
    found = score(captions).metrics
    for name, value in by_definition(pairs).items():
        assert found[name] == pytest.approx(value, nan_ok=True)
        assert math.isnan(value) or 0 <= found[name] <= 1
    assert found["chair_i"] == 0 or found["chair_s"] > 0 or math.isnan(found["chair_i"])
    random.shuffle(captions)
    again = score(captions).metrics
    assert again == pytest.approx(found, nan_ok=True)


@given(st.lists(st.sets(st.sampled_from(NODES), min_size=1), min_size=1, max_size=5))
def test_naming_the_truth_is_perfect(truths):
    found = score([(objects, "There is " + ", ".join(objects) + ".") for objects in truths])
    assert (found.metrics["chair_i"], found.metrics["recall"]) == (0, 1)
    swapped = score([({"no such thing"}, ", ".join(objects)) for objects in truths])
    assert (swapped.metrics["chair_i"], swapped.metrics["chair_s"]) == (1, 1)


def test_labels_come_back():
    assert truth(label({"stop sign", "dog"})) == ["dog", "stop sign"]
    assert truth(label(set())) == []


TRUNCATED = {
    "A dog. It has a": "A dog.",
    "A dog. It runs.": "A dog. It runs.",
    'He says "stop." And': 'He says "stop."',
    "It costs 3.50 and": "",
    "A dog": "",
    "Really?! Yes": "Really?!",
    "": "",
}


@pytest.mark.parametrize("text", TRUNCATED)
def test_truncation(text):
    assert truncate(text, "drop_unfinished") == TRUNCATED[text]
    assert truncate(text, "keep") == text
    assert is_finished(text) == (TRUNCATED[text] == text)


def test_truncation_takes_mentions_away():
    cut = [({"dog"}, "A dog. It has a frisbee and a")]
    assert score(cut).metrics["chair_i"] == 1 / 2
    assert score(cut, truncation="drop_unfinished").metrics["chair_i"] == 0
    with pytest.raises(ParameterError, match="truncation must be one of keep, drop_unfinished"):
        score(cut, truncation="cut")


def test_the_truth_of_another_reader_is_refused():
    other = Reader(READER.vocabulary, "pattern")
    with pytest.raises(
        BenchmarkError, match=r"were read with lemmatiser builtin.*Make the samples"
    ):
        score_captions([sample("0", {"dog"})], [Answer("0", "A dog.")], other)


def test_comparison_is_a_paired_bootstrap_of_the_metrics():
    rng = np.random.default_rng(0)
    words = ["dog", "cat", "bus", "cup", "chair"]
    there = [set(rng.choice(words, 2, replace=False)) for _ in range(30)]
    drawn = [[rng.choice(words, n) for _ in there] for n in (3, 5)]
    a, b = ([(t, ", ".join(n)) for t, n in zip(there, named, strict=True)] for named in drawn)
    found = compare(score(a), score(b), resamples=400, seed=3)
    assert list(found.metrics) == ["chair_s", "chair_i", "recall", "f1", "length"]
    assert found.metrics["chair_i"].a == score(a).metrics["chair_i"]
    assert found.metrics["length"].difference.estimate == pytest.approx(4)  # 2 words, 2 commas
    # The interval from the definition, with the same draws of images.
    draws = np.random.default_rng(3).integers(0, 30, size=(400, 30))
    named = [[list(map(str, one)) for one in some] for some in drawn]
    differences = []
    for draw in draws:
        values = [by_definition([(there[i], some[i]) for i in draw])["chair_i"] for some in named]
        differences.append(values[1] - values[0])
    low, high = np.quantile(differences, [0.025, 0.975])
    change = found.metrics["chair_i"].difference
    assert (change.low, change.high) == (pytest.approx(low), pytest.approx(high))
    assert high - low > 0.05
    clean = [[not row["hallucinated"] for row in score(some).rows] for some in (a, b)]
    assert found.fixed == sum(y and not x for x, y in zip(*clean, strict=True))
    assert found.broken == sum(x and not y for x, y in zip(*clean, strict=True))
    assert "bias-matched" not in repr(found)
    assert "chair_i" in repr(found)


def test_scores_of_two_kinds_or_settings_are_not_compared():
    first = score(BY_HAND)
    other = score(BY_HAND, truncation="drop_unfinished")
    with pytest.raises(BenchmarkError, match="the reader of '0' is 'lemmatiser builtin"):
        compare(first, other)
    yes_no = replace(first, rows=[{"id": "0", "label": "yes"}])
    with pytest.raises(BenchmarkError, match="of one kind, but are: caption, yes/no"):
        compare(first, yes_no)


def test_the_toy_is_exact():
    benchmark = ToyChair(count=40)
    samples = benchmark.samples()
    scenes = sample_scenes(40, benchmark.seed)
    told = [
        Answer(one.id, caption(scene).answer) for one, scene in zip(samples, scenes, strict=True)
    ]
    found = benchmark.score(samples, told).metrics
    assert (found["chair_s"], found["chair_i"], found["recall"]) == (0, 0, 1)
    every = [Answer(one.id, f"there is {', '.join(KINDS)}.") for one in samples]
    found = benchmark.score(samples, every).metrics
    present = sum(len(scene.kinds) for scene in scenes)
    assert found["chair_i"] == pytest.approx(1 - present / (40 * len(KINDS)))
    assert (found["chair_s"], found["recall"]) == (1, 1)


def test_the_toy_runs_for_real():
    model = cl.load("toy-llava")
    runs = [
        cl.evaluate(model, "chair/toy", method, limit=24, progress=False)
        for method in (None, cl.KnockOut())
    ]
    greedy, blind = (run.metrics for run in runs)
    assert (greedy["n"], greedy["failed"], greedy["unfinished"]) == (24, 0, 0)
    assert greedy["recall"] > 0.7
    assert blind["chair_i"] > greedy["chair_i"] + 0.3
    change = cl.compare(runs[0].score, runs[1].score).metrics["chair_s"].difference
    assert change.low > 0.2
