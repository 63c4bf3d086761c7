"""Qwen-VL under the laws of the other families: prompts, spans, and methods against the rewrite."""

import copy

import nnsight
import pytest
import reference
import rewrites
import second_opinion
import torch
from qwen_models import official_config, picture, publish

import clva_lens as cl
from clva_lens.ground.errors import ModelCheckError, ModelLoadError, PromptError
from clva_lens.lens.check import check_family
from clva_lens.lens.prefix import read
from clva_lens.methods.base import METHODS

QUESTIONS = ["is there a cup ?", "what is it ?", "is there a red car in the image ?"]
CONFIG = official_config(num_hidden_layers=12, seq_length=256)
HEADS = torch.zeros(12, 4, dtype=torch.bool)
HEADS[3, 0] = HEADS[8, 2] = True


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def lens(request, tmp_path_factory):
    folder = publish(tmp_path_factory.mktemp("chat"), config=CONFIG)
    loaded = cl.load(folder, attn_implementation=request.param)
    loaded.hf_model.generation_config.eos_token_id = None
    return loaded


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    loaded = cl.load(publish(tmp_path_factory.mktemp("chat"), config=CONFIG))
    loaded.hf_model.generation_config.eos_token_id = None
    return loaded


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return cl.load(publish(tmp_path_factory.mktemp("base"), config=CONFIG, chats=False))


def batch(lens):
    return lens.prompt([picture(i) for i in range(3)], QUESTIONS)


def span_text(lens, prompt, span, item=0):
    ids = prompt["input_ids"][item][getattr(prompt.spans, span)[item]]
    return lens.words.decode(ids)


# ── prompts ──


def test_chat_prompt(one):
    """ChatML, as the released make_context() and from_list_format() write it."""
    prompt = one.prompt(picture(0), "is it red ?")
    assert prompt["input_ids"].shape == prompt["attention_mask"].shape
    assert prompt["pixel_values"].shape == (1, 3, 48, 48)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert span_text(one, prompt, "system") == f"{system}Picture 1: <img>"
    assert span_text(one, prompt, "image") == "<imgpad>" * 16
    after = "</img>\nis it red ?<|im_end|>\n<|im_start|>assistant\n"
    assert span_text(one, prompt, "text") == after
    assert prompt.grid == (4, 4)
    assert one.family.name == "qwen-vl"


def test_base_prompt(base):
    """As in VCD's evaluation of the base model."""
    prompt = base.prompt(picture(0), "is it red ?")
    assert span_text(base, prompt, "system") == "<img>"
    assert span_text(base, prompt, "text") == "</img>is it red ? Answer:"
    with pytest.raises(PromptError, match=r"no place for a system message.*load Qwen-VL-Chat"):
        base.prompt(picture(0), "is it red ?", system="you see a car")
    assert torch.equal(
        base.prompt(picture(0), "is it red ?", system="")["input_ids"], prompt["input_ids"]
    )


def test_system_messages(one):
    custom = one.prompt(picture(0), "is it ?", system="you see a car")
    assert "system\nyou see a car<|im_end|>\n<|im_start|>user" in span_text(one, custom, "system")
    none = one.prompt(picture(0), "is it ?", system="")
    assert "system\n<|im_end|>\n<|im_start|>user" in span_text(one, none, "system")


@pytest.mark.parametrize("tag", ["<img>", "</img>", "<imgpad>"])
def test_picture_tags_in_a_question(one, tag):
    with pytest.raises(PromptError, match=r"<imgpad>|<img>|</img>"):
        one.prompt(picture(0), f"is it {tag} red ?")


def test_a_batch_is_its_samples(lens):
    prompt = batch(lens)
    with torch.inference_mode():
        together = lens.hf_model(**prompt).logits
    for item in range(3):
        alone = lens.prompt(picture(item), QUESTIONS[item])
        length = alone["input_ids"].shape[1]
        with torch.inference_mode():
            logits = lens.hf_model(**alone).logits[0]
        assert (together[item, -length:] - logits).abs().max() < 1e-4
        for span in ("system", "image", "text"):
            found = getattr(prompt.spans, span)[item]
            assert torch.equal(found[-length:], getattr(alone.spans, span)[0])
            assert not found[:-length].any()


