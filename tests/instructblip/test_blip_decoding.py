"""Law 3 at both sites: with a cache, in a batch or alone, in beams or greedily: the same numbers.

transformers always fills a cache when a prompt comes as embeddings, so "uncached" is the reference
here: one pass over prompt and answer, in which every generated row has its own anchors.
"""

import pytest
import queries
import reference
import rewrites
import torch
from tiny_models import QUESTIONS, blip_of, exact_blip, picture

import clva_lens as cl
from clva_lens.ground.errors import InterventionError
from clva_lens.models.kv_cache import CACHE, cache_of

STEPS = 4
ATOL = 1e-4
METHODS = {
    "reading": cl.CLVA(tau=1.0),
    "answering": cl.CLVA(tau=1.0, site="decoder"),
    "answering, frozen": cl.CLVA(tau=1.0, site="decoder", refresh="prompt"),
    "answering, last row": cl.CLVA(tau=1.0, site="decoder", rows="last"),
    "both": cl.compose(cl.CLVA(tau=1.0), cl.CLVA(tau=1.0, site="decoder")),
    "knock-out": cl.KnockOut(),
    "knock-out, answering": cl.KnockOut(site="decoder"),
    "ClearSight": cl.ClearSight(),
    "PAI": cl.PAI(),
    "VisFlow": cl.VisFlow(text=0.8, text_threshold=0.32),
}
EDITS = {
    "reading": {"qformer": [reference.Clva(tau=1.0)]},
    "answering": {"decoder": [reference.Clva(tau=1.0)]},
    "answering, frozen": {"decoder": [reference.Clva(tau=1.0, refresh="prompt")]},
    "answering, last row": {"decoder": [reference.Clva(tau=1.0, rows="last")]},
    "both": {"qformer": [reference.Clva(tau=1.0)], "decoder": [reference.Clva(tau=1.0)]},
    "knock-out": {"qformer": [reference.KnockOut()]},
    "knock-out, answering": {"decoder": [reference.KnockOut()]},
    "ClearSight": {"decoder": [rewrites.ClearSight()]},
    "PAI": {"decoder": [rewrites.Pai()]},
    "VisFlow": {"decoder": [rewrites.VisFlow(text=0.8, text_threshold=0.32, tokens=False)]},
}


def decode(model, inputs, method, **options):
    """Return ids and the raw logits of every step."""
    options = {"max_new_tokens": STEPS, "do_sample": False} | options
    with torch.inference_mode(), cl.intervening(model, *([method] if method else [])):
        out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("name", METHODS)
def test_every_step_is_the_references(blip, ask, name):
    inputs = ask(blip, 3).inputs
    ids, logits = decode(blip.hf_model, inputs, METHODS[name])
    _, plain = decode(blip.hf_model, inputs, None, max_new_tokens=1)
    error, margin = 0.0, 1.0
    for item in range(3):
        wanted = queries.run(exact_blip(), inputs, item, **EDITS[name], answer=ids[item, :-1])
        rows = wanted.logits[-STEPS:]
        error = max(error, float((rows - logits[item]).abs().max()))
        margin = min(margin, wanted.margin)
    moved = float((logits[:, 0] - plain[:, 0]).abs().amax(dim=1).min())
    print(f"{name}: error {error:.1e}, margin {margin:.1e}, effect {moved:.3f}")
    assert error < ATOL
    assert moved > 0.05
    assert moved > 100 * error


def test_refresh_matters_at_the_decoder_only(one_blip, ask):
    inputs = ask(one_blip, 3).inputs
    _, fresh = decode(one_blip.hf_model, inputs, METHODS["answering"])
    _, frozen = decode(one_blip.hf_model, inputs, METHODS["answering, frozen"])
    assert torch.equal(fresh[:, 0], frozen[:, 0])
    assert float((fresh[:, 1] - frozen[:, 1]).abs().max()) > 1e-2
    _, fresh = decode(one_blip.hf_model, inputs, METHODS["reading"])
    _, frozen = decode(one_blip.hf_model, inputs, cl.CLVA(tau=1.0, refresh="prompt"))
    assert torch.equal(fresh, frozen)


@pytest.mark.parametrize("name", ["answering", "both"])
def test_batch_is_singles(blip, ask, name):
    model, inputs, method = blip.hf_model, ask(blip, 3).inputs, METHODS[name]
    ids, logits = decode(model, inputs, method)
    for item in range(3):
        alone, expected = decode(model, queries.single(inputs, item), method)
        assert torch.equal(ids[item], alone[0])
        torch.testing.assert_close(logits[item], expected[0], rtol=0, atol=ATOL)


def test_static_cache(blip, ask):
    """The cache of a fixed size hands empty keys to the kernel; they must not be seen."""
    for count in (1, 3):
        model, inputs = blip.hf_model, ask(blip, count).inputs
        ids, logits = decode(model, inputs, METHODS["both"])
        static = {"cache_implementation": "static", "disable_compile": True}
        others, found = decode(model, inputs, METHODS["both"], **static)
        assert torch.equal(ids, others)
        torch.testing.assert_close(found, logits, rtol=0, atol=ATOL)


def test_without_a_cache_is_the_same(one_blip, ask):
    """transformers fills a cache all the same; nothing of ours minds that it was told not to."""
    inputs = ask(one_blip, 3).inputs
    ids, logits = decode(one_blip.hf_model, inputs, METHODS["both"])
    others, found = decode(one_blip.hf_model, inputs, METHODS["both"], use_cache=False)
    assert torch.equal(ids, others)
    torch.testing.assert_close(found, logits, rtol=0, atol=ATOL)


