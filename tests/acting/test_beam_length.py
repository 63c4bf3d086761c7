"""Beams are divided by their length, or by their length with the prompt, as they were in 4.29.

The rule is held against a search that is written out: every sequence of three tokens, and its end.
"""

import math
from dataclasses import asdict

import pytest
import torch
from tiny_models import QUESTIONS, blip_of, lens_of, picture

import clva_lens as cl
from clva_lens.ground.errors import ParameterError
from clva_lens.lens.beam_length import PromptCounted, counting_prompt
from clva_lens.lens.decoding import told
from clva_lens.methods.beams import Beams

BOTH = [cl.Beam(num_beams=3, max_new_tokens=12, length=one) for one in ("generated", "with prompt")]
COUNT = 7  # tokens of a prompt, the picture being one


@pytest.fixture
def ending(monkeypatch):
    """A model whose likeliest tokens are ends of an answer, and its pairs."""
    lens = lens_of("full", "sdpa")
    prompts = [lens.prompt(picture(i), QUESTIONS[i]) for i in range(3)]
    with torch.inference_mode():
        first = [lens.hf_model(**one).logits[0, -1].topk(6).indices.tolist() for one in prompts]
    monkeypatch.setattr(
        lens.hf_model.generation_config, "eos_token_id", sorted({ids[5] for ids in first})
    )
    return lens, [(picture(i), QUESTIONS[i]) for i in range(3)]


def answers(lens, asked, how, method=None, size=3):
    found = cl.generate(lens, asked, method, how, batch_size=size, progress=False)
    return [row.tolist() for row in found.ids]


def test_a_prompt_is_counted_without_padding_and_its_picture_once():
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt([picture(0), picture(1)], QUESTIONS[:2])
    mask, ids = prompt["attention_mask"].bool(), prompt["input_ids"]
    words = [int((row[real] != 5).sum()) for row, real in zip(ids, mask, strict=True)]
    assert words[0] != words[1]
    assert (4 ** counting_prompt(prompt)).tolist() == [[4 + n + 1] for n in words]
    assert 4 ** counting_prompt(prompt.row(0)) == 4 + words[0] + 1


def test_the_prompt_decides_which_beam_is_best(ending):
    """The rule by hand: of what one search finished, the other rule takes another."""
    lens, asked = ending
    plain, counted = (answers(lens, asked, how) for how in BOTH)
    assert plain != counted
    assert sum(map(len, counted)) < sum(map(len, plain))
    for how, found in zip(BOTH, (plain, counted), strict=True):
        alone = [answers(lens, [one], how)[0] for one in asked]
        assert alone == found


def test_opera_has_the_rule_too(ending):
    lens, asked = ending
    plain, counted = (answers(lens, asked, how, cl.OPERA(candidates=6)) for how in BOTH)
    assert plain != counted
    assert sum(map(len, counted)) < sum(map(len, plain))


def test_a_score_is_divided_by_both():
    """By hand: sums −2 and −3 at 1 and 4 generated tokens, alone and with 7 of the prompt."""
    config = lens_of("full", "sdpa").hf_model.generation_config
    for penalty, wanted in ((1.0, -3 / 4), (PromptCounted(COUNT), -2 / (1 + COUNT))):
        config = type(config)(length_penalty=penalty, num_beams=2)
        beams = Beams(torch.zeros(2, COUNT, dtype=torch.long), torch.zeros(2), COUNT)
        for more, total in ((0, -2.0), (3, -3.0)):
            ids = torch.zeros(2, COUNT + more + 1, dtype=torch.long)
            grown = Beams(ids[:, :-1], torch.zeros(2), COUNT, beams.finished)
            scores = torch.tensor([total, -math.inf])
            stopped = torch.tensor([True, False])
            beams = Beams(ids, scores, COUNT, grown._finish(scores, ids, stopped, config))
        assert beams.finished[0][0] == pytest.approx(wanted)


def test_it_is_recorded_and_needs_a_prompt_of_tokens():
    lens = lens_of("full", "sdpa")
    assert told(BOTH[1], lens.hf_model, lens.words)["length"] == "with prompt"
    assert asdict(cl.Beam())["length"] == "generated"
    with pytest.raises(ParameterError, match=r"length must be 'generated' or 'with prompt'"):
        cl.Beam(length="prompt")
    with pytest.raises(ParameterError, match=r"embeddings of a Q-Former.*length='generated'"):
        cl.generate(blip_of("sdpa"), (picture(0), QUESTIONS[0]), None, BOTH[1])
