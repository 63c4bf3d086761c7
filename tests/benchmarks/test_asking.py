"""What a benchmark says about asking reaches the model's prompt."""

import json

import numpy as np
import pytest
from PIL import Image

import clva_lens as cl
from clva_lens.benchmarks.pope_sets import Pope
from clva_lens.benchmarks.protocols import LLAVA_V1
from clva_lens.benchmarks.toy_mme import ToyMme
from clva_lens.ground.errors import PromptError
from clva_lens.lens.load import LensModel


@pytest.fixture(scope="module")
def toys():
    return {name: cl.load(name) for name in ("toy-llava", "toy-instructblip")}


@pytest.fixture
def asked(monkeypatch):
    """The (questions, system message) of every batch that a model is asked."""
    seen = []
    prompt = LensModel.prompt

    def spy(self, image, question, *, system=None, **more):
        seen.append((question, system))
        return prompt(self, image, question, system=system, **more)

    monkeypatch.setattr(LensModel, "prompt", spy)
    return seen


@pytest.fixture
def pope(tmp_path):
    row = {"question_id": 1, "image": "7.jpg", "text": "Is there a cup?", "label": "yes"}
    (tmp_path / "coco_pope_random.json").write_text(json.dumps(row))
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(tmp_path / "7.jpg")
    return Pope("coco", "random", data=tmp_path, images=tmp_path, protocol="vcd")


def test_the_protocol_reaches_models_that_chat(toys, asked, pope):
    greedy = cl.Greedy(max_new_tokens=2)
    report = cl.evaluate(toys["toy-llava"], pope, decoding=greedy, progress=False)
    question = "Is there a cup? Please answer this question with one word."
    assert asked == [([question], LLAVA_V1)]
    assert report.record["settings"]["protocol"] == "vcd"
    # InstructBLIP's prompts are no conversations: VCD asks it the question alone.
    asked.clear()
    cl.evaluate(toys["toy-instructblip"], pope, decoding=greedy, progress=False)
    assert asked == [([question], None)]


def test_system_messages_of_pairs(toys, asked):
    image = np.zeros((64, 64, 3), np.uint8)
    question, greedy = "is there a cup in the image?", cl.Greedy(max_new_tokens=1)
    model = toys["toy-llava"]
    cl.generate(model, [(image, question, "a chat"), (image, question, "a chat")], None, greedy)
    cl.generate(model, [(image, question)], None, greedy)
    assert [system for _, system in asked] == ["a chat", None]
    with pytest.raises(PromptError, match="different system messages"):
        cl.generate(model, [(image, question, "a chat"), (image, question)], None, greedy)
    other = model.prompt(image, question, system="an image")  # is run as it is, by itself
    both = cl.generate(model, [(image, question, "a chat"), other], None, greedy)
    alone = [cl.generate(model, one, None, greedy) for one in ((image, question, "a chat"), other)]
    assert both.margins == [margin for one in alone for margin in one.margins]
    assert both.margins[0] != both.margins[1]


def test_the_toy_mme_runs(toys):
    report = cl.evaluate(toys["toy-llava"], ToyMme(pictures=8), progress=False)
    metrics = report.metrics
    # It was trained to say whether a thing is there; a color is its answer to "is it red?".
    assert metrics["existence"] > 100
    assert metrics["color"] < 50 and metrics["unparsed"] > 8
    answers = {row["answer"] for row in report.rows if row["category"] == "color"}
    assert answers & {"red", "green", "blue", "yellow", "purple", "white"}
    again = cl.evaluate(toys["toy-llava"], ToyMme(pictures=8), method=cl.CLVA(), progress=False)
    assert cl.compare(report.score, again.score, resamples=20).n == 64