# ── beams and sampling ──


@pytest.mark.parametrize("name", ["reading", "answering", "both"])
def test_one_beam_is_greedy(name, ask):
    lens = blip_of("sdpa")
    prompt, method = ask(lens, 3), METHODS[name]
    greedy = cl.generate(lens, prompt, method, cl.Greedy(max_new_tokens=STEPS))
    beam = cl.generate(lens, prompt, method, cl.Beam(num_beams=1, max_new_tokens=STEPS))
    assert [row.tolist() for row in greedy.ids] == [row.tolist() for row in beam.ids]
    assert greedy.texts == beam.texts


@pytest.mark.parametrize("name", ["reading", "answering", "both"])
def test_beams_of_both_kernels_and_of_singles(ask, name):
    """Beams reorder the cache and, with it, whose anchors are whose."""
    options = {"num_beams": 3}
    found = {}
    for kernel in ("sdpa", "eager"):
        lens = blip_of(kernel)
        inputs = ask(lens, 3).inputs
        found[kernel], _ = decode(lens.hf_model, inputs, METHODS[name], **options)
        for item in range(3):
            one = queries.single(inputs, item)
            alone, _ = decode(lens.hf_model, one, METHODS[name], **options)
            assert torch.equal(found[kernel][item], alone[0])
    assert torch.equal(found["sdpa"], found["eager"])
    plain, _ = decode(lens.hf_model, inputs, None, **options)
    assert not torch.equal(plain, found["sdpa"])


@pytest.mark.parametrize("name", ["reading", "answering", "both"])
def test_beam_scores_are_the_references(one_blip, ask, name):
    """The best beam's score is the reference's log-probability of its tokens: nothing was lost."""
    inputs = ask(one_blip, 2).inputs
    with torch.inference_mode(), cl.intervening(one_blip.hf_model, METHODS[name]):
        out = one_blip.hf_model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            num_beams=3,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
        )
    for item in range(2):
        ids = out.sequences[item, inputs["input_ids"].shape[1] :]
        wanted = queries.run(exact_blip(), inputs, item, **EDITS[name], answer=ids[:-1])
        rows = wanted.logits[-len(ids) :].log_softmax(dim=1)
        score = float(rows[torch.arange(len(ids)), ids].sum())
        assert float(out.sequences_scores[item]) == pytest.approx(score, abs=1e-3)


def test_sampling_repeats_for_a_seed(ask):
    lens = blip_of("sdpa")

    def sample(seed):
        how = cl.Sampling(seed=seed, max_new_tokens=5)
        return [row.tolist() for row in cl.generate(lens, ask(lens, 3), METHODS["both"], how).ids]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


# ── cl.generate ──


def test_generate_is_hf_generate(one_blip, ask):
    ids, logits = decode(one_blip.hf_model, ask(one_blip, 3).inputs, METHODS["both"])
    answers = cl.generate(
        one_blip, ask(one_blip, 3), METHODS["both"], cl.Greedy(max_new_tokens=STEPS)
    )
    for row, found in zip(ids.tolist(), answers.ids, strict=True):
        stop = next((i for i, token in enumerate(row) if token in (0, 2)), len(row))
        assert found.tolist() == row[:stop]
    words = one_blip.words.get_vocab()
    margins = logits[:, 0, words["yes"]] - logits[:, 0, words["no"]]
    torch.testing.assert_close(torch.tensor(answers.margins), margins, rtol=0, atol=1e-5)
    assert all("<image>" not in text for text in answers.texts)


def test_generate_keeps_the_order_over_batches(one_blip):
    pairs = [(picture(i), QUESTIONS[i % 3]) for i in range(5)]
    how = cl.Greedy(max_new_tokens=STEPS)
    together = cl.generate(one_blip, pairs, METHODS["both"], how, batch_size=5, progress=False)
    apart = cl.generate(one_blip, pairs, METHODS["both"], how, batch_size=2, progress=False)
    assert apart.texts == together.texts
    assert apart.margins == pytest.approx(together.margins, abs=ATOL)
    assert len(set(together.texts)) > 1


# ── guessed answers ──


def test_assisted_decoding(one_blip, ask):
    """The Q-Former is read before any token is guessed; the decoder tells guesses apart."""
    inputs = ask(one_blip).inputs
    guess = {"max_new_tokens": 10, "prompt_lookup_num_tokens": 3}
    for name in ("reading", "answering"):
        wanted, logits = decode(one_blip.hf_model, inputs, METHODS[name], max_new_tokens=10)
        ids, found = decode(one_blip.hf_model, inputs, METHODS[name], **guess)
        assert torch.equal(ids, wanted)
        torch.testing.assert_close(found.reshape(logits.shape), logits, rtol=0, atol=ATOL)


def test_another_turn_onto_a_cache_is_refused(one_blip, ask):
    inputs = ask(one_blip).inputs
    more = torch.tensor([[7, 8]])
    with torch.inference_mode(), cl.intervening(one_blip.hf_model, METHODS["answering"]):
        cache = cache_of(one_blip.hf_model(**inputs, use_cache=True).language_model_outputs)
        with pytest.raises(InterventionError, match=r"reads 2 tokens onto a filled"):
            one_blip.hf_model.language_model(input_ids=more, **{CACHE: cache})
