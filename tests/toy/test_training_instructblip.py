"""Training of toy-instructblip: rows are the questions asked alone, and a broken run goes on."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot, pad
from transformers import AttentionInterface, AutoModelForImageTextToText, AutoProcessor
from transformers.models.instructblip.modeling_instructblip import eager_attention_forward

from clva_lens.ground.errors import ParameterError
from clva_lens.toy import train, vision
from clva_lens.toy import train_instructblip as training
from clva_lens.toy.build_instructblip import (
    QUERIES,
    VISION_WIDTH,
    align,
    processor,
    save,
    tokenizer,
    untrained,
)
from clva_lens.toy.packing import training_questions
from clva_lens.toy.reading_instructblip import READING_LAYERS, CrossReader, mark_layers
from clva_lens.toy.scenes import COLORS, KINDS, SIDES, render, sample_scene
from clva_lens.toy.vision import patch_labels, pixels

PATCHES = 64


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(3)]
    asks = [
        (i, ask) for i, scene in enumerate(scenes) for ask in training_questions(scene, rng, False)
    ]
    return scenes, asks, training.question_rows(scenes, asks)


@pytest.fixture(scope="module")
def model():
    model = untrained(0).eval()
    align(model, training.alignment(model, 0, batches=1), 0)
    return model


def attention(layer, rows, generator_seed=1, batch=3):
    """A module of one layer and random query, keys and values for it."""
    module = torch.nn.Module()
    if layer is not None:
        module.cross_layer = layer
    generator = torch.Generator().manual_seed(generator_seed)
    query = torch.randn(rows, 8, QUERIES, 16, generator=generator)
    key, value = (torch.randn(batch, 8, 1 + PATCHES, 16, generator=generator) for _ in range(2))
    return module, query, key, value


def plainly(query, key, value, mask=None):
    module = torch.nn.Module().eval()
    return eager_attention_forward(module, query, key, value, mask, scaling=16**-0.5)[0]


@torch.no_grad()
def test_reading_without_swaps_is_plain_attention(batch):
    rows = batch[2]
    reader = CrossReader()
    reader.begin(rows.picture, rows.object_patches)
    module, query, key, value = attention(READING_LAYERS[0], len(rows.picture))
    own = plainly(query, key[rows.picture], value[rows.picture])
    torch.testing.assert_close(reader(module, query, key, value, None)[0], own)
    # Among themselves, words and queries attend under their mask.
    mask = torch.rand(len(query), 1, 1, QUERIES) < 0.5
    mask[..., 0] = True
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    selfish = reader(torch.nn.Module(), query, query, query, mask)[0]
    torch.testing.assert_close(selfish, plainly(query, query, query, bias))


@torch.no_grad()
@pytest.mark.parametrize("layer", range(0, 12, 2))
def test_the_reader_swaps_what_it_says(batch, layer):
    rows = batch[2]
    module, query, key, value = attention(layer, len(rows.picture))

    def moved(noise, keys):
        """Rows that notice a change of ``keys`` of picture 0, among its own and the others."""
        reader = CrossReader(swap_probability=(noise,) * len(READING_LAYERS))
        reader.begin(rows.picture, rows.object_patches)
        changed = value.clone()
        changed[0, :, keys] += 1.0
        outputs = []
        for values in (value, changed):
            reader.generator = torch.Generator().manual_seed(2)
            outputs.append(reader(module, query, key, values, None)[0])
        rowwise = (outputs[0] - outputs[1]).abs().amax(dim=(1, 2, 3)) > 0
        own = rows.picture == 0
        return rowwise[own].float().mean().item(), rowwise[~own].float().mean().item()

    patches, whole = slice(1, None), slice(0, 1)
    reading = layer in READING_LAYERS
    assert moved(0.0, patches) == ((1.0, 0.0) if reading else (0.0, pytest.approx(0.5, abs=0.3)))
    own, others = moved(1.0, patches)  # all swapped
    assert own == 0 and others > 0
    assert moved(0.0, whole)[0] == 0  # the class token is another picture's in every layer
    if reading:
        own, others = moved(0.5, patches)
        assert 0 < own < 1 and others > 0


@torch.no_grad()
def test_rows_answer_as_the_plain_model_does(batch, model):
    scenes, asks, rows = batch
    reader = CrossReader()
    reader.begin(rows.picture, rows.object_patches)
    AttentionInterface.register("test_rows", reader)
    mark_layers(model.qformer)
    seen = model.vision_model(pixels(scenes)).last_hidden_state
    answers = training.answer_rows([ask for _, ask in asks], training.CAPTIONED)
    model.qformer.config._attn_implementation = "test_rows"
    out = training.run_qformer(model, rows, seen).last_hidden_state[:, :QUERIES]
    model.qformer.config._attn_implementation = "sdpa"
    together = training.run_decoder(model, model.language_projection(out), answers.ids)
    gap, size = 0.0, 0.0
    for row, (index, ask) in enumerate(asks):
        inputs = processor()(images=[render(scenes[index])], text=[ask.text], return_tensors="pt")
        assert inputs["input_ids"][0, : QUERIES + 1].tolist() == [4] * QUERIES + [1]
        words = inputs["qformer_input_ids"].shape[1]
        first = int(answers.weight[row].nonzero()[0, 0])
        assert first == words - 1  # the answer follows the question directly
        alone = model(**inputs).logits[0, -1]
        gap = max(gap, float((alone - together[row, first]).abs().max()))
        size = max(size, float((alone - together[row, first - 1]).abs().max()))
        answer = answers.target[row][answers.weight[row] > 0]
        assert tokenizer().decode(answer[:-1]) == ask.answer
        assert answer[-1] == tokenizer().eos_token_id
    print(f"{len(asks)} rows: error {gap:.1e}, another position differs by {size:.2f}")
    assert gap < 1e-4
    assert size > 1e-2


def test_alignment_turns_patches_into_their_words(batch, monkeypatch):
    """A tower that sees the labels themselves is read without error, and ground gives nothing."""

    class Labels(torch.nn.Module):
        def forward(self, labels):
            kind, color, side = labels.unbind(1)
            there = (kind > 0)[..., None]
            told = [
                one_hot(kind, 15)[..., 1:],
                one_hot(color, 7)[..., 1:],
                one_hot(side, 2) * there,
            ]
            patches = pad(torch.cat(told, dim=-1).float(), (0, VISION_WIDTH - 22))
            return SimpleNamespace(last_hidden_state=pad(patches, (0, 0, 1, 0)))

    def labelled(scenes):
        return torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes]))

    model = untrained(0)
    model.vision_model = Labels()
    monkeypatch.setattr(training, "pixels", labelled)
    project = training.alignment(model, 0, batches=3)
    words = model.qformer.embeddings.word_embeddings.weight.detach()

    def embedded(names):
        return words[tokenizer().convert_tokens_to_ids(list(names))]

    labels = labelled(batch[0])
    kind, color, side = labels.unbind(1)
    spoken = Labels()(labels).last_hidden_state[:, 1:] @ project.T
    wanted = embedded(KINDS)[kind - 1] + 0.7 * (embedded(COLORS)[color - 1] + embedded(SIDES)[side])
    there = kind > 0
    error = (spoken - wanted)[there].square().mean() / wanted[there].square().mean()
    assert error < 0.01
    assert spoken[~there].abs().max() == 0


def test_a_run_that_broke_off_goes_on_where_it_was(tmp_path, monkeypatch):
    for module in (train, vision):
        monkeypatch.setattr(module, "EVERY", 2)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    recipe = training.InstructBlipRecipe(
        vision_steps=4, alignment_batches=2, qformer_steps=4, pictures=3, captions=2, taught=0.5
    )

    def run(folder, stop_after=None):
        steps = []

        def advance(stage, step, total, figures):
            steps.append((stage, step))
            if stage == "qformer":
                assert np.isfinite(figures["loss"])
                assert ("pointing" in figures) == (step < 2)
            if stop_after == (stage, step):
                raise KeyboardInterrupt

        return training.train(recipe, folder, advance), steps

    whole, steps = run(tmp_path / "whole")
    assert steps[-1] == ("qformer", 3)
    for stage in ("vision", "qformer"):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", stop_after=(stage, 2))
    again, steps = run(tmp_path / "broken")
    assert steps[:2] == [("alignment", 0), ("qformer", 2)]  # 0 and 1 are in the checkpoint
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    times = json.loads((tmp_path / "broken" / "times.json").read_text())
    assert set(times) == {"vision", "alignment", "qformer"}
    with pytest.raises(ParameterError, match="another recipe"):
        training.train(training.InstructBlipRecipe(seed=1), tmp_path / "broken", lambda *_: None)


@torch.no_grad()
def test_a_saved_model_loads_as_it_was(tmp_path, batch):
    model = untrained(3).eval()
    save(model, tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    again = AutoProcessor.from_pretrained(tmp_path)
    asked = {"images": [render(batch[0][0])], "text": ["Is there a cup in the image?"]}
    mine, theirs = processor()(**asked), again(**asked)
    assert mine.keys() == theirs.keys()
    assert mine["input_ids"] == theirs["input_ids"]
    ids = loaded.generate(**again(**asked, return_tensors="pt"), max_new_tokens=2)
    assert ids.shape[1] <= QUERIES + 9 + 2
