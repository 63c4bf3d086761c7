"""The logit lens: laws against the model's own logits and plain forward hooks."""

import sys

import nnsight
import pytest
import torch
from tiny_models import blip_of

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, ParameterError, PromptError
from clva_lens.lens.logit_lens import lens_logits
from clva_lens.lens.margins import yes_margins
from clva_lens.models.answer_tokens import answer_tokens


def plain(model, prompt):
    with torch.no_grad():
        return model.hf_model(**prompt.inputs).logits


def test_the_last_layer_at_the_last_position_is_the_model(lens, ask):
    """Law: to 1e-5, single and in a padded batch; ids in the vocabulary's order."""
    for batch in (None, 3):
        prompt = ask(lens, batch)
        read = cl.logit_lens(lens, prompt, tokens=list(range(64)), k=64)
        logits = plain(lens, prompt)[:, -1]
        mine = read.logits if read.batched else read.logits[None]
        assert mine.shape == (batch or 1, 12, 1, 64)
        assert (mine[:, -1, 0] - logits).abs().max() < 1e-5
        chances = read.probabilities.sum(dim=-1)
        assert torch.allclose(chances, torch.ones_like(chances), atol=1e-5)
        margins = torch.tensor(yes_margins(logits, answer_tokens(lens.words)))
        margin = read.margin if read.batched else read.margin[None]
        assert (margin[:, -1, 0] - margins).abs().max() < 1e-5


@pytest.mark.parametrize("language", ["llama", "opt"])
def test_other_language_models(language, ask):
    model = blip_of("sdpa", language)
    prompt = ask(model)
    read = cl.logit_lens(model, prompt, tokens=list(range(64)))
    assert (read.logits[-1, 0] - plain(model, prompt)[0, -1]).abs().max() < 1e-5


def test_every_layer_is_the_norm_and_the_head_called(one, ask):
    """The oracle: transformers' own hidden states through its own modules."""
    prompt, hf = ask(one), one.hf_model
    with torch.no_grad():
        states = hf(**prompt.inputs, output_hidden_states=True).hidden_states
        norm = hf.model.language_model.norm
        wanted = torch.stack([hf.lm_head(norm(state)) for state in states[1:-1]])
    for span in ("image", "text"):
        read = cl.logit_lens(one, prompt, span, tokens=["yes", 7])
        where = getattr(prompt.spans, span)[0]
        chosen = wanted[:, 0, where][..., [one.words.convert_tokens_to_ids("yes"), 7]]
        assert (read.logits[:-1] - chosen).abs().max() < 1e-5
        assert torch.equal(read.top[:-1, :, 0], wanted[:, 0, where].argmax(dim=-1))
    some = cl.logit_lens(one, prompt, prompt.spans.text[0], [3, 5], tokens=["yes", 7])
    assert some.layers == (3, 5)
    assert (some.logits - read.logits[[3, 5]]).abs().max() < 1e-6


def test_methods_and_open_interventions(one, ask):
    prompt = ask(one)
    wanted = cl.logit_lens(one, prompt, method=cl.KnockOut())
    with cl.intervening(one, cl.KnockOut()):
        inside = cl.logit_lens(one, prompt)
    assert torch.equal(inside.margin, wanted.margin)
    assert (wanted.margin - cl.logit_lens(one, prompt).margin).abs().max() > 0.01


def test_inside_a_trace(one, ask):
    """On a layer's output within the block; the reading function itself runs the model."""
    prompt = ask(one)
    with one.trace(prompt):
        inside = lens_logits(one, one.model.language_model.layers[4].output).save()
    read = cl.logit_lens(one, prompt, layers=[4], tokens=list(range(64)))
    assert (inside[0, -1] - read.logits[0, 0]).abs().max() < 1e-5
    with pytest.raises(InterventionError, match="inside a trace"), one.trace(prompt):
        cl.logit_lens(one, prompt)
    with pytest.raises(InterventionError, match="outside a trace"):
        cl.logit_lens()
    with pytest.raises(InterventionError, match="without a model and a prompt"):
        cl.logit_lens(one)


