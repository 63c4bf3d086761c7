"""Law 3: with a cache or without, in a batch or alone, in beams or greedily: the same numbers.

Generated rows are compared with the reference too: it reads every row's own anchors from the full
sequence, which is what ``refresh="step"`` means with a cache.
"""

import pytest
import reference
import rewrites
import torch
from tiny_models import QUESTIONS, lens_of, picture

import clva_lens as cl
from clva_lens.models.kv_cache import CACHE, cache_of

STEPS = 4
ATOL = 1e-4
METHODS = {
    "step": cl.CLVA(tau=1.0),
    "prompt": cl.CLVA(tau=1.0, refresh="prompt"),
    "last row": cl.CLVA(tau=1.0, rows="last"),
    "knock-out": cl.KnockOut(),
    "composed": cl.compose(cl.CLVA(tau=1.0, layers=(5, 6, 7)), cl.KnockOut(layers=(9,))),
    "ClearSight": cl.ClearSight(variant="paper"),
    "PAI": cl.PAI(),
    "VisFlow": cl.VisFlow(),
    "shuffled": cl.Shuffled(cl.CLVA(tau=1.0)),
}
# Methods again, for the reference.
EDITS = {
    "step": reference.Clva(tau=1.0),
    "prompt": reference.Clva(tau=1.0, refresh="prompt"),
    "ClearSight": rewrites.ClearSight(suppress=0.9, half=True),
    "PAI": rewrites.Pai(),
    "PAI, generated rows only": rewrites.Pai(prompt="none"),
    "VisFlow": rewrites.VisFlow(),
}


def decode(model, inputs, method, **options):
    """Return ids and the raw logits of every step."""
    options = {"max_new_tokens": STEPS, "do_sample": False} | options
    with torch.inference_mode(), cl.intervening(model, *([method] if method else [])):
        out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    ids = out.sequences[:, inputs["input_ids"].shape[1] :]
    return ids, torch.stack(out.logits, dim=1)


DECODED = {}


def decoded(lens, ask, name, count=3):
    """What a method decodes of a batch, which several laws compare with: once a model."""
    key = lens.hf_model, name, count
    if key not in DECODED:
        DECODED[key] = decode(lens.hf_model, ask(lens, count).inputs, METHODS[name])
    return DECODED[key]


def single(inputs, item):
    """Return one sample of a batch as a batch of one, without its padding."""
    ids, pixels, _ = reference.rows_of(inputs, item)
    return {
        "input_ids": ids[None],
        "attention_mask": torch.ones_like(ids)[None],
        "pixel_values": pixels[None],
    }


@pytest.mark.parametrize("name", METHODS)
def test_cached_is_uncached(lens, ask, name):
    model, inputs, method = lens.hf_model, ask(lens, 3).inputs, METHODS[name]
    ids, logits = decoded(lens, ask, name)
    others, expected = decode(model, inputs, method, use_cache=False)
    assert logits.shape == (3, STEPS, 64)
    assert torch.equal(ids, others)
    error = float((logits - expected).abs().max())
    plain = decode(model, inputs, None, max_new_tokens=1)[1]
    moved = float((plain - logits[:, :1]).abs().max())  # comparisons must not be vacuous
    print(f"{name}: cached − uncached {error:.1e}, effect {moved:.3f}")
    assert error < ATOL
    assert moved > 100 * error
    assert moved > 0.05


@pytest.mark.parametrize("name", EDITS)
def test_generated_rows_are_the_references(lens, exact, ask, name):
    """Every step's logits equal one pass of the reference over the whole answer."""
    inputs = ask(lens, 3).inputs
    method = METHODS.get(name, cl.PAI(prompt_row=False))
    ids, logits = decode(lens.hf_model, inputs, method)
    edit = EDITS[name]
    error, margin, moved = 0.0, 1.0, 0.0
    for item in range(3):
        prompt, pixels, _ = reference.rows_of(inputs, item)
        whole = torch.cat([prompt, ids[item, :-1]])
        expected = reference.run(exact, whole, pixels, [edit], prompt_length=len(prompt))
        rows = expected.logits[len(prompt) - 1 :]
        plain = reference.run(exact, whole, pixels, [], prompt_length=len(prompt))
        error = max(error, float((rows - logits[item]).abs().max()))
        margin = min(margin, expected.margin)
        moved = max(moved, float((expected.logits - plain.logits)[len(prompt) :].abs().max()))
    print(f"{name}: error {error:.1e}, margin {margin:.1e}, effect {moved:.3f}")
    assert error < ATOL
    assert moved > max(0.05, 100 * error)


