import json
import math
from collections import Counter
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from clva_lens.__main__ import app
from clva_lens.benchmarks.base import BENCHMARKS, Answer, Sample
from clva_lens.benchmarks.comparison import compare
from clva_lens.benchmarks.mme import COGNITION, HALLUCINATION, PERCEPTION, Mme, score_mme
from clva_lens.benchmarks.mme_answers import read_mme_answers
from clva_lens.benchmarks.mme_files import read_results, write_results
from clva_lens.benchmarks.toy_mme import ToyMme
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.toy.questions import vocabulary

DATA = Path(__file__).parents[2].parent / "shared/data"
needs_data = pytest.mark.skipif(
    not (DATA / "mme").is_dir(), reason="un-skip when ../shared/data is beside the checkout"
)


def pair(task, name):
    return [
        Sample(f"{task}/{name}/{n}", None, f"Is it {n}?", label, f"{task}/{name}", task)
        for n, label in ((1, "yes"), (2, "no"))
    ]


def said(samples, texts, margins=None):
    margins = margins or [None] * len(texts)
    columns = zip(samples, texts, margins, strict=True)
    return [Answer(sample.id, text, margin) for sample, text, margin in columns]


def test_scores_by_hand():
    # existence: picture a both right, b one right, c none: accuracy 3/6, plus 1/3: 50 + 33.33.
    # count: both right: 200. Position and color were not asked, so there is no total.
    samples = [s for name in "abc" for s in pair("existence", name)] + pair("count", "a")
    texts = ["Yes", "No.", "yes", "Yes, it is", "Nope", "I am not sure", " YES", "none"]
    margins = [3.0, -2.0, 1.0, 2.0, -1.0, 0.0, 5.0, -5.0]
    score = score_mme(samples, said(samples, texts, margins))
    metrics = score.metrics
    assert metrics["existence"] == pytest.approx(100 * 3 / 6 + 100 / 3)
    assert metrics["existence/accuracy"] == 0.5
    assert metrics["existence/accuracy_plus"] == pytest.approx(1 / 3)
    assert metrics["count"] == 200
    assert math.isnan(metrics["hallucination"]) and math.isnan(metrics["perception"])
    # Predictions: yes no | yes yes | no other | yes no. Strict cannot read Nope, I am, none.
    assert (metrics["accuracy"], metrics["yes_ratio"]) == (5 / 8, 4 / 8)
    assert (metrics["unparsed"], metrics["failed"], metrics["n"]) == (3, 0, 8)
    # yes-margins 3 1 -1 5, no-margins -2 2 0 -5: wins 4 + 3 + 2 + 4 of 16.
    assert metrics["auc"] == 13 / 16
    assert "position" not in metrics


def test_totals_are_sums_over_their_tasks():
    samples = [s for task in (*PERCEPTION, *COGNITION) for s in pair(task, "a")]
    metrics = score_mme(samples, said(samples, [s.label for s in samples])).metrics
    assert [metrics[name] for name in ("perception", "cognition", "hallucination")] == [
        2000,
        800,
        800,
    ]


def test_a_failed_sample_is_wrong_and_half_a_pair_is_no_pair():
    samples = pair("count", "a") + pair("count", "b")[:1]
    answers = [Answer("count/a/1", "Yes"), Answer("count/a/2", "", error="no picture")]
    answers.append(Answer("count/b/1", "Yes"))
    metrics = score_mme(samples, answers).metrics
    assert metrics["count/accuracy"] == pytest.approx(2 / 3)
    assert (metrics["count/accuracy_plus"], metrics["unpaired"], metrics["failed"]) == (0, 1, 1)
    alone = score_mme(samples[2:], answers[2:]).metrics
    assert math.isnan(alone["count/accuracy_plus"]) and math.isnan(alone["count"])


def test_pictures_that_are_no_pairs_are_refused():
    samples = [replace(s, group="x") for name in "ab" for s in pair("count", name)]
    with pytest.raises(BenchmarkError, match="'x' has 4 questions of count"):
        score_mme(samples, said(samples, ["yes"] * 4))
    mixed = [replace(pair(task, "a")[0], group="x") for task in ("count", "color")]
    with pytest.raises(BenchmarkError, match="2 questions of color, count"):
        score_mme(mixed, said(mixed, ["yes"] * 2))
    with pytest.raises(BenchmarkError, match="label of 'count/a/1' is 'Yes'"):
        score_mme([replace(samples[0], label="Yes")], said(samples[:1], ["yes"]))


