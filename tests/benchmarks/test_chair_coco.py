import gzip
import json
from dataclasses import asdict, replace
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


# What lies about: OPERA's and less-is-more's, LLaVA's model_vqa.py, and what CHAIR's script writes.
CAPTIONS = {
    "opera": [{"image_id": 42, "caption": "A dog."}],
    "less-is-more": [{"image_id": "COCO_val2014_000000000042.jpg", "text": "A dog."}],
    "llava": [{"question_id": 0, "image": "COCO_val2014_000000000042.jpg", "text": "A dog."}],
    "others": [{"image": "000000000042.jpg", "id": 3, "prompt": "Describe.", "response": "A dog."}],
    "script": {
        "sentences": [{"image_id": 42, "caption": "A dog.", "metrics": {"CHAIRs": 0}}],
        "overall_metrics": {"CHAIRs": 0.0},
    },
}


@pytest.mark.parametrize("indent", [None, 4])
@pytest.mark.parametrize("layout", CAPTIONS)
def test_layouts_of_captions(layout, indent, tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(CAPTIONS[layout], indent=indent))
    assert ChairCoco().read_answers(path) == read_captions(path) == [Answer("42", "A dog.")]
    assert read_image_ids(path) == [42]


def test_captions_of_our_own_runs(tmp_path):
    path = tmp_path / "answers.jsonl"
    told = [Answer("42", "A dog."), Answer("7", "", error="no memory")]
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in told))
    assert ChairCoco().read_answers(path) == told