def test_refresh_matters(lens, ask):
    """Fresh and frozen anchors agree at the first step and differ later."""
    inputs = ask(lens, 3).inputs
    forced = {"use_cache": True, "max_new_tokens": STEPS}
    _, fresh = decode(lens.hf_model, inputs, METHODS["step"], **forced)
    _, frozen = decode(lens.hf_model, inputs, METHODS["prompt"], **forced)
    assert torch.equal(fresh[:, 0], frozen[:, 0])
    assert float((fresh[:, 1] - frozen[:, 1]).abs().max()) > 1e-2


@pytest.mark.parametrize("name", METHODS)
def test_batch_is_singles(lens, ask, name):
    model, inputs, method = lens.hf_model, ask(lens, 3).inputs, METHODS[name]
    assert not inputs["attention_mask"].bool().all()  # there is padding
    ids, logits = decoded(lens, ask, name)
    for item in range(3):
        alone, expected = decode(model, single(inputs, item), method)
        assert torch.equal(ids[item], alone[0])
        torch.testing.assert_close(logits[item], expected[0], rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["step", "ClearSight", "PAI", "VisFlow"])
def test_static_cache(lens, ask, name):
    """The cache of a fixed size hands empty keys to the kernel; they must not be seen."""
    for count in (1, 3):
        model, inputs, method = lens.hf_model, ask(lens, count).inputs, METHODS[name]
        ids, logits = decoded(lens, ask, name, count)
        static = {"cache_implementation": "static", "disable_compile": True}
        others, found = decode(model, inputs, method, **static)
        assert torch.equal(ids, others)
        torch.testing.assert_close(found, logits, rtol=0, atol=ATOL)


def test_several_tokens_onto_a_cache_are_refused(one, ask):
    """What a caller reads onto a prompt could be its rest: it is not taken for an answer."""
    model, inputs, method = one.hf_model, ask(one).inputs, METHODS["step"]
    ids, _ = decode(model, inputs, method)
    with torch.inference_mode(), cl.intervening(model, method):
        first = model(**inputs, use_cache=True)
        with pytest.raises(
            cl.ClvaLensError, match=r"reads \d+ tokens onto a filled key-value cache"
        ):
            model(input_ids=ids, **{CACHE: cache_of(first)})


def test_prefill_in_chunks_is_refused(one, ask):
    """A first chunk that ends within the image has no text row to read anchors from."""
    with pytest.raises(cl.ClvaLensError, match=r"cut into chunks.*leave prefill_chunk_size unset"):
        decode(one.hf_model, ask(one).inputs, METHODS["step"], prefill_chunk_size=20)


def test_prefill_in_chunks_within_the_question(one, ask):
    """The rest of the question could be taken for generated tokens, so it is refused."""
    with pytest.raises(cl.ClvaLensError, match=r"onto a filled key-value cache.*in one pass"):
        decode(one.hf_model, ask(one).inputs, METHODS["step"], prefill_chunk_size=30)


# ── beams and sampling ──


def test_one_beam_is_greedy(one, ask):
    prompt = ask(one, 3)
    greedy = cl.generate(one, prompt, cl.CLVA(), cl.Greedy(max_new_tokens=STEPS))
    beam = cl.generate(one, prompt, cl.CLVA(), cl.Beam(num_beams=1, max_new_tokens=STEPS))
    assert [x.tolist() for x in greedy.ids] == [x.tolist() for x in beam.ids]
    assert greedy.texts == beam.texts


@pytest.mark.parametrize("heads", ["full", "grouped"])
def test_five_beams(heads, ask):
    """Beams reorder the cache and, with it, whose anchors are whose: both kernels agree."""
    found = {}
    for kernel in ("sdpa", "eager"):
        lens = lens_of(heads, kernel)
        answers = cl.generate(
            lens, ask(lens, 3), METHODS["step"], cl.Beam(num_beams=5, max_new_tokens=STEPS)
        )
        found[kernel] = [row.tolist() for row in answers.ids]
    assert found["sdpa"] == found["eager"]
    plain = cl.generate(lens, ask(lens, 3), None, cl.Beam(num_beams=5, max_new_tokens=STEPS))
    assert [row.tolist() for row in plain.ids] != found["eager"]


