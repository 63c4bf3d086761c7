import json
import math
import sys
from collections import Counter
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from clva_lens.benchmarks import hub
from clva_lens.benchmarks.base import BENCHMARKS, Answer
from clva_lens.benchmarks.parsers import PARSERS
from clva_lens.benchmarks.pope_answers import LLAVA_NUMBERS, read_pope_answers
from clva_lens.benchmarks.pope_sampling import choose_pictures, pope_set
from clva_lens.benchmarks.pope_sets import SPLITS, Pope
from clva_lens.benchmarks.protocols import PROTOCOLS, VICUNA_V1
from clva_lens.ground.errors import BenchmarkError, ParameterError, UnknownName

DATA = Path(__file__).parents[2].parent / "shared/data"
needs_data = pytest.mark.skipif(
    not (DATA / "pope").is_dir(), reason="un-skip when ../shared/data is beside the checkout"
)

ROWS = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a cup?", "label": "yes"},
    {
        "question_id": 2,
        "image": "a.jpg",
        "text": "Is there an orange in the imange?",
        "label": "no",
    },
    {"question_id": 3, "image": "COCO_val2014_7.jpg", "text": "Is there a cat?", "label": "yes"},
    {"question_id": 4, "image": "COCO_val2014_7.jpg", "text": "Is there a dog?", "label": "no"},
]


def picture(path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "coco_pope_random.json").write_text(lines)
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "7.jpg"):
        picture(tmp_path / "images" / name)
    return tmp_path


def test_the_nine_sets_are_registered_and_need_no_data_to_exist():
    names = [name for name in BENCHMARKS.names() if name.startswith("pope/")]
    assert len([name for name in names if "toy" not in name]) == 9
    assert BENCHMARKS.get("pope/gqa/popular").name == "pope/gqa/popular"


def test_a_set_from_a_folder(folder):
    pope = Pope("coco", "random", data=folder, images=folder / "images")
    samples = pope.samples()
    assert [sample.id for sample in samples] == ["1", "2", "3", "4"]
    first = samples[0]
    assert first.question == "Is there a cup?\nAnswer the question using a single word or phrase."
    assert (first.label, first.group, first.category) == ("yes", "a.jpg", "random")
    assert first.system == VICUNA_V1 and pope.max_new_tokens == 128
    # The second picture lies there without COCO 2014's prefix.
    assert [sample.image.name for sample in samples[1:3]] == ["a.jpg", "7.jpg"]
    assert samples[1].question.startswith("Is there an orange in the imange?")
    mended = replace(pope, normalize_imange=True, protocol="bare").samples()
    assert [s.question for s in mended][1] == "Is there an orange in the image?"
    assert mended[1].system is None
    assert pope.settings["data"] == str(folder)
    assert len(pope.digests()["coco_pope_random.json"]) == 64
    score = pope.score(samples, [Answer(s.id, "Yes") for s in samples])
    assert (score.metrics["yes_ratio"], score.metrics["accuracy"]) == (1, 0.5)


def test_arrays_and_official_folders_read_alike(folder, tmp_path, monkeypatch):
    lines = Pope("coco", "random", data=folder).questions()
    for place in ("official/coco", "output/coco", "pope/official/coco", "seem/coco"):
        inner = tmp_path / "other" / place
        inner.mkdir(parents=True)
        (inner / "coco_pope_random.json").write_text(json.dumps(ROWS, indent=4))
        assert Pope("coco", "random", data=tmp_path / "other").questions() == lines
        (inner / "coco_pope_random.json").rename(tmp_path / "mine.json")
        assert Pope("coco", "random", data=tmp_path / "mine.json").questions() == lines
        inner.rmdir()
    monkeypatch.setenv("CLVA_LENS_DATA", str(folder))
    assert Pope("coco", "random").samples(2)[0].image.parent == folder / "images"


def test_missing_data_say_where_to_get_them(tmp_path, monkeypatch):
    monkeypatch.delenv("CLVA_LENS_DATA", raising=False)
    with pytest.raises(
        BenchmarkError, match=r"no folder .* pope/gqa/random.*AoiDragon/POPE.*CLVA_LENS"
    ):
        BENCHMARKS.get("pope/gqa/random").samples()
    with pytest.raises(
        BenchmarkError, match=r"question file of pope/gqa/random was not found.*seem_ran"
    ):
        Pope("gqa", "random", data=tmp_path).samples()
    with pytest.raises(ParameterError, match="source must be one of coco, aokvqa, gqa"):
        Pope("vqa", "random")
    with pytest.raises(UnknownName, match="Did you mean 'llava'"):
        Pope("coco", "random", protocol="lava")