BROKEN = {
    '{"image_id": 42, "caption": "A dog."}\n{"image_id": 7, "capt': "line 2",
    '{"caption": "A dog."}\n': "row 1 of .* has no image_id",
    '{"image_id": 42, "reply": "A dog."}\n': "row 1 of .* no text in .*; it has image_id, reply",
    '{"image_id": 42, "caption": null}\n': "row 1 of .* has no text",
    '{"image_id": 42, "caption": "A", "text": "B"}\n': "row 1 .* different texts in caption, text",
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
    for text, match in {"": "no images", "9\n9": "image 9 twice", "[9,": "line 1: Exp"}.items():
        path.write_text(text)
        with pytest.raises(BenchmarkError, match=match):
            read_image_ids(path)
    with pytest.raises(BenchmarkError, match=r"there is no file .*absent"):
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
    with pytest.raises(BenchmarkError, match=r"2 of the 3 images in .* of val2014, such as 3"):
        ChairCoco(data=coco, ids=ids).questions()
    (coco / "val2014" / "COCO_val2014_000000000002.jpg").unlink()
    with pytest.raises(BenchmarkError, match="1 of 2 images are missing"):
        ChairCoco(data=coco, count=None).samples()
    (coco / "annotations" / "captions_val2014.json").write_text('{"annotations": [{}]}')
    with pytest.raises(BenchmarkError, match="not COCO's: KeyError"):
        ChairCoco(data=coco, count=None).questions()
    with pytest.raises(UnknownName, match="no lemmatiser 'wordnet'"):
        ChairCoco(lemmatiser="wordnet")


KNOWN = {
    "places.json": {"categories": ["dog", "bus"], "objects": {"1": [0], "2": [], "3": [0, 1]}},
    "names.json": {"1": ["dog"], "2": [], "3": ["bus", "dog"]},
    "rows.jsonl": [
        {"image": "COCO_val2014_000000000001.jpg", "objects": ["puppy"]},
        {"image": "000000000002.jpg", "objects": []},
        {"image_id": 3, "objects": ["bus", "dog", "dog"]},
    ],
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_captions_are_scored_by_known_objects_without_annotations(
    name, packed, tmp_path, monkeypatch
):
    monkeypatch.delenv("CLVA_LENS_DATA", raising=False)
    text = json.dumps(KNOWN[name])
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    captions = tmp_path / "captions.jsonl"
    told = {3: "A bus—and a cat.", 1: "A dog."}
    captions.write_text(
        "".join(json.dumps({"image_id": n, "caption": t}) + "\n" for n, t in told.items())
    )
    chair = ChairCoco(objects=path, ids=captions)
    assert [(s.id, s.label) for s in chair.questions()] == [("3", "bus,dog"), ("1", "dog")]
    assert chair.questions()[0].image == "COCO_val2014_000000000003.jpg"
    metrics = chair.score(chair.questions(), chair.read_answers(captions)).metrics
    # bus, cat and dog are mentioned, of which the cat is not there; the dog of 3 is not found.
    assert (metrics["chair_i"], metrics["chair_s"]) == (pytest.approx(1 / 3), 0.5)
    assert metrics["recall"] == pytest.approx(2 / 3)
    older = replace(chair, nltk="3.9")
    found = older.score(older.questions(), older.read_answers(captions)).metrics
    assert found["recall"] == pytest.approx(1 / 3)
    assert set(chair.digests()) == {path.name, "image ids"}
    everything = ChairCoco(objects=path, count=None, split="val2017").questions()
    assert {s.image for s in everything} == {f"{n:012d}.jpg" for n in (1, 2, 3)}
    captions.write_text('{"image_id": 9, "caption": "A dog."}')
    with pytest.raises(BenchmarkError, match=f"1 of the 1 images .* objects of .*{name}.* as 9"):
        replace(chair).questions()
    with pytest.raises(BenchmarkError, match=f"count=500, but .*{name}.* has 3 images with"):
        ChairCoco(objects=path).questions()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"1": ["unicorn"]}', "has 'unicorn', no word of the synonyms"),
        ('{"categories": ["dog"], "objects": {"1": [7]}}', "does not list .*IndexError"),
        ('{"categories": ["dog"]}', "does not list .*KeyError"),
        ('{"1": 7}', "does not list .*TypeError"),
        ('[{"image": "1.jpg", "objects": []}, {"image": 1, "objects": []}]', "one twice"),
        ('{"1": [], "000000000001.jpg": []}', "one twice"),
        ("", "no images"),
        ('{"1": ["dog"', "neither JSON"),
        ('{"dog": ["1"]}', "'dog' is no COCO image"),
    ],
)
def test_lists_of_objects_that_are_none(content, message, tmp_path):
    path = tmp_path / "objects.json"
    path.write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        ChairCoco(objects=path, count=None).questions()
    packed = tmp_path / "objects.json.gz"
    packed.write_bytes(gzip.compress(b"{}")[:-6])
    with pytest.raises(BenchmarkError, match=r"cannot be read: .*Get it again"):
        ChairCoco(objects=packed, count=None).questions()


@with_data
@pytest.mark.parametrize("lemmatiser", ["pattern", "builtin"])
def test_known_objects_score_as_annotations_do(lemmatiser, tmp_path):
    """The published objects of all 123,287 images, against the annotations of 70 of them."""
    official = {"lemmatiser": lemmatiser, "synonyms": MINI.parent / "chair" / "synonyms.txt"}
    annotated = ChairCoco(data=MINI, split="mini", count=None, **official)
    path = tmp_path / "captions.jsonl"
    captions = json.loads((MINI / "annotations" / "captions_mini.json").read_text())["annotations"]
    texts = {one["image_id"]: one["caption"] for one in captions}
    told = zip(texts, [*texts.values()][1:] + [*texts.values()][:1], strict=True)
    path.write_text("".join(json.dumps({"image_id": n, "caption": t}) + "\n" for n, t in told))
    listed = MINI.parent / "chair" / "coco2014_trainval_gt_objects.pattern.json.gz"
    known = ChairCoco(objects=listed, ids=path, **official)
    scores = [
        one.score(one.questions(), one.read_answers(path)).metrics for one in (annotated, known)
    ]
    assert scores[0] == scores[1]
    assert scores[0]["chair_i"] > 0.4


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
