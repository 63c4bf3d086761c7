"""The Q-Former runs once a picture: no effect is applied twice, and none is lost under beams."""

import nnsight
import pytest
import torch
from tiny_models import LANGUAGES, QUESTIONS, blip_of, picture

import clva_lens as cl

STEPS = 5
READING, ANSWERING = cl.CLVA(tau=1.0), cl.CLVA(tau=1.0, site="decoder")


def generate(model, inputs, *methods, **options):
    options = {"max_new_tokens": STEPS, "do_sample": False} | options
    with torch.inference_mode(), cl.intervening(model, *methods):
        return model.generate(**inputs, **options)


def logits(model, inputs, *methods):
    with torch.inference_mode(), cl.intervening(model, *methods):
        return model(**inputs).logits


class Calls:
    """Counts the calls of modules, and keeps their last output."""

    def __init__(self, *modules):
        self.outputs = [[] for _ in modules]
        self.handles = [
            module.register_forward_hook(lambda *call, into=into: into.append(call[-1]))
            for module, into in zip(modules, self.outputs, strict=True)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    @property
    def counts(self):
        return [len(some) for some in self.outputs]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("batch", [None, 3])
def test_one_call_and_one_reading_of_the_anchors(one_blip, ask, monkeypatch, beams, batch):
    """Whatever the beams, the batch and the number of steps."""
    from clva_lens.methods import clva

    read, made = [], []
    original, bias = clva.read_prompt_rows, clva.ClvaSession._make_bias
    monkeypatch.setattr(
        clva, "read_prompt_rows", lambda call: read.append(call.layer) or original(call)
    )
    monkeypatch.setattr(
        clva.ClvaSession, "_make_bias", lambda self, call: made.append(1) or bias(self, call)
    )
    model = one_blip.hf_model
    stack = model.qformer.encoder.layer
    with Calls(model.qformer, *(stack[i].crossattention.attention for i in (0, 6, 10))) as calls:
        ids = generate(model, ask(one_blip, batch).inputs, READING, num_beams=beams)
    assert len(ids) == (batch or 1)
    assert calls.counts == [1, 1, 1, 1]
    assert read == [0, 4]
    assert len(made) == 1


def features(lens, inputs, *methods):
    """Return what the queries hand to the language model, from a forward pass."""
    with Calls(lens.hf_model.language_projection) as calls:
        logits(lens.hf_model, inputs, *methods)
    assert calls.counts == [1]
    return calls.outputs[0][0]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_is_feeding_the_edited_features_by_hand(language, ask, beams):
    """Beams expand the features after the edit: all beams of a picture get the same effect once."""
    lens = blip_of("sdpa", language)
    model, inputs = lens.hf_model, ask(lens, 3).inputs
    options = {"num_beams": beams, "num_return_sequences": beams, "do_sample": False}
    options |= {"max_new_tokens": STEPS, "output_scores": True, "return_dict_in_generate": True}
    found = generate(model, inputs, READING, **options)
    plain = generate(model, inputs, **options)
    with torch.inference_mode():
        ids = inputs["input_ids"]
        embeds = model.get_input_embeddings()(ids)
        edited = features(lens, inputs, READING)
        embeds = embeds.masked_scatter((ids == 5)[..., None], edited)
        given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        if not model.language_model.config.is_encoder_decoder:
            given["input_ids"] = ids
        wanted = model.language_model.generate(**given, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    for one, other in zip(found.scores, wanted.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert float((found.scores[0] - plain.scores[0]).abs().max()) > 0.05
    assert len(found.sequences) == 3 * beams


def test_beams_change_under_the_method(one_blip, ask):
    """The answers themselves differ: the equality above is not one of constants."""
    inputs = ask(one_blip, 3).inputs
    for beams in (1, 3):
        plain = generate(one_blip.hf_model, inputs, num_beams=beams)
        for method in (READING, ANSWERING):
            edited = generate(one_blip.hf_model, inputs, method, num_beams=beams)
            assert not torch.equal(plain, edited)


def test_features_are_those_of_generate(blip, ask):
    """The same edit in a forward pass and in generate, greedy or with beams, bit by bit."""
    inputs = ask(blip, 3).inputs
    wanted = features(blip, inputs, READING)
    for beams in (1, 3):
        with Calls(blip.hf_model.language_projection) as calls:
            generate(blip.hf_model, inputs, READING, num_beams=beams)
        assert torch.equal(calls.outputs[0][0], wanted)
    assert float((features(blip, inputs) - wanted).abs().max()) > 0.05


def test_two_of_the_same_are_applied_twice_one_once(one_blip, ask):
    inputs = ask(one_blip, 3).inputs
    bare, once = features(one_blip, inputs), features(one_blip, inputs, READING)
    twice = features(one_blip, inputs, READING, READING)
    assert torch.equal(twice, features(one_blip, inputs, cl.compose(READING, READING)))
    with cl.intervening(one_blip.hf_model, READING):
        assert torch.equal(twice, features(one_blip, inputs, READING))
        # A forward pass within the block of another does not leave a second effect behind.
        assert torch.equal(once, features(one_blip, inputs))
    for one, other in ((bare, once), (once, twice), (bare, twice)):
        assert float((one - other).abs().max()) > 0.05


def test_each_picture_has_its_own_anchors(one_blip, ask):
    """One block, three questions one after the other: each is as if it were alone."""
    alone = [generate(one_blip.hf_model, ask(one_blip, first=i).inputs, READING) for i in range(3)]
    anchors = []
    with torch.inference_mode(), cl.intervening(one_blip.hf_model, READING) as run:
        for item in range(3):
            inputs = ask(one_blip, first=item).inputs
            found = one_blip.hf_model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
            assert torch.equal(found, alone[item])
            anchors.append(run.anchors.positive_map)
    assert float((anchors[0] - anchors[1]).abs().max()) > 0.01


# ── both sites at once ──


def test_the_order_of_sites_does_not_matter(one_blip, ask):
    inputs = ask(one_blip, 3).inputs
    wanted = logits(one_blip.hf_model, inputs, READING, ANSWERING)
    for methods in (
        (ANSWERING, READING),
        (cl.compose(READING, ANSWERING),),
        (cl.compose(ANSWERING, READING),),
        (cl.compose(ANSWERING), cl.compose(cl.compose(), READING)),
    ):
        assert torch.equal(logits(one_blip.hf_model, inputs, *methods), wanted)
    for only in (READING, ANSWERING):
        assert float((logits(one_blip.hf_model, inputs, only) - wanted).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (READING, ANSWERING),
        (cl.KnockOut(), cl.KnockOut(site="decoder")),
        (READING, cl.KnockOut(site="decoder", rows="last")),
    ],
)
def test_both_sites_are_one_after_the_other(one_blip, ask, first, second):
    """Features edited in one pass and an edited decoder in another = both in one run."""
    model, inputs = one_blip.hf_model, ask(one_blip, 3).inputs
    asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    reading = {n: v for n, v in inputs.items() if n not in asked}
    together = logits(model, inputs, first, second)
    with torch.inference_mode():
        with cl.intervening(model, first):
            seen = model.get_image_features(**reading)
        nothing = {"pixel_values": None, "qformer_input_ids": None}
        with cl.intervening(model, second):
            apart = model(**asked, **nothing, mm_encoder_outputs={"image": seen}).logits
        with cl.intervening(model, first):  # the picture is read already: nothing to apply again
            reused = model(**asked, **nothing, mm_encoder_outputs={"image": seen}).logits
    assert torch.equal(apart, together)
    assert torch.equal(reused, logits(model, inputs, first))


def test_both_sites_in_one_trace(one_blip, ask):
    wanted = logits(one_blip.hf_model, ask(one_blip, 3).inputs, READING, ANSWERING)
    with one_blip.trace(ask(one_blip, 3)):
        run = cl.intervene(READING)
        other = cl.intervene(ANSWERING)
        found = one_blip.output.logits.save()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert run.anchors.positive.shape == (3, 16)
    assert other.anchors.positive.shape == (3, 8)
    with one_blip.trace(ask(one_blip, 3)):
        both = cl.intervene(ANSWERING, READING)
        found = nnsight.save(one_blip.output.logits)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert both.anchors.positive.shape == (3, 8)  # those of the first CLVA


def test_sessions_see_their_own_site_only(one_blip):
    """An edit of one site leaves the other's pattern as it is, where nothing flows through."""
    prompt = one_blip.prompt([picture(0), picture(1)], QUESTIONS[:2])
    plain = cl.trace_attention(one_blip, prompt)
    edited = cl.trace_attention(one_blip, prompt, cl.KnockOut(site="decoder", layers=range(12)))
    assert torch.equal(plain.maps, edited.maps)
    assert float((plain.logits - edited.logits).abs().max()) > 0.05
    blind = cl.trace_attention(one_blip, prompt, cl.KnockOut(layers=(0, 2, 4, 6, 8, 10)))
    assert float(blind.intensity.max()) == 0
    torch.testing.assert_close(blind.system, torch.ones_like(blind.system), rtol=0, atol=1e-6)


def test_blind_queries_do_not_see_which_picture(one_blip):
    """With only CLS to look at, and CLS the same, two pictures are one."""
    prompt = one_blip.prompt([picture(0), picture(1)], QUESTIONS[0])
    tower = one_blip.hf_model.vision_model

    def same_cls(_module, _args, out):
        out.last_hidden_state[:, 0] = 1.0
        return out

    handle = tower.register_forward_hook(same_cls)
    try:
        blind = cl.KnockOut(layers=(0, 2, 4, 6, 8, 10))
        found = logits(one_blip.hf_model, prompt.inputs, blind)
        seeing = logits(one_blip.hf_model, prompt.inputs)
    finally:
        handle.remove()
    assert float((found[0] - found[1]).abs().max()) < 1e-5
    assert float((seeing[0] - seeing[1]).abs().max()) > 0.05