def test_grid_is_the_queries(one):
    """Query (r, c) is at (r, c): its fixed position is nearest that of patches there."""
    prompt = one.prompt(picture(0), "is it ?")
    cells = prompt.on_grid(torch.arange(16))
    assert cells[2, 3] == 2 * 4 + 3
    features = one.hf_model.get_image_features(prompt["pixel_values"]).pooler_output
    assert [len(picture) for picture in features] == [16]


# ── attention through the seam ──


def test_check(lens, base):
    for model in (lens, base):
        moved = check_family(model.hf_model, model.prompt)
        print(f"check_family: {moved:.3f}")
        assert moved > 0.5


def test_check_finds_a_resampler_of_another_size(one):
    processor = copy.copy(one.processor)
    processor.num_queries = 9
    with pytest.raises(PromptError, match=r"has 9 places for picture tokens.*make 16"):
        model = cl.load((one.hf_model, processor), check=False)
        model.hf_model(**model.prompt(picture(0), "is it ?"))
    with pytest.raises(ModelCheckError, match=r"has 9 image tokens.*makes 16"):
        cl.load((one.hf_model, processor))


CASES = {
    "CLVA": [(cl.CLVA(), reference.Clva())],
    "CLVA, tau 1": [(cl.CLVA(tau=1), reference.Clva(tau=1.0))],
    "CLVA, last row": [(cl.CLVA(tau=1, rows="last"), reference.Clva(tau=1.0, rows="last"))],
    "knock-out": [(cl.KnockOut(), reference.KnockOut())],
    "knock-out of heads": [
        (cl.KnockOut(heads=HEADS), reference.KnockOut(layers=(3, 8), heads={3: [0], 8: [2]}))
    ],
    "ClearSight": [(cl.ClearSight(), rewrites.ClearSight())],
    "PAI": [(cl.PAI(), rewrites.Pai())],
    "VisFlow": [(cl.VisFlow(), rewrites.VisFlow())],
    "PAI, then CLVA": [(cl.PAI(), rewrites.Pai()), (cl.CLVA(tau=1), reference.Clva(tau=1.0))],
}


@pytest.fixture(scope="module")
def exact(lens):
    double = copy.deepcopy(lens.hf_model).double()
    double.config.image_token_index = double.config.image_token_id
    return double


@pytest.mark.parametrize("name", CASES)
def test_bias_is_the_rewrite(lens, exact, name):
    """Patterns rewritten after the softmax, in float64, by a loop that knows no kernel."""
    prompt, pairs = batch(lens), CASES[name]
    with torch.inference_mode():
        plain = lens.hf_model(**prompt).logits
        features = lens.hf_model.get_image_features(prompt["pixel_values"]).pooler_output
        with cl.intervening(lens.hf_model, *(ours for ours, _ in pairs)):
            found = lens.hf_model(**prompt).logits
    error, effect, margin = 0.0, [], 1.0
    for item in range(3):
        ids, pixels, where = reference.rows_of(prompt, item)
        edits = [theirs for _, theirs in pairs]
        wanted = reference.run(exact, ids, pixels, edits, features=features[item].double())
        error = max(error, float((found[item, where] - wanted.logits).abs().max()))
        effect.append(float((found[item, where] - plain[item, where]).abs().max()))
        margin = min(margin, wanted.margin)
    print(f"{name}: error {error:.1e}, effect {min(effect):.3f}, margin {margin:.1e}")
    assert margin > 1e-5
    assert error < 1e-4
    assert min(effect) > 100 * error