@pytest.mark.parametrize("batch", [None, 3])
def test_the_traces_own_run_is_read(one, ask, batch):
    """Under the methods and the edits of the block; of a generation, the prompt's pass."""
    prompt, options = ask(one, batch), {"span": "last", "tokens": ["yes", 7], "k": 3}
    wanted = cl.logit_lens(one, prompt, method=cl.KnockOut(), **options)
    with one.trace(prompt):
        cl.intervene(cl.KnockOut())
        seen = cl.logit_lens(**options)
        logits = one.output.logits.save()
    for name in ("top", "probabilities", "margin", "logits", "positions", "ids"):
        assert torch.equal(getattr(seen.lens, name), getattr(wanted, name)), name
    assert seen.lens.tokens == wanted.tokens and seen.lens.span == "last"
    plain = cl.logit_lens(one, prompt, **options)
    assert (seen.lens.margin - plain.margin).abs().max() > 0.01
    with one.generate(prompt, max_new_tokens=3) as tracer:
        cl.intervene(cl.KnockOut())
        again = cl.logit_lens(**options)
        tracer.result.save()
    assert (again.lens.margin - wanted.margin).abs().max() < 1e-5
    with one.trace(prompt):
        edited = cl.logit_lens(tokens=list(range(64)))
        one.model.language_model.layers[5].output[:] *= 0.5
        logits = one.output.logits.save()
    final = edited.lens.logits if batch else edited.lens.logits[None]
    assert (final[:, -1, 0] - logits[:, -1]).abs().max() < 1e-5


def test_a_bare_handle_has_no_words(one, ask):
    prompt, handle = ask(one), nnsight.NNsight(one.hf_model)
    with handle.trace(**prompt):
        seen = cl.logit_lens(span="image", tokens=[7])
        handle.output.save()
    wanted = cl.logit_lens(one, prompt, "image", tokens=[7])
    assert torch.equal(seen.lens.logits, wanted.logits) and seen.lens.margin is None
    assert "token " in repr(seen.lens)
    assert seen.lens._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ParameterError, match="no tokenizer"):
        seen.lens.words()
    with pytest.raises(ParameterError, match="no tokenizer"), handle.trace(**prompt):
        cl.logit_lens(tokens="yes")
    with handle.trace(**prompt) as tracer:
        unread = cl.logit_lens()
        tracer.stop()
    with pytest.raises(InterventionError, match="not known yet"):
        _ = unread.lens


def test_pieces_do_not_matter(one, ask, monkeypatch):
    prompt = ask(one)
    whole = cl.logit_lens(one, prompt, "image")
    monkeypatch.setattr(sys.modules["clva_lens.lens.layer_reading"], "LOGITS_AT_ONCE", 64 * 3)
    parts = cl.logit_lens(one, prompt, "image")
    assert (whole.margin - parts.margin).abs().max() < 1e-5


def test_grid_and_pictures(one, ask):
    prompt = ask(one)
    image = cl.logit_lens(one, prompt, "image")
    assert image.on_grid().shape == (12, 4, 4)
    assert torch.equal(image.on_grid().flatten(1), image.margin)
    assert image._repr_png_().startswith(b"\x89PNG")
    assert len(image.draw().axes) == 13
    text = cl.logit_lens(one, prompt, "text")
    assert text._repr_png_().startswith(b"\x89PNG")
    assert "position" in text.draw().axes[0].get_xlabel()
    assert "12 layers" in repr(text)
    with pytest.raises(ParameterError, match="only image tokens lie on a grid"):
        text.on_grid()
    blip = blip_of("sdpa")
    queries = cl.logit_lens(blip, ask(blip), "image")
    with pytest.raises(PromptError):
        queries.on_grid()
    assert queries._repr_png_().startswith(b"\x89PNG")
    batch = cl.logit_lens(one, ask(one, 2))
    assert batch._repr_png_() is None
    with pytest.raises(ParameterError, match="of a batch"):
        batch.draw()
    single = cl.logit_lens(one, ask(one, None, 1))
    assert torch.allclose(batch[1].margin, single.margin, atol=1e-4)
    assert batch[1]._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"span": "picture"}, "span must be"),
        ({"span": torch.ones(3, dtype=torch.bool)}, "Pass a bool mask"),
        ({"layers": [12]}, "layer"),
        ({"tokens": "is there"}, "2 tokens"),
        ({"tokens": [64]}, "ids are 0 to 63"),
        ({"k": 0}, "k must be in 1 to 64"),
    ],
)
def test_refusals(one, ask, options, message):
    with pytest.raises(ParameterError, match=message):
        cl.logit_lens(one, ask(one), **options)