def test_beams_of_a_batch_are_those_of_singles(lens, ask):
    options = {"num_beams": 5, "max_new_tokens": STEPS}
    inputs = ask(lens, 2).inputs
    ids, _ = decode(lens.hf_model, inputs, METHODS["step"], **options)
    for item in range(2):
        alone, _ = decode(lens.hf_model, single(inputs, item), METHODS["step"], **options)
        assert torch.equal(ids[item], alone[0])


def test_beams_without_a_cache(lens, ask):
    """Uncached beams read every row's anchors from that row's own beam."""
    inputs = ask(lens).inputs
    options = {"num_beams": 3, "max_new_tokens": STEPS}
    cached, _ = decode(lens.hf_model, inputs, METHODS["step"], **options)
    uncached, _ = decode(lens.hf_model, inputs, METHODS["step"], use_cache=False, **options)
    assert torch.equal(cached, uncached)


def test_sampling_repeats_for_a_seed(one, ask):
    def sample(seed):
        how = cl.Sampling(seed=seed, max_new_tokens=12)
        return [row.tolist() for row in cl.generate(one, ask(one, 3), cl.CLVA(), how).ids]

    state = torch.get_rng_state()
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), state)


# ── cl.generate ──


def test_generate_is_hf_generate(lens, ask):
    """cl.generate under a method gives what plain transformers code gives inside intervening()."""
    ids, logits = decode(lens.hf_model, ask(lens, 3).inputs, METHODS["step"])
    pad = lens.processor.tokenizer.pad_token_id
    eos = lens.processor.tokenizer.eos_token_id
    answers = cl.generate(lens, ask(lens, 3), METHODS["step"], cl.Greedy(max_new_tokens=STEPS))
    for row, found in zip(ids.tolist(), answers.ids, strict=True):
        stop = next((i for i, token in enumerate(row) if token in (pad, eos)), len(row))
        assert found.tolist() == row[:stop]
    words = lens.processor.tokenizer.get_vocab()
    margins = logits[:, 0, words["yes"]] - logits[:, 0, words["no"]]
    torch.testing.assert_close(torch.tensor(answers.margins), margins, rtol=0, atol=1e-5)
    assert answers.seconds > 0


def test_generate_keeps_the_order_over_batches(one):
    pairs = [(picture(i), QUESTIONS[i % 3]) for i in range(5)]
    how = cl.Greedy(max_new_tokens=STEPS)
    together = cl.generate(one, pairs, METHODS["step"], how, batch_size=5, progress=False)
    for size in (1, 2):
        apart = cl.generate(one, pairs, METHODS["step"], how, batch_size=size, progress=False)
        assert apart.texts == together.texts
        assert apart.margins == pytest.approx(together.margins, abs=ATOL)
    assert len(set(together.texts)) > 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cl.Greedy(max_new_tokens=0), r"max_new_tokens must be >= 1, but is 0"),
        (lambda: cl.Beam(num_beams=0), r"num_beams must be >= 1, but is 0"),
        (lambda: cl.Sampling(temperature=0), r"temperature must be above 0.*Greedy\(\)"),
        (lambda: cl.Sampling(top_p=1.5), r"top_p must be in \(0, 1\], but is 1.5"),
    ],
)
def test_decoding_out_of_range(make, message):
    with pytest.raises(cl.ClvaLensError, match=message):
        make()


def test_generate_misuse(one, ask):
    with pytest.raises(cl.ClvaLensError, match=r"0 prompts to answer"):
        cl.generate(one, [])
    with pytest.raises(cl.ClvaLensError, match=r"batch_size must be >= 1, but is 0"):
        cl.generate(one, ask(one), batch_size=0)
    with pytest.raises(cl.ClvaLensError, match=r"different system messages"):
        cl.generate(one, [(picture(0), "what ?"), (picture(0), "what ?", "a chat .")])
