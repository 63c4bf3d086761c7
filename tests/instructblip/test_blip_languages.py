"""InstructBLIP and BLIP-2 around Llama, OPT and T5: the laws at both sites of each.

The reference is a float64 model whose attention is a test's own kernel (rewriting.py).
"""

import pytest
import queries
import reference
import rewriting
import torch
from tiny_models import KERNELS, LANGUAGES, blip_of

import clva_lens as cl
from clva_lens.ground.errors import InterventionError

STEPS = 4
ERROR = 1e-4
CLVA = {"qformer": cl.CLVA(tau=1.0), "decoder": cl.CLVA(tau=1.0, site="decoder")}
CASES = {
    "qformer": (CLVA["qformer"], {"qformer": [reference.Clva(tau=1.0)]}),
    "decoder": (CLVA["decoder"], {"decoder": [reference.Clva(tau=1.0)]}),
    "both": (
        cl.compose(*CLVA.values()),
        {"qformer": [reference.Clva(tau=1.0)], "decoder": [reference.Clva(tau=1.0)]},
    ),
    "knock-out": (cl.KnockOut(site="decoder"), {"decoder": [reference.KnockOut()]}),
}


@pytest.fixture(scope="module", params=LANGUAGES[1:])
def language(request):
    """All but Llama, which the other files are about."""
    return request.param


@pytest.fixture
def lens(language):
    return blip_of("sdpa", language)


def decode(lens, inputs, method, **options):
    """Return the generated ids, and the raw logits of every step."""
    options = {"max_new_tokens": STEPS, "do_sample": False} | options
    with torch.inference_mode(), cl.intervening(lens, *([method] if method else [])):
        out = lens.hf_model.generate(
            **inputs, **options, output_logits=True, return_dict_in_generate=True
        )
    start = inputs["decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"].shape[1]
    return out.sequences[:, start:], torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_the_references(lens, language, ask, name):
    """The prompt's last row and every generated row, in a batch of two different pictures."""
    inputs, (method, edits) = ask(lens, 2).inputs, CASES[name]
    ids, logits = decode(lens, inputs, method)
    _, plain = decode(lens, inputs, None, max_new_tokens=1)
    error = 0.0
    for item in range(2):
        wanted = rewriting.run(language, inputs, item, **edits, answer=ids[item, :-1])
        error = max(error, float((wanted.logits[-STEPS:] - logits[item]).abs().max()))
    moved = float((logits[:, 0] - plain[:, 0]).abs().amax(dim=1).min())
    print(f"{language}, {name}: error {error:.1e}, effect {moved:.3f}")
    assert error < ERROR
    assert moved > 100 * error
    assert moved > 0.05


def test_forward_is_the_references(lens, language, ask):
    """All rows of the prompt, under methods at both sites; in a batch."""
    inputs = ask(lens, 2).inputs
    method, edits = CASES["both"]
    with torch.inference_mode(), cl.intervening(lens, method):
        found = lens.hf_model(**inputs).logits
    for item in range(2):
        wanted = rewriting.run(language, inputs, item, **edits).logits
        torch.testing.assert_close(found[item, -len(wanted) :].double(), wanted, rtol=0, atol=ERROR)


def test_both_references_are_one(ask):
    """The hand-written InstructBLIP and the kernel in transformers' own: of Llama there are two."""
    inputs, (_, edits) = ask(blip_of("sdpa"), 2).inputs, CASES["both"]
    for item in range(2):
        one = rewriting.run("llama", inputs, item, **edits).logits
        other = queries.run(rewriting.double("llama"), inputs, item, **edits).logits
        # transformers' RMSNorm is float32, whatever the model is.
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_observed_rows_are_the_eager_models(lens, language, ask, site):
    """Intensities and maps at the prompt, and the decoder's maps at each later step."""
    prompt = ask(lens, 2)
    with torch.inference_mode(), cl.observing(lens, site=site) as seen:
        ids, _ = decode(lens, prompt.inputs, None)
    assert len(seen.steps) == (STEPS - 1 if site == "decoder" else 0)
    for item in range(2):
        whole = rewriting.run(language, prompt.inputs, item, answer=ids[item, :-1])
        result = getattr(whole, site)
        patterns = torch.stack(result.patterns).float()
        text = patterns[:, :, result.text][..., result.image]
        phi = text.sum(dim=-1).mean(dim=-1)
        maps = text.mean(dim=2) if site == "qformer" else text[:, :, -1]
        torch.testing.assert_close(seen.trace.intensity[item], phi, rtol=0, atol=2e-5)
        torch.testing.assert_close(seen.trace.maps[item], maps, rtol=0, atol=2e-5)
        for number, step in enumerate(seen.steps):
            row = patterns[:, :, result.text[-1] + 1 + number][..., result.image]
            torch.testing.assert_close(step[:, item, :, 0], row, rtol=0, atol=2e-5)
    total = seen.trace.intensity + seen.trace.system + seen.trace.text
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)
    assert float(seen.trace.intensity.std(dim=2).max()) > 0.01


