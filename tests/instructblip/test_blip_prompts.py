"""Prompts are those of the official processors; spans hold in either layout of the padding."""

import pytest
import queries
import torch
from PIL import Image
from tiny_models import QUESTIONS, blip_of, blip_processor, picture, tiny_blip

import clva_lens as cl
from clva_lens.ground.errors import PromptError

STRONG = {"qformer": cl.CLVA(tau=1.0), "decoder": cl.CLVA(tau=1.0, site="decoder")}


def official(lens, count=None, question=None):
    """Return what transformers' own processor makes of the fixtures' pictures and questions."""
    several = range(1 if count is None else count)
    texts = [QUESTIONS[i % 3] if question is None else question for i in several]
    images = [Image.fromarray(picture(i)) for i in several]
    padding = {} if count is None else {"padding": True}
    return dict(lens.processor(images=images, text=texts, return_tensors="pt", **padding))


def test_single_prompt_is_the_processors(one_blip, ask):
    wanted = official(one_blip)
    found = ask(one_blip)
    assert set(found) == set(wanted)
    assert set(found) == {
        *("input_ids", "attention_mask", "pixel_values"),
        *("qformer_input_ids", "qformer_attention_mask"),
    }
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("language", ["opt", "t5", "blip2-opt", "blip2-t5"])
def test_single_prompt_of_other_models(language, ask):
    """BLIP-2 follows no instructions: the question is framed, and its Q-Former reads no text."""
    lens = blip_of("sdpa", language)
    blip2 = language.startswith("blip2")
    framed = f"Question: {QUESTIONS[0]} Answer:" if blip2 else QUESTIONS[0]
    found, wanted = ask(lens), official(lens, question=framed)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert ("qformer_input_ids" in found) == (not blip2)
    assert set(found) - set(wanted) == ({"decoder_input_ids"} if "t5" in language else set())
    assert found.answer_start == (1 if "t5" in language else found["input_ids"].shape[1])


def test_batch_is_padded_left_of_the_image(one_blip, ask):
    batch = ask(one_blip, 3)
    lengths = []
    for item in range(3):
        alone = ask(one_blip, first=item)
        length = alone["input_ids"].shape[1]
        lengths.append(length)
        mask = batch["attention_mask"][item]
        assert mask.tolist() == [0] * (len(mask) - length) + [1] * length
        for name, value in queries.single(batch.inputs, item).items():
            assert torch.equal(value, alone[name]), name
        read = batch["qformer_attention_mask"][item].tolist()
        assert read == sorted(read, reverse=True)  # its text is padded on the right
    assert len(set(lengths)) == 3
    assert batch["pixel_values"].shape == (3, 3, 32, 32)


def test_batch_is_singles(one_blip, ask, site):
    """Three pictures, three lengths: the logits under a method are those of each alone."""
    for method in (None, STRONG[site]):
        together = cl.trace_attention(one_blip, ask(one_blip, 3), method)
        for item in range(3):
            alone = cl.trace_attention(one_blip, ask(one_blip, first=item), method)
            torch.testing.assert_close(together.logits[item], alone.logits, rtol=0, atol=2e-5)
    plain = cl.trace_attention(one_blip, ask(one_blip, 3))
    assert float((together.logits - plain.logits).abs().amax(dim=1).min()) > 0.05


# ── spans ──


def test_spans_of_both_sites(one_blip, ask):
    prompt = ask(one_blip, 3)
    assert list(prompt.sites) == ["qformer", "decoder"]
    assert prompt.grid == prompt.grid_at("qformer") == (4, 4)
    reading, answering = prompt.spans_at("qformer"), prompt.spans_at("decoder")
    assert prompt.spans is answering
    assert (reading.visual_count, answering.visual_count) == (16, 8)
    assert reading.system.tolist() == [[True] + [False] * 16] * 3
    assert not (reading.text.any() or reading.generated.any())
    words = one_blip.words
    for item in range(3):
        ids = prompt["input_ids"][item]
        assert words.convert_ids_to_tokens(ids[answering.image[item]].tolist()) == ["<image>"] * 8
        text = words.convert_ids_to_tokens(ids[answering.text[item]].tolist())
        assert text == ["<s>", *QUESTIONS[item].split()]
        assert not answering.system[item].any()


def test_spans_of_the_processors_own_layout(one_blip):
    """[image][padding][text]: padding belongs to no span, wherever it is."""
    inputs = official(one_blip, 3)
    mask = inputs["attention_mask"]
    assert mask[:, 0].all() and not mask[0, 8]
    spans = one_blip.family.spans(one_blip.hf_model, "decoder", inputs)
    position = torch.arange(mask.shape[1]).expand_as(mask)
    assert torch.equal(spans.image, position < 8)
    assert torch.equal(spans.text, (position >= 8) & mask.bool())
    assert not spans.system.any()