# Those that have no default to try: what they act with comes from the model.
GIVEN = {
    "ablate-heads": lambda lens: cl.AblateHeads(heads=HEADS),
    "patch-activations": lambda lens: cl.PatchActivations(
        source=lens.prompt(picture(5), QUESTIONS[0]),
        cache=lens.run_with_cache(lens.prompt(picture(5), QUESTIONS[0]))[1],
        layers=[4],
        span="image",
    ),
}


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_acts(one, name):
    """Each registered method runs in generation, and changes the logits of the prompt."""
    method = GIVEN[name](one) if name in GIVEN else METHODS.get(name)()
    prompt = one.prompt(picture(0), QUESTIONS[0])
    if "greedy" not in method.decodings:  # it edits the scores of beams
        beams = cl.Beam(num_beams=3, max_new_tokens=6)
        plain, edited = (cl.generate(one, prompt, m, beams) for m in (None, method))
        assert len(plain.ids[0]) == len(edited.ids[0]) == 6
        return
    assert len(cl.generate(one, prompt, method, cl.Greedy(max_new_tokens=3)).ids[0]) == 3
    with one.trace(prompt):
        clean = one.output.logits.save()
    with one.trace(prompt):
        cl.intervene(method)
        found = one.output.logits.save()
    assert (found - clean).abs().max() > 1e-3


# ── what else reads the model ──


@pytest.mark.parametrize(
    "decoding", [cl.Beam(num_beams=3, max_new_tokens=4), cl.Greedy(max_new_tokens=4)]
)
def test_generate_in_every_way_is_the_same(one, decoding):
    prompt, method = one.prompt(picture(0), QUESTIONS[0]), cl.CLVA(tau=1)
    ours = cl.generate(one, prompt, method, decoding).ids[0].tolist()
    options = decoding.options(one.hf_model)
    with cl.intervening(one.hf_model, method):
        plain = one.hf_model.generate(**prompt, **options)
    with one.generate(prompt, **options) as tracer:
        cl.intervene(method)
        traced = tracer.result.save()
    start = prompt.answer_start
    assert plain[0, start:].tolist() == ours == traced[0, start:].tolist()
    assert ours != cl.generate(one, prompt, None, decoding).ids[0].tolist()


def test_trace_and_cache(one):
    prompt = one.prompt(picture(0), QUESTIONS[0])
    trace = cl.trace_attention(one, prompt)
    assert trace.intensity.shape == (12, 4)
    assert prompt.on_grid(trace.saliency()).shape == (12, 4, 4)
    names = ["blocks.3.hook_resid_post", "blocks.5.attn.hook_pattern", "blocks.5.attn.hook_q"]
    _logits, cache = one.run_with_cache(prompt, [*names, "vision.blocks.1.hook_resid_post"])
    assert cache["blocks.5.attn.hook_pattern"].shape[1] == 4
    assert torch.allclose(cache["blocks.5.attn.hook_pattern"].sum(dim=-1), torch.ones(1), atol=1e-4)
    assert cache["vision.blocks.1.hook_resid_post"].shape == (1, 36, 24)
    with torch.inference_mode():
        states = one.hf_model(**prompt, output_hidden_states=True).hidden_states
    assert len(states) == 13
    assert torch.allclose(cache["blocks.3.hook_resid_post"], states[4], atol=1e-5)


def test_logit_lens_and_attribution(one):
    prompt = one.prompt(picture(0), QUESTIONS[0])
    assert cl.logit_lens(one, prompt).margin.shape[0] >= 12
    parts = cl.direct_logit_attribution(one, prompt)
    with torch.inference_mode():
        logits = one.hf_model(**prompt).logits[0, -1]
    answers = cl.generate(one, prompt, None, cl.Greedy(max_new_tokens=1))
    assert logits.isfinite().all()
    assert float(parts.difference) == pytest.approx(answers.margins[0], abs=1e-3)


def test_hidden_pictures(one):
    """Law: with the image knocked out of every row of text, the picture does not matter."""
    texts = []
    for seed in (0, 1):
        prompt = one.prompt(picture(seed), QUESTIONS[0])
        blind = cl.KnockOut(layers=range(12))
        with torch.inference_mode(), cl.intervening(one.hf_model, blind):
            texts.append(one.hf_model(**prompt).logits[prompt.spans.text])
    assert (texts[0] - texts[1]).abs().max() < 1e-4
    with torch.inference_mode():
        free = one.hf_model(**one.prompt(picture(0), QUESTIONS[0])).logits[prompt.spans.text]
    assert (free - texts[0]).abs().max() > 0.1