def test_missing_images_are_one_error_with_their_number_and_first_names(folder):
    rows = [dict(ROWS[0], question_id=i, image=f"gone{i}.jpg") for i in range(9)]
    path = folder / "many.json"
    path.write_text("\n".join(json.dumps(row) for row in rows + ROWS))
    pope = Pope("coco", "random", data=path, images=folder / "images")
    with pytest.raises(
        BenchmarkError, match=r"9 of 11 images .*: gone0.jpg, gone1.jpg, gone2.jpg and 6 more"
    ):
        pope.samples()
    assert len(pope.questions()) == 13
    with pytest.raises(
        BenchmarkError, match=r"the pictures of pope/coco/random was not found.*val2014\.zip"
    ):
        replace(pope, images=folder / "none").samples()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yes\n", "neither JSON lines nor a JSON array: line 1"),
        (json.dumps(ROWS[0]) + '\n{"question_id": 2, "im', "line 2: .*Repair or remove"),
        ('{"label": "yes"}', "row 1 .* has no image, question_id, text; it has label"),
        ("[1]", "row 1 .* is no object"),
    ],
)
def test_corrupted_files_name_the_line(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(BenchmarkError, match=message):
        Pope("coco", "random", data=path).questions()


def answer_file(folder, rows):
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_of_others_are_scored(folder):
    pope = Pope("coco", "random", data=folder, parser="official")
    samples = pope.questions()
    said = ["Yes", "No, not", "NO", "no"]
    # POPE's own layout, in order; the second question is asked in the mended spelling.
    texts = ["Is there a cup?", "is there an orange in the image?", *(r["text"] for r in ROWS[2:])]
    ordered = [{"question": q, "answer": a} for q, a in zip(texts, said, strict=True)]
    answers = read_pope_answers(answer_file(folder, ordered), samples)
    assert pope.score(samples, answers).metrics["accuracy"] == 1
    assert replace(pope, parser="strict").score(samples, answers).metrics["accuracy"] == 0.75
    # LLaVA's and VCD's, by id in any order.
    named = [{"question_id": i + 1, "text": a, "model_id": "m"} for i, a in enumerate(said)]
    by_id = read_pope_answers(answer_file(folder, named[::-1]), samples)
    assert pope.score(samples, by_id).rows == pope.score(samples, answers).rows
    # Our own, with margins and failures.
    own = [asdict(Answer(str(i + 1), a, 0.5)) for i, a in enumerate(said)]
    own[3] |= {"text": "", "error": "no memory"}
    metrics = pope.score(samples, pope.read_answers(answer_file(folder, own))).metrics
    assert (metrics["failed"], metrics["auc"], metrics["accuracy"]) == (1, 0.5, 0.75)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "0 answers"),
        (
            [{"question": "Is there a cup?", "answer": "Yes"}],
            "1 answers in order.* 4 samples.*2,91",
        ),
        (
            [{"question": "Is there a hat?", "answer": "Yes"}] * 4,
            "row 1 .* a hat.* asks 'Is there a",
        ),
        ([{"question_id": 1}], "row 1 .* has no text in any of answer, response"),
        ([{"caption": "a"}], "row 1 .* it has caption"),
        (
            [{"question_id": 1, "answer": "yes", "response": "no"}],
            "row 1 .* different texts in ans",
        ),
        (
            [{"question_id": 1, "text": "yes"}, {"id": 2, "text": "no"}],
            "row 2 .* lacks question_id",
        ),
    ],
)
def test_answer_files_that_do_not_fit_are_refused(folder, rows, message):
    samples = Pope("coco", "random", data=folder).questions()
    with pytest.raises(BenchmarkError, match=message):
        read_pope_answers(answer_file(folder, rows), samples)


@pytest.mark.parametrize("key", ["answer", "response", "caption", "text", "output"])
@pytest.mark.parametrize("asked", ["prompt", "question"])
def test_question_id_wins_and_a_question_carried_is_compared(folder, key, asked):
    pope = Pope("coco", "random", data=folder)
    rows = [
        {
            "id": number,
            "question_id": row["question_id"],
            asked: f"<image>\n{row['text'].upper()}  Answer in one word.",
            key: row["label"],
        }
        for number, row in enumerate(reversed(ROWS), start=1)
    ]
    for protocol in PROTOCOLS.names():
        bench = replace(pope, protocol=protocol)
        answers = bench.read_answers(answer_file(folder, rows))
        assert bench.score(bench.questions(), answers).metrics["accuracy"] == 1
    rows[2][asked] = "Is there an oran in the image?"
    with pytest.raises(
        BenchmarkError, match=r"row 3 .* an oran .* sample asks .*an orange(.|\n)*split="
    ):
        pope.read_answers(answer_file(folder, rows))