def test_methods_on_the_processors_own_layout(blip, site):
    """It is watched as it runs: masses sum to 1, the last row is the text's, the effect is there.

    Positions of the padding lie between image and text there, so numbers differ from singles at
    the decoder; those of the Q-Former's text, padded on the left too, differ as well. A batch
    without padding is the same in both layouts.
    """
    inputs = official(blip, 3)
    with torch.inference_mode():
        plain = blip.hf_model(**inputs).logits[:, -1]
        with cl.intervening(blip, STRONG[site]) as run, cl.observing(blip, site=site) as seen:
            edited = blip.hf_model(**inputs).logits[:, -1]
    trace = seen.trace
    total = trace.intensity + trace.system + trace.text
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)
    assert float((edited - plain).abs().amax(dim=1).min()) > 0.05
    assert run.anchors.positive.shape == (3, 16 if site == "qformer" else 8)
    same = official(blip, 3, QUESTIONS[0])
    assert same["attention_mask"].all()
    ours = blip.prompt([picture(i) for i in range(3)], QUESTIONS[0])
    with torch.inference_mode(), cl.intervening(blip, STRONG[site]):
        one, other = blip.hf_model(**same).logits, blip.hf_model(**ours).logits
    assert torch.equal(one, other)


def test_eager_patterns_of_the_processors_own_layout(site):
    """Observed rows are the eager model's patterns, with padding between the spans too."""
    lens = blip_of("eager")
    inputs = official(lens, 3)
    with torch.inference_mode(), cl.observing(lens, site="decoder") as seen:
        out = lens.hf_model(**inputs, output_attentions=True).language_model_outputs
    patterns = torch.stack(out.attentions)[:, :, :, -1].transpose(0, 1)
    torch.testing.assert_close(seen.trace.maps, patterns[..., :8], rtol=0, atol=1e-6)


# ── grids ──


def test_grid_follows_the_picture(one_blip):
    """Patch (r, c) of the grid is where the picture changed, as the Q-Former's keys see it."""
    tower = one_blip.hf_model.vision_model.embeddings
    plain = torch.zeros(32, 32, 3, dtype=torch.uint8)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        pixels = plain.clone()
        pixels[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 255
        one, other = (one_blip.prompt(p, QUESTIONS[0])["pixel_values"] for p in (plain, pixels))
        with torch.inference_mode():
            gap = (tower(other) - tower(one))[0, 1:].norm(dim=-1)
        found = one_blip.prompt(pixels, QUESTIONS[0]).on_grid(gap)
        assert (found > 0).nonzero().tolist() == [[row, column]]


def test_the_decoders_maps_lie_on_no_grid(one_blip, ask):
    prompt = ask(one_blip)
    with pytest.raises(PromptError, match=r"8 image tokens are outputs of the Q-Former.*no grid"):
        prompt.grid_at("decoder")
    maps = cl.trace_attention(one_blip, prompt, site="decoder").saliency()
    with pytest.raises(PromptError, match=r"on no grid.*composed_saliency"):
        prompt.on_grid(maps)
    with pytest.raises(PromptError, match=r"7 values, but the grid is 4 × 4 at the qformer"):
        prompt.on_grid(maps[:, :7])
    with pytest.raises(PromptError, match=r"no attention site 'vision'; it has qformer, decoder"):
        prompt.grid_at("vision")
    with pytest.raises(PromptError, match=r"no attention site 'vision'"):
        prompt.spans_at("vision")
    assert "8 image (no grid)" in repr(prompt)


def test_system_message_is_put_before_the_question(one_blip, ask):
    plain = ask(one_blip)
    custom = one_blip.prompt(picture(0), QUESTIONS[0], system="a chat .")
    text = custom["input_ids"][0][custom.spans.text[0]].tolist()
    assert one_blip.words.convert_ids_to_tokens(text) == [
        "<s>",
        "a",
        "chat",
        ".",
        *QUESTIONS[0].split(),
    ]
    assert custom["qformer_input_ids"].shape[1] == plain["qformer_input_ids"].shape[1] + 3
    with pytest.raises(PromptError, match=r"question contains '<image>'"):
        one_blip.prompt(picture(0), "what is <image> ?")


def test_half_precision(ask):
    """bfloat16 pixels, integer ids, and an effect at both sites that is not rounding."""
    lens = cl.load((tiny_blip().bfloat16(), blip_processor()))
    prompt = ask(lens, 3)
    assert prompt["pixel_values"].dtype == torch.bfloat16
    assert prompt["qformer_input_ids"].dtype == torch.int64
    plain = cl.trace_attention(lens, prompt)
    for method in STRONG.values():
        edited = cl.trace_attention(lens, prompt, method)
        assert edited.logits.isfinite().all()
        assert float((edited.logits - plain.logits).abs().max()) > 0.3
