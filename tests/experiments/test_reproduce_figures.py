"""Figures of a reproduction: maps with the object outlined, and a judge's replies to answers."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.benchmarks.coco_instances import asked_name, read_instances
from clva_lens.benchmarks.pope_sets import Pope
from clva_lens.benchmarks.run_folder import Report
from clva_lens.experiments.asked_object import asked_object
from clva_lens.experiments.reproduce import maps
from clva_lens.experiments.reproduce.found import Found
from clva_lens.experiments.reproduce.items import ITEMS, chosen
from clva_lens.experiments.reproduce.reproducing import items_of
from clva_lens.experiments.reproduce.subjects import Subject, data_in
from clva_lens.ground.errors import BenchmarkError
from clva_lens.lens.patch_masks import coco_mask

items_of()
TOY = Subject("toy-llava", limit=6)
MINI = Path(__file__).parents[3] / "shared" / "data" / "coco_mini"
INSTANCES = MINI / "annotations" / "instances_mini.json"


@pytest.fixture(scope="module")
def lens():
    return cl.load("toy-llava")


class Measured(Found):
    """What was just measured, as it is read back from a file."""

    told: ClassVar = {}

    def measured(self, measure):
        return json.loads(json.dumps(self.told))


def test_figures_stand_in_the_papers_order():
    names = [name for name in chosen([]) if name.startswith("figure")]
    assert names[:7] == [f"figure {one}" for one in ("1", "2", "2a", "4", "5", "6", "7")]


def test_maps_of_a_question_and_what_of_them_is_on_the_object(lens, tmp_path, monkeypatch):
    (need,) = ITEMS.get("figure 7").needs(TOY)
    told = need.call(lens)
    (sample,) = maps.first_about(TOY.pope("random")["toy"], "bicycle")
    assert told["sample"] == sample.id and asked_name(sample.question) == "bicycle"
    # From whole patterns: the share over the layers after the anchor, which is layer 4.
    prompt = lens.prompt(sample.image, sample.question, system=sample.system)
    _, cache = lens.run_with_cache(prompt, names_filter=lambda name: name.endswith("hook_pattern"))
    rows = [cache["pattern", layer][0, :, -1].mean(0)[prompt.spans.image[0]] for layer in range(12)]
    place = torch.tensor(told["objects"]).flatten()
    after = torch.stack(rows[5:]).double()
    share = float(after[:, place].sum() / after.sum())
    found = told["on_object"]
    print(f"on the object: {found}")
    assert found["greedy"] == pytest.approx(share, abs=1e-6)
    assert found["area"] == pytest.approx(float(place.double().mean()))
    assert abs(found["CLVA"] - share) > 0.01 and found["CLVA on random tokens"] != found["CLVA"]
    picture = maps.unpacked(told["image"])
    assert np.abs(picture / 255 - np.asarray(sample.image) / 255).max() < 1e-9
    monkeypatch.setattr(Measured, "told", told)
    part = ITEMS.get("figure 7").part(TOY, Measured(tmp_path))
    assert "asked for a bicycle: of the attention" in part.notes[0]
    assert set(part.drawings) == {"maps"}
    assert {row["run"] for row in part.drawings["maps"].rows} == {"greedy", "with CLVA"}


def test_pointing_is_counted_beside_random_weights_and_chance(lens, tmp_path, monkeypatch):
    (need,) = ITEMS.get("figure 2a").needs(TOY)
    monkeypatch.setattr(Measured, "told", need.call(lens))
    part = ITEMS.get("figure 2a").part(TOY, Measured(tmp_path))
    assert set(part.drawings) == {"maps", "pointing"}
    rows = part.drawings["pointing"].rows
    assert {row["run"] for row in rows} == {"greedy", "random weights", "chance"}
    assert all(row["low"] is None for row in rows), "six pictures make no interval"
    at = {(row["run"], row["layer"]): row["value"] for row in rows}
    print(f"layer 5: {at['greedy', 5]:.2f}, random weights {at['random weights', 5]:.2f}")
    assert at["greedy", 5] >= 5 / 6 and at["random weights", 5] < at["greedy", 5]
    assert "6 objects" in part.notes[1]


@pytest.mark.skipif(not INSTANCES.exists(), reason="un-skip when shared/data is beside the tests")
def test_an_object_of_coco_is_outlined_as_its_annotations_have_it(lens):
    pope = Pope("coco", "adversarial", data=MINI / "pope", images=MINI / "images")
    known, outlined = read_instances(INSTANCES), {}
    for sample in pope.samples():
        prompt = lens.prompt(pope.picture(sample), "is there a cup in the image?")
        outlined[sample] = asked_object(lens, pope, sample, prompt, known)
        assert asked_object(lens, pope, sample, prompt) is None
    assert all(mask is None for sample, mask in outlined.items() if sample.label == "no")
    found = {sample: mask for sample, mask in outlined.items() if mask is not None}
    assert len(found) == 4
    for sample, mask in found.items():
        size, annotations = known.asked(sample)
        with Image.open(sample.image) as photo:
            assert photo.size == size[::-1]
        pixels = np.logical_or.reduce([coco_mask(one, size) for one in annotations])
        # The toy's processor scales the shorter side to 64 and cuts the middle: 8 × 8 patches.
        side = min(size)
        top, left = ((length - side) // 2 for length in size)
        middle = Image.fromarray(pixels[top : top + side, left : left + side])
        small = np.asarray(middle.convert("L").resize((640, 640))) > 127
        share = small.reshape(8, 80, 8, 80).mean(axis=(1, 3))
        clear = np.abs(share - 0.25) > 0.05
        assert mask.any() and (mask == (share >= 0.25))[clear].all()


def test_a_file_without_instances_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"images": []}')
    with pytest.raises(BenchmarkError, match="Pass an instances_"):
        read_instances(path)


class Captions(Found):
    """Four captions, whichever run is asked for."""

    def report(self, run):
        samples = BENCHMARKS.get("chair/toy").samples(4)
        rows = [
            {"id": one.id, "group": one.group, "question": one.question, "label": one.label}
            | {"answer": "there is a cup and a car."}
            for one in samples
        ]
        return Report({}, rows, {"benchmark": "chair/toy"})


def cases(tmp_path, replies):
    ids = [row["id"] for row in Captions(tmp_path).report(None).rows]
    folder = tmp_path / "judgements"
    folder.mkdir()
    text = "".join(replies(ids))
    (folder / "toy-llava-CLVA.jsonl").write_text(text)
    with data_in(tmp_path):
        return ITEMS.get("figures 8-10").part(TOY, Captions(tmp_path))


def test_a_judges_replies_are_told_below_the_answers(tmp_path):
    def replies(ids):
        reviews = [(ids[0], "8 6.5\nBetter."), (ids[1], "no scores"), ("other", "1 2")]
        return (json.dumps({"question_id": i, "content": text}) + "\n" for i, text in reviews)

    part = cases(tmp_path, replies)
    first, second, *_ = part.answers
    assert first.told == {"Greedy": "", "CLVA": "judge: 6.5 (reference 8)"}
    assert second.told == {"Greedy": "", "CLVA": ""}
    assert part.notes == [
        "toy-llava, CLVA: a judge scored 1 of 4 answers (1 replies are about none of them)."
    ]


def test_a_judges_file_that_is_broken_is_a_note_and_no_end(tmp_path):
    part = cases(tmp_path, lambda ids: [f'{{"question_id": "{ids[0]}"}}\n'])
    assert len(part.answers) == 4 and len(part.cells) == 4
    (note,) = part.notes
    assert "left out" in note and "neither content nor text" in note
