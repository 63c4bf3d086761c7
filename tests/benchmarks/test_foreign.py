"""Files of answers that others wrote, or that are none: one law over all benchmarks."""

import json

import pytest

from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.benchmarks.chair_coco import ChairCoco
from clva_lens.benchmarks.foreign import picture_name
from clva_lens.benchmarks.llava_bench import LlavaBench
from clva_lens.benchmarks.mme import Mme
from clva_lens.benchmarks.pope_sets import Pope
from clva_lens.ground.errors import BenchmarkError

BROKEN = {
    "no JSON": "yes\n",
    "a line half written": '{"question_id": 1, "id": "1", "image_id": 1, "te\n',
    "no object": "7\n",
    "rows in rows": "[[1, 2]]\n",
    "no name of a question": '{"label": "yes"}\n',
    "no answer": '{"question_id": 1, "image_id": 1}\n',
    "an answer that is no text": '{"id": "1", "text": null, "margin": 1.0, "error": null}\n',
    "two answers": '{"question_id": 1, "image_id": 1, "answer": "yes", "response": "no"}\n',
    "a margin that is none": '{"id": "1", "text": "", "margin": "high", "error": null}\n',
    "an error that is none": '{"id": "1", "text": "", "margin": null, "error": 7}\n',
    "a name that is none": '{"id": [1], "question_id": [1], "image_id": [1], "text": "yes"}\n',
    "no text": "\0\1\2\n",
}


@pytest.fixture
def every(tmp_path):
    """Every benchmark, those of published data with one question each."""

    def write(name, *rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    asked = {"question_id": 1, "image": "a.jpg", "text": "Is it?", "category": "conv"}
    write("coco_pope_random.json", asked | {"label": "yes"})
    write("questions.jsonl", asked)
    write("answers_gpt4.jsonl", {"question_id": 1, "text": "Yes."})
    write("context.jsonl", {"image": "a.jpg", "caption": "A cat."})
    row = {"image_path": "count/a.jpg", "question": "Is it?", "answer": "Yes", "category": "count"}
    toys = [one for name, one in BENCHMARKS.items() if "toy" in name]
    assert len(toys) > 5
    return [
        *toys,
        Pope("coco", "random", data=tmp_path),
        Mme(data=write("MME_question.jsonl", row)),
        LlavaBench("wild", data=tmp_path),
        ChairCoco(objects=write("objects.json", {"1": ["dog"]}), count=None),
    ]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_without_advice_about_runs(every, kind, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(BROKEN[kind])
    for benchmark in every:
        with pytest.raises(BenchmarkError, match=r"answers\.jsonl|COCO image") as caught:
            benchmark.read_answers(path)
        told = str(caught.value)
        assert not any(word in told for word in ("head -n", "resume", "the run")), told
        # A remedy follows what was found.
        assert told.count(". ") >= 1, told


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("a.jpg", "a"),
        ("val2014/COCO_val2014_000000310196.jpg", "310196"),
        ("COCO_train2014_000000000009.JPEG", "9"),
        ("C:\\images\\0020.png", "20"),
        ("0020.txt", "20"),
        ("0020", "20"),
        ("0.jpg", "0"),
        ("tt0032138_shot_0395_img_0.jpg", "tt0032138_shot_0395_img_0"),
        ("00.5.jpg", "0.5"),
        ("", ""),
    ],
)
def test_names_of_pictures(name, wanted):
    assert picture_name(name) == wanted