def test_transformers_own_attentions(language, ask):
    """What transformers returns itself with output_attentions, at the decoder."""
    lens = blip_of("eager", language)
    prompt = ask(lens)
    trace = cl.trace_attention(lens, prompt, site="decoder")
    with torch.inference_mode():
        out = lens.hf_model(**prompt.inputs, output_attentions=True).language_model_outputs
    crossing = language.endswith("t5")
    patterns = torch.stack(out.cross_attentions if crossing else out.attentions)[:, 0]
    torch.testing.assert_close(trace.maps, patterns[:, :, -1, :8], rtol=0, atol=1e-5)


def test_kernels_agree(language, ask, site):
    found = []
    for kernel in KERNELS:
        lens = blip_of(kernel, language)
        with torch.inference_mode(), cl.intervening(lens, CLVA[site]) as run:
            found.append((lens.hf_model(**ask(lens, 3).inputs).logits, run.anchors))
    keep = ask(lens, 3)["attention_mask"].bool()
    rows = keep if found[0][0].shape[1] == keep.shape[1] else slice(None)
    torch.testing.assert_close(found[0][0][rows], found[1][0][rows], rtol=0, atol=ERROR)
    assert torch.equal(found[0][1].positive, found[1][1].positive)


def test_batch_is_singles(lens, ask, site):
    inputs = ask(lens, 3).inputs
    ids, logits = decode(lens, inputs, CLVA[site])
    for item in range(3):
        alone, expected = decode(lens, ask(lens, first=item).inputs, CLVA[site])
        assert torch.equal(ids[item], alone[0])
        torch.testing.assert_close(logits[item], expected[0], rtol=0, atol=ERROR)


def test_beams_and_answers(lens, ask, site):
    """One beam is greedy; three beams are those of single prompts; the texts are not empty."""
    prompt, method = ask(lens, 2), CLVA[site]
    greedy = cl.generate(lens, prompt, method, cl.Greedy(max_new_tokens=STEPS))
    beam = cl.generate(lens, prompt, method, cl.Beam(num_beams=1, max_new_tokens=STEPS))
    assert [row.tolist() for row in greedy.ids] == [row.tolist() for row in beam.ids]
    assert all(greedy.texts)
    assert all(isinstance(margin, float) for margin in greedy.margins)
    together, _ = decode(lens, prompt.inputs, method, num_beams=3)
    for item in range(2):
        alone, _ = decode(lens, ask(lens, first=item).inputs, method, num_beams=3)
        assert torch.equal(together[item], alone[0])


@pytest.mark.parametrize("kind", ["t5", "blip2-t5"])
@pytest.mark.parametrize("refresh", ["step", "prompt"])
def test_t5_cached_is_uncached(kind, ask, refresh):
    """T5 does run without a cache: the prompt and the answer are read again at every step."""
    lens = blip_of("sdpa", kind)
    inputs = ask(lens, 3).inputs
    method = cl.CLVA(tau=1.0, site="decoder", refresh=refresh)
    ids, logits = decode(lens, inputs, method)
    reads = []
    handle = lens.hf_model.language_model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        others, found = decode(lens, inputs, method, use_cache=False)
    finally:
        handle.remove()
    assert reads == [1, 2, 3, 4]
    assert torch.equal(ids, others)
    torch.testing.assert_close(found, logits, rtol=0, atol=ERROR)
    _, plain = decode(lens, inputs, None)
    assert float((plain - logits).abs().max()) > 0.05
    static = {"cache_implementation": "static", "disable_compile": True}
    others, found = decode(lens, inputs, method, **static)
    assert torch.equal(ids, others)
    torch.testing.assert_close(found, logits, rtol=0, atol=ERROR)


def test_t5_without_its_rows(ask):
    lens = blip_of("sdpa", "t5")
    inputs = {k: v for k, v in ask(lens).inputs.items() if k != "decoder_input_ids"}
    labels = torch.tensor([[7, 8]])
    with (
        cl.intervening(lens, CLVA["decoder"]),
        pytest.raises(InterventionError, match=r"without decoder_input_ids.*model.prompt"),
    ):
        lens.hf_model(**inputs, labels=labels)


def test_guesses_of_an_encoder_decoder_are_refused(ask):
    lens = blip_of("sdpa", "t5")
    with (
        torch.inference_mode(),
        cl.intervening(lens.hf_model, CLVA["decoder"]),
        pytest.raises(InterventionError, match="Generate without assistant_model"),
    ):
        lens.hf_model.generate(**ask(lens).inputs, max_new_tokens=6, prompt_lookup_num_tokens=3)