LAYOUTS = {
    "lines": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "array": lambda rows: json.dumps(rows, indent=1),
    "over several lines": lambda rows: "\n".join(json.dumps(row, indent=4) for row in rows),
    "without line breaks": lambda rows: "".join(json.dumps(row) for row in rows),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keys", [("question_id", "prompt", "text"), ("question", "answer")])
def test_answers_in_every_form_of_json(folder, layout, keys):
    known = {"question_id": "question_id", "prompt": "text", "question": "text"}
    rows = [{key: row[known.get(key, "label")] for key in keys} for row in ROWS]
    path = folder / "answers.json"
    path.write_text(LAYOUTS[layout](rows))
    pope = Pope("coco", "random", data=folder)
    assert pope.score(pope.questions(), pope.read_answers(path)).metrics["accuracy"] == 1
    path.write_text(LAYOUTS[layout](rows)[:-30])
    with pytest.raises(BenchmarkError, match=r"neither JSON lines nor a JSON array: line \d+:"):
        pope.read_answers(path)


def test_a_half_written_object_is_named_by_its_first_line(folder):
    text = LAYOUTS["over several lines"]([{"question_id": n, "text": "Yes"} for n in (1, 2)])
    (folder / "answers.json").write_text(text[:-3])
    with pytest.raises(BenchmarkError, match="JSON array: line 5:"):
        Pope("coco", "random", data=folder).read_answers(folder / "answers.json")


@pytest.fixture
def splits(folder):
    """The three splits: the same pictures, other objects that are absent."""
    for split, word in {"popular": "car", "adversarial": "hat"}.items():
        rows = [
            dict(row, text=f"Is there a {word}?") if n == 3 else row for n, row in enumerate(ROWS)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"coco_pope_{split}.json").write_text(lines)
    return {split: Pope("coco", split, data=folder) for split in SPLITS}


def llavas(splits, **more):
    """LLaVA's file of all splits, its questions with what it adds to them."""
    return [
        {"question_id": first + int(s.id), "prompt": s.question, "text": s.label.title(), **more}
        for split, first in LLAVA_NUMBERS.items()
        for s in splits[split].questions()
    ]


def test_llavas_file_of_three_splits_is_read_for_each(splits, folder):
    rows = llavas(splits)
    assert sorted(row["question_id"] for row in rows)[4:9:4] == [10000001, 20000001]
    rows[-1]["text"] = "Yes"
    path = answer_file(folder, rows)
    for split, pope in splits.items():
        accuracy = pope.score(pope.questions(), pope.read_answers(path)).metrics["accuracy"]
        assert accuracy == (0.75 if split == "popular" else 1)
    # A split alone keeps its numbers; the others have no answers then.
    path = answer_file(folder, rows[8:])
    assert len(splits["popular"].read_answers(path)) == 4
    with pytest.raises(BenchmarkError, match="4 answers, none of them to the split random"):
        splits["random"].read_answers(path)
    # Numbers of one split with the questions of another.
    shifted = [{**row, "question_id": row["question_id"] - 10_000_000} for row in rows[8:]]
    with pytest.raises(BenchmarkError, match=r"row 4 of .* a car(.|\n)*asks 'Is there a dog"):
        splits["random"].read_answers(answer_file(folder, shifted))


def test_rows_that_name_their_split_are_taken_by_it(splits, folder):
    rows = [
        {"question_id": int(s.id), "category": split, "question": s.question, "response": s.label}
        for split, pope in splits.items()
        for s in pope.questions()
    ]
    path = answer_file(folder, rows)
    for pope in splits.values():
        assert pope.score(pope.questions(), pope.read_answers(path)).metrics["accuracy"] == 1
    rows[11]["question"] = "Is there a bus?"
    with pytest.raises(BenchmarkError, match=r"row 12 of .* a bus"):
        splits["adversarial"].read_answers(answer_file(folder, rows))


def test_a_subset_counts_only_where_it_is_asked_for(splits, folder):
    for numbers in LLAVA_NUMBERS, dict.fromkeys(LLAVA_NUMBERS, 0):
        pope = splits["popular"]
        first = numbers["popular"]
        rows = [
            {"question_id": first + n, "text": text}
            for n, text in ((1, "Yes"), (2, "No"), (4, "Yes"))
        ]
        path = answer_file(folder, rows)
        with pytest.raises(
            BenchmarkError, match=r"leaves 1 of the 4 .* as 3\. .* subset='.*answers"
        ):
            pope.read_answers(path)
        some = replace(pope, subset=str(path))
        assert [s.id for s in some.questions()] == ["1", "2", "4"]
        metrics = some.score(some.questions(), some.read_answers(path)).metrics
        assert (metrics["accuracy"], metrics["n"]) == (pytest.approx(2 / 3), 3)
        assert some.settings["subset"] == str(path)
        assert set(some.digests()) == {"coco_pope_popular.json", "answers.jsonl"}
        path.write_text(path.read_text() + json.dumps({"question_id": first + 9, "text": "a"}))
        with pytest.raises(BenchmarkError, match=r"1 of the 4 questions in .* such as 9\."):
            some.questions()


@pytest.mark.parametrize("key", ["answer", "response", "caption", "output"])
def test_a_text_that_repeats_the_question_is_no_answer(folder, key):
    rows = [{**row, key: row["label"]} for row in ROWS]
    pope = Pope("coco", "random", data=folder)
    answers = pope.read_answers(answer_file(folder, rows))
    assert [answer.text for answer in answers] == [row["label"] for row in ROWS]
    # A model may repeat it, too.
    rows = [{**row, key: row["text"]} for row in ROWS]
    assert pope.read_answers(answer_file(folder, rows))[0].text == ROWS[0]["text"]
    # Alone it is what the model said.
    rows = [{"question_id": row["question_id"], "text": row["text"]} for row in ROWS]
    assert pope.read_answers(answer_file(folder, rows))[0].text == ROWS[0]["text"]
    # Another question beside the answer might be anything.
    rows = [{**row, "text": "Is there a hat?", key: row["label"]} for row in ROWS]
    with pytest.raises(BenchmarkError, match=f"row 1 .* different texts in .*{key}"):
        pope.read_answers(answer_file(folder, rows))


def test_a_picture_that_a_row_carries_is_compared(folder):
    pope = Pope("coco", "random", data=folder)
    rows = [
        {"question_id": row["question_id"], "text": row["label"], "image": f"val2014/{image}"}
        for row, image in zip(
            ROWS, ("a.jpg", "a", "COCO_val2014_000000000007.jpg", "7"), strict=True
        )
    ]
    assert pope.score(pope.questions(), pope.read_answers(answer_file(folder, rows))).rows[2][
        "right"
    ]
    rows[2]["image"] = "8.jpg"
    with pytest.raises(
        BenchmarkError, match=r"row 3 .* picture '8\.jpg', .* about 'COCO_val2014_7"
    ):
        pope.read_answers(answer_file(folder, rows))


def test_half_written_answers_are_named_and_missing_ids_are_not_ignored(folder):
    pope = Pope("coco", "random", data=folder)
    path = answer_file(folder, [{"question_id": 1, "text": "Yes"}])
    with pytest.raises(BenchmarkError, match="3 of the 4 ids of the samples are missing"):
        pope.score(pope.questions(), read_pope_answers(path, pope.questions()))
    path.write_text(path.read_text() + '{"question_id": 2, "te')
    with pytest.raises(BenchmarkError, match="line 2"):
        read_pope_answers(path, pope.questions())


# lmms-eval's layout: all three splits in one file, or a file a split; pictures inside.
def parquet(path, category=("random", "random", "random", "popular")):
    arrow = pytest.importorskip("pyarrow", reason="un-skip when pyarrow is installed")
    buffer = BytesIO()
    Image.fromarray(np.full((4, 4, 3), 200, np.uint8)).save(buffer, "PNG")
    rows = [
        {
            "id": str(number),
            "question_id": str(row["question_id"]),
            "question": row["text"],
            "answer": row["label"],
            "image_source": Path(row["image"]).stem,
            "image": {"bytes": buffer.getvalue(), "path": None},
            "category": split,
        }
        for number, (row, split) in enumerate(zip(ROWS, category, strict=True))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    from pyarrow import parquet as writer

    writer.write_table(arrow.Table.from_pylist(rows), path)


def test_the_hubs_data_set_from_a_folder(tmp_path):
    parquet(tmp_path / "data/test-00000-of-00001.parquet")
    pope = Pope("coco", "random", data=tmp_path, protocol="bare")
    samples = pope.samples()
    assert [(s.id, s.label, s.group) for s in samples] == [
        ("1", "yes", "a"),
        ("2", "no", "a"),
        ("3", "yes", "COCO_val2014_7"),
    ]
    assert samples[0].image is samples[1].image is not samples[2].image
    assert np.asarray(samples[0].image).tolist() == np.full((4, 4, 3), 200).tolist()
    assert list(pope.digests()) == ["test-00000-of-00001.parquet"]
    # The configuration Full has a file for each split, and wins: nothing is counted twice.
    parquet(tmp_path / "Full/random-00000-of-00001.parquet", ["random"] * 4)
    assert len(pope.samples()) == 4
    with pytest.raises(BenchmarkError, match="COCO's questions only, but source='gqa'"):
        Pope("gqa", "random", data=tmp_path).samples()


def test_the_hub_is_asked_for_one_commit_under_either_owner(tmp_path, monkeypatch):
    parquet(tmp_path / "data/test-00000-of-00001.parquet")
    asked = []

    def snapshot(name, **options):
        asked.append((name, options["revision"], options["repo_type"]))
        if name.startswith("lmms-lab/"):
            raise OSError("404 not found\nmore")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    pope = Pope("coco", "random", data="hf://datasets/lmms-lab/POPE@abc123")
    assert len(pope.questions()) == 3
    assert asked == [
        ("lmms-lab/POPE", "abc123", "dataset"),
        ("lmms-lab-encoder/POPE", "abc123", "dataset"),
    ]
    with pytest.raises(BenchmarkError, match="without it the result could not be repeated"):
        Pope("coco", "random", data="hf://datasets/lmms-lab/POPE").questions()

    def offline(name, **options):
        raise LocalEntryNotFoundError(f"no {name}")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(BenchmarkError, match="no lmms-lab/POPE; lmms-lab-encoder/POPE: no"):
        pope.questions()


def test_parquet_errors_say_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "test-0.parquet"
    parquet(path)
    with pytest.raises(BenchmarkError, match="has no column hat; it has id, question_id"):
        list(hub.read_parquet([path], ["id", "hat"]))
    with pytest.raises(BenchmarkError, match=r"no split popular in .* it has test-0\.parquet"):
        hub.parquet_files(tmp_path, ["popular"])
    with pytest.raises(BenchmarkError, match="image column has str without bytes"):
        hub.picture("a.jpg")
    path.write_bytes(b"PAR1 half")
    with pytest.raises(BenchmarkError, match="could not be read as parquet"):
        list(hub.read_parquet([path], ["id"]))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(BenchmarkError, match="pip install pyarrow"):
        list(hub.read_parquet([path], ["id"]))


@needs_data
@pytest.mark.parametrize("source", ["coco", "aokvqa", "gqa"])
@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_official_files(source, split):
    pope = Pope(source, split, data=DATA)
    samples = pope.questions()
    # 500 images with 6 questions each, half of them "yes".
    assert Counter(s.label for s in samples) == {"yes": 1500, "no": 1500}
    assert Counter(Counter(s.group for s in samples).values()) == {6: 500}
    assert not any("imange" in s.question for s in samples)
    # One set for all parsers, as they do not look at the questions.
    for parser in PARSERS.names() if (source, split) == ("gqa", "popular") else ("strict",):
        judged = replace(pope, parser=parser)
        answers = {
            word: judged.score(samples, [Answer(s.id, word) for s in samples]).metrics
            for word in ("yes", "no")
        }
        oracle = judged.score(samples, [Answer(s.id, s.label) for s in samples]).metrics
        assert [oracle[name] for name in ("accuracy", "f1", "yes_ratio")] == [1, 1, 0.5]
        assert answers["yes"]["accuracy"] == answers["no"]["accuracy"] == 0.5
        assert answers["yes"]["f1"] == pytest.approx(2 / 3)
        assert math.isnan(answers["no"]["f1"])
        assert (answers["yes"]["yes_ratio"], answers["no"]["yes_ratio"]) == (1, 0)


@needs_data
def test_the_three_splits_of_a_source_share_their_positives():
    for source in ("coco", "aokvqa", "gqa"):
        positives = [
            {
                (s.group, s.question)
                for s in Pope(source, split, data=DATA).questions()
                if s.label == "yes"
            }
            for split in ("random", "popular", "adversarial")
        ]
        assert positives[0] == positives[1] == positives[2] and len(positives[0]) >= 1499


@needs_data
def test_the_small_set_has_its_pictures():
    mini = DATA / "coco_mini"
    pope = Pope("coco", "popular", data=mini / "pope", images=mini / "images")
    samples = pope.samples()
    assert len(samples) == 18 and all(sample.image.is_file() for sample in samples)


# Five pictures; frequencies: person 4, dog 3, cup 3, car 2, cat 2, bus 2 (met in that order).
PICTURES = [
    {"image": "1.jpg", "objects": ["person", "dog", "cup"]},
    {"image": "2.jpg", "objects": ["person", "car", "cat"]},
    {"image": "3.jpg", "objects": ["dog", "person", "bus"]},
    {"image": "4.jpg", "objects": ["cup", "cat", "dog"]},
    {"image": "5.jpg", "objects": ["person", "cup", "bus", "car"]},
]


def negatives(rows):
    return [row["text"].split(" in the")[0].split()[-1] for row in rows if row["label"] == "no"]


def test_negatives_by_hand():
    # 1: person, dog, cup are there; the most frequent others are car, cat, bus, in that order.
    # 2: dog, cup, then bus. 3: cup, car, cat. 4: person, car, bus. 5: dog, cat, and nothing
    # else is left but what was taken: a picture must have three others, so it is left out below.
    rows = pope_set(PICTURES[:4], "popular")
    # Without the fifth: person 3, dog 3, cup 2, cat 2, car 1, bus 1.
    assert negatives(rows) == [
        *("cat", "car", "bus"),
        *("dog", "cup", "bus"),
        *("cup", "cat", "car"),
        *("person", "car", "bus"),
    ]
    assert [row["label"] for row in rows] == ["yes", "no"] * 12
    assert [row["question_id"] for row in rows] == list(range(1, 25))
    # With person are dog 2, cup 1, car 1, cat 1, bus 1, in this order: after person in picture 1
    # comes car (dog and cup are there). dog's company: person 2, cup 2, bus 1, cat 1: bus. cup's:
    # person 1, dog 2, cat 1: cat.
    assert negatives(pope_set(PICTURES[:4], "adversarial"))[:3] == ["car", "bus", "cat"]
    with pytest.raises(BenchmarkError, match=r"5.jpg has 4 of 6 objects"):
        pope_set(PICTURES, "random")


def test_random_negatives_are_absent_new_and_repeatable():
    for seed in range(5):
        rows = pope_set(PICTURES[:4], "random", seed=seed)
        absent = negatives(rows)
        for index, shown in enumerate(PICTURES[:4]):
            drawn = absent[3 * index : 3 * index + 3]
            assert len(set(drawn) | set(shown["objects"])) == 6
        assert rows == pope_set(PICTURES[:4], "random", seed=seed)
    assert len({tuple(negatives(pope_set(PICTURES[:4], "random", seed=s))) for s in range(9)}) > 1


def test_articles_and_choice_of_pictures():
    shown = [
        {"image": "1", "objects": ["orange", "cup"]},
        {"image": "2", "objects": ["hat", "map"]},
    ]
    texts = [row["text"] for row in pope_set(shown, "popular", per_picture=2)]
    assert texts[0] == "Is there an orange in the image?"
    assert texts[2] == "Is there a cup in the image?"
    chosen = choose_pictures(PICTURES, 2, per_picture=4 - 1, seed=1)
    assert len(chosen) == 2 and chosen == choose_pictures(PICTURES, 2, seed=1)
    with pytest.raises(BenchmarkError, match="1 of the 5 pictures have 4 or more"):
        choose_pictures(PICTURES, 2, per_picture=4)


@needs_data
def test_the_official_sets_are_rebuilt():
    lines = (DATA / "pope/coco_pope_gt_objects.jsonl").read_text().splitlines()
    pictures = [json.loads(line) for line in lines]
    same = {}
    for split in ("popular", "adversarial", "random"):
        official = (DATA / f"pope/official/coco/coco_pope_{split}.json").read_text().splitlines()
        pairs = list(zip(pope_set(pictures, split), map(json.loads, official), strict=True))
        assert all(ours == theirs for ours, theirs in pairs if theirs["label"] == "yes")
        same[split] = sum(ours == theirs for ours, theirs in pairs if theirs["label"] == "no")
    assert same["popular"] == 1500
    # The order of the objects beyond the three that are asked about decides ties.
    assert same["adversarial"] >= 1448
    # Random ones agree by chance only.
    assert same["random"] < 100
