import json
from dataclasses import replace
from pathlib import Path

import pytest

from clva_lens.benchmarks import hub
from clva_lens.benchmarks.base import BENCHMARKS, Answer
from clva_lens.benchmarks.chair_coco import ChairCoco
from clva_lens.benchmarks.chair_truth import image_id, read_captions, read_image_ids
from clva_lens.benchmarks.chair_vocabulary import vocabulary
from clva_lens.ground.errors import BenchmarkError, UnknownName

MINI = Path(__file__).parents[3] / "shared" / "data" / "coco_mini"
with_data = pytest.mark.skipif(not MINI.is_dir(), reason="un-skip where ../shared/data is")

IDS = {
    42: 42,
    "42": 42,
    "COCO_val2014_000000310196.jpg": 310196,
    "000000310196.png": 310196,
    "a/b/COCO_train2014_000000000009.jpg": 9,
    "C:\\images\\COCO_val2014_000000310196.jpg": 310196,
}


@pytest.mark.parametrize("value", IDS)
def test_image_ids(value):
    assert image_id(value) == IDS[value]


@pytest.mark.parametrize(
    "value", [True, -1, 1.5, None, "", "dog.jpg", "1_2", "12a", "20261123101010999"]
)
def test_strange_image_ids_are_refused(value):
    with pytest.raises(BenchmarkError, match="is no COCO image"):
        image_id(value)


def test_captions_of_others(tmp_path):
    opera, less = tmp_path / "opera.jsonl", tmp_path / "less.json"
    opera.write_text('{"image_id": 42, "caption": "A dog."}\n\n{"image_id": 7, "caption": ""}\n')
    less.write_text(
        json.dumps([{"image_id": "COCO_val2014_000000000042.jpg", "text": "A dog.", "model": "x"}])
    )
    assert read_captions(opera) == [Answer("42", "A dog."), Answer("7", "")]
    assert ChairCoco().read_answers(less) == read_captions(less)
    assert read_captions(less) == [Answer("42", "A dog.")]
    assert read_image_ids(opera) == [42, 7]


BROKEN = {
    '{"image_id": 42, "caption": "A dog."}\n{"image_id": 7, "capt': "line 2",
    '{"caption": "A dog."}\n': "row 1 of .* has no image_id",
    '{"image_id": 42, "answer": "A dog."}\n': "row 1 of .* has no caption; it has image_id, answer",
    '{"image_id": 42, "caption": null}\n': "row 1 of .* has no caption",
    '{"image_id": 4, "caption": ""}\n{"image_id": "4.jpg", "text": ""}': "rows 1 and 2 .* image 4",
    '{"image_id": "dog", "caption": ""}\n': "'dog' is no COCO image",
    "[1, 2]": "row 1 of .* is no object",
}