def official(folder):
    """MME's calculation.py from its published rules: consecutive lines, four characters."""
    scores = {}
    for file in Path(folder).glob("*.txt"):
        lines = [line + "\n" for line in file.read_text().split("\n")[:-1]]
        right = []
        for line in lines:
            _, _, label, response = line.split("\t")
            start = response.lower()[:4]
            word = "yes" if "yes" in start else "no" if "no" in start else "other"
            right.append(word == label.lower())
        pairs = [right[i] and right[i + 1] for i in range(0, len(right), 2)]
        scores[file.stem] = 100 * sum(right) / len(right) + 100 * sum(pairs) / len(pairs)
    return scores


WORDS = st.sampled_from(["yes", "No", "Yes, no", "  yes", "not\tthere", "\nno", "", "unsure"])


@given(
    st.lists(st.tuples(st.sampled_from(["count", "OCR"]), WORDS, WORDS), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_any_order_gives_the_official_score_of_the_written_files(tmp_path_factory, rows, random):
    samples, texts = [], []
    for number, (task, *two) in enumerate(rows):
        samples += pair(task, f"{number}.jpg")
        texts += two
    answers = said(samples, texts)
    score = score_mme(samples, answers)
    order = random.sample(range(len(samples)), len(samples))
    mixed = [samples[i] for i in order]
    assert score_mme(mixed, answers).metrics == pytest.approx(score.metrics, nan_ok=True)
    folder = tmp_path_factory.mktemp("results")
    written = write_results(folder, mixed, answers)
    assert written.replaced == sum("\t" in text or "\n" in text for text in texts)
    wanted = {task: score.metrics[task] for task, *_ in rows}
    assert official(folder) == pytest.approx(wanted)
    assert all(0 <= value <= 200 for value in wanted.values())
    again = score_mme(*read_results(folder))
    assert again.metrics == pytest.approx(score.metrics, nan_ok=True)


def test_results_that_cannot_be_read_name_the_line(tmp_path):
    with pytest.raises(BenchmarkError, match=r"no <task>\.txt files"):
        read_results(tmp_path)
    (tmp_path / "count.txt").write_text("a.jpg\tIs it?\tYes\tyes\na.jpg\tIs it?\tNo\tn\to\n")
    with pytest.raises(BenchmarkError, match=r"line 2 of .*count\.txt has 5 fields .* have 4"):
        read_results(tmp_path)
    samples = pair("count", "a")[:1]
    with pytest.raises(BenchmarkError, match="'count/a' has 1 questions"):
        write_results(tmp_path, samples, said(samples, ["yes"]))


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)


QUESTION = "Is it {}? Please answer yes or no."


@pytest.fixture
def layouts(tmp_path):
    """The same two pictures in every layout: a flat and a nested task folder, JSON, lists."""
    release, lists = tmp_path / "MME_Benchmark_release_version", tmp_path / "lists"
    lists.mkdir()
    rows = []
    for task, images, questions in (
        ("count", "", ""),
        ("artwork", "images", "questions_answers_YN"),
    ):
        picture(release / task / images / "7.png")
        text = [(QUESTION.format("one"), "Yes"), (QUESTION.format("two"), "No")]
        (release / task / questions).mkdir(exist_ok=True)
        body = "".join(f"{q}\t{a}\n" for q, a in text)
        (release / task / questions / "7.txt").write_text(body)
        (lists / f"{task}.txt").write_text("".join(f"7.png\t{q}\t{a}\n" for q, a in text))
        rows += [
            {"image_path": f"{task}/7.png", "question": q, "answer": a, "category": task}
            for q, a in text
        ]
    (tmp_path / "MME_question.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    picture(lists / "images/7.png")
    return tmp_path


def test_every_layout_gives_the_same_questions(layouts):
    folders = Mme(data=layouts / "MME_Benchmark_release_version")
    samples = sorted(folders.samples(), key=lambda s: s.id)
    assert [s.id for s in samples] == [
        "artwork/7.png/1",
        "artwork/7.png/2",
        "count/7.png/1",
        "count/7.png/2",
    ]
    assert samples[0].question == "Is it one?\nAnswer the question using a single word or phrase."
    assert {s.image.parent.name for s in samples[:2]} == {"images"}
    images = layouts / "MME_Benchmark_release_version"
    for other in (
        Mme(data=layouts / "MME_question.jsonl", images=images),
        Mme(data=layouts / "lists"),
    ):
        assert sorted(other.samples(), key=lambda s: s.id) == samples
        assert all(sample.image.is_file() for sample in other.samples())
    # A folder with all of it prefers the release.
    assert sorted(Mme(data=layouts).samples(), key=lambda s: s.id) == samples
    assert sorted(folders.digests()) == ["artwork/questions_answers_YN/7.txt", "count/7.txt"]
    count = replace(folders, subset="hallucination", protocol="vcd")
    assert count.name == "mme/hallucination" and count.max_new_tokens == 1024
    assert [s.question for s in count.questions()] == [
        QUESTION.format(word) + " Please answer this question with one word."
        for word in ("one", "two")
    ]


def test_results_of_others_are_matched_to_the_questions(layouts, tmp_path_factory):
    mme = Mme(data=layouts / "MME_Benchmark_release_version")
    folder = tmp_path_factory.mktemp("results")
    # The no-question first, which calculation.py would pair just as well.
    lines = "7.png\tIs it two?\tNo\tno\n7.png\tIs it one?\tYes\tmaybe\n"
    for task in ("count", "artwork"):
        (folder / f"{task}.txt").write_text(lines)
    score = mme.score(mme.questions(), mme.read_answers(folder))
    assert [row["answer"] for row in score.rows if row["label"] == "no"] == ["no", "no"]
    assert (score.metrics["count"], score.metrics["artwork"]) == (50, 50)
    (folder / "count.txt").write_text(lines.replace("two", "six"))
    with pytest.raises(
        BenchmarkError, match=r"count/7\.png \(no\).*'Is it six\?'.*asks 'Is it two"
    ):
        mme.read_answers(folder)
    (folder / "count.txt").write_text(lines.replace("7.png", "8.png"))
    with pytest.raises(BenchmarkError, match=r"2 results .* no question .* count/8\.png"):
        mme.read_answers(folder)


@pytest.fixture
def mme(layouts):
    return Mme(data=layouts / "MME_Benchmark_release_version")


# As MME's authors, LLaVA's convert_answer_to_mme.py and others name a picture.
@pytest.mark.parametrize("name", ["7.png", "7.jpg", "7.txt", "7", "images/7.png"])
def test_pictures_are_matched_by_their_stem(mme, name, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for task in ("count", "artwork"):
        lines = [
            f"{name}\t{QUESTION.format(w)}\t{a}\t{a}\n" for w, a in (("one", "Yes"), ("two", "No"))
        ]
        (folder / f"{task}.txt").write_text("".join(lines))
    read = mme.score(mme.questions(), mme.read_answers(folder)).metrics
    assert read["count"] == read["artwork"] == 200
    told = score_mme(*read_results(folder)).metrics
    assert told == pytest.approx(read, nan_ok=True)
    # A part of MME takes its tasks from a folder of all.
    part = replace(mme, subset="hallucination")
    assert [answer.text for answer in part.read_answers(folder)] == ["Yes", "No"]
    assert part.score(part.questions(), part.read_answers(folder)).metrics["count"] == 200


def test_the_command_line_scores_what_read_results_reads(mme, monkeypatch, tmp_path_factory):
    """With MME's data, and without: a folder of results has the questions too."""
    monkeypatch.delenv("CLVA_LENS_DATA", raising=False)
    folder, out = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("out")
    for task, said_no in (("count", "no"), ("artwork", "yes")):
        lines = f"7.txt\tIs it one?\tYes\tYes\n7.txt\tIs it two?\tNo\t{said_no}\n"
        (folder / f"{task}.txt").write_text(lines)
    wanted = score_mme(*read_results(folder)).metrics
    assert (wanted["count"], wanted["artwork"]) == (200, 50)
    for name, settings in (("mme", []), ("mme", [f"data={mme.data}"]), ("mme/perception", [])):
        file = out / "score.json"
        options = [one for setting in settings for one in ("-s", setting)]
        asked = ["score", "--answers", str(folder), "--benchmark", name, "--out", str(file)]
        found = CliRunner().invoke(app, [*asked, *options])
        assert found.exit_code == 0, found.output
        told = json.loads(file.read_text())["metrics"]
        assert {key: told[key] for key in ("count", "artwork", "accuracy")} == pytest.approx(
            {key: wanted[key] for key in ("count", "artwork", "accuracy")}
        )
    only = CliRunner().invoke(
        app, ["score", "--answers", str(folder), "--benchmark", "mme/cognition"]
    )
    assert only.exit_code == 1 and "0 samples" in only.output


ONE_WORD = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize("inner", ["", "images/"])
@pytest.mark.parametrize("asked", ["{}" + ONE_WORD, "<image>\n{} Please answer yes or no.", "{}"])
def test_llavas_rows_are_matched_by_picture_and_question(mme, inner, asked, tmp_path):
    rows = [
        {
            "question_id": f"{task}/{inner}7.jpg",
            "prompt": asked.format(f"Is it {word}?"),
            "text": word,
        }
        for task in ("count", "artwork")
        for word in ("two", "one")
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    found = {answer.id: answer.text for answer in mme.read_answers(path)}
    assert found == {
        f"{t}/7.png/{n}": w for t in ("count", "artwork") for n, w in ((1, "one"), (2, "two"))
    }
    assert len(replace(mme, subset="perception").read_answers(path)) == 4
    assert len(replace(mme, subset="hallucination").read_answers(path)) == 2
    rows[1]["prompt"] = asked.format("Is it three?")
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(
        BenchmarkError, match=r"(?s)row 2 of .*three.* about count/\S*7\.jpg, of which"
    ):
        mme.read_answers(path)
    rows[1] |= {"prompt": asked.format("Is it one?"), "question_id": "count/8.jpg"}
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(
        BenchmarkError, match=r"(?s)row 2 .* count/8\.jpg, of which is asked nothing"
    ):
        mme.read_answers(path)
    path.write_text("")
    with pytest.raises(BenchmarkError, match="has 0 answers"):
        mme.read_answers(path)


def test_a_question_within_another_is_told_apart(tmp_path):
    asked = ("Is it a cat?", "Is it a cat or a dog?")
    samples = [
        replace(sample, question=question)
        for sample, question in zip(pair("count", "a.jpg"), asked, strict=True)
    ]
    path = tmp_path / "answers.jsonl"
    rows = [{"question_id": "count/a.jpg", "prompt": text, "text": text} for text in asked]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    found = read_mme_answers(path, samples, ("count",))
    assert {answer.id: answer.text for answer in found} == {
        sample.id: sample.question for sample in samples
    }
    # With more around it, which of the two was asked is not known.
    rows[1]["prompt"] = f"Look: {asked[1]}"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(BenchmarkError, match=r"row 2 .* asked 'Is it a cat\?' or 'Is it a cat or"):
        read_mme_answers(path, samples, ("count",))


def test_answers_of_our_own_runs(mme, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(
        "\n".join(json.dumps(asdict(Answer(s.id, s.label, 1.0))) for s in mme.questions())
    )
    answers = mme.read_answers(path)
    assert mme.score(mme.questions(), answers).metrics["accuracy"] == 1
    assert answers[0].margin == 1.0


@needs_data
def test_all_questions_of_mme_are_told_apart(tmp_path):
    """In LLaVA's rows and by stem; some of MME's questions end in two spaces."""
    mme = Mme(data=DATA)
    samples = mme.questions()
    rows = [
        {
            "question_id": s.group,
            "prompt": plain.question.split("Please")[0].strip() + ONE_WORD,
            "text": s.label,
        }
        for s, plain in zip(samples, replace(mme, protocol="bare").questions(), strict=True)
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    metrics = mme.score(samples, mme.read_answers(path)).metrics
    assert (metrics["perception"], metrics["cognition"]) == (2000, 800)
    write_results(tmp_path / "results", samples, [Answer(s.id, s.label) for s in samples])
    for file in (tmp_path / "results").glob("*.txt"):
        file.write_text(file.read_text().replace(".jpg\t", ".txt\t").replace(".png\t", "\t"))
    metrics = mme.score(samples, mme.read_answers(tmp_path / "results")).metrics
    assert (metrics["perception"], metrics["cognition"]) == (2000, 800)


def test_missing_and_strange_data(layouts, monkeypatch, tmp_path_factory):
    monkeypatch.delenv("CLVA_LENS_DATA", raising=False)
    with pytest.raises(BenchmarkError, match="CLVA_LENS_DATA"):
        Mme().questions()
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(BenchmarkError, match="no MME questions in"):
        Mme(data=empty).questions()
    with pytest.raises(BenchmarkError, match=r"2 of 2 images are missing .*artwork/7.png"):
        Mme(data=layouts / "MME_question.jsonl", images=empty).samples()
    (layouts / "lists/smell.txt").write_text("7.png\tIs it?\tYes\n")
    with pytest.raises(BenchmarkError, match="in the task 'smell'"):
        Mme(data=layouts / "lists").questions()
    with pytest.raises(ParameterError, match="subset must be one of all, perception"):
        Mme("reason")


def test_the_hubs_data_set(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="un-skip when pyarrow is installed")
    from pyarrow import parquet as writer

    buffer = BytesIO()
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(buffer, "PNG")
    rows = [
        {
            "question_id": "code_reasoning/0020.png",
            "image": {"bytes": buffer.getvalue(), "path": None},
            "question": QUESTION.format(answer),
            "answer": answer,
            "category": "code_reasoning",
        }
        for answer in ("Yes", "No")
    ]
    (tmp_path / "data").mkdir()
    writer.write_table(arrow.Table.from_pylist(rows), tmp_path / "data/test-00000.parquet")
    samples = Mme("cognition", data=tmp_path, protocol="bare").samples()
    assert [s.id for s in samples] == ["code_reasoning/0020.png/1", "code_reasoning/0020.png/2"]
    assert samples[0].image is samples[1].image and samples[0].image.size == (4, 4)


@needs_data
def test_the_questions_and_the_grid_of_constant_answers():
    mme = Mme(data=DATA / "mme/MME_question.jsonl")
    samples = mme.questions()
    counts = Counter(s.category for s in samples)
    assert len(samples) == 2374 and len({s.group for s in samples}) == 1187
    assert [counts[task] for task in HALLUCINATION] == [60] * 4
    constant = {
        word: mme.score(samples, said(samples, [word] * len(samples))).metrics
        for word in ("Yes", "No")
    }
    for metrics in constant.values():
        assert [metrics[task] for task in (*PERCEPTION, *COGNITION)] == [50] * 14
        assert (metrics["perception"], metrics["cognition"]) == (500, 200)
    oracle = mme.score(samples, said(samples, [s.label for s in samples])).metrics
    assert (oracle["perception"], oracle["cognition"], oracle["hallucination"]) == (2000, 800, 800)
    part = Mme("hallucination", data=DATA / "mme/MME_question.jsonl").questions()
    assert len(part) == 240


@needs_data
def test_the_small_set_has_its_pictures():
    mini = DATA / "coco_mini"
    mme = Mme("hallucination", data=mini / "mme", images=mini / "images")
    samples = mme.samples()
    assert {s.category for s in samples} == {"color", "count", "position"}
    assert all(s.image.is_file() for s in samples)


def test_the_toy_set_has_mmes_shape_and_exact_truth():
    toy = BENCHMARKS.get("mme/toy")
    samples = toy.samples()
    assert Counter((s.category, s.label) for s in samples) == {
        (task, label): 30 for task in HALLUCINATION for label in ("yes", "no")
    }
    assert set(Counter(s.group for s in samples).values()) == {2}
    assert len({s.image.tobytes() for s in samples}) == 120
    known = set(vocabulary())
    words = {word for s in samples for word in s.question.replace("?", " ?").split()}
    assert words <= known
    for word in ("yes", "no"):
        metrics = toy.score(samples, said(samples, [word] * 240)).metrics
        assert [metrics[task] for task in HALLUCINATION] == [50] * 4
        assert metrics["hallucination"] == 200 and math.isnan(metrics["cognition"])
    oracle = toy.score(samples, said(samples, [s.label for s in samples])).metrics
    assert (oracle["hallucination"], oracle["yes_ratio"]) == (800, 0.5)
    assert ToyMme(pictures=2).samples() == ToyMme(pictures=2).samples()
    assert [s.question for s in ToyMme(seed=1).samples()] != [s.question for s in samples]
    with pytest.raises(ParameterError, match="pictures must be >= 1"):
        ToyMme(pictures=0)


def test_the_toy_truth_is_read_from_the_scene():
    toy = ToyMme(pictures=12)
    answers = {s.group: [] for s in toy.samples()}
    for sample in toy.samples():
        answers[sample.group].append(sample.question)
    for number, task in enumerate(HALLUCINATION):
        for index, scene, _ in toy._pairs(number, task):
            for question, truth in zip(answers[f"{task}/{index}"], (True, False), strict=True):
                words = question.strip("?").split()
                if task == "existence":
                    assert (words[3] in scene.kinds) is truth
                elif task == "count":
                    number_word = ("one", "two", "three")[len(scene.of_kind(words[3])) - 1]
                    assert (words[2] == number_word) is truth
                elif task == "position":
                    (thing,) = scene.of_kind(words[2])
                    centre = thing.x + thing.size / 2
                    assert ((centre < 32) == (words[5] == "left")) is truth
                else:
                    (thing,) = scene.of_kind(words[2])
                    assert (thing.color == words[3]) is truth


def test_mme_rows_can_be_compared():
    samples = [s for name in "abcd" for s in pair("count", name)]
    labels = [s.label for s in samples]
    half = score_mme(samples, said(samples, ["yes"] * 8, [1.0] * 8))
    full = score_mme(samples, said(samples, labels, [1.0, -1.0] * 4))
    change = compare(half, full, resamples=50)
    assert (change.fixed, change.broken, change.groups) == (4, 0, 4)
    assert change.metrics["accuracy"].difference.estimate == 0.5
    assert change.metrics["yes_ratio"].difference.estimate == -0.5