def test_scan_is_left_alone(one):
    method = cl.CLVA()
    with one.scan(**one.prompt(picture(0), QUESTIONS[0]).inputs):
        cl.intervene(method)
        shape = nnsight.save(one.output.logits.shape)
    assert shape[0] == 1


def test_instructions_that_disturb(one, base):
    """ICD's instruction takes the place of the system message; the base model has none."""
    prompt = batch(one)
    made = one.family.disturb(one.hf_model, one.processor, prompt.inputs, "you are a car")
    for item, question in enumerate(QUESTIONS):
        kept = made["input_ids"][item][made["attention_mask"][item].bool()]
        wanted = one.prompt(picture(item), question, system="you are a car")["input_ids"][0]
        assert torch.equal(kept, wanted)
    with pytest.raises(PromptError, match="no place for a system message"):
        base.family.disturb(
            base.hf_model, base.processor, base.prompt(picture(0), "is it ?").inputs, "you are"
        )


def test_no_bridge(one):
    with pytest.raises(ModelLoadError, match=r"QwenVL.*family 'qwen-vl'.*use nnsight"):
        cl.to_transformer_lens(one)


def test_only_goes_its_own_way_here(lens, exact):
    """Its release for Qwen-VL adds the last layer's attention, where LLaVA's adds the stream."""
    prompt, method = batch(lens), cl.ONLY(gamma=0.0, beta=0.0)
    parts = exact.model.language_model, exact.lm_head.weight, exact.config.text_config
    with torch.inference_mode():
        features = lens.hf_model.get_image_features(prompt["pixel_values"]).pooler_output
        plain = lens.hf_model(**prompt).logits[:, -1]
        with cl.intervening(lens.hf_model, method):
            found = lens.hf_model(**prompt).logits[:, -1]
    error, other, effect = 0.0, 1e9, 1e9
    for item in range(3):
        ids, pixels, _ = reference.rows_of(prompt, item)
        seen = reference.run(exact, ids, pixels, features=features[item].double())
        own, last = seen.logits[-1], len(ids) - 1
        wanted, elsewhere = (
            own + (own - second_opinion.second(parts, seen, last, added=added).logits)
            for added in ("attn_out", "resid_pre")
        )
        error = max(error, float((found[item] - wanted).abs().max()))
        other = min(other, float((wanted - elsewhere).abs().max()))
        effect = min(effect, float((found[item] - plain[item]).abs().max()))
    print(f"error {error:.1e}, effect {effect:.3f}, LLaVA's way {other:.3f} away")
    assert error < 1e-4
    assert min(effect, other) > 100 * error


@pytest.mark.parametrize(
    "method",
    [
        cl.VCD(noise_step=400),
        cl.ICD(instruction="is it red ?"),
        cl.IMCCD(alpha=1.0),
        cl.PAI(alpha=0.5, guidance=1.7),
        cl.VisFlow(),
    ],
    ids=lambda method: method.name,
)
def test_a_second_input_goes_on_from_a_picture_that_was_read(one, method):
    """The instruction stands before the picture, so it makes a beginning of another length."""
    pictures, owners = [picture(0), picture(1)], [0, 1, 1, 0]
    asked = [*QUESTIONS[:2], *reversed(QUESTIONS[:2])]
    whole = one.prompt([pictures[owner] for owner in owners], asked)
    given = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    found = []
    for inputs, methods in (
        (whole, []),
        (whole, [method]),
        (read(one, pictures).ask(asked, owners), [method]),
    ):
        with torch.inference_mode(), cl.intervening(one, *methods):
            out = one.hf_model.generate(**inputs, do_sample=False, **given)
        found.append((out.sequences[:, -3:], torch.stack(out.logits)))
    (_, plain), (ids, wanted), (ours, logits) = found
    known = wanted.isfinite()
    assert torch.equal(ours, ids) and torch.equal(logits.isfinite(), known)
    error = (logits - wanted)[known].abs().max()
    effect = (wanted - plain)[0][known[0]].abs().max()
    print(f"error {error:.1e}, effect {effect:.2g}")
    assert error < effect / 200
