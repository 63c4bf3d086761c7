"""Training: packed questions are the questions asked alone, and a broken run goes on."""

import json

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from typer.testing import CliRunner

import clva_lens as cl
from clva_lens.__main__ import app
from clva_lens.toy import train as training
from clva_lens.toy import vision
from clva_lens.toy.build import processor, tokenizer, untrained
from clva_lens.toy.packing import pack, training_questions
from clva_lens.toy.reading import READING_LAYERS, Reader
from clva_lens.toy.scenes import render, sample_scene
from clva_lens.toy.toys import TOYS
from clva_lens.toy.vision import patch_labels, pixels


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(4)]
    questions = [training_questions(scene, rng, hard=False) for scene in scenes]
    return scenes, questions, pack(scenes, questions, tokenizer())


def test_normalised_pixels_are_the_processors(batch):
    scenes = batch[0]
    own = pixels(scenes)
    theirs = processor().image_processor([render(s) for s in scenes], return_tensors="pt")
    assert torch.equal(own, theirs["pixel_values"])


def test_patch_labels_follow_the_objects(batch):
    for scene in batch[0]:
        kind, color, half = patch_labels(scene)
        for name in scene.kinds:
            labelled = kind[scene.patches(name).ravel()]
            assert (labelled > 0).all()
        assert ((color > 0) == (kind > 0)).all()
        assert half.sum() == 32


@torch.no_grad()
def test_a_packed_answer_is_the_answer_alone(batch):
    scenes, questions, packed = batch
    model = untrained(0).eval()
    reader = Reader()
    reader.begin(packed)
    AttentionInterface.register("test_packed", reader)
    text = model.model.language_model
    start = len(packed.prefix) + 64
    image = model.model.multi_modal_projector(
        model.model.vision_tower(pixels(scenes)).last_hidden_state[:, 1:]
    )
    embeds = torch.cat(
        [text.embed_tokens(packed.prefix).expand(4, -1, -1), image, text.embed_tokens(packed.ids)],
        dim=1,
    )
    position = torch.cat([torch.arange(start).expand(4, -1), packed.position], dim=1)
    text.config._attn_implementation = "test_packed"
    unused = torch.ones(4, 1, 1, 1, dtype=torch.bool)
    hidden = text(
        inputs_embeds=embeds, attention_mask=unused, position_ids=position, use_cache=False
    ).last_hidden_state
    together = model.lm_head(hidden[:, start:])
    text.config._attn_implementation = "sdpa"
    cue = tokenizer().convert_tokens_to_ids("ASSISTANT:")
    checked, gap, size = 0, 0.0, 0.0
    for item in range(4):
        for number, row in enumerate((packed.ids[item] == cue).nonzero()[:, 0].tolist()):
            message = {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "text", "text": questions[item][number].text},
                ],
            }
            prompt = processor().apply_chat_template([message], add_generation_prompt=True)
            inputs = processor()(
                images=[render(scenes[item])],
                text=[prompt],
                return_tensors="pt",
                add_special_tokens=False,
            )
            alone = model(**inputs).logits[0, -1]
            gap = max(gap, float((alone - together[item, row]).abs().max()))
            size = max(size, float((alone - together[item, row - 1]).abs().max()))
            checked += 1
    print(f"{checked} packed answers: error {gap:.1e}, another row differs by {size:.2f}")
    assert checked >= 20
    assert gap < 1e-5
    assert size > 1e-2


@torch.no_grad()
def test_the_reader_hides_the_picture_outside_the_reading_layers(batch):
    packed = batch[2]
    reader = Reader(swap_probability=(0.0,) * 5, generator=torch.Generator().manual_seed(0))
    reader.begin(packed)
    generator = torch.Generator().manual_seed(1)
    start = len(packed.prefix) + 64
    length = start + packed.ids.shape[1]
    query, key, value = (torch.randn(4, 8, length, 16, generator=generator) for _ in range(3))
    image = slice(len(packed.prefix), start)
    changed = value.clone()
    changed[0, :, image] += 1.0  # only the first picture changes

    def moved(layer, item):
        module = torch.nn.Module()
        module.layer_idx = layer
        outputs = []
        for values in (value, changed):
            reader.generator = torch.Generator().manual_seed(2)
            outputs.append(reader(module, query, key, values, None)[0])
        rows = (outputs[0] - outputs[1]).abs().amax(dim=(2, 3))[item, start:]
        return rows[packed.answering[item]].max(), rows[~packed.answering[item]].max()

    answering, question = moved(READING_LAYERS[0], 0)
    assert answering > 0.1  # answers read their own picture
    assert question == 0  # questions never do
    for layer in (0, 3, 9, 11):
        assert max(moved(layer, 0)) == 0


def test_a_run_that_broke_off_goes_on_where_it_was(tmp_path, monkeypatch):
    for module in (training, vision):
        monkeypatch.setattr(module, "EVERY", 2)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    recipe = training.Recipe(vision_steps=4, projector_steps=2, decoder_steps=4, taught=0.5)

    def run(folder, stop_after=None):
        steps = []

        def advance(stage, step, total, figures):
            steps.append((stage, step))
            assert all(np.isfinite(v) for k, v in figures.items() if k == "loss")
            if stop_after == (stage, step):
                raise KeyboardInterrupt

        model = training.train(recipe, folder, advance)
        return model, steps

    whole, steps = run(tmp_path / "whole")
    assert steps[-1] == ("decoder", 3)
    for stage in ("vision", "decoder"):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", stop_after=(stage, 2))
    again, steps = run(tmp_path / "broken")
    assert steps[0] == ("decoder", 2)  # steps 0 and 1 are in the checkpoint
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("control", [False, True])
def test_the_command_trains_a_model_that_loads(tmp_path, monkeypatch, control):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    short = training.Recipe(
        vision_steps=1, projector_steps=1, decoder_steps=2, control=control, blind=0.5 * control
    )
    name = "toy-llava-control" if control else "toy-llava"
    monkeypatch.setitem(TOYS._items, name, TOYS.get(name)._replace(recipe=short))
    run = tmp_path / "run"
    command = ["toy", "train", name, "--folder", str(run), "--seed", "5"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    recipe = json.loads((run / "model" / "recipe.json").read_text())
    assert (recipe["seed"], recipe["control"]) == (5, control)
    assert set(json.loads((run / "model" / "times.json").read_text())) == {
        "vision",
        "projector",
        "decoder",
    }
    assert cl.load(run / "model").num_layers == 12
    other = CliRunner().invoke(app, [*command[:-1], "6"])
    assert other.exit_code == 1
    assert "of another recipe" in " ".join(other.stderr.split())