@pytest.mark.parametrize("text", BROKEN)
def test_broken_caption_files(text, tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text(text)
    with pytest.raises(BenchmarkError, match=BROKEN[text]):
        read_captions(path)


def test_image_lists(tmp_path):
    path = tmp_path / "ids.txt"
    for text in ("9\n000000000042.jpg\n", '[9, "42"]', '{"image_id": 9}\n42\n'):
        path.write_text(text)
        assert read_image_ids(path) == [9, 42]
    for text, match in {"": "no images", "9\n9": "image 9 twice", "[9,": "no JSON"}.items():
        path.write_text(text)
        with pytest.raises(BenchmarkError, match=match):
            read_image_ids(path)
    with pytest.raises(BenchmarkError, match="no list of images"):
        read_image_ids(tmp_path / "absent")


@pytest.fixture
def coco(tmp_path):
    """COCO's layout with three images: masks of 1 and 2, captions of all; 3 has no masks file."""
    names = {number: f"COCO_val2014_{number:012d}.jpg" for number in (1, 2, 3)}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2014").mkdir()
    for number in (1, 2):
        (tmp_path / "val2014" / names[number]).write_bytes(b"")
    write = {
        "instances": {
            "images": [{"id": i, "file_name": names[i]} for i in (2, 1)],
            "categories": [{"id": 18, "name": "dog"}, {"id": 6, "name": "bus"}],
            "annotations": [{"image_id": 1, "category_id": 18}, {"image_id": 3, "category_id": 6}],
        },
        "captions": {
            "images": [{"id": i, "file_name": names[i]} for i in (1, 2, 3)],
            "annotations": [
                {"image_id": 1, "caption": "A puppy with a frisbee"},
                {"image_id": 1, "caption": "A man plays."},
                {"image_id": 2, "caption": "A bus."},
                {"image_id": 3, "caption": "A cat."},
            ],
        },
    }
    for kind, content in write.items():
        (tmp_path / "annotations" / f"{kind}_val2014.json").write_text(json.dumps(content))
    return tmp_path


def test_coco_reads_masks_and_captions(coco):
    benchmark = ChairCoco(data=coco, count=None)
    found = {one.id: one for one in benchmark.samples()}
    assert {name: one.label for name, one in found.items()} == {
        "1": "dog,frisbee,person",
        "2": "bus",
    }
    assert found["1"].image == coco / "val2014" / "COCO_val2014_000000000001.jpg"
    assert found["1"].question == "Please describe this image in detail."
    answers = [Answer("1", "A dog."), Answer("2", "A truck.")]
    assert benchmark.score(list(found.values()), answers).metrics["chair_i"] == 1 / 2
    # pattern never sees a single bus, in the truth either.
    pattern = replace(benchmark, lemmatiser="pattern").questions()
    assert {one.id: one.label for one in pattern}["2"] == ""


def test_settings_and_digests_name_the_variant(coco, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("2\n")
    listed = ChairCoco(data=coco, ids=ids, truncation="drop_unfinished")
    assert [one.id for one in listed.questions()] == ["2"]
    assert listed.settings["ids"] == str(ids)
    assert listed.settings["lemmatiser"] == "builtin"
    assert listed.settings["max_new_tokens"] == listed.max_new_tokens == 128
    digests = listed.digests()
    assert set(digests) == {"instances_val2014.json", "captions_val2014.json", "image ids"}
    everything = ChairCoco(data=coco, count=None)
    assert everything.digests()["image ids"] != digests["image ids"]


def test_the_draw_is_ours_and_repeats(coco):
    first = [one.id for one in ChairCoco(data=coco, count=1).questions()]
    assert first == [one.id for one in ChairCoco(data=coco, count=1).questions()]
    drawn = {ChairCoco(data=coco, count=1, seed=seed).questions()[0].id for seed in range(8)}
    assert drawn == {"1", "2"}


def test_what_is_missing_is_named(coco, tmp_path, monkeypatch):
    monkeypatch.delenv("CLVA_LENS_DATA", raising=False)
    with pytest.raises(BenchmarkError, match="count=500, but val2014 has 2 images"):
        ChairCoco(data=coco).questions()
    with pytest.raises(BenchmarkError, match="pass its folder, or set the environment"):
        BENCHMARKS.get("chair/coco").samples()
    with pytest.raises(BenchmarkError, match=r"instances_train2014\.json"):
        ChairCoco(data=coco, split="train2014").questions()
    with pytest.raises(BenchmarkError, match=r"is a file\. Pass COCO's folder"):
        ChairCoco(data=coco / "annotations" / "instances_val2014.json").questions()
    ids = tmp_path / "ids.txt"
    ids.write_text("1\n3\n9\n")
    with pytest.raises(BenchmarkError, match=r"2 of the 3 images in .* such as 3"):
        ChairCoco(data=coco, ids=ids).questions()
    (coco / "val2014" / "COCO_val2014_000000000002.jpg").unlink()
    with pytest.raises(BenchmarkError, match="1 of 2 images are missing"):
        ChairCoco(data=coco, count=None).samples()
    (coco / "annotations" / "captions_val2014.json").write_text('{"annotations": [{}]}')
    with pytest.raises(BenchmarkError, match="not COCO's: KeyError"):
        ChairCoco(data=coco, count=None).questions()
    with pytest.raises(UnknownName, match="no lemmatiser 'wordnet'"):
        ChairCoco(lemmatiser="wordnet")


@with_data
def test_the_photographs_of_coco_mini(tmp_path):
    benchmark = ChairCoco(data=MINI, split="mini", count=None)
    samples = benchmark.samples()
    assert len(samples) == 70
    assert all(one.image.is_file() for one in samples)
    captions = json.loads((MINI / "annotations" / "captions_mini.json").read_text())
    first = {str(one["image_id"]): one["caption"] for one in captions["annotations"]}
    answers = [Answer(one.id, first[one.id]) for one in samples]
    # A reference caption never names what is not there: the truth is made of it.
    found = benchmark.score(samples, answers).metrics
    assert found["chair_i"] == 0
    assert 0.2 < found["recall"] < 0.9
    rotated = [
        Answer(a.id, b.text) for a, b in zip(answers, answers[1:] + answers[:1], strict=True)
    ]
    assert benchmark.score(samples, rotated).metrics["chair_i"] > 0.4


def test_synonyms_of_the_hub(tmp_path, monkeypatch):
    """A file of one commit is asked for; the list is the one that it holds."""
    listed = tmp_path / "synonyms.txt"
    listed.write_text("person, man\ndog, puppy")
    asked = []

    def fetch(name, file, *, repo_type, revision):
        asked.append((name, file, repo_type, revision))
        if file != "data/synonyms.txt":
            raise OSError("404 Client Error")
        return str(listed)

    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    there = "hf://datasets/someone/chair@0123abc/data/synonyms.txt"
    assert vocabulary(there).nodes == vocabulary(listed).nodes
    assert vocabulary(there).nodes["puppy"] == "dog"
    assert asked[0] == ("someone/chair", "data/synonyms.txt", "dataset", "0123abc")
    with pytest.raises(BenchmarkError, match=r"other\.txt' could not be had from someone/chair"):
        vocabulary("hf://datasets/someone/chair@0123abc/other.txt")
    with pytest.raises(BenchmarkError, match="without the commit"):
        vocabulary("hf://datasets/someone/chair/data/synonyms.txt")
