"""Direct logit attribution: parts add up to the model's own logits."""

import pytest
import torch
from tiny_models import blip_of

import clva_lens as cl
from clva_lens.ground.errors import ParameterError, PromptError
from clva_lens.lens.margins import yes_margins
from clva_lens.models.answer_tokens import answer_tokens


def check(model, prompt, read):
    """The two laws, and the difference is the margin."""
    with torch.no_grad():
        logits = model.hf_model(**prompt.inputs).logits[:, -1]
    margins = torch.tensor(yes_margins(logits, answer_tokens(model.words)))
    difference = read.difference if read.batched else read.difference[None]
    assert (difference - margins).abs().max() < 1e-5
    assert (read.total - read.difference).abs().max() < 2e-5
    parts = read.image.sum(dim=-1) + read.elsewhere
    assert (parts - read.heads).abs().max() < 1e-5
    assert read.heads.abs().max() > 0.01 and read.image.abs().max() > 1e-3


@pytest.mark.parametrize("batch", [None, 3])
def test_parts_sum_to_the_logits(lens, ask, batch):
    prompt = ask(lens, batch)
    check(lens, prompt, cl.direct_logit_attribution(lens, prompt))


@pytest.mark.parametrize("language", ["llama", "opt"])
def test_other_language_models(language, ask):
    """OPT has layer norms, biases and added positions."""
    model = blip_of("sdpa", language)
    prompt = ask(model)
    read = cl.direct_logit_attribution(model, prompt)
    check(model, prompt, read)
    with pytest.raises(PromptError):
        read.on_grid()


def test_methods_and_open_interventions(one, ask):
    prompt = ask(one)
    read = cl.direct_logit_attribution(one, prompt, method=cl.KnockOut())
    assert (read.total - read.difference).abs().max() < 2e-5
    assert (read.image.sum(dim=-1) + read.elsewhere - read.heads).abs().max() < 1e-5
    with cl.intervening(one, cl.KnockOut()):
        inside = cl.direct_logit_attribution(one, prompt)
    assert torch.equal(inside.heads, read.heads) and torch.equal(inside.image, read.image)
    assert (read.heads - cl.direct_logit_attribution(one, prompt).heads).abs().max() > 0.01


def test_tokens(one, ask):
    prompt = ask(one)
    with torch.no_grad():
        logits = one.hf_model(**prompt.inputs).logits[0, -1]
    single = cl.direct_logit_attribution(one, prompt, 7)
    assert abs(float(single.total - logits[7])) < 2e-5
    pair = cl.direct_logit_attribution(one, prompt, (7, "cup"))
    cup = one.words.convert_tokens_to_ids("cup")
    assert abs(float(pair.total - logits[7] + logits[cup])) < 2e-5
    for tokens, message in (
        ([], "1 or 2 are needed"),
        (64, "ids are 0 to 63"),
        ("a b", "2 tokens"),
    ):
        with pytest.raises(ParameterError, match=message):
            cl.direct_logit_attribution(one, prompt, tokens)


def test_pictures(one, ask):
    read = cl.direct_logit_attribution(one, ask(one))
    assert read._repr_png_().startswith(b"\x89PNG")
    assert read.on_grid().shape == (12, 4, 4)
    assert read.draw_image()._repr_png_().startswith(b"\x89PNG")
    labels = [text.get_text() for text in read.draw().legends[0].get_texts()]
    assert labels[0].startswith("sensitive (") and "LogitAttribution(" in repr(read)
    batch = cl.direct_logit_attribution(one, ask(one, 2))
    assert batch._repr_png_() is None
    with pytest.raises(ParameterError, match="of a batch"):
        batch.draw()
